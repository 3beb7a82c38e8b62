//! Which frame holds a block at a point: from the newest segment down to a checkpoint, from the last frame to the first, then the
//! checkpoint's pack.
//!
//! Invariant: what was written last among the included frames wins, and damage that may have held a block hides everything
//! older. Whether a run of frames is included is told by how its attempt ended, possibly in a later segment. A checkpoint is a
//! short cut: where its pack is damaged, what it was made from is read instead, as long as that is there.

use super::JournalError;
use super::file::{FileId, SLICE_BLOCKS};
use super::index::{CommitEntry, Entry, EntryKind, Lost, Run, RunEnd};
use super::manifest::{Checkpoint, SealedSegment};
use super::view::{GroupView, SegmentIndex};
use crate::checkpoint::index::SliceContent;
use cdp_protocol::units::{Block, Epoch, Extent, VolumeSlot};
use std::collections::HashMap;

/// Where the content of some blocks is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The blocks.
    pub(crate) extent: Extent,
    /// Where.
    pub(crate) place: PiecePlace,
}

/// See [`Piece`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PiecePlace {
    /// In a frame.
    Frame { file: FileId, entry: Entry, run: Run },
    /// Zeros of a checkpoint.
    Zero,
    /// Behind damage.
    Damaged(String),
    /// Nowhere: never sent.
    NotCovered,
}

/// What is asked for: blocks of a volume at a point, as far as they were written above a checkpoint.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    commit: &'a CommitEntry,
    slot: VolumeSlot,
    extent: Extent,
    base: Option<Epoch>,
}

/// An extent or a damage of a segment, in the order they were written; with its run, where that is known, and whether that is the last one.
struct Layer {
    offset: u64,
    entry: Option<Entry>,
    run: Option<(u32, Run, bool)>,
}

impl GroupView {
    /// Where the content of `extent` of a volume is at the point of `commit`: pieces in block order that cover it.
    pub(crate) fn resolve(
        &self,
        commit: &CommitEntry,
        slot: VolumeSlot,
        extent: Extent,
    ) -> Result<Vec<Piece>, JournalError> {
        let mut canvas = Canvas::new(extent);
        // Every round begins here: a rewritten segment has content of a later point before segments with older content.
        let newest = self.segment_of(commit.head.epoch).unwrap_or(self.manifest().open);
        let mut bad = Vec::new();
        let bases = self.manifest().checkpoints.iter().rev().filter(|base| base.epoch <= commit.head.epoch);
        for base in bases.map(Some).chain([None]) {
            let wanted = Wanted { commit, slot, extent, base: base.map(|base| base.epoch) };
            self.paint_journal(&mut canvas, &wanted, newest)?;
            let Some(base) = base.filter(|_| !canvas.is_full()) else { break };
            bad.extend(self.paint_image(&mut canvas, base, slot)?);
            // Below the floor there is nothing.
            if canvas.is_full() || self.manifest().floor == Some(base.epoch) {
                break;
            }
        }
        if self.manifest().floor.is_some() {
            for (extent, what) in &bad {
                canvas.paint(*extent, || PiecePlace::Damaged(what.clone()));
            }
        }
        Ok(canvas.finish())
    }

    /// Paints what stands in the journal above the base, from segment `newest` down.
    fn paint_journal(&self, canvas: &mut Canvas, wanted: &Wanted<'_>, newest: u64) -> Result<(), JournalError> {
        let sealed = self.manifest().sealed.iter().map(|segment| (segment.number, segment.newest_run));
        let segments = sealed.chain([(self.manifest().open, Epoch(u64::MAX))]).rev();
        for (number, newest_run) in segments.filter(|(number, _)| *number <= newest) {
            if canvas.is_full() {
                break;
            }
            // Where the base's own commit stands does not matter: it may be lost.
            if wanted.base.is_some_and(|base| newest_run <= base) {
                continue;
            }
            if let Err(error) = self.paint(canvas, number, wanted) {
                if matches!(error, JournalError::Io { .. }) {
                    self.shelf().caches.note_failed_read();
                }
                match error {
                    JournalError::Io { .. } | JournalError::Damaged(_) => {
                        canvas.paint(wanted.extent, || PiecePlace::Damaged(format!("segment {number}: {error}")));
                    }
                    other => return Err(other),
                }
            }
        }
        Ok(())
    }

