//! Merging: of two points that wait, one behind the other, the older goes, and what it alone holds becomes parts of the younger.
//!
//! The newest content of each block stays, under the higher number, and the commit names the lowest number that it stands for. What has to
//! be sealed under another number is opened and sealed anew, each piece as an attempt of its own; the younger's own frames stay as they
//! are. So memory holds one attempt of the older and one piece, however large the points are.
//!
//! A crash in between leaves the index of before: the pieces lie in slabs that it does not name.

use super::thin::{self, Candidate};
use super::{Entry, HeldIn, Keys, Spool, SpoolError, contents::Held};
use crate::agent::ledger::Blocks;
use crate::capture::{Capture, CapturedVolume};
use crate::encoder::{BlockDigests, EncodedAttempt, Encoder, FrameMeters};
use bytes::Bytes;
use cdp_protocol::codec::Sealer;
use cdp_protocol::frame::Kind;
use cdp_protocol::record::volume_meters::VolumeMeters;
use cdp_protocol::record::{Begin, Meters, layouts};
use cdp_protocol::session::memo::Memo;
use cdp_protocol::session::source::{CommitDraft, End, Outgoing};
use cdp_protocol::units::{AttemptId, BLOCK_BYTES, Block, Class, Epoch, Generation, Timestamp};
use cdp_seams::random::{self, Random};
use roaring::RoaringBitmap;
use std::ops::Range;
use std::sync::Arc;

/// Blocks with content of one piece: 8 MiB.
const PIECE_BLOCKS: u64 = (8 << 20) / BLOCK_BYTES as u64;
/// A merge for the sake of room has to give back a byte for so many that it seals anew.
const SEALED_FOR_A_BYTE: u64 = 4;
/// How many points are merged at a time where they have become too many: one of so many.
const THINNED_SHARE: u64 = 8;

/// Bytes that one merge seals anew, where another can be made instead.
const PRICE_MAX: u64 = 64 << 20;

/// What content is sealed anew with.
pub struct Reseal<'a> {
    /// Opens what was sealed.
    pub keys: Keys<'a>,
    /// Names the key, in each attempt.
    pub begin: &'a Begin,
    /// Encodes.
    pub encoder: &'a Encoder,
    /// Ids of attempts.
    pub random: &'a dyn Random,
}

/// A point went.
pub struct Merged {
    /// Its number.
    pub gone: Epoch,
    /// The one that it is part of now.
    pub into: Epoch,
    /// The attempts that it was made of, which nobody will hear of.
    pub attempts: Vec<AttemptId>,
    /// What stands in their place.
    pub pieces: Vec<Piece>,
}

/// An attempt that was sealed anew, a part of the younger point.
pub struct Piece {
    /// The attempt.
    pub attempt: AttemptId,
    /// What it holds.
    pub blocks: Arc<Blocks>,
    /// What of it could not be read when it was captured.
    pub unreadable: Blocks,
    /// What it amounts to.
    pub meters: Meters,
    /// What it holds of each volume.
    pub volumes: Vec<VolumeMeters>,
    /// Bytes of its frames.
    pub bytes: u64,
    /// The digests of what it holds; none where its frames are in the file.
    pub digests: Option<Vec<BlockDigests>>,
}

/// A piece that was sealed: the attempt, its digests, what it is of, and what its frames came to.
type Sealed = (Outgoing, Vec<BlockDigests>, Capture, Vec<FrameMeters>);

/// A point that waits: its attempts among the entries.
struct Span {
    epoch: Epoch,
    time: Timestamp,
    is_asked_for: bool,
    entries: Range<usize>,
}

impl Spool {
    /// Whether points are to be merged now, of so many that are not acked.
    #[must_use]
    pub fn is_merge_due(&self, unacked_points: u64) -> bool {
        self.is_on() && (self.is_to_thin(unacked_points) || self.is_full) && !self.is_stuck
    }

    /// Whether there are too many points: once there are, until an eighth of them is gone, so that the file is not written for each.
    fn is_to_thin(&self, unacked_points: u64) -> bool {
        let points_max = self.limits.points_max;
        let enough = points_max - points_max.div_ceil(THINNED_SHARE);
        unacked_points >= points_max || self.is_thinning && unacked_points > enough
    }

