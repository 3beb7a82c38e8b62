//! What is still to be captured and what is captured but not acked: the account of one group's blocks.
//!
//! Invariant: a block that the tracker gave is in `carry`, in a captured attempt until the target has acked it, or among the `skipped`.
//! Their union is what the tracker has to keep as `unacked`. Knows no tracker and no line.

use cdp_protocol::units::{AttemptId, BLOCK_BYTES, Epoch, Extent, Timestamp};
use roaring::RoaringBitmap;
use std::collections::VecDeque;
use std::sync::Arc;

/// A set of blocks of each volume.
pub type Blocks = Vec<RoaringBitmap>;

/// The account.
#[derive(Debug)]
pub struct Ledger {
    /// Blocks of each volume.
    volume_blocks: Vec<u64>,
    /// Blocks that the next captures have to hold.
    pub carry: Blocks,
    /// Blocks whose newest capture the device could not read: nothing marks them when it can again.
    unreadable: Blocks,
    /// Blocks that stand as holes in what was captured because they were excluded (`exclusion`).
    pub skipped: Blocks,
    captured: VecDeque<Captured>,
    /// Blocks that left the account, acked or unchanged after all, since it was opened.
    done: u64,
}

/// An attempt that was captured and is not acked.
#[derive(Clone, Debug, PartialEq)]
pub struct Captured {
    /// Its epoch.
    pub epoch: Epoch,
    /// The attempt.
    pub attempt: AttemptId,
    /// Whether it is only a part.
    pub is_part: bool,
    /// Its cut's instant.
    pub cut_time: Timestamp,
    /// What it holds.
    pub blocks: Arc<Blocks>,
    /// Bytes it takes, in memory or in the spool: of content first, of frames once it is encoded.
    pub bytes: u64,
}

impl Captured {
    /// Blocks that it holds.
    fn len(&self) -> u64 {
        self.blocks.iter().map(RoaringBitmap::len).sum()
    }
}

impl Ledger {
    /// An account of volumes with so many blocks each, with nothing in it.
    #[must_use]
    pub fn new(volume_blocks: Vec<u64>) -> Self {
        let carry = vec![RoaringBitmap::new(); volume_blocks.len()];
        let (unreadable, skipped) = (carry.clone(), carry.clone());
        Self { volume_blocks, unreadable, skipped, carry, captured: VecDeque::new(), done: 0 }
    }

    /// Blocks in `carry`.
    #[must_use]
    pub fn carried(&self) -> u64 {
        self.carry.iter().map(RoaringBitmap::len).sum()
    }

    /// Blocks in `carry` and in what is captured and not acked, and those that left since the account was opened. Each counts whether it has content or
    /// is a hole.
    #[must_use]
    pub fn left_and_done(&self) -> (u64, u64) {
        (self.carried() + self.captured.iter().map(Captured::len).sum::<u64>(), self.done)
    }

    /// Blocks of all volumes.
    #[must_use]
    pub fn volume_blocks(&self) -> u64 {
        self.volume_blocks.iter().sum()
    }

    /// Adds to `carry`.
    pub fn carry_more(&mut self, blocks: &[RoaringBitmap]) {
        for (carry, more) in self.carry.iter_mut().zip(blocks) {
            *carry |= more;
        }
    }

    /// Carries blocks of a volume once more, acked or not: the target has lost them. Gives how many lie beyond the volume's end,
    /// which are passed over.
    pub fn carry_again(&mut self, volume: usize, extents: &[Extent]) -> u64 {
        let end = self.volume_blocks[volume];
        let mut beyond = 0;
        for extent in extents {
            let (from, to) = (u64::from(extent.start.0), extent.end().min(end));
            if from < to {
                self.carry[volume].insert_range(extent.start.0..=(to - 1) as u32);
            }
            beyond += extent.end() - to.max(from);
        }
        beyond
    }

    /// Carries the blocks that could not be read: it is time to try them again.
    pub fn carry_unreadable(&mut self) {
        let unreadable = self.unreadable.clone();
        self.carry_more(&unreadable);
    }

