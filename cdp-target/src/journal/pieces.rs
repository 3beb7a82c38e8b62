//! Which frame holds a block at a point: from the newest segment to the oldest, from the last frame to the first.
//!
//! Invariant: what was written last among the included frames wins, and damage that may have held a block hides everything
//! older. Whether a run of frames is included is told by how its attempt ended, possibly in a later segment.

use super::JournalError;
use super::index::{CommitEntry, Entry, Run, RunEnd};
use super::view::{GroupView, SegmentIndex};
use cdp_protocol::units::{Epoch, Extent, VolumeSlot};
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
    /// In a frame; the first block's place within its content.
    Frame { segment: u64, entry: Entry, run: Run, content_block: u32 },
    /// Behind damage.
    Damaged(String),
    /// Nowhere: never sent.
    NotCovered,
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
        let newest = self.segment_of(commit.head.epoch).unwrap_or(self.manifest().open);
        let sealed = self.manifest().sealed.iter().map(|segment| segment.number);
        let older = sealed.chain([self.manifest().open]).rev().skip_while(|number| *number > newest);
        for number in older {
            if canvas.is_full() {
                break;
            }
            if let Err(error) = self.paint(&mut canvas, number, number == newest, commit, slot, extent) {
                match error {
                    JournalError::Io { .. } | JournalError::Damaged(_) => {
                        canvas.paint(extent, |_| PiecePlace::Damaged(format!("segment {number}: {error}")));
                    }
                    other => return Err(other),
                }
            }
        }
        Ok(canvas.finish())
    }

    fn paint(
        &self,
        canvas: &mut Canvas,
        number: u64,
        is_newest: bool,
        commit: &CommitEntry,
        slot: VolumeSlot,
        extent: Extent,
    ) -> Result<(), JournalError> {
        let layers = self.layers(number, is_newest, commit, slot, extent)?;
        let mut included: HashMap<u32, bool> = HashMap::new();
        for Layer { offset, entry, run } in layers {
            if let Some((at, run, is_last)) = &run {
                let known = included.get(at).copied();
                let taken = known.map_or_else(|| self.includes(number, run, *is_last, commit.head.epoch), Ok)?;
                included.insert(*at, taken);
                if !taken {
                    continue;
                }
            }
            match (entry, run) {
                (Some(entry), Some((_, run, _))) => canvas.paint(entry.extent, |start| {
                    let content_block = entry.content_block + (start - entry.extent.start.0);
                    PiecePlace::Frame { segment: number, entry, run, content_block }
                }),
                _ => canvas.paint(extent, |_| {
                    PiecePlace::Damaged(format!("segment {number} is damaged at offset {offset}: any block may be hit"))
                }),
            }
        }
        Ok(())
    }

    /// What of a segment may hold blocks of `extent`, the last written first.
    fn layers(
        &self,
        number: u64,
        is_newest: bool,
        commit: &CommitEntry,
        slot: VolumeSlot,
        extent: Extent,
    ) -> Result<Vec<Layer>, JournalError> {
        // The end of a run may be told by a later segment: the lock of the open one must not be held while that is looked up.
        let mut index = self.index(number)?;
        let mut entries = Vec::new();
        match &mut index {
            SegmentIndex::Open(open, limit) => {
                open.candidates(slot, extent, &mut entries);
                entries.retain(|entry| entry.frame_offset < *limit);
            }
            SegmentIndex::Sealed(summary, sealed) if summary.touches(slot, extent) => {
                let tables;
                (*summary, tables) = self.shelf().tables(sealed)?;
                tables.candidates(slot, extent, &mut entries);
            }
            SegmentIndex::Sealed(..) => {}
        }
        let runs = index.runs();
        let run_of = |at: u32| {
            let run = runs.get(at as usize).copied();
            let run = run.ok_or_else(|| JournalError::Damaged(format!("an entry of segment {number} has no run")))?;
            Ok::<_, JournalError>((at, run, at as usize + 1 == runs.len()))
        };
        let mut layers = Vec::with_capacity(entries.len());
        for entry in entries {
            layers.push(Layer { offset: entry.frame_offset, entry: Some(entry), run: Some(run_of(entry.run)?) });
        }
        for lost in index.lost().iter().filter(|lost| !is_newest || lost.offset < commit.offset) {
            layers.push(Layer { offset: lost.offset, entry: None, run: lost.run.map(run_of).transpose()? });
        }
        layers.sort_unstable_by_key(|layer| std::cmp::Reverse(layer.offset));
        Ok(layers)
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

    fn paint(&mut self, extent: Extent, place: impl Fn(u32) -> PiecePlace) {
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
            self.pieces.push(Piece { extent: painted, place: place(painted.start.0) });
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
    let start = cdp_protocol::units::Block(from as u32);
    Extent::new(start, (to - from) as u32).expect("a part of an extent, not empty")
}
