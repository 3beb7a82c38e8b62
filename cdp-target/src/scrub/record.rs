//! When which sealed segment of a group was read last: `scrub` beside the group's manifest, one line of JSON.
//!
//! A help, not a promise: where it is missing, damaged or of a newer version, everything is read again.

use cdp_protocol::units::Timestamp;
use cdp_seams::storage::{Storage, read_all, replace};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

const VERSION: u32 = 1;
const BYTES_MAX: u64 = 64 << 20;

/// When what was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubRecord {
    version: u32,
    /// By segment: when it was read whole and nothing was wrong.
    clean: BTreeMap<u64, i64>,
    /// By segment: when it was read and something was.
    damaged: BTreeMap<u64, i64>,
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

    /// When a segment was read last.
    #[must_use]
    pub fn read_at(&self, segment: u64) -> Option<Timestamp> {
        self.clean.get(&segment).or_else(|| self.damaged.get(&segment)).copied().map(Timestamp)
    }

    /// When a segment was read last and found whole.
    #[must_use]
    pub fn clean_at(&self, segment: u64) -> Option<Timestamp> {
        self.clean.get(&segment).copied().map(Timestamp)
    }

    pub(super) fn set(&mut self, segment: u64, at: Timestamp) {
        self.damaged.remove(&segment);
        self.clean.insert(segment, at.0);
    }

    pub(super) fn set_damaged(&mut self, segment: u64, at: Timestamp) {
        self.clean.remove(&segment);
        self.damaged.insert(segment, at.0);
    }

    /// Forgets all segments but these.
    pub(super) fn keep(&mut self, segments: impl Iterator<Item = u64>) {
        let segments: BTreeSet<u64> = segments.collect();
        self.clean.retain(|segment, _| segments.contains(segment));
        self.damaged.retain(|segment, _| segments.contains(segment));
    }
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
        (1..=3).for_each(|segment| record.set(segment, Timestamp(segment as i64 * 10)));
        record.set_damaged(2, Timestamp(50));
        record.keep([2, 3, 4].into_iter());
        record.write(&SystemStorage, folder.path()).expect("written");
        let read = ScrubRecord::read(&SystemStorage, folder.path());
        assert_eq!(read, record);
        assert_eq!([1, 2, 3].map(|segment| read.read_at(segment)), [None, Some(Timestamp(50)), Some(Timestamp(30))]);
        assert_eq!([2, 3].map(|segment| read.clean_at(segment)), [None, Some(Timestamp(30))]);
        for text in ["", "{", "{\"version\":2,\"clean\":{},\"damaged\":{}}"] {
            replace(&SystemStorage, &path(folder.path()), text.as_bytes()).expect("written");
            assert_eq!(ScrubRecord::read(&SystemStorage, folder.path()), ScrubRecord::default(), "{text}");
        }
    }
}
