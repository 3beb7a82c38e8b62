//! Whether the completion program saw every completion, measured against the kernel's own counts.
//!
//! Completion runs do go missing now and then, in bursts and without a miss being counted. What that can hurt is in
//! `suspects`; here is how it is noticed: the kernel has counted more than the program.
//!
//! The kernel's counts are read before a flip and the program's after it, so that what completes in between cannot look
//! lost; it can hide a loss. So both are asked once more the other way round, the kernel last: there a loss cannot hide, and
//! what completes in between looks like one, so they are asked again until the kernel is not ahead. If it always is, a
//! completion was lost, now or before. A bio may be issued and given back without ever becoming a request (`REQ_NOWAIT` on a
//! full queue): the programs take it off what was issued. Where they cannot see that, what is outstanding does not fall back
//! to where it was: after a while in which nothing moves, it counts as none.
//!
//! Writes and discards are compared each for itself. `WRITE_ZEROES` counts as written in the kernel, and some bio-based
//! drivers (zram) count neither it nor discards: so the exact comparison is made when nothing is in flight, where the difference
//! has to be none, or just what those operations amount to. Once that was seen, the program's own count of them is added to the
//! kernel's. A kernel that counts less than the program cannot show a loss: until
//! it agrees again, what is suspect joins instead of being given up. More completed than was ever issued means that issues were missed;
//! that, a bio's range that could not be kept or was not there, and a kernel that does not count at all are causes of `doubt`.

use super::device::{Device, DeviceKind, DeviceNumber};
use super::doubt::Cause;
use super::instance::{EventCounts, Instance, Tally, disks_of};
use super::kernel_counts::{DiskCounter, DiskCounts};
use serde::{Deserialize, Serialize};
use std::io;
use std::time::Duration;

/// How long nothing may have moved for what is outstanding to count as none.
const STILL_FOR: Duration = Duration::from_millis(50);
/// The same on a bio-based disk: a stacked driver may hold bios back, while it is suspended, and count them nowhere.
const STILL_FOR_BIOS: Duration = Duration::from_secs(5);
/// How often what is outstanding must have been the same at quiet moments for less to mean that issues were missed.
const AGREED_MIN: u32 = 8;
/// How often in a row the counts may differ while nothing is in flight: lost completions are rare, and a driver that does not
/// count is no witness.
const DISAGREEMENTS_MAX: u32 = 16;
/// How often the counts are asked for at a flip, at most: a few µs each, in some of which nothing completes.
const ASKED_MAX: u32 = 64;

/// How far a tracking is to be trusted, by its counts; in sectors where nothing else is said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrustReport {
    /// The disks.
    pub disks: Vec<DiskReport>,
    /// Flips at which the kernel had counted completions that the programs had not.
    pub completions_lost: u64,
    /// Passthrough writes, whose range is not known.
    pub blind_writes: u64,
    /// Writes to bio-based disks whose range could not be kept.
    pub unremembered: u64,
    /// Writes to bio-based disks that completed without a range kept.
    pub unknown: u64,
    /// Why no cut is made now.
    pub doubt: Option<String>,
    /// Blocks captured again because writes to them may have been missed.
    pub recaptured_blocks: u64,
    /// How often everything was made dirty because marks could not be relied upon.
    pub rescans: u64,
    /// Why it was the last time.
    pub rescanned: Option<String>,
}

impl TrustReport {
    /// How often something may have gone unseen, in counts that never fall: as long as they stand, nothing has.
    #[must_use]
    pub fn unseen(&self) -> [u64; 4] {
        [self.completions_lost, self.blind_writes, self.recaptured_blocks, self.rescans]
    }
}

/// The counts of one disk, at the last flip.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskReport {
    /// Its number.
    pub disk: String,
    /// Issued, by the programs' count.
    pub issued: u64,
    /// Completed, by the programs' count.
    pub completed: u64,
    /// Written, by the kernel's count since the disk appeared.
    pub kernel_written: u64,
    /// Discarded, by the kernel's count.
    pub kernel_discarded: u64,
    /// Write and discard requests completed, by the kernel's count.
    pub kernel_requests: u64,
    /// Writes in flight, by the kernel's count.
    pub in_flight: u64,
}

