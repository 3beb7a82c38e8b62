//! The audit of a group: reads after a cut, and what is found at the next one.

use super::Group;
use crate::audit::{Found, Look};
use crate::digests::Answer;
use crate::reader;
use cdp_protocol::codec;
use cdp_protocol::units::Timestamp;
use roaring::RoaringBitmap;

impl Group {
    /// A cut is over. `touched`: every block that its flips gave.
    pub(super) fn audited(&mut self, touched: &[RoaringBitmap]) {
        let now = Timestamp(self.setup.clock.wall_ms());
        let mut differing = vec![RoaringBitmap::new(); touched.len()];
        for Look { volume, block, found } in self.audit.flipped(touched) {
            let answer = self.setup.digests.compare(volume, block, found, now);
            if answer != Answer::NotNow {
                self.audit.done(volume, block);
            }
            match answer {
                Answer::Same => self.audit_counts.proved_blocks += 1,
                Answer::Learnt => self.audit_counts.learnt_blocks += 1,
                Answer::Differs => _ = differing[volume].insert(block.0),
                Answer::NotNow => {}
            }
        }
        for (volume, blocks) in differing.iter().enumerate().filter(|(_, blocks)| !blocks.is_empty()) {
            self.send_differing(volume, blocks);
        }
        self.note_finished();
    }

    /// Volumes that were taken up from a saved change record, and have been gone through since.
    fn note_finished(&mut self) {
        let (group, volumes) = (&self.setup.facts.name, &self.setup.facts.volumes);
        for volume in self.audit.take_finished() {
            let slot = volumes[volume].slot;
            tracing::info!(group, %slot, "the volume was gone through since it was taken up from the last stop's record");
            if let Some(proofs) = &self.setup.proofs {
                proofs.give(slot);
            }
        }
    }

    /// Blocks that nobody is known to have written to hold something else than the target does: a write was missed.
    fn send_differing(&mut self, volume: usize, blocks: &RoaringBitmap) {
        self.audit_counts.differing_blocks += blocks.len();
        let slot = self.setup.facts.volumes[volume].slot;
        tracing::error!(
            group = self.setup.facts.name,
            %slot,
            first_block = blocks.min(),
            blocks = blocks.len(),
            "the target holds something else of blocks that nobody is known to have written to: a write was missed; they are sent again"
        );
        let extents = reader::runs(blocks, u32::MAX);
        self.setup.digests.forget(slot, &extents);
        self.ledger.carry_again(volume, &extents);
        self.retain_soon();
    }

    /// Reads some of what nobody writes to, where nothing was in flight at the last flip. What cannot be read is passed over: the next
    /// capture will find it.
    pub(super) fn audit(&mut self) {
        let Some(devices) = self.devices.as_mut().filter(|devices| devices.tracker.was_quiet()) else { return };
        if !self.setup.digests.is_ready() || self.memo.head().is_none() || self.rescan.is_some() {
            return;
        }
        let now = self.setup.clock.monotonic();
        let requests = self.audit.requests(&self.setup.digests, &self.ledger.unacked(), self.setup.audit_interval, now);
        let (audit, digests) = (&mut self.audit, &self.setup.digests);
        let read = reader::read_blocks(&mut *devices.reader, &requests, &mut |volume, block, result| {
            let Ok(bytes) = result else { return audit.done(volume, block) };
            let found = if codec::is_zero(bytes) { Found::Hole } else { Found::Content(digests.digest(bytes)) };
            audit.looked(Look { volume, block, found });
        });
        if let Err(error) = read {
            tracing::debug!(group = self.setup.facts.name, %error, "the audit could not read");
            self.audit.forget();
        }
    }
}
