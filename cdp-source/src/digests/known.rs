//! What is known of a volume's blocks, read from the files alone: for a restore, whether or not an agent runs.
//!
//! Writes nothing. What an agent writes meanwhile makes blocks unknown and none wrong: a slot that is of a later point than the base is of a
//! block that the target was sent after the base, which whoever uses this asks the target for, once everything was read.

use super::slots::{RUN_BLOCKS_MAX, Slot, SlotFile};
use super::state::{Kept, State};
use crate::audit::Found;
use cdp_protocol::units::{Extent, GroupId, Head, VolumeSlot};
use cdp_seams::storage::Storage;
use roaring::RoaringBitmap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The digests of one volume, as of the base.
pub struct KnownDigests {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    group: GroupId,
    base: Head,
    kept: Kept,
    file: SlotFile,
}

impl KnownDigests {
    /// Blocks that may be asked for at once.
    pub const RUN_BLOCKS_MAX: u32 = RUN_BLOCKS_MAX;

    /// What the files have of a volume of this size; `None` where nothing of it is to be believed.
    #[must_use]
    pub fn open(
        storage: &Arc<dyn Storage>,
        folder: &Path,
        group: GroupId,
        slot: VolumeSlot,
        blocks: u64,
    ) -> Option<Self> {
        let state = State::load(&**storage, folder).ok().filter(|state| state.group == group)?;
        let base = state.base?;
        let kept = state.volumes.into_iter().find(|kept| (kept.slot, kept.blocks) == (slot, blocks))?;
        let file = SlotFile::open((&**storage, folder, slot, blocks), &state.era).ok()?;
        Some(Self { storage: Arc::clone(storage), folder: folder.to_owned(), group, base, kept, file })
    }

    /// The acked point that they are of.
    #[must_use]
    pub const fn base(&self) -> Head {
        self.base
    }

    /// What is known of each block of an extent of at most `RUN_BLOCKS_MAX`.
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub fn of(&self, extent: Extent) -> io::Result<Vec<Option<Found>>> {
        let known = extent.blocks().zip(self.file.read(extent)?).map(|(block, slot)| match slot {
            _ if self.kept.unsure.contains(block.0) => None,
            Slot::Unknown => None,
            Slot::Hole => Some(Found::Hole),
            Slot::Digest(digest) => Some(Found::Content(digest)),
        });
        Ok(known.collect())
    }

    /// Blocks that have become unsure since; `None` where the files were made anew meanwhile, and nothing that was read of them counts.
    #[must_use]
    pub fn unsure_since(&self) -> Option<RoaringBitmap> {
        let state = State::load(&*self.storage, &self.folder).ok().filter(|state| state.group == self.group)?;
        let kept =
            state.volumes.into_iter().find(|kept| (kept.slot, kept.blocks) == (self.kept.slot, self.kept.blocks))?;
        (state.era == self.file.era && state.base.is_some()).then_some(kept.unsure)
    }
}
