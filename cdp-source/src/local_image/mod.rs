//! Local images: a full copy of a group on a disk or share at the office, to restore from without the target.
//!
//! An image is read from the volumes while they are written to: a pass over every block in order, and behind it what the points made
//! meanwhile have captured; the newest content counts. It is closed by a point, of which it is then exactly the volumes. Invariants: it has
//! its name only once all of it was read again and found whole; an older image goes only after that; nothing is written where the folder's own
//! marker is not; points are never held up by it.
//!
//! `tee` is the group's end of it, `maker` makes one, `writer` and `table` are its file, `reader` reads one, `check` proves it,
//! `source` answers a restore from it, `folder` knows which there are, `schedule` says when. Bytes are `format`'s.

pub mod check;
pub mod folder;
pub mod format;
pub mod maker;
pub mod named;
pub mod reader;
pub mod schedule;
pub mod source;
pub mod status;
mod table;
pub mod tee;
pub mod writer;

use cdp_protocol::units::GroupId;
use format::FormatError;
use std::io;
use std::path::{Path, PathBuf};

/// Why an image cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A call failed.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What came back.
        #[source]
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: FormatError,
    },
    /// Some of it is damaged.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What, and where.
        what: String,
    },
    /// It is of another group.
    #[error("{} is of another group ({found}), not of {wanted}", path.display())]
    OtherGroup {
        /// The file.
        path: PathBuf,
        /// Its group.
        found: GroupId,
        /// The group that was meant.
        wanted: GroupId,
    },
    /// The folder is not there, or not ready.
    #[error("{} is not there: the disk or share is not mounted, or the folder was not made ready", .0.display())]
    NoMarker(PathBuf),
    /// The folder cannot be used.
    #[error("{0}")]
    Folder(String),
}

impl ImageError {
    /// The next step, where there is one.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoMarker(_) => Some("mount it; a new folder is made ready once, by `cdp-source image init`".into()),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("the disk is full: it needs room for one image more than are kept; lower local_image.keep, or use a larger disk".into())
            }
            Self::Format { reason: FormatError::Version(_), .. } => Some("use a program as new as the one that made it".into()),
            Self::Format { reason: FormatError::Key, .. } => {
                Some("it takes groups/GROUP/data.key of the machine that made it, in the state folder".into())
            }
            Self::Format { .. } | Self::Damaged { .. } => {
                Some("another image may be whole: `cdp-source image ls`, `cdp-source image verify`".into())
            }
            Self::OtherGroup { .. } => Some("--group names the group; each has a folder of its own".into()),
            _ => None,
        }
    }

    /// Whether the operator can do something about it.
    #[must_use]
    pub const fn is_users(&self) -> bool {
        !matches!(self, Self::Io { .. })
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::Io { action, path, source }
}

#[cfg(test)]
mod tests;
