//! Whether the completion program saw every completion, measured against the kernel's own counts.
//!
//! Completion runs do go missing now and then, without a miss being counted. A lost completion can only hurt a write
//! that was in flight across a flip: its issue mark is in what was drained since the last flip at which nothing was in
//! flight. So that is kept, and joins the cut at which the kernel is found to have counted more than the program.
//! A false alarm costs re-reading those blocks, nothing else.
//!
//! Place of what is to come: counts that differ without end put a volume in doubt (`judge` is where to see it).

use super::device::{DeviceNumber, DiskCounts};
use super::instance::{EventCounts, Instance, Tally};
use roaring::RoaringBitmap;
use std::io;

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
    /// Fewest sectors that were ever seen to be issued and not completed.
    outstanding: i64,
}

impl DiskTrust {
    fn judge(&mut self, kernel: &DiskCounts, issued: u64, counted: &Tally) -> Verdict {
        let completed = kernel.written.wrapping_add(kernel.discarded);
        let ahead = completed.wrapping_sub(counted.written.wrapping_add(counted.discarded)) as i64;
        let outstanding = issued.wrapping_sub(completed) as i64;
        let lost = ahead > self.ahead;
        self.ahead = self.ahead.max(ahead);
        self.outstanding = self.outstanding.min(outstanding);
        let idle = kernel.in_flight == 0 && outstanding == self.outstanding;
        Verdict { lost, quiet: idle && issued == counted.issued }
    }
}

impl Trust {
    /// Begins to measure: differences that are there now do not count.
    pub(super) fn new(instance: &Instance, disks: &[DeviceNumber]) -> io::Result<Self> {
        let disk = |disk: &DeviceNumber| DiskTrust { disk: *disk, ahead: i64::MIN, outstanding: i64::MAX };
        let mut trust = Self { disks: disks.iter().map(disk).collect(), events: instance.counts()? };
        let before = trust.before(instance)?;
        trust.judge(instance, &before)?;
        Ok(trust)
    }

    /// The counts before a flip: what was issued first, what is in flight last.
    pub(super) fn before(&self, instance: &Instance) -> io::Result<Before> {
        let issued = (0..self.disks.len()).map(|index| instance.tally(index).issued).collect();
        let kernel: io::Result<_> = self.disks.iter().map(|disk| DiskCounts::read(disk.disk)).collect();
        Ok(Before { issued, kernel: kernel? })
    }

    /// Compares the counts before a flip with those after its barrier.
    pub(super) fn judge(&mut self, instance: &Instance, before: &Before) -> io::Result<Verdict> {
        let mut verdict = Verdict { lost: false, quiet: true };
        for (index, disk) in self.disks.iter_mut().enumerate() {
            let of_disk = disk.judge(&before.kernel[index], before.issued[index], &instance.tally(index));
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

/// What was drained since the last flip at which nothing was in flight, by volume.
pub(super) struct Suspects(Vec<RoaringBitmap>);

impl Suspects {
    pub(super) fn new(volumes: usize) -> Self {
        Self(vec![RoaringBitmap::new(); volumes])
    }

    /// Takes in what a flip drained. Gives what has to join its cut, where a completion was lost.
    pub(super) fn flipped(&mut self, drained: &[RoaringBitmap], verdict: Verdict) -> Option<Vec<RoaringBitmap>> {
        let joining = verdict.lost.then(|| self.0.clone());
        for (suspects, drained) in self.0.iter_mut().zip(drained) {
            if verdict.quiet {
                suspects.clear();
            } else {
                *suspects |= drained;
            }
        }
        joining
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: DiskCounts = DiskCounts { written: 100, discarded: 20, in_flight: 0 };

    fn trust() -> DiskTrust {
        let mut trust = DiskTrust { disk: DeviceNumber { major: 7, minor: 0 }, ahead: i64::MIN, outstanding: i64::MAX };
        trust.judge(&IDLE, 50, &Tally { written: 0, discarded: 0, issued: 50 });
        trust
    }

    fn tally(written: u64, issued: u64) -> Tally {
        Tally { written, discarded: 0, issued }
    }

    #[test]
    fn a_completion_the_program_did_not_see_is_noticed_once() {
        let mut trust = trust();
        let kernel = DiskCounts { written: 108, ..IDLE };
        assert_eq!(trust.judge(&kernel, 58, &tally(8, 58)), Verdict { lost: false, quiet: true });
        let kernel = DiskCounts { written: 116, ..IDLE };
        assert_eq!(trust.judge(&kernel, 66, &tally(8, 66)), Verdict { lost: true, quiet: true });
        assert_eq!(trust.judge(&kernel, 66, &tally(8, 66)), Verdict { lost: false, quiet: true });
    }

    #[test]
    fn the_program_may_have_seen_more_by_the_time_it_is_asked() {
        assert!(!trust().judge(&IDLE, 58, &tally(8, 58)).lost);
    }

    #[test]
    fn it_is_not_quiet_while_a_write_is_anywhere_on_its_way() {
        assert!(!trust().judge(&DiskCounts { in_flight: 1, ..IDLE }, 50, &tally(0, 50)).quiet);
        assert!(!trust().judge(&IDLE, 58, &tally(0, 58)).quiet, "issued, and not yet with the driver");
        assert!(!trust().judge(&IDLE, 50, &tally(0, 58)).quiet, "issued during the flip");
    }

    #[test]
    fn suspects_are_kept_until_a_quiet_flip_and_join_where_a_completion_was_lost() {
        let blocks = |block: u32| vec![RoaringBitmap::from_iter([block])];
        let mut suspects = Suspects::new(1);
        assert_eq!(suspects.flipped(&blocks(1), Verdict { lost: false, quiet: false }), None);
        assert_eq!(suspects.flipped(&blocks(2), Verdict { lost: true, quiet: false }), Some(blocks(1)));
        let both = Some(vec![RoaringBitmap::from_iter([1, 2])]);
        assert_eq!(suspects.flipped(&blocks(3), Verdict { lost: true, quiet: true }), both);
        assert_eq!(
            suspects.flipped(&blocks(4), Verdict { lost: true, quiet: false }),
            Some(vec![RoaringBitmap::new()])
        );
    }
}
