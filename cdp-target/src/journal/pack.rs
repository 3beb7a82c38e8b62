//! A pack: frames that the target put together from what it had, with their index (`docs/format/pack.md`).
//!
//! Two uses: the pack of a slice of a checkpoint, and a segment that was rewritten. Immutable: written beside its name, synced,
//! renamed. Within a pack position is precedence, as in a segment, and every frame counts; there is no chain to follow. The
//! header has a hash of all frames, so that a pack is proved also without the key. Does not know what belongs in it.

use super::JournalError;
use super::bytes::{FieldError, Input};
use super::file::{FileId, Sealed, SliceId};
use super::index::{CommitEntry, Lost, OpenIndex};
use super::manifest::Damage;
use super::scan::{Found, FrameScan};
use super::sealed::WalkedFile;
use super::segment::Footer;
use super::walk::Visit;
use cdp_protocol::frame::{self, Frame, Header as FrameHeader, Kind};
use cdp_protocol::record::{Begin, Commit, Synced, Volume};
use cdp_protocol::units::{AttemptId, Epoch, FrameHash, GroupId, Head, Timestamp, VolumeSlot};
use cdp_seams::storage::{Storage, StorageFile};
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

/// First bytes of a pack.
pub const MAGIC: [u8; 8] = *b"CDPPACK\0";
/// The layout described here.
pub const VERSION: u16 = 1;
/// Bytes of the header: frames begin behind it.
pub const HEADER_BYTES: usize = 8 + 2 + 1 + 1 + 4 + 16 + 24 + 8 + 32 + 4;
/// Bytes gathered before they are written.
const PENDING_BYTES_MAX: usize = 1 << 20;
/// Bytes read at once to hash them.
const CHUNK_BYTES: usize = 1 << 20;

/// What the first bytes of a pack say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whose it is.
    pub group: GroupId,
    /// Which file it is.
    pub file: FileId,
    /// Whether its content was sealed anew; else frames were taken over whole.
    pub repacked: bool,
    /// Where its frames end.
    pub frames_end: u64,
    /// BLAKE3 of all frames.
    pub frames_hash: [u8; 32],
}

/// Why bytes are not a pack's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackError {
    /// Not the first bytes of one.
    #[error("no pack magic")]
    Magic,
    /// A layout this program does not know.
    #[error("pack format version {0}, this program reads {VERSION}")]
    Version(u16),
    /// Cut short.
    #[error("cut short")]
    Short,
    /// The checksum is wrong.
    #[error("pack header checksum mismatch")]
    Crc,
    /// The checksum holds but a field is impossible.
    #[error(transparent)]
    Field(#[from] FieldError),
}

impl Header {
    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (kind, place) = match self.file {
            FileId::Segment { number, revision } => (1, [number, revision, 0]),
            FileId::Slice(SliceId { slot, slice, epoch }) => (2, [u64::from(slot.0), u64::from(slice), epoch.0]),
        };
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[kind, u8::from(self.repacked)]);
        out.extend_from_slice(&(HEADER_BYTES as u32).to_le_bytes());
        out.extend_from_slice(&self.group.0);
        for field in place {
            out.extend_from_slice(&u64::to_le_bytes(field));
        }
        out.extend_from_slice(&self.frames_end.to_le_bytes());
        out.extend_from_slice(&self.frames_hash);
        out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
        out
    }

    /// Parses the header at the start of `bytes`.
    ///
    /// # Errors
    /// Where it is none, is damaged, or is of another version.
    pub fn decode(bytes: &[u8]) -> Result<Self, PackError> {
        let fixed = bytes.first_chunk::<HEADER_BYTES>().ok_or(PackError::Short)?;
        if fixed[..8] != MAGIC {
            return Err(PackError::Magic);
        }
        let (summed, sum) = fixed.split_at(HEADER_BYTES - 4);
        let mut input = Input::new(&summed[8..]);
        let version = input.u16()?;
        if version != VERSION {
            return Err(PackError::Version(version));
        }
        if crc32fast::hash(summed).to_le_bytes() != sum {
            return Err(PackError::Crc);
        }
        let (kind, repacked, len) = (input.u8()?, input.flag()?, input.u32()?);
        let group = GroupId(input.array()?);
        let place = [input.u64()?, input.u64()?, input.u64()?];
        let wrong = FieldError("place");
        let file = match kind {
            1 if place[1] > 0 && place[2] == 0 => FileId::Segment { number: place[0], revision: place[1] },
            2 => FileId::Slice(SliceId {
                slot: VolumeSlot(u16::try_from(place[0]).map_err(|_| wrong)?),
                slice: u32::try_from(place[1]).map_err(|_| wrong)?,
                epoch: Epoch(place[2]),
            }),
            _ => return Err(wrong.into()),
        };
        if len as usize != HEADER_BYTES {
            return Err(FieldError("header length").into());
        }
        let (frames_end, frames_hash) = (input.u64()?, input.array()?);
        Ok(Self { group, file, repacked, frames_end, frames_hash })
    }
}