/// The counts before a flip.
pub(super) struct Before {
    counted: Vec<Tally>,
    kernel: Vec<DiskCounts>,
}

/// What a flip's counts say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    /// A completion was lost, or may have been.
    pub(super) lost: bool,
    /// Nothing was in flight at the flip.
    pub(super) quiet: bool,
    /// A completion that was lost before the flip would have been seen to be.
    pub(super) clean: bool,
    /// Something that a lost completion does not explain.
    pub(super) doubt: Option<Cause>,
}

/// The measure of one tracking.
pub(super) struct Trust {
    disks: Vec<DiskTrust>,
    /// What the kernel counts on each of them.
    counters: Vec<DiskCounter>,
    events: EventCounts,
}

struct DiskTrust {
    disk: DeviceNumber,
    bio_based: bool,
    /// The counts when the measure began.
    first: (DiskCounts, Tally),
    /// Sectors the kernel has written and discarded beyond what the program counted, at most: what is beyond that is lost.
    ahead: [i64; 2],
    /// The same when nothing was in flight last, or the measure began: what was lost since is beyond it.
    ahead_at_rest: [i64; 2],
    /// The counts when nothing was in flight last.
    base: Option<(DiskCounts, Tally)>,
    /// The kernel counts less than the program.
    is_behind: bool,
    /// It does since nothing was in flight last, on a driver that may leave out what it is not known to: as many sectors may be lost.
    may_hide: bool,
    /// What a bio-based driver leaves out of the kernel's counts, once it was seen.
    leaves_out: LeavesOut,
    /// Times in a row that the counts differed although nothing was in flight.
    disagreements: u32,
    /// Sectors issued and not completed, while nothing is on its way.
    outstanding: i64,
    /// Least sectors ever seen issued, or sent on, beyond those completed; known once nothing was in flight.
    bottom: Option<i64>,
    /// Quiet moments, with writes between them, that agreed with it; and what was issued at the last of them.
    bottom_agreed: (u32, u64),
    /// The counts of issued and completed sectors that were last seen to move, and when they were first seen.
    still: (u64, u64, Duration),
    report: DiskReport,
}

/// Sectors by which the kernel is ahead of the program: written, and discarded.
fn ahead(kernel: &DiskCounts, counted: &Tally) -> [i64; 2] {
    let seen = completed_by(counted);
    [kernel.written.wrapping_sub(seen[0]) as i64, kernel.discarded.wrapping_sub(seen[1]) as i64]
}

/// Sectors that the program saw completed: written or zeroed, which the kernel counts as one, and discarded.
fn completed_by(counted: &Tally) -> [u64; 2] {
    [counted.written.wrapping_add(counted.zeroed), counted.discarded]
}

impl DiskTrust {
    fn new(disk: DeviceNumber, bio_based: bool, kernel: &DiskCounts, counted: &Tally, now: Duration) -> Self {
        Self {
            disk,
            bio_based,
            first: (*kernel, *counted),
            ahead: ahead(kernel, counted),
            ahead_at_rest: ahead(kernel, counted),
            base: None,
            is_behind: false,
            may_hide: false,
            leaves_out: LeavesOut::default(),
            disagreements: 0,
            outstanding: i64::MAX,
            bottom: None,
            bottom_agreed: (0, 0),
            still: (0, 0, now),
            report: DiskReport::default(),
        }
    }

    /// Sectors completed by the kernel's count or, where that is less, by the program's: what either saw is completed.
    fn completed(&self, kernel: &DiskCounts, counted: &Tally) -> u64 {
        let (first_kernel, first) = &self.first;
        let origin = ahead(&self.leaves_out.made_whole(first_kernel, first), first);
        let by_kernel = [kernel.written, kernel.discarded];
        let by_program = completed_by(counted);
        (0..2).fold(0, |sum: u64, kind| {
            let more = by_kernel[kind].wrapping_sub(by_program[kind]) as i64 - origin[kind];
            sum.wrapping_add(by_program[kind]).wrapping_add_signed(more.max(0))
        })
    }

