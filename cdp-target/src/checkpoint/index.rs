//! The image index of a checkpoint: which pack has which slice (`docs/format/image.md`).
//!
//! Two equal copies in one file, so that one spot of rot does not take 64 MiB of the image with it. Read a record at a time:
//! nothing is loaded whole. What is in a pack is the pack's own business.

use crate::journal::JournalError;
use crate::journal::bytes::{FieldError, Input, put_long};
use crate::journal::file::{FileId, SLICE_BLOCKS, Sealed, SliceId, checkpoints};
use crate::journal::index::{CommitEntry, put_commit, take_commit};
use crate::journal::manifest::Checkpoint;
use cdp_protocol::record::Volume;
use cdp_protocol::units::{Epoch, GroupId, VolumeSlot, blocks_in};
use cdp_seams::storage::{Storage, StorageFile};
use std::io;
use std::path::{Path, PathBuf};

/// First bytes of an image index.
pub const MAGIC: [u8; 8] = *b"CDPIMAGE";
/// The layout described here.
pub const VERSION: u16 = 1;
/// Bytes of a record.
pub const RECORD_BYTES: usize = 4 + 8 + 8 + 8 + 32 + 8 + 4;
/// The longest header, in bytes.
const HEADER_BYTES_MAX: usize = 64 * 1024;

/// Where the content of a slice is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SliceContent {
    /// Nowhere: all zeros.
    Zero,
    /// In a pack.
    Pack {
        /// The pack.
        sealed: Sealed,
        /// Whether its content was sealed anew; else it has frames taken over whole.
        repacked: bool,
    },
}

/// A slice of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SliceRecord {
    /// Where its content is.
    pub content: SliceContent,
    /// Whether it has blocks that the source's device could not read.
    pub unreadable: bool,
    /// Whether it has blocks that were lost.
    pub lost: bool,
    /// Bytes of the pack that the image needs.
    pub needed_bytes: u64,
}

impl SliceRecord {
    /// Bytes of its pack.
    #[must_use]
    pub const fn held_bytes(&self) -> u64 {
        match &self.content {
            SliceContent::Zero => 0,
            SliceContent::Pack { sealed, .. } => sealed.len,
        }
    }
}

/// Why bytes are not an image index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// Not the first bytes of one.
    #[error("no image index magic")]
    Magic,
    /// A layout this program does not know.
    #[error("image index format version {0}, this program reads {VERSION}")]
    Version(u16),
    /// Cut short.
    #[error("cut short")]
    Short,
    /// The checksum is wrong.
    #[error("image index checksum mismatch")]
    Crc,
    /// The checksum holds but a field is impossible.
    #[error(transparent)]
    Field(#[from] FieldError),
}

/// What the first bytes of an image index say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whose it is.
    pub group: GroupId,
    /// The point.
    pub commit: CommitEntry,
    /// How many records there are: one a slice, volume by volume as the point has them.
    pub records: u64,
}

/// An image index, open to be read.
pub struct ImageIndex {
    header: Header,
    header_len: u64,
    copy_len: u64,
    file: Box<dyn StorageFile>,
}

/// Where the image index of a checkpoint of the group in `folder` is: one that is made anew does not take the name of one that the
/// manifest still has.
#[must_use]
pub fn path(folder: &Path, epoch: Epoch, index_hash: &[u8; 32]) -> PathBuf {
    let hash = u64::from_be_bytes(*index_hash.first_chunk().expect("32 bytes"));
    checkpoints(folder).join(format!("{:016x}-{hash:016x}.image", epoch.0))
}

impl Checkpoint {
    /// Where its image index is.
    #[must_use]
    pub fn path(&self, folder: &Path) -> PathBuf {
        path(folder, self.epoch, &self.index_hash)
    }
}

/// Slices of a volume.
#[must_use]
pub fn slices_of(volume: &Volume) -> u32 {
    blocks_in(volume.size_bytes).div_ceil(u64::from(SLICE_BLOCKS)) as u32
}

/// Every slice of an image, in the order of its records.
pub fn places(volumes: &[Volume]) -> impl Iterator<Item = (VolumeSlot, u32)> + '_ {
    volumes.iter().flat_map(|volume| (0..slices_of(volume)).map(|slice| (volume.slot, slice)))
}

/// One copy of the index of the image at `commit`, whose slices are `records`, volume by volume.
#[must_use]
pub fn encode(group: GroupId, commit: &CommitEntry, records: &[SliceRecord]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&[0; 6]);
    out.extend_from_slice(&group.0);
    let mut bytes = Vec::new();
    put_commit(&mut bytes, commit);
    put_long(&mut out, &bytes);
    out.extend_from_slice(&(records.len() as u64).to_le_bytes());
    let len = out.len() as u32 + 4;
    out[12..16].copy_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
    for (record, (slot, slice)) in records.iter().zip(places(&commit.volumes)) {
        put_record(&mut out, record, group, commit.head.epoch, slot, slice);
    }
    out
}

