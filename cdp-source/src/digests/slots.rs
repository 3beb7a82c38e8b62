//! A volume's file of digests: a header, then 16 bytes a block (`docs/format/digests.md`).
//!
//! Knows nothing of what may be believed. Slots are written in place: whoever writes them has said before, durably, which.

use cdp_protocol::seal::{DIGEST_BYTES, Digest};
use cdp_protocol::units::{Extent, VolumeSlot};
use cdp_seams::storage::{Storage, StorageFile};
use roaring::RoaringBitmap;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

const MAGIC: [u8; 4] = *b"CDPD";
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 64;
/// Where slots begin, so that 256 of them share a page.
const SLOTS_AT: u64 = 4096;
const HOLE: Digest = [0xff; DIGEST_BYTES];
const UNKNOWN: Digest = [0; DIGEST_BYTES];
/// Slots that are read or written at a time: 64 KiB.
pub(super) const RUN_BLOCKS_MAX: u32 = 4096;

/// What is known of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    Unknown,
    Hole,
    Digest(Digest),
}

/// Where a volume's file is, and how many slots it has.
type Place<'a> = (&'a dyn Storage, &'a Path, VolumeSlot, u64);

/// An open file of digests.
pub(super) struct SlotFile {
    file: Box<dyn StorageFile>,
    /// Which state it belongs to.
    pub(super) era: [u8; 16],
}

impl SlotFile {
    /// Makes the file anew, durable but for its name.
    pub(super) fn make((storage, folder, slot, blocks): Place<'_>, era: &[u8; 16]) -> io::Result<Self> {
        let path = slots_path(folder, slot);
        match storage.remove(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = storage.create_new(&path)?;
        file.allocate(SLOTS_AT + blocks * DIGEST_BYTES as u64)?;
        file.write_at(&header(slot, blocks, era), 0)?;
        file.sync()?;
        Ok(Self { file, era: *era })
    }

    /// Opens the file of this volume and era.
    pub(super) fn open((storage, folder, slot, blocks): Place<'_>, era: &[u8; 16]) -> io::Result<Self> {
        let file = storage.open_write(&slots_path(folder, slot))?;
        let mut found = [0; HEADER_BYTES];
        file.read_at(&mut found, 0)?;
        if found != header(slot, blocks, era) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not the digests of this volume"));
        }
        Ok(Self { file, era: *era })
    }

    /// The slots of an extent of at most `RUN_BLOCKS_MAX` blocks.
    pub(super) fn read(&self, extent: Extent) -> io::Result<Vec<Slot>> {
        let mut bytes = vec![0; extent.count as usize * DIGEST_BYTES];
        // Behind the end of a file that was cut nothing is known.
        self.file.read_at(&mut bytes, offset(extent.start.0))?;
        let to_slot = |digest: &Digest| match *digest {
            UNKNOWN => Slot::Unknown,
            HOLE => Slot::Hole,
            digest => Slot::Digest(digest),
        };
        Ok(bytes.as_chunks::<DIGEST_BYTES>().0.iter().map(to_slot).collect())
    }

    /// Writes slots, durably.
    pub(super) fn write(&mut self, digests: &BTreeMap<u32, Digest>, holes: &RoaringBitmap) -> io::Result<()> {
        let all = merged(digests.iter().map(|(block, digest)| (*block, *digest)), holes.iter());
        let mut run: (u32, Vec<u8>) = (0, Vec::new());
        for (block, digest) in all {
            let len = (run.1.len() / DIGEST_BYTES) as u32;
            if len > 0 && (len == RUN_BLOCKS_MAX || u64::from(run.0) + u64::from(len) != u64::from(block)) {
                self.file.write_at(&run.1, offset(run.0))?;
                run.1.clear();
            }
            if run.1.is_empty() {
                run.0 = block;
            }
            run.1.extend_from_slice(&digest);
        }
        self.file.write_at(&run.1, offset(run.0))?;
        self.file.sync()
    }
}

/// Digests and holes in block order.
fn merged(
    digests: impl Iterator<Item = (u32, Digest)>,
    holes: impl Iterator<Item = u32>,
) -> impl Iterator<Item = (u32, Digest)> {
    let (mut digests, mut holes) = (digests.peekable(), holes.peekable());
    std::iter::from_fn(move || {
        let hole_first = match (digests.peek(), holes.peek()) {
            (Some((block, _)), Some(hole)) => hole < block,
            (_, hole) => hole.is_some(),
        };
        if hole_first { holes.next().map(|block| (block, HOLE)) } else { digests.next() }
    })
}

/// A volume's file in the folder of its group's digests. It is made whole, and then written in place: cuts leave it out (`excludes`).
#[must_use]
pub fn slots_path(folder: &Path, slot: VolumeSlot) -> PathBuf {
    folder.join(format!("{slot}.slots"))
}

fn offset(block: u32) -> u64 {
    SLOTS_AT + u64::from(block) * DIGEST_BYTES as u64
}

fn header(slot: VolumeSlot, blocks: u64, era: &[u8; 16]) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4] = VERSION;
    bytes[6..8].copy_from_slice(&slot.0.to_le_bytes());
    bytes[8..16].copy_from_slice(&blocks.to_le_bytes());
    bytes[16..32].copy_from_slice(era);
    let crc = crc32fast::hash(&bytes[..60]);
    bytes[60..].copy_from_slice(&crc.to_le_bytes());
    bytes
}
