//! GUID partition tables (UEFI specification, 5.3): the header in the second sector, the entries, and their copies at the disk's end.
//!
//! Only a table whose checksums match is believed; the copy at the end stands in where the first one is damaged, and that is told.

use super::mbr::{ENTRIES_AT, PROTECTIVE};
use super::{Disk, half, word};
use cdp_protocol::layout::{Content, PARTITIONS_MAX, Partition};
use std::io;

const MAGIC: &[u8; 8] = b"EFI PART";
const HEADER_BYTES: usize = 92;
/// Bytes of entries that are read: 128 of 128 bytes are 16 KiB.
const ENTRIES_BYTES_MAX: u64 = 1 << 20;
const ENTRY_BYTES: usize = 128;
/// An attribute: a BIOS starts from here.
const BIOS_BOOTABLE: u64 = 1 << 2;

/// What a table says.
pub(super) struct TableFound {
    pub(super) disk: [u8; 16],
    pub(super) partitions: Vec<Partition>,
    pub(super) broken: Vec<String>,
}

/// A header and its entries, both as their checksums say.
pub(super) struct Sound {
    /// The header's own sector, whole.
    pub(super) header: Vec<u8>,
    pub(super) entries: Vec<u8>,
}

/// The table of a disk whose sectors are so long; `None` where there is none.
pub(super) fn table(disk: &mut Disk<'_, '_>, sector_bytes: u32) -> io::Result<Option<TableFound>> {
    let first = sound_at(disk, 1, sector_bytes)?;
    let last = (disk.size_bytes / u64::from(sector_bytes)).saturating_sub(1);
    let what = match &first {
        Read::Sound(_) => None,
        Read::Broken(what) => Some(*what),
        // A copy alone may be of a table that was there once.
        Read::None if is_protected(disk)? => Some("the header of its partition table is gone"),
        Read::None => return Ok(None),
    };
    let copy = if what.is_some() { sound_at(disk, last, sector_bytes)? } else { Read::None };
    let (found, broken) = match (first, what, copy) {
        (Read::Sound(found), ..) => (found, Vec::new()),
        (_, Some(what), Read::Sound(found)) => {
            (found, vec![format!("{what}; the copy at the end of the disk is whole")])
        }
        (_, Some(what), Read::Broken(_)) => {
            let broken = vec![format!("{what}, and so is the copy at the end of the disk")];
            return Ok(Some(TableFound { disk: [0; 16], partitions: Vec::new(), broken }));
        }
        // In sectors of another size, perhaps.
        _ => return Ok(None),
    };
    let mut table = TableFound { disk: found.disk(), partitions: Vec::new(), broken };
    for (number, entry) in (1..).zip(found.entries.chunks_exact(found.entry_bytes())) {
        if entry[..16] == [0; 16] || table.partitions.len() == PARTITIONS_MAX {
            continue;
        }
        let (first, last) = (word(entry, 32), word(entry, 40));
        match disk.place(first, last.wrapping_sub(first).wrapping_add(1), sector_bytes) {
            Some(place) => table.partitions.push(partition(number, entry, place)),
            None => table.broken.push(format!("partition {number} lies outside of the disk")),
        }
    }
    Ok(Some(table))
}

/// Whether the first sector keeps others away from a table of this kind.
fn is_protected(disk: &mut Disk<'_, '_>) -> io::Result<bool> {
    let first = disk.bytes(0, 512)?.unwrap_or_default();
    Ok(first.get(ENTRIES_AT + 4) == Some(&PROTECTIVE) && first[510..] == [0x55, 0xaa])
}

fn partition(number: u32, entry: &[u8], (start_bytes, size_bytes): (u64, u64)) -> Partition {
    let letters: Vec<u16> =
        entry[56..128].as_chunks::<2>().0.iter().map(|letter| u16::from_le_bytes(*letter)).collect();
    let end = letters.iter().position(|letter| *letter == 0).unwrap_or(letters.len());
    let guid = |at: usize| *entry[at..].first_chunk::<16>().expect("an entry has 128 bytes");
    Partition {
        number,
        start_bytes,
        size_bytes,
        kind: guid(0),
        id: guid(16),
        is_active: word(entry, 48) & BIOS_BOOTABLE != 0,
        content: Content::Unknown,
        name: String::from_utf16_lossy(&letters[..end]),
    }
}

/// What was found where a header may be.
pub(super) enum Read {
    None,
    Broken(&'static str),
    Sound(Sound),
}

/// The header in that sector, and its entries.
pub(super) fn sound_at(disk: &mut Disk<'_, '_>, sector: u64, sector_bytes: u32) -> io::Result<Read> {
    let Some((offset, len)) = disk.place(sector, 1, sector_bytes) else { return Ok(Read::None) };
    let Some(header) = disk.bytes(offset, len)?.filter(|header| header.starts_with(MAGIC)) else {
        return Ok(Read::None);
    };
    let header_bytes = half(&header, 12) as usize;
    let is_long_enough = (HEADER_BYTES..=sector_bytes as usize).contains(&header_bytes);
    if !is_long_enough || header_crc(&header, header_bytes) != half(&header, 16) || word(&header, 24) != sector {
        return Ok(Read::Broken("the header of its partition table is damaged"));
    }
    let (count, entry_bytes) = (u64::from(half(&header, 80)), u64::from(half(&header, 84)));
    let len =
        count.checked_mul(entry_bytes).filter(|len| *len <= ENTRIES_BYTES_MAX && entry_bytes >= ENTRY_BYTES as u64);
    let place = word(&header, 72).checked_mul(sector_bytes.into()).zip(len);
    let Some(entries) = place.map(|(offset, len)| disk.bytes(offset, len)).transpose()?.flatten() else {
        return Ok(Read::Broken("its partition table lies outside of the disk"));
    };
    if crc32fast::hash(&entries) != half(&header, 88) {
        return Ok(Read::Broken("its partition table is damaged"));
    }
    Ok(Read::Sound(Sound { header, entries }))
}

impl Sound {
    fn disk(&self) -> [u8; 16] {
        *self.header[56..].first_chunk().expect("a header has 92 bytes")
    }

    fn entry_bytes(&self) -> usize {
        half(&self.header, 84) as usize
    }
}

/// The checksum of a header, which is of it with zeros in the checksum's own place.
pub(super) fn header_crc(header: &[u8], header_bytes: usize) -> u32 {
    let mut unsummed = header[..header_bytes].to_vec();
    unsummed[16..20].fill(0);
    crc32fast::hash(&unsummed)
}