    fn paint(&self, canvas: &mut Canvas, number: u64, wanted: &Wanted<'_>) -> Result<(), JournalError> {
        let (at, file) = (wanted.commit.head.epoch, self.file_id(number));
        let layers = self.layers(number, wanted)?;
        let mut included: HashMap<u32, bool> = HashMap::new();
        for Layer { offset, entry, run } in layers {
            if let Some((place, run, is_last)) = &run {
                let known = included.get(place).copied();
                let is_newer = wanted.base.is_none_or(|base| run.epoch > base);
                let taken = match known {
                    Some(taken) => taken,
                    None => is_newer && self.includes(number, run, *is_last, at)?,
                };
                included.insert(*place, taken);
                if !taken {
                    continue;
                }
            }
            match (entry, run) {
                (Some(entry), Some((_, run, _))) => canvas.paint_entry(file, &entry, run),
                _ => canvas.paint(wanted.extent, || {
                    PiecePlace::Damaged(format!("segment {number} is damaged at offset {offset}: any block may be hit"))
                }),
            }
        }
        Ok(())
    }

    /// Paints what a checkpoint has; gives what it should have and has not, and why.
    fn paint_image(
        &self,
        canvas: &mut Canvas,
        base: &Checkpoint,
        slot: VolumeSlot,
    ) -> Result<Vec<(Extent, String)>, JournalError> {
        let free: Vec<Extent> = canvas.free.iter().flat_map(|(from, to)| slices(*from, *to)).collect();
        let Some(image) = self.image_index(base)? else {
            let what = format!("the image index of checkpoint {} is missing or damaged", base.epoch);
            return Ok(free.into_iter().map(|extent| (extent, what.clone())).collect());
        };
        let mut bad = Vec::new();
        for extent in free {
            if !image.commit().volumes.iter().any(|volume| volume.slot == slot) {
                continue;
            }
            let slice = extent.start.0 / SLICE_BLOCKS;
            let record = image.record(slot, slice).unwrap_or_else(|_| {
                self.shelf().caches.note_failed_read();
                None
            });
            let what = match record.map(|record| record.content) {
                None => Some(format!("the record of slice {slice} in checkpoint {} is damaged", base.epoch)),
                Some(SliceContent::Zero) => {
                    canvas.paint(extent, || PiecePlace::Zero);
                    None
                }
                Some(SliceContent::Pack { sealed, .. }) => {
                    let is_floor = self.manifest().floor == Some(base.epoch);
                    self.paint_pack(canvas, &sealed, slot, extent, is_floor)?
                }
            };
            bad.extend(what.map(|what| (extent, what)));
        }
        Ok(bad)
    }

    /// Paints what a pack has of `extent`; says what is wrong where it is damaged, and paints none of it then.
    fn paint_pack(
        &self,
        canvas: &mut Canvas,
        sealed: &super::file::Sealed,
        slot: VolumeSlot,
        extent: Extent,
        is_floor: bool,
    ) -> Result<Option<String>, JournalError> {
        let FileId::Slice(slice) = sealed.id else { unreachable!("a slice is in a pack of its own") };
        if !is_floor && self.shelf().caches.is_bad(slice) {
            return Ok(Some(format!("the {slice} is damaged")));
        }
        let extents = match self.shelf().extents_if_there(sealed) {
            Err(error @ (JournalError::Io { .. } | JournalError::Damaged(_))) => {
                if matches!(error, JournalError::Io { .. }) {
                    self.shelf().caches.note_failed_read();
                }
                return Ok(Some(format!("{slice}: {error}")));
            }
            other => other?,
        };
        let Some(extents) = extents else { return Ok(Some(format!("the {slice} is missing"))) };
        if let Some(lost) = extents.lost.first() {
            return Ok(Some(format!("the {slice} is damaged at offset {}", lost.offset)));
        }
        let mut entries = Vec::new();
        extents.tables.candidates(slot, extent, &mut entries);
        entries.sort_unstable_by_key(|entry| std::cmp::Reverse(entry.frame_offset));
        for entry in entries {
            let Some(run) = extents.runs.get(entry.run as usize) else {
                return Ok(Some(format!("the index of the {slice} names a run that is not there")));
            };
            canvas.paint_within(extent, sealed.id, &entry, *run);
        }
        // What the image does not have was never sent.
        canvas.paint(extent, || PiecePlace::NotCovered);
        Ok(None)
    }

