//! Leases: who reads by a manifest that may be an old one, so that nothing is swept away from under them.
//!
//! A file in `leases`, named after the change of the manifest it goes by and locked for as long as its reader lives: the lock
//! goes with the process, so one that died holds nothing. Where no lease can be written, as on a file system that is
//! read-only, nothing can be swept either.

use super::{JournalError, Manifest};
use cdp_seams::random::{Random, array};
use cdp_seams::storage::{Storage, StorageFile};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How often a reader looks again where the manifest changes under it.
const ATTEMPTS: usize = 16;

/// A reader's hold on the files of a manifest, until it is dropped.
pub struct Lease {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    _file: Box<dyn StorageFile>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Err(error) = self.storage.remove(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "a lease is left behind: the next sweep removes it");
        }
    }
}

fn folder_of(folder: &Path) -> PathBuf {
    folder.join("leases")
}

/// Holds what the present manifest of the group in `folder` names; `None` where nothing can be written there.
///
/// # Errors
/// Where the manifest cannot be read, or never holds still.
pub fn hold(storage: &Arc<dyn Storage>, folder: &Path, random: &dyn Random) -> Result<Option<Lease>, JournalError> {
    for _ in 0..ATTEMPTS {
        let (before, _) = Manifest::read(storage.as_ref(), folder)?;
        let Some(lease) = take(storage, folder, before.change, random) else { return Ok(None) };
        // Whoever sweeps writes the manifest first and looks for leases then: one of the two sees the other.
        let (now, _) = Manifest::read(storage.as_ref(), folder)?;
        if now.change == before.change {
            return Ok(Some(lease));
        }
    }
    Err(JournalError::Stale("the manifest changes faster than it can be held".to_owned()))
}

fn take(storage: &Arc<dyn Storage>, folder: &Path, change: u64, random: &dyn Random) -> Option<Lease> {
    let leases = folder_of(folder);
    let name = format!("{change:016x}-{:016x}", u64::from_le_bytes(array(random)));
    let path = leases.join(name);
    let made = storage.create_dir_all(&leases).and_then(|()| storage.create_new(&path));
    match made.and_then(|file| Ok((file.try_lock()?, file))) {
        Ok((true, file)) => Some(Lease { storage: Arc::clone(storage), path, _file: file }),
        Ok((false, _)) => None,
        Err(error) => {
            tracing::debug!(path = %path.display(), %error, "no lease: nothing can be swept here either");
            None
        }
    }
}

/// The oldest change that a living reader goes by; removes what dead ones left.
///
/// # Errors
/// As the storage says.
pub fn oldest(storage: &dyn Storage, folder: &Path) -> io::Result<Option<u64>> {
    let leases = folder_of(folder);
    let names = match storage.list(&leases) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        listed => listed?,
    };
    let mut oldest: Option<u64> = None;
    for name in names {
        let change = name.to_str().and_then(|name| u64::from_str_radix(name.split('-').next()?, 16).ok());
        let Some(change) = change else { continue };
        let path = leases.join(&name);
        let file = match storage.open_write(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            opened => opened?,
        };
        if file.try_lock()? {
            storage.remove(&path)?;
        } else {
            oldest = Some(oldest.map_or(change, |oldest| oldest.min(change)));
        }
    }
    Ok(oldest)
}
