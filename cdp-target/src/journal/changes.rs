//! Which blocks a source sent after a point: what its digests, kept up to that point, do not know.
//!
//! Invariant: no block that was sent later is missing, whatever became of the attempt; where that cannot be vouched for, nothing is told.

use super::JournalError;
use super::images::extents;
use super::view::{GroupView, SegmentIndex};
use cdp_protocol::units::{Epoch, Extent, Head, VolumeSlot};
use roaring::RoaringBitmap;
use std::collections::BTreeMap;

/// Extents of volumes.
pub type VolumeExtents = Vec<(VolumeSlot, Vec<Extent>)>;

/// Extents that are told together. More are made fewer, by taking in what lies between them.
const EXTENTS_MAX: usize = 16 * cdp_protocol::limits::MESSAGE_EXTENTS_MAX;

impl GroupView {
    /// The extents of each volume that any frame after point `since` touches, durable or not; `None` where the point is not in the
    /// history, the journal does not go back so far, or damage hides what it touched.
    ///
    /// # Errors
    /// Where a segment cannot be read.
    pub fn changes_since(&self, since: Head) -> Result<Option<VolumeExtents>, JournalError> {
        let is_below = self.manifest().floor.is_some_and(|floor| since.epoch < floor);
        let is_ours = self.commit(since.epoch)?.is_some_and(|commit| commit.head == since);
        if is_below || !is_ours {
            return Ok(None);
        }
        Ok(self.touched_after(since.epoch)?.map(|touched| few(&touched, EXTENTS_MAX)))
    }

    fn touched_after(&self, base: Epoch) -> Result<Option<BTreeMap<u16, RoaringBitmap>>, JournalError> {
        let mut touched: BTreeMap<u16, RoaringBitmap> = BTreeMap::new();
        let mut add = |slot: VolumeSlot, extent: Extent| {
            touched.entry(slot.0).or_default().insert_range(extent.start.0..=(extent.end() - 1) as u32);
        };
        for sealed in self.manifest().sealed.iter().filter(|sealed| sealed.newest_run > base) {
            let extents = self.shelf().extents(&sealed.sealed())?;
            if !extents.lost.is_empty() {
                return Ok(None);
            }
            let is_later = |run: u32| extents.runs.get(run as usize).is_none_or(|run| run.epoch > base);
            extents.tables.iter().filter(|entry| is_later(entry.run)).for_each(|entry| add(entry.slot, entry.extent));
        }
        let index = self.index(self.manifest().open)?;
        if !index.lost().is_empty() {
            return Ok(None);
        }
        if let SegmentIndex::Open(open, _) = &index {
            let is_later = |run: u32| open.runs.get(run as usize).is_none_or(|run| run.epoch > base);
            open.iter().filter(|entry| is_later(entry.run)).for_each(|entry| add(entry.slot, entry.extent));
        }
        Ok(Some(touched))
    }
}

/// The blocks in at most `extents_max` extents, or one a volume.
fn few(touched: &BTreeMap<u16, RoaringBitmap>, extents_max: usize) -> VolumeExtents {
    let mut gap_max = 0;
    loop {
        let of = |blocks| joined(extents(blocks), gap_max);
        let told: Vec<_> = touched.iter().map(|(slot, blocks)| (VolumeSlot(*slot), of(blocks))).collect();
        if told.iter().map(|(_, extents)| extents.len()).sum::<usize>() <= extents_max.max(touched.len()) {
            return told;
        }
        gap_max = 2 * gap_max + 1;
    }
}

/// Extents with those joined that lie at most `gap_max` blocks apart.
fn joined(extents: impl Iterator<Item = Extent>, gap_max: u64) -> Vec<Extent> {
    let mut all: Vec<Extent> = Vec::new();
    for extent in extents {
        match all.last_mut() {
            Some(last) if u64::from(extent.start.0) - last.end() <= gap_max => {
                last.count = (extent.end() - u64::from(last.start.0)) as u32;
            }
            _ => all.push(extent),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{prop_assert, proptest};

    proptest! {
        #[test]
        fn fewer_extents_hold_all_blocks(blocks in proptest::collection::btree_set(0..5000u32, 0..400), extents_max in 1..40usize) {
            let touched = BTreeMap::from([(7, blocks.iter().copied().collect::<RoaringBitmap>())]);
            let told = few(&touched, extents_max);
            let (slot, extents) = &told[0];
            prop_assert!(*slot == VolumeSlot(7) && extents.len() <= extents_max);
            prop_assert!(extents.is_sorted_by(|one, next| one.end() < u64::from(next.start.0)));
            let held: std::collections::BTreeSet<u32> = extents.iter().flat_map(|extent| extent.blocks()).map(|block| block.0).collect();
            prop_assert!(blocks.is_subset(&held));
            let exact = super::extents(&touched[&7]).count();
            prop_assert!(exact > extents_max || held == blocks, "no more than is needed");
        }
    }
}
