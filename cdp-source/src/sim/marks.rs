//! The tracking of a simulated world: what lives in the kernel, and so outlives the agent's process.
//!
//! Two parities of marks that flip together, what is drained and not acked, and the memo. A run of the tracker's programs
//! looks up the parity at its entry and marks at its exit; between the two a flip may fall, for which the straggler barrier is.
//! Lost with the machine alone.

use super::{Blocks, Sabotage};
use cdp_protocol::units::Block;
use roaring::RoaringBitmap;
use std::ops::Range;

/// Marks and memo.
#[derive(Clone, Debug)]
pub(super) struct Marks {
    dirty: [Blocks; 2],
    issued: [Blocks; 2],
    active: usize,
    /// Drained and not acked.
    pub(super) unacked: Blocks,
    /// What lives as long as the tracking.
    pub(super) memo: Vec<u8>,
    /// Whether a tracker took it up before.
    pub(super) is_taken_up: bool,
}

/// A run of a program: entered, and perhaps not exited yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    parity: usize,
    pub(super) is_completion: bool,
}

impl Marks {
    /// Marks of volumes with so many blocks, all of which are to be captured.
    pub(super) fn new(blocks: &[u32]) -> Self {
        let nothing = vec![RoaringBitmap::new(); blocks.len()];
        let all = blocks.iter().map(|blocks| (0..*blocks).collect()).collect();
        Self {
            dirty: [nothing.clone(), nothing.clone()],
            issued: [nothing.clone(), nothing],
            active: 0,
            unacked: all,
            memo: Vec::new(),
            is_taken_up: false,
        }
    }

    /// A run begins: it sees which parity is active.
    pub(super) const fn enter(&self, is_completion: bool) -> Run {
        Run { parity: self.active, is_completion }
    }

    /// A run ends: it marks the parity it saw.
    pub(super) fn exit(&mut self, run: Run, volume: usize, blocks: Range<u32>, sabotage: Sabotage) {
        let (marks_dirty, marks_issued) = match (sabotage, run.is_completion) {
            (Sabotage::MarkAtCompletionOnly, false) | (Sabotage::MarkAtIssueOnly, true) => (false, false),
            (Sabotage::MarkAtCompletionOnly, true) => (true, true),
            (_, is_completion) => (true, !is_completion),
        };
        if marks_dirty {
            self.dirty[run.parity][volume].insert_range(blocks.clone());
        }
        if marks_issued {
            self.issued[run.parity][volume].insert_range(blocks);
        }
    }

    /// From here on marks go to the other parity.
    pub(super) fn flip(&mut self) {
        let next = 1 - self.active;
        self.issued[next].iter_mut().for_each(RoaringBitmap::clear);
        self.active = next;
    }

    /// What the inactive parity holds: into `unacked` first, and out of it then.
    pub(super) fn drain(&mut self) -> Blocks {
        let drained: Blocks = self.dirty[1 - self.active].iter_mut().map(std::mem::take).collect();
        for (unacked, drained) in self.unacked.iter_mut().zip(&drained) {
            *unacked |= drained;
        }
        drained
    }

    /// What an agent finds that comes after another: all that was drained and not acked, and what its predecessor flipped
    /// and did not come to drain.
    pub(super) fn take_up(&mut self) -> Blocks {
        self.is_taken_up = true;
        self.drain();
        self.unacked.clone()
    }

    /// Whether a write to the block was issued since the flip.
    pub(super) fn is_issued(&self, volume: usize, block: Block) -> bool {
        self.issued[self.active][volume].contains(block.0)
    }
}
