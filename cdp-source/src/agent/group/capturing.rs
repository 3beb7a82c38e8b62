//! Capturing: parts while there is much, a cut when it fits; what becomes of either.
//!
//! Invariant: whatever is captured is in the ledger before it is encoded, and stays in `unacked` until it is acked.

use super::hooking::Taken;
use super::{FREEZE_AFTER, Group, Open, UNCHANGED_EVERY};
use crate::agent::encoding::Job;
use crate::agent::ledger::{Captured, to_bytes};
use crate::agent::status::CutStatus;
use crate::capture::Capture;
use crate::control::{PointReply, Reply};
use crate::cut::{self, Cut, CutError, Part};
use crate::exclusion::Skipping;
use crate::freeze::Frozen;
use cdp_protocol::codec::Sealer;
use cdp_protocol::record::layouts::Layouts;
use cdp_protocol::session::source::{CommitDraft, End};
use cdp_protocol::units::{AttemptId, Class, Epoch, Timestamp};
use cdp_seams::random;
use roaring::RoaringBitmap;
use std::sync::Arc;

/// Cuts since the agent's start. One that is too large is none: parts come first.
#[derive(Clone, Copy, Default)]
pub(super) struct Cuts {
    pub(super) tried: u64,
    pub(super) validated: u64,
    pub(super) unchanged: u64,
}

impl Group {
    /// Captures some of what is carried, while writes go on: durable at the target, or in the spool, and no recovery point before a cut takes
    /// it in.
    pub(super) fn part(&mut self) -> Result<(), CutError> {
        // A part's flip is nobody's who looks at what it gave.
        self.audit.forget();
        let now = self.setup.clock.monotonic();
        self.instant = self.instant.take().filter(|instant| !instant.is_stale(now));
        self.hold_instant()?;
        let blocks_max = self.part_blocks();
        let Some(devices) = &mut self.devices else { return Ok(()) };
        let skipping = Skipping::new(&mut *devices.exclusion, &mut self.ledger.skipped);
        let (tracker, reader, carry) = (&*devices.tracker, &mut *devices.reader, &mut self.ledger.carry);
        let part = cut::read_part(tracker, reader, carry, blocks_max, skipping, self.instant.as_mut())?;
        let Part { mut capture, is_conflicted } = part;
        if is_conflicted && self.instant.take().is_some() {
            tracing::debug!(group = self.setup.facts.name, "what a part read was written to: a later instant");
        }
        if let Some(volume) = self.dead_volume(&capture) {
            self.carry_again(&capture);
            self.fail_reading(volume);
            return Ok(());
        }
        self.take_out_unchanged(&mut capture);
        if !capture.is_empty() {
            self.send(capture, End::Part);
        }
        Ok(())
    }

    /// Flips the tracker before a part is read, where no instant is held. A tracker that compares takes its first look: without it the volume
    /// would be sent once in parts and once more by the first cut.
    fn hold_instant(&mut self) -> Result<(), CutError> {
        let Some(devices) = self.devices.as_mut().filter(|_| self.instant.is_none()) else { return Ok(()) };
        let sees_conflicts = devices.tracker.sees_conflicts();
        if self.primed && !sees_conflicts {
            return Ok(());
        }
        self.primed = true;
        let clock = Arc::clone(&self.setup.clock);
        let skipping = Skipping::new(&mut *devices.exclusion, &mut self.ledger.skipped);
        let held = cut::take_instant(&mut *devices.tracker, &*clock, &mut self.ledger.carry, skipping)?;
        self.instant = held.filter(|_| sees_conflicts);
        Ok(())
    }

    pub(super) fn cut(&mut self) -> Result<(), CutError> {
        let now = self.setup.clock.monotonic();
        // From the last one that was due, so that the interval does not grow by the cut's own time.
        let due = self.next_cut + self.setup.interval;
        self.next_cut = if due > now { due } else { now + self.setup.interval };
        let held = self.instant.take();
        // What is frozen now was not at that instant.
        let frozen = if held.is_some() { None } else { self.freeze_if_due() };
        let Some(devices) = &mut self.devices else { return Ok(()) };
        let clock = Arc::clone(&self.setup.clock);
        let skipping = Skipping::new(&mut *devices.exclusion, &mut self.ledger.skipped);
        let (tracker, reader) = (&mut *devices.tracker, &mut *devices.reader);
        let (carry, limits) = (&mut self.ledger.carry, &self.setup.limits);
        let cut = cut::cut_skipping(tracker, reader, &*clock, carry, limits, skipping, held);
        let class = frozen.map_or(Class::Crash, |frozen| self.thaw(frozen));
        let cut = cut?;
        self.cuts.count(&cut);
        self.note_rescan();
        let touched = match &cut {
            Cut::Captured(capture) => Some(capture.volumes.iter().map(|volume| volume.blocks().clone()).collect()),
            Cut::Unchanged { .. } => Some(vec![RoaringBitmap::new(); self.setup.facts.volumes.len()]),
            // What its flips gave, if there were any, is not all known here.
            Cut::TooLarge | Cut::NotValidated => None,
        };
        let is_validated = touched.is_some();
        if let Some(touched) = touched {
            self.audited(&touched);
            self.metering.found(touched);
        } else {
            self.audit.forget();
        }
        self.count_written();
        match cut {
            Cut::Captured(mut capture) => {
                let later = std::mem::take(&mut capture.later);
                let is_dead = !self.take_capture(capture, class);
                // Behind it: what is captured is carried no more, and some of this is the same blocks.
                self.ledger.carry_more(&later);
                if is_dead {
                    return Ok(());
                }
            }
            Cut::Unchanged { as_of } => self.unchanged(as_of),
            Cut::TooLarge => {
                // As soon as parts have left little enough: an interval later there may be too much again, for ever.
                self.next_cut = now;
                tracing::debug!(group = self.setup.facts.name, "too much for one cut: parts first");
            }
            Cut::NotValidated => {
                self.failed_cuts += 1;
                tracing::debug!(group = self.setup.facts.name, failed = self.failed_cuts, "the cut did not validate");
            }
        }
        if is_validated {
            self.audit();
        }
        Ok(())
    }

