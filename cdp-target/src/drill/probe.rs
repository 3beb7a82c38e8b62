//! What a volume is: partitions and file systems, by their signatures.
//!
//! Reads only, a few sectors of each place; every number of a table is checked against the volume before it is used. What it does not
//! know is said to be unknown, never guessed.

use crate::restore::proof::ReadAt;
use serde::{Deserialize, Serialize};
use std::io;

const SECTOR_BYTES: u64 = 512;
/// Entries of a partition table that are looked at.
const PARTITIONS_MAX: usize = 256;
/// What an entry says that keeps others away from a disk with a GUID partition table.
const PROTECTIVE: u8 = 0xee;
/// Bytes of a partition table that are read.
const TABLE_BYTES_MAX: u64 = 1 << 20;

/// What stands somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// ext2, ext3 or ext4.
    Ext,
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
    /// NTFS.
    Ntfs,
    /// FAT of any width.
    Fat,
    /// A swap area.
    Swap,
    /// A LUKS container.
    Luks,
    /// A physical volume of LVM.
    Lvm,
    /// Nothing but zeros where signatures are.
    Blank,
    /// Something else.
    Unknown,
}

/// A place in a volume, and what stands there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the partition; `None` for the whole volume.
    pub partition: Option<u32>,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// What it is.
    pub kind: Kind,
}

/// What a volume consists of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// `gpt` or `mbr`, where there is a partition table.
    pub table: Option<&'static str>,
    /// What is wrong with the table.
    pub broken: Vec<String>,
    /// The partitions; the whole volume where there is no table.
    pub places: Vec<Place>,
}

/// Looks at a volume of so many bytes.
///
/// # Errors
/// Where it cannot be read.
pub(crate) fn probe(read: &ReadAt<'_>, size_bytes: u64) -> io::Result<Layout> {
    let volume = Volume { read, size_bytes };
    let whole = volume.place(None, 0, size_bytes)?;
    // A boot sector of FAT or NTFS ends as a partition table does.
    if !matches!(whole.kind, Kind::Unknown | Kind::Blank) {
        return Ok(Layout { places: vec![whole], ..Layout::default() });
    }
    for sector in [SECTOR_BYTES, 4096] {
        if let Some(layout) = volume.gpt(sector)? {
            return Ok(layout.without_overlaps());
        }
    }
    let layout = volume.mbr()?.unwrap_or(Layout { places: vec![whole], ..Layout::default() });
    Ok(layout.without_overlaps())
}

impl Layout {
    /// Says of partitions that lie over one another that they are wrong.
    fn without_overlaps(mut self) -> Self {
        let mut sorted: Vec<&Place> = self.places.iter().collect();
        sorted.sort_by_key(|place| (place.offset, place.partition));
        let mut farthest: Option<&Place> = None;
        for place in sorted {
            if let Some(before) = farthest.filter(|before| before.offset + before.bytes > place.offset) {
                let numbers = [before, place].map(|place| place.partition.unwrap_or(0));
                self.broken.push(format!("partitions {} and {} overlap", numbers[0], numbers[1]));
            }
            farthest = farthest.into_iter().chain([place]).max_by_key(|place| place.offset + place.bytes);
        }
        self
    }
}

struct Volume<'a> {
    read: &'a ReadAt<'a>,
    size_bytes: u64,
}

fn half(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32::from_le_bytes(*bytes[at..].first_chunk().expect("within what was read")))
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("within what was read"))
}

