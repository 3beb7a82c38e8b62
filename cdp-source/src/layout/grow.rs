//! What has to stand at the end of a disk, where a point was put back onto a larger one: the copy of a GUID partition table.
//!
//! Only says what to write, in the order in which it is to be written, each piece durable before the next. Invariant: whatever a crash leaves,
//! the table in the second sector is whole; once it names the new copy, that is.

use super::gpt::{Read, header_crc, sound_at};
use super::mbr::{ENTRIES_AT, PROTECTIVE};
use super::{Disk, ReadAt, half, word};
use std::io;

/// Bytes and where they belong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// The first byte on the disk.
    pub offset: u64,
    /// What is written there.
    pub bytes: Vec<u8>,
}

/// What is to be done to a disk of `size_bytes` on which one of `old_bytes` was put back: nothing where it has no GUID partition table, or as
/// many sectors as before. `Err` in the `Ok`: why its table cannot be moved.
///
/// # Errors
/// Where the disk cannot be read.
pub fn moved(
    read: &mut ReadAt<'_>,
    (old_bytes, size_bytes): (u64, u64),
    sector_bytes: u32,
) -> io::Result<Result<Vec<Write>, &'static str>> {
    let sector = u64::from(sector_bytes);
    let (old_last, last) = ((old_bytes / sector).saturating_sub(1), (size_bytes / sector).saturating_sub(1));
    if last == old_last {
        return Ok(Ok(Vec::new()));
    }
    let mut disk = Disk { read, size_bytes };
    let found = match sound_at(&mut disk, 1, sector_bytes)? {
        Read::Sound(found) => found,
        Read::None => return Ok(Ok(Vec::new())),
        Read::Broken(what) => return Ok(Err(what)),
    };
    let entries_sectors = (found.entries.len() as u64).div_ceil(sector);
    let entries_at = last.saturating_sub(entries_sectors);
    if entries_at <= word(&found.header, 48) {
        return Ok(Err("there is no room behind its last usable sector"));
    }
    let copy = header(&found.header, [last, 1, entries_at], entries_at - 1);
    let first = header(&found.header, [1, last, word(&found.header, 72)], entries_at - 1);
    let mut writes = vec![
        Write { offset: entries_at * sector, bytes: found.entries },
        Write { offset: last * sector, bytes: copy },
        Write { offset: sector, bytes: first },
    ];
    let mut protective = disk.bytes(0, 512)?.unwrap_or_default();
    if protective.get(ENTRIES_AT + 4) == Some(&PROTECTIVE) && half(&protective, ENTRIES_AT + 8) == 1 {
        let count = u32::try_from(last).unwrap_or(u32::MAX);
        protective[ENTRIES_AT + 12..ENTRIES_AT + 16].copy_from_slice(&count.to_le_bytes());
        writes.push(Write { offset: 0, bytes: protective });
    }
    // Nobody is to find a copy that does not stand at the end; on a disk that is hardly larger the new one lies over it.
    if old_last < entries_at {
        writes.push(Write { offset: old_last * sector, bytes: vec![0; sector_bytes as usize] });
    }
    Ok(Ok(writes))
}

/// A header of the same table in another place: its own sector, the other header's, and that of the entries.
fn header(found: &[u8], [own, other, entries]: [u64; 3], last_usable: u64) -> Vec<u8> {
    let mut header = found.to_vec();
    for (at, number) in [(24, own), (32, other), (48, last_usable), (72, entries)] {
        header[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }
    let crc = header_crc(&header, half(&header, 12) as usize);
    header[16..20].copy_from_slice(&crc.to_le_bytes());
    header
}