    fn judge(&mut self, raw: &DiskCounts, before: &Tally, counted: &Tally, now: Duration) -> Verdict {
        let kernel = &self.leaves_out.made_whole(raw, before);
        let completed = self.completed(kernel, before);
        let outstanding = before.issued.wrapping_sub(completed) as i64;
        let is_ahead = ahead(kernel, counted);
        let mut lost = is_ahead[0] > self.ahead[0] || is_ahead[1] > self.ahead[1];
        self.ahead = [self.ahead[0].max(is_ahead[0]), self.ahead[1].max(is_ahead[1])];
        // The first time there is nothing to compare with: a write that was announced and not started may be outstanding.
        let is_first = self.outstanding == i64::MAX;
        self.outstanding = self.outstanding.min(outstanding);
        if (self.still.0, self.still.1) != (before.issued, completed) || kernel.in_flight != 0 {
            self.still = (before.issued, completed, now);
        } else if now.saturating_sub(self.still.2) >= if self.bio_based { STILL_FOR_BIOS } else { STILL_FOR } {
            self.outstanding = outstanding;
        }
        let idle = !is_first && kernel.in_flight == 0 && outstanding == self.outstanding;
        let quiet = idle && before.issued == counted.issued && before.remapped == counted.remapped;
        // What is issued is asked last here: whatever had completed before was in it.
        let issued = counted.issued.wrapping_add(counted.remapped);
        let missing = self.misses_issues(issued.wrapping_sub(completed) as i64, issued, quiet);
        if quiet {
            lost |= !self.agrees(raw, counted) && self.base.is_some();
            self.base = Some((*raw, *counted));
            // By what has been learned of the driver just now.
            self.ahead = ahead(&self.leaves_out.made_whole(raw, counted), counted);
            self.ahead_at_rest = self.ahead;
        }
        self.tell(raw, counted);
        Verdict { lost, quiet, clean: true, doubt: self.doubt(kernel, missing) }
    }

    /// How many sectors were completed that were never seen issued.
    fn misses_issues(&mut self, outstanding: i64, issued: u64, quiet: bool) -> i64 {
        let below = self.bottom.map_or(0, |bottom| bottom.saturating_sub(outstanding).max(0));
        // A write that its task holds back while it does not run was outstanding at a quiet moment, and is not any more.
        let missing = if self.bottom_agreed.0 >= AGREED_MIN { below } else { 0 };
        if below > 0 || quiet && self.bottom.is_none() {
            (self.bottom, self.bottom_agreed) = (Some(outstanding), (0, issued));
        } else if quiet && self.bottom == Some(outstanding) && self.bottom_agreed.1 != issued {
            self.bottom_agreed = (self.bottom_agreed.0.saturating_add(1), issued);
        }
        missing
    }

    /// Whether kernel and program counted the same since nothing was in flight last; nothing is now.
    fn agrees(&mut self, kernel: &DiskCounts, counted: &Tally) -> bool {
        let Some((kernel_base, base)) = &self.base else { return true };
        let written = kernel.written.wrapping_sub(kernel_base.written);
        let discarded = kernel.discarded.wrapping_sub(kernel_base.discarded);
        let seen_written = counted.written.wrapping_sub(base.written);
        let seen_zeroed = counted.zeroed.wrapping_sub(base.zeroed);
        let seen_discarded = counted.discarded.wrapping_sub(base.discarded);
        let leaves_out = &mut self.leaves_out;
        let writes = matches(written, seen_written, seen_zeroed, self.bio_based, &mut leaves_out.zeroed);
        let discards = matches(discarded, 0, seen_discarded, self.bio_based, &mut leaves_out.discarded);
        self.is_behind = !(writes && discards);
        self.disagreements = if self.is_behind {
            self.disagreements.saturating_add(1)
        } else if seen_written > 0 {
            0
        } else {
            self.disagreements
        };
        writes && discards
    }

