//! What tells that a restore was begun and is not over: the volume is neither old nor new.
//!
//! A file in the group's folder, there before the first byte is written and gone after the last is durable. While it names a volume in
//! place, the agent makes no points of the group. It is a few lines of JSON, for people too; version 1.

use crate::state::{StateError, StateFolder};
use cdp_protocol::units::{Epoch, Timestamp, VolumeSlot};
use cdp_seams::storage::{self, Storage};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};

const VERSION: u32 = 1;
const BYTES_MAX: u64 = 64 * 1024;

/// A restore that is under way, or was cut off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restoring {
    /// Version of the file.
    version: u32,
    /// The volume's name.
    pub volume: String,
    /// Its slot.
    pub slot: VolumeSlot,
    /// The device that is written to, where it is not the volume's own.
    pub to: Option<PathBuf>,
    /// Whether that is a whole disk, restored as one.
    #[serde(default)]
    pub is_disk: bool,
    /// The point.
    pub epoch: Epoch,
    /// How it was named: the same command means the same point, however late it is given again.
    pub at: String,
    /// When it was begun.
    pub begun: Timestamp,
    /// The point that what is overwritten was kept as, where one was made.
    pub kept: Option<Epoch>,
}

impl Restoring {
    /// One that begins.
    #[must_use]
    pub fn new(
        volume: &str,
        slot: VolumeSlot,
        to: Option<&Path>,
        (epoch, at): (Epoch, &str),
        begun: Timestamp,
    ) -> Self {
        let (volume, to, at) = (volume.to_owned(), to.map(Path::to_owned), at.to_owned());
        Self { version: VERSION, volume, slot, to, is_disk: false, epoch, at, begun, kept: None }
    }

    /// Whether the agent has to hold the group's points: a volume of it is written to.
    #[must_use]
    pub const fn holds_points(&self) -> bool {
        self.to.is_none()
    }

    /// In a line, for people.
    #[must_use]
    pub fn describe(&self) -> String {
        let what = match &self.to {
            None => format!("volume {} is being restored in place to point {}", self.volume, self.epoch),
            Some(to) => format!("volume {} is being restored at point {} to {}", self.volume, self.epoch, to.display()),
        };
        format!("{what}, begun {}", crate::agent::status::rfc3339(self.begun))
    }

    /// How to go on, for people.
    #[must_use]
    pub fn command(&self, group: &str) -> String {
        let option = if self.is_disk { "--disk" } else { "--to" };
        let to = self.to.as_ref().map_or_else(String::new, |to| format!(" {option} {}", to.display()));
        format!("cdp-source restore --group {group} {} --at {}{to}", self.volume, self.epoch)
    }

    /// The word of an agent that makes no points because of it, and has kept all there were.
    #[must_use]
    pub fn word(&self, group: &str) -> String {
        format!("{}; to go on: {}", self.describe(), self.command(group))
    }

    /// The group's, where there is one.
    ///
    /// # Errors
    /// Where the file cannot be read, or is damaged.
    pub fn load(state: &StateFolder, group: &str) -> Result<Option<Self>, StateError> {
        let path = path(state, group);
        let bytes = match storage::read_all(&**state.storage(), &path, BYTES_MAX) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|source| StateError::Io { action: "read", path: path.clone(), source })?,
        };
        let damaged = |reason: String| StateError::Damaged { path: path.clone(), reason };
        let restoring: Self = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        let is_known = restoring.version <= VERSION;
        is_known.then_some(Some(restoring)).ok_or_else(|| damaged("it is of a newer program".into()))
    }

    /// Puts it there, durably: a crash in here leaves what was there before, or this.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn store(&self, state: &StateFolder, group: &str) -> Result<(), StateError> {
        let path = path(state, group);
        // New hardware has no folder of the group yet.
        path.parent().map_or(Ok(()), |folder| state.make(folder))?;
        let text = serde_json::to_string_pretty(self).expect("a marker is plain JSON");
        let stored = storage::replace(&**state.storage(), &path, text.as_bytes());
        stored.map_err(|source| StateError::Io { action: "write", path, source })
    }

    /// Takes it away, durably: a crash in here leaves it, and the restore is compared once more.
    ///
    /// # Errors
    /// Where it cannot be removed.
    pub fn remove(state: &StateFolder, group: &str) -> Result<(), StateError> {
        let path = path(state, group);
        remove_durably(&**state.storage(), &path).map_err(|source| StateError::Io { action: "remove", path, source })
    }
}

/// Forgets what the last stop left for the next boot to go on from: the volume is about to be another.
///
/// # Errors
/// Where it cannot be removed.
pub fn forget_saved(state: &StateFolder, group: &str) -> Result<(), StateError> {
    let path = crate::saved::path(&state.tracking(group));
    remove_durably(&**state.storage(), &path).map_err(|source| StateError::Io { action: "remove", path, source })
}

fn remove_durably(storage: &dyn Storage, path: &Path) -> io::Result<()> {
    match storage.remove(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.and_then(|()| storage.sync_dir(path.parent().unwrap_or(path))),
    }
}

fn path(state: &StateFolder, group: &str) -> PathBuf {
    state.root().join("groups").join(group).join("restoring.json")
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_seams::storage::SystemStorage;
    use std::sync::Arc;

    #[test]
    fn what_is_under_way_is_told_until_it_is_over_and_garbage_is_no_sign_that_nothing_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = StateFolder::new(Arc::new(SystemStorage), folder.path());
        assert_eq!(Restoring::load(&state, "main").expect("readable"), None);
        let begun = Restoring::new("data", VolumeSlot(3), None, (Epoch(7), "2h"), Timestamp(0));
        begun.store(&state, "main").expect("stored");
        assert_eq!(Restoring::load(&state, "main").expect("readable"), Some(begun.clone()));
        assert!(begun.holds_points());
        assert_eq!(begun.command("main"), "cdp-source restore --group main data --at 7");
        let to = Restoring::new("data", VolumeSlot(3), Some(Path::new("/dev/vdb")), (Epoch(7), "2h"), Timestamp(0));
        assert!(!to.holds_points() && to.command("main").ends_with(" --to /dev/vdb"));
        let disk = Restoring { is_disk: true, ..to.clone() };
        assert!(!disk.holds_points() && disk.command("main").ends_with(" data --at 7 --disk /dev/vdb"));
        disk.store(&state, "main").expect("stored");
        assert_eq!(Restoring::load(&state, "main").expect("readable"), Some(disk));
        Restoring::remove(&state, "main").expect("removed");
        Restoring::remove(&state, "main").expect("nothing to remove");
        assert_eq!(Restoring::load(&state, "main").expect("readable"), None);
        let path = path(&state, "main");
        let newer = serde_json::to_string(&Restoring { version: VERSION + 1, ..begun }).expect("JSON");
        for garbage in ["", "{}", "null", newer.as_str()] {
            storage::replace(&SystemStorage, &path, garbage.as_bytes()).expect("written");
            assert!(Restoring::load(&state, "main").is_err(), "{garbage}");
        }
    }
}