/// Writes a pack. Dropped before `finish`, it leaves a file without a name that counts, which the next try replaces.
pub struct PackWriter<'a> {
    storage: &'a dyn Storage,
    group: GroupId,
    id: FileId,
    path: PathBuf,
    beside: PathBuf,
    file: Box<dyn StorageFile>,
    index: OpenIndex,
    pending: Vec<u8>,
    written: u64,
    hasher: blake3::Hasher,
    volumes: HashMap<AttemptId, Vec<Volume>>,
    time: Timestamp,
}

/// A pack that was written, and its index.
pub struct Written {
    /// The file.
    pub sealed: Sealed,
    /// What is in it.
    pub index: OpenIndex,
}

impl<'a> PackWriter<'a> {
    /// Begins the pack `id` of the group in `folder`.
    ///
    /// # Errors
    /// As the storage says.
    pub fn create(storage: &'a dyn Storage, folder: &Path, group: GroupId, id: FileId) -> Result<Self, JournalError> {
        let path = id.path(folder);
        let mut name = path.file_name().expect("a pack has a name").to_owned();
        name.push(".new");
        let beside = path.with_file_name(name);
        match storage.remove(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(JournalError::io("remove leftover", &beside)(error));
            }
            _ => {}
        }
        let file = storage.create_new(&beside).map_err(JournalError::io("create", &beside))?;
        Ok(Self {
            storage,
            group,
            id,
            path,
            beside,
            file,
            index: OpenIndex::default(),
            pending: Vec::new(),
            written: HEADER_BYTES as u64,
            hasher: blake3::Hasher::new(),
            volumes: HashMap::new(),
            time: Timestamp(0),
        })
    }

    /// Bytes so far.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.written + self.pending.len() as u64
    }

    /// Adds a frame of the group.
    ///
    /// # Errors
    /// As the storage says.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), JournalError> {
        let frame = frame::decode(&self.group, bytes).expect("only valid frames are put in a pack");
        let offset = self.bytes();
        take(&mut self.index, &mut self.volumes, &mut self.time, &frame, offset);
        self.hasher.update(bytes);
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= PENDING_BYTES_MAX { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), JournalError> {
        let written = self.file.write_at(&self.pending, self.written);
        written.map_err(JournalError::io("write", &self.beside))?;
        self.written += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    /// Makes it durable and gives it its name; the name is durable once its folder is synced.
    ///
    /// # Errors
    /// As the storage says: the file is then worth nothing.
    pub fn finish(mut self, repacked: bool) -> Result<Written, JournalError> {
        self.flush()?;
        let frames_end = self.written;
        let (footer, index) = Footer::build(frames_end, &self.index.encode());
        let frames_hash = *self.hasher.finalize().as_bytes();
        let header = Header { group: self.group, file: self.id, repacked, frames_end, frames_hash };
        // A crash before the rename leaves a file beside the name; after it, and before the folder's sync, that or the pack.
        let written = self.file.write_at(&index, frames_end);
        let written = written.and_then(|()| self.file.write_at(&header.encode(), 0)).and_then(|()| self.file.sync());
        written.map_err(JournalError::io("write", &self.beside))?;
        self.storage.rename(&self.beside, &self.path).map_err(JournalError::io("rename", &self.beside))?;
        let len = frames_end + index.len() as u64;
        let points = self.index.point_range();
        let sealed = Sealed { id: self.id, len, frames_end, footer_hash: footer.hash(), points };
        Ok(Written { sealed, index: self.index })
    }
}

/// Takes a frame into a pack's index.
fn take(
    index: &mut OpenIndex,
    volumes: &mut HashMap<AttemptId, Vec<Volume>>,
    time: &mut Timestamp,
    frame: &Frame<'_>,
    offset: u64,
) {
    let header = &frame.header;
    match header.kind {
        Kind::Begin => {
            if let Ok((begin, _)) = Begin::decode(frame.payload) {
                volumes.insert(header.attempt, begin.volumes);
            }
        }
        Kind::Extents => {
            let run = index.pack_run(header);
            index.runs[run as usize].bytes += frame.bytes.len() as u64;
            index.insert(header, run, offset);
        }
        Kind::Synced => *time = Synced::decode(frame.payload).map_or(*time, |synced| synced.time),
        Kind::PartEnd => {}
        Kind::Commit => {
            let record = Commit::decode(frame.payload).ok().map(|(commit, _)| commit);
            let head = Head { epoch: header.epoch, hash: frame.hash() };
            let volumes = volumes.remove(&header.attempt).unwrap_or_default();
            let frame_len = frame.bytes.len() as u32;
            let (generation, attempt, received) = (header.generation, header.attempt, *time);
            index.commits.push(CommitEntry { head, generation, attempt, offset, frame_len, received, record, volumes });
        }
    }
}

