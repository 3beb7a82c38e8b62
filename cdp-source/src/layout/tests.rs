//! Tables that are made up, damaged and grown.

use super::*;
use proptest::prelude::{ProptestConfig, any, prop, prop_assert, proptest};

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    bytes[at..at + what.len()].copy_from_slice(what);
}

fn look_at(bytes: &[u8], sectors: &[u32]) -> Found {
    let mut read = |offset: u64, buffer: &mut [u8]| {
        buffer.copy_from_slice(&bytes[offset as usize..offset as usize + buffer.len()]);
        Ok(())
    };
    look(&mut read, bytes.len() as u64, sectors).expect("memory can be read")
}

fn mbr_entry(bytes: &mut [u8], table: usize, number: usize, kind: u8, first: u32, count: u32) {
    let at = table + 446 + 16 * number;
    bytes[at + 4] = kind;
    put(bytes, at + 8, &first.to_le_bytes());
    put(bytes, at + 12, &count.to_le_bytes());
    put(bytes, table + 510, &[0x55, 0xaa]);
}

/// A disk of 4 MiB with a table of two partitions and its copy.
fn gpt(sector: usize) -> Vec<u8> {
    let mut bytes = vec![0; 4 << 20];
    let last = bytes.len() / sector - 1;
    mbr_entry(&mut bytes, 0, 0, 0xee, 1, last as u32);
    let mut entries = vec![0; 128 * 128];
    for (number, first, end) in [(0, 100_u64, 199_u64), (3, 200, 299)] {
        put(&mut entries, number * 128, &[7; 16]);
        put(&mut entries, number * 128 + 16, &[number as u8 + 1; 16]);
        put(&mut entries, number * 128 + 32, &first.to_le_bytes());
        put(&mut entries, number * 128 + 40, &end.to_le_bytes());
        put(&mut entries, number * 128 + 56, &[b'r', 0, b'o', 0]);
    }
    let entries_sectors = entries.len().div_ceil(sector);
    for (own, other, entries_at) in [(1, last, 2), (last, 1, last - entries_sectors)] {
        put(&mut bytes, entries_at * sector, &entries);
        let mut header = vec![0; 92];
        put(&mut header, 0, b"EFI PART");
        put(&mut header, 12, &92_u32.to_le_bytes());
        let numbers = [(24, own), (32, other), (40, 34), (48, last - entries_sectors - 1), (72, entries_at)];
        for (at, number) in numbers {
            put(&mut header, at, &(number as u64).to_le_bytes());
        }
        put(&mut header, 56, &[5; 16]);
        put(&mut header, 80, &128_u32.to_le_bytes());
        put(&mut header, 84, &128_u32.to_le_bytes());
        put(&mut header, 88, &crc32fast::hash(&entries).to_le_bytes());
        let sum = crc32fast::hash(&header);
        put(&mut header, 16, &sum.to_le_bytes());
        put(&mut bytes, own * sector, &header);
    }
    put(&mut bytes, 100 * sector, b"XFSB");
    bytes
}

#[test]
fn a_guid_partition_table_is_found_in_either_sector_size() {
    for sector in [512, 4096] {
        let found = look_at(&gpt(sector), &[512, 4096]);
        assert_eq!((found.layout.table, found.layout.sector_bytes), (Table::Gpt([5; 16]), sector as u32));
        let told: Vec<_> = found.layout.partitions.iter().map(|it| (it.number, it.start_bytes, it.content)).collect();
        let sector = sector as u64;
        assert_eq!(told, [(1, 100 * sector, Content::Xfs), (4, 200 * sector, Content::Unknown)]);
        assert_eq!((found.layout.partitions[0].name.as_str(), found.broken.len()), ("ro", 0));
        assert_eq!(found.end_bytes(), 300 * sector);
    }
}

#[test]
fn a_damaged_table_is_told_and_its_copy_stands_in() {
    for at in [512 + 40, 2 * 512 + 33] {
        let mut bytes = gpt(512);
        bytes[at] ^= 1;
        let found = look_at(&bytes, &[512]);
        assert!(found.layout.partitions.len() == 2 && found.broken.len() == 1, "{found:?}");
        assert!(found.broken[0].contains("the copy at the end of the disk is whole"), "{found:?}");
        let len = bytes.len();
        bytes[len - 500] ^= 1;
        let found = look_at(&bytes, &[512]);
        assert!(found.layout.partitions.is_empty() && found.broken[0].contains("and so is the copy"), "{found:?}");
    }
}

