//! The audit of a group: reads after a cut, and what is found at the next one; questions to the target, and what it answers.

use super::Group;
use crate::agent::status::TargetDifference;
use crate::audit::line::LineAudit;
use crate::audit::{Found, Look};
use crate::digests::{Answer, Told};
use crate::reader;
use cdp_protocol::codec;
use cdp_protocol::holding::{self, Held, Holding};
use cdp_protocol::units::{Block, Extent, Head, Timestamp, VolumeSlot};
use roaring::RoaringBitmap;
use std::time::Duration;

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
        self.send_again_all(volume, blocks);
    }

    /// Whatever is known of these blocks is not so: the next capture has them.
    fn send_again_all(&mut self, volume: usize, blocks: &RoaringBitmap) {
        let extents = reader::runs(blocks, u32::MAX);
        self.setup.digests.forget(self.setup.facts.volumes[volume].slot, &extents);
        self.ledger.carry_again(volume, &extents);
        self.retain_soon();
    }

    /// Asks the target what it holds of some blocks, where it is time to.
    pub(super) fn audit_over_line(&mut self, now: Duration) {
        let is_possible = self.open.is_some() && self.refused.is_none() && self.rescan.is_none();
        let digests = &self.setup.digests;
        let Some(head) = digests.head().filter(|_| is_possible && self.link.is_connected()) else { return };
        let audit = self.line_audit.get_or_insert_with(|| LineAudit::new(digests.stalest_there()));
        let (sizes, line) = (digests.volume_blocks(), self.link.bytes_per_s());
        if let Some(question) = audit.question(&sizes, self.setup.audit_interval, line, now) {
            self.link.list_digests(head, self.setup.facts.volumes[question.volume].slot, question.blocks);
        }
    }

    /// The target tells what it holds of some blocks: of what was asked, as far as the answer goes.
    pub(super) fn told(&mut self, head: Head, slot: VolumeSlot, start: Block, holdings: &[Holding]) {
        let Some(audit) = &mut self.line_audit else { return };
        let is_asked =
            |volume: usize, blocks: Extent| self.setup.facts.volumes[volume].slot == slot && blocks.start == start;
        let Some(question) = audit.asked().filter(|asked| is_asked(asked.volume, asked.blocks)) else { return };
        let bytes: usize = holdings.iter().map(|holding| holding.held.bytes()).sum();
        self.audit_counts.target_bytes += bytes as u64;
        let is_of_use = self.setup.digests.head() == Some(head);
        let told = if is_of_use { self.open_holdings(slot, question.blocks, holdings) } else { Vec::new() };
        let Some(blocks) = Extent::new(start, told.len() as u32) else { return self.line_answered(0, bytes) };
        self.line_answered(blocks.count, bytes);
        let now = Timestamp(self.setup.clock.wall_ms());
        let answers = self.setup.digests.compare_told(question.volume, blocks, &told, head, now);
        let is = |wanted: Answer| blocks.blocks().zip(&answers).filter(move |(_, answer)| **answer == wanted);
        self.audit_counts.target_proved_blocks += is(Answer::Same).count() as u64;
        let differing: RoaringBitmap = is(Answer::Differs).map(|(block, _)| block.0).collect();
        if let Some(first_block) = differing.min() {
            let blocks = differing.len();
            self.audit_counts.target_differing_blocks += blocks;
            self.audit_counts.target_difference = Some(TargetDifference { time: now, slot, first_block, blocks });
            let (group, point) = (&self.setup.facts.name, head.epoch);
            tracing::error!(
                group,
                %slot,
                %point,
                first_block,
                blocks,
                "the target holds something else of blocks than it was sent: its store is to be looked at; they are sent again"
            );
            self.send_again_all(question.volume, &differing);
        }
    }

    fn line_answered(&mut self, blocks: u32, bytes: usize) {
        if let Some(audit) = &mut self.line_audit {
            audit.answered(blocks, bytes);
        }
    }

    /// What is said of each of the first blocks of `asked`, as far as the holdings go.
    fn open_holdings(&self, slot: VolumeSlot, asked: Extent, holdings: &[Holding]) -> Vec<Told> {
        let (group, key) = (&self.setup.facts.group, &self.setup.data_key);
        let mut told = Vec::new();
        for Holding { count, held } in holdings {
            let left = asked.count - told.len() as u32;
            // More than was asked is none of an answer's, and nothing lies behind the last block.
            if *count == 0 || *count > left {
                break;
            }
            let blocks = Extent { start: Block(asked.start.0 + told.len() as u32), count: *count };
            let alike = |told: Told| vec![told; blocks.count as usize];
            told.extend(match held {
                Held::Nothing | Held::Unreadable => alike(Told::Nothing),
                Held::Hole => alike(Told::Held(Found::Hole)),
                Held::Damaged => alike(Told::Damaged),
                Held::Frame { header, digests } => holding::open(group, slot, blocks, (header, digests), key)
                    .map_or_else(
                        |_| alike(Told::Nothing),
                        |digests| digests.into_iter().map(|digest| Told::Held(Found::Content(digest))).collect(),
                    ),
            });
        }
        told
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
