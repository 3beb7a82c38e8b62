//! The saved change record: what was dirty when the agent was stopped, for a start after a clean reboot (`docs/format/saved.md`).
//!
//! The tracking ends with the boot. For a volume that nobody had mounted or open when the agent was stopped, what was dirty then
//! is kept, and what the volume looked like. The next boot goes on from there if nothing was written to the volume in between, as
//! far as that can be told cheaply; the audit tells the rest within a day (`saved/proofs`). Any doubt means that the volume is
//! compared in whole, as after a power cut.
//!
//! Invariants: a record is believed only in another boot, and only while the state folder names the very tracking that it was
//! saved of, which each start replaces before anything is captured; and it is durably gone before it is looked at. So each record is believed once at most,
//! whichever step a crash comes in.
//!
//! `format` is its bytes, `saving` and `taking` are the two ends of it, `hold nature samples untouched` what they look at.

mod format;
mod hold;
mod nature;
pub mod proofs;
mod samples;
pub mod saving;
pub mod taking;
mod untouched;

use cdp_protocol::seal::Digest;
use cdp_protocol::units::{Block, GroupId, Timestamp, VolumeSlot};
use cdp_seams::storage::{self, Storage};
use roaring::RoaringBitmap;
use std::io;
use std::path::{Path, PathBuf};

/// A record larger than this is not saved, nor read: a volume of 1 TiB in which every other block is dirty takes 32 MiB.
const RECORD_BYTES_MAX: u64 = 256 << 20;

/// What a stop leaves behind.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// The group.
    pub group: GroupId,
    /// Name of the tracking that it is saved of.
    pub tracker: String,
    /// The boot that it was saved in, as the kernel names it.
    pub boot: String,
    /// When.
    pub saved_at: Timestamp,
    /// The group's memo, which names the acked point that clean blocks are as of.
    pub memo: Vec<u8>,
    /// The volumes, in the group's order.
    pub volumes: Vec<SavedVolume>,
}

/// A volume of it.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedVolume {
    /// Its place in the group.
    pub slot: VolumeSlot,
    /// What was found of it, or why that was not to be had.
    pub found: Result<Found, String>,
}

/// What a volume was at the stop.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Its size.
    pub size_bytes: u64,
    /// What does not change with a boot (`nature`).
    pub nature: String,
    /// Blocks that the target may not hold as they are.
    pub dirty: RoaringBitmap,
    /// What some of its blocks held (`samples`), in their order.
    pub samples: Vec<(Block, Digest)>,
}

impl Saved {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        format::encode(self)
    }

    /// Reads it back; `None` for what is damaged, of another version, or beyond a bound.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        format::decode(bytes)
    }

    /// Puts it in the group's folder, durably. A crash in here leaves no record, or this one.
    ///
    /// # Errors
    /// Where it is too large or cannot be written.
    pub fn store(&self, storage: &dyn Storage, folder: &Path) -> io::Result<()> {
        let bytes = self.encode();
        if bytes.len() as u64 > RECORD_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        storage::replace(storage, &path(folder), &bytes)
    }

    /// Takes it out of the group's folder; `None` where there is none.
    ///
    /// It is gone, durably, before it is given. A crash in here leaves it as it was, or nothing: then the volumes are compared.
    ///
    /// # Errors
    /// Why it is not to be believed, in a line.
    pub fn take(storage: &dyn Storage, folder: &Path) -> Result<Option<Self>, String> {
        let path = path(folder);
        let read = match storage::read_all(storage, &path, RECORD_BYTES_MAX) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other,
        };
        let removed = storage.remove(&path).and_then(|()| storage.sync_dir(folder));
        removed.map_err(|error| format!("the record of the last stop cannot be removed: {error}"))?;
        let bytes = read.map_err(|error| format!("the record of the last stop cannot be read: {error}"))?;
        Self::decode(&bytes).map(Some).ok_or_else(|| "the record of the last stop is damaged".to_owned())
    }
}

/// Where the record of a group is, by the folder of its tracking.
#[must_use]
pub fn path(folder: &Path) -> PathBuf {
    folder.join("saved")
}

#[cfg(test)]
mod tests;
