//! The audit log: a line for every point that was removed, and why.
//!
//! `audit.log` in the group's folder, one JSON object a line, only ever appended to and synced before the point goes.

use super::Removed;
use crate::journal::JournalError;
use crate::points::Instant;
use cdp_protocol::units::Timestamp;
use cdp_seams::storage::Storage;
use serde_json::json;
use std::fmt::Write as _;
use std::io;
use std::path::Path;

pub(super) fn append(
    storage: &dyn Storage,
    folder: &Path,
    at: Timestamp,
    removed: &[Removed],
) -> Result<(), JournalError> {
    let path = folder.join("audit.log");
    let time = |time: Timestamp| Instant(time).to_string();
    let mut lines = String::new();
    for point in removed {
        let Removed { epoch, time: of, received, reason } = point;
        let line = json!({
            "at": time(at), "removed": epoch, "time": of, "received": received, "reason": reason
        });
        writeln!(lines, "{line}").expect("text takes anything");
    }
    let (file, is_new) = match storage.open_write(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            (storage.create_new(&path).map_err(JournalError::io("create", &path))?, true)
        }
        opened => (opened.map_err(JournalError::io("open", &path))?, false),
    };
    // A crash leaves any part of the lines behind those that were there: one that is cut off is ended here.
    let written = file.len().and_then(|end| {
        let mut last = [b'\n'];
        file.read_at(&mut last, end.saturating_sub(1))?;
        if last != [b'\n'] {
            lines.insert(0, '\n');
        }
        file.write_at(lines.as_bytes(), end)?;
        file.sync()
    });
    written.map_err(JournalError::io("append to", &path))?;
    if is_new {
        storage.sync_dir(folder).map_err(JournalError::io("sync folder", folder))?;
    }
    Ok(())
}
