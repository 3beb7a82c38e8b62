//! What is done before the first append: the open segment is walked, and brought into a state that can be gone on from.
//!
//! | what is found | where | what is done |
//! |---|---|---|
//! | valid frames | anywhere | kept; an attempt without its end stays open and can be resumed |
//! | a source's frames behind the last proven offset | open segment | copied with the rest into a new file, synced, renamed over it: the page cache may hold what a failed sync dropped, and what may have been acked is never written over in place |
//! | nothing but synced records behind it | open segment | cut off, and a new one written |
//! | bytes that are no frame, nothing behind them proves that they were durable | open segment | a torn tail: kept aside, cut off |
//! | bytes that are no frame, a proof behind them | open segment | rot: never cut; noted in the manifest, the segment sealed as it is |
//! | a whole frame that does not follow | open segment | the same two rows: what stood there is gone, and a proof behind it decides |
//! | a whole index and footer | open segment | a crash before the manifest named it sealed: cut off, made anew at the next roll |
//! | a segment that no manifest names | journal folder | a crash during a roll: replaced at the next roll |
//! | a damaged header | open segment | the manifest has a copy; noted |
//! | a manifest | group's folder | written anew, also where one of its two copies is damaged: its rename may not have been durable |
//! | missing, or shorter | sealed segment | noted; the points it does not concern are served |
//! | longer | sealed segment | noted; nothing reads what is behind its end |
//! | missing | open segment | noted; a new one is started |
//!
//! Every step leaves something that the same table answers the same way, so recovery may itself be cut off anywhere.
//! Only the open segment is read. Takes no lock: the store has one.

use super::file::FileId;
use super::manifest::{Damage, Manifest, SealedSegment};
use super::scan::FrameScan;
use super::sealed::is_no_file;
use super::segment::{self, Header, Place};
use super::walk::{Blind, Walked, walk};
use super::writer::{OpenSegment, create_segment};
use super::{GroupJournal, JournalError, JournalLimits};
use cdp_protocol::units::Epoch;
use cdp_seams::storage::{Storage, StorageFile, replace};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

/// Torn tails that are kept.
const ASIDE_MAX: usize = 16;
/// Bytes of a torn tail that are kept: as many as are appended before a sync is made.
const ASIDE_BYTES_MAX: u64 = 64 << 20;
/// Bytes read and written at once.
const CHUNK_BYTES: u64 = 1 << 20;

/// What recovery found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct RecoveryReport {
    /// Bytes of a torn tail that were cut off: never acked.
    pub torn_bytes: u64,
    /// Where they are kept.
    pub aside: Option<PathBuf>,
    /// Bytes behind the last proof that were made durable anew.
    pub unproven_bytes: u64,
    /// Damage that was not known before.
    pub damages: Vec<Damage>,
    /// One of the manifest's two copies was damaged, and was written anew.
    pub manifest_repaired: bool,
}

impl GroupJournal {
    /// Opens the group in `folder` to be appended to: recovery.
    ///
    /// # Errors
    /// Where there is no group, its manifest is of a newer version or damaged twice over, or the storage fails.
    pub fn open(
        storage: Arc<dyn Storage>,
        folder: &Path,
        limits: JournalLimits,
    ) -> Result<(Self, RecoveryReport), JournalError> {
        let (mut manifest, repaired) = Manifest::read(storage.as_ref(), folder)?;
        let mut report = RecoveryReport { manifest_repaired: repaired, ..RecoveryReport::default() };
        for damage in sealed_damages(storage.as_ref(), folder, &manifest.sealed)? {
            note(&mut manifest, &mut report, damage);
        }
        let mut place = open_place(folder, &manifest)?.place;
        let found = open_file(storage.as_ref(), folder, &manifest)?;
        let (open, seal) = match found {
            Some(file) => recover_open(storage.as_ref(), folder, &mut manifest, &mut report, &mut place, file)?,
            None => (replace_missing(storage.as_ref(), folder, &mut manifest, &mut report, &mut place)?, false),
        };
        place.chain.grant(manifest.generation.max(place.chain.generation()));
        // What was read may be in the page cache alone, left by a call that failed before: a name whose folder was never synced,
        // a manifest whose rename a power cut takes back. Both are made durable before anything is built on them.
        let segments = folder.join("journal");
        storage.sync_dir(&segments).map_err(JournalError::io("sync folder", &segments))?;
        manifest.write(storage.as_ref(), folder)?;
        let mut journal = Self::assemble(storage, folder, limits, manifest, place, open);
        journal.open.synced_head = journal.place.chain.head().map(|(head, _)| head);
        journal.prove()?;
        if seal {
            journal.roll()?;
        }
        Ok((journal, report))
    }
}

