//! Checkpoints: full images at one recovery point, readable without the journal before it.
//!
//! * `index`: which pack has which slice of the image.
//! * `builder`: makes one, slice by slice, sharing what nobody wrote to since the one before. `repack`: content sealed anew.
//!   `whole`: frames taken over whole, without the key.

pub mod builder;
pub mod index;
pub(crate) mod repack;
mod whole;

use crate::journal::Manifest;
use crate::journal::file::{FileId, Sealed};
use cdp_seams::storage::Storage;
use index::{ImageIndex, SliceContent};
use std::collections::BTreeMap;
use std::path::Path;

/// The packs of all checkpoints of the group in `folder`, each once. Those of a checkpoint whose index is gone are not known.
#[must_use]
pub fn packs(storage: &dyn Storage, folder: &Path, manifest: &Manifest) -> Vec<Sealed> {
    let mut packs: BTreeMap<FileId, Sealed> = BTreeMap::new();
    for checkpoint in &manifest.checkpoints {
        let opened = ImageIndex::open(storage, folder, manifest.identity.group, checkpoint);
        let Ok(Some(image)) = opened else { continue };
        for (_, _, record) in image.records().flatten() {
            if let Some(SliceContent::Pack { sealed, .. }) = record.map(|record| record.content) {
                packs.insert(sealed.id, sealed);
            }
        }
    }
    packs.into_values().collect()
}