impl Header {
    /// Parses the header at the start of `bytes`; gives it and its length.
    ///
    /// # Errors
    /// Where it is none, is damaged, or is of another version.
    pub fn decode(bytes: &[u8]) -> Result<(Self, usize), ImageError> {
        let fixed = bytes.first_chunk::<16>().ok_or(ImageError::Short)?;
        if fixed[..8] != MAGIC {
            return Err(ImageError::Magic);
        }
        let version = u16::from_le_bytes([fixed[8], fixed[9]]);
        if version != VERSION {
            return Err(ImageError::Version(version));
        }
        let len = u32::from_le_bytes([fixed[12], fixed[13], fixed[14], fixed[15]]) as usize;
        if !(20..=HEADER_BYTES_MAX).contains(&len) || bytes.len() < len {
            return Err(ImageError::Short);
        }
        let (summed, sum) = bytes[..len].split_at(len - 4);
        if crc32fast::hash(summed).to_le_bytes() != sum {
            return Err(ImageError::Crc);
        }
        if fixed[10..12] != [0; 2] {
            return Err(FieldError("reserved bytes").into());
        }
        let mut input = Input::new(&summed[16..]);
        let group = GroupId(input.array()?);
        let mut commit = Input::new(input.long()?);
        let entry = take_commit(&mut commit)?;
        commit.finish()?;
        let records = input.u64()?;
        input.finish()?;
        let slices: u64 = entry.volumes.iter().map(|volume| u64::from(slices_of(volume))).sum();
        if records != slices {
            return Err(FieldError("record count").into());
        }
        Ok((Self { group, commit: entry, records }, len))
    }

    /// Which record a slice has; `None` where the image has no such slice.
    fn place(&self, slot: VolumeSlot, slice: u32) -> Option<u64> {
        let mut first = 0;
        for volume in &self.commit.volumes {
            let slices = slices_of(volume);
            if volume.slot == slot {
                return (slice < slices).then(|| first + u64::from(slice));
            }
            first += u64::from(slices);
        }
        None
    }
}

impl ImageIndex {
    /// Opens the index of `checkpoint` of the group in `folder`; `None` where it is missing or damaged in both copies.
    ///
    /// # Errors
    /// Where the storage fails.
    pub fn open(
        storage: &dyn Storage,
        folder: &Path,
        group: GroupId,
        checkpoint: &Checkpoint,
    ) -> Result<Option<Self>, JournalError> {
        let path = checkpoint.path(folder);
        let file = match storage.open(&path) {
            Err(error) if crate::journal::is_no_file(&error) => return Ok(None),
            opened => opened.map_err(JournalError::io("open", &path))?,
        };
        for copy in 0..2 {
            let mut bytes = vec![0; (HEADER_BYTES_MAX as u64).min(checkpoint.index_len) as usize];
            let read = file.read_at(&mut bytes, copy * checkpoint.index_len);
            let read = read.map_err(JournalError::io("read", &path))?;
            let decoded = Header::decode(&bytes[..read]);
            if let Ok((header, len)) = decoded
                && header.group == group
                && header.commit.head.epoch == checkpoint.epoch
                && len as u64 + header.records * RECORD_BYTES as u64 == checkpoint.index_len
            {
                return Ok(Some(Self { header, header_len: len as u64, copy_len: checkpoint.index_len, file }));
            }
        }
        Ok(None)
    }

    /// The point.
    #[must_use]
    pub const fn commit(&self) -> &CommitEntry {
        &self.header.commit
    }

    /// The record of a slice; `None` where there is none, or both copies are damaged.
    ///
    /// # Errors
    /// Where the storage fails.
    pub fn record(&self, slot: VolumeSlot, slice: u32) -> io::Result<Option<SliceRecord>> {
        let Some(place) = self.header.place(slot, slice) else { return Ok(None) };
        let (group, epoch) = (self.header.group, self.header.commit.head.epoch);
        for copy in 0..2 {
            let mut bytes = [0; RECORD_BYTES];
            let at = copy * self.copy_len + self.header_len + place * RECORD_BYTES as u64;
            let read = self.file.read_at(&mut bytes, at)?;
            if read == RECORD_BYTES
                && let Ok(record) = take_record(&bytes, group, epoch, slot, slice)
            {
                return Ok(Some(record));
            }
        }
        Ok(None)
    }

