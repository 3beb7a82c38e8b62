//! The group's volumes: taken up, given up when they fail, and opened again.

use super::{Devices, Group, REOPEN_EVERY};
use cdp_protocol::units::blocks_in;

impl Group {
    /// Goes on with volumes that were opened: what is not acked of old is to be captured.
    pub(super) fn take_up(&mut self, mut devices: Devices) {
        let recovered = devices.tracker.take_recovered();
        self.ledger.carry_more(&recovered);
        let report = devices.tracker.report();
        self.hurry_unproved();
        let group = &self.setup.facts.name;
        if let Some(reason) = report.first_copy {
            tracing::info!(group, reason, "first copy");
        }
        if let Some(reason) = report.started_over {
            // Where nothing was ever acked there was nothing to interrupt.
            if self.memo.head().is_none() {
                tracing::info!(group, reason, "first copy");
            } else {
                tracing::warn!(group, reason, "tracking was interrupted: everything is compared");
                self.rescan = Some(reason);
            }
        }
        if let Some(record) = report.taken_up {
            tracing::info!(group, record, "the tracking goes on from the record of a clean stop");
        }
        self.devices = Some(devices);
        self.primed = false;
        self.trouble = None;
    }

    /// What was taken up from a saved change record, now or before this agent, is to be gone through by the audit soon.
    fn hurry_unproved(&mut self) {
        let Some(proofs) = &self.setup.proofs else { return };
        for (index, volume) in self.setup.facts.volumes.iter().enumerate() {
            if proofs.is_demanded(volume.slot) {
                self.audit.hurry(index, blocks_in(volume.size_bytes));
            }
        }
    }

    /// The volumes cannot be captured: no points until they can be opened again.
    pub(super) fn fail(&mut self, reason: String) {
        if self.trouble.as_ref() != Some(&reason) {
            tracing::error!(group = self.setup.facts.name, reason, "no recovery points: the volumes failed");
        }
        self.refuse_wanted(&reason);
        self.trouble = Some(reason);
        self.devices = None;
        self.audit.forget();
        self.reopen_at = self.setup.clock.monotonic() + REOPEN_EVERY;
    }

    pub(super) fn reopen(&mut self) {
        match (self.setup.opener)() {
            Ok(devices) => {
                tracing::info!(group = self.setup.facts.name, "the volumes are back");
                self.take_up(devices);
                self.retain();
                // Commits that were held back because their memo could not be stored are told again by the session only
                // on a new line; storing what is known now lets them go.
                if self.keep_memo() {
                    self.memo.sent.clone().into_iter().for_each(|head| self.link.proceed(head));
                }
            }
            Err(reason) => self.fail(reason),
        }
    }
}
