//! What a cut leaves out: blocks that hold nothing but excluded files stand as holes in its point, and are not read.
//!
//! Invariant: a block is skipped only if it was in the exclusion before the cut's first flip *and* after its last read; and what
//! stands as a hole only because it was skipped (`skipped`) is captured as soon as it is in the exclusion no more. A block is in the
//! set of the skipped as a dirty one is in `carry`: until a capture holds what is really there.
//! Does not know files: whoever resolves them is an `Exclusion` (`excludes`).

use crate::agent::status::ExcludeStatus;
use roaring::RoaringBitmap;

/// A set of blocks of each volume.
type Blocks = Vec<RoaringBitmap>;

/// Knows which blocks hold excluded files.
pub trait Exclusion: Send {
    /// The blocks of each volume that hold nothing but excluded files now.
    fn blocks(&mut self) -> Blocks;

    /// Whether it will know of more in a moment: what is captured before may be for nothing.
    fn is_pending(&self) -> bool {
        false
    }

    /// What was excluded when that was asked last, and what was not and why.
    fn report(&self) -> Vec<ExcludeStatus> {
        Vec::new()
    }
}

/// Nothing is left out.
pub struct NothingExcluded;

impl Exclusion for NothingExcluded {
    fn blocks(&mut self) -> Blocks {
        Blocks::new()
    }
}

/// What one cut, or one part, leaves out.
pub struct Skipping<'a> {
    exclusion: &'a mut dyn Exclusion,
    /// Blocks that stand as holes in what was captured because they were excluded.
    skipped: &'a mut Blocks,
    /// In the exclusion since before the first flip, as far as is known.
    within: Blocks,
}

impl<'a> Skipping<'a> {
    /// To be begun with `begin`.
    #[must_use]
    pub fn new(exclusion: &'a mut dyn Exclusion, skipped: &'a mut Blocks) -> Self {
        Self { exclusion, skipped, within: Blocks::new() }
    }

    /// Before the first flip. What was skipped and has left the exclusion is dirty again: it goes into `carry`.
    pub(crate) fn begin(&mut self, carry: &mut [RoaringBitmap]) {
        self.skipped.resize_with(carry.len(), RoaringBitmap::new);
        self.within = self.exclusion.blocks();
        self.within.resize_with(carry.len(), RoaringBitmap::new);
        let left: Blocks = self.skipped.iter().zip(&self.within).map(|(skipped, within)| skipped - within).collect();
        self.dirty_again(&left, carry);
    }

    /// What was in the exclusion since before the first flip, for whoever goes on with it.
    pub(crate) fn into_within(self) -> Blocks {
        self.within
    }

    /// Goes on for the flip before which that was in the exclusion, in the place of `begin`.
    pub(crate) fn resume(&mut self, within: Blocks) {
        self.skipped.resize_with(within.len(), RoaringBitmap::new);
        self.within = within;
    }

    /// Takes out of what a flip gave what was skipped before: it stands as a hole already, and stays in `skipped`.
    pub(crate) fn pass_over(&self, marked: &mut [RoaringBitmap]) {
        marked.iter_mut().zip(&*self.skipped).for_each(|(marked, skipped)| *marked -= skipped);
    }

    /// Which of `blocks` are not read.
    pub(crate) fn of(&self, volume: usize, blocks: &RoaringBitmap) -> RoaringBitmap {
        blocks & &self.within[volume]
    }

    /// After the last read: gives what stands as a hole, in this capture of all of `carry` or in one before it, and is in the
    /// exclusion no more. That has to be read; it is in `carry`.
    pub(crate) fn end(&mut self, carry: &mut [RoaringBitmap]) -> Blocks {
        let mut now = self.exclusion.blocks();
        now.resize_with(carry.len(), RoaringBitmap::new);
        let gone = |volume: usize| {
            let skipped = &self.skipped[volume] | self.of(volume, &carry[volume]);
            skipped - &now[volume]
        };
        let gone: Blocks = (0..carry.len()).map(gone).collect();
        for (within, now) in self.within.iter_mut().zip(&now) {
            *within &= now;
        }
        self.dirty_again(&gone, carry);
        gone
    }

    /// These blocks were captured. What is read from now on may come to be skipped in them again.
    pub(crate) fn captured(&mut self, volume: usize, blocks: &RoaringBitmap) {
        let skipped = self.of(volume, blocks);
        self.skipped[volume] -= blocks;
        self.skipped[volume] |= skipped;
    }