    /// Every slice, with its record where that is not damaged.
    pub fn records(&self) -> impl Iterator<Item = io::Result<(VolumeSlot, u32, Option<SliceRecord>)>> + '_ {
        places(&self.header.commit.volumes).map(|(slot, slice)| Ok((slot, slice, self.record(slot, slice)?)))
    }
}

/// How many of the two copies in the index of `checkpoint` are what was written.
///
/// # Errors
/// Where the storage fails.
pub fn copies(storage: &dyn Storage, folder: &Path, checkpoint: &Checkpoint) -> Result<usize, JournalError> {
    let path = checkpoint.path(folder);
    let file = match storage.open(&path) {
        Err(error) if crate::journal::is_no_file(&error) => return Ok(0),
        opened => opened.map_err(JournalError::io("open", &path))?,
    };
    let mut whole = 0;
    for copy in 0..2 {
        let hash = hash_of(file.as_ref(), copy * checkpoint.index_len, checkpoint.index_len);
        whole += usize::from(hash.map_err(JournalError::io("read", &path))? == checkpoint.index_hash);
    }
    Ok(whole)
}

fn hash_of(file: &dyn StorageFile, offset: u64, len: u64) -> io::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; len.min(1 << 20) as usize];
    let mut done = 0;
    while done < len {
        let chunk = (len - done).min(buffer.len() as u64) as usize;
        let read = file.read_at(&mut buffer[..chunk], offset + done)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        done += read as u64;
    }
    Ok(*hasher.finalize().as_bytes())
}

fn put_record(
    out: &mut Vec<u8>,
    record: &SliceRecord,
    group: GroupId,
    checkpoint: Epoch,
    slot: VolumeSlot,
    slice: u32,
) {
    let at = out.len();
    let (kind, sealed) = match &record.content {
        SliceContent::Zero => (0, None),
        SliceContent::Pack { sealed, repacked } => (if *repacked { 1 } else { 2 }, Some(sealed)),
    };
    let epoch = sealed.map_or(Epoch(0), |sealed| match sealed.id {
        FileId::Slice(slice) => slice.epoch,
        FileId::Segment { .. } => unreachable!("a slice is in a pack of its own"),
    });
    out.extend_from_slice(&[kind, u8::from(record.unreadable), u8::from(record.lost), 0]);
    out.extend_from_slice(&epoch.0.to_le_bytes());
    out.extend_from_slice(&sealed.map_or(0, |sealed| sealed.len).to_le_bytes());
    out.extend_from_slice(&sealed.map_or(0, |sealed| sealed.frames_end).to_le_bytes());
    out.extend_from_slice(&sealed.map_or([0; 32], |sealed| sealed.footer_hash));
    out.extend_from_slice(&record.needed_bytes.to_le_bytes());
    let sum = record_crc(&out[at..], group, checkpoint, slot, slice);
    out.extend_from_slice(&sum.to_le_bytes());
}

/// Parses a record, which has to be that of this slice of this checkpoint.
///
/// # Errors
/// Where it is another's, is damaged or a field is impossible.
pub fn take_record(
    bytes: &[u8; RECORD_BYTES],
    group: GroupId,
    checkpoint: Epoch,
    slot: VolumeSlot,
    slice: u32,
) -> Result<SliceRecord, ImageError> {
    let (summed, sum) = bytes.split_at(RECORD_BYTES - 4);
    if record_crc(summed, group, checkpoint, slot, slice).to_le_bytes() != sum {
        return Err(ImageError::Crc);
    }
    let mut input = Input::new(summed);
    let (kind, unreadable, lost) = (input.u8()?, input.flag()?, input.flag()?);
    if input.u8()? != 0 {
        return Err(FieldError("reserved byte").into());
    }
    let epoch = Epoch(input.u64()?);
    let (len, frames_end, footer_hash) = (input.u64()?, input.u64()?, input.array()?);
    let needed_bytes = input.u64()?;
    let id = FileId::Slice(SliceId { slot, slice, epoch });
    let sealed = Sealed { id, len, frames_end, footer_hash, points: None };
    let content = match kind {
        0 if len == 0 => SliceContent::Zero,
        1 | 2 => SliceContent::Pack { sealed, repacked: kind == 1 },
        _ => return Err(FieldError("slice kind").into()),
    };
    Ok(SliceRecord { content, unreadable, lost, needed_bytes })
}

/// Bound to where the record belongs.
fn record_crc(bytes: &[u8], group: GroupId, checkpoint: Epoch, slot: VolumeSlot, slice: u32) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&group.0);
    hasher.update(&checkpoint.0.to_le_bytes());
    hasher.update(&slot.0.to_le_bytes());
    hasher.update(&slice.to_le_bytes());
    hasher.update(bytes);
    hasher.finalize()
}
