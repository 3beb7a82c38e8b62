//! The optimistic cut: the content of all changed blocks as of one instant τ, without freezing anything.
//!
//! What a capture holds: every write completed before τ, any part of the writes in flight at τ, none issued after τ. A
//! round flips the tracker (a new τ), reads what was marked before it, and asks for each block when its read has
//! returned whether a write may have been issued since: if not, the block stands for τ, whatever is written later. What
//! failed is read again in the next round, under a later τ; a block that stood and is not marked since is unchanged up to it.
//!
//! Invariant: at every way out, `carry` holds every block that the tracker gave and no capture vouches for. Does not
//! decide when to cut, nor what becomes of the capture. What is too much for one capture is read in parts (`part`).

mod part;

pub use part::{HeldInstant, Part, read_part, take_instant};

use crate::capture::{Capture, CapturedVolume};
use crate::exclusion::{NothingExcluded, Skipping};
use crate::reader::{self, BlockReader, READ_BLOCKS_MAX, ReadRequest};
use crate::tracker::{Tracker, TrackerError};
use cdp_protocol::units::{Block, Extent, Timestamp, blocks_in};
use cdp_seams::clock::Clock;
use roaring::RoaringBitmap;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::io;
use std::time::Duration;

/// A set of blocks of each volume.
type Blocks = Vec<RoaringBitmap>;

/// How far a cut goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CutLimits {
    /// How long blocks that failed are read again: from the end of the first round, which takes as long as reading all
    /// changed blocks takes, to the start of the last. 250 ms at an interval of a second.
    pub bound: Duration,
    /// Blocks that may be held in memory. Known holes are not counted: they are not read, and take a bit each.
    pub blocks_max: u64,
}

impl CutLimits {
    /// No cut tries for longer: a minute.
    pub const BOUND_MAX: Duration = Duration::from_secs(60);

    /// The usual time bound for an interval between points: a quarter of it, never below 100 ms and never above `BOUND_MAX`. (At a
    /// short interval a cut that takes longer than the interval delays the next one; one that gives up makes no point at all.)
    #[must_use]
    pub fn default_bound(interval: Duration) -> Duration {
        (interval / 4).clamp(Duration::from_millis(100), Self::BOUND_MAX)
    }
}

/// What became of a cut.
#[derive(Debug)]
pub enum Cut {
    /// The changed blocks, all as of one instant.
    Captured(Capture),
    /// Nothing has changed since the cut before.
    Unchanged {
        /// Up to when, by the source's clock.
        as_of: Timestamp,
    },
    /// More blocks than may be held: send parts (`read_part`) until `carry` fits.
    TooLarge,
    /// No instant could be vouched for within the bound. Try again.
    NotValidated,
}