/// Walks a pack frame by frame, over damage too, and shows every valid frame to `visitor`.
pub(crate) fn walk_pack(
    file: &dyn StorageFile,
    group: GroupId,
    sealed: &Sealed,
    visitor: &mut dyn Visit,
) -> io::Result<WalkedFile> {
    let mut bytes = vec![0; HEADER_BYTES];
    let read = file.read_at(&mut bytes, 0)?;
    let header = Header::decode(&bytes[..read]).ok();
    let is_ours =
        |header: &Header| (header.group, header.file, header.frames_end) == (group, sealed.id, sealed.frames_end);
    let header = header.filter(is_ours);
    let end = file.len()?.min(sealed.frames_end);
    let mut walk = PackWalk {
        scan: FrameScan::new(file, group, end),
        id: sealed.id,
        out: WalkedFile { index: OpenIndex::default(), damages: Vec::new() },
        volumes: HashMap::new(),
        time: Timestamp(0),
        epoch: Epoch(0),
    };
    walk.run(group, visitor)?;
    if end < sealed.frames_end {
        walk.lose(end, sealed.frames_end - end, "cut off");
    }
    let mut out = walk.out;
    let whole = out.damages.is_empty();
    let what = match header {
        None => Some("the pack's header is damaged"),
        // Every frame stands, and yet they are not those that were written.
        Some(header) if whole && hash_of(file, end)? != header.frames_hash => {
            Some("the frames are not those of the pack")
        }
        Some(_) => None,
    };
    if let Some(what) = what {
        out.damages.push(Damage { len: HEADER_BYTES as u64, ..Damage::of(sealed.id, what.to_owned()) });
    }
    Ok(out)
}

fn hash_of(file: &dyn StorageFile, end: u64) -> io::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut at = HEADER_BYTES as u64;
    while at < end {
        let chunk = (end - at).min(CHUNK_BYTES as u64) as usize;
        let read = file.read_at(&mut buffer[..chunk], at)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        at += read as u64;
    }
    Ok(*hasher.finalize().as_bytes())
}

struct PackWalk<'a> {
    scan: FrameScan<'a>,
    id: FileId,
    out: WalkedFile,
    volumes: HashMap<AttemptId, Vec<Volume>>,
    time: Timestamp,
    /// Of the last frame that stood.
    epoch: Epoch,
}

impl PackWalk<'_> {
    fn run(&mut self, group: GroupId, visitor: &mut dyn Visit) -> io::Result<()> {
        let mut offset = HEADER_BYTES as u64;
        loop {
            match self.scan.at(offset)? {
                Found::End => return Ok(()),
                Found::Frame(bytes) => {
                    let bytes = bytes.to_vec();
                    let frame = frame::decode(&group, &bytes).expect("it was decoded to be found");
                    take(&mut self.out.index, &mut self.volumes, &mut self.time, &frame, offset);
                    self.epoch = self.epoch.max(frame.header.epoch);
                    visitor.frame(&frame, offset);
                    offset += bytes.len() as u64;
                }
                Found::Bad(Some(header)) => {
                    self.lose_payload(&header, offset);
                    offset += header.frame_len() as u64;
                }
                Found::Bad(None) => {
                    let next = self.scan.find(offset + 1)?.unwrap_or(self.scan.end()).max(offset + 1);
                    self.lose(offset, next - offset, "frames are damaged beyond telling");
                    offset = next;
                }
            }
        }
    }

    fn lose_payload(&mut self, header: &FrameHeader, offset: u64) {
        let len = header.frame_len() as u64;
        let what = format!("the payload of a frame ({:?}) is damaged", header.kind);
        let needed = !matches!(header.kind, Kind::Synced);
        let first_epoch = needed.then_some(header.epoch);
        self.out.damages.push(Damage { offset, len, first_epoch, ..Damage::of(self.id, what) });
        match header.kind {
            Kind::Extents => {
                let run = self.out.index.pack_run(header);
                self.out.index.insert(header, run, offset);
            }
            Kind::Commit => {
                let head = Head { epoch: header.epoch, hash: FrameHash([0; 32]) };
                let volumes = self.volumes.remove(&header.attempt).unwrap_or_default();
                let (generation, attempt, received) = (header.generation, header.attempt, self.time);
                let (frame_len, record) = (len as u32, None);
                let commit = CommitEntry { head, generation, attempt, offset, frame_len, received, record, volumes };
                self.out.index.commits.push(commit);
            }
            Kind::Begin | Kind::PartEnd | Kind::Synced => {}
        }
    }

    /// Nothing is known of what stood there.
    fn lose(&mut self, offset: u64, len: u64, what: &str) {
        let damage = Damage::of(self.id, what.to_owned());
        self.out.damages.push(Damage { offset, len, first_epoch: Some(self.epoch), any_block: true, ..damage });
        self.out.index.lost.push(Lost { offset, len, run: None });
    }
}
