//! The bytes come back, and any that changed are noticed.

use super::*;
use proptest::prelude::{Strategy, any, prop_assert_eq, proptest};

fn key() -> DataKey {
    DataKey::new([8; 32])
}

fn header() -> Header {
    Header { group: GroupId([3; 16]), attempt: AttemptId([4; 16]), generation: Generation(7) }
}

fn footer() -> Footer {
    let volume = |slot: u16, name: &str, size_bytes| ImageVolume {
        volume: Volume { slot: VolumeSlot(slot), size_bytes, name: name.into() },
        directory_at: 4711,
        directory_hash: [5; 32],
        content_blocks: 12,
        unreadable_blocks: 1,
        image_hash: [6; 32],
    };
    Footer {
        group: GroupId([3; 16]),
        attempt: AttemptId([4; 16]),
        key: KeyId([9; 8]),
        epoch: Epoch(1234),
        cut_time: Timestamp(-5),
        made: Timestamp(1_800_000_000_000),
        class: Class::Application,
        label: Some("before-upgrade".into()),
        volumes: vec![volume(0, "data", 1 << 30), volume(4, "logs", 4097)],
    }
}

#[test]
fn header_and_footer_come_back_and_any_flipped_bit_is_noticed() {
    let bytes = header().encode();
    assert_eq!((bytes.len(), Header::decode(&bytes)), (HEADER_BYTES, Ok(header())));
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1 << (at % 8);
        assert!(Header::decode(&changed).is_err(), "byte {at}");
        assert!(Header::decode(&bytes[..at]).is_err(), "{at} bytes");
    }
    let bytes = footer().encode(&key());
    assert_eq!(Footer::decode(&bytes, &key()), Ok(footer()));
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1 << (at % 8);
        assert!(Footer::decode(&changed, &key()).is_err(), "byte {at}");
        assert!(Footer::decode(&bytes[at + 1..], &key()).is_err(), "from byte {at} on");
    }
}

#[test]
fn another_key_and_a_newer_version_are_told_as_that() {
    assert_eq!(Footer::decode(&footer().encode(&key()), &DataKey::new([9; 32])), Err(FormatError::Key));
    let mut newer = header().encode();
    newer[8] = 2;
    assert_eq!(Header::decode(&newer), Err(FormatError::Version(2)));
    assert_eq!(Header::decode(b"CDPLOCAl\x01\0"), Err(FormatError::Magic));
}

#[test]
fn a_length_beyond_its_bound_is_refused_before_it_is_used() {
    let mut trailer = [0; TRAILER_BYTES];
    trailer[8..].copy_from_slice(&MAGIC);
    for (len, is_one) in
        [(0, false), (31, false), (32, true), (64 << 10, true), ((64 << 10) + 1, false), (u32::MAX, false)]
    {
        trailer[..4].copy_from_slice(&len.to_le_bytes());
        assert_eq!(Footer::len_by(&trailer).is_ok(), is_one, "{len}");
    }
}

fn runs() -> impl Strategy<Value = Vec<Run>> {
    proptest::collection::vec((0..40_u32, 1..900_u32, any::<bool>(), 64..u64::MAX), 0..60).prop_map(|drawn| {
        let (mut runs, mut end) = (Vec::new(), 0);
        for (gap, count, is_unreadable, at) in drawn {
            let (start, place) = (end + gap, if is_unreadable { Place::Unreadable } else { Place::Frame(at) });
            if start + count <= SLICE_BLOCKS {
                runs.push(Run { start, count, place });
                end = start + count;
            }
        }
        runs
    })
}

proptest! {
    #[test]
    fn slices_and_directories_come_back(runs in runs(), lens in proptest::collection::vec(0..9_u32, 0..40)) {
        prop_assert_eq!(decode_slice(&encode_slice(&runs)), Ok(runs));
        let entry = |len: u32| match len {
            0 => SliceEntry::default(),
            len => SliceEntry { at: 64 + u64::from(len), len: 4 + 12 * len, hash: [len as u8; 32] },
        };
        let entries: Vec<SliceEntry> = lens.into_iter().map(entry).collect();
        prop_assert_eq!(SliceEntry::decode_all(&SliceEntry::encode_all(&entries)), Ok(entries));
    }
}

#[test]
fn a_slice_of_runs_that_overlap_or_pass_its_end_is_none() {
    let run = |start, count, at| Run { start, count, place: Place::Frame(at) };
    for runs in [
        vec![run(5, 4, 64), run(8, 1, 64)],
        vec![run(8, 1, 64), run(2, 1, 64)],
        vec![run(16_383, 2, 64)],
        vec![run(0, 0, 64)],
        vec![run(0, 1, 63)],
        vec![Run { start: 0, count: 1, place: Place::Zeros }],
    ] {
        assert!(decode_slice(&encode_slice(&runs)).is_err(), "{runs:?}");
    }
    let whole = encode_slice(&[run(0, 16_384, 64)]);
    assert!(decode_slice(&whole).is_ok() && whole.len() <= SLICE_BYTES_MAX);
    assert!((0..whole.len()).all(|len| decode_slice(&whole[..len]).is_err()));
}