/// Why no cut can be had until something is done about it.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// The tracker cannot go on.
    #[error("track changed blocks")]
    Tracker(#[from] TrackerError),
    /// The reader cannot go on, or the device fails in a way that is not one block's.
    #[error("read changed blocks")]
    Read(#[source] io::Error),
}

/// Cuts all volumes at one instant.
///
/// `carry` is what the cut has to hold besides what the tracker gives, a set of blocks for each volume: failed cuts,
/// recovered, fenced epochs. After `Captured` its sets are empty; after anything else, an error too, they hold all that is
/// still to be captured. What was marked after a held instant is in the capture's `later`.
///
/// # Errors
/// Where a volume is not what it was, or tracker or reader cannot go on. Nothing is lost; `carry` has it.
pub fn cut(
    tracker: &mut dyn Tracker,
    reader: &mut dyn BlockReader,
    clock: &dyn Clock,
    carry: &mut Blocks,
    limits: &CutLimits,
) -> Result<Cut, CutError> {
    let (mut exclusion, mut skipped) = (NothingExcluded, Blocks::new());
    cut_skipping(tracker, reader, clock, carry, limits, Skipping::new(&mut exclusion, &mut skipped), None)
}

/// The same, and leaves out what `skipping` says. Its blocks are not read, and no write to them fails the cut. Where parts were read for
/// an instant that is `held`, the rest of `carry` is read for it too, and only if that fails for a later one.
///
/// # Errors
/// As `cut`.
pub fn cut_skipping<'a>(
    tracker: &'a mut dyn Tracker,
    reader: &mut dyn BlockReader,
    clock: &dyn Clock,
    carry: &mut Blocks,
    limits: &CutLimits,
    skipping: Skipping<'a>,
    held: Option<HeldInstant>,
) -> Result<Cut, CutError> {
    let mut unseen = held.as_ref().map(HeldInstant::unseen);
    let mut round = Round::new(tracker, skipping, carry);
    let mut started = clock.monotonic();
    match held {
        Some(held) => (round.cut_time, started) = held.resume(&mut round.skipping),
        None => round.skipping.begin(carry),
    }
    round.clip(carry);
    if round.content_len(carry) > limits.blocks_max {
        // Without a flip, which may cost a pass over the volumes: parts go on from the same marks.
        return Ok(Cut::TooLarge);
    }
    if unseen.is_none() {
        let Some(marked) = round.flip(clock)? else { return Ok(Cut::NotValidated) };
        union(carry, &marked);
        if len(carry) == 0 && len(&round.skipping.end(carry)) == 0 {
            return Ok(Cut::Unchanged { as_of: round.cut_time });
        }
    }
    let mut capture = Capture::new(carry.len());
    let mut due = carry.clone();
    let mut heat = Heat::default();
    let mut deadline = None;
    loop {
        if round.content_len(carry) > limits.blocks_max {
            return Ok(Cut::TooLarge);
        }
        capture.meters.cut_rounds += 1;
        let mut failed = round.read(reader, &due, &heat, &mut capture)?;
        if len(&failed) == 0 && round.tracker.settle()? {
            failed = round.skipping.end(carry);
            if len(&failed) == 0 {
                break;
            }
        }
        let now = clock.monotonic();
        if now >= *deadline.get_or_insert(now + limits.bound) {
            return Ok(Cut::NotValidated);
        }
        let Some(marked) = round.flip(clock)? else { return Ok(Cut::NotValidated) };
        unseen = None;
        union(carry, &marked);
        due = marked;
        union(&mut due, &failed);
        heat.add(&due);
    }
    // Minutes may have passed since τ, and whether all writes were seen is told by a flip alone.
    let later = match unseen {
        Some(unseen) => {
            let Some(later) = round.flip_again()? else { return Ok(Cut::NotValidated) };
            if round.tracker.report().trust.unseen() != unseen {
                union(carry, &later);
                return Ok(Cut::NotValidated);
            }
            later
        }
        None => Blocks::new(),
    };
    capture.cut_time = round.cut_time;
    capture.meters.cut_us = clock.monotonic().saturating_sub(started).as_micros() as u64;
    capture.count();
    assert!(capture.volumes.iter().map(CapturedVolume::blocks).eq(carry.iter()), "what was given is what was read");
    for (volume, carry) in carry.iter_mut().enumerate() {
        round.skipping.captured(volume, carry);
        carry.clear();
    }
    capture.later = later;
    Ok(Cut::Captured(capture))
}

/// What the rounds of one cut share.
struct Round<'a> {
    tracker: &'a mut dyn Tracker,
    skipping: Skipping<'a>,
    /// Blocks of each volume.
    sizes: Vec<u64>,
    /// Taken just before the last flip: every write that had completed by then is in.
    cut_time: Timestamp,
}

impl<'a> Round<'a> {
    fn new(tracker: &'a mut dyn Tracker, skipping: Skipping<'a>, carry: &mut Blocks) -> Self {
        let sizes: Vec<u64> = tracker.volumes().iter().map(|volume| blocks_in(volume.size_bytes)).collect();
        carry.resize_with(sizes.len(), RoaringBitmap::new);
        Self { tracker, skipping, sizes, cut_time: Timestamp(0) }
    }

    /// A new τ; `None` where it cannot be vouched for. The tracker keeps what it drained then.
    fn flip(&mut self, clock: &dyn Clock) -> Result<Option<Blocks>, CutError> {
        self.cut_time = Timestamp(clock.wall_ms());
        let flipped = self.tracker.flip();
        self.marked(flipped)
    }

    /// What was marked since τ; `None` where it cannot be had now.
    fn flip_again(&mut self) -> Result<Option<Blocks>, CutError> {
        let flipped = self.tracker.flip_again();
        self.marked(flipped)
    }

