//! Digests made anew from what the target tells of one of its points.
//!
//! Invariant: until `end` the state has no base, and nothing is believed of what was written; a crash leaves digests that know nothing. What
//! was not told stays unknown, and is sent.

use super::slots::SlotFile;
use super::state::{Kept, State};
use super::{Digests, Phase};
use crate::audit::Found;
use cdp_protocol::record::Volume;
use cdp_protocol::units::{Extent, GroupId, Head, Timestamp, VolumeSlot, blocks_in};
use cdp_seams::random::{self, Random};
use cdp_seams::storage::Storage;
use roaring::RoaringBitmap;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Digests that are being learnt.
pub struct Learning {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    group: GroupId,
    era: [u8; 16],
    volumes: Vec<(SlotFile, Kept)>,
}

impl Learning {
    /// Begins anew, with nothing known.
    ///
    /// # Errors
    /// Where the files cannot be made.
    pub fn begin(
        storage: &Arc<dyn Storage>,
        folder: &Path,
        group: GroupId,
        volumes: &[Volume],
        random: &dyn Random,
    ) -> io::Result<Self> {
        storage.create_dir_all(folder)?;
        let mut learning = Self {
            storage: Arc::clone(storage),
            folder: folder.to_owned(),
            group,
            era: random::array(random),
            volumes: Vec::new(),
        };
        // The state goes first: files of an older one are of another era, and not believed.
        learning.state(None, Vec::new()).store(&**storage, folder)?;
        for volume in volumes {
            let blocks = blocks_in(volume.size_bytes);
            let place = (&**storage, folder, volume.slot, blocks);
            let file = SlotFile::make(place, &learning.era)?;
            learning.volumes.push((file, nothing_known(volume.slot, blocks)));
        }
        storage.sync_dir(folder)?;
        Ok(learning)
    }

    /// What the target holds of the blocks of some extents, in their order; of those without an answer nothing is known.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn put(&mut self, volume: usize, extents: &[Extent], told: &[Option<Found>]) -> io::Result<()> {
        let (file, kept) = &mut self.volumes[volume];
        let (mut digests, mut holes) = (BTreeMap::new(), RoaringBitmap::new());
        for (block, told) in extents.iter().flat_map(|extent| extent.blocks()).zip(told) {
            match told {
                Some(Found::Content(digest)) => _ = digests.insert(block.0, *digest),
                Some(Found::Hole) => _ = holes.insert(block.0),
                None => continue,
            }
            kept.unsure.remove(block.0);
        }
        if digests.is_empty() && holes.is_empty() {
            return Ok(());
        }
        file.write(&digests, &holes)
    }

    /// All that was put is of this point.
    ///
    /// # Errors
    /// Where the state cannot be written.
    pub fn end(mut self, base: Head) -> io::Result<()> {
        let kept = self.volumes.drain(..).map(|(_, kept)| kept).collect();
        self.state(Some(base), kept).store(&*self.storage, &self.folder)
    }

    fn state(&self, base: Option<Head>, volumes: Vec<Kept>) -> State {
        State { group: self.group, era: self.era, base, volumes }
    }
}

impl Digests {
    /// Whether nothing is known, and never was: they were just made anew.
    #[must_use]
    pub fn are_new(&self) -> bool {
        self.phase == Phase::Unopened && self.head.is_none()
    }
}

fn nothing_known(slot: VolumeSlot, blocks: u64) -> Kept {
    let never = vec![Timestamp(0); blocks.div_ceil(super::volume::REGION_BLOCKS.into()) as usize];
    let mut unsure = RoaringBitmap::new();
    if let Some(last) = blocks.checked_sub(1) {
        unsure.insert_range(0..=last as u32);
    }
    Kept { slot, blocks, unsure, proved: never.clone(), proved_there: never }
}