/// The header of the open segment, as the manifest has it.
pub(super) fn open_place(folder: &Path, manifest: &Manifest) -> Result<Header, JournalError> {
    let decoded = Header::decode(&manifest.open_header);
    let path = super::manifest::path(folder);
    decoded.map(|(header, _)| header).map_err(|source| JournalError::Segment { path, source })
}

fn open_file(
    storage: &dyn Storage,
    folder: &Path,
    manifest: &Manifest,
) -> Result<Option<Box<dyn StorageFile>>, JournalError> {
    let path = segment::path(folder, manifest.open);
    match storage.open_write(&path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(JournalError::io("open", &path)(error)),
    }
}

fn recover_open(
    storage: &dyn Storage,
    folder: &Path,
    manifest: &mut Manifest,
    report: &mut RecoveryReport,
    place: &mut Place,
    file: Box<dyn StorageFile>,
) -> Result<(OpenSegment, bool), JournalError> {
    let path = segment::path(folder, manifest.open);
    let (walked, len) = walk_open(file.as_ref(), manifest, place.clone()).map_err(JournalError::io("read", &path))?;
    keep_torn_tail(storage, folder, manifest, report, file.as_ref(), walked.end, len)?;
    let proven = walked.proven.max(manifest.open_header.len() as u64).min(walked.end);
    let (file, end) = if walked.source_end > proven {
        report.unproven_bytes = walked.source_end - proven;
        (copy_over(storage, &path, file.as_ref(), walked.source_end)?, walked.source_end)
    } else {
        if len > proven {
            // A crash leaves the file cut or not.
            let cut = file.set_len(proven).and_then(|()| file.sync());
            cut.map_err(JournalError::io("cut the tail of", &path))?;
        }
        (file, proven)
    };
    let seal = !walked.damages.is_empty();
    for damage in walked.damages {
        note(manifest, report, damage);
    }
    *place = walked.place;
    let open = OpenSegment {
        path,
        file,
        index: Arc::new(RwLock::new(walked.index)),
        pending: Vec::new(),
        written: end,
        synced: end,
        synced_head: None,
        dirty: false,
        time: walked.time,
    };
    Ok((open, seal))
}

/// Walks the open segment; gives what it found and the file's length. Shared with readers.
pub(super) fn walk_open(file: &dyn StorageFile, manifest: &Manifest, place: Place) -> io::Result<(Walked, u64)> {
    let (group, number, header) = (manifest.identity.group, manifest.open, &manifest.open_header);
    let len = file.len()?;
    let mut on_disk = vec![0; header.len()];
    let read = file.read_at(&mut on_disk, 0)?;
    let start = header.len() as u64;
    let mut walked = walk(file, len, group, number, start, Some(place), 0, &mut Blind)?;
    if read < header.len() || on_disk != *header {
        let what = "the segment's header is damaged; the manifest has a copy".to_owned();
        walked.damages.push(Damage { len: start, ..Damage::of(FileId::Segment { number, revision: 0 }, what) });
    }
    Ok((walked, len))
}

/// Keeps what stands behind the last frame, unless it is the index of a seal that was not finished.
fn keep_torn_tail(
    storage: &dyn Storage,
    folder: &Path,
    manifest: &Manifest,
    report: &mut RecoveryReport,
    file: &dyn StorageFile,
    end: u64,
    len: u64,
) -> Result<(), JournalError> {
    let path = segment::path(folder, manifest.open);
    let mut scan = FrameScan::new(file, manifest.identity.group, len);
    if len > end && !scan.is_index(end).map_err(JournalError::io("read", &path))? {
        report.aside = Some(keep_aside(storage, folder, manifest.open, file, end, len)?);
        report.torn_bytes = len - end;
    }
    Ok(())
}

