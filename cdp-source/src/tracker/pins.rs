//! The folders of bpffs in which trackings are pinned, and whether this machine can have any.
//!
//! Owns `<bpffs>/cdp/<group>/<tracker>/`, the lock on a group's folder (one tracker a group, whichever process), and
//! the check that the kernel has what the tracker needs. Does not know what is pinned.
#![allow(unsafe_code, reason = "membarrier has no safe wrapper")]

use super::TrackerError;
use super::device::read_text;
use super::instance;
use cdp_protocol::units::GroupId;
use cdp_seams::storage::{Storage, SystemStorage};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Where bpffs is usually mounted.
pub const BPFFS: &str = "/sys/fs/bpf";
const BPFFS_MAGIC: u64 = 0xcafe_4a11;
const BTF: &str = "/sys/kernel/btf/vmlinux";
/// The first kernel with `bpf_loop`.
const KERNEL_MIN: (u32, u32) = (5, 17);

/// Whether the eBPF tracker can work on this machine, for `doctor`. Mounts bpffs if that is what is missing.
///
/// # Errors
/// What is missing.
pub fn supported() -> Result<(), TrackerError> {
    supported_at(Path::new(BPFFS))
}

pub(super) fn supported_at(bpffs: &Path) -> Result<(), TrackerError> {
    let refuse = |reason: String| {
        let step = "track with eBPF".to_owned();
        Err(TrackerError::Unsupported { step, reason: format!("{reason}; the `scan` tracker works without") })
    };
    let system = rustix::system::uname();
    let release = system.release().to_string_lossy();
    if kernel_version(&release).is_some_and(|version| version < KERNEL_MIN) {
        return refuse(format!("the kernel is {release}, and needs to be 5.17 or later"));
    }
    if rustix::fs::stat(BTF).is_err() {
        return refuse(format!("the kernel has no BTF ({BTF} is missing)"));
    }
    if !may_load_programs() {
        return refuse(
            "this process has neither CAP_SYS_ADMIN nor CAP_BPF with CAP_PERFMON (run it as root)".to_owned(),
        );
    }
    let mount = || rustix::mount::mount("bpf", bpffs, "bpf", rustix::mount::MountFlags::empty(), None);
    if !is_bpffs(bpffs)
        && let Err(error) = mount()
    {
        return refuse(format!("bpffs is not mounted on {}, and cannot be: {error}", bpffs.display()));
    }
    Ok(())
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn may_load_programs() -> bool {
    const PERFMON: u32 = 38;
    const BPF: u32 = 39;
    const SYS_ADMIN: u32 = 21;
    let status = read_text(Path::new("/proc/self/status")).unwrap_or_default();
    let held = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let held = held.and_then(|held| u64::from_str_radix(held.trim(), 16).ok()).unwrap_or(0);
    let has = |capability: u32| held >> capability & 1 != 0;
    has(SYS_ADMIN) || (has(BPF) && has(PERFMON))
}

fn is_bpffs(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type as u64 & 0xffff_ffff == BPFFS_MAGIC)
}

/// Where the trackings of `group` are pinned.
pub(super) fn group_folder(bpffs: &Path, group: GroupId) -> PathBuf {
    bpffs.join("cdp").join(group.to_string())
}

/// Whether `name` can name a tracking's folder: it comes from a file, and becomes part of a path.
pub(super) fn is_tracker_name(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The lock on a group's folder: held until this is dropped or the process ends, also by a kill.
pub(super) struct Lock(OwnedFd);

impl Drop for Lock {
    /// Unlocks instead of only closing: a child that is between its fork and its exec has the file open too.
    fn drop(&mut self) {
        if let Err(error) = rustix::fs::flock(&self.0, FlockOperation::Unlock) {
            tracing::warn!(%error, "the lock of a group's tracking could not be released");
        }
    }
}

/// Makes a group's folder and takes its lock.
pub(super) fn lock(folder: &Path) -> Result<Lock, TrackerError> {
    let failed = |source| TrackerError::Io { step: format!("lock {}", folder.display()), source };
    for folder in [folder.parent().unwrap_or(folder), folder] {
        match rustix::fs::mkdir(folder, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failed(error.into())),
        }
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(folder, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
    match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Lock(fd)),
        Err(Errno::WOULDBLOCK) => {
            let reason = "another process tracks this group".to_owned();
            Err(TrackerError::Unsupported { step: format!("lock {}", folder.display()), reason })
        }
        Err(error) => Err(failed(error.into())),
    }
}

/// Removes every tracking of a group but the one in `kept`.
pub(super) fn remove_others(folder: &Path, kept: &Path) -> io::Result<()> {
    for name in SystemStorage.list(folder)? {
        let tracking = folder.join(name);
        if tracking != kept {
            remove(&tracking)?;
        }
    }
    Ok(())
}

/// Removes one tracking.
pub(super) fn remove(tracking: &Path) -> io::Result<()> {
    instance::remove(tracking, &SystemStorage.list(tracking)?)
}

/// Removes every tracking of a group, and its folder.
pub(super) fn remove_all(folder: &Path) -> io::Result<()> {
    remove_others(folder, Path::new(""))?;
    Ok(rustix::fs::rmdir(folder)?)
}

/// Drops everything that is pinned for `group`, and the record of it: nothing is tracked afterwards.
///
/// # Errors
/// Where a process tracks the group, or something cannot be removed.
pub fn take_down(bpffs: &Path, state_folder: &Path, storage: &dyn Storage, group: GroupId) -> Result<(), TrackerError> {
    let failed = |source| TrackerError::Io { step: format!("remove the tracking of group {group}"), source };
    let record = state_folder.join(format!("tracker-{group}.json"));
    let folder = group_folder(bpffs, group);
    if rustix::fs::stat(&folder).is_ok() {
        let _lock = lock(&folder)?;
        remove_all(&folder).map_err(failed)?;
    }
    match storage.remove(&record) {
        Ok(()) => storage.sync_dir(state_folder).map_err(failed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
    }
}

/// Returns when every program run that had begun has ended.
pub(super) fn wait_for_runs() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_long = 1;
    // SAFETY: takes numbers only. The kernel waits for an RCU grace period, and program runs are inside RCU sections.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernels_release_is_read() {
        assert_eq!(kernel_version("6.1.0-28-amd64"), Some((6, 1)));
        assert_eq!(kernel_version("5.17-rc3"), Some((5, 17)));
        assert_eq!(kernel_version("strange"), None);
    }

    #[test]
    fn only_plain_names_become_part_of_a_path() {
        assert!(is_tracker_name("0123456789abcdef0123456789abcdef"));
        assert!(!is_tracker_name("../../../../../../etc/0123456789a"));
        assert!(!is_tracker_name(""));
    }
}
