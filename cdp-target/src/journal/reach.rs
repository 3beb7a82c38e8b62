//! Which points need what a damage took: from the first one to the last before everything lost was written again.

use super::Damage;
use super::view::{GroupView, Reach};
use cdp_protocol::units::Epoch;
use roaring::RoaringBitmap;
use std::collections::BTreeMap;

/// First and last point that `damage` hits; no last where it reaches up to the newest; `None` where it hits none.
pub(crate) fn reach(view: &GroupView, damage: &Damage) -> Option<Reach> {
    let first = damage.first_epoch?;
    if damage.any_block {
        return Some((first, None));
    }
    let mut remaining: BTreeMap<u16, RoaringBitmap> = BTreeMap::new();
    let mut any = false;
    for segment in view.segments_from(damage.segment) {
        // Where a later segment cannot be read, nothing is known to have been written again.
        let Ok(entries) = view.included(segment) else { continue };
        for (epoch, entry) in entries {
            let last_block = (entry.extent.end() - 1) as u32;
            let blocks = entry.extent.start.0..=last_block;
            if segment == damage.segment && entry.frame_offset == damage.offset {
                any = true;
                remaining.entry(entry.slot.0).or_default().insert_range(blocks);
            } else if any && let Some(bitmap) = remaining.get_mut(&entry.slot.0) {
                bitmap.remove_range(blocks);
                if remaining.values().all(RoaringBitmap::is_empty) {
                    return (epoch > first).then(|| (first, Some(Epoch(epoch.0 - 1))));
                }
            }
        }
    }
    // A damaged record: its own point, no other.
    if any { Some((first, None)) } else { Some((first, Some(first))) }
}
