//! Which volumes are yet to be gone through by the audit, because what was dirty on them was taken up from a saved change record.
//!
//! An empty file for each, `unproved-SLOT` in the group's folder. It is durable before anything of the volume is tracked as
//! clean, and goes when every block was read, captured or written since: an agent that is started again in between begins its round anew.

use cdp_protocol::units::VolumeSlot;
use cdp_seams::storage::Storage;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The files of a group.
#[derive(Clone)]
pub struct Proofs {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
}

impl Proofs {
    /// Those in `folder`.
    #[must_use]
    pub fn new(storage: Arc<dyn Storage>, folder: &Path) -> Self {
        Self { storage, folder: folder.to_owned() }
    }

    /// The volume is to be gone through: durable when this returns.
    ///
    /// # Errors
    /// Where that cannot be kept.
    pub fn demand(&self, slot: VolumeSlot) -> io::Result<()> {
        match self.storage.create_new(&self.path(slot)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        self.storage.sync_dir(&self.folder)
    }

    /// Whether the volume is to be gone through. Where that cannot be told, it is: once too often costs a read.
    #[must_use]
    pub fn is_demanded(&self, slot: VolumeSlot) -> bool {
        !self.storage.open(&self.path(slot)).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    }

    /// The volume was gone through. A crash may bring the file back, and costs another round.
    pub fn give(&self, slot: VolumeSlot) {
        match self.storage.remove(&self.path(slot)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%slot, %error, "it cannot be kept that the volume was gone through: it is again after the next start");
            }
            _ => {}
        }
    }

    fn path(&self, slot: VolumeSlot) -> PathBuf {
        self.folder.join(format!("unproved-{slot}"))
    }
}
