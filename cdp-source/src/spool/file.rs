//! The spool's file: room for two indexes, a page for the memo, and slabs, each of which holds frames of one attempt.
//!
//! It grows by allocated pieces and never shrinks or is removed: cuts leave its blocks out (`excludes`), and a block that leaves an
//! excluded file is sent. A slab is written only while no index that may be read names it. Nothing is synced for an attempt: what is
//! kept here has to survive the agent, not the machine. Knows places and bytes, not what they mean.

use bytes::Bytes;
use cdp_seams::storage::Storage;
use cdp_seams::storage::StorageFile;
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

/// Bytes of a slab at least: an attempt takes whole ones.
const SLAB_BYTES_MIN: u64 = 64 << 10;
/// Slabs at most, so that naming all of them stays small: a larger file has larger ones.
const SLABS_MAX: u64 = 1 << 16;
/// Of the slabs that there are one of so many is for merging alone: it has to be possible when nothing else is.
const RESERVED_SHARE: u64 = 8;
/// The file grows by so much at a time.
const GROWTH_BYTES: u64 = 64 << 20;
/// The page of the memo, at the file's beginning.
pub(super) const MEMO_PAGE_BYTES: u64 = 4096;
/// Bytes of one of the two indexes at most.
const INDEX_BYTES_MAX: u64 = 4 << 20;
/// Bytes of one of the two indexes at least.
const INDEX_BYTES_MIN: u64 = 64 << 10;

/// Where the pieces of a file stand that may have so many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Bytes of the room for an index.
    pub(super) index_bytes: u64,
    /// Bytes of a slab.
    pub(super) slab_bytes: u64,
    /// Slabs that there may be.
    pub(super) slabs_max: u32,
}

impl Layout {
    /// The layout of a file of at most `bytes_max` bytes.
    pub(super) fn of(bytes_max: u64) -> Self {
        let index_bytes = (bytes_max / 64).clamp(INDEX_BYTES_MIN, INDEX_BYTES_MAX) / 4096 * 4096;
        let rest = bytes_max.saturating_sub(MEMO_PAGE_BYTES + 2 * index_bytes);
        let slab_bytes = rest.div_ceil(SLABS_MAX).div_ceil(4096).saturating_mul(4096).max(SLAB_BYTES_MIN);
        Self { index_bytes, slab_bytes, slabs_max: (rest / slab_bytes) as u32 }
    }

    fn slab_at(&self, slab: u32) -> u64 {
        MEMO_PAGE_BYTES + 2 * self.index_bytes + u64::from(slab) * self.slab_bytes
    }

    fn index_at(&self, copy: u64) -> u64 {
        MEMO_PAGE_BYTES + copy % 2 * self.index_bytes
    }
}

/// Where an attempt's frames are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The slabs, in order.
    pub slabs: Vec<u32>,
    /// Bytes of each frame.
    pub frames: Vec<u32>,
}

/// The file, open.
pub(super) struct SpoolFile {
    storage: std::sync::Arc<dyn Storage>,
    folder: PathBuf,
    file: Box<dyn StorageFile>,
    layout: Layout,
    /// Slabs that there is room for on the disk.
    slabs: u32,
    /// Whether there was none for more when that was tried last.
    is_grown_out: bool,
    free: BTreeSet<u32>,
    /// Given back, but named by an index that may be read.
    given_back: BTreeSet<u32>,
}

/// The spool's file in its folder.
#[must_use]
pub fn file_path(folder: &Path) -> PathBuf {
    folder.join("frames")
}

