//! Freezing file systems for a cut that does not validate otherwise, and thawing them whatever happens.
//!
//! Owns `FIFREEZE` and `FITHAW` (`ioctl_fs(2)`). Before a file system is frozen a watchdog stands beside it: this program once
//! more, in a process of its own, that holds the folder open and a pipe of ours. It thaws when the deadline has passed, or when the
//! pipe closes while the file system is still frozen: this process has died. Invariants: nothing is thawed that somebody
//! else has frozen; what is said to have been frozen all the while was. Looks up no path and writes nothing while anything is frozen.

#![allow(unsafe_code, reason = "these calls have no safe wrapper")]

use crate::mounts::{Mount, mounts};
use crate::probe::{self, Kind};
use crate::stack::{Layer, stack};
use cdp_seams::clock::Clock;
use cdp_seams::storage::Storage;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, ioctl, opcode};
use std::io::{self, PipeWriter, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Duration;

const FIFREEZE: u32 = opcode::read_write::<libc::c_int>(b'X', 119);
const FITHAW: u32 = opcode::read_write::<libc::c_int>(b'X', 120);

/// Told to a watchdog: the file system is about to be frozen, it is thawed or was never ours.
const CLAIM: u8 = b'f';
const RELEASE: u8 = b't';
/// How often a watchdog tries again to thaw what is not frozen yet: the kernel writes back what is dirty first.
const THAW_EVERY: Duration = Duration::from_millis(50);
/// How often it is tried for a process that has died: a minute.
const THAWS_MAX: usize = 1200;
/// The hidden command that a watchdog is.
pub const WATCHDOG_COMMAND: &str = "thaw-watchdog";

/// Freezes what is mounted from a group's volumes.
pub struct Freezer {
    /// Where mounts and devices are looked up.
    pub storage: Arc<dyn Storage>,
    /// The volumes' devices.
    pub devices: Vec<PathBuf>,
    /// How long anything may be frozen.
    pub deadline: Duration,
}

/// Why nothing is frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// There is nothing to freeze.
    #[error("no file system of the group's volumes is mounted here")]
    NothingMounted,
    /// A file system could not be.
    #[error("freeze {folder}: {what}")]
    Failed {
        /// Where it is mounted.
        folder: String,
        /// What was tried.
        what: &'static str,
        /// What came back.
        #[source]
        source: io::Error,
    },
}

/// Frozen file systems; thawed when this is dropped.
pub struct Frozen(Vec<FrozenFolder>);

impl Freezer {
    /// Freezes all of them, or none. What is dirty is written back first, while writes go on; the rest is
    /// written while they wait.
    ///
    /// # Errors
    /// Where there is none, or one cannot be frozen: it may be frozen by somebody else.
    pub fn freeze(&self) -> Result<Frozen, FreezeError> {
        let mounts = self.mounts();
        if mounts.is_empty() {
            return Err(FreezeError::NothingMounted);
        }
        let folders = mounts.iter().map(|mount| FrozenFolder::open(mount, self.deadline));
        let mut folders = folders.collect::<Result<Vec<_>, _>>()?;
        for folder in &mut folders {
            folder.freeze()?;
        }
        Ok(Frozen(folders))
    }

    /// Each file system once, what was mounted last first: it may lie on what was mounted before.
    fn mounts(&self) -> Vec<Mount> {
        let volumes: Vec<String> = self.devices.iter().filter_map(|device| self.name_of(device)).collect();
        let mut found: Vec<Mount> = Vec::new();
        for mount in mounts(&*self.storage).into_iter().rev() {
            let is_new = found.iter().all(|other| other.number != mount.number);
            let lies_on = |layer: &Layer| volumes.iter().any(|volume| is_built_on(layer, volume));
            if is_new && stack(&*self.storage, &mount.number).is_some_and(|layer| lies_on(&layer)) {
                found.push(mount);
            }
        }
        found
    }

    /// The kernel's name of a block device.
    fn name_of(&self, device: &Path) -> Option<String> {
        match probe::probe(&*self.storage, device).ok()?.kind {
            Kind::Block { number, .. } => stack(&*self.storage, &number).map(|layer| layer.name),
            Kind::File { .. } => None,
        }
    }
}

fn is_built_on(layer: &Layer, name: &str) -> bool {
    layer.name == name || layer.over.iter().any(|below| is_built_on(below, name))
}

impl Frozen {
    /// Thaws; `false` where something had been thawed before, so that nothing says that it stood still all the while.
    #[must_use]
    pub fn thaw(mut self) -> bool {
        let mut all = true;
        for folder in self.0.iter_mut().rev() {
            all &= folder.thaw();
        }
        all
    }
}

