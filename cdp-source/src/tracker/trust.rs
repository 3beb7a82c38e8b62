//! Whether the completion program saw every completion, measured against the kernel's own counts.
//!
//! Completion runs do go missing now and then, in bursts and without a miss being counted. A lost completion can only
//! hurt a write that was in flight across a flip: its issue mark is in what was drained since the last flip at which
//! nothing was in flight. So that is kept, for a minute at least (no write is in flight for longer), and joins the cut
//! at which the kernel is found to have counted more than the program. A false alarm costs re-reading those blocks,
//! nothing else.
//!
//! The kernel's counts are read before a flip and the program's after it, so that what completes in between cannot look
//! lost; it can hide a loss, until a flip at which less completes in between. So suspects are given up only at a flip
//! that is clean: even the kernel's counts read *after* the program's are not ahead. Losses add up, so one clean flip
//! clears all before it; where none comes in time, the suspects join the cut as if a completion were lost. A bio may be issued and given back
//! without ever becoming a request (`REQ_NOWAIT` on a full queue), so that what is outstanding does not fall back to
//! where it was: after a while in which nothing moves, it counts as none.
//!
//! Place of what is to come: counts that differ without end put a volume in doubt (`judge` is where to see it).

use super::device::{DeviceNumber, DiskCounts};
use super::instance::{EventCounts, Instance, Tally};
use roaring::RoaringBitmap;
use std::io;
use std::time::Duration;

/// How long suspects are kept at least, where no flip is quiet.
const SUSPECT_FOR: Duration = Duration::from_secs(60);
/// How long nothing may have moved for what is outstanding to count as none.
const STILL_FOR: Duration = Duration::from_millis(50);

/// The counts before a flip.
pub(super) struct Before {
    issued: Vec<u64>,
    kernel: Vec<DiskCounts>,
}

/// What a flip's counts say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    /// A completion was lost, or may have been.
    pub(super) lost: bool,
    /// Nothing was in flight at the flip.
    pub(super) quiet: bool,
    /// No completion before the flip can have been lost unseen.
    pub(super) clean: bool,
}

/// The measure of one tracking.
pub(super) struct Trust {
    disks: Vec<DiskTrust>,
    events: EventCounts,
}

struct DiskTrust {
    disk: DeviceNumber,
    /// Most sectors the kernel was ever seen to have completed beyond what the program counted.
    ahead: i64,
    /// Sectors issued and not completed, while nothing is on its way.
    outstanding: i64,
    /// The counts of issued and completed sectors that were last seen to move, and when they were first seen.
    still: (u64, u64, Duration),
}

impl DiskTrust {
    fn new(disk: DeviceNumber, now: Duration) -> Self {
        Self { disk, ahead: i64::MIN, outstanding: i64::MAX, still: (0, 0, now) }
    }

    fn judge(&mut self, kernel: &DiskCounts, issued: u64, counted: &Tally, now: Duration) -> Verdict {
        let completed = kernel.written.wrapping_add(kernel.discarded);
        let ahead = completed.wrapping_sub(counted.completed()) as i64;
        let outstanding = issued.wrapping_sub(completed) as i64;
        let lost = ahead > self.ahead;
        self.ahead = self.ahead.max(ahead);
        self.outstanding = self.outstanding.min(outstanding);
        if (self.still.0, self.still.1) != (issued, completed) || kernel.in_flight != 0 {
            self.still = (issued, completed, now);
        } else if now.saturating_sub(self.still.2) >= STILL_FOR {
            self.outstanding = outstanding;
        }
        let idle = kernel.in_flight == 0 && outstanding == self.outstanding;
        Verdict { lost, quiet: idle && issued == counted.issued, clean: true }
    }

    /// Whether the kernel is not ahead of the program by more than it ever was, though it was asked after it.
    fn is_clean(&self, kernel_after: &DiskCounts, counted: &Tally) -> bool {
        let completed = kernel_after.written.wrapping_add(kernel_after.discarded);
        completed.wrapping_sub(counted.completed()) as i64 <= self.ahead
    }
}

