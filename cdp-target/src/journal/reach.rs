//! Which points need what a damage took: from the first one to the last before everything lost was written again.
//!
//! What was lost is told by the frame's own header, else by the index of its sealed segment. Where neither does, as in the open
//! segment, every later point is named.

use super::view::{GroupView, Reach};
use super::walk::Visit;
use super::{Damage, JournalError};
use cdp_protocol::frame::Frame;
use cdp_protocol::units::{AttemptId, Epoch};
use roaring::RoaringBitmap;
use std::collections::{BTreeMap, HashMap};

/// First and last point that `damage` hits; no last where it reaches up to the newest; `None` where it hits none.
pub(crate) fn reach(view: &GroupView, damage: &Damage) -> Option<Reach> {
    if let Some(slice) = damage.slice {
        return view.reach_of_pack(damage, slice);
    }
    let first = damage.first_epoch?;
    // From a checkpoint on that was made with nothing lost, nobody needs what is before it.
    let whole = view.manifest().checkpoints.iter().find(|base| base.epoch >= first && base.lost_blocks == 0);
    let until = whole.map(|base| Epoch(base.epoch.0.saturating_sub(1)));
    if until.is_some_and(|until| until < first || view.manifest().floor.is_some_and(|floor| until < floor)) {
        // No point is left that could.
        return None;
    }
    if damage.any_block {
        return Some((first, until));
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
                    let last = Epoch(epoch.0.saturating_sub(1)).min(until.unwrap_or(Epoch(u64::MAX)));
                    return (last >= first).then_some((first, Some(last)));
                }
            }
        }
    }
    // A damaged record: its own point, no other.
    if any { Some((first, until)) } else { Some((first, Some(first))) }
}

/// The frames that stand whole in a segment: where, and of which attempt.
pub(crate) struct Seen<'a> {
    pub(crate) visitor: &'a mut dyn Visit,
    pub(crate) frames: HashMap<u64, AttemptId>,
}

impl Visit for Seen<'_> {
    fn frame(&mut self, frame: &Frame<'_>, offset: u64) {
        self.frames.insert(offset, frame.header.attempt);
        self.visitor.frame(frame, offset);
    }
}

/// Damage to a sealed segment whose index is whole: where the frames do not tell what was lost, the index does. Every frame it knows that does
/// not stand whole in its place is named, and nothing else is.
pub(crate) fn told_by_index(
    view: &GroupView,
    segment: u64,
    mut damages: Vec<Damage>,
    seen: &HashMap<u64, AttemptId>,
) -> Result<Vec<Damage>, JournalError> {
    let (runs, lost, commits) = {
        let index = view.index(segment)?;
        (index.runs().to_vec(), index.lost().to_vec(), index.commits().to_vec())
    };
    // What was lost before the segment was sealed is not in its index either.
    let is_told = |damage: &Damage| {
        let end = damage.offset + damage.len;
        damage.any_block && !lost.iter().any(|lost| lost.offset < end && damage.offset < lost.offset + lost.len)
    };
    // Behind a damaged header the first frames may be gone too, and nothing else would say so.
    if !damages.iter().any(|damage| damage.offset == 0 || is_told(damage)) {
        return Ok(damages);
    }
    let mut missing: BTreeMap<u64, (u32, Epoch)> = BTreeMap::new();
    for (epoch, entry) in view.included(segment)? {
        let attempt = runs.get(entry.run as usize).map(|run| run.attempt);
        if seen.get(&entry.frame_offset).copied() != attempt {
            missing.insert(entry.frame_offset, (entry.frame_len, epoch));
        }
    }
    for commit in commits.iter().filter(|commit| commit.record.is_some()) {
        if seen.get(&commit.offset) != Some(&commit.attempt) {
            missing.insert(commit.offset, (commit.frame_len, commit.head.epoch));
        }
    }
    for damage in &mut damages {
        if is_told(damage) {
            (damage.first_epoch, damage.any_block) = (None, false);
        }
        missing.retain(|offset, _| damage.first_epoch.is_none() || *offset != damage.offset);
    }
    let file = view.file_id(segment);
    damages.extend(missing.into_iter().map(|(offset, (len, epoch))| Damage {
        offset,
        len: u64::from(len),
        first_epoch: Some(epoch),
        ..Damage::of(file, "the frame that the index has here is gone".to_owned())
    }));
    Ok(damages)
}
