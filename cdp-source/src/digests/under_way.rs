//! What is under way: attempts that were captured and are not acked, and what is known of their blocks once they are.
//!
//! Invariant: they stand in the order in which they are acked. An attempt whose digests are not here leaves its blocks unknown.

use super::{Digests, Phase};
use crate::encoder::BlockDigests;
use cdp_protocol::units::{AttemptId, Epoch};
use roaring::RoaringBitmap;
use std::collections::VecDeque;
use std::sync::Arc;

/// An attempt that was captured and is not acked.
pub(super) struct UnderWay {
    pub(super) epoch: Epoch,
    pub(super) attempt: AttemptId,
    pub(super) blocks: Arc<Vec<RoaringBitmap>>,
    unreadable: Vec<RoaringBitmap>,
    /// `None` while they are not here: not encoded yet, or in the spool with the frames.
    digests: Option<Vec<BlockDigests>>,
}

/// An attempt that stands in the place of others.
pub struct Replacement {
    /// Its epoch.
    pub epoch: Epoch,
    /// The attempt.
    pub attempt: AttemptId,
    /// What it holds.
    pub blocks: Arc<Vec<RoaringBitmap>>,
    /// What of it could not be read.
    pub unreadable: Vec<RoaringBitmap>,
    /// The digests of what it holds; none while they are in the spool.
    pub digests: Option<Vec<BlockDigests>>,
}

impl Digests {
    /// An attempt is under way with these blocks of each volume.
    pub fn captured(
        &mut self,
        epoch: Epoch,
        attempt: AttemptId,
        blocks: impl Into<Arc<Vec<RoaringBitmap>>>,
        unreadable: Vec<RoaringBitmap>,
    ) {
        if self.phase != Phase::Off {
            self.under_way.push_back(UnderWay { epoch, attempt, blocks: blocks.into(), unreadable, digests: None });
        }
    }

    /// The digests of an attempt's blocks with content.
    pub fn encoded(&mut self, attempt: AttemptId, digests: Vec<BlockDigests>) {
        if let Some(under_way) = self.under_way.iter_mut().find(|under_way| under_way.attempt == attempt) {
            under_way.digests = Some(digests);
        }
    }

    /// An attempt's digests are in the spool with its frames.
    pub fn spooled(&mut self, attempt: AttemptId) {
        if let Some(under_way) = self.under_way.iter_mut().find(|under_way| under_way.attempt == attempt) {
            under_way.digests = None;
        }
    }

    /// Others stand in the place of these attempts, which follow one another: with what is behind them they hold the same blocks.
    pub fn replaced(&mut self, attempts: &[AttemptId], others: Vec<Replacement>) {
        let is_gone = |under_way: &UnderWay| attempts.contains(&under_way.attempt);
        let Some(at) = self.under_way.iter().position(is_gone) else { return };
        self.under_way.retain(|under_way| !is_gone(under_way));
        for (index, Replacement { epoch, attempt, blocks, unreadable, digests }) in others.into_iter().enumerate() {
            self.under_way.insert(at + index, UnderWay { epoch, attempt, blocks, unreadable, digests });
        }
    }

    /// These attempts will not be sent.
    pub fn abandoned(&mut self, attempts: &[AttemptId]) {
        let (gone, kept): (VecDeque<UnderWay>, VecDeque<UnderWay>) = std::mem::take(&mut self.under_way)
            .into_iter()
            .partition(|under_way| attempts.contains(&under_way.attempt));
        self.under_way = kept;
        for under_way in gone {
            for (volume, blocks) in self.volumes.iter_mut().zip(&*under_way.blocks) {
                volume.forget_all(blocks);
            }
        }
    }

    pub(super) fn take_in(&mut self, attempt: &UnderWay) {
        for (at, volume) in self.volumes.iter_mut().enumerate() {
            let (blocks, unreadable) = (&attempt.blocks[at], &attempt.unreadable[at]);
            volume.forget_all(blocks);
            let Some(digests) = &attempt.digests else { continue };
            let digests = digests.iter().filter(|digests| digests.volume == volume.slot);
            let mut holes = blocks - unreadable;
            for (block, digest) in digests.flat_map(|digests| &digests.blocks) {
                holes.remove(block.0);
                volume.young.insert(block.0, *digest);
            }
            volume.young_holes |= holes;
        }
    }
}
