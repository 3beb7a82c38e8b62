//! Proving an image: everything that it needs is read, opened and hashed.
//!
//! Block after block, in order, as a restore would have them; what newer content lies over is not looked at. Memory: some opened frames.

use super::ImageError;
use super::format::{ImageVolume, Place, SLICE_BLOCKS, slices_of};
use super::reader::ImageFile;
use crate::restore::fetch::of_blocks;
use cdp_protocol::codec::{open_content, open_digests};
use cdp_protocol::frame;
use cdp_protocol::seal::{DataKey, DigestKey};
use cdp_protocol::units::{BLOCK_BYTES, Block, Extent, VolumeSlot, blocks_in};
use std::collections::VecDeque;

/// Frames that are kept opened: what is written here and there lies in frames that many runs share.
const OPENED_MAX: usize = 32;
/// Zeros that are hashed at a time.
static ZEROS: [u8; 64 * BLOCK_BYTES] = [0; 64 * BLOCK_BYTES];

/// Told how many blocks are done; `false` ends it.
pub type OnBlocks<'a> = dyn FnMut(u64) -> bool + 'a;

/// What an image was found to hold of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// BLAKE3 of its raw image, unreadable blocks as zeros.
    pub image_hash: [u8; 32],
    /// Blocks with content.
    pub content_blocks: u64,
    /// Blocks that the device could not read.
    pub unreadable_blocks: u64,
}

/// Reads all of an image and holds it against what its footer says; `false` where it was ended early.
///
/// # Errors
/// Where it cannot be read, or anything in it is damaged.
pub fn verify(image: &mut ImageFile, key: &DataKey, on_blocks: &mut OnBlocks<'_>) -> Result<bool, ImageError> {
    let Some(found) = examine(image, key, on_blocks)? else { return Ok(false) };
    for (entry, found) in image.footer().volumes.iter().zip(found) {
        let ImageVolume { image_hash, content_blocks, unreadable_blocks, .. } = *entry;
        if found != (Found { image_hash, content_blocks, unreadable_blocks }) {
            let what = format!("volume {} is not what was hashed when it was made", entry.volume.name);
            return Err(ImageError::Damaged { path: image.path().to_owned(), what });
        }
    }
    Ok(true)
}

/// Reads all of an image, and tells what each volume comes to; `None` where it was ended early.
///
/// # Errors
/// Where it cannot be read, or anything in it is damaged.
pub fn examine(
    image: &mut ImageFile,
    key: &DataKey,
    on_blocks: &mut OnBlocks<'_>,
) -> Result<Option<Vec<Found>>, ImageError> {
    let volumes = image.footer().volumes.clone();
    let (mut all, mut before) = (Vec::new(), 0);
    for entry in volumes {
        let (slot, size_bytes) = (entry.volume.slot, entry.volume.size_bytes);
        let mut reading = Reading::new(slot, size_bytes, key);
        for slice in 0..slices_of(size_bytes) {
            let start = slice * SLICE_BLOCKS;
            let count = (blocks_in(size_bytes) - u64::from(start)).min(SLICE_BLOCKS.into()) as u32;
            for (extent, place) in image.places(slot, Extent { start: Block(start), count })? {
                reading.take(image, extent, place)?;
            }
            if !on_blocks(before + u64::from(start) + u64::from(count)) {
                return Ok(None);
            }
        }
        before += blocks_in(size_bytes);
        all.push(reading.finish());
    }
    Ok(Some(all))
}

/// A volume that is read.
struct Reading<'a> {
    slot: VolumeSlot,
    /// Bytes still to be hashed.
    left: u64,
    hasher: blake3::Hasher,
    found: Found,
    key: &'a DataKey,
    digest_key: DigestKey,
    opened: VecDeque<Opened>,
}

/// A frame whose seals were opened.
struct Opened {
    at: u64,
    extents: Vec<Extent>,
    content: Vec<u8>,
}

impl<'a> Reading<'a> {
    fn new(slot: VolumeSlot, size_bytes: u64, key: &'a DataKey) -> Self {
        let found = Found { image_hash: [0; 32], content_blocks: 0, unreadable_blocks: 0 };
        let (hasher, digest_key) = (blake3::Hasher::new(), key.digest_key());
        Self { slot, left: size_bytes, hasher, found, key, digest_key, opened: VecDeque::new() }
    }

    fn take(&mut self, image: &mut ImageFile, extent: Extent, place: Place) -> Result<(), ImageError> {
        match place {
            Place::Zeros => self.hash_zeros(extent),
            Place::Unreadable => {
                self.found.unreadable_blocks += u64::from(extent.count);
                self.hash_zeros(extent);
            }
            Place::Frame(at) => {
                self.found.content_blocks += u64::from(extent.count);
                if !self.opened.iter().any(|opened| opened.at == at) {
                    self.open(image, at)?;
                }
                let opened = self.opened.iter().find(|opened| opened.at == at).expect("it was just opened");
                let damaged = || {
                    let what = format!("the frame at {at} does not have block {}", extent.start);
                    ImageError::Damaged { path: image.path().to_owned(), what }
                };
                let content = of_blocks(&opened.extents, &opened.content, extent).ok_or_else(damaged)?;
                let len = (content.len() as u64).min(self.left) as usize;
                self.hasher.update(&content[..len]);
                self.left -= len as u64;
            }
        }
        Ok(())
    }

    fn open(&mut self, image: &mut ImageFile, at: u64) -> Result<(), ImageError> {
        let bytes = image.frame(self.slot, at)?;
        let damaged = |what: &str| {
            let what = format!("the frame at {at}: {what}");
            ImageError::Damaged { path: image.path().to_owned(), what }
        };
        let frame = frame::decode(&image.footer().group, &bytes).map_err(|error| damaged(&error.to_string()))?;
        let key = self.key.attempt_key(&frame.header.attempt);
        let content = open_content(&frame, &key).map_err(|error| damaged(&error.to_string()))?;
        let digests = open_digests(&frame, &key).map_err(|error| damaged(&error.to_string()))?;
        if self.digest_key.digests(&content) != digests {
            return Err(damaged("its digests are of something else"));
        }
        if self.opened.len() == OPENED_MAX {
            self.opened.pop_front();
        }
        self.opened.push_back(Opened { at, extents: frame.header.extents, content });
        Ok(())
    }

    fn hash_zeros(&mut self, extent: Extent) {
        let mut len = extent.to_bytes().min(self.left);
        self.left -= len;
        while len > 0 {
            let part = len.min(ZEROS.len() as u64);
            self.hasher.update(&ZEROS[..part as usize]);
            len -= part;
        }
    }

    fn finish(self) -> Found {
        Found { image_hash: *self.hasher.finalize().as_bytes(), ..self.found }
    }
}