    /// What becomes of a cut; `false` where a volume of it does not answer any more.
    fn take_capture(&mut self, mut capture: Capture, class: Class) -> bool {
        if let Some(volume) = self.dead_volume(&capture) {
            self.carry_again(&capture);
            self.fail_reading(volume);
            return false;
        }
        self.take_out_unchanged(&mut capture);
        if capture.is_empty() {
            self.unchanged(capture.cut_time);
        } else {
            self.captured(capture, class);
        }
        true
    }

    /// A capture that becomes nothing is to be made again.
    fn carry_again(&mut self, capture: &Capture) {
        let blocks: Vec<_> = capture.volumes.iter().map(|volume| volume.blocks().clone()).collect();
        self.ledger.carry_more(&blocks);
    }

    /// Freezes the file systems for this cut, where so many before it did not validate. Where it does not help, as many
    /// cuts are made without before it is tried again.
    fn freeze_if_due(&mut self) -> Option<Frozen> {
        if self.failed_cuts % (FREEZE_AFTER + 1) != FREEZE_AFTER {
            return None;
        }
        let group = &self.setup.facts.name;
        let freezer = self.setup.freezer.as_ref()?;
        tracing::info!(group, failed = self.failed_cuts, "cuts did not validate: freezing the file systems for one");
        match freezer.freeze() {
            Ok(frozen) => {
                // For tests alone: the log may lie on what is frozen.
                tracing::debug!(group, "frozen");
                self.freezes += 1;
                self.freeze_failure = None;
                Some(frozen)
            }
            Err(error) => {
                self.freeze_failed(format!("{:#}", anyhow::Error::new(error)));
                None
            }
        }
    }

    /// What a point of a cut made meanwhile is worth.
    fn thaw(&mut self, frozen: Frozen) -> Class {
        if frozen.thaw() {
            return Class::Filesystem;
        }
        self.freeze_failed("it was thawed at the deadline, before the cut was made".into());
        Class::Crash
    }

    fn freeze_failed(&mut self, reason: String) {
        if self.freeze_failure.as_ref() != Some(&reason) {
            tracing::warn!(group = self.setup.facts.name, reason, "no cut with frozen file systems");
        }
        self.freeze_failure = Some(reason);
    }

    /// What was marked and holds what the target has of it, after all, is not sent.
    fn take_out_unchanged(&mut self, capture: &mut Capture) {
        let unchanged = self.setup.digests.take_out_unchanged(capture);
        self.metering.captured(&unchanged, capture);
        let blocks: u64 = unchanged.iter().map(RoaringBitmap::len).sum();
        if blocks > 0 {
            self.ledger.unchanged(&unchanged);
            self.unchanged_bytes += to_bytes(blocks);
            self.retain_soon();
        }
    }

    /// Whether the tracker has made everything dirty by itself, and why, for `status`.
    fn note_rescan(&mut self) {
        let Some(devices) = &self.devices else { return };
        let trust = devices.tracker.report().trust;
        // A tracker that was opened anew counts from 0.
        if trust.rescans > self.rescans {
            self.rescan = trust.rescanned;
        }
        self.rescans = trust.rescans;
    }

    /// Asks the tracker what was written.
    fn count_written(&mut self) {
        if let Some(devices) = &self.devices {
            self.metering.written(devices.tracker.written_bytes());
        }
    }

    /// Blocks that the tracker gave again since this was asked last, in no trust.
    fn take_recaptured(&mut self) -> u64 {
        let Some(devices) = &self.devices else { return 0 };
        let all = devices.tracker.report().trust.recaptured_blocks;
        // A tracker that was opened anew counts from 0.
        let new = all.checked_sub(self.recaptured_blocks).unwrap_or(all);
        self.recaptured_blocks = all;
        new
    }