    /// Merges the point into the one behind it that is missed least. `is_awaited`: whether somebody waits for a point of that number.
    ///
    /// # Errors
    /// Where one is damaged or cannot be read.
    pub fn merge(
        &mut self,
        (unacked_points, now): (u64, Timestamp),
        is_awaited: impl Fn(Epoch) -> bool,
        reseal: &Reseal<'_>,
        memo: &Memo,
    ) -> Result<Option<Merged>, SpoolError> {
        self.is_thinning = self.is_to_thin(unacked_points);
        let spans = self.spans(is_awaited);
        let mut merged = None;
        // Cuts wait meanwhile: where there is one that takes little, none that takes much.
        for price_max in [PRICE_MAX, u64::MAX] {
            if merged.is_none() && self.failure.is_none() {
                merged = self.merge_one(&spans, (price_max, now), reseal, memo)?;
            }
        }
        match &merged {
            Some(_) => self.changed(),
            None => self.is_stuck = true,
        }
        Ok(merged)
    }

    /// The same of those that cost no more than `price_max`.
    fn merge_one(
        &mut self,
        spans: &[Span],
        (price_max, now): (u64, Timestamp),
        reseal: &Reseal<'_>,
        memo: &Memo,
    ) -> Result<Option<Merged>, SpoolError> {
        let candidate = |span: &Span| Candidate { time: span.time.0, may_go: true, is_wanted: span.is_asked_for };
        let mut candidates: Vec<Candidate> = spans.iter().map(candidate).collect();
        // Where there was none for one, nothing is left but what takes none.
        let mut price_max = price_max;
        // What it comes to is looked at only of one that would go.
        while let Some(at) = thin::choose(&candidates, self.before.0, now.0) {
            let (older, younger) = (&spans[at], &spans[at + 1]);
            let may_go = if self.is_thinning { self.fits(older, younger) } else { self.pays(older, younger) };
            if may_go && self.price(older, younger) <= price_max {
                let merged = self.merge_into(older, younger, reseal, memo)?;
                if merged.is_some() || self.failure.is_some() {
                    return Ok(merged);
                }
                price_max = 0;
            }
            candidates[at].may_go = false;
        }
        Ok(None)
    }

    /// The points that wait and of which nothing may have been sent, and that are whole.
    fn spans(&self, is_awaited: impl Fn(Epoch) -> bool) -> Vec<Span> {
        let (mut spans, mut start) = (Vec::new(), self.handed);
        for (at, entry) in self.entries.iter().enumerate().skip(self.handed) {
            let End::Commit(draft) = &entry.end else { continue };
            if self.begun.is_none_or(|begun| entry.epoch > begun) {
                spans.push(Span {
                    epoch: entry.epoch,
                    time: draft.cut_time,
                    is_asked_for: draft.label.is_some() || draft.class == Class::Application || is_awaited(entry.epoch),
                    entries: start..at + 1,
                });
            }
            start = at + 1;
        }
        spans
    }

    /// Bytes of the older one that would have to be sealed anew.
    fn price(&self, older: &Span, younger: &Span) -> u64 {
        let (all, covering) = (self.union(&older.entries), self.union(&younger.entries));
        let count = |blocks: &Blocks| blocks.iter().map(RoaringBitmap::len).sum::<u64>();
        let covered: u64 = all.iter().zip(&*covering).map(|(all, covering)| all.intersection_len(covering)).sum();
        let bytes: u64 = self.entries.range(older.entries.clone()).map(|entry| entry.bytes).sum();
        bytes - (u128::from(bytes) * u128::from(covered) / u128::from(count(&all).max(1))) as u64
    }

    /// Whether there is room to seal the older one's blocks anew.
    fn fits(&self, older: &Span, younger: &Span) -> bool {
        let is_in_memory =
            self.entries.range(older.entries.clone()).all(|entry| matches!(entry.held, HeldIn::Memory(_)));
        is_in_memory || self.file.as_ref().is_some_and(|file| self.price(older, younger) < file.free_bytes())
    }

    /// Whether merging gives back enough for what it takes.
    fn pays(&self, older: &Span, younger: &Span) -> bool {
        let Some(file) = &self.file else { return false };
        let sealed = self.price(older, younger);
        let slabs = if sealed == 0 { 0 } else { file.slabs_for(sealed) };
        let held: u64 = self.entries.range(older.entries.clone()).map(|entry| file.slabs_for(entry.bytes)).sum();
        let given_back = held.saturating_sub(slabs);
        given_back > 0 && given_back * SEALED_FOR_A_BYTE >= slabs && sealed < file.free_bytes()
    }

    fn union(&self, entries: &Range<usize>) -> Arc<Blocks> {
        let first = &self.entries[entries.start].blocks;
        if entries.len() == 1 {
            return Arc::clone(first);
        }
        let mut union = first.as_ref().clone();
        for entry in self.entries.range(entries.start + 1..entries.end) {
            union.iter_mut().zip(&*entry.blocks).for_each(|(union, blocks)| *union |= blocks);
        }
        Arc::new(union)
    }