/// A file system, its watchdog, and whether we have frozen it.
struct FrozenFolder {
    name: String,
    folder: OwnedFd,
    pipe: PipeWriter,
    watchdog: Child,
    /// Whether the watchdog is to thaw it.
    is_claimed: bool,
}

impl FrozenFolder {
    /// Opens it, starts its watchdog, and has most of what is dirty written back.
    fn open(mount: &Mount, deadline: Duration) -> Result<Self, FreezeError> {
        let name = mount.mounted_on.clone();
        let failed = |what| {
            let folder = name.clone();
            move |source: io::Error| FreezeError::Failed { folder, what, source }
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(&mount.mounted_on, flags, Mode::empty());
        let folder = folder.map_err(|error| failed("open it")(error.into()))?;
        if !is_of(&folder, mount).map_err(|error| failed("look at it")(error.into()))? {
            return Err(failed("see it")(io::Error::other("something else is mounted over it")));
        }
        let (pipe, watchdog) = start_watchdog(&folder, deadline).map_err(failed("start its watchdog"))?;
        let opened = Self { name: name.clone(), folder, pipe, watchdog, is_claimed: false };
        rustix::fs::syncfs(&opened.folder).map_err(|error| failed("write back what is dirty")(error.into()))?;
        Ok(opened)
    }

    fn freeze(&mut self) -> Result<(), FreezeError> {
        let failed = |what, source| FreezeError::Failed { folder: self.name.clone(), what, source };
        self.pipe.write_all(&[CLAIM]).map_err(|source| failed("reach its watchdog", source))?;
        if let Err(source) = fifreeze(&self.folder) {
            let error = failed("ask the kernel", source.into());
            self.release();
            return Err(error);
        }
        self.is_claimed = true;
        Ok(())
    }

    /// `false` where it was not frozen any more.
    fn thaw(&mut self) -> bool {
        if !self.is_claimed {
            return false;
        }
        let thawed = fithaw(&self.folder);
        match thawed {
            Ok(()) | Err(Errno::INVAL) => self.release(),
            Err(error) => tracing::error!(folder = self.name, %error, "thaw: its watchdog goes on trying"),
        }
        thawed.is_ok()
    }

    fn release(&mut self) {
        self.is_claimed = false;
        // A watchdog that is gone needs no telling.
        let _ = self.pipe.write_all(&[RELEASE]);
    }
}

impl Drop for FrozenFolder {
    fn drop(&mut self) {
        self.thaw();
        // Where it has nothing to do any more it ends at once; else nobody waits for it.
        if !self.is_claimed {
            let _ = self.watchdog.kill();
            let _ = self.watchdog.wait();
        }
    }
}

/// Whether an open folder is of this file system: something else may be mounted over it. The number of btrfs's folders is its own.
fn is_of(folder: &OwnedFd, mount: &Mount) -> Result<bool, Errno> {
    let device = rustix::fs::fstat(folder)?.st_dev;
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    Ok(number == mount.number || mount.file_system == "btrfs" && rustix::fs::major(device) == 0)
}

/// In a process group of its own, so that Ctrl-C does not reach it. It finds the pipe as its stdin and the folder as its stdout.
fn start_watchdog(folder: &OwnedFd, deadline: Duration) -> io::Result<(PipeWriter, Child)> {
    let (stdin, pipe) = io::pipe()?;
    let watchdog = Command::new("/proc/self/exe")
        .arg(WATCHDOG_COMMAND)
        .arg(deadline.as_millis().to_string())
        .stdin(stdin)
        .stdout(folder.try_clone()?)
        .process_group(0)
        .spawn()?;
    Ok((pipe, watchdog))
}

/// What a watchdog does: waits to be told that the file system of `folder` is being frozen, and thaws it when the deadline
/// has passed since, or when nobody holds the other end of `pipe` any more. Ends then.
///
/// # Errors
/// Where the pipe cannot be waited for.
pub fn watch(pipe: impl AsFd, folder: impl AsFd, deadline: Duration, clock: &dyn Clock) -> io::Result<()> {
    let mut thaw_at = None;
    loop {
        let left = thaw_at.map(|at: Duration| at.saturating_sub(clock.monotonic()));
        if !is_readable(&pipe, left)? {
            let thawed = fithaw(&folder);
            // Not frozen yet, or not any more: that is told by whoever holds the pipe.
            thaw_at = thawed.is_err().then(|| clock.monotonic() + THAW_EVERY);
            if thawed.is_ok() {
                tracing::warn!(deadline_ms = deadline.as_millis() as u64, "thawed: the deadline has passed");
            }
            continue;
        }
        let mut told = [0];
        let is_over = rustix::io::read(&pipe, &mut told)? == 0;
        match told {
            _ if is_over => break,
            [CLAIM] => thaw_at = Some(clock.monotonic() + deadline),
            _ => thaw_at = None,
        }
    }
    if thaw_at.is_some() {
        thaw_for_the_dead(&folder)?;
    }
    Ok(())
}

fn thaw_for_the_dead(folder: &impl AsFd) -> io::Result<()> {
    for _ in 0..THAWS_MAX {
        match fithaw(folder) {
            Ok(()) => {
                tracing::warn!("thawed: the agent has died");
                return Ok(());
            }
            Err(Errno::INVAL) => return Ok(()),
            Err(error) => tracing::error!(%error, "thaw"),
        }
        wait(&mut [], Some(THAW_EVERY))?;
    }
    Ok(())
}

/// Waits until there is something to read, or the other end is closed; `false` where the time is over first.
fn is_readable(pipe: &impl AsFd, limit: Option<Duration>) -> io::Result<bool> {
    wait(&mut [PollFd::new(pipe, PollFlags::IN)], limit)
}

fn wait(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> io::Result<bool> {
    let limit =
        limit.map(|limit| Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) });
    loop {
        match poll(fds, limit.as_ref()) {
            Err(Errno::INTR) => {}
            ended => return Ok(ended? > 0),
        }
    }
}