impl Trust {
    /// Begins to measure: differences that are there now do not count.
    pub(super) fn new(instance: &Instance, disks: &[DeviceNumber], now: Duration) -> io::Result<Self> {
        let disk = |disk: &DeviceNumber| DiskTrust::new(*disk, now);
        let mut trust = Self { disks: disks.iter().map(disk).collect(), events: instance.counts()? };
        let before = trust.before(instance)?;
        trust.judge(instance, &before, now)?;
        Ok(trust)
    }

    /// The counts before a flip: what was issued first, what is in flight last.
    pub(super) fn before(&self, instance: &Instance) -> io::Result<Before> {
        let issued = (0..self.disks.len()).map(|index| instance.tally(index).issued).collect();
        let kernel: io::Result<_> = self.disks.iter().map(|disk| DiskCounts::read(disk.disk)).collect();
        Ok(Before { issued, kernel: kernel? })
    }

    /// Compares the counts before a flip with those after its barrier.
    pub(super) fn judge(&mut self, instance: &Instance, before: &Before, now: Duration) -> io::Result<Verdict> {
        let mut verdict = Verdict { lost: false, quiet: true, clean: true };
        for (index, disk) in self.disks.iter_mut().enumerate() {
            let counted = instance.tally(index);
            let kernel_after = DiskCounts::read(disk.disk)?;
            let of_disk = disk.judge(&before.kernel[index], before.issued[index], &counted, now);
            verdict.clean &= disk.is_clean(&kernel_after, &counted);
            verdict.lost |= of_disk.lost;
            verdict.quiet &= of_disk.quiet;
        }
        let events = instance.counts()?;
        verdict.lost |= events.complete_misses != self.events.complete_misses;
        verdict.quiet &= events.issue_misses == self.events.issue_misses;
        self.events = events;
        Ok(verdict)
    }
}

/// What was drained since the last flip at which nothing was in flight, or in the last minute or two; by volume.
pub(super) struct Suspects {
    recent: Vec<RoaringBitmap>,
    older: Vec<RoaringBitmap>,
    turned: Duration,
}

impl Suspects {
    pub(super) fn new(volumes: usize, now: Duration) -> Self {
        let none = vec![RoaringBitmap::new(); volumes];
        Self { recent: none.clone(), older: none, turned: now }
    }

    /// The suspects of a volume: of no epoch any more, and not to be forgotten by an agent's death.
    pub(super) fn of(&self, volume: usize) -> RoaringBitmap {
        &self.recent[volume] | &self.older[volume]
    }

