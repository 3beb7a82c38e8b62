//! The record's bytes, and its way into the state folder and out of it.

use super::{Found, Saved, SavedVolume};
use cdp_protocol::units::{BLOCK_BYTES, Block, GroupId, Timestamp, VolumeSlot};
use cdp_seams::storage::Storage;
use cdp_seams::storage::sim::{Fault, SimStorage};
use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};
use std::io;
use std::path::Path;

const FOLDER: &str = "/tracking";

fn saved(number: u8) -> Saved {
    let found = Found {
        size_bytes: 100 * BLOCK_BYTES as u64,
        nature: "from sector 63, serial é".into(),
        dirty: [3, 4, u32::from(number)].into_iter().collect(),
        samples: vec![(Block(0), [7; 16]), (Block(99), [8; 16])],
    };
    Saved {
        group: GroupId([1; 16]),
        tracker: "00".repeat(16),
        boot: "a boot".into(),
        saved_at: Timestamp(i64::from(number)),
        memo: vec![5; 40],
        volumes: vec![
            SavedVolume { slot: VolumeSlot(2), found: Ok(found) },
            SavedVolume { slot: VolumeSlot(7), found: Err("it is mounted".into()) },
        ],
    }
}

fn disk() -> SimStorage {
    let disk = SimStorage::new(11);
    disk.create_dir_all(Path::new(FOLDER)).expect("made");
    disk
}

#[test]
fn no_damage_of_any_byte_and_no_shorter_record_is_read() {
    let bytes = saved(1).encode();
    assert_eq!(Saved::decode(&bytes), Some(saved(1)));
    for at in 0..bytes.len() {
        for flip in [1, 0x80, 0xff] {
            let mut damaged = bytes.clone();
            damaged[at] ^= flip;
            assert_eq!(Saved::decode(&damaged), None, "byte {at} changed by {flip:#x}");
        }
        assert_eq!(Saved::decode(&bytes[..at]), None, "cut off at {at}");
    }
    assert_eq!(Saved::decode(&[bytes.as_slice(), &[0]].concat()), None);
}

fn any_volume() -> impl Strategy<Value = SavedVolume> {
    let found = (1..2000_u32, ".{0,40}").prop_flat_map(|(blocks, nature)| {
        let dirty = proptest::collection::btree_set(0..blocks, 0..50);
        let samples = proptest::collection::btree_map(0..blocks, any::<[u8; 16]>(), 0..50);
        (Just(blocks), Just(nature), dirty, samples).prop_map(|(blocks, nature, dirty, samples)| Found {
            size_bytes: u64::from(blocks) * BLOCK_BYTES as u64 - 512,
            nature,
            dirty: dirty.into_iter().collect(),
            samples: samples.into_iter().map(|(block, digest)| (Block(block), digest)).collect(),
        })
    });
    let found = prop_oneof![found.prop_map(Ok), ".{0,40}".prop_map(Err)];
    (any::<u16>(), found).prop_map(|(slot, found)| SavedVolume { slot: VolumeSlot(slot), found })
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(volumes in proptest::collection::vec(any_volume(), 0..5), memo in proptest::collection::vec(any::<u8>(), 0..100)) {
        let record = Saved { memo, volumes, ..saved(0) };
        assert_eq!(Saved::decode(&record.encode()), Some(record));
    }
}

#[test]
fn a_text_that_is_too_long_is_cut_off_and_a_record_beyond_a_bound_is_refused() {
    let mut long = saved(1);
    long.volumes[1].found = Err("é".repeat(1000));
    let read = Saved::decode(&long.encode()).expect("read");
    assert_eq!(read.volumes[1].found, Err("é".repeat(512)));
    assert_eq!(Saved::decode(&Saved { memo: vec![0; 1025], ..saved(1) }.encode()), None);
    let many = vec![saved(1).volumes[1].clone(); 65];
    assert_eq!(Saved::decode(&Saved { volumes: many, ..saved(1) }.encode()), None);
    let beyond = |found: Found| {
        let volumes = vec![SavedVolume { slot: VolumeSlot(0), found: Ok(found) }];
        assert_eq!(Saved::decode(&Saved { volumes, ..saved(1) }.encode()), None);
    };
    let found = saved(1).volumes[0].found.clone().expect("found");
    beyond(Found { dirty: [100].into_iter().collect(), ..found.clone() });
    beyond(Found { samples: vec![(Block(100), [0; 16])], ..found.clone() });
    beyond(Found { samples: vec![(Block(1), [0; 16]), (Block(1), [0; 16])], ..found.clone() });
    beyond(Found { size_bytes: (1 << 44) + 1, ..found });
}

#[test]
fn a_record_is_given_once_and_one_that_cannot_be_removed_is_not_believed() {
    let (disk, folder) = (disk(), Path::new(FOLDER));
    assert_eq!(Saved::take(&disk, folder), Ok(None));
    saved(1).store(&disk, folder).expect("stored");
    assert_eq!(Saved::take(&disk, folder), Ok(Some(saved(1))));
    assert_eq!(Saved::take(&disk, folder), Ok(None));
    saved(2).store(&disk, folder).expect("stored");
    disk.flip_bit(&folder.join("saved"), 100);
    assert!(Saved::take(&disk, folder).is_err_and(|reason| reason.contains("damaged")));
    assert_eq!(Saved::take(&disk, folder), Ok(None), "a damaged one is removed too");
    saved(3).store(&disk, folder).expect("stored");
    disk.fail_from(disk.calls() + 3, io::ErrorKind::ReadOnlyFilesystem);
    assert!(Saved::take(&disk, folder).is_err_and(|reason| reason.contains("cannot be removed")));
}

/// A power cut at each call of saving over an older record, and of taking: afterwards there is none, the older, or the newer; one that was given is gone.
#[test]
fn a_power_cut_leaves_a_whole_record_or_none_and_one_that_was_given_is_gone() {
    let folder = Path::new(FOLDER);
    for call in 0.. {
        let disk = SimStorage::new(call);
        disk.create_dir_all(folder).expect("made");
        saved(1).store(&disk, folder).expect("stored");
        disk.fault_at(disk.calls() + call, Fault::PowerCut);
        let stored = saved(2).store(&disk, folder);
        let taken = if disk.is_down() { Ok(None) } else { Saved::take(&disk, folder) };
        let was_cut = disk.is_down();
        if !was_cut {
            disk.clear_faults();
            disk.power_cut();
        }
        disk.restart();
        let left = Saved::take(&disk, folder).expect("whole");
        if let Ok(Some(taken)) = taken {
            assert!(stored.is_ok() && taken == saved(2) && left.is_none(), "call {call}: {left:?} is left");
        } else {
            assert!(left.is_none_or(|left| left == saved(2) || stored.is_err() && left == saved(1)), "call {call}");
        }
        assert_eq!(Saved::take(&disk, folder), Ok(None), "call {call}");
        if !was_cut {
            assert!(call > 10, "{call} calls were cut at");
            return;
        }
    }
}
