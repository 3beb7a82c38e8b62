//! The audit: blocks that nobody writes to are read now and then, and held against what the target is known to hold of them.
//!
//! It is the proof that no write was missed, and how digests that were lost come back without a byte on the line. A block counts only
//! if it cannot have changed around its read: nothing was in flight at the flip before it, and no flip after it has a mark of it.
//! Owns what is to be read next and at what pace; `hurried` are the volumes that cannot wait for their turn. Reads nothing itself, and does not say what becomes
//! of what it finds.

mod hurried;

pub mod line;

use crate::digests::Digests;
use crate::reader::{self, READ_BLOCKS_MAX, ReadRequest};
use cdp_protocol::seal::Digest;
use cdp_protocol::units::Block;
use hurried::Hurried;
use roaring::RoaringBitmap;
use std::time::Duration;

/// Blocks read at a time where digests are to be had back: 4 MiB after a cut.
const UNKNOWN_BLOCKS: u64 = 1024;
/// How soon they are looked for again once all were seen.
const UNKNOWN_AGAIN: Duration = Duration::from_secs(60);
/// Blocks read at a time on the round: at least 256 KiB, so that an idle disk is not woken for each block; and no more than 1 MiB, however long nothing could be
/// looked at.
const ROUND_BLOCKS: (u64, u64) = (64, 256);

/// What a block was found to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Zeros.
    Hole,
    /// What has this digest.
    Content(Digest),
}

/// A block that was read and may have changed meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// The volume, by its place in the group.
    pub volume: usize,
    /// The block.
    pub block: Block,
    /// What it held.
    pub found: Found,
}

/// Where the audit stands.
#[derive(Debug, Default)]
pub struct Audit {
    /// Read since the last flip.
    looks: Vec<Look>,
    /// The next block of the round.
    next: (usize, u64),
    /// The next block of those that nothing is known of.
    next_unknown: (usize, u64),
    /// When they are looked for again.
    unknown_at: Duration,
    /// Blocks that the round may read.
    allowed: f64,
    allowed_at: Option<Duration>,
    hurried: Hurried,
}

impl Audit {
    /// What to read now, so that every block is looked at once in `round`. `busy` are blocks that are to be captured or are being sent: nothing is to be learnt of them.
    pub fn requests(
        &mut self,
        digests: &Digests,
        busy: &[RoaringBitmap],
        round: Duration,
        now: Duration,
    ) -> Vec<ReadRequest> {
        let sizes = digests.volume_blocks();
        let all: u64 = sizes.iter().sum();
        let since = now.saturating_sub(self.allowed_at.replace(now).unwrap_or(now));
        let (blocks_min, blocks_max) = ROUND_BLOCKS;
        let more = all as f64 * since.as_secs_f64() / round.as_secs_f64();
        self.allowed = (self.allowed + more).min(blocks_max as f64);
        let mut blocks = vec![RoaringBitmap::new(); sizes.len()];
        if now >= self.unknown_at {
            blocks =
                take(&mut self.next_unknown, &sizes, UNKNOWN_BLOCKS, |volume, from| digests.next_unknown(volume, from));
            // All of them were seen: what is left cannot be read, or is busy.
            if blocks.iter().map(RoaringBitmap::len).sum::<u64>() < UNKNOWN_BLOCKS {
                self.unknown_at = now + UNKNOWN_AGAIN;
            }
        }
        if self.allowed >= blocks_min.min(all) as f64 {
            let count = self.allowed as u64;
            self.allowed -= count as f64;
            let turn = take(&mut self.next, &sizes, count, |_, from| Some(from));
            blocks.iter_mut().zip(turn).for_each(|(blocks, turn)| *blocks |= turn);
        }
        let hurried = self.hurried.next(since, round, busy);
        blocks.iter_mut().zip(hurried).for_each(|(blocks, hurried)| *blocks |= hurried);
        let volumes = blocks.into_iter().zip(busy).enumerate();
        let requests = volumes.flat_map(|(volume, (blocks, busy))| {
            let extents = reader::runs(&(blocks - busy), READ_BLOCKS_MAX);
            extents.into_iter().map(move |extent| ReadRequest { volume, extent })
        });
        requests.collect()
    }

    /// Keeps what was read until the next flip.
    pub fn looked(&mut self, look: Look) {
        self.looks.push(look);
    }

    /// Every block of the volume is to be gone through within a day.
    pub fn hurry(&mut self, volume: usize, blocks: u64) {
        self.hurried.add(volume, blocks);
    }

    /// Blocks of volumes that are to be gone through within a day and were not yet.
    #[must_use]
    pub fn hurried_blocks(&self) -> u64 {
        self.hurried.left()
    }

    /// A block was held against its digest, or cannot be read.
    pub fn done(&mut self, volume: usize, block: Block) {
        self.hurried.done(volume, block.0);
    }

    /// The volumes that were to be gone through within a day, and have been since this was asked last.
    pub fn take_finished(&mut self) -> Vec<usize> {
        self.hurried.take_finished()
    }

