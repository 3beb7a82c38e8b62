//! What is in a file of a store, told without the server: segments, packs, image indexes, manifests.
//!
//! Reads the one file it is given and nothing else; changes nothing. Needs no key: content stays sealed.

use crate::checkpoint::index::{self, ImageError, SliceContent};
use crate::journal::file::{FileId, Sealed};
use crate::journal::pack::{self, PackError};
use crate::journal::segment::{self, FOOTER_BYTES, Footer, HEADER_BYTES_MAX, Header};
use crate::journal::walk::{Visit, walk};
use crate::journal::{Damage, JournalError, Manifest, manifest};
use cdp_protocol::frame::{Frame, Kind};
use cdp_protocol::record::volume_meters::VolumeMeters;
use cdp_protocol::record::{Commit, Meters, Synced};
use cdp_protocol::units::{AttemptId, Epoch, Generation, GroupId, Head, Sequence, VolumeSlot};
use cdp_seams::storage::{Storage, StorageFile, read_all};
use std::path::{Path, PathBuf};

/// The longest manifest that is read, in bytes.
const MANIFEST_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// The longest image index that is read, in bytes: 64 volumes of 16 TiB, twice.
const IMAGE_BYTES_MAX: u64 = 64 * (16 << 14) * 2 * index::RECORD_BYTES as u64 + (1 << 20);

/// What is in a file.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "file", rename_all = "snake_case")]
pub enum Description {
    /// A segment.
    Segment(SegmentDescription),
    /// A manifest.
    Manifest(Box<Manifest>),
    /// A pack: of a slice, or a segment that was rewritten.
    Pack(PackDescription),
    /// The image index of a checkpoint.
    Image(ImageDescription),
}

/// What is in a pack.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PackDescription {
    /// The group.
    pub group: GroupId,
    /// Which file it is.
    pub of: FileId,
    /// Whether its content was sealed anew; else frames were taken over whole.
    pub repacked: bool,
    /// Bytes of the file.
    pub bytes: u64,
    /// Where its frames end.
    pub frames_end: u64,
    /// Its frames.
    pub frames: Vec<FrameDescription>,
    /// What is damaged.
    pub damages: Vec<Damage>,
}

/// What is in an image index.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ImageDescription {
    /// The group.
    pub group: GroupId,
    /// The point.
    pub epoch: Epoch,
    /// Whether both copies are the same.
    pub copies_agree: bool,
    /// Its slices.
    pub slices: Vec<SliceDescription>,
}

/// A slice of an image.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SliceDescription {
    /// Its volume.
    pub volume: VolumeSlot,
    /// Which of its slices.
    pub slice: u32,
    /// The pack, by its name; none where all is zeros, or the record is damaged.
    pub pack: Option<String>,
    /// Whether the record is not what was written.
    pub damaged: bool,
    /// Bytes of the pack.
    pub held_bytes: u64,
    /// Bytes of it that the image needs.
    pub needed_bytes: u64,
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
    /// What a commit's cut and epoch amounted to.
    pub meters: Option<CommitMeters>,
}

/// What a commit says of its cut and its volumes.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct CommitMeters {
    /// Of the cut and the whole epoch.
    #[serde(flatten)]
    pub epoch: Meters,
    /// Of each volume, since the point before; empty where its source did not count.
    pub volumes: Vec<SlotMeters>,
}

/// What became of a volume.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SlotMeters {
    /// The volume.
    pub volume: VolumeSlot,
    /// By its source's count.
    #[serde(flatten)]
    pub meters: VolumeMeters,
}

impl CommitMeters {
    fn of(commit: &Commit) -> Self {
        let slot = |(volume, meters): &(VolumeSlot, VolumeMeters)| SlotMeters { volume: *volume, meters: *meters };
        Self { epoch: commit.meters, volumes: commit.volumes.iter().map(slot).collect() }
    }
}

/// Why a file cannot be described.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// It cannot be read, or is damaged where it has to tell what it is.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A pack that cannot be used.
    #[error("read pack {}", path.display())]
    Pack {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: PackError,
    },
    /// An image index that cannot be used.
    #[error("read image index {}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ImageError,
    },
    /// It is no file of a store.
    #[error("{0} is no segment, pack, image index or manifest")]
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
    if first.starts_with(&pack::MAGIC) {
        return inspect_pack(file.as_ref(), path, &first).map(Description::Pack);
    }
    if first.starts_with(&index::MAGIC) {
        let bytes = read_all(storage, path, IMAGE_BYTES_MAX).map_err(JournalError::io("read", path))?;
        return inspect_image(path, &bytes).map(Description::Image);
    }
    Err(InspectError::Unknown(path.display().to_string()))
}

fn inspect_pack(file: &dyn StorageFile, path: &Path, first: &[u8]) -> Result<PackDescription, InspectError> {
    let header = pack::Header::decode(first).map_err(|source| InspectError::Pack { path: path.to_owned(), source })?;
    let bytes = file.len().map_err(JournalError::io("read", path))?;
    let pack::Header { group, file: of, repacked, frames_end, .. } = header;
    let sealed = Sealed { id: of, len: bytes, frames_end, footer_hash: [0; 32], points: None };
    let mut list = List(Vec::new());
    let walked = pack::walk_pack(file, group, &sealed, &mut list).map_err(JournalError::io("read", path))?;
    Ok(PackDescription { group, of, repacked, bytes, frames_end, frames: list.0, damages: walked.damages })
}

fn inspect_image(path: &Path, bytes: &[u8]) -> Result<ImageDescription, InspectError> {
    let (first, second) = bytes.split_at(bytes.len() / 2);
    let decoded = index::Header::decode(first).or_else(|error| index::Header::decode(second).map_err(|_| error));
    let (header, len) = decoded.map_err(|source| InspectError::Image { path: path.to_owned(), source })?;
    let epoch = header.commit.head.epoch;
    let describe = |(at, (volume, slice)): (usize, (VolumeSlot, u32))| {
        let of_copy = |copy: &[u8]| {
            let bytes = copy.get(len + at * index::RECORD_BYTES..)?.first_chunk()?;
            index::take_record(bytes, header.group, epoch, volume, slice).ok()
        };
        let record = of_copy(first).or_else(|| of_copy(second));
        let pack = record.and_then(|record| match record.content {
            SliceContent::Zero => None,
            SliceContent::Pack { sealed, .. } => Some(sealed.id.path(Path::new("")).display().to_string()),
        });
        let (held_bytes, needed_bytes) = record.map_or((0, 0), |record| (record.held_bytes(), record.needed_bytes));
        SliceDescription { volume, slice, pack, damaged: record.is_none(), held_bytes, needed_bytes }
    };
    let slices = index::places(&header.commit.volumes).enumerate().map(describe).collect();
    Ok(ImageDescription { group: header.group, epoch, copies_agree: first == second, slices })
}

fn inspect_segment(file: &dyn StorageFile, path: &Path, first: &[u8]) -> Result<SegmentDescription, InspectError> {
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
        let commit = (header.kind == Kind::Commit).then(|| Commit::decode(frame.payload).ok()).flatten();
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
            meters: commit.map(|(commit, _)| CommitMeters::of(&commit)),
        });
    }
}
