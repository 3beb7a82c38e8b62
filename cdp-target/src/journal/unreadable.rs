//! Which points hold blocks that the source's device could not read.
//!
//! Derived from the index at listing time. A block stands unreadable from the point that said so to the one before it was written again, so a
//! point carries the warning however old the frame is. Extents of a segment are read only where it adds such blocks or touches standing ones:
//! they are rare.

use super::GroupView;
use super::file::SLICE_BLOCKS;
use super::index::EntryKind;
use super::view::SegmentIndex;
use crate::checkpoint::index::SliceContent;
use cdp_protocol::record::Volume;
use cdp_protocol::units::Epoch;
use roaring::RoaringBitmap;
use std::collections::BTreeMap;

/// Blocks that stand unreadable, from point to point.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unreadable {
    /// By rising epoch: from this point on so many blocks of each volume.
    steps: Vec<(Epoch, BTreeMap<u16, u64>)>,
}

impl Unreadable {
    /// How many blocks of `volumes` stand unreadable at point `epoch`.
    #[must_use]
    pub fn blocks(&self, epoch: Epoch, volumes: &[Volume]) -> u64 {
        let Some(standing) = self.at(epoch) else { return 0 };
        volumes.iter().filter_map(|volume| standing.get(&volume.slot.0)).sum()
    }

    /// Whether any block of any volume, also of one that was taken away since, stands unreadable at point `epoch`.
    #[must_use]
    pub fn any(&self, epoch: Epoch) -> bool {
        self.at(epoch).is_some_and(|standing| !standing.is_empty())
    }

    fn at(&self, epoch: Epoch) -> Option<&BTreeMap<u16, u64>> {
        let at = self.steps.partition_point(|(from, _)| *from <= epoch).checked_sub(1)?;
        Some(&self.steps[at].1)
    }

    fn step(&mut self, epoch: Epoch, standing: &BTreeMap<u16, RoaringBitmap>) {
        let counts = standing.iter().map(|(slot, blocks)| (*slot, blocks.len())).collect();
        match self.steps.last_mut() {
            Some((last, known)) if *last == epoch => *known = counts,
            _ => self.steps.push((epoch, counts)),
        }
    }
}

impl GroupView {
    /// Which points hold blocks that could not be read. A segment that is damaged tells nothing here: its points are named as damaged.
    #[must_use]
    pub fn unreadable(&self) -> Unreadable {
        let mut unreadable = Unreadable::default();
        let mut standing = self.unreadable_at_the_floor();
        let floor = self.manifest().floor;
        if let Some(floor) = floor.filter(|_| !standing.is_empty()) {
            unreadable.step(floor, &standing);
        }
        // What a segment still has of what lies below is in the checkpoint, as it stood there.
        let is_below = |epoch: Epoch| floor.is_some_and(|floor| epoch <= floor);
        for number in self.segments_from(0) {
            let concerned = self.index(number).is_ok_and(|index| concerns(&index, &standing));
            let Some(entries) = concerned.then(|| self.included(number).ok()).flatten() else { continue };
            for (epoch, entry) in entries.into_iter().filter(|(epoch, _)| !is_below(*epoch)) {
                let blocks = entry.extent.start.0..=(entry.extent.end() - 1) as u32;
                let slot = entry.slot.0;
                let changed = if entry.kind == EntryKind::Unreadable {
                    standing.entry(slot).or_default().insert_range(blocks)
                } else {
                    standing.get_mut(&slot).map_or(0, |bitmap| bitmap.remove_range(blocks))
                };
                if changed > 0 {
                    standing.retain(|_, bitmap| !bitmap.is_empty());
                    unreadable.step(epoch, &standing);
                }
            }
        }
        unreadable
    }
}

impl GroupView {
    /// What was unreadable where the journal's content begins, as the checkpoint there has it.
    fn unreadable_at_the_floor(&self) -> BTreeMap<u16, RoaringBitmap> {
        let mut standing: BTreeMap<u16, RoaringBitmap> = BTreeMap::new();
        let floor = self.manifest().floor;
        let base = self.manifest().checkpoints.iter().find(|base| Some(base.epoch) == floor);
        let Some(Ok(Some(image))) = base.map(|base| self.image_index(base)) else { return standing };
        for (slot, slice, record) in image.records().flatten() {
            let Some(record) = record.filter(|record| record.unreadable) else { continue };
            let SliceContent::Pack { sealed, .. } = record.content else { continue };
            let Ok(extents) = self.shelf().extents(&sealed) else { continue };
            // A frame that was taken over whole has blocks of other slices too, and a later one may have written over it.
            let (first, last) = (slice * SLICE_BLOCKS, slice * SLICE_BLOCKS + (SLICE_BLOCKS - 1));
            let mut entries: Vec<_> = extents.tables.iter().filter(|entry| entry.slot == slot).collect();
            entries.sort_unstable_by_key(|entry| entry.frame_offset);
            for entry in entries {
                let blocks = entry.extent.start.0.max(first)..=((entry.extent.end() - 1) as u32).min(last);
                let bitmap = standing.entry(slot.0).or_default();
                if entry.kind == EntryKind::Unreadable {
                    bitmap.insert_range(blocks)
                } else {
                    bitmap.remove_range(blocks)
                };
            }
        }
        standing.retain(|_, bitmap| !bitmap.is_empty());
        standing
    }
}

/// Whether a segment adds unreadable blocks or touches standing ones.
fn concerns(index: &SegmentIndex<'_>, standing: &BTreeMap<u16, RoaringBitmap>) -> bool {
    let adds = index.runs().iter().any(|run| run.unreadable_blocks > 0);
    adds || match index {
        SegmentIndex::Open(..) => !standing.is_empty(),
        SegmentIndex::Sealed(summary, _) => standing
            .iter()
            .any(|(slot, blocks)| summary.bitmaps.get(slot).is_some_and(|touched| !touched.is_disjoint(blocks))),
    }
}
