//! What became of simulations, counted.

use std::ops::AddAssign;

/// Counts of one simulation, or of many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Events.
    pub(crate) steps: u64,
    /// Power cuts and deaths of the target, in recovery too.
    pub(crate) target_ends: u64,
    /// Deaths of the source's process, and losses of its machine's power.
    pub(crate) source_ends: u64,
    /// Lines that broke.
    pub(crate) line_cuts: u64,
    /// Bits flipped at rest.
    pub(crate) flips: u64,
    /// Groups that had to be frozen after bits were flipped.
    pub(crate) frozen: u64,
    /// Recoveries of the target that were checked.
    pub(crate) recoveries: u64,
    /// Points that were acked.
    pub(crate) points: u64,
    /// Checkpoints that were built.
    pub(crate) checkpoints: u64,
    /// Prunes that came to their end.
    pub(crate) prunes: u64,
    /// Points that the ladder let go.
    pub(crate) removed: u64,
    /// Packs that were rotten while everything was read of the journal.
    pub(crate) rotten_packs: u64,
    /// Steps of a group after which some of what waited for the line was in its spool's file.
    pub(crate) spooled: u64,
    /// Points that were merged while they waited.
    pub(crate) merged: u64,
    /// Agents that went on with points of one before them.
    pub(crate) taken_up: u64,
}

impl Tally {
    /// Ends of processes and machines.
    pub(crate) const fn crashes(&self) -> u64 {
        self.target_ends + self.source_ends
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.target_ends += other.target_ends;
        self.source_ends += other.source_ends;
        self.line_cuts += other.line_cuts;
        self.flips += other.flips;
        self.frozen += other.frozen;
        self.recoveries += other.recoveries;
        self.points += other.points;
        self.checkpoints += other.checkpoints;
        self.prunes += other.prunes;
        self.removed += other.removed;
        self.rotten_packs += other.rotten_packs;
        self.spooled += other.spooled;
        self.merged += other.merged;
        self.taken_up += other.taken_up;
    }
}
