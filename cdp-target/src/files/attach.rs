//! A point attached to the kernel: our own NBD server, `nbdfuse`, which makes a file of its export, a loop device over that, and a mount.
//!
//! The mount is read-only; the device is not: it has an overlay in a scratch folder, so that the kernel can replay the log that a file system in
//! use leaves. Invariant: nothing is written to the store, and all of it ends with us. It is ended in order where we end in order; where we
//! are killed by SIGKILL, the programs are told so by the kernel, and the mount namespace that only they and we are in goes with them; on some
//! kernels a mount was seen to stay.

use super::error::KernelError;
use super::mount::{Log, Mount};
use super::program::{Daemon, need, run};
use super::tree::Tree;
use crate::drill::probe::Place;
use crate::nbd::exports::Exports;
use crate::nbd::overlay::Overlay;
use crate::nbd::overlay::format::Base;
use crate::nbd::points::{OpenPoint, Points};
use crate::nbd::server::Server;
use crate::nbd::socket::{Address, Listener, escaped};
use cdp_protocol::units::Head;
use cdp_seams::clock::Clock;
use cdp_seams::storage::Storage;
use rustix::fs::Mode;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use tempfile::TempDir;

/// What is attached; it ends with this.
pub(crate) struct Attached {
    // In this order: each reads what those behind it serve.
    mount: Option<Mount>,
    fuse: Option<Daemon>,
    server: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    warnings: Vec<&'static str>,
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
    /// Attaches a point, by way of an empty folder, and mounts the file system at a place of a volume.
    ///
    /// # Errors
    /// Where something is missing for it, or the kernel does not take it.
    pub(crate) fn attach(source: Source<'_>, folder: TempDir) -> Result<(Self, Tree), KernelError> {
        if !rustix::process::geteuid().is_root() {
            return Err(KernelError::NotRoot);
        }
        need(&["nbdfuse", "setpriv", "losetup", "mount"])?;
        own_namespace()?;
        let stop = Arc::default();
        let mut attached = Self { mount: None, fuse: None, server: None, stop, warnings: Vec::new(), folder };
        let (place, clock, volume) = (source.place, Arc::clone(&source.clock), source.volume);
        attached.serve(source)?;
        attached.start_fuse(volume, clock.as_ref())?;
        let tree = attached.mount(place, clock.as_ref())?;
        Ok((attached, tree))
    }

    /// What has to be said of it.
    pub(crate) fn warnings(&self) -> &[&'static str] {
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
        let folder = self.path("disk");
        rustix::fs::mkdir(&folder, Mode::RWXU).map_err(KernelError::system("make a folder"))?;
        let file = folder.join("disk");
        let uri = format!("nbd+unix:///{volume}?socket={}", escaped(&self.path("nbd")));
        let arguments = [file.as_os_str(), OsStr::new(&uri)];
        let is_up = || rustix::fs::stat(&file).is_ok();
        self.fuse = Some(Daemon::start("nbdfuse", &arguments, &self.path("said"), clock, is_up)?);
        Ok(())
    }

    /// Mounts the file system at a place.
    fn mount(&mut self, place: Place, clock: &dyn Clock) -> Result<Tree, KernelError> {
        let (disk, tree) = (self.path("disk").join("disk"), self.path("tree"));
        rustix::fs::mkdir(&tree, Mode::RWXU).map_err(KernelError::system("make a folder"))?;
        let (offset, len) = (place.offset.to_string(), place.bytes.to_string());
        let losetup = |arguments: &[&str], path: &Path| {
            let said = run(Command::new("losetup").args(arguments).arg(path));
            said.map_err(|said| KernelError::Program { program: "losetup", said })
        };
        let device = losetup(&["--find", "--show", "--offset", &offset, "--sizelimit", &len], &disk)?;
        let device = Path::new(&device);
        let before = self.overlay_bytes();
        let mounted = Mount::new(place.kind, device, &tree, &self.path("said-ntfs"), clock);
        // It stays as long as it is mounted.
        let detached = losetup(&["--detach"], device);
        let log = self.mount.insert(mounted?).log;
        detached?;
        let is_written = self.overlay_bytes() > before;
        self.warnings.extend(warning(log, is_written));
        Tree::open(&tree).map_err(KernelError::system("open the mounted folder"))
    }

    /// Bytes of the overlay on the disk.
    fn overlay_bytes(&self) -> u64 {
        rustix::fs::stat(self.path("overlay")).map_or(0, |stat| stat.st_blocks as u64 * 512)
    }
}

/// What has to be said of a file system whose log was not empty, or was not looked at.
const fn warning(log: Log, is_written: bool) -> Option<&'static str> {
    match log {
        Log::Replayed if is_written => {
            Some("its file system was in use: its log was replayed into a scratch file; the point stays as it is")
        }
        Log::Replayed => None,
        Log::Refused => Some(
            "its file system was in use, and its log cannot be replayed: what was changed in the last seconds before the point may be missing or there in part",
        ),
        Log::Ignored => Some(
            "ntfs-3g reads it, without its log: if it was in use, what was changed in the last seconds before the point may be missing or there in part",
        ),
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.mount = None;
        self.fuse = None;
        // Where it was killed it has not unmounted it.
        let _ = rustix::mount::unmount(self.path("disk"), UnmountFlags::DETACH);
        self.stop.store(true, Ordering::Relaxed);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

/// Removes what is left in the folder where we are ended by a signal: from a thread that has not the mount namespace, and sees empty folders.
pub(crate) fn remove_leftovers(folder: &Path) {
    for file in ["nbd", "overlay", "said", "said-ntfs"] {
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
