//! Indexes of sealed segments and packs, as readers hold them: loaded when needed, verified, within a budget of memory.
//!
//! An index that does not verify is made anew from the file's frames, in memory; nothing is written. It is made anew as a
//! whole, whichever part of it is damaged: what was lost among the frames is told by the other part.

use super::caches::Caches;
use super::file::{FileId, Sealed};
use super::index::{Lost, OpenIndex, Run, Summary, Tables};
use super::manifest::PointRange;
use super::pack::walk_pack;
use super::scan::FrameScan;
use super::segment::{FOOTER_BYTES, Footer, HEADER_BYTES_MAX, Header, INDEX_MAGIC, Section};
use super::walk::{Blind, Visit, Walked, walk};
use super::{Damage, JournalError};
use cdp_protocol::units::{Epoch, Extent, GroupId, VolumeSlot};
use cdp_seams::storage::{Storage, StorageFile};
use roaring::RoaringBitmap;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// A sealed segment's index does not verify, and why.
enum IndexError {
    Io(io::Error),
    Damaged,
}

impl From<io::Error> for IndexError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// What tells that a block is not in a sealed file. Every read asks every segment above its checkpoint, so it is kept apart from
/// the points, which take a hundred times as much.
pub(crate) struct Touched {
    bitmaps: BTreeMap<u16, RoaringBitmap>,
    has_lost: bool,
}

impl Touched {
    fn of(mut bitmaps: BTreeMap<u16, RoaringBitmap>, lost: &[Lost]) -> Self {
        for bitmap in bitmaps.values_mut() {
            // The holes of a first copy are few runs of very many blocks.
            bitmap.optimize();
        }
        Self { bitmaps, has_lost: !lost.is_empty() }
    }

    /// Whether any frame, or a damage, may hold blocks of `extent` of a volume.
    pub(crate) fn may_hold(&self, slot: VolumeSlot, extent: Extent) -> bool {
        let blocks = extent.start.0..=(extent.end() - 1) as u32;
        self.has_lost || self.bitmaps.get(&slot.0).is_some_and(|bitmap| bitmap.range_cardinality(blocks) > 0)
    }

    pub(super) fn bytes(&self) -> usize {
        self.bitmaps.values().map(RoaringBitmap::serialized_size).sum()
    }
}

/// The extents of a sealed file, the attempts they are of, and the damage that hides any.
pub(crate) struct Extents {
    pub(crate) tables: Tables,
    pub(crate) runs: Vec<Run>,
    pub(crate) lost: Vec<Lost>,
}

impl Extents {
    pub(super) fn bytes(&self) -> usize {
        self.tables.bytes() + self.runs.len() * size_of::<Run>() + self.lost.len() * size_of::<Lost>()
    }
}

/// The index of a file in the parts that readers hold.
struct Parts {
    summary: Arc<Summary>,
    touched: Arc<Touched>,
    extents: Arc<Extents>,
}

/// Nothing stands there, or something that is no file.
pub(crate) fn is_no_file(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::IsADirectory | io::ErrorKind::InvalidInput)
}

/// What is read of a segment that is missing.
struct Nothing;

impl StorageFile for Nothing {
    fn read_at(&self, _buffer: &mut [u8], _offset: u64) -> io::Result<usize> {
        Ok(0)
    }

    fn write_at(&self, _bytes: &[u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn try_lock(&self) -> io::Result<bool> {
        Ok(false)
    }
}

/// What a walk over a sealed file found.
pub(crate) struct WalkedFile {
    pub(crate) index: OpenIndex,
    pub(crate) damages: Vec<Damage>,
}

/// Where sealed files are and whose they are.
pub(crate) struct Shelf<'a> {
    pub(crate) storage: &'a dyn Storage,
    pub(crate) folder: &'a Path,
    pub(crate) group: GroupId,
    pub(crate) caches: &'a Caches,
}

impl Shelf<'_> {
    /// A file, open to read; one of nothing where it is missing: its points are gone, the others are to be served.
    pub(crate) fn file(&self, id: FileId) -> Result<Arc<Box<dyn StorageFile>>, JournalError> {
        Ok(self.open_file(id)?.unwrap_or_else(|| Arc::new(Box::new(Nothing))))
    }

