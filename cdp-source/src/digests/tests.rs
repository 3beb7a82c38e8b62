//! A group's digests against a target in memory: what is left out of a capture is what the target's newest point holds.

mod parts;

use super::*;
use crate::encoder::BlockDigests;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{BLOCK_BYTES, Block, Epoch, FrameHash};
use cdp_seams::random::SimRandom;
use cdp_seams::storage::sim::{Fault, SimStorage};
use proptest::prelude::{Strategy, any, prop_oneof, proptest};
use std::collections::BTreeMap;

const GROUP: GroupId = GroupId([7; 16]);
const SLOT: VolumeSlot = VolumeSlot(3);
const BLOCKS: u32 = 40;

fn key() -> DigestKey {
    DataKey::new([5; 32]).digest_key()
}

fn head(epoch: u64) -> Head {
    Head { epoch: Epoch(epoch), hash: FrameHash([epoch as u8; 32]) }
}

fn content(byte: u8) -> Vec<u8> {
    vec![byte; BLOCK_BYTES]
}

/// Captured contents; zero is a hole, 9 could not be read.
fn capture(blocks: &BTreeMap<u32, u8>) -> Capture {
    let mut capture = Capture::new(1);
    for (block, byte) in blocks {
        match byte {
            9 => capture.volumes[0].put_unreadable(Block(*block)),
            byte => capture.volumes[0].put(Block(*block), &content(*byte)),
        }
    }
    capture.count();
    capture
}

fn open(disk: &SimStorage, group: GroupId, blocks: u32) -> Digests {
    let volume = Volume { slot: SLOT, size_bytes: u64::from(blocks) * BLOCK_BYTES as u64, name: "data".into() };
    let storage: Arc<dyn Storage> = Arc::new(disk.clone());
    Digests::open(storage, Path::new("/digests"), group, key(), &[volume], &SimRandom::new(1))
}

/// A source's volume, its digests, and the target: what it was sent, epoch by epoch.
struct Bench {
    disk: SimStorage,
    digests: Digests,
    /// What the target holds at its newest point.
    image: BTreeMap<u32, u8>,
    epoch: u64,
    /// Blocks of acked parts that no point has taken in.
    parts: BTreeMap<u32, u8>,
    /// Blocks sent with each epoch.
    sent: Vec<(u64, RoaringBitmap)>,
    attempts: u8,
    /// Sent and not acked.
    under_way: Option<(AttemptId, BTreeMap<u32, u8>)>,
}

impl Bench {
    fn new() -> Self {
        let disk = SimStorage::new(1);
        let mut digests = open(&disk, GROUP, BLOCKS);
        digests.opened(None, false);
        Self {
            disk,
            digests,
            image: BTreeMap::new(),
            epoch: 0,
            parts: BTreeMap::new(),
            sent: Vec::new(),
            attempts: 0,
            under_way: None,
        }
    }

    /// Captures these blocks, and checks what is left of them against what the target would hold without the rest.
    fn capture(&mut self, blocks: &BTreeMap<u32, u8>) {
        assert!(self.under_way.is_none());
        let mut captured = capture(blocks);
        let unchanged = self.digests.take_out_unchanged(&mut captured);
        for block in &unchanged[0] {
            assert_eq!(self.image.get(&block), blocks.get(&block), "block {block} was left out");
            assert!(!self.parts.contains_key(&block), "block {block} is in a part");
        }
        assert_eq!(captured.meters.dirty_blocks, blocks.len() as u64, "they were dirty all the same");
        self.attempts += 1;
        let attempt = AttemptId([self.attempts; 16]);
        let held = captured.volumes[0].blocks().clone();
        assert!(held.is_disjoint(&unchanged[0]) && held.len() + unchanged[0].len() == blocks.len() as u64);
        self.digests.captured(Epoch(self.epoch + 1), attempt, vec![held.clone()], captured.unreadable());
        let digest = |(block, held)| match held {
            BlockContent::Bytes(bytes) => Some((block, key().digest(bytes))),
            _ => None,
        };
        let digests = captured.volumes[0].iter().filter_map(digest).collect();
        self.digests.encoded(attempt, vec![BlockDigests { volume: SLOT, blocks: digests }]);
        let sent: BTreeMap<u32, u8> = held.iter().map(|block| (block, blocks[&block])).collect();
        self.sent.push((self.epoch + 1, held));
        self.under_way = Some((attempt, sent));
    }

    fn ack_part(&mut self) {
        let Some((attempt, blocks)) = self.under_way.take() else { return };
        self.parts.extend(blocks);
        self.digests.part_acked(attempt);
    }