    /// `None` where there was no room, or the file cannot be written: then nothing has changed.
    fn merge_into(
        &mut self,
        older: &Span,
        younger: &Span,
        reseal: &Reseal<'_>,
        memo: &Memo,
    ) -> Result<Option<Merged>, SpoolError> {
        let is_in_file = matches!(self.entries[older.entries.start].held, HeldIn::File(_));
        let mut sealed: Vec<(Entry, Piece)> = Vec::new();
        let is_all = self.reseal(older, younger, reseal, &mut |spool, piece| {
            let kept = spool.keep_piece(piece, is_in_file, memo);
            let is_kept = is_in_file == matches!(kept.0.held, HeldIn::File(_));
            sealed.push(kept);
            is_kept
        });
        if !matches!(is_all, Ok(true)) {
            self.forget_pieces(&sealed);
            return is_all.map(|_| None);
        }
        let (entries, pieces): (Vec<Entry>, Vec<Piece>) = sealed.into_iter().unzip();
        let before: Vec<Entry> = self.entries.drain(older.entries.clone()).collect();
        let commit = &mut self.entries[older.entries.start + younger.entries.len() - 1];
        if let (Some(End::Commit(older)), End::Commit(younger)) =
            (before.last().map(|entry| &entry.end), &mut commit.end)
        {
            take_in(younger, older, &pieces);
        }
        for (at, entry) in entries.into_iter().enumerate() {
            self.entries.insert(older.entries.start + at, entry);
        }
        if let Some(file) = &mut self.file {
            for entry in &before {
                if let HeldIn::File(place) = &entry.held {
                    file.give_back(place);
                }
            }
        }
        if is_in_file {
            // Where it cannot be written, the one before stays: it names what is still in its place.
            match self.write_index(memo) {
                Ok(true) => {}
                Ok(false) => self.failure = Some("its index has no room".into()),
                Err(error) => self.failure = Some(error.to_string()),
            }
        }
        self.merges += 1;
        let attempts = before.iter().map(|entry| entry.attempt).collect();
        Ok(Some(Merged { gone: older.epoch, into: younger.epoch, attempts, pieces }))
    }

    /// Seals what the older one alone holds anew, piece by piece; `false` where a piece was not taken.
    fn reseal(
        &mut self,
        older: &Span,
        younger: &Span,
        reseal: &Reseal<'_>,
        give: &mut dyn FnMut(&mut Self, Sealed) -> bool,
    ) -> Result<bool, SpoolError> {
        let mut covered = self.union(&younger.entries).as_ref().clone();
        let mut capture = Capture::new(covered.len());
        // From the newest attempt of the point back: what it holds covers what those before it do.
        for at in older.entries.clone().rev() {
            let entry = &self.entries[at];
            let (attempt, generation, blocks) = (entry.attempt, entry.sealer.generation(), Arc::clone(&entry.blocks));
            let bytes = self.load(entry)?;
            let damaged = || Self::error(&self.entries[at], "its frames are not what was written");
            let frames = reseal.keys.frames(attempt, entry.list, &bytes).ok_or_else(damaged)?;
            let key = reseal.keys.data_key.attempt_key(&attempt);
            for frame in frames.iter().filter(|frame| frame.header.kind == Kind::Extents) {
                let put = |volume: usize, block: Block, held: Held<'_>| {
                    if covered[volume].contains(block.0) {
                        return;
                    }
                    match held {
                        Held::Bytes(bytes) => capture.volumes[volume].put(block, bytes),
                        Held::Zero => capture.volumes[volume].put_zero(block),
                        Held::Unreadable => capture.volumes[volume].put_unreadable(block),
                    }
                };
                reseal
                    .keys
                    .each_block(frame, &key, put)
                    .ok_or_else(|| Self::error(&self.entries[at], "its content cannot be opened"))?;
                capture.count();
                if capture.meters.content_blocks >= PIECE_BLOCKS {
                    let full = std::mem::replace(&mut capture, Capture::new(covered.len()));
                    let piece = seal(full, younger.epoch, generation, reseal);
                    if !give(self, piece) {
                        return Ok(false);
                    }
                }
            }
            covered.iter_mut().zip(&*blocks).for_each(|(covered, blocks)| *covered |= blocks);
        }
        if capture.is_empty() {
            return Ok(true);
        }
        let generation = self.entries[older.entries.start].sealer.generation();
        let piece = seal(capture, younger.epoch, generation, reseal);
        Ok(give(self, piece))
    }

    /// A piece as an entry, in the file where its point is. Where there is no room for it, it stays in memory, which its maker looks at.
    fn keep_piece(
        &mut self,
        (mut outgoing, digests, capture, frames): Sealed,
        is_in_file: bool,
        memo: &Memo,
    ) -> (Entry, Piece) {
        let blocks: Arc<Blocks> = Arc::new(capture.volumes.iter().map(|volume| volume.blocks().clone()).collect());
        let mut piece = Piece {
            attempt: outgoing.attempt,
            blocks: Arc::clone(&blocks),
            unreadable: capture.unreadable(),
            meters: capture.meters,
            volumes: capture
                .volumes
                .iter()
                .zip(&frames)
                .map(|(captured, frames)| sealed_anew(captured, frames))
                .collect(),
            bytes: outgoing.bytes,
            digests: Some(digests),
        };
        if !is_in_file {
            return (Entry::new(outgoing, blocks), piece);
        }
        let frames: Vec<Bytes> = std::mem::take(&mut outgoing.frames);
        let written = self.write(&frames, true, memo);
        let mut entry = Entry::new(outgoing, blocks);
        match written {
            Ok(Some(place)) => {
                entry.held = HeldIn::File(place);
                piece.digests = None;
            }
            Ok(None) => {}
            Err(error) => self.failure = Some(error.to_string()),
        }
        (entry, piece)
    }

    fn forget_pieces(&mut self, sealed: &[(Entry, Piece)]) {
        for (entry, _) in sealed {
            if let (HeldIn::File(place), Some(file)) = (&entry.held, &mut self.file) {
                file.give_back_unnamed(place);
            }
        }
    }
}