    /// A flip: gives what was read before it and was not touched since. What was touched is captured.
    pub fn flipped(&mut self, touched: &[RoaringBitmap]) -> Vec<Look> {
        self.hurried.captured(touched);
        let looks = std::mem::take(&mut self.looks).into_iter();
        looks.filter(|look| !touched[look.volume].contains(look.block.0)).collect()
    }

    /// What was read does not count.
    pub fn forget(&mut self) {
        self.looks.clear();
    }
}

/// Up to `count` blocks of each kind that `next_of` names, from `next` on, which moves behind them; once around the volumes at most.
fn take(
    next: &mut (usize, u64),
    sizes: &[u64],
    count: u64,
    next_of: impl Fn(usize, u32) -> Option<u32>,
) -> Vec<RoaringBitmap> {
    let mut taken = vec![RoaringBitmap::new(); sizes.len()];
    let mut left = count;
    // The first volume may be begun in its middle, and is come back to.
    for _ in 0..=sizes.len() {
        let (volume, mut from) = *next;
        let Some(size) = sizes.get(volume) else {
            *next = (0, 0);
            continue;
        };
        while left > 0 && from < *size {
            let Some(block) = next_of(volume, from as u32).filter(|block| u64::from(*block) < *size) else { break };
            if !taken[volume].insert(block) {
                return taken;
            }
            (left, from) = (left - 1, u64::from(block) + 1);
        }
        *next = (volume, from);
        if left == 0 {
            break;
        }
        *next = (volume + 1, 0);
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_protocol::record::Volume;
    use cdp_protocol::seal::DataKey;
    use cdp_protocol::units::{BLOCK_BYTES, GroupId, VolumeSlot};
    use cdp_seams::random::SimRandom;
    use cdp_seams::storage::Storage;
    use cdp_seams::storage::sim::SimStorage;
    use std::path::Path;
    use std::sync::Arc;

    #[test]
    fn the_round_comes_by_every_block_and_begins_again() {
        let (mut next, sizes) = ((0, 0), [5, 0, 3]);
        let mut seen = Vec::new();
        for _ in 0..5 {
            let taken = take(&mut next, &sizes, 3, |_, from| Some(from));
            seen.push(taken.iter().map(|blocks| blocks.iter().collect::<Vec<_>>()).collect::<Vec<_>>());
        }
        assert_eq!(seen[0], [vec![0, 1, 2], vec![], vec![]]);
        assert_eq!(seen[1], [vec![3, 4], vec![], vec![0]]);
        let all: Vec<u32> = seen.iter().flat_map(|taken| taken[0].clone()).collect();
        assert!((0..5).all(|block| all.iter().filter(|seen| **seen == block).count() >= 1), "{seen:?}");
    }

    #[test]
    fn unknown_blocks_are_gone_through_from_where_it_stands_and_each_once() {
        let unknown = RoaringBitmap::from_iter([2, 3, 9]);
        let next_of = |_: usize, from: u32| unknown.range(from..).next();
        let (mut next, sizes) = ((0, 3), [10]);
        assert_eq!(take(&mut next, &sizes, 8, next_of)[0].iter().collect::<Vec<_>>(), [3, 9]);
        assert_eq!(take(&mut next, &sizes, 8, next_of)[0].iter().collect::<Vec<_>>(), [2, 3, 9]);
        assert!(take(&mut next, &sizes, 8, |_, _| None)[0].is_empty());
    }

    /// A block that cannot be read stays unknown for ever: the round goes on all the same, and it is not read after each cut.
    #[test]
    fn what_stays_unknown_does_not_keep_the_round_from_going_on() {
        let storage: Arc<dyn Storage> = Arc::new(SimStorage::new(1));
        let volume = Volume { slot: VolumeSlot(0), size_bytes: 200 * BLOCK_BYTES as u64, name: "data".into() };
        let key = DataKey::new([5; 32]).digest_key();
        let folder = Path::new("/digests");
        let digests = Digests::open(storage, folder, GroupId([7; 16]), key, &[volume], &SimRandom::new(1));
        let (mut audit, round) = (Audit::default(), Duration::from_secs(200));
        let mut read = |at: u64| {
            let requests = audit.requests(&digests, &[RoaringBitmap::new()], round, Duration::from_secs(at));
            requests.iter().map(|request| u64::from(request.extent.count)).sum::<u64>()
        };
        assert_eq!(read(0), 200, "all of it is unknown, and stays so");
        assert_eq!(read(1), 0);
        assert_eq!(read(59), 0);
        assert_eq!(read(60), 200, "it is tried again");
        assert_eq!(read(64), 64, "and the round goes on");
    }

    #[test]
    fn what_was_touched_after_its_read_does_not_count() {
        let mut audit = Audit::default();
        let look = |block| Look { volume: 1, block: Block(block), found: Found::Hole };
        for block in 1..=3 {
            audit.looked(look(block));
        }
        let touched = [RoaringBitmap::from_iter([1]), RoaringBitmap::from_iter([2])];
        assert_eq!(audit.flipped(&touched), [look(1), look(3)]);
        assert!(audit.flipped(&touched).is_empty());
    }
}