    /// The target has the point; `is_heard`: and the source knows.
    fn ack(&mut self, is_heard: bool) {
        let Some((_, blocks)) = self.under_way.take() else { return };
        self.epoch += 1;
        self.image.append(&mut self.parts);
        self.image.extend(blocks);
        if is_heard {
            self.digests.acked(head(self.epoch));
        }
    }

    /// A new generation: what is under way, and all parts, are of no point any more.
    fn new_generation(&mut self) {
        self.under_way = None;
        self.parts.clear();
        self.digests.void();
        self.opened(false);
    }

    /// What the target tells of its newest point is never called wrong, and what it was not sent is never proved.
    fn check_told(&mut self) {
        let told = |byte: Option<&u8>| match byte {
            None | Some(9) => Told::Nothing,
            Some(0) => Told::Held(Found::Hole),
            Some(byte) => Told::Held(Found::Content(key().digest(&content(*byte)))),
        };
        let (all, newest) = (Extent { start: Block(0), count: BLOCKS }, head(self.epoch));
        let truth: Vec<Told> = (0..BLOCKS).map(|block| told(self.image.get(&block))).collect();
        let answers = self.digests.compare_told(0, all, &truth, newest, Timestamp(7));
        assert!(!answers.contains(&Answer::Differs), "a false alarm: {answers:?}");
        let lies = vec![told(Some(&77)); BLOCKS as usize];
        let answers_to_lies = self.digests.compare_told(0, all, &lies, newest, Timestamp(7));
        assert!(!answers_to_lies.contains(&Answer::Same));
        let proved = |answer: &Answer| *answer == Answer::Same;
        let differs = |answer: &Answer| *answer == Answer::Differs;
        assert!(answers.iter().map(proved).eq(answers_to_lies.iter().map(differs)), "what can be proved can be denied");
    }

    /// The agent starts anew; after a power cut with what was synced.
    fn restart(&mut self, is_power_cut: bool) {
        if is_power_cut {
            self.disk.power_cut();
        }
        self.disk.restart();
        self.disk.clear_faults();
        self.digests = open(&self.disk, GROUP, BLOCKS);
        self.under_way = None;
        if is_power_cut {
            self.parts.clear();
        }
        self.opened(!self.parts.is_empty());
    }

    /// The target takes the group up, and tells what it was sent.
    fn opened(&mut self, has_parts: bool) {
        let newest = (self.epoch > 0).then(|| head(self.epoch));
        self.digests.opened(newest, has_parts);
        let Some(since) = self.digests.asking() else { return };
        let mut later = RoaringBitmap::new();
        self.sent.iter().filter(|(epoch, _)| *epoch > since.epoch.0).for_each(|(_, blocks)| later |= blocks);
        let extents = reader::runs(&later, 3);
        let pages: Vec<_> = extents.chunks(2).collect();
        for (page, extents) in pages.iter().enumerate() {
            self.digests.changed(since, SLOT, extents, page as u32, page + 1 == pages.len(), newest);
        }
        if pages.is_empty() {
            self.digests.changed(since, SLOT, &[], 0, true, newest);
        }
    }

    fn unchanged_now(&mut self, blocks: &BTreeMap<u32, u8>) -> RoaringBitmap {
        self.digests.take_out_unchanged(&mut capture(blocks)).remove(0)
    }
}

