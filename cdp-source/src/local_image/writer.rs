//! The file of an image while it is made: frames appended, their places noted, and the index behind them.
//!
//! All frames are sealed under one attempt, and a frame's sequence is where it begins: nothing is sealed twice under one, and nothing can
//! stand in another's place. Of a block that is put more than once the last counts. A crash anywhere leaves a file without a footer, which
//! is no image.

use super::format::{
    Footer, Header, ImageVolume, Place, Run, SLICE_BLOCKS, SliceEntry, encode_slice, slice_hash, slices_of,
};
use super::table::Table;
use super::{ImageError, failed};
use crate::capture::{BlockContent, CapturedVolume};
use crate::reader;
use cdp_protocol::codec::{Draft, Sealer};
use cdp_protocol::limits::CONTENT_BYTES_MAX;
use cdp_protocol::packer::{Packer, Packing};
use cdp_protocol::record::Volume;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{AttemptId, Block, Epoch, Extent, Generation, GroupId, Sequence, VolumeSlot, blocks_in};
use cdp_seams::storage::StorageFile;
use roaring::RoaringBitmap;
use std::path::{Path, PathBuf};

/// Bytes that are gathered for one write.
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes after which what was written is synced, so that it does not fill the machine's memory.
const SYNC_EVERY_BYTES: u64 = 64 << 20;
/// As tight as a disk of the office is worth.
const PACKING: Packing = Packing::zstd(1);

/// What an image is begun with.
#[derive(Clone, Debug)]
pub struct Start {
    /// The group.
    pub group: GroupId,
    /// A fresh, random attempt.
    pub attempt: AttemptId,
    /// The generation that frames name.
    pub generation: Generation,
    /// The newest point when it was begun, which frames name.
    pub epoch: Epoch,
    /// The volumes, by slot.
    pub volumes: Vec<Volume>,
}

/// An image that is made.
pub struct ImageWriter {
    file: Box<dyn StorageFile>,
    path: PathBuf,
    table: Table,
    volumes: Vec<Volume>,
    sealer: Sealer,
    packer: Packer,
    /// Where the next byte goes, with what is gathered.
    end: u64,
    gathered: Vec<u8>,
    unsynced_bytes: u64,
}

impl ImageWriter {
    /// Begins an image in `file` at `path`, its table in another; both are empty.
    ///
    /// # Errors
    /// Where they cannot be written.
    pub fn new(
        file: Box<dyn StorageFile>,
        path: &Path,
        table: Box<dyn StorageFile>,
        start: &Start,
        key: &DataKey,
    ) -> Result<Self, ImageError> {
        let sizes: Vec<u64> = start.volumes.iter().map(|volume| volume.size_bytes).collect();
        let Start { group, attempt, generation, epoch, .. } = *start;
        let mut writer = Self {
            file,
            path: path.to_owned(),
            table: Table::new(table, &sizes).map_err(failed("write the table of", path))?,
            volumes: start.volumes.clone(),
            sealer: Sealer::new(group, epoch, generation, attempt, key),
            packer: Packer::new(PACKING),
            end: 0,
            gathered: Vec::new(),
            unsynced_bytes: 0,
        };
        writer.append(&Header { group, attempt, generation }.encode())?;
        Ok(writer)
    }

