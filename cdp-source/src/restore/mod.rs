//! Putting a volume back to a point: what differs is found by digests, and only that crosses the line.
//!
//! Invariants: nothing is written that was not opened with the group's key, for the blocks that the point has it of; what was written is
//! read back from the device; what the point does not have is told, and left as it is, never made zeros. The comparison writes nothing,
//! and to begin again is to compare again: a restore that was killed anywhere goes on with the same command.
//!
//! `line` is the connection, `disk` the device, `compare` finds what differs, `fetch` gets and writes it, `marker` tells that a
//! volume is neither old nor new, `learn` asks for digests that are lost, `partitions` has the kernel see what was written. What the agent does about it is `agent/group`'s, what an operator says `cli/restore`'s.

pub mod compare;
pub mod disk;
pub mod fetch;
pub mod learn;
pub mod line;
pub mod marker;
mod partitions;

use cdp_protocol::units::{Block, Extent};
use roaring::RoaringBitmap;

/// What a comparison found, and what became of it since.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Blocks whose content has to come over the line.
    pub fetch: RoaringBitmap,
    /// Those of them whose digests do not open with this machine's key: their content may not either.
    pub sealed: RoaringBitmap,
    /// Blocks that the point has as zeros.
    pub zero: RoaringBitmap,
    /// Blocks that the point has and that cannot be had.
    pub lost: Vec<Lost>,
    /// Blocks that were read and compared.
    pub compared_blocks: u64,
    /// Blocks of which the target was asked what the point has.
    pub asked_blocks: u64,
    /// Blocks that differ and hold what no point is known to have.
    pub unkept_blocks: u64,
    /// Blocks that were, or would be, taken from the old volume.
    pub copied_blocks: u64,
}

/// Blocks that cannot be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Which.
    pub extent: Extent,
    /// Why, in one line.
    pub reason: String,
}

impl Plan {
    /// Blocks that differ, as far as they can be had.
    #[must_use]
    pub fn differing_blocks(&self) -> u64 {
        self.fetch.len() + self.zero.len() + self.copied_blocks
    }

    /// Blocks that are known not to be had.
    #[must_use]
    pub fn lost_blocks(&self) -> u64 {
        self.lost.iter().map(|lost| u64::from(lost.extent.count)).sum()
    }

    /// Takes note of a block that cannot be had; one behind the other for the same reason are told together.
    pub fn lose(&mut self, block: Block, reason: &str) {
        match self.lost.last_mut() {
            Some(last) if last.extent.end() == u64::from(block.0) && last.reason == reason => last.extent.count += 1,
            _ => self.lost.push(Lost { extent: Extent { start: block, count: 1 }, reason: reason.to_owned() }),
        }
    }
}

/// How far it has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Blocks compared, of so many.
    Comparing(u64, u64),
    /// Blocks of which the target was asked, of so many.
    Asking(u64, u64),
    /// Blocks written, of so many.
    Writing(u64, u64),
}

/// Told how far it has got.
pub type OnProgress<'a> = dyn FnMut(Progress) + 'a;
