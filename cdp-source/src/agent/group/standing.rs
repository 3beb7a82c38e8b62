//! How the group stands: what `status` and the metrics see.

use super::{FAILED_CUTS_MAX, Group, lock};
use crate::agent::ledger::to_bytes;
use crate::agent::status::{AuditStatus, GroupPhase, SpoolStatus};
use crate::spool::Waiting;
use cdp_protocol::units::Timestamp;
use roaring::RoaringBitmap;
use std::time::Duration;

impl Group {
    pub(super) fn publish(&self) {
        let (state, reason) = self.state();
        let now = Timestamp(self.setup.clock.wall_ms());
        let mut status = lock(&self.setup.status);
        status.state = state;
        status.reason = reason;
        status.restoring.clone_from(&self.restoring);
        status.captured_epoch = self.captured_epoch;
        status.sent_epoch = self.memo.sent.first().or(self.memo.acked.first()).map(|head| head.epoch);
        status.acked_epoch = self.memo.head().map(|head| head.epoch);
        status.acked_time = self.acked_time;
        status.unchanged_as_of = self.unchanged_as_of;
        let held = self.acked_time.max(self.unchanged_as_of);
        status.lag_ms = held.map(|time| now.0.saturating_sub(time.0).max(0) as u64);
        status.dirty_bytes = to_bytes(self.ledger.carried());
        status.unacked_epochs = self.ledger.unacked_epochs();
        status.unacked_bytes = self.ledger.unacked_bytes();
        status.spool = self.spool_status(now);
        status.acked_bytes = self.acked_bytes;
        status.unchanged_bytes = self.unchanged_bytes;
        let oldest_proof = self.setup.digests.oldest_proof(&self.ledger.skipped);
        let oldest_target_proof = self.setup.digests.oldest_proof_there();
        let hurried_bytes = to_bytes(self.audit.hurried_blocks());
        status.audit = AuditStatus { hurried_bytes, oldest_proof, oldest_target_proof, ..self.audit_counts };
        for (volume, meters) in status.volumes.iter_mut().zip(self.metering.since_start()) {
            volume.meters = *meters;
        }
        status.rescan_percent = self.rescan_percent();
        status.estimate_s = self.estimate_s();
        status.last_cut = self.last_cut;
        status.failed_cuts = self.failed_cuts;
        status.cuts_tried = self.cuts.tried;
        status.cuts_validated = self.cuts.validated;
        status.cuts_unchanged = self.cuts.unchanged;
        status.freezes = self.freezes;
        status.freeze_failure.clone_from(&self.freeze_failure);
        status.hooks = self.setup.hooks.as_ref().map(|_| self.hooks.clone());
        status.skipped_bytes = to_bytes(self.ledger.skipped.iter().map(RoaringBitmap::len).sum());
        if let Some(devices) = &self.devices {
            status.excludes = devices.exclusion.report();
            status.tracker = devices.tracker.report().into();
        }
    }

    fn spool_status(&self, now: Timestamp) -> SpoolStatus {
        let spool = &self.setup.spool;
        let Waiting { points, bytes, file_bytes, oldest } = spool.waiting();
        SpoolStatus {
            waiting_points: points,
            waiting_bytes: bytes,
            spooled_bytes: file_bytes,
            oldest_waiting: oldest,
            oldest_waiting_ms: oldest.map(|time| now.0.saturating_sub(time.0).max(0) as u64),
            merged_points: spool.merges(),
            failure: spool.failure().map(str::to_owned),
        }
    }

    /// Notes since when the line has something to catch up with.
    pub(super) fn note_progress(&mut self, now: Duration) {
        let (left, done) = self.ledger.left_and_done();
        let is_behind = left > 0 && self.open.is_some() && self.refused.is_none() && self.link.is_connected();
        self.behind_since = if is_behind { self.behind_since.or(Some((now, done))) } else { None };
    }

    /// At the speed since there is something left, block by block: holes count as what they are of the volume.
    fn estimate_s(&self) -> Option<u64> {
        let (since, done_before) = self.behind_since?;
        let (left, done) = self.ledger.left_and_done();
        let took = self.setup.clock.monotonic().saturating_sub(since).as_secs_f64();
        let blocks = done.checked_sub(done_before).filter(|blocks| *blocks > 0)?;
        Some((left as f64 * took / blocks as f64).ceil() as u64)
    }

    /// How far comparing has got.
    fn rescan_percent(&self) -> Option<u8> {
        self.rescan.as_ref()?;
        let all = self.ledger.volume_blocks().max(1);
        Some((100 - (100 * self.ledger.carried()).div_ceil(all).min(100)) as u8)
    }

    /// Why the tracker makes no cut possible now.
    fn doubt(&self) -> Option<String> {
        self.devices.as_ref()?.tracker.report().trust.doubt
    }

    pub(super) fn state(&self) -> (GroupPhase, Option<String>) {
        let many_failed = self.failed_cuts >= FAILED_CUTS_MAX;
        let has_point = self.open.is_some_and(|open| open.has_point);
        if let Some(reason) = self.no_points_because() {
            (GroupPhase::Stalled, Some(reason.clone()))
        } else if self.open.is_none() || !self.link.is_connected() {
            (GroupPhase::Disconnected, None)
        } else if let Some(reason) = &self.put_off {
            (GroupPhase::Stalled, Some(reason.clone()))
        } else if let Some(reason) = self.doubt() {
            (GroupPhase::Stalled, Some(format!("the tracking is in doubt: {reason}")))
        } else if many_failed {
            (GroupPhase::Stalled, Some(format!("{} cuts in a row did not validate", self.failed_cuts)))
        } else if let Some(reason) = &self.rescan {
            (GroupPhase::Rescan, Some(reason.clone()))
        } else if !has_point {
            (GroupPhase::Seeding, None)
        } else if !self.has_room() || self.is_too_large() || self.setup.spool.waiting().points > 0 {
            (GroupPhase::Backlog, None)
        } else {
            (GroupPhase::Continuous, None)
        }
    }
}