    /// Takes in what a flip drained. Gives what has to join its cut, where a completion was lost or may have been.
    pub(super) fn flipped(
        &mut self,
        drained: &[RoaringBitmap],
        verdict: Verdict,
        now: Duration,
    ) -> Option<Vec<RoaringBitmap>> {
        let age = now.saturating_sub(self.turned);
        let joining = if verdict.lost {
            Some((0..drained.len()).map(|volume| self.of(volume)).collect())
        } else if age >= SUSPECT_FOR * 2 && !verdict.clean && !verdict.quiet {
            Some(self.older.clone())
        } else {
            None
        };
        if verdict.quiet {
            *self = Self::new(drained.len(), now);
            return joining;
        }
        if age >= SUSPECT_FOR * 2 || age >= SUSPECT_FOR && verdict.clean {
            let none = vec![RoaringBitmap::new(); drained.len()];
            self.older = std::mem::replace(&mut self.recent, none);
            self.turned = now;
        }
        for (recent, drained) in self.recent.iter_mut().zip(drained) {
            *recent |= drained;
        }
        joining
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: DiskCounts = DiskCounts { written: 100, discarded: 20, in_flight: 0 };

    const AT: Duration = Duration::from_secs(1);

    fn trust() -> DiskTrust {
        let mut trust = DiskTrust::new(DeviceNumber { major: 7, minor: 0 }, AT);
        trust.judge(&IDLE, 50, &tally(0, 50), AT);
        trust
    }

    fn tally(written: u64, issued: u64) -> Tally {
        Tally { written, issued, ..Tally::default() }
    }

    fn verdict(lost: bool, quiet: bool) -> Verdict {
        Verdict { lost, quiet, clean: true }
    }

    #[test]
    fn a_completion_the_program_did_not_see_is_noticed_once() {
        let mut trust = trust();
        let kernel = DiskCounts { written: 108, ..IDLE };
        assert_eq!(trust.judge(&kernel, 58, &tally(8, 58), AT), verdict(false, true));
        let kernel = DiskCounts { written: 116, ..IDLE };
        assert_eq!(trust.judge(&kernel, 66, &tally(8, 66), AT), verdict(true, true));
        assert_eq!(trust.judge(&kernel, 66, &tally(8, 66), AT), verdict(false, true));
    }

    #[test]
    fn the_program_may_have_seen_more_by_the_time_it_is_asked() {
        assert!(!trust().judge(&IDLE, 58, &tally(8, 58), AT).lost);
    }

    #[test]
    fn it_is_not_quiet_while_a_write_is_anywhere_on_its_way() {
        assert!(!trust().judge(&DiskCounts { in_flight: 1, ..IDLE }, 50, &tally(0, 50), AT).quiet);
        assert!(!trust().judge(&IDLE, 58, &tally(0, 58), AT).quiet, "issued, and not yet with the driver");
        assert!(!trust().judge(&IDLE, 50, &tally(0, 58), AT).quiet, "issued during the flip");
    }

    #[test]
    fn a_bio_that_never_became_a_request_is_not_waited_for_for_ever() {
        let mut trust = trust();
        assert!(!trust.judge(&IDLE, 58, &tally(0, 58), AT).quiet);
        assert!(!trust.judge(&IDLE, 58, &tally(0, 58), AT + STILL_FOR / 2).quiet);
        assert!(trust.judge(&IDLE, 58, &tally(0, 58), AT + STILL_FOR).quiet);
    }

    #[test]
    fn suspects_are_kept_until_a_quiet_flip_and_join_where_a_completion_was_lost() {
        let blocks = |blocks: &[u32]| vec![RoaringBitmap::from_iter(blocks)];
        let mut suspects = Suspects::new(1, AT);
        assert_eq!(suspects.flipped(&blocks(&[1]), verdict(false, false), AT), None);
        assert_eq!(suspects.flipped(&blocks(&[2]), verdict(true, false), AT), Some(blocks(&[1])));
        assert_eq!(suspects.flipped(&blocks(&[3]), verdict(true, true), AT), Some(blocks(&[1, 2])));
        assert_eq!(suspects.flipped(&blocks(&[4]), verdict(true, false), AT), Some(blocks(&[])));
    }

    #[test]
    fn suspects_that_were_never_cleared_join_before_they_are_given_up() {
        let blocks = |blocks: &[u32]| vec![RoaringBitmap::from_iter(blocks)];
        let mut suspects = Suspects::new(1, AT);
        let hidden = Verdict { lost: false, quiet: false, clean: false };
        let at = |seconds: u64| AT + Duration::from_secs(seconds);
        suspects.flipped(&blocks(&[1]), hidden, at(0));
        assert_eq!(suspects.flipped(&blocks(&[2]), hidden, at(119)), None);
        assert_eq!(suspects.flipped(&blocks(&[3]), hidden, at(120)), Some(blocks(&[])));
        assert_eq!(suspects.of(0), blocks(&[1, 2, 3])[0]);
        assert_eq!(suspects.flipped(&blocks(&[4]), hidden, at(240)), Some(blocks(&[1, 2])));
    }

    #[test]
    fn a_flip_is_clean_only_if_the_kernel_asked_last_is_not_ahead() {
        let trust = trust();
        assert!(trust.is_clean(&IDLE, &tally(0, 50)));
        assert!(!trust.is_clean(&DiskCounts { written: 108, ..IDLE }, &tally(0, 50)));
    }

    #[test]
    fn suspects_are_kept_for_a_minute_at_least_and_two_at_most() {
        let blocks = |blocks: &[u32]| vec![RoaringBitmap::from_iter(blocks)];
        let mut suspects = Suspects::new(1, AT);
        let at = |seconds: u64| AT + Duration::from_secs(seconds);
        suspects.flipped(&blocks(&[1]), verdict(false, false), at(0));
        suspects.flipped(&blocks(&[2]), verdict(false, false), at(60));
        assert_eq!(suspects.flipped(&blocks(&[3]), verdict(true, false), at(119)), Some(blocks(&[1, 2])));
        suspects.flipped(&blocks(&[4]), verdict(false, false), at(120));
        assert_eq!(suspects.flipped(&blocks(&[]), verdict(true, false), at(121)), Some(blocks(&[2, 3, 4])));
    }
}
