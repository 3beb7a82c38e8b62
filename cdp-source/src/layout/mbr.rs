//! Partition tables of the first sector, with the chain of tables of an extended partition.

use super::{Disk, half};
use cdp_protocol::layout::{Content, PARTITIONS_MAX, Partition};
use std::io;

/// What keeps others away from a disk with a GUID partition table.
pub(super) const PROTECTIVE: u8 = 0xee;
/// Where the table begins in its sector.
pub(super) const ENTRIES_AT: usize = 446;

/// What a table says.
pub(super) struct TableFound {
    pub(super) signature: [u8; 4],
    pub(super) partitions: Vec<Partition>,
    pub(super) broken: Vec<String>,
}

struct Entry {
    status: u8,
    kind: u8,
    first: u64,
    count: u64,
}

/// The table of a disk whose sectors are so long; `None` where there is none.
pub(super) fn table(disk: &mut Disk<'_, '_>, sector_bytes: u32) -> io::Result<Option<TableFound>> {
    let Some((sector, entries)) = entries(disk, 0)? else { return Ok(None) };
    let signature = *sector[440..].first_chunk().expect("a sector has 512 bytes");
    let mut table = TableFound { signature, partitions: Vec::new(), broken: Vec::new() };
    let mut extended = None;
    for (number, entry) in (1..).zip(&entries) {
        match entry.kind {
            0 => {}
            5 | 0x0f | 0x85 => extended = Some(entry.first),
            PROTECTIVE => {
                table.broken.push("its GUID partition table is gone: only the protective one is there".to_owned());
            }
            _ => table.add(disk, number, entry, 0, sector_bytes),
        }
    }
    let Some(base) = extended else { return Ok(Some(table)) };
    // A chain of tables with a partition each, and the way to the next one.
    let (mut at, mut number) = (base, 5);
    while table.partitions.len() < PARTITIONS_MAX && number < PARTITIONS_MAX as u32 {
        let offset = at.checked_mul(sector_bytes.into());
        let Some((_, entries)) = offset.map(|offset| self::entries(disk, offset)).transpose()?.flatten() else {
            table.broken.push(format!("the table of partition {number} cannot be read"));
            break;
        };
        if entries[0].kind != 0 {
            table.add(disk, number, &entries[0], at, sector_bytes);
        }
        if entries[1].kind == 0 {
            break;
        }
        at = base + entries[1].first;
        number += 1;
    }
    Ok(Some(table))
}

/// A sector with a table, and its entries; `None` where there is none.
fn entries(disk: &mut Disk<'_, '_>, offset: u64) -> io::Result<Option<(Vec<u8>, [Entry; 4])>> {
    let Some(sector) = disk.bytes(offset, 512)? else { return Ok(None) };
    let entries = [0, 1, 2, 3].map(|number| {
        let at = ENTRIES_AT + 16 * number;
        let (first, count) = (u64::from(half(&sector, at + 8)), u64::from(half(&sector, at + 12)));
        Entry { status: sector[at], kind: sector[at + 4], first, count }
    });
    let is_table = sector[510..] == [0x55, 0xaa]
        && entries.iter().all(|entry| matches!(entry.status, 0 | 0x80))
        && entries.iter().any(|entry| entry.kind != 0 && entry.count > 0);
    Ok(is_table.then_some((sector, entries)))
}

impl TableFound {
    fn add(&mut self, disk: &Disk<'_, '_>, number: u32, entry: &Entry, base: u64, sector_bytes: u32) {
        let Some((start_bytes, size_bytes)) = disk.place(base + entry.first, entry.count, sector_bytes) else {
            return self.broken.push(format!("partition {number} lies outside of the disk"));
        };
        let mut kind = [0; 16];
        kind[0] = entry.kind;
        self.partitions.push(Partition {
            number,
            start_bytes,
            size_bytes,
            kind,
            id: [0; 16],
            is_active: entry.status == 0x80,
            content: Content::Unknown,
            name: String::new(),
        });
    }
}
