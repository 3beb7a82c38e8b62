//! The checkpoints as a view shows them: their packs, what is wrong with them, and who needs it.

use super::file::{FileId, SLICE_BLOCKS, Sealed, SliceId};
use super::index::Entry;
use super::manifest::{Checkpoint, SealedSegment};
use super::view::{GroupView, Reach, SegmentIndex, WalkedSegment};
use super::walk::Visit;
use super::{Damage, JournalError};
use crate::checkpoint;
use crate::checkpoint::index::{SliceContent, SliceRecord};
use cdp_protocol::units::{Epoch, Extent, VolumeSlot};
use roaring::RoaringBitmap;
use std::collections::BTreeMap;

impl GroupView {
    /// The packs of all checkpoints, each once. Those of a checkpoint whose index is gone are not known.
    #[must_use]
    pub fn packs(&self) -> Vec<Sealed> {
        let (storage, folder) = self.place();
        checkpoint::packs(storage.as_ref(), folder, self.manifest())
    }

    /// The packs of the checkpoint below which the journal has no content any more.
    pub(crate) fn packs_of_the_floor(&self) -> Vec<FileId> {
        let floor = self.manifest().floor;
        let base = self.manifest().checkpoints.iter().find(|base| Some(base.epoch) == floor);
        let Some(Ok(Some(image))) = base.map(|base| self.image_index(base)) else { return Vec::new() };
        let pack = |record: SliceRecord| match record.content {
            SliceContent::Zero => None,
            SliceContent::Pack { sealed, .. } => Some(sealed.id),
        };
        image.records().flatten().filter_map(|(_, _, record)| pack(record?)).collect()
    }

    /// Sealed segments and packs.
    pub(crate) fn sealed_files(&self) -> Vec<Sealed> {
        self.manifest().sealed.iter().map(SealedSegment::sealed).chain(self.packs()).collect()
    }

    /// Walks a sealed file frame by frame; also checks its index.
    pub(crate) fn walk_file(&self, sealed: &Sealed, visitor: &mut dyn Visit) -> Result<WalkedSegment, JournalError> {
        if let FileId::Segment { number, .. } = sealed.id {
            return self.walk(number, visitor);
        }
        let damage = |what: &str| Damage::of(sealed.id, what.to_owned());
        let first_epoch = Some(self.first_user(sealed.id));
        if self.shelf().is_missing(sealed.id) {
            let missing = Damage { len: sealed.len, first_epoch, any_block: true, ..damage("the pack is missing") };
            return Ok(WalkedSegment { damages: vec![missing], bytes: 0 });
        }
        let mut damages = self.shelf().walk(sealed, visitor)?.damages;
        for damage in &mut damages {
            // Whoever needs a frame of a pack needs it from the first checkpoint on that the pack is of.
            damage.first_epoch = damage.first_epoch.and(first_epoch);
        }
        if !self.shelf().index_is_whole(sealed)? {
            let (offset, len) = (sealed.frames_end, sealed.len - sealed.frames_end);
            let what = damage("the pack's index is damaged; it can be made anew from the frames");
            damages.push(Damage { offset, len, ..what });
        }
        Ok(WalkedSegment { damages, bytes: sealed.len })
    }

    /// Slices of each volume that any frame touches above point `base`, the open segment's included.
    ///
    /// # Errors
    /// Where a segment cannot be read.
    pub(crate) fn slices_touched(&self, base: Epoch) -> Result<BTreeMap<u16, RoaringBitmap>, JournalError> {
        let mut touched: BTreeMap<u16, RoaringBitmap> = BTreeMap::new();
        let mut add = |slot: u16, first: u32, last: u32| {
            touched.entry(slot).or_default().insert_range(first / SLICE_BLOCKS..=last / SLICE_BLOCKS);
        };
        let newer = self.manifest().sealed.iter().filter(|sealed| sealed.newest_run > base);
        for number in newer.map(|sealed| sealed.number).chain([self.manifest().open]) {
            let index = self.index(number)?;
            if !index.lost().is_empty() {
                return Err(JournalError::Damaged(format!("segment {number}: which blocks were hit cannot be told")));
            }
            match &index {
                SegmentIndex::Open(open, _) => {
                    let is_newer =
                        |entry: &&Entry| open.runs.get(entry.run as usize).is_none_or(|run| run.epoch > base);
                    let newer = open.iter().filter(is_newer);
                    newer.for_each(|entry| add(entry.slot.0, entry.extent.start.0, (entry.extent.end() - 1) as u32));
                }
                SegmentIndex::Sealed(summary, _) => {
                    for (slot, blocks) in &summary.bitmaps {
                        blocks.iter().for_each(|block| add(*slot, block, block));
                    }
                }
            }
        }
        Ok(touched)
    }

