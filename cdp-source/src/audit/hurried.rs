//! The hurried round: volumes of which every block is gone through within a day, because what was dirty on them was taken up from a
//! saved change record (`saved`).
//!
//! Owns which blocks are left and the pace. A block is done with once it was held against its digest, or is captured from what the disk
//! holds now: either way the target has it.

use super::take;
use roaring::RoaringBitmap;
use std::time::Duration;

/// In so long the round is done: half a day, so that a day is enough where the disk is busy half of the time.
const ROUND: Duration = Duration::from_secs(12 * 3600);
/// Blocks read at a time: at least 1 MiB, so that an idle disk is not woken for each; and no more than 32 MiB, which is 2.6 TiB a day at a
/// cut a second. What is larger takes as long as that needs.
const BLOCKS: (u64, u64) = (256, 8192);

/// The volumes that are to be gone through.
#[derive(Debug, Default)]
pub(super) struct Hurried {
    /// Of each volume: how many blocks there were to go through, and those that are left.
    volumes: Vec<Option<(u64, RoaringBitmap)>>,
    next: (usize, u64),
    allowed: f64,
}

impl Hurried {
    /// Every one of the volume's blocks is to be gone through.
    pub(super) fn add(&mut self, volume: usize, blocks: u64) {
        let mut left = RoaringBitmap::new();
        if let Some(last) = blocks.checked_sub(1) {
            left.insert_range(0..=last as u32);
        }
        if self.volumes.len() <= volume {
            self.volumes.resize(volume + 1, None);
        }
        self.volumes[volume] = Some((blocks, left));
    }

    /// What to read now; `since` the last time. `busy` blocks are captured.
    pub(super) fn next(&mut self, since: Duration, round: Duration, busy: &[RoaringBitmap]) -> Vec<RoaringBitmap> {
        self.captured(busy);
        let all: u64 = self.volumes.iter().flatten().map(|(blocks, _)| blocks).sum();
        let left = self.left();
        if left == 0 {
            return Vec::new();
        }
        let more = all as f64 * since.as_secs_f64() / round.min(ROUND).as_secs_f64();
        self.allowed = (self.allowed + more).min(BLOCKS.1 as f64);
        if self.allowed < BLOCKS.0.min(left) as f64 {
            return Vec::new();
        }
        let count = self.allowed as u64;
        self.allowed -= count as f64;
        let volumes = &self.volumes;
        let sizes: Vec<u64> = volumes.iter().map(|volume| volume.as_ref().map_or(0, |(blocks, _)| *blocks)).collect();
        let next_of = |volume: usize, from: u32| volumes[volume].as_ref()?.1.range(from..).next();
        take(&mut self.next, &sizes, count, next_of)
    }

    /// These blocks are captured from what the disk holds now.
    pub(super) fn captured(&mut self, blocks: &[RoaringBitmap]) {
        for (volume, blocks) in self.volumes.iter_mut().zip(blocks) {
            if let Some((_, left)) = volume {
                *left -= blocks;
            }
        }
    }

    /// A block was held against its digest, or cannot be.
    pub(super) fn done(&mut self, volume: usize, block: u32) {
        if let Some(Some((_, left))) = self.volumes.get_mut(volume) {
            left.remove(block);
        }
    }

    /// Blocks that are left.
    pub(super) fn left(&self) -> u64 {
        self.volumes.iter().flatten().map(|(_, left)| left.len()).sum()
    }

    /// The volumes that were gone through since this was asked last.
    pub(super) fn take_finished(&mut self) -> Vec<usize> {
        let is_finished =
            |volume: &Option<(u64, RoaringBitmap)>| volume.as_ref().is_some_and(|(_, left)| left.is_empty());
        let finished: Vec<usize> = (0..self.volumes.len()).filter(|at| is_finished(&self.volumes[*at])).collect();
        for volume in &finished {
            self.volumes[*volume] = None;
        }
        finished
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NORMAL: Duration = Duration::from_secs(28 * 24 * 3600);

    fn len(blocks: &[RoaringBitmap]) -> u64 {
        blocks.iter().map(RoaringBitmap::len).sum()
    }

    /// 100 GiB, a cut a second, of which each other one is not quiet: within a day every block was read, and none but those.
    #[test]
    fn a_volume_is_gone_through_within_a_day_though_half_of_what_is_read_does_not_count() {
        let (blocks, mut hurried) = (25 << 20, Hurried::default());
        hurried.add(1, blocks);
        let (mut seconds, mut read) = (0_u64, 0);
        while hurried.left() > 0 {
            seconds += 10;
            let batch = hurried.next(Duration::from_secs(10), NORMAL, &[]);
            read += len(&batch);
            if seconds % 20 == 0 {
                batch.get(1).into_iter().flatten().for_each(|block| hurried.done(1, block));
            }
            assert!(batch.first().is_none_or(RoaringBitmap::is_empty) && len(&batch) <= BLOCKS.1);
        }
        assert!(seconds > 12 * 3600 && seconds <= 24 * 3600 + 600, "{seconds} s");
        assert!(read <= 2 * blocks + BLOCKS.1, "{read}");
        assert_eq!(hurried.take_finished(), [1]);
        assert!(hurried.take_finished().is_empty());
    }

    #[test]
    fn what_is_captured_or_cannot_be_read_is_not_waited_for() {
        let mut hurried = Hurried::default();
        hurried.add(0, 10);
        hurried.add(2, 5);
        hurried.captured(&[(0..8).collect(), RoaringBitmap::new(), (0..4).collect()]);
        assert_eq!(hurried.left(), 3);
        let busy = [RoaringBitmap::from_iter([8])];
        let batch = hurried.next(NORMAL, NORMAL, &busy);
        assert_eq!(batch, [[9].into_iter().collect(), RoaringBitmap::new(), [4].into_iter().collect()]);
        hurried.done(0, 9);
        hurried.done(1, 0);
        hurried.done(7, 0);
        assert_eq!(hurried.take_finished(), [0]);
        hurried.done(2, 4);
        assert_eq!(hurried.take_finished(), [2]);
        assert!(hurried.next(NORMAL, NORMAL, &busy).is_empty());
    }
}
