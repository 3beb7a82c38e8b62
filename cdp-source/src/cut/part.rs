//! Parts: what is too much for one capture, read a piece at a time while writes go on.
//!
//! A part is of no instant by itself. Parts that are read one after another for a *held* instant τ are of τ together, if no read of theirs met a
//! write issued after it: then the cut that takes them in needs no other instant, however much was written to other blocks
//! meanwhile. So a copy that is faster than parts can be read becomes points all the same. Blocks that lie alone are read first: a file system
//! rewrites those soon, and seldom what is a piece of a long run.
//!
//! Whether all writes were seen is asked of the kernel's counters once more after the last read.
//!
//! Invariant: a read that met such a write ends the instant, and nothing else: the block is marked, and comes with a later flip.

use super::{Blocks, CutError, Round, len, read_into, union};
use crate::capture::Capture;
use crate::exclusion::Skipping;
use crate::reader::{self, BlockReader, READ_BLOCKS_MAX, ReadRequest};
use crate::tracker::Tracker;
use cdp_protocol::units::{Block, Timestamp};
use cdp_seams::clock::Clock;
use roaring::RoaringBitmap;
use std::time::Duration;

/// Blocks that a part looks at a time, 64 MiB, and how often at most: where all is holes a part takes 4 GiB of them.
const WINDOW_BLOCKS: usize = 1 << 14;
const PART_WINDOWS_MAX: usize = 64;
/// Blocks of a run from which on it is long: 256 KiB.
const LONG_RUN_BLOCKS: u32 = 64;
/// So long parts are read for one instant.
const HELD_MAX: Duration = Duration::from_secs(60);
/// Blocks that are read before all others at most: 128 MiB.
const FIRST_BLOCKS_MAX: u64 = 1 << 15;

/// An instant that stands so far: for every block that was read since the flip, and for whatever is still to be read.
#[derive(Debug)]
pub struct HeldInstant {
    cut_time: Timestamp,
    started: Duration,
    /// What the tracker may not have seen up to the flip.
    unseen: [u64; 4],
    /// Excluded since before the flip, as far as is known.
    within: Blocks,
    /// Still to be read before all others.
    first: Blocks,
}

/// What was read of what is too much for one capture.
#[derive(Debug)]
pub struct Part {
    /// Its content; of no instant by itself.
    pub capture: Capture,
    /// Whether a write to one of its blocks may have been issued after the flip: an instant that was held stands no more.
    pub is_conflicted: bool,
}

impl HeldInstant {
    /// Counts of what the tracker may not have seen: where others are told after the last read, it does not stand.
    pub(super) const fn unseen(&self) -> [u64; 4] {
        self.unseen
    }

    /// Whether it is too old to be gone on with: what is excluded has to have been so all the time.
    #[must_use]
    pub fn is_stale(&self, now: Duration) -> bool {
        now >= self.started + HELD_MAX
    }

    /// Goes on with what was excluded; gives the instant, and when its cut began.
    pub(super) fn resume(self, skipping: &mut Skipping<'_>) -> (Timestamp, Duration) {
        skipping.resume(self.within);
        (self.cut_time, self.started)
    }
}

/// Flips the tracker: a new instant to read parts for, what was marked before it in `carry`. `None` where it cannot be vouched for.
///
/// # Errors
/// As `cut`.
pub fn take_instant<'a>(
    tracker: &'a mut dyn Tracker,
    clock: &dyn Clock,
    carry: &mut Blocks,
    skipping: Skipping<'a>,
) -> Result<Option<HeldInstant>, CutError> {
    let mut round = Round::new(tracker, skipping, carry);
    let started = clock.monotonic();
    round.skipping.begin(carry);
    let Some(marked) = round.flip(clock)? else { return Ok(None) };
    union(carry, &marked);
    round.clip(carry);
    let first = read_first(carry);
    let (cut_time, unseen) = (round.cut_time, round.tracker.report().trust.unseen());
    Ok(Some(HeldInstant { cut_time, started, unseen, within: round.skipping.into_within(), first }))
}

/// The blocks that are no piece of a long run, as many as are worth it.
fn read_first(carry: &[RoaringBitmap]) -> Blocks {
    let mut left = FIRST_BLOCKS_MAX;
    let mut short_runs = |blocks: &RoaringBitmap| {
        let (mut first, mut runs) = (RoaringBitmap::new(), blocks.iter());
        while let Some(run) = runs.next_range().filter(|_| left > 0) {
            if run.end() - run.start() < LONG_RUN_BLOCKS - 1 {
                left = left.saturating_sub(first.insert_range(run));
            }
        }
        first
    };
    carry.iter().map(&mut short_runs).collect()
}

