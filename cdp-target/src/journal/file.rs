//! The files of a group that never change once they have their name, and what names them.
//!
//! A name is given once: a file that no manifest names is nobody's, and is replaced or swept away.

use super::manifest::PointRange;
use cdp_protocol::units::{Epoch, VolumeSlot};
use std::fmt;
use std::path::{Path, PathBuf};

/// Blocks of a slice: 64 MiB.
pub const SLICE_BLOCKS: u32 = 16 * 1024;

/// A stretch of a volume in a checkpoint, and the point at which its pack was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub struct SliceId {
    /// The volume.
    pub slot: VolumeSlot,
    /// Which slice of it, from 0.
    pub slice: u32,
    /// The point whose content it has.
    pub epoch: Epoch,
}

/// A file of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FileId {
    /// A journal segment.
    Segment {
        /// Its number.
        number: u64,
        /// 0 as its source wrote it; else the change of the manifest that it was rewritten for, or a higher number where a file has that
        /// name already.
        revision: u64,
    },
    /// The pack of a slice.
    Slice(SliceId),
}

/// A file of frames that ends with its index, as what names it knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// Which.
    pub id: FileId,
    /// Bytes of the file.
    pub len: u64,
    /// Where its frames end.
    pub frames_end: u64,
    /// BLAKE3 of its footer.
    pub footer_hash: [u8; 32],
    /// The points of a segment, if it has any.
    pub points: Option<PointRange>,
}

impl FileId {
    /// Whether the target wrote it from what it had: a pack.
    #[must_use]
    pub const fn is_pack(self) -> bool {
        !matches!(self, Self::Segment { revision: 0, .. })
    }

    /// Where it is.
    #[must_use]
    pub fn path(self, folder: &Path) -> PathBuf {
        match self {
            Self::Segment { number, revision: 0 } => super::segment::path(folder, number),
            Self::Segment { number, revision } => {
                folder.join("journal").join(format!("{number:016x}.{revision:x}.thin"))
            }
            Self::Slice(SliceId { slot, slice, epoch }) => {
                packs(folder).join(format!("{:04x}-{slice:08x}-{:016x}.pack", slot.0, epoch.0))
            }
        }
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment { number, .. } => write!(f, "segment {number}"),
            Self::Slice(slice) => slice.fmt(f),
        }
    }
}

impl fmt::Display for SliceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pack of volume {} slice {} at point {}", self.slot, self.slice, self.epoch)
    }
}

/// The folder of the packs of the group in `folder`.
#[must_use]
pub fn packs(folder: &Path) -> PathBuf {
    folder.join("packs")
}

/// The folder of its image indexes.
#[must_use]
pub fn checkpoints(folder: &Path) -> PathBuf {
    folder.join("checkpoints")
}
