//! The audit log: a line for every point that was removed, and why.
//!
//! `audit.log` in the group's folder, one JSON object a line, only ever appended to and synced before the point goes.

use super::Removed;
use crate::journal::JournalError;
use crate::points::Instant;
use cdp_protocol::units::Timestamp;
use cdp_seams::storage::{Storage, StorageFile};
use serde_json::json;
use std::fmt::Write as _;
use std::io;
use std::path::Path;

/// Bounds what is held of their text, about 150 bytes each.
const LINES_AT_ONCE: usize = 4096;

pub(super) fn append(
    storage: &dyn Storage,
    folder: &Path,
    at: Timestamp,
    removed: &[Removed],
) -> Result<(), JournalError> {
    let path = folder.join("audit.log");
    let (file, is_new) = match storage.open_write(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            (storage.create_new(&path).map_err(JournalError::io("create", &path))?, true)
        }
        opened => (opened.map_err(JournalError::io("open", &path))?, false),
    };
    // A crash leaves any part of the lines behind those that were there: one that is cut off is ended here.
    let written = write_lines(file.as_ref(), at, removed).and_then(|()| file.sync());
    written.map_err(JournalError::io("append to", &path))?;
    if is_new {
        storage.sync_dir(folder).map_err(JournalError::io("sync folder", folder))?;
    }
    Ok(())
}

/// Some lines at a time: they may be half a million.
fn write_lines(file: &dyn StorageFile, at: Timestamp, removed: &[Removed]) -> io::Result<()> {
    let time = |time: Timestamp| Instant(time).to_string();
    let mut end = file.len()?;
    for removed in removed.chunks(LINES_AT_ONCE) {
        let mut lines = String::new();
        if !ends_with_a_line(file, end)? {
            lines.push('\n');
        }
        for point in removed {
            let Removed { epoch, time: of, received, reason } = point;
            let line = json!({
                "at": time(at), "removed": epoch, "time": of, "received": received, "reason": reason
            });
            writeln!(lines, "{line}").expect("text takes anything");
        }
        file.write_at(lines.as_bytes(), end)?;
        end += lines.len() as u64;
    }
    Ok(())
}

fn ends_with_a_line(file: &dyn StorageFile, end: u64) -> io::Result<bool> {
    let mut last = [b'\n'];
    if end > 0 {
        file.read_at(&mut last, end - 1)?;
    }
    Ok(last == [b'\n'])
}