/// Reads up to `blocks_max` blocks of `carry`, the lowest, and takes the known holes among and around them, without validation: a
/// part, of no instant. Removes nothing from `carry`, and looks at no more of it than a part may hold: a volume has thousands. Whatever is being written meanwhile is marked when it completes, and so comes
/// with a later flip; and whether what is skipped here was rightly skipped is for the cut to say that takes the part in.
///
/// Where an instant is held, what it has to read before all others goes first, and only what was excluded since before it is skipped.
///
/// # Errors
/// Where the reader cannot go on.
pub fn read_part(
    tracker: &dyn Tracker,
    reader: &mut dyn BlockReader,
    carry: &mut Blocks,
    blocks_max: u64,
    mut skipping: Skipping<'_>,
    held: Option<&mut HeldInstant>,
) -> Result<Part, CutError> {
    let mut none = Blocks::new();
    let first = if let Some(held) = held {
        skipping.resume(held.within.clone());
        &mut held.first
    } else {
        skipping.begin(carry);
        &mut none
    };
    let from: &[RoaringBitmap] = if len(first) > 0 { first } else { carry };
    let mut capture = Capture::new(carry.len());
    let mut is_conflicted = false;
    let mut left = blocks_max;
    let mut requests = Vec::new();
    let windows =
        from.iter().enumerate().flat_map(|(volume, blocks)| windows_of(blocks).map(move |window| (volume, window)));
    for (volume, window) in windows.take(PART_WINDOWS_MAX) {
        if left == 0 {
            break;
        }
        let skipped = skipping.of(volume, &window);
        let holes = tracker.holes(volume, &(&window - &skipped));
        is_conflicted |= holes.iter().any(|block| tracker.is_conflicted(volume, Block(block)));
        let holes = holes | skipped;
        holes.iter().for_each(|block| capture.volumes[volume].put_zero(Block(block)));
        let content = window - holes;
        let lowest = content.iter().take(usize::try_from(left).unwrap_or(usize::MAX));
        let extents = reader::runs(lowest, READ_BLOCKS_MAX);
        left -= extents.iter().map(|extent| u64::from(extent.count)).sum::<u64>();
        requests.extend(extents.into_iter().map(|extent| ReadRequest { volume, extent }));
    }
    read_into(reader, &requests, &mut capture, &mut |volume, block| {
        is_conflicted |= tracker.is_conflicted(volume, block);
    })?;
    for (at, volume) in capture.volumes.iter().enumerate() {
        skipping.captured(at, volume.blocks());
    }
    for (first, volume) in first.iter_mut().zip(&capture.volumes) {
        *first -= volume.blocks();
    }
    capture.count();
    Ok(Part { capture, is_conflicted })
}

/// `blocks` in windows of `WINDOW_BLOCKS`, lowest first.
fn windows_of(blocks: &RoaringBitmap) -> impl Iterator<Item = RoaringBitmap> + '_ {
    let mut from = Some(0);
    std::iter::from_fn(move || {
        let window: RoaringBitmap = blocks.range(from?..).take(WINDOW_BLOCKS).collect();
        let last = window.max()?;
        from = last.checked_add(1);
        Some(window)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_all_of_a_set_in_order_and_bounded() {
        let all: RoaringBitmap = (5..40_000).chain([70_000, u32::MAX - 1, u32::MAX]).collect();
        let windows: Vec<RoaringBitmap> = windows_of(&all).collect();
        assert_eq!(windows.iter().map(RoaringBitmap::len).collect::<Vec<_>>(), [16_384, 16_384, 7_230]);
        assert!(windows.is_sorted_by(|a, b| a.max() < b.min()));
        assert_eq!(windows.iter().fold(RoaringBitmap::new(), |union, window| union | window), all);
    }

    #[test]
    fn what_lies_alone_is_read_first() {
        let long: RoaringBitmap = (1000..1064).collect();
        let short: RoaringBitmap = (5..60).chain([70_000, u32::MAX]).collect();
        assert_eq!(read_first(&[&long | &short, long]), [short, RoaringBitmap::new()]);
        let all_alone: RoaringBitmap = (0..200_000).step_by(2).collect();
        assert_eq!(
            read_first(&[all_alone.clone(), all_alone]).iter().map(RoaringBitmap::len).sum::<u64>(),
            FIRST_BLOCKS_MAX
        );
    }
}
