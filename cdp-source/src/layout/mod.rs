//! What a disk consists of, read from the disk itself or from a point of it.
//!
//! Reads a few sectors of each place and writes nothing; every number of a table is checked against the disk before it is used, and what is
//! not known is said to be unknown. Damage of a table is told, and no reason to refuse anything: a disk is protected, and put back, block by
//! block. `gpt` and `mbr` know the tables, `grow` moves what has to stand at the end of a larger disk.

mod gpt;
pub mod grow;
mod mbr;

use crate::probe::signature;
use cdp_protocol::layout::{Content, Layout, PARTITIONS_MAX, Partition, Table};
use std::io;

/// Bytes of code in the first sector, before the table.
const BOOT_CODE_BYTES: usize = 440;
/// Bytes at the start of a place in which a signature is looked for.
const LOOK_BYTES: u64 = 68 * 1024;

/// Fills the buffer with what stands at an offset; asked for nothing beyond the disk's end.
pub type ReadAt<'a> = dyn FnMut(u64, &mut [u8]) -> io::Result<()> + 'a;

/// A disk as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its layout.
    pub layout: Layout,
    /// What stands on the whole disk, where it has no table.
    pub content: Content,
    /// What is wrong with its table.
    pub broken: Vec<String>,
}

impl Found {
    /// The first byte of the disk behind its last partition.
    #[must_use]
    pub fn end_bytes(&self) -> u64 {
        self.layout.partitions.iter().map(Partition::end_bytes).max().unwrap_or(0)
    }
}

/// Looks at a disk of so many bytes. `sectors`: the sizes that a sector of it may have, the likeliest first.
///
/// # Errors
/// Where it cannot be read.
pub fn look(read: &mut ReadAt<'_>, size_bytes: u64, sectors: &[u32]) -> io::Result<Found> {
    let mut disk = Disk { read, size_bytes };
    let first = disk.bytes(0, 512)?.unwrap_or_default();
    let has_boot_code = first.iter().take(BOOT_CODE_BYTES).any(|byte| *byte != 0);
    let mut layout = Layout {
        sector_bytes: sectors.first().copied().unwrap_or(512),
        size_bytes,
        table: Table::None,
        has_boot_code,
        partitions: Vec::new(),
    };
    let mut broken = Vec::new();
    let content = disk.content(0, size_bytes)?;
    // A boot sector of FAT or NTFS ends as a table does.
    if content == Content::Unknown {
        let mut places = Vec::new();
        for sector_bytes in sectors {
            if let Some(table) = gpt::table(&mut disk, *sector_bytes)? {
                layout.sector_bytes = *sector_bytes;
                (layout.table, places, broken) = (Table::Gpt(table.disk), table.partitions, table.broken);
                break;
            }
        }
        if layout.table == Table::None
            && let Some(table) = mbr::table(&mut disk, layout.sector_bytes)?
        {
            (layout.table, places, broken) = (Table::Mbr(table.signature), table.partitions, table.broken);
        }
        for place in places.into_iter().take(PARTITIONS_MAX) {
            let content = disk.content(place.start_bytes, place.size_bytes)?;
            layout.partitions.push(Partition { content, ..place });
        }
        broken.extend(overlaps(&layout.partitions));
    }
    Ok(Found { layout, content, broken })
}

/// Partitions that lie over one another.
fn overlaps(partitions: &[Partition]) -> Vec<String> {
    let mut sorted: Vec<&Partition> = partitions.iter().collect();
    sorted.sort_by_key(|partition| (partition.start_bytes, partition.number));
    let pairs = sorted.windows(2).filter(|pair| pair[0].end_bytes() > pair[1].start_bytes);
    pairs.map(|pair| format!("partitions {} and {} overlap", pair[0].number, pair[1].number)).collect()
}

/// The disk that is looked at.
struct Disk<'a, 'b> {
    read: &'a mut ReadAt<'b>,
    size_bytes: u64,
}

impl Disk<'_, '_> {
    /// Bytes at a place; `None` where the disk ends before.
    fn bytes(&mut self, offset: u64, len: u64) -> io::Result<Option<Vec<u8>>> {
        if offset.checked_add(len).is_none_or(|end| end > self.size_bytes) {
            return Ok(None);
        }
        let mut bytes = vec![0; len as usize];
        (self.read)(offset, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// What begins at a place of so many bytes.
    fn content(&mut self, offset: u64, size_bytes: u64) -> io::Result<Content> {
        let head = self.bytes(offset, size_bytes.min(LOOK_BYTES))?.unwrap_or_default();
        let name = signature(&head);
        Ok(Content::ALL.into_iter().find(|content| Some(content.name()) == name).unwrap_or(Content::Unknown))
    }

    /// Whether a place of `count` sectors from `first` on lies within the disk; gives its first byte and its length.
    fn place(&self, first: u64, count: u64, sector_bytes: u32) -> Option<(u64, u64)> {
        let (start, len) = (first.checked_mul(sector_bytes.into())?, count.checked_mul(sector_bytes.into())?);
        let is_within = len > 0 && start.checked_add(len)? <= self.size_bytes;
        is_within.then_some((start, len))
    }
}

fn half(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().expect("within what was read"))
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("within what was read"))
}

#[cfg(test)]
mod tests;
