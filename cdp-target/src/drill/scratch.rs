//! The folder a drill works in: with room for it, and gone at its end.
//!
//! Invariant: everything a drill writes but its report lies in one folder of its own, locked for as long as it runs. It goes with the
//! drill; what one that was killed has left goes with the next, in the same place.

use crate::restore::output::OutputError;
use cdp_seams::random::{Random, array};
use cdp_seams::storage::{Storage, StorageFile};
use rustix::fs::{AtFlags, FileType};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const PREFIX: &str = "cdp-drill-";
const LOCK: &str = "lock";
/// Bytes that stay free, where a twentieth of the file system is not less: the folder may be on the store's own disk, and the store goes on
/// receiving.
const SPARE_BYTES_MAX: u64 = 2 << 30;
/// Folders within one another that are removed: what a script makes is not followed for ever.
const DEPTH_MAX: u32 = 64;

/// A folder of a drill's own.
pub(crate) struct Scratch {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    _lock: Box<dyn StorageFile>,
}

impl Scratch {
    /// A new folder in `parent`, which is made where it is not there.
    ///
    /// # Errors
    /// As the file system says.
    pub(crate) fn new(storage: &Arc<dyn Storage>, parent: &Path, random: &dyn Random) -> Result<Self, OutputError> {
        storage.create_dir_all(parent).map_err(OutputError::system("make folder", parent))?;
        sweep(storage.as_ref(), parent);
        let folder = parent.join(format!("{PREFIX}{:016x}", u64::from_le_bytes(array(random))));
        storage.create_dir_all(&folder).map_err(OutputError::system("make folder", &folder))?;
        let path = folder.join(LOCK);
        let lock = storage.create_new(&path).map_err(OutputError::system("make", &path))?;
        // Nobody else knows its name.
        lock.try_lock().map_err(OutputError::system("lock", &path))?;
        Ok(Self { storage: Arc::clone(storage), folder, _lock: lock })
    }

    /// Bytes of its file system that a drill leaves to others.
    pub(crate) fn spare_bytes(&self) -> u64 {
        let total = rustix::fs::statvfs(&self.folder).map(|stat| stat.f_blocks.saturating_mul(stat.f_frsize));
        total.map_or(SPARE_BYTES_MAX, |total| (total / 20).min(SPARE_BYTES_MAX))
    }

    /// Refuses where there is less room than `needed`, beside what is left to others.
    ///
    /// # Errors
    /// See there.
    pub(crate) fn has_room(&self, needed: u64) -> Result<(), OutputError> {
        let room = self.storage.free_bytes(&self.folder).map_err(OutputError::system("look at", &self.folder))?;
        let path = self.folder.parent().unwrap_or(&self.folder).to_owned();
        let needed = needed.saturating_add(self.spare_bytes());
        if room < needed { Err(OutputError::TooSmall { path, room, needed }) } else { Ok(()) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove(self.storage.as_ref(), &self.folder, DEPTH_MAX) {
            tracing::error!(folder = %self.folder.display(), %error, "what a drill wrote is left behind: remove it");
        }
    }
}

/// Removes what drills that were killed have left.
fn sweep(storage: &dyn Storage, parent: &Path) {
    for name in storage.list(parent).unwrap_or_default() {
        if !name.to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let folder = parent.join(&name);
        let is_dead = match storage.open_write(&folder.join(LOCK)) {
            Ok(lock) => lock.try_lock().unwrap_or(false),
            // Killed before it had one, or within its end. One that begins at this moment fails, and says so.
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        if is_dead && let Err(error) = remove(storage, &folder, DEPTH_MAX) {
            tracing::warn!(folder = %folder.display(), %error, "what a killed drill has left stays");
        }
    }
}

/// Removes a folder with all that is in it, the lock last; follows no link.
fn remove(storage: &dyn Storage, folder: &Path, depth: u32) -> io::Result<()> {
    if depth == 0 {
        return Err(io::Error::other("folders within folders, too deep"));
    }
    let mut names = storage.list(folder)?;
    names.sort_by_key(|name| name.as_os_str() == LOCK);
    for name in names {
        let path = folder.join(name);
        let stat = rustix::fs::statat(rustix::fs::CWD, &path, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode).is_dir() {
            remove(storage, &path, depth - 1)?;
        } else {
            storage.remove(&path)?;
        }
    }
    Ok(rustix::fs::rmdir(folder)?)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "looks at what is left")]
mod tests {
    use super::Scratch;
    use crate::restore::output::OutputError;
    use cdp_seams::random::SimRandom;
    use cdp_seams::storage::{Storage, SystemStorage};
    use std::sync::Arc;

    #[test]
    fn a_folder_goes_with_its_drill_or_with_the_next_and_nothing_else_does() {
        let storage: Arc<dyn Storage> = Arc::new(SystemStorage);
        let (parent, random) = (tempfile::tempdir().expect("a folder"), SimRandom::new(1));
        let names = || storage.list(parent.path()).expect("listed").len();
        std::fs::write(parent.path().join("mine"), b"kept").expect("written");
        std::fs::create_dir(parent.path().join("cdp-drill-dead")).expect("made");
        std::fs::write(parent.path().join("cdp-drill-dead/lock"), b"").expect("written");
        let outside = tempfile::tempdir().expect("a folder");
        std::fs::write(outside.path().join("kept"), b"kept").expect("written");
        let scratch = Scratch::new(&storage, parent.path(), &random).expect("made");
        assert_eq!(names(), 2, "what was left is gone");
        let second = Scratch::new(&storage, parent.path(), &random).expect("made");
        assert_eq!(names(), 3, "one that runs stays");
        std::fs::create_dir_all(scratch.path().join("a/b")).expect("made");
        std::fs::write(scratch.path().join("a/b/c"), b"x").expect("written");
        std::os::unix::fs::symlink(outside.path(), scratch.path().join("a/link")).expect("made");
        drop((scratch, second));
        assert_eq!(names(), 1);
        assert!(outside.path().join("kept").exists(), "no link is followed");
    }

    #[test]
    fn room_is_asked_for() {
        let storage: Arc<dyn Storage> = Arc::new(SystemStorage);
        let parent = tempfile::tempdir().expect("a folder");
        let scratch = Scratch::new(&storage, parent.path(), &SimRandom::new(2)).expect("made");
        assert!(scratch.has_room(1).is_ok());
        assert!(matches!(scratch.has_room(1 << 60), Err(OutputError::TooSmall { .. })));
    }
}
