//! A file system on a device, mounted so that it can do as little as possible, and its log replayed where that can be.
//!
//! Read-only, `nosuid`, `nodev`, `noexec`; and without what its superblock may ask for where it is damaged: `errors=panic` would take this
//! machine down. It is the kernel that reads it; NTFS `ntfs-3g` where the kernel has no driver.

use super::error::KernelError;
use super::program::{Daemon, need, read_small, run};
use crate::drill::probe::Kind;
use cdp_seams::clock::Clock;
use rustix::mount::UnmountFlags;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What every file system is mounted with.
const OPTIONS: &str = "ro,nosuid,nodev,noexec";
/// Where a file system has no owners and modes: files are root's alone.
const MASKS: &str = "fmask=0177,dmask=0077";
/// Bytes of the kernel's list of file systems, at most.
const LIST_BYTES_MAX: usize = 64 << 10;

/// A file system that is mounted; it ends with this.
pub(super) struct Mount {
    at: PathBuf,
    /// What serves it, where that is not the kernel alone.
    _daemon: Option<Daemon>,
    /// Whether its log counts.
    pub(super) log: Log,
}

/// What became of a file system's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Log {
    /// It was replayed, where it was not empty.
    Replayed,
    /// It cannot be, and what stands there without it is shown.
    Refused,
    /// Whoever reads it does not look at the log.
    Ignored,
}

/// How the kernel is asked for a kind of file system.
struct Driver {
    name: &'static str,
    options: String,
    /// What has it mounted without its log.
    without_log: Option<&'static str>,
}

impl Driver {
    fn of(kind: Kind) -> Self {
        let (name, options, without_log) = match kind {
            // Its driver reads ext2 and ext3, too.
            Kind::Ext => ("ext4", "errors=remount-ro", Some("noload")),
            // Another point of the same volume may be mounted, too.
            Kind::Xfs => ("xfs", "nouuid", Some("norecovery")),
            Kind::Btrfs => ("btrfs", "", None),
            Kind::Ntfs => ("ntfs3", MASKS, None),
            Kind::Fat => ("vfat", "errors=remount-ro,utf8,fmask=0177,dmask=0077", None),
            _ => ("auto", "", None),
        };
        let comma = if options.is_empty() { "" } else { "," };
        Self { name, options: format!("{OPTIONS}{comma}{options}"), without_log }
    }

    fn mount(&self, more: &str, device: &Path, at: &Path) -> Result<(), String> {
        let options = format!("{}{more}", self.options);
        let arguments = ["--internal-only", "--types", self.name, "--options", &options];
        run(Command::new("mount").args(arguments).arg(device).arg(at)).map(drop)
    }

    /// Whether the kernel has it, once it was asked for.
    fn is_there(&self) -> bool {
        let list = read_small(Path::new("/proc/filesystems"), LIST_BYTES_MAX).unwrap_or_default();
        self.name == "auto"
            || String::from_utf8_lossy(&list).lines().any(|line| line.split_whitespace().last() == Some(self.name))
    }
}

impl Mount {
    /// Mounts what is on a device, at an empty folder; `said` is a file that may be made.
    ///
    /// # Errors
    /// Where the kernel does not take it, or has no driver.
    pub(super) fn new(
        kind: Kind,
        device: &Path,
        at: &Path,
        said: &Path,
        clock: &dyn Clock,
    ) -> Result<Self, KernelError> {
        let driver = Driver::of(kind);
        let mounted = |log| Self { at: at.to_owned(), _daemon: None, log };
        let Err(refused) = driver.mount("", device, at) else { return Ok(mounted(Log::Replayed)) };
        if !driver.is_there() {
            return match kind {
                Kind::Ntfs => Self::ntfs_3g(device, at, said, clock),
                _ => Err(KernelError::NoDriver { driver: driver.name }),
            };
        }
        match driver.without_log.map(|option| driver.mount(&format!(",{option}"), device, at)) {
            Some(Ok(())) => Ok(mounted(Log::Refused)),
            _ => Err(KernelError::Mount(refused)),
        }
    }

    fn ntfs_3g(device: &Path, at: &Path, said: &Path, clock: &dyn Clock) -> Result<Self, KernelError> {
        need(&["ntfs-3g"])?;
        let options = format!("{OPTIONS},no_detach,{MASKS}");
        let arguments = [OsStr::new("-o"), options.as_ref(), device.as_os_str(), at.as_os_str()];
        let before = device_of(at);
        let daemon = Daemon::start("ntfs-3g", &arguments, said, clock, || device_of(at) != before)?;
        Ok(Self { at: at.to_owned(), _daemon: Some(daemon), log: Log::Ignored })
    }
}

/// The number of the device that a folder is on; another once something is mounted there.
fn device_of(at: &Path) -> Option<u64> {
    rustix::fs::stat(at).ok().map(|stat| stat.st_dev)
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = rustix::mount::unmount(&self.at, UnmountFlags::DETACH) {
            tracing::warn!(%error, "the mounted file system is left behind, until this program ends");
        }
    }
}