    /// Whether all of these blocks of a volume could not be read the last time either.
    #[must_use]
    pub fn are_known_unreadable(&self, volume: usize, blocks: &RoaringBitmap) -> bool {
        blocks.is_subset(&self.unreadable[volume])
    }

    /// Everything has to be captured again; nothing captured so far counts.
    pub fn carry_everything(&mut self) {
        self.captured.clear();
        for (carry, blocks) in self.carry.iter_mut().zip(&self.volume_blocks) {
            if let Some(last) = blocks.checked_sub(1) {
                carry.insert_range(0..=last as u32);
            }
        }
    }

    /// Keeps an attempt until it is acked. Its blocks are in `carry` no more; those it could not read are remembered.
    pub fn capture(&mut self, captured: Captured, unreadable: &[RoaringBitmap]) {
        for (volume, blocks) in captured.blocks.iter().enumerate() {
            self.carry[volume] -= blocks;
            self.unreadable[volume] -= blocks;
            self.unreadable[volume] |= &unreadable[volume];
        }
        self.captured.push_back(captured);
    }

    /// The target holds these blocks' content already.
    pub fn unchanged(&mut self, blocks: &[RoaringBitmap]) {
        for (volume, blocks) in blocks.iter().enumerate() {
            self.carry[volume] -= blocks;
            self.unreadable[volume] -= blocks;
            self.done += blocks.len();
        }
    }

    /// How many bytes the attempt's frames turned out to have.
    pub fn encoded(&mut self, attempt: AttemptId, bytes: u64) {
        if let Some(captured) = self.captured.iter_mut().find(|captured| captured.attempt == attempt) {
            captured.bytes = bytes;
        }
    }

    /// A point is acked, and with it all before it. Gives back what it was, with the bytes of everything that was acked only now: parts
    /// may have no ack of their own. `None` where it was not captured here.
    pub fn acked(&mut self, epoch: Epoch) -> Option<Captured> {
        let (mut point, mut bytes) = (None, 0);
        while self.captured.front().is_some_and(|captured| captured.epoch <= epoch) {
            let captured = self.captured.pop_front();
            bytes += captured.as_ref().map_or(0, |captured| captured.bytes);
            self.done += captured.as_ref().map_or(0, Captured::len);
            point = captured.filter(|captured| captured.epoch == epoch);
        }
        point.map(|point| Captured { bytes, ..point })
    }

    /// A part is acked. It is durable at the target until its epoch's commit, or until a new generation, at which everything
    /// is carried again.
    pub fn part_acked(&mut self, attempt: AttemptId) -> Option<Captured> {
        let index = self.captured.iter().position(|captured| captured.attempt == attempt)?;
        let part = self.captured.remove(index);
        self.done += part.as_ref().map_or(0, Captured::len);
        part
    }

    /// Nothing captured will be acked: all of it is to be captured again.
    pub fn void(&mut self) {
        for captured in std::mem::take(&mut self.captured) {
            self.carry_more(&captured.blocks);
        }
    }

    /// Blocks of an attempt that is captured and not acked.
    #[must_use]
    pub fn blocks_of(&self, attempt: AttemptId) -> Option<Arc<Blocks>> {
        let mut captured = self.captured.iter();
        captured.find(|captured| captured.attempt == attempt).map(|captured| Arc::clone(&captured.blocks))
    }

    /// Others stand in the place of these attempts, which follow one another: with what is behind them they hold the same blocks.
    pub fn replace(&mut self, attempts: &[AttemptId], others: Vec<Captured>) {
        let is_gone = |captured: &Captured| attempts.contains(&captured.attempt);
        let Some(at) = self.captured.iter().position(is_gone) else { return };
        self.captured.retain(|captured| !is_gone(captured));
        for (index, captured) in others.into_iter().enumerate() {
            self.captured.insert(at + index, captured);
        }
    }