    pub(super) fn captured(&mut self, mut capture: Capture, class: Class) {
        let Some(open) = self.open else { return };
        capture.meters.recaptured_blocks = self.take_recaptured();
        self.failed_cuts = 0;
        self.unchanged_as_of = None;
        self.last_cut = Some(CutStatus {
            time: capture.cut_time,
            rounds: capture.meters.cut_rounds,
            cut_us: capture.meters.cut_us,
            blocks: capture.meters.dirty_blocks,
        });
        let Taken { request, class, warning } = self.take_request(open.next_epoch, class);
        let label = request.as_ref().and_then(|request| request.label.clone());
        let first = self.ledger.unacked_epochs() == 0;
        let draft = CommitDraft {
            class,
            cut_time: capture.cut_time,
            meters: capture.meters,
            first_epoch: open.next_epoch,
            after_rollback_to: open.after_rollback_to.filter(|_| first),
            label: label.clone(),
            volumes: self.metering.take(),
            layouts: self.take_layouts(&capture),
        };
        let point = PointReply { epoch: open.next_epoch, time: capture.cut_time, label, acked: false, class, warning };
        self.captured_epoch = Some(open.next_epoch);
        self.send(capture, End::Commit(draft));
        self.open = Some(Open { next_epoch: Epoch(open.next_epoch.0 + 1), ..open });
        if let Some(request) = request {
            if request.wait {
                self.awaited.push((point, request.reply));
            } else {
                // Whoever asked may have gone; the point stands all the same.
                let _ = request.reply.send(Reply::Point(point));
            }
        }
    }

    /// What is told of the disks of this capture.
    fn take_layouts(&mut self, capture: &Capture) -> Layouts {
        let (Some(layouts), Some(devices)) = (&mut self.setup.layouts, &mut self.devices) else {
            return Layouts::new();
        };
        layouts.captured(capture);
        layouts.take(&mut *devices.reader)
    }

    /// Nothing has changed since the last capture. A point that was asked for is made all the same, so that its name has
    /// something to stand on; and one that takes in parts behind which nothing came: what they hold is in no point before it.
    pub(super) fn unchanged(&mut self, as_of: Timestamp) {
        let Some(open) = self.open else { return };
        self.failed_cuts = 0;
        let has_no_point = !open.has_point && self.ledger.unacked_epochs() == 0;
        if self.is_point_due() || has_no_point || self.are_parts_open() {
            let mut capture = Capture::new(self.setup.facts.volumes.len());
            capture.cut_time = as_of;
            capture.meters.cut_rounds = 1;
            return self.captured(capture, Class::Crash);
        }
        let Some(head) = self.memo.head().filter(|_| self.ledger.is_acked() && !self.is_put_off) else { return };
        self.put_off = None;
        // All of it was compared, and none of it differs.
        self.rescan = None;
        self.unchanged_as_of = Some(as_of);
        let now = self.setup.clock.monotonic();
        if self.told_unchanged.is_none_or(|told| now >= told + UNCHANGED_EVERY) {
            self.told_unchanged = Some(now);
            self.link.unchanged(head.epoch, as_of);
        }
    }

    /// Whether parts were captured, acked or not, that no cut has taken in.
    fn are_parts_open(&self) -> bool {
        self.ledger.newest().map_or(self.memo.parts.is_some(), |captured| captured.is_part)
    }

    /// Seals a capture under a fresh attempt and hands it to the encoder.
    pub(super) fn send(&mut self, capture: Capture, end: End) {
        let Some(open) = self.open else { return };
        if let Some(layouts) = self.setup.layouts.as_mut().filter(|_| end == End::Part) {
            layouts.captured(&capture);
        }
        let attempt = AttemptId(random::array(&*self.setup.random));
        let group = self.setup.facts.group;
        let sealer = Sealer::new(group, open.next_epoch, open.generation, attempt, &self.setup.data_key);
        let blocks: Arc<Vec<_>> = Arc::new(capture.volumes.iter().map(|volume| volume.blocks().clone()).collect());
        let unreadable = capture.unreadable();
        self.setup.digests.captured(open.next_epoch, attempt, Arc::clone(&blocks), unreadable.clone());
        let captured = Captured {
            epoch: open.next_epoch,
            attempt,
            is_part: end == End::Part,
            cut_time: capture.cut_time,
            blocks,
            bytes: to_bytes(capture.meters.content_blocks),
        };
        self.ledger.capture(captured, &unreadable);
        self.encoding.submit(Job { capture, sealer: Arc::new(sealer), end });
    }
}

impl Cuts {
    fn count(&mut self, cut: &Cut) {
        let (tried, validated, unchanged) = match cut {
            Cut::Captured(_) => (1, 1, 0),
            Cut::Unchanged { .. } => (1, 1, 1),
            Cut::NotValidated => (1, 0, 0),
            Cut::TooLarge => (0, 0, 0),
        };
        self.tried += tried;
        self.validated += validated;
        self.unchanged += unchanged;
    }
}
