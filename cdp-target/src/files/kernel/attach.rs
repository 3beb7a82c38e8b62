//! A point attached to the kernel: our own NBD server, `nbdfuse`, which makes a file of its export, a loop device over that, and a mount.
//!
//! The mount is read-only; the device is not: it has an overlay in a scratch folder, so that the kernel can replay the log that a file system in
//! use leaves. Invariant: nothing is written to the store, and all of it ends with us. It is ended in order where we end in order; where we
//! are killed, `nbdfuse` is told so by the kernel, and the mount namespace that only we two are in goes with everything that is mounted in it.

use crate::drill::probe::{Kind, Place};
use crate::nbd::exports::Exports;
use crate::nbd::overlay::format::Base;
use crate::nbd::overlay::{Overlay, OverlayError};
use crate::nbd::points::{OpenPoint, Points};
use crate::nbd::server::Server;
use crate::nbd::socket::{Address, ListenError, Listener, escaped};
use cdp_protocol::units::Head;
use cdp_seams::clock::Clock;
use cdp_seams::storage::Storage;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::process::{Pid, Signal};
use rustix::thread::UnshareFlags;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;
use tempfile::TempDir;

/// How long `nbdfuse` may take until its file is there.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// What is mounted in our namespace; it tells when that changes.
const MOUNTS: &str = "/proc/thread-self/mountinfo";
/// How often it is looked whether the program has ended meanwhile, in nanoseconds.
const START_LOOK_NS: i64 = 100_000_000;
/// Bytes of what a program says that are shown.
const SAID_MAX: usize = 400;

/// Why a point cannot be attached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    /// Mounting is root's.
    #[error("its file system has to be mounted, which only root may do")]
    NotRoot,
    /// A program is missing.
    #[error("`{program}` is not there")]
    NoProgram {
        /// Which.
        program: &'static str,
    },
    /// The kernel does not take the file system.
    #[error("the kernel does not mount it: {0}")]
    Mount(String),
    /// A program failed.
    #[error("{program} failed: {said}")]
    Program {
        /// Which.
        program: &'static str,
        /// What it said.
        said: String,
    },
    /// The server cannot listen.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Nothing can be written to the scratch folder.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The machine does not do its part.
    #[error("{what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl KernelError {
    fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::System { what, source: error.into() }
    }
}

/// What is attached; it ends with this.
pub(crate) struct Attached {
    is_mounted: bool,
    fuse: Option<Child>,
    stop: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
    warnings: Vec<String>,
    folder: TempDir,
}

/// What is to be attached.
pub(crate) struct Source<'a> {
    pub(crate) points: Points,
    pub(crate) point: Arc<OpenPoint>,
    pub(crate) volume: &'a str,
    pub(crate) place: Place,
    pub(crate) storage: &'a dyn Storage,
    pub(crate) clock: Arc<dyn Clock>,
}

impl Attached {
    /// Attaches a point, by way of an empty folder, and mounts the file system at a place of a volume; gives its topmost folder.
    ///
    /// # Errors
    /// Where something is missing for it, or the kernel does not take it.
    pub(crate) fn attach(source: Source<'_>, folder: TempDir) -> Result<(Self, OwnedFd), KernelError> {
        if !rustix::process::geteuid().is_root() {
            return Err(KernelError::NotRoot);
        }
        for program in ["nbdfuse", "setpriv", "losetup", "mount"] {
            if !is_there(program) {
                return Err(KernelError::NoProgram { program });
            }
        }
        own_namespace()?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut attached = Self { is_mounted: false, fuse: None, stop, server: None, warnings: Vec::new(), folder };
        let (place, clock, volume) = (source.place, Arc::clone(&source.clock), source.volume);
        attached.serve(source)?;
        attached.start_fuse(volume, clock.as_ref())?;
        let root = attached.mount(place)?;
        Ok((attached, root))
    }

