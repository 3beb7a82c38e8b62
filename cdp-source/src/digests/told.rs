//! What the target says that it holds, against what it is known to have been sent: the digests' side of the audit over the line.
//!
//! Invariant: a block counts only while what is known of it is of the very point that the target speaks of. What is under way, or of a
//! part that no point has taken in, proves nothing, and neither does what nothing is known of: it is not learnt here, since the
//! target's word is what is looked at.

use super::slots::Slot;
use super::{Answer, Digests, Phase};
use crate::audit::Found;
use cdp_protocol::units::{Block, Extent, Head, Timestamp};

/// What the target says of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// It holds this.
    Held(Found),
    /// It holds nothing, or nothing that can be made sense of.
    Nothing,
    /// It knows that the block is damaged, and asks for it itself.
    Damaged,
}

impl Digests {
    /// The acked point that all that is known is of; none while nothing may be said of one.
    #[must_use]
    pub fn head(&self) -> Option<Head> {
        self.head.filter(|_| self.phase == Phase::Ready)
    }

    /// Holds what the target says of `blocks` at `head` against what is known of them.
    pub fn compare_told(
        &mut self,
        volume: usize,
        blocks: Extent,
        told: &[Told],
        head: Head,
        now: Timestamp,
    ) -> Vec<Answer> {
        if self.head() != Some(head) {
            return vec![Answer::NotNow; told.len()];
        }
        let slots = match self.volumes[volume].slots(blocks) {
            Ok(slots) => slots,
            Err(error) => {
                self.off("cannot be read", &error.to_string());
                return vec![Answer::NotNow; told.len()];
            }
        };
        let answers = blocks.blocks().zip(slots).zip(told).map(|((block, slot), told)| {
            let answer = if self.is_moving(volume, block) { Answer::NotNow } else { answer(slot, *told) };
            (block, answer)
        });
        let answers: Vec<(Block, Answer)> = answers.collect();
        for (block, answer) in &answers {
            self.has_new_proofs |= self.volumes[volume].prove_there(*block, *answer, now);
        }
        answers.into_iter().map(|(_, answer)| answer).collect()
    }

    fn is_moving(&self, volume: usize, block: Block) -> bool {
        let is_in = |blocks: &roaring::RoaringBitmap| blocks.contains(block.0);
        is_in(&self.volumes[volume].in_parts) || self.under_way.iter().any(|under_way| is_in(&under_way.blocks[volume]))
    }

    /// When the region was proved over the line that was not for longest; `None` while one never was.
    #[must_use]
    pub fn oldest_proof_there(&self) -> Option<Timestamp> {
        let proofs = self.volumes.iter().flat_map(|volume| volume.proved_there.iter().copied());
        proofs.min().filter(|time| time.0 > 0)
    }

    /// The volume and the first block of that region.
    #[must_use]
    pub fn stalest_there(&self) -> (usize, u64) {
        let regions = self.volumes.iter().enumerate().flat_map(|(at, volume)| {
            let proofs = volume.proved_there.iter().enumerate();
            proofs.map(move |(region, time)| (*time, at, region as u64 * u64::from(super::volume::REGION_BLOCKS)))
        });
        regions.min().map_or((0, 0), |(_, volume, block)| (volume, block))
    }
}

fn answer(known: Slot, told: Told) -> Answer {
    match (known, told) {
        (Slot::Unknown, _) | (_, Told::Damaged) => Answer::NotNow,
        (Slot::Hole, Told::Held(Found::Hole)) => Answer::Same,
        (Slot::Digest(known), Told::Held(Found::Content(digest))) if known == digest => Answer::Same,
        _ => Answer::Differs,
    }
}
