//! What is in a file of a store, told without the server: segments and manifests.
//!
//! Reads the one file it is given and nothing else; changes nothing. Needs no key: content stays sealed.

use crate::journal::segment::{self, FOOTER_BYTES, Footer, HEADER_BYTES_MAX, Header};
use crate::journal::walk::{Visit, walk};
use crate::journal::{Damage, JournalError, Manifest, manifest};
use cdp_protocol::frame::{Frame, Kind};
use cdp_protocol::record::Synced;
use cdp_protocol::units::{AttemptId, Epoch, Generation, GroupId, Head, Sequence, VolumeSlot};
use cdp_seams::storage::{Storage, read_all};
use std::fmt;
use std::path::Path;

/// The longest manifest that is read, in bytes.
const MANIFEST_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// What is in a file.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "file", rename_all = "snake_case")]
pub enum Description {
    /// A segment.
    Segment(SegmentDescription),
    /// A manifest.
    Manifest(Box<Manifest>),
}

/// What is in a segment.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SegmentDescription {
    /// The group.
    pub group: GroupId,
    /// Its number.
    pub number: u64,
    /// The newest point before it.
    pub head: Option<Head>,
    /// The generation at its start.
    pub generation: Generation,
    /// Whether it ends with an index.
    pub sealed: bool,
    /// Bytes of the file.
    pub bytes: u64,
    /// Where its frames end.
    pub frames_end: u64,
    /// Everything before this offset was durable.
    pub proven: u64,
    /// Its frames.
    pub frames: Vec<FrameDescription>,
    /// Its points.
    pub points: Vec<Epoch>,
    /// What is damaged.
    pub damages: Vec<Damage>,
}

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct FrameDescription {
    /// Where it begins.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
    /// What it is.
    pub kind: String,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its attempt.
    pub attempt: AttemptId,
    /// Its place in it.
    pub sequence: Sequence,
    /// Its volume, where it has extents.
    pub volume: Option<VolumeSlot>,
    /// How many extents.
    pub extents: u64,
    /// How many blocks.
    pub blocks: u64,
    /// The offset a synced record proves.
    pub proves: Option<u64>,
}

/// Why a file cannot be described.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// It cannot be read, or is damaged where it has to tell what it is.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// It is no file of a store.
    #[error("{0} is neither a segment nor a manifest")]
    Unknown(String),
}

/// Describes the file at `path`.
///
/// # Errors
/// Where it cannot be read or is no file of a store.
pub fn inspect(storage: &dyn Storage, path: &Path) -> Result<Description, InspectError> {
    let file = storage.open(path).map_err(JournalError::io("open", path))?;
    let mut first = vec![0; HEADER_BYTES_MAX];
    let read = file.read_at(&mut first, 0).map_err(JournalError::io("read", path))?;
    first.truncate(read);
    if first.starts_with(&segment::MAGIC) {
        return inspect_segment(file.as_ref(), path, &first).map(Description::Segment);
    }
    if first.starts_with(&manifest::MAGIC) {
        let bytes = read_all(storage, path, MANIFEST_BYTES_MAX).map_err(JournalError::io("read", path))?;
        let decoded = Manifest::decode_file(&bytes);
        let (manifest, _) = decoded.map_err(|source| JournalError::Manifest { path: path.to_owned(), source })?;
        return Ok(Description::Manifest(Box::new(manifest)));
    }
    Err(InspectError::Unknown(path.display().to_string()))
}