    /// What has to be said of it.
    pub(crate) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn serve(&mut self, source: Source<'_>) -> Result<(), KernelError> {
        let head = Head { epoch: source.point.epoch(), hash: source.point.hash };
        let base = Base { group: source.point.group(), head, volumes: source.point.image.volumes().to_vec() };
        let overlay = Arc::new(Overlay::open(source.storage, &self.path("overlay"), base)?);
        let listener = Listener::bind(&Address::Unix(self.path("nbd")))?;
        let exports = Exports::new(source.points, source.point, Some(overlay));
        let server = Server::new(listener, exports, None, source.clock, Arc::clone(&self.stop));
        let serve = move || {
            if let Err(error) = server.run() {
                tracing::debug!(%error, "the overlay was not flushed");
            }
        };
        let started = std::thread::Builder::new().name("nbd-server".into()).spawn(serve);
        self.server = Some(started.map_err(KernelError::system("start a thread"))?);
        Ok(())
    }

    /// Starts `nbdfuse`, and waits until its file is there.
    fn start_fuse(&mut self, volume: &str, clock: &dyn Clock) -> Result<(), KernelError> {
        let (folder, said) = (self.path("disk"), self.path("said"));
        rustix::fs::mkdir(&folder, Mode::RWXU).map_err(KernelError::system("make a folder"))?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let output =
            rustix::fs::open(&said, flags, Mode::RUSR | Mode::WUSR).map_err(KernelError::system("make a file"))?;
        let file = folder.join("disk");
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "nbdfuse"])
            .arg(&file)
            .arg(format!("nbd+unix:///{volume}?socket={}", escaped(&self.path("nbd"))))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(output)
            // What ends us from the keyboard does not end it before us.
            .process_group(0)
            .spawn()
            .map_err(KernelError::system("start nbdfuse"))?;
        let child = self.fuse.insert(child);
        let deadline = clock.monotonic() + START_TIMEOUT;
        let mounts = rustix::fs::open(MOUNTS, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let mounts = mounts.map_err(KernelError::system("look at what is mounted"))?;
        while rustix::fs::stat(&file).is_err() {
            let ended = child.try_wait().map_err(KernelError::system("wait for nbdfuse"))?;
            if ended.is_some() || clock.monotonic() > deadline {
                return Err(KernelError::Program { program: "nbdfuse", said: last_words(&said) });
            }
            wait_for_mount(&mounts);
        }
        Ok(())
    }

    /// Mounts the file system at a place, with its log replayed where that can be.
    fn mount(&mut self, place: Place) -> Result<OwnedFd, KernelError> {
        let (disk, tree) = (self.path("disk").join("disk"), self.path("tree"));
        rustix::fs::mkdir(&tree, Mode::RWXU).map_err(KernelError::system("make a folder"))?;
        let (offset, len) = (place.offset.to_string(), place.bytes.to_string());
        let made = run(Command::new("losetup")
            .args(["--find", "--show", "--offset", &offset, "--sizelimit", &len])
            .arg(&disk));
        let device = made.map_err(|said| KernelError::Program { program: "losetup", said })?;
        let before = self.overlay_bytes();
        let mounted = self.try_mount(place.kind, Path::new(&device), &tree);
        // It stays as long as it is mounted.
        let detached = run(Command::new("losetup").args(["--detach", &device]));
        let is_replayed = mounted?;
        detached.map_err(|said| KernelError::Program { program: "losetup", said })?;
        if is_replayed && self.overlay_bytes() > before {
            self.warnings.push("its file system was in use: the kernel replayed its log, into a scratch file; the point stays as it is".into());
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(&tree, flags, Mode::empty()).map_err(KernelError::system("open the mounted folder"))
    }

    /// Gives whether the log counts.
    fn try_mount(&mut self, kind: Kind, device: &Path, tree: &Path) -> Result<bool, KernelError> {
        let (name, options, without_log) = match kind {
            Kind::Ext => ("ext4", "", Some("noload")),
            Kind::Xfs => ("xfs", ",nouuid", Some("norecovery")),
            Kind::Btrfs => ("btrfs", "", None),
            Kind::Ntfs => ("ntfs3", "", None),
            Kind::Fat => ("vfat", "", None),
            _ => ("auto", "", None),
        };
        let mount = |more: &str| {
            let options = format!("ro,nosuid,nodev,noexec{options}{more}");
            run(Command::new("mount").args(["--types", name, "--options", &options]).arg(device).arg(tree))
        };
        let Err(said) = mount("") else {
            self.is_mounted = true;
            return Ok(true);
        };
        let Some(Ok(_)) = without_log.map(|option| mount(&format!(",{option}"))) else {
            return Err(KernelError::Mount(said));
        };
        self.is_mounted = true;
        self.warnings.push(
            "its file system was in use, and its log cannot be replayed: what was changed in the last seconds before the point may be missing or there in part".into(),
        );
        Ok(false)
    }

    /// Bytes of the overlay on the disk.
    fn overlay_bytes(&self) -> u64 {
        rustix::fs::stat(self.path("overlay")).map_or(0, |stat| stat.st_blocks as u64 * 512)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if self.is_mounted
            && let Err(error) = rustix::mount::unmount(self.path("tree"), UnmountFlags::DETACH)
        {
            tracing::warn!(%error, "the mounted file system is left behind, until this program ends");
        }
        if let Some(mut fuse) = self.fuse.take() {
            // It unmounts its own.
            let _ = rustix::process::kill_process(Pid::from_child(&fuse), Signal::TERM);
            let _ = fuse.wait();
        }
        let _ = rustix::mount::unmount(self.path("disk"), UnmountFlags::DETACH);
        self.stop.store(true, Ordering::Relaxed);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

/// Removes what is left in the folder where we are ended by a signal: from a thread that has not the mount namespace, and sees empty folders.
pub(crate) fn remove_leftovers(folder: &Path) {
    for file in ["nbd", "overlay", "said"] {
        let _ = rustix::fs::unlink(folder.join(file));
    }
    for inner in ["disk", "tree", ""] {
        let _ = rustix::fs::rmdir(folder.join(inner));
    }
}

/// A mount namespace of our own: what is mounted in it is seen by nobody else, and goes with us.
fn own_namespace() -> Result<(), KernelError> {
    #[expect(deprecated, reason = "unsafe is what shares file descriptors no more; this does not")]
    rustix::thread::unshare(UnshareFlags::NEWNS).map_err(KernelError::system("make a mount namespace"))?;
    // What others unmount goes here, too; what we mount is seen by nobody else.
    let private = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(KernelError::system("keep mounts to ourselves"))
}

/// Waits until something is mounted, or for a while.
fn wait_for_mount(mounts: &OwnedFd) {
    let timeout = Timespec { tv_sec: 0, tv_nsec: START_LOOK_NS };
    // A signal ends it early, which is as well.
    let _ = poll(&mut [PollFd::new(mounts, PollFlags::PRI)], Some(&timeout));
}

fn is_there(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .any(|folder| rustix::fs::access(folder.join(program), rustix::fs::Access::EXEC_OK).is_ok())
}

/// Runs a program; gives what it says on stdout, or why it failed.
fn run(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(cut(&text(&output.stderr))) }
}

fn last_words(path: &Path) -> String {
    let mut said = vec![0; SAID_MAX];
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let read = rustix::fs::open(path, flags, Mode::empty()).and_then(|file| rustix::io::read(&file, &mut said));
    said.truncate(read.unwrap_or(0));
    cut(String::from_utf8_lossy(&said).trim())
}

fn cut(said: &str) -> String {
    let line: String = said.replace('\n', " ").chars().take(SAID_MAX).collect();
    if line.is_empty() { "it said nothing".into() } else { line }
}