    /// Of what is captured nothing will be acked but these: all else is to be captured again. Gives its attempts.
    pub fn void_all_but(&mut self, kept: impl Fn(AttemptId) -> bool) -> Vec<AttemptId> {
        let (kept, gone): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.captured).into_iter().partition(|captured| kept(captured.attempt));
        self.captured = kept;
        for captured in &gone {
            self.carry_more(&captured.blocks);
        }
        gone.iter().map(|captured| captured.attempt).collect()
    }

    /// What the tracker has to keep as `unacked`.
    #[must_use]
    pub fn unacked(&self) -> Blocks {
        let mut union = self.carry.clone();
        let kept = [&self.unreadable, &self.skipped];
        for blocks in kept.into_iter().chain(self.captured.iter().map(|captured| &*captured.blocks)) {
            for (union, blocks) in union.iter_mut().zip(blocks) {
                *union |= blocks;
            }
        }
        union
    }

    /// Bytes captured and not acked.
    #[must_use]
    pub fn unacked_bytes(&self) -> u64 {
        self.captured.iter().map(|captured| captured.bytes).sum()
    }

    /// Epochs captured whole and not acked.
    #[must_use]
    pub fn unacked_epochs(&self) -> u64 {
        self.captured.iter().filter(|captured| !captured.is_part).count() as u64
    }

    /// Attempts captured and not acked.
    #[must_use]
    pub fn attempts(&self) -> usize {
        self.captured.len()
    }

    /// What was captured last and is not acked.
    #[must_use]
    pub fn newest(&self) -> Option<&Captured> {
        self.captured.back()
    }

    /// Whether all that was captured is acked.
    #[must_use]
    pub fn is_acked(&self) -> bool {
        self.captured.is_empty()
    }
}

