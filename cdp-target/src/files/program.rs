//! Programs that attaching and mounting need: those that end at once, and those that serve a mount as long as they run.
//!
//! Invariant: one that serves is told by the kernel when we die, however that is, and ends with its `Daemon`.

use super::error::KernelError;
use cdp_seams::clock::Clock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::fs::{Access, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How long one may take until what it serves is there.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// What is mounted in our namespace; it tells when that changes.
const MOUNTS: &str = "/proc/thread-self/mountinfo";
/// How often it is looked whether the program has ended meanwhile, in nanoseconds.
const LOOK_NS: i64 = 100_000_000;
/// Bytes of what a program says that are shown.
const SAID_MAX: usize = 400;

/// A program that serves a mount.
pub(super) struct Daemon(Child);

impl Daemon {
    /// Starts one, with a new file for what it says, and waits until `is_up`.
    ///
    /// # Errors
    /// Where it cannot be started, or ends, or nothing is mounted for long.
    pub(super) fn start(
        program: &'static str,
        arguments: &[&OsStr],
        said: &Path,
        clock: &dyn Clock,
        is_up: impl Fn() -> bool,
    ) -> Result<Self, KernelError> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let output = rustix::fs::open(said, flags, Mode::RUSR | Mode::WUSR);
        let output = output.map_err(KernelError::system("make a file in the scratch folder"))?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", program])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            // What ends us from the keyboard does not end it before us.
            .process_group(0)
            .spawn();
        let mut daemon = Self(child.map_err(KernelError::system("start a program"))?);
        let deadline = clock.monotonic() + START_TIMEOUT;
        let mounts = rustix::fs::open(MOUNTS, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let mounts = mounts.map_err(KernelError::system("look at what is mounted"))?;
        while !is_up() {
            let ended = daemon.0.try_wait().map_err(KernelError::system("wait for a program"))?;
            if ended.is_some() || clock.monotonic() > deadline {
                return Err(KernelError::Program { program, said: last_words(said) });
            }
            wait_for_mount(&mounts);
        }
        Ok(daemon)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It unmounts what it serves.
        let _ = rustix::process::kill_process(Pid::from_child(&self.0), Signal::TERM);
        let _ = self.0.wait();
    }
}

/// Waits until something is mounted, or for a while.
fn wait_for_mount(mounts: &OwnedFd) {
    let timeout = Timespec { tv_sec: 0, tv_nsec: LOOK_NS };
    // A signal ends it early, which is as well.
    let _ = poll(&mut [PollFd::new(mounts, PollFlags::PRI)], Some(&timeout));
}

/// Whether all of some programs are there.
///
/// # Errors
/// Where one is not.
pub(super) fn need(programs: &[&'static str]) -> Result<(), KernelError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = |program: &str| {
        std::env::split_paths(&path).any(|folder| rustix::fs::access(folder.join(program), Access::EXEC_OK).is_ok())
    };
    programs.iter().find(|program| !is_there(program)).map_or(Ok(()), |program| Err(KernelError::NoProgram { program }))
}

/// Runs a program; gives what it says on stdout, or why it failed.
pub(super) fn run(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(cut(&text(&output.stderr))) }
}

/// A small file, up to `bytes_max`.
pub(super) fn read_small(path: &Path, bytes_max: usize) -> Result<Vec<u8>, Errno> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let (mut bytes, mut len) = (vec![0; bytes_max], 0);
    while len < bytes_max {
        match rustix::io::read(&file, &mut bytes[len..])? {
            0 => break,
            read => len += read,
        }
    }
    bytes.truncate(len);
    Ok(bytes)
}

fn last_words(path: &Path) -> String {
    cut(String::from_utf8_lossy(&read_small(path, SAID_MAX).unwrap_or_default()).trim())
}

fn cut(said: &str) -> String {
    let line: String = said.replace('\n', " ").chars().take(SAID_MAX).collect();
    if line.is_empty() { "it said nothing".into() } else { line }
}