    fn dirty_again(&mut self, blocks: &[RoaringBitmap], carry: &mut [RoaringBitmap]) {
        for (volume, blocks) in blocks.iter().enumerate() {
            self.skipped[volume] -= blocks;
            carry[volume] |= blocks;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cut::CutLimits;
    use crate::sim::{Driver, Profile, Sabotage};
    use cdp_seams::random::SimRandom;
    use proptest::prelude::{any, proptest};
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    const LIMITS: CutLimits = CutLimits { bound: Duration::from_secs(1), blocks_max: 1000 };

    /// Blocks come and go between any two looks, and each answer is kept.
    struct Wandering {
        random: SimRandom,
        now: Blocks,
        answers: Arc<Mutex<Vec<Blocks>>>,
        steadiness: u64,
    }

    impl Exclusion for Wandering {
        fn blocks(&mut self) -> Blocks {
            for blocks in &mut self.now {
                for _ in 0..self.random.below(6) {
                    let block = self.random.below(64) as u32;
                    if self.random.below(self.steadiness) == 0 && !blocks.remove(block) {
                        blocks.insert(block);
                    }
                }
            }
            self.answers.lock().expect("no panic").push(self.now.clone());
            self.now.clone()
        }
    }

    /// Always the same blocks of the first volume.
    struct Fixed(RoaringBitmap);

    impl Exclusion for Fixed {
        fn blocks(&mut self) -> Blocks {
            vec![self.0.clone()]
        }
    }

    /// Gives the number of points, and how often blocks were skipped in them.
    fn run(seed: u64, steadiness: u64) -> (u64, u64) {
        let mut driver = Driver::new(seed, Profile::default(), Sabotage::None);
        let answers = Arc::new(Mutex::new(Vec::new()));
        driver.exclusion = Box::new(Wandering {
            random: SimRandom::new(seed ^ 0xe8c1),
            now: vec![(10..30).collect(), (20..40).collect()],
            answers: Arc::clone(&answers),
            steadiness,
        });
        let mut found = (0, 0);
        for number in 0..60 {
            driver.world.run(driver.world.random.below(300));
            answers.lock().expect("no panic").clear();
            let before = driver.tally;
            let blocks_max = if number % 9 == 0 { 20 } else { 1000 };
            // The oracle: what is skipped is zeros, and all else is of the instant.
            let outcome = driver.cut(&CutLimits { blocks_max, bound: Duration::from_millis(20) });
            outcome.unwrap_or_else(|violation| panic!("seed {seed}, cut {number}: {violation}"));
            let answers = answers.lock().expect("no panic");
            if driver.tally.captured + driver.tally.unchanged > before.captured + before.unchanged {
                let (first, last) = (&answers[0], &answers[answers.len() - 1]);
                for (volume, skipped) in driver.skipped.iter().enumerate() {
                    assert!(skipped.is_subset(&first[volume]), "seed {seed}, cut {number}: not excluded before");
                    assert!(skipped.is_subset(&last[volume]), "seed {seed}, cut {number}: not excluded after");
                }
                let skipped: u64 = driver.skipped.iter().map(RoaringBitmap::len).sum();
                found = (found.0 + 1, found.1 + skipped);
            }
        }
        // Whatever was skipped is dirty again once nothing is excluded.
        driver.exclusion = Box::new(NothingExcluded);
        driver.finish().unwrap_or_else(|violation| panic!("seed {seed}: {violation}"));
        assert!(driver.skipped.iter().all(RoaringBitmap::is_empty));
        found
    }

    proptest! {
        #[test]
        fn what_is_skipped_was_excluded_before_and_after_and_all_else_is_of_the_instant(seed in any::<u64>(), steadiness in 1..40u64) {
            run(seed, steadiness);
        }
    }

    #[test]
    fn the_oracle_sees_points_with_skipped_blocks() {
        let (points, skipped) =
            (0..40).map(|seed| run(seed, 10)).fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
        assert!(points > 1000 && skipped > 5 * points, "{points} points with {skipped} skipped blocks");
    }

    #[test]
    fn where_only_excluded_blocks_are_written_nothing_has_changed() {
        // Every write goes to the first 16 sectors, and with what they are long to the first 5 blocks of either volume.
        let profile = Profile { hot_permille: 1000, sectors: vec![64 * 8], ..Profile::default() };
        let mut driver = Driver::new(5, profile, Sabotage::None);
        driver.exclusion = Box::new(Fixed((0..5).collect()));
        driver.cut(&LIMITS).expect("a point");
        let marked = |driver: &Driver| driver.world.media()[0].iter().filter(|write| **write != 0).count();
        for _ in 0..20 {
            driver.world.run(500);
            driver.cut(&LIMITS).expect("a point");
        }
        assert!(marked(&driver) > 0, "something was written");
        assert_eq!((driver.tally.captured, driver.tally.unchanged), (1, 20), "{:?}", driver.tally);
        assert_eq!(driver.skipped, [(0..5).collect::<RoaringBitmap>()]);
        driver.exclusion = Box::new(NothingExcluded);
        driver.finish().expect("all of it in the end");
    }
}