    /// What of a segment may hold blocks of `extent`, the last written first. Most segments hold none of a few blocks: of those
    /// nothing else is looked at.
    fn layers(&self, number: u64, wanted: &Wanted<'_>) -> Result<Vec<Layer>, JournalError> {
        let mut entries = Vec::new();
        let Some(sealed) = self.sealed_segment(number).map(SealedSegment::sealed) else {
            // The end of a run may be told by a later segment: the lock of the open one must not be held while that is looked up.
            let index = self.index(number)?;
            if let SegmentIndex::Open(open, limit) = &index {
                open.candidates(wanted.slot, wanted.extent, &mut entries);
                entries.retain(|entry| entry.frame_offset < *limit);
            }
            let within = self.within(number, wanted, index.commits());
            return to_layers(number, &entries, index.runs(), index.lost(), within);
        };
        if !self.shelf().touched(&sealed)?.may_hold(wanted.slot, wanted.extent) {
            return Ok(Vec::new());
        }
        let extents = self.shelf().extents(&sealed)?;
        extents.tables.candidates(wanted.slot, wanted.extent, &mut entries);
        let within = if extents.lost.is_empty() {
            (None, None)
        } else {
            self.within(number, wanted, self.index(number)?.commits())
        };
        to_layers(number, &entries, &extents.runs, &extents.lost, within)
    }

    /// Where in a segment the checkpoint and the point are, if they are there: behind the point nothing is asked for, and what was
    /// lost before the checkpoint is the checkpoint's business.
    fn within(&self, number: u64, wanted: &Wanted<'_>, commits: &[CommitEntry]) -> (Option<u64>, Option<u64>) {
        let offset_of = |epoch: Epoch| {
            // By the manifest: a file that stands in another's place may have the commit too.
            let here = self.segment_of(epoch).unwrap_or(self.manifest().open) == number;
            let at = commits.binary_search_by_key(&epoch, |commit| commit.head.epoch).ok().filter(|_| here);
            at.map(|at| commits[at].offset)
        };
        (wanted.base.and_then(offset_of), offset_of(wanted.commit.head.epoch))
    }

    /// Whether the frames of a run are part of point `at`.
    pub(super) fn includes(&self, segment: u64, run: &Run, is_last: bool, at: Epoch) -> Result<bool, JournalError> {
        if run.epoch > at {
            return Ok(false);
        }
        match run.end {
            RunEnd::Commit => Ok(true),
            RunEnd::Abandoned => Ok(false),
            RunEnd::Part => Ok(self.commit(run.epoch)?.is_some_and(|commit| commit.generation == run.generation)),
            RunEnd::Open if !is_last => Ok(false),
            RunEnd::Open => self.includes_later(segment, run, at),
        }
    }

    /// The same for a run that had no end when its segment was sealed: the next segment with any frames tells.
    fn includes_later(&self, segment: u64, run: &Run, at: Epoch) -> Result<bool, JournalError> {
        let sealed = self.manifest().sealed.iter().map(|segment| segment.number);
        for number in sealed.chain([self.manifest().open]).filter(|number| *number > segment) {
            let (first, is_last) = {
                let index = self.index(number)?;
                (index.runs().first().copied(), index.runs().len() == 1)
            };
            let Some(first) = first else { continue };
            if !first.continued || first.attempt != run.attempt {
                return Ok(false);
            }
            if first.end != RunEnd::Open || !is_last {
                return self.includes(number, &first, is_last, at);
            }
        }
        Ok(false)
    }
}

