//! A writable overlay: what clients wrote over a point, in a sparse file of its own (`docs/format/overlay.md`).
//!
//! Invariant: what a flush has answered for is there after a power cut: the content is durable before a page of the map names it, and a
//! page is never written over, but beside it. What was written since may be there or not, block by block, as on a disk with a cache.
//! An overlay belongs to one point of one group, and one server has it at a time. After a failed write or sync nothing more is done
//! with it. It is a disk to try things on: its content has no checksums.

pub mod format;
mod map;

pub use map::State;

use cdp_protocol::units::{BLOCK_BYTES, Extent, VolumeSlot};
use cdp_seams::storage::{Storage, StorageFile};
use format::{Base, Copy, HEADER_BYTES, HeaderError, Layout, PAGE_BYTES};
use map::Map;
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// Names under which an overlay may be made.
const NAMES_MAX: u32 = 100;

/// An overlay that is open.
pub struct Overlay {
    file: Box<dyn StorageFile>,
    path: PathBuf,
    base: Base,
    layout: Layout,
    maps: Vec<RwLock<Map>>,
    /// Held by the one that flushes: how often each page was written.
    sequences: Mutex<HashMap<(usize, u32), u64>>,
    /// Content was written since a flush began last; by whoever had it before us too, who may have been killed before his flush.
    has_written: AtomicBool,
    /// A write or a sync failed.
    has_failed: AtomicBool,
    /// Held while a part of a block is written, so that the rest of it stays.
    parts: Mutex<()>,
}

/// A volume of an overlay.
pub(super) struct OverlayVolume {
    overlay: Arc<Overlay>,
    volume: usize,
}

/// Why an overlay cannot be had, or used.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// It lies over something else.
    #[error("overlay {} is of {found}, not of {wanted}", .path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// What it is of.
        found: String,
        /// What is served.
        wanted: String,
    },
    /// Another server has it.
    #[error("overlay {} is in use by another server", .0.display())]
    InUse(PathBuf),
    /// It cannot be read as one.
    #[error("open overlay {}", .path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What it is.
        source: HeaderError,
    },
    /// A page of its map is gone: what was written cannot be told from what was not.
    #[error("overlay {} is damaged: both copies of page {page} of the map of volume {volume}", .path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// The volume's name.
        volume: String,
        /// The page.
        page: u32,
    },
    /// The system refused.
    #[error("{verb} overlay {}", .path.display())]
    System {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A write or a sync failed before.
    #[error("overlay {} failed before: nothing more is written to it", .0.display())]
    Failed(PathBuf),
}

impl OverlayError {
    /// Whether it is for want of room.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::System { source, .. } if is_full(source))
    }
}

impl Overlay {
    /// Opens the overlay at `path`, or makes it where there is none.
    ///
    /// # Errors
    /// Where it lies over something else, another server has it, it is damaged, or the system refuses.
    pub fn open(storage: &dyn Storage, path: &Path, base: Base) -> Result<Self, OverlayError> {
        let system = |verb| move |source| OverlayError::System { verb, path: path.to_owned(), source };
        let layout = Layout::of(&base.volumes);
        let file = match storage.open_write(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => make(storage, path, &base, layout.len)?,
            opened => {
                let file = opened.map_err(system("open"))?;
                if !file.try_lock().map_err(system("lock"))? {
                    return Err(OverlayError::InUse(path.to_owned()));
                }
                file
            }
        };
        let found = read_header(file.as_ref(), path)?;
        if found != base {
            return Err(other(path, &found, &base));
        }
        let mut overlay = Self {
            maps: base.volumes.iter().map(|_| RwLock::default()).collect(),
            file,
            path: path.to_owned(),
            base,
            layout,
            sequences: Mutex::default(),
            has_written: AtomicBool::new(true),
            has_failed: AtomicBool::new(false),
            parts: Mutex::new(()),
        };
        overlay.load()?;
        Ok(overlay)
    }

    /// Reads the map.
    fn load(&mut self) -> Result<(), OverlayError> {
        for (at, volume) in self.base.volumes.iter().enumerate() {
            let mut map = Map::default();
            for page in 0..format::page_count(volume) {
                let (first, second) = (self.copy(at, page, 0)?, self.copy(at, page, 1)?);
                if [&first, &second].contains(&&Copy::Bad) {
                    let (path, volume) = (self.path.display(), &volume.name);
                    tracing::warn!(%path, volume, page, "a page of the overlay's map was not written to its end: the one before counts");
                }
                let (sequence, states) = match (first, second) {
                    (Copy::Bad, Copy::Bad) => {
                        return Err(OverlayError::Map { path: self.path.clone(), volume: volume.name.clone(), page });
                    }
                    (Copy::Whole { sequence: one, states }, Copy::Whole { sequence: other, .. }) if one > other => {
                        (one, states)
                    }
                    (_, Copy::Whole { sequence, states }) | (Copy::Whole { sequence, states }, _) => (sequence, states),
                    // Its first writing was cut off: no flush has answered for it.
                    (Copy::Blank | Copy::Bad, Copy::Blank | Copy::Bad) => continue,
                };
                self.sequences.get_mut().unwrap_or_else(PoisonError::into_inner).insert((at, page), sequence);
                let first = page * format::PAGE_BLOCKS;
                for (number, state) in states {
                    map.load(first + number, state);
                }
            }
            *self.maps[at].get_mut().unwrap_or_else(PoisonError::into_inner) = map;
        }
        Ok(())
    }