    fn doubt(&self, kernel: &DiskCounts, missing: i64) -> Option<Cause> {
        let disk = self.disk;
        // A bio-based driver counts by itself, whatever the queue says (zram says 0, and counts); `agrees` sees if it does not.
        if kernel.is_off && !self.bio_based {
            let reason = format!("the kernel does not count what disk {disk} completes (its queue/iostats is 0)");
            return Some(Cause { reason, is_unmarked: false, persists: true });
        }
        if self.disagreements >= DISAGREEMENTS_MAX {
            let reason = format!(
                "what disk {disk} counts never agrees with what it was seen to complete ({} times in a row)",
                self.disagreements
            );
            return Some(Cause { reason, is_unmarked: false, persists: true });
        }
        let reason = format!("disk {disk} completed {missing} sectors that were never seen issued");
        (missing > 0).then_some(Cause { reason, is_unmarked: true, persists: false })
    }

    fn tell(&mut self, kernel: &DiskCounts, counted: &Tally) {
        self.report = DiskReport {
            disk: self.disk.to_string(),
            issued: counted.issued,
            completed: counted.completed(),
            kernel_written: kernel.written,
            kernel_discarded: kernel.discarded,
            kernel_requests: kernel.write_requests.wrapping_add(kernel.discard_requests),
            in_flight: kernel.in_flight,
        };
    }

    /// Whether the kernel, asked last, is ahead by more than it was at any flip: a completion before this one was lost, and the
    /// later ones that the program was asked for had hidden it.
    fn is_late(&mut self, excess: [i64; 2]) -> bool {
        let is_late = excess[0] > self.ahead[0] || excess[1] > self.ahead[1];
        self.may_hide = self.bio_based && (0..2).any(|kind| excess[kind] < self.ahead_at_rest[kind]);
        // Downwards too: a count that was ahead for a moment would hide the next loss. But no further than at rest: a request is
        // counted by the program a moment before the kernel does, which is no less of a kernel's count.
        self.ahead = [0, 1].map(|kind: usize| excess[kind].max(self.ahead_at_rest[kind]));
        is_late
    }
}

/// What a driver does not count; `None` until it was seen.
#[derive(Clone, Copy, Debug, Default)]
struct LeavesOut {
    zeroed: Option<bool>,
    discarded: Option<bool>,
}

impl LeavesOut {
    /// The kernel's counts and, of what the driver leaves out, the program's: without them every such operation would hide as many
    /// sectors whose completion was lost.
    fn made_whole(self, kernel: &DiskCounts, counted: &Tally) -> DiskCounts {
        let part = |is_left_out: Option<bool>, sectors| if is_left_out == Some(true) { sectors } else { 0 };
        DiskCounts {
            written: kernel.written.wrapping_add(part(self.zeroed, counted.zeroed)),
            discarded: kernel.discarded.wrapping_add(part(self.discarded, counted.discarded)),
            ..*kernel
        }
    }
}

/// Whether the kernel counted what the program saw. Of a bio-based driver it is learned once whether it leaves `special` out:
/// else a loss of as many sectors would look like the other kind of driver.
fn matches(kernel: u64, plain: u64, special: u64, bio_based: bool, leaves_out: &mut Option<bool>) -> bool {
    let (with, without) = (kernel == plain.wrapping_add(special), kernel == plain);
    if special == 0 || !bio_based {
        return with;
    }
    if with || without {
        return if *leaves_out.get_or_insert(without) { without } else { with };
    }
    false
}

/// By how much the kernel is ahead of the program when it is asked after it, at least: what completes between the two
/// questions makes it more, so both are asked until it is not above `known`, or nothing else can be the reason.
fn least_excess(mut counts: impl FnMut() -> io::Result<(Tally, DiskCounts)>, known: [i64; 2]) -> io::Result<[i64; 2]> {
    let mut least = [i64::MAX; 2];
    for _ in 0..ASKED_MAX {
        let (counted, kernel) = counts()?;
        let excess = ahead(&kernel, &counted);
        least = [least[0].min(excess[0]), least[1].min(excess[1])];
        if least[0] <= known[0] && least[1] <= known[1] {
            break;
        }
    }
    Ok(least)
}