fn inspect_segment(
    file: &dyn cdp_seams::storage::StorageFile,
    path: &Path,
    first: &[u8],
) -> Result<SegmentDescription, InspectError> {
    let decoded = Header::decode(first);
    let (header, start) = decoded.map_err(|source| JournalError::Segment { path: path.to_owned(), source })?;
    let bytes = file.len().map_err(JournalError::io("read", path))?;
    let mut tail = vec![0; FOOTER_BYTES.min(bytes as usize)];
    let tail_at = bytes - tail.len() as u64;
    file.read_at(&mut tail, tail_at).map_err(JournalError::io("read", path))?;
    let footer = Footer::decode(&tail, bytes).ok();
    let proven = footer.as_ref().map_or(0, |footer| footer.frames_end);
    let end = footer.as_ref().map_or(bytes, |footer| footer.frames_end);
    let mut list = List(Vec::new());
    let (head, generation) = (header.place.chain.head().map(|(head, _)| head), header.place.chain.generation());
    let walked = walk(file, end, header.group, header.number, start as u64, Some(header.place), proven, &mut list)
        .map_err(JournalError::io("read", path))?;
    Ok(SegmentDescription {
        group: header.group,
        number: header.number,
        head,
        generation,
        sealed: footer.is_some(),
        bytes,
        frames_end: walked.end,
        proven: walked.proven,
        frames: list.0,
        points: walked.index.commits.iter().map(|commit| commit.head.epoch).collect(),
        damages: walked.damages,
    })
}

struct List(Vec<FrameDescription>);

impl Visit for List {
    fn frame(&mut self, frame: &Frame<'_>, offset: u64) {
        let header = &frame.header;
        let kind = match header.kind {
            Kind::Begin => "begin".to_owned(),
            Kind::Extents => format!("{:?}", header.encoding).to_lowercase(),
            Kind::PartEnd => "part end".to_owned(),
            Kind::Commit => "commit".to_owned(),
            Kind::Synced => "synced".to_owned(),
        };
        let synced = (header.kind == Kind::Synced).then(|| Synced::decode(frame.payload).ok()).flatten();
        self.0.push(FrameDescription {
            offset,
            bytes: frame.bytes.len() as u64,
            kind,
            epoch: header.epoch,
            attempt: header.attempt,
            sequence: header.sequence,
            volume: (header.kind == Kind::Extents).then_some(header.volume),
            extents: header.extents.len() as u64,
            blocks: header.blocks(),
            proves: synced.map(|synced| synced.offset),
        });
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(segment) => segment.fmt(f),
            Self::Manifest(manifest) => write_manifest(manifest, f),
        }
    }
}

impl fmt::Display for SegmentDescription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.sealed { "sealed" } else { "open" };
        writeln!(f, "segment {} of group {}: {state}, {} bytes", self.number, self.group, self.bytes)?;
        writeln!(f, "frames end at {}, proven durable to {}", self.frames_end, self.proven)?;
        for frame in &self.frames {
            write!(f, "{:>12}  {:<10} epoch {} sequence {}", frame.offset, frame.kind, frame.epoch, frame.sequence)?;
            if let Some(volume) = frame.volume {
                write!(f, " volume {volume}: {} blocks in {} extents", frame.blocks, frame.extents)?;
            }
            if let Some(offset) = frame.proves {
                write!(f, " proves {offset}")?;
            }
            writeln!(f, ", {} bytes", frame.bytes)?;
        }
        for damage in &self.damages {
            writeln!(f, "damaged: {} bytes at {}: {}", damage.len, damage.offset, damage.what)?;
        }
        Ok(())
    }
}

fn write_manifest(manifest: &Manifest, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let identity = &manifest.identity;
    writeln!(f, "manifest of group {} ({}/{})", identity.group, identity.office, identity.name)?;
    writeln!(f, "generation {}, open segment {}", manifest.generation, manifest.open)?;
    if let Some(reason) = &manifest.frozen {
        writeln!(f, "frozen: {reason}")?;
    }
    for sealed in &manifest.sealed {
        write!(f, "segment {}: {} bytes", sealed.number, sealed.len)?;
        match &sealed.points {
            Some(points) => writeln!(f, ", points {} to {}", points.first, points.last)?,
            None => writeln!(f, ", no points")?,
        }
    }
    for (epoch, mark) in &manifest.marks {
        let pinned = if mark.pinned { ", pinned" } else { "" };
        writeln!(f, "point {epoch}: {:?}{pinned}", mark.label.as_deref().unwrap_or_default())?;
    }
    for damage in &manifest.damages {
        writeln!(f, "damaged: segment {} at {}: {}", damage.segment, damage.offset, damage.what)?;
    }
    Ok(())
}