    fn copy(&self, volume: usize, page: u32, copy: u64) -> Result<Copy, OverlayError> {
        let mut bytes = [0; PAGE_BYTES];
        let read = self.file.read_at(&mut bytes, self.layout.page(volume, page, copy));
        read.map_err(|source| OverlayError::System { verb: "read the map of", path: self.path.clone(), source })?;
        Ok(format::decode_page(volume as u16, page, &bytes))
    }

    /// A volume of it, which it has.
    pub(super) fn volume(self: &Arc<Self>, slot: VolumeSlot) -> OverlayVolume {
        let volume = self.base.volumes.iter().position(|volume| volume.slot == slot);
        OverlayVolume { overlay: Arc::clone(self), volume: volume.expect("an overlay has its point's volumes") }
    }

    /// Makes durable what was written before it was called.
    ///
    /// A crash before the first sync leaves the map of the last flush over newer content; between the two, any of its changed pages
    /// old or new, each with content that is durable; after the second all of it.
    ///
    /// # Errors
    /// As the system says: nothing more is done with the overlay then.
    pub fn flush(&self) -> Result<(), OverlayError> {
        let mut sequences = locked(&self.sequences);
        self.check()?;
        let mut pages = Vec::new();
        for (at, map) in self.maps.iter().enumerate() {
            let mut map = map.write().unwrap_or_else(PoisonError::into_inner);
            for page in map.take_changed() {
                let sequence = sequences.get(&(at, page)).map_or(1, |before| before + 1);
                pages.push((at, page, sequence, format::encode_page(at as u16, page, sequence, map.page(page))));
            }
        }
        // Taken back before the sync: content that comes during it asks for another.
        if !self.has_written.swap(false, Ordering::AcqRel) && pages.is_empty() {
            return Ok(());
        }
        self.sync()?;
        for (at, page, sequence, bytes) in &pages {
            let written = self.file.write_at(bytes, self.layout.page(*at, *page, *sequence));
            written.map_err(|source| self.failed("write the map of", source))?;
            sequences.insert((*at, *page), *sequence);
        }
        if pages.is_empty() { Ok(()) } else { self.sync() }
    }

    fn sync(&self) -> Result<(), OverlayError> {
        self.file.sync().map_err(|source| self.failed("sync", source))
    }

    fn check(&self) -> Result<(), OverlayError> {
        let has_failed = self.has_failed.load(Ordering::Acquire);
        if has_failed { Err(OverlayError::Failed(self.path.clone())) } else { Ok(()) }
    }

    fn failed(&self, verb: &'static str, source: io::Error) -> OverlayError {
        if !self.has_failed.swap(true, Ordering::AcqRel) {
            let path = self.path.display();
            tracing::error!(%path, error = %source, "the overlay cannot be written any more: {verb}");
        }
        OverlayError::System { verb, path: self.path.clone(), source }
    }
}

/// Makes an overlay with nothing in it, beside its place, and puts it there once it is whole; gives it locked.
///
/// A crash before the rename leaves a hidden file beside it, of which nobody takes notice: it may be anybody's; after it the overlay, or, where
/// the folder was not durable yet, none: nothing was written to it.
fn make(storage: &dyn Storage, path: &Path, base: &Base, len: u64) -> Result<Box<dyn StorageFile>, OverlayError> {
    let system = |verb| move |source| OverlayError::System { verb, path: path.to_owned(), source };
    let first = beside(path, 0);
    let (gate, is_new) = match storage.create_new(&first) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            (storage.open_write(&first).map_err(system("make"))?, false)
        }
        created => (created.map_err(system("make"))?, true),
    };
    // Whoever else makes one is refused from here on: the lock goes along with the name. Somebody may have been faster.
    let is_free = gate.try_lock().map_err(system("lock"))?;
    if !is_free || !matches!(storage.open(path), Err(error) if error.kind() == io::ErrorKind::NotFound) {
        return Err(OverlayError::InUse(path.to_owned()));
    }
    let (file, beside, _gate) = if is_new {
        (gate, first, None)
    } else {
        let (file, beside) = another(storage, path).map_err(system("make"))?;
        file.try_lock().map_err(system("lock"))?;
        (file, beside, Some(gate))
    };
    file.set_len(len).map_err(system("extend"))?;
    file.write_at(&format::encode_header(base), 0).map_err(system("write"))?;
    file.sync().map_err(system("sync"))?;
    storage.rename(&beside, path).map_err(system("name"))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    storage.sync_dir(folder).map_err(system("sync the folder of"))?;
    Ok(file)
}

