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
        let lease = match take(storage, folder, before.change, random) {
            Ok(Some(lease)) => lease,
            Ok(None) => continue,
            Err(error) => {
                let folder = folder_of(folder);
                tracing::debug!(folder = %folder.display(), %error, "no lease: nothing can be swept here either");
                return Ok(None);
            }
        };
        // Whoever sweeps writes the manifest first and looks for leases then: one of the two sees the other.
        let (now, _) = Manifest::read(storage.as_ref(), folder)?;
        if now.change == before.change {
            return Ok(Some(lease));
        }
    }
    Err(JournalError::Stale("the manifest changes faster than it can be held".to_owned()))
}

/// Makes a lease; `None` where a sweep came upon its file before it was locked, and took it for a dead reader's.
fn take(storage: &Arc<dyn Storage>, folder: &Path, change: u64, random: &dyn Random) -> io::Result<Option<Lease>> {
    let leases = folder_of(folder);
    let name = format!("{change:016x}-{:016x}", u64::from_le_bytes(array(random)));
    let path = leases.join(name);
    storage.create_dir_all(&leases)?;
    let file = storage.create_new(&path)?;
    if !file.try_lock()? {
        return Ok(None);
    }
    // From here on no sweep removes it. No other file ever has its name.
    match storage.open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(|_| Some(Lease { storage: Arc::clone(storage), path, _file: file })),
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

#[cfg(test)]
mod tests {
    use super::{folder_of, oldest, take};
    use cdp_seams::random::SimRandom;
    use cdp_seams::storage::sim::SimStorage;
    use cdp_seams::storage::{Storage, StorageFile};
    use std::io;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// Sweeps between the making of a lease's file and its lock, as often as it says.
    struct Swept(SimStorage, AtomicU32);

    impl Storage for Swept {
        fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
            let file = self.0.create_new(path)?;
            if self.1.load(Ordering::Relaxed) > 0 {
                self.1.fetch_sub(1, Ordering::Relaxed);
                oldest(&self.0, Path::new("/store"))?;
            }
            Ok(file)
        }
        fn open(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
            self.0.open(path)
        }
        fn open_write(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
            self.0.open_write(path)
        }
        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.0.rename(from, to)
        }
        fn remove(&self, path: &Path) -> io::Result<()> {
            self.0.remove(path)
        }
        fn create_dir_all(&self, path: &Path) -> io::Result<()> {
            self.0.create_dir_all(path)
        }
        fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
            self.0.list(path)
        }
        fn sync_dir(&self, path: &Path) -> io::Result<()> {
            self.0.sync_dir(path)
        }
        fn free_bytes(&self, path: &Path) -> io::Result<u64> {
            self.0.free_bytes(path)
        }
    }

    #[test]
    fn a_lease_that_was_swept_away_before_it_was_locked_is_none() {
        let storage: Arc<dyn Storage> = Arc::new(Swept(SimStorage::new(1), AtomicU32::new(1)));
        let (folder, random) = (Path::new("/store"), SimRandom::new(1));
        assert!(take(&storage, folder, 7, &random).expect("no fault is set").is_none(), "swept away");
        let lease = take(&storage, folder, 7, &random).expect("no fault is set").expect("a lease");
        assert_eq!(storage.list(&folder_of(folder)).expect("listed").len(), 1, "it stands under its name");
        drop(lease);
        assert!(storage.list(&folder_of(folder)).expect("listed").is_empty());
    }
}
