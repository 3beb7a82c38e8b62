//! A tracker over the simulated world, and the ways to build one wrongly.

use super::marks::Marks;
use super::{Blocks, Instant, World};
use crate::tracker::{TrackedVolume, Tracker, TrackerError, TrackerReport, TrustReport};
use cdp_protocol::units::{Block, VolumeSlot};
use roaring::RoaringBitmap;
use std::sync::Arc;

/// What is left out, to see whether the tests notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// Nothing.
    None,
    /// No block is ever conflicted.
    SkipValidation,
    /// Completions mark nothing.
    MarkAtIssueOnly,
    /// Issues mark nothing.
    MarkAtCompletionOnly,
    /// What a failed cut held is forgotten (done by the driver).
    ForgetCarry,
    /// A flip does not wait for the runs that are under way.
    SkipBarrier,
}

/// Marks of the world's writes, flipped at one instant.
pub struct SimTracker {
    world: Arc<World>,
    volumes: Vec<TrackedVolume>,
    recovered: Blocks,
    /// Drained by a flip that failed.
    kept: Blocks,
    instant: Arc<Instant>,
    was_quiet: bool,
    /// How many of 1000 flips meet a straggler.
    pub straggler_permille: u64,
    /// How many of 1000 questions are answered with a conflict that is none, as a hashed filter does.
    pub false_hit_permille: u64,
    /// Fails the next flip or settlement.
    pub failure: Option<TrackerError>,
    /// Blocks that it says to have given again because something went unseen.
    pub recaptured_blocks: u64,
}

impl SimTracker {
    /// Tracks all volumes of the world anew; everything is dirty at first.
    #[must_use]
    pub fn new(world: &Arc<World>) -> Self {
        let blocks = world.profile.blocks();
        world.lock().marks = Marks::new(&blocks);
        Self::attach(world)
    }

    /// Goes on with the tracking as another agent of the same world left it, or begins one.
    #[must_use]
    pub fn attach(world: &Arc<World>) -> Self {
        let volume = |index| TrackedVolume { slot: VolumeSlot(index as u16), size_bytes: world.size_bytes(index) };
        let volumes: Vec<TrackedVolume> = (0..world.volumes()).map(volume).collect();
        let recovered = world.lock().marks.take_up();
        Self {
            world: Arc::clone(world),
            recovered,
            kept: vec![RoaringBitmap::new(); volumes.len()],
            volumes,
            instant: Arc::new(world.instant()),
            was_quiet: false,
            straggler_permille: 0,
            false_hit_permille: 0,
            failure: None,
            recaptured_blocks: 0,
        }
    }

    /// What a power cut at the last flip could have left.
    #[must_use]
    pub fn instant(&self) -> &Instant {
        &self.instant
    }

    fn nothing(&self) -> Blocks {
        vec![RoaringBitmap::new(); self.volumes.len()]
    }
}

impl Tracker for SimTracker {
    fn volumes(&self) -> &[TrackedVolume] {
        &self.volumes
    }

    fn take_recovered(&mut self) -> Vec<RoaringBitmap> {
        let nothing = self.nothing();
        std::mem::replace(&mut self.recovered, nothing)
    }

    fn flip(&mut self) -> Result<Vec<RoaringBitmap>, TrackerError> {
        self.world.mortality.call();
        self.world.run(self.world.random.below(5));
        self.instant = {
            let mut state = self.world.lock();
            self.was_quiet = state.in_flight.is_empty();
            state.flip();
            Arc::clone(&state.flipped)
        };
        self.world.mortality.call();
        let drained = self.world.lock().marks.drain();
        self.world.mortality.call();
        self.world.run(self.world.random.below(5));
        for (kept, drained) in self.kept.iter_mut().zip(drained) {
            *kept |= drained;
        }
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        if self.world.random.below(1000) < self.straggler_permille {
            return Err(TrackerError::Stragglers("simulated".to_owned()));
        }
        let nothing = self.nothing();
        Ok(std::mem::replace(&mut self.kept, nothing))
    }

    fn flip_again(&mut self) -> Result<Vec<RoaringBitmap>, TrackerError> {
        let (instant, flipped) = (Arc::clone(&self.instant), self.world.flipped());
        let marked = self.flip();
        self.instant = instant;
        self.world.lock().flipped = flipped;
        marked
    }

    fn was_quiet(&self) -> bool {
        self.was_quiet
    }

    fn is_conflicted(&self, volume: usize, block: Block) -> bool {
        let state = self.world.lock();
        let is_issued = state.marks.is_issued(volume, block);
        let is_false_hit = self.world.random.below(1000) < self.false_hit_permille;
        state.sabotage != Sabotage::SkipValidation && (is_issued || is_false_hit)
    }

    fn settle(&mut self) -> Result<bool, TrackerError> {
        self.failure.take().map_or(Ok(true), Err)
    }

    fn retain_unacked(&mut self, union: &[RoaringBitmap]) -> Result<(), TrackerError> {
        self.world.mortality.call();
        // What was not given away yet is of no epoch, and stays.
        let ungiven = self.kept.iter().zip(&self.recovered).map(|(kept, recovered)| kept | recovered);
        let unacked: Blocks = union.iter().zip(ungiven).map(|(union, ungiven)| union | ungiven).collect();
        self.world.lock().marks.unacked = unacked;
        self.world.mortality.call();
        Ok(())
    }

    fn memo(&self) -> Result<Vec<u8>, TrackerError> {
        Ok(self.world.lock().marks.memo.clone())
    }

    fn set_memo(&mut self, memo: &[u8]) -> Result<(), TrackerError> {
        self.world.mortality.call();
        memo.clone_into(&mut self.world.lock().marks.memo);
        self.world.mortality.call();
        Ok(())
    }

    fn report(&self) -> TrackerReport {
        let trust = TrustReport { recaptured_blocks: self.recaptured_blocks, ..TrustReport::default() };
        TrackerReport { kind: "sim", trust, ..TrackerReport::default() }
    }
}