    fn marked(&self, flipped: Result<Blocks, TrackerError>) -> Result<Option<Blocks>, CutError> {
        match flipped {
            Ok(mut marked) => {
                self.clip(&mut marked);
                self.skipping.pass_over(&mut marked);
                Ok(Some(marked))
            }
            Err(error @ (TrackerError::Stragglers(_) | TrackerError::InDoubt(_))) => {
                tracing::debug!(%error, "no cut");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Takes out what lies beyond a volume's end.
    fn clip(&self, blocks: &mut Blocks) {
        for (blocks, size) in blocks.iter_mut().zip(&self.sizes) {
            if let Ok(first_beyond) = u32::try_from(*size) {
                blocks.remove_range(first_beyond..);
            }
        }
    }

    /// Blocks that have to be read, as far as is known now.
    fn content_len(&self, blocks: &[RoaringBitmap]) -> u64 {
        let content = |(volume, blocks): (usize, &RoaringBitmap)| {
            let read = blocks - self.skipping.of(volume, blocks);
            read.len() - self.tracker.holes(volume, &read).len()
        };
        blocks.iter().enumerate().map(content).sum()
    }

    /// Takes `due` into the capture, holes first, the hottest of the others next, and gives the blocks that failed: a
    /// write to them may have been issued after τ.
    fn read(
        &mut self,
        reader: &mut dyn BlockReader,
        due: &[RoaringBitmap],
        heat: &Heat,
        capture: &mut Capture,
    ) -> Result<Blocks, CutError> {
        let mut failed = vec![RoaringBitmap::new(); self.sizes.len()];
        let mut content = due.to_vec();
        for (volume, blocks) in content.iter_mut().enumerate() {
            let skipped = self.skipping.of(volume, blocks);
            *blocks -= &skipped;
            // Nobody asks what they hold, so no write to them matters.
            skipped.iter().for_each(|block| capture.volumes[volume].put_zero(Block(block)));
            let holes = self.tracker.holes(volume, blocks);
            *blocks -= &holes;
            for block in &holes {
                capture.volumes[volume].put_zero(Block(block));
                if self.tracker.is_conflicted(volume, Block(block)) {
                    failed[volume].insert(block);
                }
            }
        }
        read_into(reader, &heat.requests(&content), capture, &mut |volume, block| {
            if self.tracker.is_conflicted(volume, block) {
                failed[volume].insert(block.0);
            }
        })?;
        Ok(failed)
    }
}

/// How often each block had to be read again. Hot blocks are read first: the sooner after the flip, the better their chance.
#[derive(Default)]
struct Heat(HashMap<(usize, u32), u32>);

impl Heat {
    fn add(&mut self, due: &[RoaringBitmap]) {
        for (volume, blocks) in due.iter().enumerate() {
            for block in blocks {
                *self.0.entry((volume, block)).or_default() += 1;
            }
        }
    }

    /// The requests for `due`, hottest first.
    fn requests(&self, due: &[RoaringBitmap]) -> Vec<ReadRequest> {
        if self.0.is_empty() {
            return due.iter().enumerate().flat_map(|(volume, blocks)| reader::requests_of(volume, blocks)).collect();
        }
        let each = due.iter().enumerate().flat_map(|(volume, blocks)| blocks.iter().map(move |block| (volume, block)));
        let mut blocks: Vec<_> =
            each.map(|key| (Reverse(self.0.get(&key).copied().unwrap_or(0)), key.0, key.1)).collect();
        blocks.sort_unstable();
        blocks
            .chunk_by(|a, b| a.0 == b.0 && a.1 == b.1)
            .flat_map(|alike| {
                let extents = reader::runs(alike.iter().map(|entry| entry.2), READ_BLOCKS_MAX);
                let volume = alike[0].1;
                extents.into_iter().map(move |extent: Extent| ReadRequest { volume, extent })
            })
            .collect()
    }
}

/// Reads into the capture; `returned` is called for each block when its read has returned.
fn read_into(
    reader: &mut dyn BlockReader,
    requests: &[ReadRequest],
    capture: &mut Capture,
    returned: &mut dyn FnMut(usize, Block),
) -> Result<(), CutError> {
    let mut failure = None;
    reader::read_blocks(reader, requests, &mut |volume, block, result| {
        returned(volume, block);
        match result {
            Ok(bytes) => capture.volumes[volume].put(block, bytes),
            Err(error) if reader::is_medium_error(&error) => capture.volumes[volume].put_unreadable(block),
            Err(error) => failure = Some(error),
        }
    })
    .map_err(CutError::Read)?;
    failure.map_or(Ok(()), |error| Err(CutError::Read(error)))
}

fn union(blocks: &mut [RoaringBitmap], more: &[RoaringBitmap]) {
    for (blocks, more) in blocks.iter_mut().zip(more) {
        *blocks |= more;
    }
}

fn len(blocks: &[RoaringBitmap]) -> u64 {
    blocks.iter().map(RoaringBitmap::len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::BlockContent;
    use crate::sim::{Driver, Profile, Sabotage};
    use cdp_protocol::units::VolumeSlot;
    use rustix::io::Errno;
    use std::sync::Arc;

    const LIMITS: CutLimits = CutLimits { bound: Duration::from_secs(1), blocks_max: 1000 };

    /// A source whose first point is made, and then some writes, all of them completed.
    fn written() -> Driver {
        let mut driver = Driver::new(3, Profile::default(), Sabotage::None);
        driver.cut(&LIMITS).expect("a point");
        driver.world.run(3000);
        driver.world.set_quiet(true);
        driver.world.run(3000);
        driver
    }

    fn attempt(driver: &mut Driver, limits: &CutLimits) -> Result<Cut, CutError> {
        let clock = Arc::clone(&driver.world.clock);
        cut(&mut driver.tracker, &mut driver.reader, clock.as_ref(), &mut driver.carry, limits)
    }

    /// After whatever went wrong, the next cut has all of it.
    fn nothing_is_lost(mut driver: Driver) {
        driver.finish().expect("the next point is what is on the media");
        assert!(driver.carry.iter().all(RoaringBitmap::is_empty));
    }

    #[test]
    fn a_quiet_volume_is_unchanged_as_of_the_flip() {
        let mut driver = written();
        driver.cut(&LIMITS).expect("a point");
        driver.world.run(1000);
        let now = driver.world.clock.wall_ms();
        assert!(
            matches!(attempt(&mut driver, &LIMITS), Ok(Cut::Unchanged { as_of }) if (now..now + 2).contains(&as_of.0))
        );
    }

    #[test]
    fn what_a_cut_carries_is_captured_even_if_nothing_was_marked() {
        let mut driver = written();
        driver.cut(&LIMITS).expect("a point");
        driver.carry = vec![RoaringBitmap::from([7]), RoaringBitmap::from([1, 900])];
        let Ok(Cut::Captured(capture)) = attempt(&mut driver, &LIMITS) else { panic!("not captured") };
        assert_eq!(capture.volumes[0].blocks(), &RoaringBitmap::from([7]));
        assert_eq!(capture.volumes[1].blocks(), &RoaringBitmap::from([1]), "block 900 lies beyond the volume's end");
        assert_eq!((capture.meters.dirty_blocks, capture.meters.cut_rounds), (2, 1));
    }

    #[test]
    fn too_many_blocks_are_all_given_back() {
        let mut driver = written();
        let outcome = attempt(&mut driver, &CutLimits { blocks_max: 3, ..LIMITS });
        assert!(matches!(outcome, Ok(Cut::TooLarge)));
        let carried = len(&driver.carry);
        assert!(carried > 3);
        let skipping = Skipping::new(&mut *driver.exclusion, &mut driver.skipped);
        let part =
            read_part(&driver.tracker, &mut driver.reader, &mut driver.carry, 3, skipping, None).expect("a part");
        let part = part.capture;
        let lowest: Vec<u32> = driver.carry[0].iter().take(3).collect();
        assert_eq!(part.volumes[0].blocks().iter().collect::<Vec<_>>(), lowest);
        assert_eq!((part.volumes[1].blocks().len(), part.cut_time), (0, Timestamp(0)));
        assert_eq!(len(&driver.carry), carried, "a part removes nothing");
        driver.tracker.failure = Some(TrackerError::Stragglers("flipped".into()));
        let outcome = attempt(&mut driver, &CutLimits { blocks_max: 3, ..LIMITS });
        assert!(matches!(outcome, Ok(Cut::TooLarge)), "what is carried alone is too large: no flip");
        driver.tracker.failure = None;
        nothing_is_lost(driver);
    }

    #[test]
    fn an_instant_does_not_stand_where_something_went_unseen_after_it() {
        for recaptured_blocks in [0, 1] {
            let mut driver = written();
            let clock = Arc::clone(&driver.world.clock);
            let skipping = Skipping::new(&mut *driver.exclusion, &mut driver.skipped);
            let held = take_instant(&mut driver.tracker, clock.as_ref(), &mut driver.carry, skipping);
            let held = held.expect("a flip").expect("no straggler");
            driver.tracker.recaptured_blocks = recaptured_blocks;
            let skipping = Skipping::new(&mut *driver.exclusion, &mut driver.skipped);
            let (tracker, reader, carry) = (&mut driver.tracker, &mut driver.reader, &mut driver.carry);
            let outcome = cut_skipping(tracker, reader, clock.as_ref(), carry, &LIMITS, skipping, Some(held));
            let stands = recaptured_blocks == 0;
            assert_eq!(matches!(outcome, Ok(Cut::Captured(_))), stands, "{outcome:?}");
            assert_eq!(matches!(outcome, Ok(Cut::NotValidated)) && len(&driver.carry) > 0, !stands);
        }
    }

    #[test]
    fn a_straggler_makes_no_point_and_loses_nothing() {
        let mut driver = written();
        driver.tracker.failure = Some(TrackerError::Stragglers("held up".into()));
        assert!(matches!(attempt(&mut driver, &LIMITS), Ok(Cut::NotValidated)));
        nothing_is_lost(driver);
    }

    #[test]
    fn a_changed_volume_is_an_error_and_loses_nothing() {
        let mut driver = written();
        driver.tracker.failure = Some(TrackerError::VolumeChanged { slot: VolumeSlot(0), reason: "it shrank".into() });
        let error = attempt(&mut driver, &LIMITS).expect_err("refused");
        assert!(matches!(error, CutError::Tracker(TrackerError::VolumeChanged { .. })));
        nothing_is_lost(driver);
    }

    #[test]
    fn a_device_that_is_gone_is_an_error_and_its_blocks_are_not_unreadable() {
        let mut driver = written();
        driver.reader.failure = Some(Errno::NXIO);
        assert!(matches!(attempt(&mut driver, &LIMITS), Err(CutError::Read(_))));
        assert!(len(&driver.carry) > 0, "what the flip gave is carried");
        nothing_is_lost(driver);
    }

    #[test]
    fn a_block_that_cannot_be_read_is_unreadable_and_its_neighbours_are_read() {
        let mut driver = written();
        driver.world.scratch(0, Block(9));
        driver.carry = vec![(0..20).collect(), RoaringBitmap::new()];
        let Ok(Cut::Captured(capture)) = attempt(&mut driver, &LIMITS) else { panic!("not captured") };
        assert_eq!(capture.volumes[0].block(Block(9)), BlockContent::Unreadable);
        assert_eq!(capture.unreadable(), [RoaringBitmap::from([9]), RoaringBitmap::new()]);
        assert_eq!(
            (capture.meters.unreadable_blocks, capture.meters.dirty_blocks),
            (1, capture.volumes.iter().map(|volume| volume.blocks().len()).sum())
        );
    }

    #[test]
    fn the_hottest_blocks_are_read_first() {
        let mut heat = Heat::default();
        heat.add(&[RoaringBitmap::from([1, 2, 8]), RoaringBitmap::from([5])]);
        heat.add(&[RoaringBitmap::from([8]), RoaringBitmap::from([5])]);
        let due = [RoaringBitmap::from([0, 1, 2, 3, 8]), RoaringBitmap::from([5, 6])];
        let order: Vec<(usize, u32, u32)> = heat
            .requests(&due)
            .iter()
            .map(|request| (request.volume, request.extent.start.0, request.extent.count))
            .collect();
        assert_eq!(order, [(0, 8, 1), (1, 5, 1), (0, 1, 2), (0, 0, 1), (0, 3, 1), (1, 6, 1)]);
    }
}