/// The entries and the damage of a segment between two places, the last written first.
fn to_layers(
    number: u64,
    entries: &[Entry],
    runs: &[Run],
    lost: &[Lost],
    (from, to): (Option<u64>, Option<u64>),
) -> Result<Vec<Layer>, JournalError> {
    let run_of = |at: u32| {
        let run = runs.get(at as usize).copied();
        let run = run.ok_or_else(|| JournalError::Damaged(format!("an entry of segment {number} has no run")))?;
        Ok::<_, JournalError>((at, run, at as usize + 1 == runs.len()))
    };
    let mut layers = Vec::with_capacity(entries.len());
    for entry in entries {
        layers.push(Layer { offset: entry.frame_offset, entry: Some(*entry), run: Some(run_of(entry.run)?) });
    }
    let is_between = |lost: &&Lost| to.is_none_or(|to| lost.offset < to) && from.is_none_or(|from| from < lost.offset);
    for lost in lost.iter().filter(is_between) {
        layers.push(Layer { offset: lost.offset, entry: None, run: lost.run.map(run_of).transpose()? });
    }
    layers.sort_unstable_by_key(|layer| std::cmp::Reverse(layer.offset));
    Ok(layers)
}

/// Blocks that are given a place from the newest frame to the oldest: what has one keeps it.
struct Canvas {
    free: Vec<(u64, u64)>,
    pieces: Vec<Piece>,
}

impl Canvas {
    fn new(extent: Extent) -> Self {
        Self { free: vec![(u64::from(extent.start.0), extent.end())], pieces: Vec::new() }
    }

    const fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    fn paint_entry(&mut self, file: FileId, entry: &Entry, run: Run) {
        self.paint_within(entry.extent, file, entry, run);
    }

    /// Paints what an entry has of `extent`.
    fn paint_within(&mut self, extent: Extent, file: FileId, entry: &Entry, run: Run) {
        let start = extent.start.0.max(entry.extent.start.0);
        let end = extent.end().min(entry.extent.end());
        if u64::from(start) >= end {
            return;
        }
        self.paint(to_extent(u64::from(start), end), || match entry.kind {
            EntryKind::Lost => PiecePlace::Damaged("they were lost before they were sealed anew".to_owned()),
            _ => PiecePlace::Frame { file, entry: *entry, run },
        });
    }

    fn paint(&mut self, extent: Extent, place: impl Fn() -> PiecePlace) {
        let (start, end) = (u64::from(extent.start.0), extent.end());
        let first = self.free.partition_point(|(_, free_end)| *free_end <= start);
        let last = self.free.partition_point(|(free_start, _)| *free_start < end);
        if first >= last {
            return;
        }
        let mut left = Vec::new();
        for &(free_start, free_end) in &self.free[first..last] {
            let (from, to) = (free_start.max(start), free_end.min(end));
            let painted = to_extent(from, to);
            self.pieces.push(Piece { extent: painted, place: place() });
            left.extend([(free_start, from), (to, free_end)].into_iter().filter(|(from, to)| from < to));
        }
        self.free.splice(first..last, left);
    }

    fn finish(mut self) -> Vec<Piece> {
        for (from, to) in std::mem::take(&mut self.free) {
            self.pieces.push(Piece { extent: to_extent(from, to), place: PiecePlace::NotCovered });
        }
        self.pieces.sort_unstable_by_key(|piece| piece.extent);
        self.pieces
    }
}

fn to_extent(from: u64, to: u64) -> Extent {
    Extent::new(Block(from as u32), (to - from) as u32).expect("a part of an extent, not empty")
}

/// A run of blocks, cut where slices begin.
fn slices(from: u64, to: u64) -> impl Iterator<Item = Extent> {
    let slice = u64::from(SLICE_BLOCKS);
    (from / slice..to.div_ceil(slice)).map(move |at| to_extent(from.max(at * slice), to.min((at + 1) * slice)))
}