    /// Image indexes of which a copy, or a part of both, is not what was written.
    ///
    /// # Errors
    /// Where the storage fails.
    pub(crate) fn bad_images(&self) -> Result<Vec<Damage>, JournalError> {
        let (storage, folder) = self.place();
        let mut damages = Vec::new();
        for base in &self.manifest().checkpoints {
            let copies = checkpoint::index::copies(storage.as_ref(), folder, base)?;
            if copies < 2 {
                let epoch = base.epoch;
                let what = match copies {
                    0 => format!("the image index of checkpoint {epoch} is damaged"),
                    _ => format!("one of the two copies in the image index of checkpoint {epoch} is damaged"),
                };
                let slice = SliceId { slot: VolumeSlot(0), slice: u32::MAX, epoch };
                let first_epoch = (copies == 0).then_some(epoch);
                damages.push(Damage { first_epoch, any_block: copies == 0, ..Damage::of(FileId::Slice(slice), what) });
            }
        }
        Ok(damages)
    }

    /// The first checkpoint that a pack is of.
    fn first_user(&self, file: FileId) -> Epoch {
        self.users(file).first().map_or(Epoch(0), |base| base.epoch)
    }

    /// The checkpoints that a pack is of.
    fn users(&self, file: FileId) -> Vec<Checkpoint> {
        let FileId::Slice(slice) = file else { return Vec::new() };
        let uses = |base: &&Checkpoint| {
            let image = self.image_index(base).ok().flatten();
            let record = image.and_then(|image| image.record(slice.slot, slice.slice).ok().flatten());
            match record.map(|record| record.content) {
                Some(SliceContent::Pack { sealed, .. }) => sealed.id == file,
                Some(SliceContent::Zero) => false,
                // What cannot be told may well be.
                None => base.epoch == slice.epoch,
            }
        };
        self.manifest().checkpoints.iter().filter(uses).copied().collect()
    }

    /// First and last point that a damage in a pack hits: only those that have nothing else to read, from the floor on to where all
    /// that was lost was written again.
    pub(super) fn reach_of_pack(&self, damage: &Damage, slice: SliceId) -> Option<Reach> {
        damage.first_epoch?;
        let floor = self.manifest().floor?;
        let users = self.users(FileId::Slice(slice));
        users.iter().find(|base| base.epoch == floor)?;
        // A later checkpoint that has the pack too is read around only down to the floor.
        let is_free = |base: &&Checkpoint| base.epoch > floor && !users.contains(base) && base.lost_blocks == 0;
        let until = self.manifest().checkpoints.iter().find(is_free).map(|base| Epoch(base.epoch.0 - 1));
        let mut missing = self.lost_of_pack(damage, slice);
        let from = self.segment_of(floor).unwrap_or(self.manifest().open);
        for segment in self.segments_from(from) {
            // Where a segment cannot be read, nothing is known to have been written again.
            let Ok(entries) = self.included(segment) else { continue };
            for (epoch, entry) in entries.iter().filter(|(epoch, entry)| *epoch > floor && entry.slot == slice.slot) {
                missing.remove_range(entry.extent.start.0..=(entry.extent.end() - 1) as u32);
                if missing.is_empty() {
                    let last = Epoch(epoch.0 - 1).min(until.unwrap_or(Epoch(u64::MAX)));
                    return Some((floor, Some(last)));
                }
            }
        }
        Some((floor, until))
    }

