//! Whether there is still room while a drill writes.
//!
//! Invariant: a drill ends soon after less than its spare is free, whoever took the rest: a store that shares the disk needs it more.

use super::scratch::Scratch;
use cdp_seams::storage::Storage;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Bytes that are written, or passed over, between two looks.
const LOOK_EVERY_BYTES: u64 = 64 << 20;

/// Looks after the free room of a drill's folder.
pub(super) struct Room<'a> {
    storage: &'a dyn Storage,
    folder: &'a Path,
    spare_bytes: u64,
    /// Ends the drill.
    stop: &'a AtomicBool,
    since: AtomicU64,
    is_over: AtomicBool,
}

impl<'a> Room<'a> {
    pub(super) fn new(storage: &'a dyn Storage, scratch: &'a Scratch, stop: &'a AtomicBool) -> Self {
        let (folder, spare_bytes) = (scratch.path(), scratch.spare_bytes());
        Self { storage, folder, spare_bytes, stop, since: AtomicU64::new(0), is_over: AtomicBool::new(false) }
    }

    /// So many bytes were written; looks now and then, and ends the drill where there is too little left.
    pub(super) fn written(&self, bytes: u64) {
        if self.since.fetch_add(bytes, Ordering::Relaxed) + bytes < LOOK_EVERY_BYTES {
            return;
        }
        self.since.store(0, Ordering::Relaxed);
        // Where it cannot be asked, a write will tell.
        if self.storage.free_bytes(self.folder).is_ok_and(|free| free < self.spare_bytes) {
            self.is_over.store(true, Ordering::Relaxed);
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    /// Refuses where the drill has been ended.
    pub(super) fn check(&self) -> io::Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
    }

    /// The bytes that were to stay free, where they do not.
    pub(super) fn missing(&self) -> Option<u64> {
        self.is_over.load(Ordering::Relaxed).then_some(self.spare_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::{LOOK_EVERY_BYTES, Room};
    use crate::drill::scratch::Scratch;
    use cdp_seams::random::SimRandom;
    use cdp_seams::storage::{Storage, SystemStorage};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_drill_ends_where_less_than_its_spare_is_free() {
        let storage: Arc<dyn Storage> = Arc::new(SystemStorage);
        let parent = tempfile::tempdir().expect("a folder");
        let scratch = Scratch::new(&storage, parent.path(), &SimRandom::new(3)).expect("made");
        for (spare_bytes, is_missing) in [(0, false), (u64::MAX, true)] {
            let stop = AtomicBool::new(false);
            let room = Room { spare_bytes, ..Room::new(storage.as_ref(), &scratch, &stop) };
            room.written(LOOK_EVERY_BYTES - 1);
            assert!(room.check().is_ok(), "it is not looked at each piece");
            room.written(1);
            assert_eq!((room.missing().is_some(), stop.load(Ordering::Relaxed)), (is_missing, is_missing));
            assert_eq!(room.check().is_err(), is_missing);
        }
    }
}