fn fifreeze(folder: &impl AsFd) -> Result<(), Errno> {
    // SAFETY: the call takes a pointer that the kernel does not look at (fs/ioctl.c, `ioctl_fsfreeze`).
    let call = unsafe { IntegerSetter::<FIFREEZE>::new_usize(0) };
    // SAFETY: it reads and writes no memory of this process.
    unsafe { ioctl(folder, call) }
}

fn fithaw(folder: &impl AsFd) -> Result<(), Errno> {
    // SAFETY: as above (`ioctl_fsthaw`).
    let call = unsafe { IntegerSetter::<FITHAW>::new_usize(0) };
    // SAFETY: as above.
    unsafe { ioctl(folder, call) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_seams::clock::SystemClock;

    fn layer(name: &str, over: Vec<Layer>) -> Layer {
        Layer { name: name.into(), what: "disk".into(), over }
    }

    #[test]
    fn what_lies_on_a_volume_is_found_through_every_layer() {
        let stack = layer("dm-0", vec![layer("md0", vec![layer("sda2", vec![layer("sda", Vec::new())])])]);
        assert!(["dm-0", "md0", "sda2", "sda"].iter().all(|name| is_built_on(&stack, name)));
        assert!(!is_built_on(&stack, "sda1"));
    }

    /// A folder that cannot be thawed stands for one that was not frozen: the watchdog tries, and ends with the pipe.
    #[test]
    fn a_watchdog_ends_with_the_pipe_whatever_it_was_told() {
        let place = tempfile::tempdir().expect("a folder");
        for told in [&[][..], &[CLAIM], &[CLAIM, RELEASE], &[RELEASE, 0xff, CLAIM, CLAIM]] {
            let folder = rustix::fs::open(place.path(), OFlags::RDONLY, Mode::empty()).expect("open");
            let (pipe, mut writer) = io::pipe().expect("a pipe");
            let thread = std::thread::spawn(move || watch(pipe, folder, Duration::ZERO, &SystemClock::new()));
            writer.write_all(told).expect("it listens");
            drop(writer);
            thread.join().expect("no panic").expect("it ends well");
        }
    }

    #[test]
    fn what_is_mounted_over_is_told_from_what_lies_below() {
        let folder = rustix::fs::open("/proc", OFlags::RDONLY, Mode::empty()).expect("open");
        let device = rustix::fs::fstat(&folder).expect("a folder").st_dev;
        let own = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        let mount = |number: &str, file_system: &str| Mount {
            number: number.into(),
            mounted_on: "/proc".into(),
            file_system: file_system.into(),
        };
        assert_eq!(is_of(&folder, &mount(&own, "proc")), Ok(true));
        assert_eq!(is_of(&folder, &mount("7:1", "ext4")), Ok(false));
        assert_eq!(is_of(&folder, &mount("7:1", "btrfs")), Ok(true));
    }

    #[test]
    fn an_image_file_has_nothing_to_freeze() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(1 << 20).expect("sized");
        let devices = vec![file.path().to_owned(), PathBuf::from("/nowhere")];
        let storage = Arc::new(cdp_seams::storage::SystemStorage);
        let freezer = Freezer { storage, devices, deadline: Duration::from_secs(1) };
        assert!(matches!(freezer.freeze(), Err(FreezeError::NothingMounted)));
    }
}