    /// A file, open to read, if it is there.
    fn open_file(&self, id: FileId) -> Result<Option<Arc<Box<dyn StorageFile>>>, JournalError> {
        if let Some(file) = self.caches.files.find(id) {
            return Ok(Some(file));
        }
        let path = id.path(self.folder);
        let file = match self.storage.open(&path) {
            // Not kept: it may be put back.
            Err(error) if is_no_file(&error) => return Ok(None),
            opened => Arc::new(opened.map_err(JournalError::io("open", &path))?),
        };
        self.caches.files.keep(id, &file, 1);
        Ok(Some(file))
    }

    /// Whether nothing has a file's name any more, also where it is still open here.
    pub(crate) fn is_missing(&self, id: FileId) -> bool {
        let opened = self.storage.open(&id.path(self.folder));
        opened.is_err_and(|error| is_no_file(&error))
    }

    /// Whether a file is there with the length and the footer it was written with. What was read of one of that name before is forgotten.
    pub(super) fn is_there(&self, sealed: &Sealed) -> Result<bool, JournalError> {
        self.caches.forget(sealed.id);
        let path = sealed.id.path(self.folder);
        let file = match self.storage.open(&path) {
            Err(error) if is_no_file(&error) => return Ok(false),
            opened => opened.map_err(JournalError::io("open", &path))?,
        };
        let has_len = file.len().map_err(JournalError::io("read", &path))? == sealed.len;
        match load_footer(file.as_ref(), sealed) {
            Ok(_) => Ok(has_len),
            Err(IndexError::Damaged) => Ok(false),
            Err(IndexError::Io(error)) => Err(JournalError::io("read", &path)(error)),
        }
    }

    /// Everything but the extents.
    pub(crate) fn summary(&self, sealed: &Sealed) -> Result<Arc<Summary>, JournalError> {
        if let Some(summary) = self.caches.summaries.find(sealed.id) {
            return Ok(summary);
        }
        match self.load(sealed, load_summary)? {
            Some(summary) => {
                let summary = Arc::new(summary);
                self.caches.summaries.keep(sealed.id, &summary, summary.bytes());
                Ok(summary)
            }
            None => Ok(self.make_anew(sealed)?.summary),
        }
    }

    /// Which blocks it touches.
    pub(crate) fn touched(&self, sealed: &Sealed) -> Result<Arc<Touched>, JournalError> {
        if let Some(touched) = self.caches.touched.find(sealed.id) {
            return Ok(touched);
        }
        match self.load(sealed, load_touched)? {
            Some(touched) => {
                let touched = Arc::new(touched);
                self.caches.touched.keep(sealed.id, &touched, touched.bytes());
                Ok(touched)
            }
            None => Ok(self.make_anew(sealed)?.touched),
        }
    }

    /// The extents, and what belongs to them.
    pub(crate) fn extents(&self, sealed: &Sealed) -> Result<Arc<Extents>, JournalError> {
        if let Some(extents) = self.caches.extents.find(sealed.id) {
            return Ok(extents);
        }
        match self.load(sealed, load_extents)? {
            Some(extents) => {
                let extents = Arc::new(extents);
                self.caches.extents.keep(sealed.id, &extents, extents.bytes());
                Ok(extents)
            }
            None => Ok(self.make_anew(sealed)?.extents),
        }
    }

    /// The same; `None` where the file is missing.
    pub(crate) fn extents_if_there(&self, sealed: &Sealed) -> Result<Option<Arc<Extents>>, JournalError> {
        self.open_file(sealed.id)?.map(|_| self.extents(sealed)).transpose()
    }

    /// The attempts, and the damage that hides any extents: little beside the rest, read anew each time.
    pub(crate) fn runs(&self, sealed: &Sealed) -> Result<(Vec<Run>, Vec<Lost>), JournalError> {
        match self.load(sealed, load_runs)? {
            Some(runs) => Ok(runs),
            None => self.make_anew(sealed).map(|parts| (parts.summary.runs.clone(), parts.summary.lost.clone())),
        }
    }

