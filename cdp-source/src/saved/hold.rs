//! Holding a device so that nobody can mount it, and having what was written to it by way of its page cache on the disk.
//!
//! An exclusive open fails while the device is mounted, swapped to, or part of another device, and so do those while it stands. It does not
//! keep out who has opened the device plainly and writes to it.

use crate::tracker::device::Device;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Nobody else mounts the device while this stands.
pub(super) struct Hold {
    node: OwnedFd,
    /// Of a partition, the whole disk's node, which has a page cache of its own.
    disk: OwnedFd,
}

impl Hold {
    /// Holds `device`, or tells why not, in a line.
    pub(super) fn take(device: &Device) -> Result<Self, String> {
        let node = open(&device.path, OFlags::EXCL).map_err(|errno| match errno {
            Errno::BUSY => "it is mounted, or in use as part of something else".to_owned(),
            errno => format!("it cannot be opened: {errno}"),
        })?;
        let disk =
            open(&device.disk_node, OFlags::empty()).map_err(|errno| format!("its disk cannot be opened: {errno}"))?;
        Ok(Self { node, disk })
    }

    /// Has on the disk what was written by way of the page cache.
    pub(super) fn sync(&self) -> Result<(), String> {
        let failed = |errno| format!("what was written to it cannot be synced: {errno}");
        rustix::fs::fsync(&self.node).map_err(failed)?;
        rustix::fs::fsync(&self.disk).map_err(failed)
    }
}

fn open(path: &Path, extra: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | extra, Mode::empty())
}
