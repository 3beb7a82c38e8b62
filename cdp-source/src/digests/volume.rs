//! What is known of one volume's blocks: what was acked lately, in memory, over what the file has.
//!
//! Does not know what is under way.

use super::slots::{Slot, SlotFile};
use cdp_protocol::seal::Digest;
use cdp_protocol::units::{Extent, VolumeSlot};
use roaring::RoaringBitmap;
use std::collections::BTreeMap;
use std::io;

/// What is known of one volume.
pub(super) struct VolumeDigests {
    pub(super) slot: VolumeSlot,
    pub(super) blocks: u64,
    pub(super) file: Option<SlotFile>,
    /// Acked, or of an acked part, and not written yet.
    pub(super) young: BTreeMap<u32, Digest>,
    pub(super) young_holes: RoaringBitmap,
    /// Blocks whose slot in the file is not to be believed.
    pub(super) unsure: RoaringBitmap,
    /// Blocks of acked parts that no acked epoch has taken in.
    pub(super) in_parts: RoaringBitmap,
}

impl VolumeDigests {
    pub(super) fn new(slot: VolumeSlot, blocks: u64) -> Self {
        Self {
            slot,
            blocks,
            file: None,
            young: BTreeMap::new(),
            young_holes: RoaringBitmap::new(),
            unsure: RoaringBitmap::new(),
            in_parts: RoaringBitmap::new(),
        }
    }

    pub(super) fn know_nothing(&mut self) {
        self.young.clear();
        self.young_holes.clear();
        self.in_parts.clear();
        if let Some(last) = self.blocks.checked_sub(1) {
            self.unsure.insert_range(0..=last as u32);
        }
    }

    pub(super) fn forget(&mut self, extent: Extent) {
        let end = extent.end().min(self.blocks);
        if u64::from(extent.start.0) < end {
            let blocks = extent.start.0..=(end - 1) as u32;
            let young: Vec<u32> = self.young.range(blocks.clone()).map(|(block, _)| *block).collect();
            for block in young {
                self.young.remove(&block);
            }
            self.young_holes.remove_range(blocks.clone());
            self.unsure.insert_range(blocks);
        }
    }

    pub(super) fn forget_all(&mut self, blocks: &RoaringBitmap) {
        self.unsure |= blocks;
        self.young_holes -= blocks;
        // Whichever of the two is shorter.
        if blocks.len() < self.young.len() as u64 {
            for block in blocks {
                self.young.remove(&block);
            }
        } else {
            self.young.retain(|block, _| !blocks.contains(*block));
        }
    }

    /// What is known of the blocks of `extent`, whatever is under way.
    pub(super) fn slots(&self, extent: Extent) -> io::Result<Vec<Slot>> {
        let mut slots = match &self.file {
            Some(file) => file.read(extent)?,
            None => vec![Slot::Unknown; extent.count as usize],
        };
        for (block, slot) in extent.blocks().zip(&mut slots) {
            if let Some(digest) = self.young.get(&block.0) {
                *slot = Slot::Digest(*digest);
            } else if self.young_holes.contains(block.0) {
                *slot = Slot::Hole;
            } else if self.unsure.contains(block.0) {
                *slot = Slot::Unknown;
            }
        }
        Ok(slots)
    }

    pub(super) fn is_written(&self) -> bool {
        self.young.is_empty() && self.young_holes.is_empty()
    }

    /// Writes what is young, durably; it is sure from here on.
    pub(super) fn write(&mut self) -> io::Result<()> {
        if let Some(file) = self.file.as_mut().filter(|_| !self.young.is_empty() || !self.young_holes.is_empty()) {
            file.write(&self.young, &self.young_holes)?;
        }
        let young = std::mem::take(&mut self.young);
        self.unsure -= young.keys().copied().collect::<RoaringBitmap>();
        self.unsure -= std::mem::take(&mut self.young_holes);
        Ok(())
    }
}