fn keep_aside(
    storage: &dyn Storage,
    folder: &Path,
    number: u64,
    file: &dyn StorageFile,
    end: u64,
    len: u64,
) -> Result<PathBuf, JournalError> {
    let aside = folder.join("aside");
    let names = storage.list(&aside).map_err(JournalError::io("list", &aside))?;
    for name in names.iter().take(names.len().saturating_sub(ASIDE_MAX - 1)) {
        let old = aside.join(name);
        storage.remove(&old).map_err(JournalError::io("remove", &old))?;
    }
    let kept = aside.join(format!("{number:016x}-{end:016x}.torn"));
    // A tail is what one sync did not cover; a file that somebody made longer is not to fill the memory, nor the disk.
    let mut bytes = vec![0; (len - end).min(ASIDE_BYTES_MAX) as usize];
    let read = file.read_at(&mut bytes, end).map_err(JournalError::io("read the torn tail of", &kept))?;
    replace(storage, &kept, &bytes[..read]).map_err(JournalError::io("write", &kept))?;
    Ok(kept)
}

/// Puts a durable copy of the first `len` bytes of `file` in its place, and opens it.
///
/// A crash before the rename leaves the file and a `.new` beside it; after it, the file or the copy.
fn copy_over(
    storage: &dyn Storage,
    path: &Path,
    file: &dyn StorageFile,
    len: u64,
) -> Result<Box<dyn StorageFile>, JournalError> {
    let beside = path.with_extension("seg.new");
    match storage.remove(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(JournalError::io("remove leftover", &beside)(error));
        }
        _ => {}
    }
    let copy = storage.create_new(&beside).map_err(JournalError::io("create", &beside))?;
    copy_bytes(file, copy.as_ref(), len).map_err(JournalError::io("copy the open segment to", &beside))?;
    storage.rename(&beside, path).map_err(JournalError::io("replace", path))?;
    let parent = path.parent().expect("a segment has a folder");
    storage.sync_dir(parent).map_err(JournalError::io("sync folder", parent))?;
    Ok(copy)
}

fn copy_bytes(from: &dyn StorageFile, to: &dyn StorageFile, len: u64) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES.min(len) as usize];
    let mut at = 0;
    while at < len {
        let chunk = (len - at).min(CHUNK_BYTES) as usize;
        let read = from.read_at(&mut buffer[..chunk], at)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        to.write_at(&buffer[..read], at)?;
        at += read as u64;
    }
    to.sync()
}

fn replace_missing(
    storage: &dyn Storage,
    folder: &Path,
    manifest: &mut Manifest,
    report: &mut RecoveryReport,
    place: &mut Place,
) -> Result<OpenSegment, JournalError> {
    let head = place.chain.head().map_or(0, |(head, _)| head.epoch.0);
    let missing = manifest.open;
    let what = "the segment is missing".to_owned();
    let lost = SealedSegment {
        number: missing,
        revision: 0,
        len: 0,
        frames_end: 0,
        footer_hash: [0; 32],
        points: None,
        newest_run: Epoch(u64::MAX),
    };
    let damage = Damage { first_epoch: Some(Epoch(head + 1)), any_block: true, ..Damage::of(lost.id(), what) };
    note(manifest, report, damage);
    manifest.sealed.push(lost);
    manifest.open += 1;
    let header = Header { group: manifest.identity.group, number: manifest.open, place: place.clone() };
    manifest.open_header = header.encode();
    create_segment(storage, folder, manifest.open, &manifest.open_header)
}

fn sealed_damages(storage: &dyn Storage, folder: &Path, sealed: &[SealedSegment]) -> Result<Vec<Damage>, JournalError> {
    let mut damages = Vec::new();
    for segment in sealed.iter().filter(|segment| segment.len > 0) {
        let path = segment.id().path(folder);
        let what = match storage.open(&path).and_then(|file| file.len()) {
            Ok(len) if len >= segment.len => {
                damages.extend(segment.surplus(len));
                continue;
            }
            Ok(len) => format!("the segment has {len} bytes instead of {}", segment.len),
            Err(error) if is_no_file(&error) => "the segment is missing".to_owned(),
            Err(error) => return Err(JournalError::io("open", &path)(error)),
        };
        let first_epoch = segment.points.map(|points| points.first);
        damages.push(Damage { len: segment.len, first_epoch, any_block: true, ..Damage::of(segment.id(), what) });
    }
    Ok(damages)
}

fn note(manifest: &mut Manifest, report: &mut RecoveryReport, damage: Damage) {
    if !manifest.damages.contains(&damage) {
        manifest.damages.push(damage.clone());
        report.damages.push(damage);
    }
}