impl SpoolFile {
    /// Opens the file that is there, or makes it. All its slabs are free.
    ///
    /// A crash before the folder's sync leaves a file or none; nothing in it is believed that its own indexes do not vouch for.
    pub(super) fn open(storage: std::sync::Arc<dyn Storage>, folder: &Path, layout: Layout) -> io::Result<Self> {
        let path = file_path(folder);
        let file = match storage.open_write(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                storage.create_dir_all(folder)?;
                let file = storage.create_new(&path)?;
                file.allocate(layout.slab_at(0))?;
                file.sync()?;
                storage.sync_dir(folder)?;
                file
            }
            other => other?,
        };
        let len = file.len()?;
        if len < layout.slab_at(0) {
            file.allocate(layout.slab_at(0))?;
        }
        let slabs = (len.saturating_sub(layout.slab_at(0)) / layout.slab_bytes).min(layout.slabs_max.into()) as u32;
        let folder = folder.to_owned();
        let (free, given_back) = ((0..slabs).collect(), BTreeSet::new());
        Ok(Self { storage, folder, file, layout, slabs, is_grown_out: false, free, given_back })
    }

    /// Opens the file where there is one.
    pub(super) fn open_existing(
        storage: std::sync::Arc<dyn Storage>,
        folder: &Path,
        layout: Layout,
    ) -> io::Result<Option<Self>> {
        match storage.open(&file_path(folder)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
            Ok(_) => Self::open(storage, folder, layout).map(Some),
        }
    }

    pub(super) const fn layout(&self) -> Layout {
        self.layout
    }

    /// Bytes that could be written now, or after growing, as far as is known.
    pub(super) fn free_bytes(&self) -> u64 {
        let more = if self.is_grown_out { 0 } else { u64::from(self.layout.slabs_max - self.slabs) };
        (self.free.len() as u64 + self.given_back.len() as u64 + more) * self.layout.slab_bytes
    }

    /// Slabs that only merging may use. They are of those that there are: what the disk does not give is no reserve.
    fn reserve(&self) -> u64 {
        u64::from(self.slabs) / RESERVED_SHARE
    }

    /// Bytes of the slabs that are in use.
    pub(super) fn used_bytes(&self) -> u64 {
        (u64::from(self.slabs) - self.free.len() as u64 - self.given_back.len() as u64) * self.layout.slab_bytes
    }

    /// Whether slabs wait for an index that does not name them.
    pub(super) fn has_given_back(&self) -> bool {
        !self.given_back.is_empty()
    }

    /// Slabs that so many bytes take.
    pub(super) fn slabs_for(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.layout.slab_bytes).max(1)
    }

    /// Writes an attempt's frames; `None` where there is no room for them. What only merging may use is left where this is not `for_merging`.
    pub(super) fn write(&mut self, frames: &[Bytes], for_merging: bool) -> io::Result<Option<Place>> {
        let bytes: u64 = frames.iter().map(|frame| frame.len() as u64).sum();
        let wanted = self.slabs_for(bytes);
        let lacking = |file: &Self| {
            let reserve = if for_merging { 0 } else { file.reserve() };
            (wanted + reserve).saturating_sub(file.free.len() as u64)
        };
        if lacking(self) > 0 {
            // The more there are, the more are kept back.
            self.grow((lacking(self) * RESERVED_SHARE).div_ceil(RESERVED_SHARE - 1))?;
        }
        if lacking(self) > 0 {
            return Ok(None);
        }
        let slabs: Vec<u32> = self.free.iter().copied().take(wanted as usize).collect();
        self.write_to(&slabs, frames)?;
        for slab in &slabs {
            self.free.remove(slab);
        }
        Ok(Some(Place { slabs, frames: frames.iter().map(|frame| frame.len() as u32).collect() }))
    }

    fn write_to(&self, slabs: &[u32], frames: &[Bytes]) -> io::Result<()> {
        let slab_bytes = self.layout.slab_bytes as usize;
        let (mut slabs, mut filled) = (slabs.iter(), Vec::with_capacity(slab_bytes));
        let mut next = |filled: &mut Vec<u8>| {
            let slab = slabs.next().expect("as many slabs as the frames take");
            self.file.write_at(filled, self.layout.slab_at(*slab))?;
            filled.clear();
            io::Result::Ok(())
        };
        for frame in frames {
            let mut rest = &frame[..];
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(slab_bytes - filled.len()));
                filled.extend_from_slice(now);
                rest = later;
                if filled.len() == slab_bytes {
                    next(&mut filled)?;
                }
            }
        }
        if filled.is_empty() { Ok(()) } else { next(&mut filled) }
    }

    /// Reads frames again, as the bytes that are there.
    pub(super) fn read(&self, place: &Place) -> io::Result<Vec<Bytes>> {
        let bytes: u64 = place.frames.iter().map(|len| u64::from(*len)).sum();
        if self.slabs_for(bytes) != place.slabs.len() as u64 || place.slabs.iter().any(|slab| *slab >= self.slabs) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its place is none"));
        }
        let mut all = vec![0; bytes as usize];
        for (slab, part) in place.slabs.iter().zip(all.chunks_mut(self.layout.slab_bytes as usize)) {
            if self.file.read_at(part, self.layout.slab_at(*slab))? != part.len() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let mut all = Bytes::from(all);
        Ok(place.frames.iter().map(|len| all.split_to(*len as usize)).collect())
    }

    /// Takes slabs back. They are written again only once an index does not name them any more.
    pub(super) fn give_back(&mut self, place: &Place) {
        self.given_back.extend(&place.slabs);
    }

    /// Takes slabs back that no index has named.
    pub(super) fn give_back_unnamed(&mut self, place: &Place) {
        self.free.extend(&place.slabs);
    }

    /// An index that does not name them is written: what was given back is free.
    pub(super) fn settle(&mut self) {
        self.free.append(&mut self.given_back);
    }

    /// Takes slabs that an index names out of the free ones; `false` where they are not free, or none.
    pub(super) fn take(&mut self, place: &Place) -> bool {
        place.slabs.iter().all(|slab| self.free.remove(slab))
    }

    /// Nothing in it is of use.
    fn free_all(&mut self) {
        self.free = (0..self.slabs).collect();
        self.given_back.clear();
    }

    /// Makes room for at least `slabs` more, or for as many as there may still be, as far as that leaves as many bytes free on the disk
    /// as the file has.
    fn grow(&mut self, slabs: u64) -> io::Result<()> {
        if self.slabs == self.layout.slabs_max {
            return Ok(());
        }
        let more = slabs.max(GROWTH_BYTES / self.layout.slab_bytes).min((self.layout.slabs_max - self.slabs).into());
        let len = self.layout.slab_at(self.slabs + more as u32);
        self.is_grown_out = true;
        if self.storage.free_bytes(&self.folder)? < (more * self.layout.slab_bytes).saturating_add(len) {
            return Ok(());
        }
        match self.file.allocate(len) {
            Err(error) if is_full(&error) => return Ok(()),
            other => other?,
        }
        self.is_grown_out = false;
        self.free.extend(self.slabs..self.slabs + more as u32);
        self.slabs += more as u32;
        Ok(())
    }

    /// Writes the bytes of an index in the place of the copy that `number` has. They have to fit.
    pub(super) fn write_index(&self, number: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(bytes.len() as u64 <= self.layout.index_bytes, "an index is made no longer than its place");
        self.file.write_at(bytes, self.layout.index_at(number))
    }

    /// The bytes in the place of an index.
    pub(super) fn read_index(&self, number: u64) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.layout.index_bytes as usize];
        let read = self.file.read_at(&mut bytes, self.layout.index_at(number))?;
        bytes.truncate(read);
        Ok(bytes)
    }

    /// Nothing in it is of use, and no index says otherwise any more: to be done before a memo is written that would vouch for one.
    pub(super) fn wipe(&mut self) -> io::Result<()> {
        for copy in 0..2 {
            self.file.write_at(&[0; 4096], self.layout.index_at(copy))?;
        }
        self.free_all();
        Ok(())
    }

    pub(super) fn write_memo(&self, page: &[u8]) -> io::Result<()> {
        self.file.write_at(page, 0)
    }

    pub(super) fn read_memo(&self) -> io::Result<Vec<u8>> {
        let mut page = vec![0; MEMO_PAGE_BYTES as usize];
        let read = self.file.read_at(&mut page, 0)?;
        page.truncate(read);
        Ok(page)
    }
}

/// Whether a disk or a quota has no room.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests;
