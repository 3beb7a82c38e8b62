//! Cuts a simulated world again and again, keeps the image a target would, and holds it against the oracle.

use super::{Blocks, Image, Profile, Sabotage, SimReader, SimTracker, World, sectors_of};
use crate::capture::{BlockContent, Capture};
use crate::cut::{Cut, CutError, CutLimits, HeldInstant, Part, cut_skipping, read_part, take_instant};
use crate::exclusion::{Exclusion, NothingExcluded, Skipping};
use crate::tracker::Tracker;
use cdp_protocol::units::BLOCK_SECTORS;
use std::sync::Arc;
use std::time::Duration;

/// A source and the image it has made at a target.
pub struct Driver {
    /// The volumes and their writers.
    pub world: Arc<World>,
    /// Tracks them.
    pub tracker: SimTracker,
    /// Reads them.
    pub reader: SimReader,
    /// What the next cut carries.
    pub carry: Blocks,
    /// What the cuts leave out; nothing by default.
    pub exclusion: Box<dyn Exclusion>,
    /// What stands as holes in the image because of that.
    pub skipped: Blocks,
    /// What all captures together amount to.
    pub image: Image,
    /// What became of the cuts.
    pub tally: Tally,
    /// What parts are read for.
    held: Option<HeldInstant>,
    sabotage: Sabotage,
}

/// What became of the cuts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Cuts that made a point.
    pub captured: u32,
    /// Cuts that found nothing changed.
    pub unchanged: u32,
    /// Cuts with too many blocks.
    pub too_large: u32,
    /// Cuts that made a point of the instant that parts were read for.
    pub of_parts: u32,
    /// Cuts that were not validated.
    pub not_validated: u32,
    /// Most rounds of a cut that made a point.
    pub rounds_max: u32,
}

impl Driver {
    /// A source that has captured nothing yet.
    #[must_use]
    pub fn new(seed: u64, profile: Profile, sabotage: Sabotage) -> Self {
        let world = World::new(seed, profile, sabotage);
        let mut tracker = SimTracker::new(&world);
        let carry = tracker.take_recovered();
        // Whatever was there before the first capture must not be taken for it.
        let image = world.media().iter().map(|volume| vec![u64::MAX; volume.len()]).collect();
        let reader = SimReader::new(&world);
        let (exclusion, skipped, tally) = (Box::new(NothingExcluded), Blocks::new(), Tally::default());
        Self { world, tracker, reader, carry, exclusion, skipped, image, tally, held: None, sabotage }
    }

    /// One cut; what it captured goes to the image, which then has to be a state of the instant.
    ///
    /// # Errors
    /// What the oracle objects to.
    pub fn cut(&mut self, limits: &CutLimits) -> Result<(), String> {
        let clock = Arc::clone(&self.world.clock);
        let skipping = Skipping::new(&mut *self.exclusion, &mut self.skipped);
        let (tracker, reader) = (&mut self.tracker, &mut self.reader);
        let held = self.held.take();
        let is_held = held.is_some();
        let outcome = cut_skipping(tracker, reader, clock.as_ref(), &mut self.carry, limits, skipping, held);
        match outcome.map_err(|error: CutError| error.to_string())? {
            Cut::Captured(capture) => {
                self.apply(&capture);
                self.carry.iter_mut().zip(&capture.later).for_each(|(carry, later)| *carry |= later);
                self.tally.captured += 1;
                self.tally.of_parts += u32::from(is_held && capture.meters.cut_rounds == 1);
                self.tally.rounds_max = self.tally.rounds_max.max(capture.meters.cut_rounds);
                self.explain()
            }
            Cut::Unchanged { .. } => {
                self.tally.unchanged += 1;
                self.explain()
            }
            Cut::TooLarge => {
                self.tally.too_large += 1;
                self.part(limits.blocks_max)?;
                while self.held.is_some() && self.carry.iter().any(|blocks| !blocks.is_empty()) {
                    self.part(limits.blocks_max)?;
                }
                Ok(())
            }
            Cut::NotValidated => {
                self.tally.not_validated += 1;
                if self.sabotage == Sabotage::ForgetCarry {
                    self.carry.clear();
                }
                Ok(())
            }
        }
    }