    /// Bytes so far.
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        self.end
    }

    /// The volumes hold this now, as far as it goes.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn put(&mut self, volume: usize, captured: &CapturedVolume) -> Result<(), ImageError> {
        let (mut zeros, mut unreadable) = (RoaringBitmap::new(), RoaringBitmap::new());
        let (mut extents, mut draft) = (Vec::<Extent>::new(), Draft::default());
        for (block, held) in captured.iter() {
            match held {
                BlockContent::Zero => _ = zeros.insert(block.0),
                BlockContent::Unreadable => _ = unreadable.insert(block.0),
                BlockContent::Bytes(bytes) => {
                    append_block(&mut extents, block);
                    draft.push(bytes);
                    if draft.content().len() == CONTENT_BYTES_MAX {
                        self.frame(volume, std::mem::take(&mut extents), std::mem::take(&mut draft))?;
                    }
                }
            }
        }
        if !extents.is_empty() {
            self.frame(volume, extents, draft)?;
        }
        self.put_bare(volume, &zeros, Place::Zeros)?;
        self.put_bare(volume, &unreadable, Place::Unreadable)
    }

    /// These blocks are zeros now.
    ///
    /// # Errors
    /// Where that cannot be noted.
    pub fn put_zeros(&mut self, volume: usize, blocks: &RoaringBitmap) -> Result<(), ImageError> {
        self.put_bare(volume, blocks, Place::Zeros)
    }

    fn put_bare(&self, volume: usize, blocks: &RoaringBitmap, place: Place) -> Result<(), ImageError> {
        for extent in reader::runs(blocks, u32::MAX) {
            self.note(volume, extent, place)?;
        }
        Ok(())
    }

    fn frame(&mut self, volume: usize, extents: Vec<Extent>, draft: Draft) -> Result<(), ImageError> {
        let (slot, at) = (self.volumes[volume].slot, self.end);
        let frame = self.sealer.content_of(&mut self.packer, slot, Sequence(at), extents.clone(), draft);
        self.append(&frame)?;
        extents.into_iter().try_for_each(|extent| self.note(volume, extent, Place::Frame(at)))
    }

    fn note(&self, volume: usize, extent: Extent, place: Place) -> Result<(), ImageError> {
        let noted = self.table.set(volume, extent.start.0, extent.count, place);
        noted.map_err(failed("write the table of", &self.path))
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.gathered.extend_from_slice(bytes);
        self.end += bytes.len() as u64;
        if self.gathered.len() >= BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), ImageError> {
        let at = self.end - self.gathered.len() as u64;
        self.file.write_at(&self.gathered, at).map_err(failed("write", &self.path))?;
        self.unsynced_bytes += self.gathered.len() as u64;
        self.gathered.clear();
        if self.unsynced_bytes >= SYNC_EVERY_BYTES { self.sync() } else { Ok(()) }
    }

    fn sync(&mut self) -> Result<(), ImageError> {
        self.unsynced_bytes = 0;
        self.file.sync().map_err(failed("sync", &self.path))
    }

    /// Everything is put: writes slices and directories, makes all of it durable, and lets go of what is cached of it, so that who reads it next
    /// reads the disk. Gives the volumes, their images' hashes not known yet.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn index(&mut self) -> Result<Vec<ImageVolume>, ImageError> {
        let volumes = (0..self.volumes.len()).map(|volume| self.directory(volume)).collect::<Result<Vec<_>, _>>()?;
        self.flush()?;
        self.sync()?;
        // A help, not a promise: what is read from memory was written all the same.
        let _ = self.file.forget();
        Ok(volumes)
    }

    fn directory(&mut self, volume: usize) -> Result<ImageVolume, ImageError> {
        let Volume { slot, size_bytes, .. } = self.volumes[volume];
        let (mut entries, mut content_blocks, mut unreadable_blocks) = (Vec::new(), 0, 0);
        for slice in 0..slices_of(size_bytes) {
            let places = self.table.slice(volume, slice).map_err(failed("read the table of", &self.path))?;
            let runs = runs_of(&places, blocks_of_slice(size_bytes, slice));
            for run in &runs {
                let blocks = if run.place == Place::Unreadable { &mut unreadable_blocks } else { &mut content_blocks };
                *blocks += u64::from(run.count);
            }
            entries.push(self.slice(slot, slice, &runs)?);
        }
        let (directory_at, directory) = (self.end, SliceEntry::encode_all(&entries));
        self.append(&directory)?;
        Ok(ImageVolume {
            volume: self.volumes[volume].clone(),
            directory_at,
            directory_hash: *blake3::hash(&directory).as_bytes(),
            content_blocks,
            unreadable_blocks,
            image_hash: [0; 32],
        })
    }

    fn slice(&mut self, slot: VolumeSlot, slice: u32, runs: &[Run]) -> Result<SliceEntry, ImageError> {
        if runs.is_empty() {
            return Ok(SliceEntry::default());
        }
        let (at, bytes) = (self.end, encode_slice(runs));
        self.append(&bytes)?;
        Ok(SliceEntry { at, len: bytes.len() as u32, hash: slice_hash(slot, slice, &bytes) })
    }

    /// All of it was read again and is whole: the footer makes it an image.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn finish(mut self, footer: &Footer, key: &DataKey) -> Result<(), ImageError> {
        self.append(&footer.encode(key))?;
        self.flush()?;
        self.sync()
    }
}

/// Blocks of a slice that the volume has.
fn blocks_of_slice(size_bytes: u64, slice: u32) -> usize {
    let before = u64::from(slice) * u64::from(SLICE_BLOCKS);
    (blocks_in(size_bytes) - before).min(SLICE_BLOCKS.into()) as usize
}

fn runs_of(places: &[Place], blocks: usize) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (start, place) in places.iter().take(blocks).enumerate() {
        match runs.last_mut() {
            Some(last) if last.place == *place && last.start + last.count == start as u32 => last.count += 1,
            _ if *place == Place::Zeros => {}
            _ => runs.push(Run { start: start as u32, count: 1, place: *place }),
        }
    }
    runs
}

fn append_block(extents: &mut Vec<Extent>, block: Block) {
    match extents.last_mut() {
        Some(last) if last.end() == u64::from(block.0) => last.count += 1,
        _ => extents.push(Extent { start: block, count: 1 }),
    }
}