/// The name under which an overlay is made, and others for where there is something of that name.
fn beside(path: &Path, number: u32) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.overlay-new{}", if number == 0 { String::new() } else { number.to_string() }))
}

/// A new file under one of those names.
fn another(storage: &dyn Storage, path: &Path) -> io::Result<(Box<dyn StorageFile>, PathBuf)> {
    for number in 1..NAMES_MAX {
        let beside = beside(path, number);
        match storage.create_new(&beside) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            created => return Ok((created?, beside)),
        }
    }
    let line = format!("remove what is left beside it: {} and others", beside(path, 0).display());
    Err(io::Error::new(io::ErrorKind::AlreadyExists, line))
}

fn read_header(file: &dyn StorageFile, path: &Path) -> Result<Base, OverlayError> {
    let mut bytes = [0; HEADER_BYTES];
    let read = file.read_at(&mut bytes, 0);
    read.map_err(|source| OverlayError::System { verb: "read", path: path.to_owned(), source })?;
    format::decode_header(&bytes).map_err(|source| OverlayError::Header { path: path.to_owned(), source })
}

fn other(path: &Path, found: &Base, wanted: &Base) -> OverlayError {
    let name = |base: &Base| {
        let hash = base.head.hash.to_string();
        let volumes: Vec<_> = base.volumes.iter().map(|volume| volume.name.as_str()).collect();
        format!("point {} ({}) of group {} with {}", base.head.epoch, &hash[..8], base.group, volumes.join(", "))
    };
    OverlayError::Other { path: path.to_owned(), found: name(found), wanted: name(wanted) }
}

impl OverlayVolume {
    /// What the overlay says of blocks: runs in order that cover them.
    pub(super) fn states(&self, extent: Extent) -> Vec<(Extent, State)> {
        self.map().read().unwrap_or_else(PoisonError::into_inner).states(extent)
    }

    /// Reads blocks that were written.
    pub(super) fn read(&self, extent: Extent, bytes: &mut [u8]) -> Result<(), OverlayError> {
        assert_eq!(bytes.len() as u64, extent.to_bytes(), "whole blocks");
        self.overlay.check()?;
        let read = self.overlay.file.read_at(bytes, self.place(extent));
        let read =
            read.and_then(|read| if read == bytes.len() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) });
        read.map_err(|source| self.system("read", source))
    }

    /// Writes blocks.
    pub(super) fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), OverlayError> {
        assert_eq!(bytes.len() as u64, extent.to_bytes(), "whole blocks");
        self.overlay.check()?;
        let written = self.overlay.file.write_at(bytes, self.place(extent));
        written.map_err(|source| self.not_written(source))?;
        self.map().write().unwrap_or_else(PoisonError::into_inner).set(extent, State::Written);
        // After the write: a flush that begins in between has not synced it.
        self.overlay.has_written.store(true, Ordering::Release);
        Ok(())
    }

    /// Makes blocks zeros, and gives back the room of their content.
    pub(super) fn zero(&self, extent: Extent) -> Result<(), OverlayError> {
        self.overlay.check()?;
        let had_content = self.map().write().unwrap_or_else(PoisonError::into_inner).set(extent, State::Zero);
        if had_content {
            // Where the map of the last flush is what a crash leaves, they are zeros all the same.
            let given_back = self.overlay.file.discard(self.place(extent), extent.to_bytes());
            given_back.map_err(|source| self.not_written(source))?;
        }
        Ok(())
    }

    /// The right to write a part of a block.
    pub(super) fn parts(&self) -> MutexGuard<'_, ()> {
        locked(&self.overlay.parts)
    }

    /// Makes durable what was written before it was called, to any volume of the overlay.
    pub(super) fn flush(&self) -> Result<(), OverlayError> {
        self.overlay.flush()
    }

    fn map(&self) -> &RwLock<Map> {
        &self.overlay.maps[self.volume]
    }

    fn place(&self, extent: Extent) -> u64 {
        self.overlay.layout.data(self.volume) + u64::from(extent.start.0) * BLOCK_BYTES as u64
    }

    /// A full disk is no failure of it: what is there stays, and there may be room another time.
    fn not_written(&self, source: io::Error) -> OverlayError {
        if is_full(&source) { self.system("write", source) } else { self.overlay.failed("write", source) }
    }

    fn system(&self, verb: &'static str, source: io::Error) -> OverlayError {
        OverlayError::System { verb, path: self.overlay.path.clone(), source }
    }
}

fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
