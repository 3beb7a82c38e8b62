//! Which blocks of a group's volumes hold files that are left out: those that the configuration names, swap, and our own digests.
//!
//! A file counts where it lies on a volume of the group, or on the disk or a partition that the volume is a window of; where
//! anything lies between, it does not. What cannot be left out is captured, and said so.
//!
//! A name in memory may be ahead of the disk: a file that was moved to an excluded name a moment ago still has its old one at the
//! instant of a cut. So a configured file counts only once its file system was synced after it had been found under that name;
//! another file there has to be synced again. What the kernel swaps to, and the digests, were synced by whoever made them.
//! Blocks that a file comes to hold later need no sync: no file system that is looked at here gives a block away before the file that
//! had it has let go of it on the disk.

mod fiemap;
mod file;
mod place;
mod swaps;

pub use place::Window;

use crate::agent::status::{ExcludeKind, ExcludeStatus};
use crate::exclusion::Exclusion;
use crate::tracker::device::DeviceNumber;
use cdp_protocol::units::BLOCK_BYTES;
use cdp_seams::clock::Clock;
use file::{File, Identity, Reason};
use roaring::RoaringBitmap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use swaps::{Swap, swaps};

/// How often file systems are synced for files that are new under their names.
const SYNC_EVERY: Duration = Duration::from_secs(30);
/// How long captures wait for the first sync, so that what is left out is not sent before.
const FIRST_SYNC_MAX: Duration = Duration::from_secs(10);
/// Different reasons that are logged of a file, each once.
const REASONS_MAX: usize = 8;

/// What is to be left out of a group.
pub struct ExcludeSet {
    /// Its name, for the log.
    pub group: String,
    /// Where its volumes lie; `None` for an image file.
    pub volumes: Vec<Option<Window>>,
    /// Files that the configuration names.
    pub configured: Vec<PathBuf>,
    /// Our own files, synced when they were made.
    pub own: Vec<PathBuf>,
    /// The state folder, none of whose other files is ever left out.
    pub state: PathBuf,
}

/// Finds what is to be left out, again at each look.
pub struct Excludes {
    set: ExcludeSet,
    configured: Vec<Named>,
    clock: Arc<dyn Clock>,
    opened_at: Duration,
    sync: Option<Sync>,
    sync_at: Duration,
    report: Vec<ExcludeStatus>,
}

/// A file that the configuration names.
#[derive(Default)]
struct Named {
    /// The file that is durably the one of that name.
    settled: Option<Identity>,
    /// The one that was found there and is to be synced.
    unsettled: Option<(Identity, OwnedFd)>,
    said: Vec<String>,
}

/// A sync that is under way, and whom it is for.
struct Sync {
    thread: JoinHandle<bool>,
    covers: Vec<(usize, Identity)>,
}

impl Excludes {
    /// Takes a first look.
    #[must_use]
    pub fn new(set: ExcludeSet, clock: Arc<dyn Clock>) -> Self {
        let configured = set.configured.iter().map(|_| Named::default()).collect();
        let opened_at = clock.monotonic();
        let mut excludes =
            Self { set, configured, clock, opened_at, sync: None, sync_at: opened_at, report: Vec::new() };
        excludes.blocks();
        excludes
    }

    /// Adds what is left out of a configured file.
    fn add_configured(&mut self, at: usize, found: &mut [RoaringBitmap]) {
        let path = self.set.configured[at].clone();
        let mut blocks = vec![RoaringBitmap::new(); found.len()];
        let reason = self.configured_blocks(at, &path, &mut blocks).unwrap_or_else(Some);
        let reason = reason.map(|reason| (matches!(reason, Reason::Unsettled), reason.to_string()));
        let said = &mut self.configured[at].said;
        if let Some((false, reason)) = &reason
            && !said.contains(reason)
            && said.len() < REASONS_MAX
        {
            let (group, path) = (&self.set.group, path.display());
            tracing::warn!(group, %path, reason, "a file is not excluded, or not all of it");
            said.push(reason.clone());
        }
        self.add(path, ExcludeKind::Configured, &blocks, reason.map(|(_, reason)| reason), found);
    }

    /// The blocks of a configured file, and why some may be missing.
    fn configured_blocks(
        &mut self,
        at: usize,
        path: &Path,
        blocks: &mut [RoaringBitmap],
    ) -> Result<Option<Reason>, Reason> {
        let named = &mut self.configured[at];
        named.unsettled = None;
        let file = File::open(path)?;
        let window = file.window(&self.set.volumes)?;
        if named.settled != Some(file.identity) {
            if file.real_path()?.starts_with(&self.set.state) {
                return Err(Reason::State);
            }
            named.unsettled = Some((file.identity, file.descriptor));
            return Err(Reason::Unsettled);
        }
        file_blocks(&file, &window, 0, &self.set.volumes, blocks)
    }