    /// A part of the index from the file; `None` where the index does not verify, now or before.
    fn load<T>(
        &self,
        sealed: &Sealed,
        load: impl FnOnce(&dyn StorageFile, &Sealed) -> Result<T, IndexError>,
    ) -> Result<Option<T>, JournalError> {
        if self.caches.is_distrusted(sealed.id) {
            return Ok(None);
        }
        match load(self.file(sealed.id)?.as_ref().as_ref(), sealed) {
            Ok(part) => Ok(Some(part)),
            Err(IndexError::Damaged) => Ok(None),
            Err(IndexError::Io(error)) => Err(self.read_error(sealed.id, error)),
        }
    }

    /// All of an index that does not verify, from the frames; what was believed of it before gives way.
    fn make_anew(&self, sealed: &Sealed) -> Result<Parts, JournalError> {
        let (summary, tables) = self.walk(sealed, &mut Blind)?.index.into_sealed();
        let touched = Arc::new(Touched::of(summary.bitmaps.clone(), &summary.lost));
        let extents = Arc::new(Extents { tables, runs: summary.runs.clone(), lost: summary.lost.clone() });
        let parts = Parts { summary: Arc::new(summary), touched, extents };
        if self.is_missing(sealed.id) {
            // It may be put back.
            return Ok(parts);
        }
        let Parts { summary, touched, extents } = &parts;
        self.caches.distrust(sealed.id);
        self.caches.summaries.keep(sealed.id, summary, summary.bytes());
        self.caches.touched.keep(sealed.id, touched, touched.bytes());
        self.caches.extents.keep(sealed.id, extents, extents.bytes());
        Ok(parts)
    }

    /// Walks a sealed file frame by frame.
    pub(crate) fn walk(&self, sealed: &Sealed, visitor: &mut dyn Visit) -> Result<WalkedFile, JournalError> {
        let file = self.file(sealed.id)?;
        let file = file.as_ref().as_ref();
        let walked = match sealed.id {
            FileId::Segment { number, revision: 0 } => {
                let walked = self.walk_segment(file, sealed, number, visitor);
                walked.map(|walked| WalkedFile { index: walked.index, damages: walked.damages })
            }
            _ => walk_pack(file, self.group, sealed, visitor),
        };
        walked.map_err(|error| self.read_error(sealed.id, error))
    }

    fn walk_segment(
        &self,
        file: &dyn StorageFile,
        sealed: &Sealed,
        number: u64,
        visitor: &mut dyn Visit,
    ) -> io::Result<Walked> {
        let mut bytes = vec![0; HEADER_BYTES_MAX.min(sealed.frames_end as usize)];
        let read = file.read_at(&mut bytes, 0)?;
        let header = Header::decode(&bytes[..read]).ok();
        let header = header.filter(|(header, _)| header.group == self.group && header.number == number);
        let end = file.len()?.min(sealed.frames_end);
        let (group, frames_end) = (self.group, sealed.frames_end);
        let (place, start, damaged) = match header {
            Some((header, len)) => (Some(header.place), len as u64, false),
            None => (None, FrameScan::new(file, group, end).find(0)?.unwrap_or(end), true),
        };
        let mut walked = walk(file, end, group, number, start, place, frames_end, visitor)?;
        if damaged {
            disown(&mut walked, sealed.points);
            let what = "the segment's header is damaged".to_owned();
            // The volumes of an attempt that began before are told by the header alone.
            let first_epoch = walked.index.runs.first().filter(|run| run.continued).map(|run| run.epoch);
            walked.damages.push(Damage { len: start, first_epoch, ..Damage::of(sealed.id, what) });
        }
        Ok(walked)
    }

    /// Whether a sealed segment's index is what was written.
    pub(crate) fn index_is_whole(&self, sealed: &Sealed) -> Result<bool, JournalError> {
        let file = self.file(sealed.id)?;
        let file = file.as_ref().as_ref();
        let loaded = check_magic(file, sealed)
            .and_then(|()| load_summary(file, sealed))
            .and_then(|_| load_extents(file, sealed));
        match loaded {
            Ok(_) => Ok(true),
            Err(IndexError::Damaged) => Ok(false),
            Err(IndexError::Io(error)) => Err(self.read_error(sealed.id, error)),
        }
    }