/// Bytes of content in a set of blocks.
#[must_use]
pub fn to_bytes(blocks: u64) -> u64 {
    blocks * BLOCK_BYTES as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{Strategy, any, prop_oneof, proptest};
    use std::collections::BTreeSet;

    fn captured(number: u8, epoch: u64, is_part: bool, blocks: RoaringBitmap) -> Captured {
        let attempt = AttemptId([number; 16]);
        Captured {
            epoch: Epoch(epoch),
            attempt,
            is_part,
            cut_time: Timestamp(0),
            blocks: Arc::new(vec![blocks]),
            bytes: 1,
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Mark(u32),
        Cut,
        Part(u32),
        Ack,
        PartAck,
        Void,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..40u32).prop_map(Op::Mark),
            any::<bool>().prop_map(|_| Op::Cut),
            (1..10u32).prop_map(Op::Part),
            any::<bool>().prop_map(|_| Op::Ack),
            any::<bool>().prop_map(|_| Op::PartAck),
            any::<bool>().prop_map(|_| Op::Void),
        ]
    }

    proptest! {
        /// The oracle: a block marked is unacked until an attempt that was captured after the mark is acked.
        #[test]
        fn a_marked_block_stays_unacked_until_an_attempt_that_holds_it_is_acked(ops in proptest::collection::vec(op(), 1..60)) {
            let mut ledger = Ledger::new(vec![40]);
            let (mut carry, mut under_way) = (BTreeSet::new(), Vec::<(u64, u8, bool, BTreeSet<u32>)>::new());
            let (mut epoch, mut number) = (1, 0u8);
            for op in ops {
                match op {
                    Op::Mark(block) => {
                        carry.insert(block);
                        ledger.carry_more(&[RoaringBitmap::from_iter([block])]);
                    }
                    Op::Cut | Op::Part(_) => {
                        let count = if let Op::Part(count) = op { count as usize } else { usize::MAX };
                        let taken: BTreeSet<u32> = carry.iter().copied().take(count).collect();
                        carry.retain(|block| !taken.contains(block));
                        let is_part = matches!(op, Op::Part(_));
                        number += 1;
                        ledger.capture(captured(number, epoch, is_part, taken.iter().copied().collect()), &[RoaringBitmap::new()]);
                        ledger.encoded(AttemptId([number; 16]), number.into());
                        under_way.push((epoch, number, is_part, taken));
                        epoch += u64::from(!is_part);
                    }
                    Op::Ack => {
                        if let Some(at) = under_way.iter().position(|(_, _, is_part, _)| !is_part) {
                            let acked = under_way[at].0;
                            let bytes = under_way.drain(..=at).map(|(_, number, _, _)| u64::from(number)).sum();
                            let point = ledger.acked(Epoch(acked)).map(|point| (point.epoch, point.bytes));
                            assert_eq!(point, Some((Epoch(acked), bytes)));
                        }
                    }
                    Op::PartAck => {
                        if under_way.first().is_some_and(|(_, _, is_part, _)| *is_part) {
                            let (_, number, _, _) = under_way.remove(0);
                            assert!(ledger.part_acked(AttemptId([number; 16])).is_some());
                        }
                    }
                    Op::Void => {
                        under_way.drain(..).for_each(|(_, _, _, blocks)| carry.extend(blocks));
                        ledger.void();
                    }
                }
                let mut union = carry.clone();
                for (_, _, _, blocks) in &under_way {
                    union.extend(blocks);
                }
                assert_eq!(ledger.unacked()[0].iter().collect::<BTreeSet<_>>(), union);
                assert_eq!(ledger.carry[0].iter().collect::<BTreeSet<_>>(), carry);
                assert_eq!(ledger.is_acked(), under_way.is_empty());
            }
        }
    }

    #[test]
    fn a_block_that_could_not_be_read_stays_unacked_until_it_could() {
        let none = [RoaringBitmap::new()];
        let blocks = |blocks: &[u32]| vec![RoaringBitmap::from_iter(blocks)];
        let mut ledger = Ledger::new(vec![10]);
        ledger.carry_more(&blocks(&[1, 9]));
        ledger.capture(captured(1, 1, false, RoaringBitmap::from_iter([1, 9])), &blocks(&[9]));
        ledger.acked(Epoch(1));
        assert_eq!(ledger.unacked(), blocks(&[9]));
        let is_known = |block: u32| ledger.are_known_unreadable(0, &RoaringBitmap::from_iter([block]));
        assert!(is_known(9) && !is_known(1));
        ledger.carry_unreadable();
        assert_eq!(ledger.carry, blocks(&[9]));
        ledger.capture(captured(2, 2, false, RoaringBitmap::from_iter([9])), &none);
        ledger.acked(Epoch(2));
        assert_eq!(ledger.unacked(), none);
    }

    #[test]
    fn what_is_skipped_stays_unacked_though_its_hole_is_acked() {
        let blocks = |blocks: &[u32]| vec![RoaringBitmap::from_iter(blocks)];
        let mut ledger = Ledger::new(vec![10]);
        ledger.skipped = blocks(&[4, 5]);
        ledger.capture(captured(1, 1, false, RoaringBitmap::from_iter([3, 4])), &[RoaringBitmap::new()]);
        assert_eq!(ledger.unacked(), blocks(&[3, 4, 5]));
        ledger.acked(Epoch(1));
        assert_eq!(ledger.unacked(), blocks(&[4, 5]));
        assert!(ledger.is_acked());
    }

    #[test]
    fn what_is_carried_again_ends_with_its_volume() {
        let extent = |start, count| Extent::new(cdp_protocol::units::Block(start), count).expect("an extent");
        let mut ledger = Ledger::new(vec![5, 10, 0]);
        assert_eq!(ledger.carry_again(1, &[extent(0, 2), extent(8, 5), extent(u32::MAX, 1)]), 4);
        assert_eq!(ledger.carry_again(2, &[extent(0, 1)]), 1);
        let carried: Vec<Vec<u32>> = ledger.carry.iter().map(|blocks| blocks.iter().collect()).collect();
        assert_eq!(carried, [vec![], vec![0, 1, 8, 9], vec![]]);
    }

    #[test]
    fn everything_is_every_block_of_every_volume() {
        let mut ledger = Ledger::new(vec![3, 0, 1 << 32]);
        ledger.capture(captured(1, 1, true, RoaringBitmap::from_iter([1])), &[RoaringBitmap::new()]);
        ledger.carry_everything();
        assert_eq!(ledger.carry.iter().map(RoaringBitmap::len).collect::<Vec<_>>(), [3, 0, 1 << 32]);
        assert!(ledger.is_acked());
    }
}
