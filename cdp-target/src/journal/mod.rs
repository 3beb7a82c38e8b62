//! One group's history in one folder.
//!
//! * `manifest`: what the group is and which segments it has; the only file that is ever replaced.
//! * `file`: the files that never change and how they are named. `segment`, `index`: the bytes of a segment: header, frames, index,
//!   footer. `pack`: those of what the target puts together itself. `removed`: which points nobody can restore any more.
//! * `scan`, `walk`: reading a segment frame by frame, also over damage.
//! * `writer`: the one writer. `manifest_writer`: what it changes beside the history. `recovery`: what it does before the first append.
//! * `view`: the readers; `listing`: their points; `sealed`: their indexes of sealed segments; `pieces`: which frame holds a
//!   block at a point; `repairs`: what stands for damaged frames; `reach`: which points a damage hits; `unreadable`: which hold blocks that could
//!   not be read; `images`: the checkpoints' packs.
//! * `changes`: what a source sent after a point. `change`: what was prepared elsewhere and takes its place in the manifest.
//!
//! Invariant: data durable, then the point visible, then the ack; and nothing that was proven durable is ever cut off.

pub(crate) mod bytes;
mod caches;
pub mod change;
pub mod changes;
mod digests;
pub mod file;
mod images;
pub mod index;
pub mod lease;
pub(crate) mod listing;
pub mod manifest;
mod manifest_writer;
pub mod pack;
pub(crate) mod pieces;
mod point;
mod reach;
pub mod recovery;
pub mod removed;
pub(crate) mod repairs;
mod scan;
mod sealed;
pub mod segment;
mod unreadable;
pub mod view;
pub(crate) mod walk;
pub mod writer;

use cdp_protocol::escrow::Envelope;
use cdp_protocol::session::chain::ChainError;
use cdp_protocol::units::{Epoch, Generation, GroupId};
use std::io;
use std::path::{Path, PathBuf};

pub use bytes::FieldError;
pub(crate) use images::extents;
pub use listing::Overview;
pub use manifest::{Damage, Fork, Manifest};
pub use manifest_writer::short_claim;
pub use point::{Point, PointLayout, PointVolume};
pub use recovery::RecoveryReport;
pub(crate) use sealed::is_no_file;
pub use unreadable::Unreadable;
pub use view::GroupView;
pub use writer::GroupJournal;
pub(crate) use writer::synced_frame;

/// Who a group is. Changes only through the manifest.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct GroupIdentity {
    /// The group.
    pub group: GroupId,
    /// Name of its office.
    pub office: String,
    /// Its name within the office.
    pub name: String,
    /// Its data key, sealed to the target.
    #[serde(skip)]
    pub envelope: Envelope,
}

/// Bounds of a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalLimits {
    /// A segment that has reached this many bytes is sealed at the next sync.
    pub segment_bytes_max: u64,
}

impl Default for JournalLimits {
    fn default() -> Self {
        Self { segment_bytes_max: 64 * 1024 * 1024 }
    }
}

/// What went wrong with a journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The storage failed.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the storage said.
        source: io::Error,
    },
    /// The storage is full. Nothing that was synced is lost; what was not is to be sent again.
    #[error("{action} {}: no space left", path.display())]
    Full {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the storage said.
        source: io::Error,
    },
    /// The manifest cannot be used.
    #[error("read manifest {}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: manifest::ManifestError,
    },
    /// A segment cannot be used.
    #[error("read segment {}", path.display())]
    Segment {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: segment::SegmentError,
    },
    /// The folder has a group already.
    #[error("{} holds a group already", .0.display())]
    Exists(PathBuf),
    /// The frame does not follow.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// A source sent a record that only a target writes.
    #[error("a synced record does not come from a source")]
    NotFromASource,
    /// The storage failed to read something, which may be whole.
    #[error("the storage failed to read {0}: it may not another time")]
    NotRead(String),
    /// An earlier write or sync failed: the journal has to be opened anew before anything is taken.
    #[error("the journal stopped after a failure ({cause}); it has to be opened anew")]
    Poisoned {
        /// What failed.
        cause: String,
        /// Whether that was for want of room.
        full: bool,
    },
    /// Nothing is taken: a person has to decide.
    #[error("the group is frozen: {0}")]
    Frozen(String),
    /// There is no fork to end.
    #[error("the group is not frozen: there is no fork to resolve")]
    NotForked,
    /// No history ends there, or several do.
    #[error("{} at {named}, but at {}", if *is_ambiguous { "more than one history ends" } else { "no history ends" }, known.join(", "))]
    NoHistory {
        /// What was asked for.
        named: String,
        /// Whether several do.
        is_ambiguous: bool,
        /// Where those end that there are.
        known: Vec<String>,
    },
    /// Generations only rise.
    #[error("generation {wanted} is not above {granted}")]
    Generation {
        /// What was asked for.
        wanted: Generation,
        /// What was granted before.
        granted: Generation,
    },
    /// There is no such point.
    #[error("there is no point {0}")]
    NoPoint(Epoch),
    /// What was asked for is damaged.
    #[error("damaged: {0}")]
    Damaged(String),
    /// A change that was prepared does not fit any more.
    #[error("the store changed meanwhile: {0}")]
    Stale(String),
    /// The group's writer did not take a change.
    #[error("the group's writer did not take a change: {0}")]
    Refused(String),
    /// The operator, or the server's end, stopped it.
    #[error("interrupted")]
    Interrupted,
}

impl JournalError {
    /// Gives an I/O error its context.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { action, path, source },
            _ => Self::Io { action, path, source },
        }
    }

    /// Whether the storage is full, or was when the journal stopped.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::Poisoned { full: true, .. })
    }
}