impl Trust {
    /// Begins to measure: differences that are there now do not count.
    pub(super) fn new(instance: &Instance, devices: &[Device], now: Duration) -> io::Result<Self> {
        let (mut disks, mut counters) = (Vec::new(), Vec::new());
        for (index, disk) in disks_of(devices).into_iter().enumerate() {
            let counter = DiskCounter::open(disk)?;
            let kernel = counter.read()?;
            let bio_based = devices.iter().any(|device| device.disk == disk && device.kind == DeviceKind::Bio);
            disks.push(DiskTrust::new(disk, bio_based, &kernel, &instance.tally(index), now));
            counters.push(counter);
        }
        let mut trust = Self { disks, counters, events: instance.counts()? };
        let before = trust.before(instance)?;
        trust.judge(instance, &before, now)?;
        Ok(trust)
    }

    /// The counts before a flip: what was issued first, what is in flight last.
    pub(super) fn before(&self, instance: &Instance) -> io::Result<Before> {
        let counted = (0..self.disks.len()).map(|index| instance.tally(index)).collect();
        let kernel: io::Result<_> = self.counters.iter().map(DiskCounter::read).collect();
        Ok(Before { counted, kernel: kernel? })
    }

    /// A disk that had written more by the last flip than it has ever written now.
    pub(super) fn started_anew(&self, before: &Before) -> Option<DeviceNumber> {
        let mut disks = self.disks.iter().zip(&before.kernel);
        disks.find(|(disk, kernel)| kernel.written < disk.report.kernel_written).map(|(disk, _)| disk.disk)
    }

    /// Compares the counts before a flip with those after its barrier.
    pub(super) fn judge(&mut self, instance: &Instance, before: &Before, now: Duration) -> io::Result<Verdict> {
        let mut verdict = Verdict { lost: false, quiet: true, clean: true, doubt: None };
        for (index, (disk, counter)) in self.disks.iter_mut().zip(&self.counters).enumerate() {
            let counted = instance.tally(index);
            let of_disk = disk.judge(&before.kernel[index], &before.counted[index], &counted, now);
            let leaves_out = disk.leaves_out;
            let counts = || {
                let counted = instance.tally(index);
                Ok((counted, leaves_out.made_whole(&counter.completed()?, &counted)))
            };
            let excess = least_excess(counts, disk.ahead)?;
            let is_late = disk.is_late(excess);
            verdict.lost |= of_disk.lost || is_late;
            verdict.clean &= !disk.is_behind && !disk.may_hide;
            verdict.quiet &= of_disk.quiet;
            verdict.doubt = verdict.doubt.or(of_disk.doubt);
        }
        let events = instance.counts()?;
        verdict.lost |= events.complete_misses != self.events.complete_misses;
        verdict.quiet &= events.issue_misses == self.events.issue_misses;
        verdict.doubt = verdict.doubt.or_else(|| doubt_of(&self.events, &events));
        self.events = events;
        Ok(verdict)
    }

    /// The disks' counts at the last flip.
    pub(super) fn disks(&self) -> Vec<DiskReport> {
        self.disks.iter().map(|disk| disk.report.clone()).collect()
    }
}