    fn read_error(&self, file: FileId, error: io::Error) -> JournalError {
        JournalError::io("read", &file.path(self.folder))(error)
    }
}

/// What no hash covers, and no reader needs.
fn check_magic(file: &dyn StorageFile, sealed: &Sealed) -> Result<(), IndexError> {
    let mut magic = [0; INDEX_MAGIC.len()];
    file.read_at(&mut magic, sealed.frames_end)?;
    if magic == INDEX_MAGIC { Ok(()) } else { Err(IndexError::Damaged) }
}

/// Without its header a segment's first commit tells of a point before it as of one whose own commit is gone: that one is another
/// segment's, and the manifest knows which points are this one's.
fn disown(walked: &mut Walked, points: Option<PointRange>) {
    let is_other = |epoch: Epoch| points.is_none_or(|points| epoch < points.first);
    walked.index.commits.retain(|commit| commit.record.is_some() || !is_other(commit.head.epoch));
    walked.damages.retain(|damage| damage.len > 0 || damage.first_epoch.is_none_or(|epoch| !is_other(epoch)));
}

fn load_footer(file: &dyn StorageFile, sealed: &Sealed) -> Result<Footer, IndexError> {
    let at = sealed.len.checked_sub(FOOTER_BYTES as u64).ok_or(IndexError::Damaged)?;
    let mut bytes = vec![0; FOOTER_BYTES];
    let read = file.read_at(&mut bytes, at)?;
    let footer = Footer::decode(&bytes[..read], sealed.len).map_err(|_| IndexError::Damaged)?;
    let same = footer.hash() == sealed.footer_hash && footer.frames_end == sealed.frames_end;
    if same { Ok(footer) } else { Err(IndexError::Damaged) }
}

fn load_section(file: &dyn StorageFile, footer: &Footer, section: Section) -> Result<Vec<u8>, IndexError> {
    let (len, hash) = footer.sections[section as usize];
    let mut bytes = vec![0; len as usize];
    let read = file.read_at(&mut bytes, footer.offset(section))?;
    let whole = read == bytes.len() && *blake3::hash(&bytes).as_bytes() == hash;
    if whole { Ok(bytes) } else { Err(IndexError::Damaged) }
}

fn load_summary(file: &dyn StorageFile, sealed: &Sealed) -> Result<Summary, IndexError> {
    let footer = load_footer(file, sealed)?;
    let load = |section| load_section(file, &footer, section);
    let (runs, commits) = (load(Section::Runs)?, load(Section::Commits)?);
    let (lost, bitmaps) = (load(Section::Lost)?, load(Section::Bitmaps)?);
    Summary::decode(&runs, &commits, &lost, &bitmaps).map_err(|_| IndexError::Damaged)
}

fn load_touched(file: &dyn StorageFile, sealed: &Sealed) -> Result<Touched, IndexError> {
    let footer = load_footer(file, sealed)?;
    let load = |section| load_section(file, &footer, section);
    let (lost, bitmaps) = (load(Section::Lost)?, load(Section::Bitmaps)?);
    let part = Summary::decode(&[], &[], &lost, &bitmaps).map_err(|_| IndexError::Damaged)?;
    Ok(Touched::of(part.bitmaps, &part.lost))
}

fn load_runs(file: &dyn StorageFile, sealed: &Sealed) -> Result<(Vec<Run>, Vec<Lost>), IndexError> {
    let footer = load_footer(file, sealed)?;
    let (runs, lost) = (load_section(file, &footer, Section::Runs)?, load_section(file, &footer, Section::Lost)?);
    let part = Summary::decode(&runs, &[], &lost, &[]).map_err(|_| IndexError::Damaged)?;
    Ok((part.runs, part.lost))
}

fn load_extents(file: &dyn StorageFile, sealed: &Sealed) -> Result<Extents, IndexError> {
    let footer = load_footer(file, sealed)?;
    let (content, bare) = (load_section(file, &footer, Section::Content)?, load_section(file, &footer, Section::Bare)?);
    let tables = Tables::decode(&content, &bare).map_err(|_| IndexError::Damaged)?;
    let (runs, lost) = load_runs(file, sealed)?;
    Ok(Extents { tables, runs, lost })
}