impl Volume<'_> {
    /// Bytes at a place; `None` where the volume ends before.
    fn bytes(&self, offset: u64, len: u64) -> io::Result<Option<Vec<u8>>> {
        if offset.checked_add(len).is_none_or(|end| end > self.size_bytes) {
            return Ok(None);
        }
        let mut bytes = vec![0; len as usize];
        (self.read)(offset, &mut bytes)?;
        Ok(Some(bytes))
    }

    fn place(&self, partition: Option<u32>, offset: u64, bytes: u64) -> io::Result<Place> {
        Ok(Place { partition, offset, bytes, kind: self.kind(offset, bytes)? })
    }

    /// What begins at `offset`, of `bytes` bytes.
    fn kind(&self, offset: u64, bytes: u64) -> io::Result<Kind> {
        let mut start = vec![0; 68 * 1024];
        let len = bytes.min(start.len() as u64).min(self.size_bytes.saturating_sub(offset));
        (self.read)(offset, &mut start[..len as usize])?;
        let is = |at: usize, magic: &[u8]| start[at..].starts_with(magic);
        let lvm = (0..4).any(|sector| is(sector * SECTOR_BYTES as usize, b"LABELONE"));
        let known = [
            (is(1080, &[0x53, 0xef]), Kind::Ext),
            (is(0, b"XFSB"), Kind::Xfs),
            (is(65_600, b"_BHRfS_M"), Kind::Btrfs),
            (is(3, b"NTFS    "), Kind::Ntfs),
            (is(54, b"FAT12   ") || is(54, b"FAT16   ") || is(82, b"FAT32   "), Kind::Fat),
            (is(4086, b"SWAPSPACE2"), Kind::Swap),
            (is(0, b"LUKS\xba\xbe"), Kind::Luks),
            (lvm, Kind::Lvm),
            (start.iter().all(|byte| *byte == 0), Kind::Blank),
        ];
        Ok(known.into_iter().find(|(found, _)| *found).map_or(Kind::Unknown, |(_, kind)| kind))
    }

    /// The partitions of a GUID partition table in sectors of that size; `None` where there is none.
    fn gpt(&self, sector: u64) -> io::Result<Option<Layout>> {
        let Some(header) = self.bytes(sector, 512)?.filter(|header| header.starts_with(b"EFI PART")) else {
            return Ok(None);
        };
        let mut layout = Layout { table: Some("gpt"), ..Layout::default() };
        let len = half(&header, 12) as usize;
        let mut unsummed = header.clone();
        unsummed[16..20].fill(0);
        if !(92..=512).contains(&len) || u64::from(crc32fast::hash(&unsummed[..len])) != half(&header, 16) {
            layout.broken.push("the header of its partition table does not match its checksum".to_owned());
            return Ok(Some(layout));
        }
        let (entries, size) = (half(&header, 80), half(&header, 84));
        let table = entries.checked_mul(size).filter(|len| *len <= TABLE_BYTES_MAX && size >= 128);
        let offset = word(&header, 72).checked_mul(sector);
        let Some(table) = offset.zip(table).map(|(offset, len)| self.bytes(offset, len)).transpose()?.flatten() else {
            layout.broken.push("its partition table lies outside of the volume".to_owned());
            return Ok(Some(layout));
        };
        if u64::from(crc32fast::hash(&table)) != half(&header, 88) {
            layout.broken.push("its partition table does not match its checksum".to_owned());
            return Ok(Some(layout));
        }
        let entries = (1..).zip(table.chunks_exact(size as usize)).filter(|(_, entry)| entry[..16] != [0; 16]);
        for (number, entry) in entries.take(PARTITIONS_MAX) {
            let (first, last) = (word(entry, 32), word(entry, 40));
            self.add(&mut layout, number, first, last.wrapping_sub(first).wrapping_add(1), sector)?;
        }
        Ok(Some(layout))
    }

    /// The partitions of a table in the first sector; `None` where that is none.
    fn mbr(&self) -> io::Result<Option<Layout>> {
        let mut layout = Layout { table: Some("mbr"), ..Layout::default() };
        let Some(entries) = self.mbr_entries(0)? else { return Ok(None) };
        let mut extended = None;
        for (number, entry) in (1..).zip(&entries) {
            match entry.kind {
                0 => {}
                5 | 0x0f | 0x85 => extended = Some(entry.first),
                // Only where there is a GUID partition table, which was looked for before.
                PROTECTIVE => {
                    layout.broken.push("its GUID partition table is gone: only the protective one is there".to_owned());
                }
                _ => self.add(&mut layout, number, entry.first, entry.count, SECTOR_BYTES)?,
            }
        }
        let Some(base) = extended else { return Ok(Some(layout)) };
        // A chain of tables with a partition each, and the way to the next one.
        let (mut at, mut number) = (base, 5);
        while layout.places.len() < PARTITIONS_MAX && number < PARTITIONS_MAX as u32 {
            let Some(entries) = at.checked_mul(SECTOR_BYTES).map(|at| self.mbr_entries(at)).transpose()?.flatten()
            else {
                layout.broken.push(format!("the table of partition {number} cannot be read"));
                break;
            };
            if entries[0].kind != 0 {
                self.add(&mut layout, number, at + entries[0].first, entries[0].count, SECTOR_BYTES)?;
            }
            if entries[1].kind == 0 {
                break;
            }
            at = base + entries[1].first;
            number += 1;
        }
        Ok(Some(layout))
    }

    /// The entries of a table at `offset`; `None` where there is none.
    fn mbr_entries(&self, offset: u64) -> io::Result<Option<[MbrEntry; 4]>> {
        let Some(sector) = self.bytes(offset, SECTOR_BYTES)? else { return Ok(None) };
        let entries = [446, 462, 478, 494].map(|at| MbrEntry {
            status: sector[at],
            kind: sector[at + 4],
            first: half(&sector, at + 8),
            count: half(&sector, at + 12),
        });
        let is_table = sector[510..] == [0x55, 0xaa]
            && entries.iter().all(|entry| matches!(entry.status, 0 | 0x80))
            && entries.iter().any(|entry| entry.kind != 0 && entry.count > 0);
        Ok(is_table.then_some(entries))
    }

    /// Adds a partition, where it lies within the volume.
    fn add(&self, layout: &mut Layout, number: u32, first: u64, count: u64, sector: u64) -> io::Result<()> {
        let range = first.checked_mul(sector).zip(count.checked_mul(sector));
        let range = range.filter(|(offset, bytes)| {
            *bytes > 0 && offset.checked_add(*bytes).is_some_and(|end| end <= self.size_bytes)
        });
        match range {
            Some((offset, bytes)) => layout.places.push(self.place(Some(number), offset, bytes)?),
            None => layout.broken.push(format!("partition {number} lies outside of the volume")),
        }
        Ok(())
    }
}