/// What the programs themselves say that cannot be made good by marks.
fn doubt_of(before: &EventCounts, now: &EventCounts) -> Option<Cause> {
    let cause = |count: u64, what: &str, is_unmarked| {
        let reason = format!("{count} {what}");
        (count > 0).then_some(Cause { reason, is_unmarked, persists: false })
    };
    let unknown = now.unknown.wrapping_sub(before.unknown);
    let unremembered = now.unremembered.wrapping_sub(before.unremembered);
    let misses = now.issue_misses.wrapping_sub(before.issue_misses);
    cause(unknown, "writes completed of which nothing was known", true)
        .or_else(|| cause(misses, "writes were issued while the tracker was passed over", true))
        .or_else(|| cause(unremembered, "writes could not be kept in mind until they complete", false))
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: DiskCounts =
        DiskCounts { written: 100, discarded: 20, write_requests: 0, discard_requests: 0, in_flight: 0, is_off: false };

    const AT: Duration = Duration::from_secs(1);

    fn trust() -> DiskTrust {
        trust_in(false)
    }

    fn trust_in(bio_based: bool) -> DiskTrust {
        let mut trust = DiskTrust::new(DeviceNumber { major: 7, minor: 0 }, bio_based, &IDLE, &tally(0, 50), AT);
        assert!(!at_rest(&mut trust, &IDLE, &tally(0, 50)).quiet, "the first time nothing is known");
        assert!(at_rest(&mut trust, &IDLE, &tally(0, 50)).quiet);
        trust
    }

    fn tally(written: u64, issued: u64) -> Tally {
        Tally { written, issued, ..Tally::default() }
    }

    fn verdict(lost: bool, quiet: bool) -> Verdict {
        Verdict { lost, quiet, clean: true, doubt: None }
    }

    /// A flip during which nothing moves.
    fn at_rest(trust: &mut DiskTrust, kernel: &DiskCounts, counted: &Tally) -> Verdict {
        trust.judge(kernel, counted, counted, AT)
    }

    #[test]
    fn a_completion_the_program_did_not_see_is_noticed_once() {
        let mut trust = trust();
        assert_eq!(at_rest(&mut trust, &DiskCounts { written: 108, ..IDLE }, &tally(8, 58)), verdict(false, true));
        let kernel = DiskCounts { written: 116, ..IDLE };
        assert_eq!(at_rest(&mut trust, &kernel, &tally(8, 66)), verdict(true, true));
        assert_eq!(at_rest(&mut trust, &kernel, &tally(8, 66)), verdict(false, true));
    }

    #[test]
    fn a_lost_write_is_not_made_up_for_by_a_discard_the_kernel_does_not_count() {
        let mut trust = trust_in(true);
        let zeroed = Tally { discarded: 64, zeroed: 32, ..tally(8, 154) };
        let kernel = DiskCounts { written: 108, ..IDLE };
        assert_eq!(at_rest(&mut trust, &kernel, &zeroed), verdict(false, true), "zram counts neither");
        let kernel = DiskCounts { written: 116, ..IDLE };
        let more = Tally { discarded: 96, issued: 194, ..zeroed };
        assert!(at_rest(&mut trust, &kernel, &more).lost);
    }

    #[test]
    fn a_driver_that_is_not_known_yet_may_hide_a_loss_until_it_is_quiet() {
        let mut trust = trust_in(true);
        let seen = Tally { zeroed: 32, ..tally(0, 90) };
        let kernel = DiskCounts { in_flight: 1, ..IDLE };
        assert_eq!(at_rest(&mut trust, &kernel, &seen), verdict(false, false));
        assert!(!trust.is_late(ahead(&kernel, &seen)) && trust.may_hide);
        assert_eq!(at_rest(&mut trust, &IDLE, &Tally { issued: 82, ..seen }), verdict(false, true));
        assert!(!trust.is_late(trust.ahead) && !trust.may_hide, "it leaves zeroes out");
    }

    #[test]
    fn a_kernel_that_counts_less_keeps_everything_suspect() {
        let mut trust = trust();
        assert!(at_rest(&mut trust, &IDLE, &tally(8, 58)).lost, "the program saw more than the kernel");
        assert!(trust.is_behind);
        assert!(!at_rest(&mut trust, &IDLE, &tally(8, 58)).lost);
        assert!(!trust.is_behind, "nothing more has happened");
    }

    #[test]
    fn the_program_may_have_seen_more_by_the_time_it_is_asked() {
        let kernel = DiskCounts { in_flight: 1, ..IDLE };
        assert!(!trust().judge(&kernel, &tally(0, 58), &tally(8, 58), AT).lost);
    }

    #[test]
    fn it_is_not_quiet_while_a_write_is_anywhere_on_its_way() {
        assert!(!at_rest(&mut trust(), &DiskCounts { in_flight: 1, ..IDLE }, &tally(0, 50)).quiet);
        assert!(!at_rest(&mut trust(), &IDLE, &tally(0, 58)).quiet, "issued, and not yet with the driver");
        assert!(!trust().judge(&IDLE, &tally(0, 50), &tally(0, 58), AT).quiet, "issued during the flip");
        let late = trust().judge(&IDLE, &tally(0, 58), &tally(8, 58), AT);
        assert!(!late.quiet, "completed during the flip");
    }

    #[test]
    fn a_bio_that_never_became_a_request_is_not_waited_for_for_ever() {
        let mut trust = trust();
        let counted = tally(0, 58);
        assert!(!trust.judge(&IDLE, &counted, &counted, AT).quiet);
        assert!(!trust.judge(&IDLE, &counted, &counted, AT + STILL_FOR / 2).quiet);
        assert!(trust.judge(&IDLE, &counted, &counted, AT + STILL_FOR).quiet);
    }

    #[test]
    fn more_completed_than_issued_is_doubt_and_so_is_a_kernel_that_does_not_count() {
        let mut trust = trust();
        for number in 1..=u64::from(AGREED_MIN) {
            let kernel = DiskCounts { written: 100 + 8 * number, ..IDLE };
            assert_eq!(at_rest(&mut trust, &kernel, &tally(8 * number, 50 + 8 * number)).doubt, None);
        }
        let kernel = DiskCounts { written: 172, ..IDLE };
        let doubt = at_rest(&mut trust, &kernel, &tally(72, 114)).doubt.expect("doubt");
        assert!(doubt.is_unmarked && doubt.reason.contains("8 sectors that were never seen issued"));
        assert_eq!(at_rest(&mut trust, &kernel, &tally(72, 114)).doubt, None, "told once");
        let off = DiskCounts { is_off: true, ..kernel };
        assert!(at_rest(&mut trust, &off, &tally(72, 114)).doubt.expect("doubt").persists);
    }

    #[test]
    fn a_write_that_its_task_held_back_at_the_first_quiet_moment_is_no_missed_issue() {
        let mut trust = DiskTrust::new(DeviceNumber { major: 7, minor: 0 }, false, &IDLE, &tally(0, 52), AT);
        assert!(!at_rest(&mut trust, &IDLE, &tally(0, 52)).quiet);
        assert!(at_rest(&mut trust, &IDLE, &tally(0, 52)).quiet, "two sectors are announced and not with the driver");
        assert_eq!(at_rest(&mut trust, &DiskCounts { written: 102, ..IDLE }, &tally(2, 52)).doubt, None);
    }

    #[test]
    fn what_a_stacked_driver_sent_on_counts_as_issued() {
        let sent_on = Tally { remapped: 8, ..tally(8, 50) };
        assert_eq!(at_rest(&mut trust(), &DiskCounts { written: 108, ..IDLE }, &sent_on).doubt, None);
    }

    #[test]
    fn a_loss_that_later_completions_hide_is_seen_when_the_kernel_is_asked_last() {
        let mut trust = trust();
        // One of 8 sectors was lost before the flip; one was seen between the kernel's answer and the program's.
        let kernel = DiskCounts { written: 108, in_flight: 1, ..IDLE };
        assert!(!trust.judge(&kernel, &tally(0, 66), &tally(8, 66), AT).lost);
        let after = || Ok((tally(8, 66), DiskCounts { written: 116, ..IDLE }));
        let excess = least_excess(after, trust.ahead).expect("asked");
        assert!(trust.is_late(excess));
        assert!(!trust.is_late(excess), "once");
    }

    #[test]
    fn a_count_that_was_ahead_for_a_moment_does_not_hide_a_loss() {
        let mut trust = trust();
        // The kernel has counted 8 sectors that the program counts a moment later.
        let kernel = DiskCounts { written: 108, in_flight: 1, ..IDLE };
        assert!(trust.judge(&kernel, &tally(0, 58), &tally(0, 58), AT).lost, "it looks like a loss");
        assert!(!trust.is_late([0, 0]));
        let kernel = DiskCounts { written: 124, ..kernel };
        assert!(trust.judge(&kernel, &tally(8, 74), &tally(8, 74), AT).lost, "one of 8 sectors is lost");
    }

    #[test]
    fn a_request_that_the_program_counts_a_moment_before_the_kernel_raises_no_alarm_later() {
        let mut trust = trust();
        assert!(!trust.is_late([trust.ahead[0] - 8, trust.ahead[1]]));
        assert!(!at_rest(&mut trust, &DiskCounts { written: 108, ..IDLE }, &tally(8, 58)).lost);
    }

    #[test]
    fn a_disk_that_never_agrees_is_no_witness_until_it_does() {
        let mut trust = trust();
        let doubt = |trust: &mut DiskTrust, number: u64| {
            let seen = tally(8 * number, 50 + 8 * number);
            at_rest(trust, &IDLE, &seen).doubt.map(|doubt| doubt.persists)
        };
        for number in 1..u64::from(DISAGREEMENTS_MAX) {
            assert_eq!(doubt(&mut trust, number), None, "{number}");
        }
        assert_eq!(doubt(&mut trust, u64::from(DISAGREEMENTS_MAX)), Some(true));
        let (number, kernel) = (u64::from(DISAGREEMENTS_MAX) + 1, DiskCounts { written: 108, ..IDLE });
        assert_eq!(at_rest(&mut trust, &kernel, &tally(8 * number, 50 + 8 * number)).doubt, None);
    }

    #[test]
    fn a_loss_is_not_taken_for_what_another_kind_of_driver_does() {
        let mut trust = trust_in(true);
        let zeroed =
            |written: u64, zeroed: u64| Tally { written, zeroed, issued: 50 + written + zeroed, ..Tally::default() };
        let counts = |written: u64| DiskCounts { written: 100 + written, ..IDLE };
        assert!(!at_rest(&mut trust, &counts(8), &zeroed(8, 16)).lost, "it leaves zeroes out");
        // 16 more were zeroed, and a write of 16 was not seen.
        let lost = Tally { issued: 50 + 8 + 32 + 16, ..zeroed(8, 32) };
        assert_eq!(at_rest(&mut trust, &counts(24), &lost), verdict(true, true));
    }

    #[test]
    fn what_a_driver_leaves_out_hides_no_loss_where_it_is_never_quiet() {
        let mut trust = trust_in(true);
        let kernel = DiskCounts { written: 108, ..IDLE };
        let seen = Tally { zeroed: 32, discarded: 64, ..tally(8, 154) };
        assert_eq!(at_rest(&mut trust, &kernel, &seen), verdict(false, true), "it leaves both out");
        // From here on something is always in flight. More is zeroed than the write has sectors that is not seen.
        let seen = Tally { zeroed: 64, discarded: 128, issued: 154 + 32 + 64 + 8 + 8, ..seen };
        let kernel = DiskCounts { written: 116, in_flight: 1, ..IDLE };
        assert_eq!(at_rest(&mut trust, &kernel, &seen), verdict(true, false));
    }

    #[test]
    fn what_completes_between_two_questions_is_no_loss_if_once_nothing_does() {
        let mut asked = 0;
        let counts = || {
            asked += 1;
            let between = if asked < 40 { 8 } else { 0 };
            Ok((tally(8 * asked, 0), DiskCounts { written: 100 + 8 * asked + between, ..IDLE }))
        };
        let mut trust = trust();
        let excess = least_excess(counts, trust.ahead).expect("asked");
        assert_eq!(asked, 40);
        assert!(!trust.is_late(excess));
    }
}