#[derive(Clone, Debug)]
enum Op {
    Capture(BTreeMap<u32, u8>),
    AckPart,
    Ack(bool),
    NewGeneration,
    Write,
    Forget(u32),
    Restart(bool),
    Harm(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let blocks = proptest::collection::btree_map(0..BLOCKS, prop_oneof![0..4u8, 9..10u8], 1..12);
    prop_oneof![
        6 => blocks.prop_map(Op::Capture),
        2 => any::<bool>().prop_map(|_| Op::AckPart),
        4 => (0..8u8).prop_map(|heard| Op::Ack(heard > 0)),
        1 => any::<bool>().prop_map(|_| Op::NewGeneration),
        2 => any::<bool>().prop_map(|_| Op::Write),
        1 => (0..BLOCKS).prop_map(Op::Forget),
        1 => any::<bool>().prop_map(Op::Restart),
        1 => (0..12u64).prop_map(Op::Harm),
    ]
}

proptest! {
    /// The oracle is the target's image: whatever dies where, no block is left out that it would not hold.
    #[test]
    fn nothing_is_left_out_that_the_target_does_not_hold(ops in proptest::collection::vec(op(), 1..60)) {
        let mut bench = Bench::new();
        for op in ops {
            match op {
                Op::Capture(blocks) if bench.under_way.is_none() => bench.capture(&blocks),
                // A commit that is not heard of is followed by a new line, on which it is.
                Op::Ack(false) => {
                    bench.ack(false);
                    bench.new_generation();
                }
                Op::Capture(_) | Op::Ack(true) => bench.ack(true),
                Op::AckPart => bench.ack_part(),
                Op::NewGeneration => bench.new_generation(),
                Op::Write => bench.digests.write(),
                Op::Forget(block) => {
                    bench.digests.forget(SLOT, &[Extent { start: Block(block), count: 100 }]);
                    let all = (block..BLOCKS).map(|block| (block, 1)).collect();
                    assert!(bench.unchanged_now(&all).is_empty(), "what is lost is not unchanged");
                }
                Op::Restart(is_power_cut) => bench.restart(is_power_cut),
                Op::Harm(call) => {
                    bench.disk.fault_at(bench.disk.calls() + call, Fault::Death);
                    bench.digests.write();
                    bench.restart(true);
                }
            }
            bench.check_told();
        }
    }
}

fn all(byte: u8) -> BTreeMap<u32, u8> {
    (0..BLOCKS).map(|block| (block, byte)).collect()
}

#[test]
fn what_is_put_back_is_unchanged_once_it_is_acked_and_not_before() {
    let mut bench = Bench::new();
    bench.capture(&all(1));
    assert!(bench.unchanged_now(&all(1)).is_empty(), "on its way");
    bench.ack(true);
    assert_eq!(bench.unchanged_now(&all(1)).len(), u64::from(BLOCKS));
    let b = BTreeMap::from([(4, 2), (5, 0)]);
    bench.capture(&b);
    assert!(bench.unchanged_now(&BTreeMap::from([(4, 1), (5, 1)])).is_empty(), "A, B, A: B is on its way");
    bench.ack_part();
    assert!(bench.unchanged_now(&BTreeMap::from([(4, 1), (4, 2)])).is_empty(), "B is in a part");
    bench.capture(&BTreeMap::from([(4, 1)]));
    bench.ack(true);
    let now = BTreeMap::from([(3, 1), (4, 1), (5, 0), (6, 9)]);
    assert_eq!(bench.unchanged_now(&now).iter().collect::<Vec<_>>(), [3, 4, 5], "unreadable is never unchanged");
}

/// Block 4 goes A, B, A and the power is cut at each call to the disk, with B acked or on its way.
#[test]
fn a_power_cut_at_any_call_leaves_the_digests_right() {
    let mut cuts = 0;
    for is_acked in [false, true] {
        for call in 0.. {
            let mut bench = Bench::new();
            bench.capture(&all(1));
            bench.ack(true);
            bench.digests.write();
            let before = bench.disk.calls();
            bench.disk.fault_at(before + call, Fault::Death);
            bench.capture(&BTreeMap::from([(4, 2), (7, 0)]));
            if is_acked {
                bench.ack(true);
            }
            bench.digests.write();
            let is_over = bench.disk.calls() <= before + call;
            bench.restart(true);
            let same = bench.unchanged_now(&all(1));
            assert_eq!(same.contains(4), !is_acked && bench.image[&4] == 1, "call {call}");
            assert!(
                same.contains(3) && same.len() >= u64::from(BLOCKS) - 2,
                "call {call}: what was not touched is known"
            );
            bench.capture(&all(1));
            bench.ack(true);
            assert_eq!(bench.image, all(1), "call {call}");
            cuts += 1;
            if is_over {
                break;
            }
        }
    }
    println!("{cuts} power cuts");
    assert!(cuts > 15);
}

#[test]
fn bad_files_leave_nothing_known_and_are_made_anew() {
    let known = |disk: &SimStorage, group, blocks| {
        let mut digests = open(disk, group, blocks);
        digests.opened(Some(head(1)), false);
        if let Some(since) = digests.asking() {
            digests.changed(since, SLOT, &[], 0, true, Some(head(1)));
        }
        digests.take_out_unchanged(&mut capture(&all(1))).remove(0).len()
    };
    let fresh = || {
        let mut bench = Bench::new();
        bench.capture(&all(1));
        bench.ack(true);
        bench.digests.write();
        bench.disk
    };
    assert_eq!(known(&fresh(), GROUP, BLOCKS), u64::from(BLOCKS), "as it should be");
    assert_eq!(known(&fresh(), GroupId([8; 16]), BLOCKS), 0, "another group's");
    assert_eq!(known(&fresh(), GROUP, BLOCKS + 1), 0, "of a volume of another size");
    let state_len = fresh().open(Path::new("/digests/state")).expect("there").len().expect("its length");
    for (name, len) in [("state", state_len), ("3.slots", 64)] {
        let path = Path::new("/digests").join(name);
        for at in 0..len {
            let disk = fresh();
            let file = disk.open_write(&path).expect("opened");
            let mut byte = [0];
            file.read_at(&mut byte, at).expect("read");
            file.write_at(&[byte[0] ^ 4], at).expect("written");
            assert_eq!(known(&disk, GROUP, BLOCKS), 0, "{name} damaged at {at}");
            file.set_len(at).expect("cut");
            assert_eq!(known(&disk, GROUP, BLOCKS), 0, "{name} cut to {at}");
        }
        let disk = fresh();
        disk.remove(&path).expect("removed");
        assert_eq!(known(&disk, GROUP, BLOCKS), 0, "{name} missing");
        assert_eq!(known(&disk, GROUP, BLOCKS), 0, "nothing was learnt");
    }
    let disk = fresh();
    disk.open_write(Path::new("/digests/3.slots")).expect("opened").set_len(4096 + 16 * 10).expect("cut");
    assert_eq!(known(&disk, GROUP, BLOCKS), 10, "slots that are gone are unknown");
}

#[test]
fn a_disk_that_fails_costs_bytes_and_nothing_else() {
    for fault in [io::ErrorKind::StorageFull, io::ErrorKind::Other, io::ErrorKind::ReadOnlyFilesystem] {
        for call in 0..40 {
            let mut bench = Bench::new();
            bench.capture(&all(1));
            bench.ack(true);
            bench.disk.fault_at(bench.disk.calls() + call, Fault::Error(fault));
            bench.digests.write();
            for byte in [1, 2, 1] {
                bench.capture(&BTreeMap::from([(4, byte), (5, 3 - byte)]));
                bench.ack(true);
                bench.digests.write();
            }
            bench.restart(true);
            bench.capture(&all(1));
            bench.ack(true);
            assert_eq!(bench.image, all(1), "call {call}: {fault:?}");
        }
    }
}

#[test]
fn a_target_that_lost_points_or_has_others_leaves_nothing_known() {
    let mut bench = Bench::new();
    for byte in [1, 2] {
        bench.capture(&all(byte));
        bench.ack(true);
    }
    bench.digests.write();
    bench.restart(false);
    assert_eq!(bench.unchanged_now(&all(2)).len(), u64::from(BLOCKS));
    // It stands at point 1 again, and does not have point 2.
    bench.digests.void();
    bench.digests.opened(Some(head(1)), false);
    let since = bench.digests.asking().expect("it is asked");
    assert!(bench.unchanged_now(&all(2)).is_empty(), "nothing is known until it has answered");
    bench.digests.changed_unknown(head(9), Some(head(1)));
    assert_eq!(bench.digests.asking(), Some(since), "that was about another point");
    bench.digests.changed_unknown(since, Some(head(1)));
    assert_eq!(bench.digests.asking(), None);
    assert!(bench.unchanged_now(&all(2)).is_empty());
}

#[test]
fn an_answer_with_pages_missing_is_no_answer() {
    let mut bench = Bench::new();
    bench.capture(&all(1));
    bench.ack(true);
    bench.digests.write();
    bench.digests = open(&bench.disk, GROUP, BLOCKS);
    bench.digests.opened(Some(head(5)), false);
    let extent = |start| [Extent { start: Block(start), count: 1 }];
    bench.digests.changed(head(1), SLOT, &extent(1), 0, false, Some(head(5)));
    bench.digests.changed(head(1), SLOT, &extent(3), 2, true, Some(head(5)));
    assert!(bench.digests.asking().is_some(), "page 1 is missing");
    bench.digests.changed(head(1), SLOT, &extent(1), 0, false, Some(head(5)));
    bench.digests.changed(head(1), SLOT, &extent(2), 1, false, Some(head(5)));
    bench.digests.changed(head(1), SLOT, &extent(3), 2, true, Some(head(5)));
    let known = bench.unchanged_now(&all(1));
    assert_eq!((0..5).filter(|block| !known.contains(*block)).collect::<Vec<_>>(), [1, 2, 3]);
}

#[test]
fn little_is_written_late_and_much_at_once() {
    let mut bench = Bench::new();
    bench.capture(&all(1));
    bench.ack(true);
    let calls = bench.disk.calls();
    bench.digests.write_if_due(Duration::from_secs(3600));
    assert_eq!(bench.disk.calls(), calls, "an idle volume stays idle");
    bench.digests.write_if_due(ANY_AFTER);
    let written = bench.disk.calls();
    assert!(written > calls);
    bench.digests.write_if_due(2 * ANY_AFTER);
    assert_eq!(bench.disk.calls(), written, "there is nothing to write");
}

#[test]
fn digests_that_were_lost_are_learnt_from_the_volume_and_what_differs_is_told() {
    let mut bench = Bench::new();
    bench.capture(&all(1));
    bench.ack(true);
    bench.digests.know_nothing(Some(head(1)));
    assert_eq!(bench.digests.next_unknown(0, 0), Some(0));
    let found = |byte: u8| if byte == 0 { Found::Hole } else { Found::Content(key().digest(&content(byte))) };
    let compare = |digests: &mut Digests, block, byte| digests.compare(0, Block(block), found(byte), Timestamp(77));
    for (block, byte) in [(0, 1), (1, 0)] {
        assert_eq!(compare(&mut bench.digests, block, byte), Answer::Learnt);
        assert_eq!(compare(&mut bench.digests, block, byte), Answer::Same);
        assert_eq!(compare(&mut bench.digests, block, 1 - byte), Answer::Differs);
    }
    assert_eq!(bench.digests.next_unknown(0, 0), Some(2));
    assert_eq!(bench.unchanged_now(&BTreeMap::from([(0, 1), (1, 0), (2, 1)])).iter().collect::<Vec<_>>(), [0, 1]);
    bench.capture(&BTreeMap::from([(5, 2)]));
    assert_eq!(compare(&mut bench.digests, 5, 1), Answer::NotNow, "on its way");
    bench.ack_part();
    assert_eq!(compare(&mut bench.digests, 5, 1), Answer::NotNow, "in a part");
    bench.ack(true);

    let none = [RoaringBitmap::new()];
    assert_eq!(bench.digests.oldest_proof(&none), None);
    assert_eq!(compare(&mut bench.digests, BLOCKS - 1, 1), Answer::Learnt);
    assert_eq!(compare(&mut bench.digests, BLOCKS - 1, 1), Answer::Same);
    bench.digests.write();
    let mut again = open(&bench.disk, GROUP, BLOCKS);
    assert_eq!(again.oldest_proof(&none), Some(Timestamp(77)), "the dates of proofs are kept");
    assert_eq!(again.oldest_proof_there(), None, "nobody has asked the target");
    assert_eq!(again.oldest_proof(&[RoaringBitmap::from([BLOCKS - 1])]), None, "a region whose end is skipped");
    again.opened(Some(head(1)), false);
    assert_eq!(again.next_unknown(0, 0), Some(2), "and so is what was learnt");
}

#[test]
fn proofs_over_the_line_have_dates_of_their_own_and_a_state_without_them_is_read() {
    let mut bench = Bench::new();
    bench.capture(&all(1));
    bench.ack(true);
    let last = Extent { start: Block(BLOCKS - 1), count: 1 };
    let told = [Told::Held(Found::Content(key().digest(&content(1))))];
    assert_eq!(bench.digests.stalest_there(), (0, 0));
    assert_eq!(bench.digests.compare_told(0, last, &told, head(2), Timestamp(8)), [Answer::NotNow], "another point");
    assert_eq!(bench.digests.compare_told(0, last, &[Told::Damaged], head(1), Timestamp(8)), [Answer::NotNow]);
    assert_eq!(bench.digests.oldest_proof_there(), None);
    assert_eq!(bench.digests.compare_told(0, last, &told, head(1), Timestamp(8)), [Answer::Same]);
    bench.digests.write();
    let again = open(&bench.disk, GROUP, BLOCKS);
    assert_eq!((again.oldest_proof_there(), again.oldest_proof(&[RoaringBitmap::new()])), (Some(Timestamp(8)), None));

    // Version 1 ended each volume with the local dates.
    let path = Path::new("/digests/state");
    let mut state = cdp_seams::storage::read_all(&bench.disk, path, 1 << 20).expect("read");
    state.truncate(state.len() - 4 - 8);
    state[4] = 1;
    state.extend_from_slice(&crc32fast::hash(&state).to_le_bytes());
    cdp_seams::storage::replace(&bench.disk, path, &state).expect("replaced");
    let of_before = open(&bench.disk, GROUP, BLOCKS);
    assert_eq!((of_before.base, of_before.oldest_proof_there()), (Some(head(1)), None), "what it has is believed");
}