    /// Sends a part, mostly for an instant that is held, and, as after its ack, carries its blocks no longer.
    ///
    /// # Errors
    /// Where the reader cannot go on.
    pub fn part(&mut self, blocks_max: u64) -> Result<(), String> {
        let failed = |error: CutError| error.to_string();
        if self.held.is_none() && self.world.random.below(4) > 0 {
            let skipping = Skipping::new(&mut *self.exclusion, &mut self.skipped);
            let clock = Arc::clone(&self.world.clock);
            self.held = take_instant(&mut self.tracker, clock.as_ref(), &mut self.carry, skipping).map_err(failed)?;
        }
        let skipping = Skipping::new(&mut *self.exclusion, &mut self.skipped);
        let (tracker, reader, held) = (&self.tracker, &mut self.reader, self.held.as_mut());
        let part = read_part(tracker, reader, &mut self.carry, blocks_max, skipping, held).map_err(failed)?;
        let Part { capture: part, is_conflicted } = part;
        if is_conflicted {
            self.held = None;
        }
        self.apply(&part);
        for (carry, part) in self.carry.iter_mut().zip(&part.volumes) {
            *carry -= part.blocks();
        }
        Ok(())
    }

    /// Holds the image against the instant: what was skipped is zeros, all else what a power cut could have left.
    fn explain(&self) -> Result<(), String> {
        let instant = self.tracker.instant();
        let mut image = self.image.clone();
        for (volume, skipped) in self.skipped.iter().enumerate() {
            for block in skipped {
                let first = (u64::from(block) * BLOCK_SECTORS) as usize;
                let sectors = first..image[volume].len().min(first + BLOCK_SECTORS as usize);
                if image[volume][sectors.clone()].iter().any(|held| *held != 0) {
                    return Err(format!("volume {volume} block {block} was skipped and is not zeros"));
                }
                image[volume][sectors.clone()].copy_from_slice(&instant.settled[volume][sectors]);
            }
        }
        instant.explain(&image)
    }

    /// Puts what was captured into the image.
    pub fn apply(&mut self, capture: &Capture) {
        for (image, volume) in self.image.iter_mut().zip(&capture.volumes) {
            for (block, content) in volume.iter() {
                let first = (u64::from(block.0) * BLOCK_SECTORS) as usize;
                let end = image.len().min(first + BLOCK_SECTORS as usize);
                match content {
                    BlockContent::Zero => image[first..end].fill(0),
                    BlockContent::Unreadable => image[first..end].fill(u64::MAX),
                    BlockContent::Bytes(bytes) => {
                        image[first..end].iter_mut().zip(sectors_of(bytes)).for_each(|(held, read)| *held = read);
                    }
                }
            }
        }
    }

    /// Many cuts at random times under limits that are sometimes tight; then the writers stop, and what is captured last
    /// has to be what is on the media.
    ///
    /// # Errors
    /// What the oracle objects to first.
    pub fn run(&mut self, cuts: u32) -> Result<Tally, String> {
        self.tracker.straggler_permille = 20;
        self.tracker.false_hit_permille = 2;
        for number in 0..cuts {
            self.world.run(self.world.random.below(400));
            let blocks_max = if self.world.random.below(8) == 0 { 20 } else { 1000 };
            let bound = Duration::from_millis(self.world.random.below(30));
            self.cut(&CutLimits { bound, blocks_max }).map_err(|error| format!("cut {number}: {error}"))?;
        }
        self.finish()?;
        Ok(self.tally)
    }