#[test]
fn an_mbr_is_followed_into_its_extended_partition() {
    let mut bytes = vec![0; 4 << 20];
    put(&mut bytes, 0, &[0xeb]);
    put(&mut bytes, 440, &[1, 2, 3, 4]);
    mbr_entry(&mut bytes, 0, 0, 0x83, 100, 1000);
    bytes[446] = 0x80;
    mbr_entry(&mut bytes, 0, 1, 5, 2000, 6000);
    mbr_entry(&mut bytes, 2000 * 512, 0, 0x83, 10, 500);
    mbr_entry(&mut bytes, 2000 * 512, 1, 5, 1000, 500);
    mbr_entry(&mut bytes, 3000 * 512, 0, 0x82, 10, 500);
    mbr_entry(&mut bytes, 0, 2, 0x83, 8000, 1000);
    put(&mut bytes, 100 * 512 + 1080, &[0x53, 0xef]);
    put(&mut bytes, 3010 * 512 + 4086, b"SWAPSPACE2");
    let found = look_at(&bytes, &[512, 4096]);
    assert_eq!(found.layout.table, Table::Mbr([1, 2, 3, 4]));
    assert!(found.layout.has_boot_code && found.layout.partitions[0].is_active);
    let told: Vec<_> = found
        .layout
        .partitions
        .iter()
        .map(|it| (it.number, it.start_bytes / 512, it.size_bytes / 512, it.content))
        .collect();
    assert_eq!(told, [(1, 100, 1000, Content::Ext), (5, 2010, 500, Content::Unknown), (6, 3010, 500, Content::Swap)]);
    assert_eq!(found.broken, ["partition 3 lies outside of the disk"]);
}

#[test]
fn a_file_system_on_the_whole_disk_is_no_table_and_nothing_is_nothing() {
    let mut bytes = vec![0; 1 << 20];
    put(&mut bytes, 510, &[0x55, 0xaa]);
    assert_eq!(look_at(&bytes, &[512]).layout.table, Table::None);
    put(&mut bytes, 3, b"NTFS    ");
    let found = look_at(&bytes, &[512]);
    assert_eq!((found.layout.table, found.content), (Table::None, Content::Ntfs));
    assert_eq!(look_at(&[1; 5], &[512]).content, Content::Unknown);
}

/// The writes in their order, each of which may be the last before a crash.
fn grown(sector: usize, size: usize) -> Vec<Vec<u8>> {
    let mut bytes = gpt(sector);
    let old = bytes.len();
    bytes.resize(size, 0);
    let disk = bytes.clone();
    let mut read = |offset: u64, buffer: &mut [u8]| {
        buffer.copy_from_slice(&disk[offset as usize..offset as usize + buffer.len()]);
        Ok(())
    };
    let writes = grow::moved(&mut read, (old as u64, size as u64), sector as u32).expect("memory can be read");
    let mut states = vec![bytes.clone()];
    for write in writes.expect("a whole table") {
        put(&mut bytes, write.offset as usize, &write.bytes);
        states.push(bytes.clone());
    }
    states
}

#[test]
fn on_a_larger_disk_the_copy_stands_at_its_end_and_every_step_leaves_a_whole_table() {
    for sector in [512, 4096] {
        let size = (9 << 20) + sector;
        let states = grown(sector, size);
        for (step, state) in states.iter().enumerate() {
            let found = look_at(state, &[sector as u32]);
            assert!(found.layout.partitions.len() == 2 && found.broken.is_empty(), "step {step}: {found:?}");
        }
        let mut last = states.last().expect("one at least").clone();
        assert_eq!(states.len(), 6);
        assert_eq!(half(&last, 446 + 12) as usize, size / sector - 1, "the protective entry covers the disk");
        // What stands at the end is a table by itself, and nothing is left where the end was.
        for (at, what) in [(sector, "is gone"), (sector + 40, "is damaged")] {
            last[at] ^= 1;
            let found = look_at(&last, &[sector as u32]);
            assert!(found.layout.partitions.len() == 2 && found.broken[0].contains(what), "{found:?}");
            last[at] ^= 1;
        }
        assert!(last[(4 << 20) - sector..4 << 20].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn on_a_disk_that_is_hardly_larger_the_copy_lies_over_the_old_one() {
    for more in [1, 8, 32, 33] {
        let states = grown(512, (4 << 20) + more * 512);
        assert!(states.iter().all(|state| look_at(state, &[512]).broken.is_empty()), "{more} sectors");
        let mut last = states.last().expect("one at least").clone();
        last[512] ^= 1;
        let found = look_at(&last, &[512]);
        assert!(
            found.layout.partitions.len() == 2 && found.broken[0].contains("is whole"),
            "{more} sectors: {found:?}"
        );
    }
}

#[test]
fn as_large_as_before_or_without_a_table_nothing_is_written() {
    assert_eq!(grown(512, 4 << 20).len(), 1);
    let bytes = vec![0; 4 << 20];
    let mut read = |offset: u64, buffer: &mut [u8]| {
        buffer.copy_from_slice(&bytes[offset as usize..offset as usize + buffer.len()]);
        Ok(())
    };
    let writes = grow::moved(&mut read, (1 << 20, 4 << 20), 512).expect("memory can be read");
    assert_eq!(writes, Ok(Vec::new()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn whatever_stands_there_partitions_stay_within_the_disk(
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
        let found = look_at(&bytes, &[512, 4096]);
        for partition in &found.layout.partitions {
            prop_assert!(partition.end_bytes() <= bytes.len() as u64);
        }
        let decoded = Layout::decode(&found.layout.encode());
        prop_assert!(decoded == Some(found.layout));
    }
}