struct MbrEntry {
    status: u8,
    kind: u8,
    first: u64,
    count: u64,
}

#[cfg(test)]
mod tests {
    use super::{Kind, Layout, probe};
    use proptest::prelude::{ProptestConfig, any, prop, prop_assert, proptest};

    fn look(bytes: &[u8]) -> Layout {
        let read = |offset: u64, buffer: &mut [u8]| {
            buffer.copy_from_slice(&bytes[offset as usize..offset as usize + buffer.len()]);
            Ok(())
        };
        probe(&read, bytes.len() as u64).expect("memory can be read")
    }

    fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
        bytes[at..at + what.len()].copy_from_slice(what);
    }

    const SIGNATURES: [(usize, &[u8], Kind); 9] = [
        (1080, &[0x53, 0xef], Kind::Ext),
        (0, b"XFSB", Kind::Xfs),
        (65_600, b"_BHRfS_M", Kind::Btrfs),
        (3, b"NTFS    ", Kind::Ntfs),
        (82, b"FAT32   ", Kind::Fat),
        (4086, b"SWAPSPACE2", Kind::Swap),
        (0, b"LUKS\xba\xbe", Kind::Luks),
        (512, b"LABELONE", Kind::Lvm),
        (9000, b"text", Kind::Unknown),
    ];

    fn mbr_entry(bytes: &mut [u8], table: usize, number: usize, kind: u8, first: u32, count: u32) {
        let at = table + 446 + 16 * number;
        bytes[at + 4] = kind;
        put(bytes, at + 8, &first.to_le_bytes());
        put(bytes, at + 12, &count.to_le_bytes());
        put(bytes, table + 510, &[0x55, 0xaa]);
    }

    #[test]
    fn a_volume_is_known_by_its_signature() {
        for (at, magic, kind) in SIGNATURES {
            let mut bytes = vec![0; 1 << 20];
            put(&mut bytes, at, magic);
            // As of a boot sector.
            put(&mut bytes, 510, &[0x55, 0xaa]);
            let layout = look(&bytes);
            assert_eq!((layout.table, layout.places.len(), layout.places[0].kind), (None, 1, kind));
            assert_eq!((layout.places[0].offset, layout.places[0].bytes), (0, 1 << 20));
        }
        assert_eq!(look(&vec![0; 9000]).places[0].kind, Kind::Blank);
        assert_eq!(look(&[1; 5]).places[0].kind, Kind::Unknown);
    }

    #[test]
    fn partitions_are_seen_through() {
        let mut bytes = vec![0; 4 << 20];
        mbr_entry(&mut bytes, 0, 0, 0x83, 100, 1000);
        mbr_entry(&mut bytes, 0, 1, 5, 2000, 6000);
        mbr_entry(&mut bytes, 2000 * 512, 0, 0x83, 10, 500);
        mbr_entry(&mut bytes, 2000 * 512, 1, 5, 1000, 500);
        mbr_entry(&mut bytes, 3000 * 512, 0, 0x82, 10, 500);
        mbr_entry(&mut bytes, 0, 2, 0x83, 8000, 1000);
        put(&mut bytes, 100 * 512 + 1080, &[0x53, 0xef]);
        put(&mut bytes, 2010 * 512, b"XFSB");
        put(&mut bytes, 3010 * 512 + 4086, b"SWAPSPACE2");
        let layout = look(&bytes);
        let found: Vec<_> =
            layout.places.iter().map(|at| (at.partition, at.offset / 512, at.bytes / 512, at.kind)).collect();
        let expected =
            [(Some(1), 100, 1000, Kind::Ext), (Some(5), 2010, 500, Kind::Xfs), (Some(6), 3010, 500, Kind::Swap)];
        assert_eq!((layout.table, found.as_slice()), (Some("mbr"), &expected[..]));
        assert_eq!(layout.broken, ["partition 3 lies outside of the volume"]);
    }

    /// A table of two partitions.
    fn gpt(sector: usize) -> Vec<u8> {
        let mut bytes = vec![0; 4 << 20];
        mbr_entry(&mut bytes, 0, 0, 0xee, 1, u32::MAX);
        let mut table = vec![0; 128 * 128];
        for (number, first, last) in [(0, 100_u64, 199_u64), (3, 200, 299)] {
            put(&mut table, number * 128, &[7; 16]);
            put(&mut table, number * 128 + 32, &first.to_le_bytes());
            put(&mut table, number * 128 + 40, &last.to_le_bytes());
        }
        put(&mut bytes, 2 * sector, &table);
        put(&mut bytes, 100 * sector, b"XFSB");
        let mut header = vec![0; 92];
        put(&mut header, 0, b"EFI PART");
        put(&mut header, 12, &92_u32.to_le_bytes());
        put(&mut header, 72, &2_u64.to_le_bytes());
        put(&mut header, 80, &128_u32.to_le_bytes());
        put(&mut header, 84, &128_u32.to_le_bytes());
        put(&mut header, 88, &crc32fast::hash(&table).to_le_bytes());
        let sum = crc32fast::hash(&header);
        put(&mut header, 16, &sum.to_le_bytes());
        put(&mut bytes, sector, &header);
        bytes
    }

    #[test]
    fn a_guid_partition_table_counts_by_its_checksums() {
        for sector in [512, 4096] {
            let bytes = gpt(sector);
            let layout = look(&bytes);
            let found: Vec<_> = layout.places.iter().map(|at| (at.partition, at.offset as usize, at.kind)).collect();
            let expected = [(Some(1), 100 * sector, Kind::Xfs), (Some(4), 200 * sector, Kind::Blank)];
            assert_eq!((layout.table, found.as_slice(), layout.broken.len()), (Some("gpt"), &expected[..], 0));
            for (at, what) in [(sector + 40, "header"), (2 * sector + 33, "partition table does not match")] {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1;
                let broken = look(&damaged).broken;
                assert!(broken.len() == 1 && broken[0].contains(what), "{broken:?}");
            }
        }
    }

    #[test]
    fn a_protective_table_alone_is_broken_and_so_is_an_overlap() {
        let mut bytes = gpt(512);
        bytes[512..1024].fill(0);
        let layout = look(&bytes);
        assert_eq!((layout.places.len(), layout.broken.len()), (0, 1));
        assert!(layout.broken[0].contains("GUID partition table is gone"), "{layout:?}");
        let mut bytes = vec![0; 4 << 20];
        mbr_entry(&mut bytes, 0, 0, 0x83, 100, 1000);
        mbr_entry(&mut bytes, 0, 1, 0x83, 200, 100);
        mbr_entry(&mut bytes, 0, 2, 0x83, 1099, 100);
        mbr_entry(&mut bytes, 0, 3, 0x83, 1199, 100);
        assert_eq!(look(&bytes).broken, ["partitions 1 and 2 overlap", "partitions 1 and 3 overlap"]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn whatever_stands_there_it_stays_within_the_volume(
            edits in prop::collection::vec((0_usize..20_000, any::<u8>()), 0..40),
            cut in 0_usize..(4 << 20), is_gpt in any::<bool>(), mends in any::<bool>(),
        ) {
            let mut bytes = if is_gpt { gpt(512) } else { vec![0; 4 << 20] };
            put(&mut bytes, 510, &[0x55, 0xaa]);
            for (at, byte) in edits {
                bytes[if is_gpt { 512 + at % 512 } else { at % 512 }] = byte;
            }
            if mends {
                let mut header = bytes[512..604].to_vec();
                header[16..20].fill(0);
                put(&mut bytes, 528, &crc32fast::hash(&header).to_le_bytes());
            }
            bytes.truncate(cut.max(1));
            for place in look(&bytes).places {
                prop_assert!(place.offset + place.bytes <= bytes.len() as u64);
            }
        }
    }
}