    /// Adds blocks of one file or device to what was found, and to the report.
    fn add(
        &mut self,
        path: PathBuf,
        kind: ExcludeKind,
        blocks: &[RoaringBitmap],
        reason: Option<String>,
        found: &mut [RoaringBitmap],
    ) {
        let count: u64 = blocks.iter().map(RoaringBitmap::len).sum();
        found.iter_mut().zip(blocks).for_each(|(found, blocks)| *found |= blocks);
        if count > 0 || kind == ExcludeKind::Configured {
            self.report.push(ExcludeStatus { path, kind, bytes: count * BLOCK_BYTES as u64, reason });
        }
    }

    /// Takes note of a sync that is over, and begins one where a file waits for it.
    fn settle(&mut self) {
        if let Some(sync) = self.sync.take_if(|sync| sync.thread.is_finished())
            && sync.thread.join().unwrap_or(false)
        {
            for (at, identity) in sync.covers {
                self.configured[at].settled = Some(identity);
            }
        }
    }

    fn begin_sync(&mut self) {
        let now = self.clock.monotonic();
        if self.sync.is_some() || now < self.sync_at {
            return;
        }
        let (mut covers, mut files) = (Vec::new(), Vec::<(DeviceNumber, OwnedFd)>::new());
        for (at, named) in self.configured.iter_mut().enumerate() {
            if let Some((identity, file)) = named.unsettled.take() {
                covers.push((at, identity));
                if files.iter().all(|(device, _)| *device != identity.device) {
                    files.push((identity.device, file));
                }
            }
        }
        if covers.is_empty() {
            return;
        }
        self.sync_at = now + SYNC_EVERY;
        let sync = move || files.iter().all(|(_, file)| rustix::fs::syncfs(file).is_ok());
        // Where no thread can be had, it is tried again.
        let thread = std::thread::Builder::new().name("excludes-sync".into()).spawn(sync);
        self.sync = thread.ok().map(|thread| Sync { thread, covers });
    }
}

impl Exclusion for Excludes {
    fn blocks(&mut self) -> Vec<RoaringBitmap> {
        let mut found = vec![RoaringBitmap::new(); self.set.volumes.len()];
        self.report.clear();
        self.settle();
        for at in 0..self.configured.len() {
            self.add_configured(at, &mut found);
        }
        self.begin_sync();
        // What of these is not on a volume of the group is nobody's concern.
        for path in self.set.own.clone() {
            let blocks = blocks_of(&path, 0, &self.set.volumes);
            self.add(path, ExcludeKind::Own, &blocks, None, &mut found);
        }
        for swap in swaps() {
            let blocks = swap_blocks(&swap, &self.set.volumes);
            self.add(swap.path, ExcludeKind::Swap, &blocks, None, &mut found);
        }
        for blocks in &mut found {
            blocks.optimize();
        }
        found
    }

    fn is_pending(&self) -> bool {
        let is_first = self.clock.monotonic() < self.opened_at + FIRST_SYNC_MAX;
        is_first && self.sync.as_ref().is_some_and(|sync| !sync.thread.is_finished())
    }

    fn report(&self) -> Vec<ExcludeStatus> {
        self.report.clone()
    }
}

/// The blocks of a file, without its first bytes; none where they cannot be told.
fn blocks_of(path: &Path, skip_bytes: u64, volumes: &[Option<Window>]) -> Vec<RoaringBitmap> {
    let mut blocks = vec![RoaringBitmap::new(); volumes.len()];
    let found = File::open(path).and_then(|file| {
        let window = file.window(volumes)?;
        file_blocks(&file, &window, skip_bytes, volumes, &mut blocks)
    });
    if let Err(reason) = found {
        tracing::debug!(path = %path.display(), %reason, "not excluded");
    }
    blocks
}

fn file_blocks(
    file: &File,
    window: &Window,
    skip_bytes: u64,
    volumes: &[Option<Window>],
    blocks: &mut [RoaringBitmap],
) -> Result<Option<Reason>, Reason> {
    let found = file.pieces()?;
    for piece in &found.all {
        let skip = skip_bytes.saturating_sub(piece.logical).min(piece.length);
        for (volume, blocks) in volumes.iter().zip(&mut *blocks) {
            if let Some(volume) = volume {
                window.add_blocks(volume, piece.physical.saturating_add(skip), piece.length - skip, blocks);
            }
        }
    }
    let shared = found.is_shared.then_some(Reason::Shared);
    Ok(if found.is_cut_short { Some(Reason::CutShort) } else { shared })
}

/// The blocks of a swap area. Its first page stays: it says that this is one, and it is written once.
fn swap_blocks(swap: &Swap, volumes: &[Option<Window>]) -> Vec<RoaringBitmap> {
    let page_bytes = rustix::param::page_size() as u64;
    if swap.is_file {
        return blocks_of(&swap.path, page_bytes, volumes);
    }
    let mut blocks = vec![RoaringBitmap::new(); volumes.len()];
    if let Ok(found) = rustix::fs::stat(&swap.path)
        && let Ok(window) = Window::of_number(DeviceNumber::of_stat(found.st_rdev))
    {
        for (volume, blocks) in volumes.iter().zip(&mut blocks) {
            if let Some(volume) = volume {
                window.add_blocks(volume, page_bytes, swap.bytes, blocks);
            }
        }
    }
    blocks
}
