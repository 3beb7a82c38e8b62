//! The group's volumes: taken up, given up when they fail, and opened again.
//!
//! One that fails stops the points of all: a point without it would not be of one instant. What is written to the others is marked
//! meanwhile, by programs that run without the agent.

use super::{Devices, Group, REOPEN_EVERY};
use crate::capture::{BlockCounts, Capture, CapturedVolume};
use crate::reader::{self, BlockReader, ReadRequest};
use cdp_protocol::units::{Block, Extent, blocks_in};

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
        self.metering.begin(devices.tracker.written_bytes());
        if let Some(record) = report.taken_up {
            tracing::info!(group, record, "the tracking goes on from the record of a clean stop");
        }
        self.devices = Some(devices);
        (self.primed, self.instant) = (false, None);
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

    /// A volume of which this capture holds nothing but blocks that could not be read, more than were known, and of which nothing else
    /// can be read either: it is not some bad blocks, it is the volume.
    pub(super) fn dead_volume(&mut self, capture: &Capture) -> Option<usize> {
        let (ledger, unreadable) = (&self.ledger, capture.unreadable());
        let is_suspect = |(volume, counts): &(usize, BlockCounts)| {
            let BlockCounts { content, holes, unreadable: count } = *counts;
            count > 0 && content + holes == 0 && !ledger.are_known_unreadable(*volume, &unreadable[*volume])
        };
        let suspects = capture.volumes.iter().map(CapturedVolume::counts).enumerate().filter(is_suspect);
        let suspects: Vec<usize> = suspects.map(|(volume, _)| volume).collect();
        let reader = &mut *self.devices.as_mut()?.reader;
        let volumes = &self.setup.facts.volumes;
        suspects.into_iter().find(|volume| !can_read(reader, *volume, blocks_in(volumes[*volume].size_bytes)))
    }

    /// Nothing of a volume can be read.
    pub(super) fn fail_reading(&mut self, volume: usize) {
        let name = &self.setup.facts.volumes[volume].name;
        self.fail(format!("volume {name}: every block read came back with an error"));
    }

    /// The volumes cannot be captured: no points until they can be opened again.
    pub(super) fn fail(&mut self, reason: String) {
        if self.trouble.as_ref() != Some(&reason) {
            tracing::error!(group = self.setup.facts.name, reason, "no recovery points: the volumes failed");
        }
        self.refuse_wanted(&reason);
        self.trouble = Some(reason);
        (self.devices, self.instant) = (None, None);
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

/// Whether anything of a volume of `blocks` blocks can be read: its first block, its last, or one between.
fn can_read(reader: &mut dyn BlockReader, volume: usize, blocks: u64) -> bool {
    let last = blocks.saturating_sub(1);
    let request = |block: u64| ReadRequest { volume, extent: Extent { start: Block(block as u32), count: 1 } };
    let mut is_read = false;
    let read = reader::read_blocks(reader, &[0, last / 2, last].map(request), &mut |_, _, result| {
        is_read |= result.is_ok();
    });
    read.is_ok() && is_read
}