/// Seals a piece of a point as a part of the epoch `epoch`.
fn seal(mut capture: Capture, epoch: Epoch, generation: Generation, reseal: &Reseal<'_>) -> Sealed {
    capture.count();
    let attempt = AttemptId(random::array(reseal.random));
    let Keys { group, slots, data_key } = reseal.keys;
    let sealer = Arc::new(Sealer::new(group, epoch, generation, attempt, data_key));
    let made = reseal.encoder.encode(&capture, slots, reseal.begin, Arc::clone(&sealer));
    let EncodedAttempt { epoch, attempt, frames, list, meters, bytes, digests, volumes } = made;
    capture.meters = meters;
    (Outgoing { epoch, attempt, frames, list, bytes, end: End::Part, sealer }, digests, capture, volumes)
}

/// What a piece holds of a volume.
fn sealed_anew(captured: &CapturedVolume, frames: &FrameMeters) -> VolumeMeters {
    let counts = captured.counts();
    VolumeMeters {
        dirty_blocks: captured.blocks().len(),
        content_blocks: counts.content,
        hole_blocks: counts.holes,
        unreadable_blocks: counts.unreadable,
        incompressible_blocks: frames.incompressible_blocks,
        frame_bytes: frames.bytes,
        ..VolumeMeters::default()
    }
}

/// The younger point stands for the older as well.
fn take_in(younger: &mut CommitDraft, older: &CommitDraft, pieces: &[Piece]) {
    younger.first_epoch = older.first_epoch;
    younger.after_rollback_to = older.after_rollback_to.or(younger.after_rollback_to);
    for (slot, layout) in &older.layouts {
        if !younger.layouts.iter().any(|(told, _)| told == slot) {
            younger.layouts.push((*slot, layout.clone()));
        }
    }
    younger.layouts.sort_by_key(|(slot, _)| *slot);
    // Of tables beyond all measure the last are left out: the next agent tells them again.
    younger.layouts = layouts::fitting(std::mem::take(&mut younger.layouts)).0;
    let meters = &mut younger.meters;
    meters.recaptured_blocks += older.meters.recaptured_blocks;
    for piece in pieces.iter().map(|piece| &piece.meters) {
        meters.dirty_blocks += piece.dirty_blocks;
        meters.content_blocks += piece.content_blocks;
        meters.hole_blocks += piece.hole_blocks;
        meters.unreadable_blocks += piece.unreadable_blocks;
        meters.frame_bytes += piece.frame_bytes;
    }
    for (at, (_, volume)) in younger.volumes.iter_mut().enumerate() {
        pieces.iter().filter_map(|piece| piece.volumes.get(at)).for_each(|piece| volume.add(piece));
        if let Some((_, older)) = older.volumes.get(at) {
            // Of its blocks only those count that the younger one did not write over.
            let VolumeMeters { written_bytes, unchanged_blocks, rewritten_blocks, .. } = *older;
            let dirty_blocks = unchanged_blocks;
            let none = VolumeMeters::default();
            volume.add(&VolumeMeters { written_bytes, dirty_blocks, unchanged_blocks, rewritten_blocks, ..none });
        }
    }
}

#[cfg(test)]
mod tests;