    /// The blocks of a slice that are read from what a damage took; all of it where that cannot be told.
    fn lost_of_pack(&self, damage: &Damage, slice: SliceId) -> RoaringBitmap {
        let mut all = RoaringBitmap::new();
        let first = slice.slice.saturating_mul(SLICE_BLOCKS);
        all.insert_range(first..=first.saturating_add(SLICE_BLOCKS - 1));
        let pack = self.packs().into_iter().find(|pack| pack.id == FileId::Slice(slice));
        let extents = pack.and_then(|pack| self.shelf().extents(&pack).ok());
        let Some(extents) = extents.filter(|_| !damage.any_block) else { return all };
        let mut entries: Vec<_> = extents.tables.iter().filter(|entry| entry.slot == slice.slot).collect();
        entries.sort_unstable_by_key(|entry| entry.frame_offset);
        let mut lost = RoaringBitmap::new();
        for entry in entries {
            let blocks = entry.extent.start.0..=(entry.extent.end() - 1) as u32;
            let is_hit = entry.frame_offset == damage.offset;
            if is_hit {
                lost.insert_range(blocks)
            } else {
                lost.remove_range(blocks)
            };
        }
        lost & all
    }

    /// The blocks that stand on what is damaged, as far as the index tells.
    pub(crate) fn blocks_at(&self, damage: &Damage) -> Vec<(VolumeSlot, Extent)> {
        let at = |offset: u64| offset >= damage.offset && offset < damage.offset + damage.len.max(1);
        let mut blocks: BTreeMap<u16, RoaringBitmap> = BTreeMap::new();
        let mut add = |slot: VolumeSlot, extent: Extent| {
            let last = (extent.end() - 1) as u32;
            blocks.entry(slot.0).or_default().insert_range(extent.start.0..=last);
        };
        match damage.slice {
            None => {
                let entries = self.included(damage.segment).unwrap_or_default();
                let hit = entries.iter().filter(|(_, entry)| at(entry.frame_offset));
                hit.for_each(|(_, entry)| add(entry.slot, entry.extent));
            }
            Some(slice) => {
                let pack = self.packs().into_iter().find(|pack| pack.id == FileId::Slice(slice));
                if let Some(extents) = pack.and_then(|pack| self.shelf().extents(&pack).ok()) {
                    extents
                        .tables
                        .iter()
                        .filter(|entry| at(entry.frame_offset))
                        .for_each(|entry| add(entry.slot, entry.extent));
                }
            }
        }
        blocks
            .into_iter()
            .flat_map(|(slot, blocks)| {
                extents(&blocks).map(move |extent| (VolumeSlot(slot), extent)).collect::<Vec<_>>()
            })
            .collect()
    }

    /// The file that a damage is in, below the group's folder.
    pub(crate) fn name_of(&self, damage: &Damage) -> String {
        let folder = std::path::Path::new("");
        let path = match damage.slice {
            Some(SliceId { slice: u32::MAX, epoch, .. }) => {
                let base = self.manifest().checkpoints.iter().find(|base| base.epoch == epoch);
                base.map_or_else(|| super::file::checkpoints(folder), |base| base.path(folder))
            }
            Some(slice) => FileId::Slice(slice).path(folder),
            None => self.file_id(damage.segment).path(folder),
        };
        path.display().to_string()
    }
}

/// The runs of a set of blocks.
pub(crate) fn extents(blocks: &RoaringBitmap) -> impl Iterator<Item = Extent> + '_ {
    let mut rest = blocks.iter().peekable();
    std::iter::from_fn(move || {
        let start = rest.next()?;
        let mut end = u64::from(start) + 1;
        while rest.next_if(|next| u64::from(*next) == end).is_some() {
            end += 1;
        }
        Extent::new(cdp_protocol::units::Block(start), (end - u64::from(start)) as u32)
    })
}
