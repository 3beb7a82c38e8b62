//! Which point is merged where that takes long.

use super::*;
use crate::spool::SpoolLimits;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{GroupId, KeyId, VolumeSlot};
use cdp_seams::random::SimRandom;
use cdp_seams::storage::sim::SimStorage;
use std::path::Path;

const GROUP: GroupId = GroupId([3; 16]);
const SLOTS: [VolumeSlot; 1] = [VolumeSlot(0)];

/// Four points that wait, a second from one to the next, each of a block of its own. The first is said to take `bytes`; gives which goes.
fn merged_of(bytes: &[(usize, u64)]) -> Option<Epoch> {
    let limits = SpoolLimits::new(64 << 20, 16);
    let mut spool = Spool::new(Arc::new(SimStorage::new(1)), Path::new("/spool"), GROUP, limits);
    let (data_key, encoder, random) = (DataKey::new([4; 32]), Encoder::inline(), SimRandom::new(2));
    let begin = Begin { key: KeyId::default(), volumes: Vec::new() };
    let keys = Keys { group: GROUP, slots: &SLOTS, data_key: &data_key };
    let reseal = Reseal { keys, begin: &begin, encoder: &encoder, random: &random };
    for number in 1..=4_u32 {
        let mut capture = Capture::new(1);
        capture.volumes[0].put(Block(number), &[7; BLOCK_BYTES]);
        let blocks: Arc<Blocks> = Arc::new(vec![RoaringBitmap::from([number])]);
        let (mut outgoing, ..) = seal(capture, Epoch(number.into()), Generation(1), &reseal);
        outgoing.end = End::Commit(CommitDraft {
            class: Class::Crash,
            cut_time: Timestamp(i64::from(number) * 1000),
            meters: Meters::default(),
            first_epoch: outgoing.epoch,
            after_rollback_to: None,
            label: None,
            volumes: Vec::new(),
            layouts: Vec::new(),
        });
        spool.push(outgoing, blocks);
    }
    for (entry, bytes) in bytes {
        spool.entries[*entry].bytes = *bytes;
    }
    let merged = spool.merge((limits.points_max, Timestamp(10_000)), |_| false, &reseal, &Memo::default());
    merged.expect("nothing is damaged").map(|merged| merged.gone)
}

#[test]
fn no_merge_seals_much_anew_where_another_can_be_made() {
    assert_eq!(merged_of(&[]), Some(Epoch(1)), "the oldest is missed least");
    assert_eq!(merged_of(&[(0, PRICE_MAX)]), Some(Epoch(1)));
    assert_eq!(merged_of(&[(0, PRICE_MAX + 1)]), Some(Epoch(2)));
    assert_eq!(merged_of(&[(0, PRICE_MAX + 1), (1, u64::MAX / 2)]), Some(Epoch(3)));
    let all = [(0, PRICE_MAX + 1), (1, PRICE_MAX + 1), (2, PRICE_MAX + 1)];
    assert_eq!(merged_of(&all), Some(Epoch(1)), "where there is no other");
}
