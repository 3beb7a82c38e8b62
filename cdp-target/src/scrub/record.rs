//! When which sealed segment and pack of a group was read last: `scrub` beside the group's manifest, one line of JSON.
//!
//! A help, not a promise: where it is missing, damaged or of a newer version, everything is read again.

use crate::journal::file::FileId;
use cdp_protocol::units::Timestamp;
use cdp_seams::storage::{Storage, read_all, replace};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

/// Version 1 had segments by number, and no packs.
const VERSION: u32 = 2;
const BYTES_MAX: u64 = 64 << 20;

/// When what was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubRecord {
    version: u32,
    /// By file: when it was read whole and nothing was wrong.
    clean: BTreeMap<String, i64>,
    /// By file: when it was read and something was.
    damaged: BTreeMap<String, i64>,
}

impl Default for ScrubRecord {
    fn default() -> Self {
        Self { version: VERSION, clean: BTreeMap::new(), damaged: BTreeMap::new() }
    }
}

/// Where the record of the group in `folder` is.
pub(super) fn path(folder: &Path) -> PathBuf {
    folder.join("scrub")
}

impl ScrubRecord {
    /// The record of the group in `folder`; an empty one where there is none that can be used.
    #[must_use]
    pub fn read(storage: &dyn Storage, folder: &Path) -> Self {
        let bytes = read_all(storage, &path(folder), BYTES_MAX).unwrap_or_default();
        let record: Option<Self> = serde_json::from_slice(&bytes).ok();
        record.filter(|record| record.version == VERSION).unwrap_or_default()
    }

    pub(super) fn write(&self, storage: &dyn Storage, folder: &Path) -> io::Result<()> {
        replace(storage, &path(folder), &serde_json::to_vec(self)?)
    }

    /// When a file was read last.
    #[must_use]
    pub fn read_at(&self, file: FileId) -> Option<Timestamp> {
        let name = name(file);
        self.clean.get(&name).or_else(|| self.damaged.get(&name)).copied().map(Timestamp)
    }

    /// When a file was read last and found whole.
    #[must_use]
    pub fn clean_at(&self, file: FileId) -> Option<Timestamp> {
        self.clean.get(&name(file)).copied().map(Timestamp)
    }

    pub(super) fn set(&mut self, file: FileId, at: Timestamp) {
        self.damaged.remove(&name(file));
        self.clean.insert(name(file), at.0);
    }

    pub(super) fn set_damaged(&mut self, file: FileId, at: Timestamp) {
        self.clean.remove(&name(file));
        self.damaged.insert(name(file), at.0);
    }

    /// Forgets all files but these.
    pub(super) fn keep(&mut self, files: impl Iterator<Item = FileId>) {
        let names: BTreeSet<String> = files.map(name).collect();
        self.clean.retain(|name, _| names.contains(name));
        self.damaged.retain(|name, _| names.contains(name));
    }
}

/// A file's name: no two of a group have the same.
fn name(file: FileId) -> String {
    let path = file.path(Path::new(""));
    path.file_name().expect("a file has a name").to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_seams::storage::SystemStorage;

    #[test]
    fn it_is_read_back_and_one_that_cannot_be_is_as_none() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut record = ScrubRecord::default();
        assert_eq!(ScrubRecord::read(&SystemStorage, folder.path()), record);
        let file = |number| FileId::Segment { number, revision: 0 };
        (1..=3).for_each(|segment| record.set(file(segment), Timestamp(segment as i64 * 10)));
        record.set_damaged(file(2), Timestamp(50));
        record.keep([2, 3, 4].into_iter().map(file));
        record.write(&SystemStorage, folder.path()).expect("written");
        let read = ScrubRecord::read(&SystemStorage, folder.path());
        assert_eq!(read, record);
        assert_eq!(
            [1, 2, 3].map(|segment| read.read_at(file(segment))),
            [None, Some(Timestamp(50)), Some(Timestamp(30))]
        );
        assert_eq!([2, 3].map(|segment| read.clean_at(file(segment))), [None, Some(Timestamp(30))]);
        for text in ["", "{", "{\"version\":3,\"clean\":{},\"damaged\":{}}"] {
            replace(&SystemStorage, &path(folder.path()), text.as_bytes()).expect("written");
            assert_eq!(ScrubRecord::read(&SystemStorage, folder.path()), ScrubRecord::default(), "{text}");
        }
    }
}