    /// Lets the writers stop and captures the rest.
    ///
    /// # Errors
    /// Where the image is not what is on the media then.
    pub fn finish(&mut self) -> Result<(), String> {
        self.world.set_quiet(true);
        self.world.run(10_000);
        // The last point is to be of now.
        self.held = None;
        (self.tracker.straggler_permille, self.tracker.false_hit_permille) = (0, 0);
        self.cut(&CutLimits { bound: Duration::from_secs(1), blocks_max: 1000 })?;
        if self.image == self.world.media() { Ok(()) } else { Err("the last point is not what is on the media".into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use cdp_seams::clock::Clock;
    use cdp_seams::random::SimRandom;

    /// Cuts with each seed.
    const CUTS: u32 = 100;

    /// Writers of every temper, from one write at a time to a storm.
    fn profile(seed: u64) -> Profile {
        let random = SimRandom::new(seed ^ 0x5eed);
        Profile {
            issue_permille: 10 + random.below(150),
            in_flight_max: 1 + random.below(20) as usize,
            write_sectors_max: 1 + random.below(40) as u32,
            hot_permille: random.below(1000),
            ..Profile::default()
        }
    }

    #[test]
    fn every_point_is_a_state_that_a_power_cut_could_have_left() {
        let mut total = Tally::default();
        for seed in 0..200 {
            let tally = Driver::new(seed, profile(seed), Sabotage::None).run(CUTS);
            let tally = tally.unwrap_or_else(|violation| panic!("seed {seed}: {violation}"));
            total.captured += tally.captured;
            total.unchanged += tally.unchanged;
            total.too_large += tally.too_large;
            total.of_parts += tally.of_parts;
            total.not_validated += tally.not_validated;
            total.rounds_max = total.rounds_max.max(tally.rounds_max);
        }
        println!("{total:?}");
        // The run means something only if it has seen all that can happen.
        assert!(total.captured > 10_000 && total.unchanged > 100 && total.rounds_max > 3, "{total:?}");
        assert!(total.too_large > 500 && total.not_validated > 500 && total.of_parts > 40, "{total:?}");
    }

    #[test]
    fn the_oracle_notices_whatever_is_left_out() {
        use Sabotage::{ForgetCarry, MarkAtCompletionOnly, MarkAtIssueOnly, SkipBarrier, SkipValidation};
        for sabotage in [SkipValidation, MarkAtIssueOnly, MarkAtCompletionOnly, ForgetCarry, SkipBarrier] {
            let is_caught = |seed: &u64| Driver::new(*seed, Profile::default(), sabotage).run(CUTS).is_err();
            let caught = (0..40).filter(is_caught).count();
            println!("{sabotage:?}: caught with {caught} of 40 seeds");
            assert!(caught > 20, "{sabotage:?} was caught with {caught} of 40 seeds");
        }
    }

    #[test]
    fn a_block_rewritten_flat_out_holds_no_cut_beyond_its_bound() {
        // Writes of one sector, all of them to the first 16, as fast as the device takes them.
        let profile = Profile {
            issue_permille: 500,
            in_flight_max: 4,
            write_sectors_max: 1,
            hot_permille: 1000,
            slow_permille: 0,
            ..Profile::default()
        };
        let mut tally = Tally::default();
        for seed in 0..20 {
            let mut driver = Driver::new(seed, profile.clone(), Sabotage::None);
            driver.cut(&CutLimits { bound: Duration::from_secs(1), blocks_max: 1000 }).expect("a state");
            driver.reader.step_permille = 300;
            let limits = CutLimits { bound: Duration::from_millis(5), blocks_max: 1000 };
            for _ in 0..20 {
                driver.world.run(200);
                let before = driver.world.clock.monotonic();
                driver.cut(&limits).expect("a state");
                let took = driver.world.clock.monotonic().saturating_sub(before);
                // Beyond the bound lie the first round and one that had begun: of four hot blocks, 2 ms at the very most.
                assert!(took < limits.bound + Duration::from_millis(4), "seed {seed}: {took:?}");
            }
            driver.finish().expect("all of it in the end");
            tally.captured += driver.tally.captured;
            tally.not_validated += driver.tally.not_validated;
        }
        println!("{tally:?}");
        assert!(tally.not_validated > 20 && tally.captured > 100, "hot enough to fail now and then: {tally:?}");
    }
}
