//! What is known of one volume's blocks: what was acked lately, in memory, over what the file has.
//!
//! Does not know what is under way.

use super::Answer;
use super::slots::{Slot, SlotFile};
use crate::audit::Found;
use cdp_protocol::seal::Digest;
use cdp_protocol::units::{Block, Extent, Timestamp, VolumeSlot};
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
    /// Blocks of acked parts that no acked epoch has taken in; of those that an agent before may have sent, too.
    pub(super) in_parts: RoaringBitmap,
    /// When each region was found to be what the target holds; zero where it never was.
    pub(super) proved: Vec<Timestamp>,
    /// When the target was found to hold what it was sent of each region; zero where it never was.
    pub(super) proved_there: Vec<Timestamp>,
}

/// Blocks of a region: 64 MiB.
pub(super) const REGION_BLOCKS: u32 = 1 << 14;

impl VolumeDigests {
    pub(super) fn new(slot: VolumeSlot, blocks: u64) -> Self {
        let never = vec![Timestamp(0); blocks.div_ceil(REGION_BLOCKS.into()) as usize];
        Self {
            slot,
            blocks,
            file: None,
            young: BTreeMap::new(),
            young_holes: RoaringBitmap::new(),
            unsure: RoaringBitmap::new(),
            in_parts: RoaringBitmap::new(),
            proved: never.clone(),
            proved_there: never,
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

    /// Blocks that an acked part may hold.
    pub(super) fn hold_in_parts(&mut self, extents: &[Extent]) {
        let ends = extents.iter().map(|extent| (extent.start.0, extent.end().min(self.blocks)));
        for (start, end) in ends.filter(|(start, end)| u64::from(*start) < *end) {
            self.in_parts.insert_range(start..=(end - 1) as u32);
        }
    }

    pub(super) fn hold_all_in_parts(&mut self) {
        if let Some(last) = self.blocks.checked_sub(1) {
            self.in_parts.insert_range(0..=last as u32);
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

    /// The first block at or behind `from` of which nothing is known.
    pub(super) fn next_unknown(&self, from: u32) -> Option<u32> {
        let mut unsure = self.unsure.range(from..);
        unsure.find(|block| !self.young.contains_key(block) && !self.young_holes.contains(*block))
    }

    /// Holds what a block was found to hold against what is known, and learns it where nothing is.
    pub(super) fn compare(&mut self, block: Block, found: Found) -> io::Result<Answer> {
        if self.in_parts.contains(block.0) {
            return Ok(Answer::NotNow);
        }
        let known = self.slots(Extent { start: block, count: 1 })?[0];
        Ok(match (known, found) {
            (Slot::Unknown, Found::Hole) => {
                self.young_holes.insert(block.0);
                Answer::Learnt
            }
            (Slot::Unknown, Found::Content(digest)) => {
                self.young.insert(block.0, digest);
                Answer::Learnt
            }
            (Slot::Hole, Found::Hole) => Answer::Same,
            (Slot::Digest(held), Found::Content(digest)) if held == digest => Answer::Same,
            _ => Answer::Differs,
        })
    }

    /// Notes when a region was gone through to its last block, and tells whether it was.
    pub(super) fn prove(&mut self, block: Block, answer: Answer, now: Timestamp) -> bool {
        prove(&mut self.proved, self.blocks, block, answer, now)
    }

    /// The same, of what the target says that it holds.
    pub(super) fn prove_there(&mut self, block: Block, answer: Answer, now: Timestamp) -> bool {
        prove(&mut self.proved_there, self.blocks, block, answer, now)
    }

    /// When each region was proved, but for those whose last block is one of `skipped`.
    pub(super) fn proofs(&self, skipped: &RoaringBitmap) -> impl Iterator<Item = Timestamp> {
        let ends = (1..).map(|number: u64| (number * u64::from(REGION_BLOCKS)).min(self.blocks) - 1);
        let counts = move |(_, end): &(&Timestamp, u64)| !skipped.contains(*end as u32);
        self.proved.iter().zip(ends).filter(counts).map(|(proved, _)| *proved)
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

fn prove(proved: &mut [Timestamp], blocks: u64, block: Block, answer: Answer, now: Timestamp) -> bool {
    let is_last = u64::from(block.0) + 1 == blocks || (block.0 + 1).is_multiple_of(REGION_BLOCKS);
    let is_proof = is_last && answer == Answer::Same;
    if is_proof {
        proved[(block.0 / REGION_BLOCKS) as usize] = now;
    }
    is_proof
}
