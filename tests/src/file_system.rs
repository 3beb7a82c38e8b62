//! The file systems a store may lie on: made, and mounted, small.

use crate::loop_device::Mount;
use crate::process::tool;
use anyhow::{Context, Result};
use std::path::Path;

const MIB: u64 = 1 << 20;

/// A file system of the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
}

impl FileSystem {
    /// Bytes of a small device: what XFS needs at least, and room for thousands of points and a segment's copy.
    #[must_use]
    pub const fn size_bytes(self) -> u64 {
        match self {
            Self::Ext4 | Self::Xfs => 384 * MIB,
            Self::Btrfs => 128 * MIB,
        }
    }

    /// Bytes at which a disk may tear under it.
    ///
    /// XFS and btrfs are for disks that write a page or do not. XFS replays nothing into a metadata block whose first sector is newer
    /// (found here: a directory's leaf torn at 512 bytes, and the mount refused); btrfs writes its superblock in place, and
    /// looks for no copy where that does not verify.
    #[must_use]
    pub const fn sector_bytes(self) -> usize {
        match self {
            Self::Ext4 => 512,
            Self::Xfs | Self::Btrfs => 4096,
        }
    }

    /// Makes it on a device.
    pub fn make(self, device: &Path) -> Result<()> {
        let device = device.to_str().context("a path of text")?;
        match self {
            Self::Ext4 => tool("mkfs.ext4", &["-q", "-F", "-E", "nodiscard", device]),
            Self::Xfs => tool("mkfs.xfs", &["-q", "-f", "-K", device]),
            Self::Btrfs => tool("mkfs.btrfs", &["-q", "-f", "--nodiscard", device]),
        }
        .map(drop)
    }

    /// Mounts it, which replays its journal.
    pub fn mount(self, device: &Path, folder: &Path) -> Result<Mount> {
        Mount::new(device, folder, "rw").with_context(|| format!("mount {self:?}"))
    }
}
