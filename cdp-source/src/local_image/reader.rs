//! An image, open to be read: where the content of a block is, and the frames.
//!
//! Reads what it is asked for: of the index one directory and one slice at a time. Every byte that it gives is proved, by the chain from the
//! footer down to a frame's own place and seal; damage is told, never passed on.

use super::format::{
    ENTRY_BYTES, Footer, FormatError, HEADER_BYTES, Header, Place, Run, SLICE_BLOCKS, SliceEntry, TRAILER_BYTES,
    decode_slice, slice_hash, slices_of,
};
use super::{ImageError, failed};
use cdp_protocol::frame::{self, FrameError, Kind};
use cdp_protocol::holding::Held;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{Block, Extent, GroupId, VolumeSlot};
use cdp_seams::storage::{Storage, StorageFile};
use std::path::{Path, PathBuf};

/// Bytes that are read to have a frame's header: of one with content.
const HEAD_BYTES: usize = 1024;

/// An image.
pub struct ImageFile {
    file: Box<dyn StorageFile>,
    path: PathBuf,
    footer: Footer,
    directory: Option<(VolumeSlot, Vec<SliceEntry>)>,
    slice: Option<(VolumeSlot, u32, Vec<Run>)>,
    read_bytes: u64,
}

/// The group that a file says it is an image of; nothing is proved of it.
///
/// # Errors
/// Where it cannot be read, or is no image.
pub fn group_of(storage: &dyn Storage, path: &Path) -> Result<GroupId, ImageError> {
    let file = storage.open(path).map_err(failed("open", path))?;
    Ok(header_of(&*file, path)?.group)
}

fn header_of(file: &dyn StorageFile, path: &Path) -> Result<Header, ImageError> {
    let mut bytes = [0; HEADER_BYTES];
    let read = file.read_at(&mut bytes, 0).map_err(failed("read", path))?;
    Header::decode(&bytes[..read]).map_err(|reason| ImageError::Format { path: path.to_owned(), reason })
}

impl ImageFile {
    /// Opens an image of the group.
    ///
    /// # Errors
    /// Where it cannot be read, is none, is of another group or key, or its footer is damaged.
    pub fn open(storage: &dyn Storage, path: &Path, group: GroupId, key: &DataKey) -> Result<Self, ImageError> {
        let file = storage.open(path).map_err(failed("open", path))?;
        let header = header_of(&*file, path)?;
        if header.group != group {
            return Err(ImageError::OtherGroup { path: path.to_owned(), found: header.group, wanted: group });
        }
        let refused = |reason| ImageError::Format { path: path.to_owned(), reason };
        let len = file.len().map_err(failed("read", path))?;
        let mut trailer = [0; TRAILER_BYTES];
        let trailer_at = len.checked_sub(TRAILER_BYTES as u64).ok_or_else(|| refused(FormatError::Short))?;
        read_all_at(&*file, path, &mut trailer, trailer_at)?;
        let footer_len = Footer::len_by(&trailer).map_err(refused)?;
        let footer_at = trailer_at.checked_sub(footer_len as u64).filter(|at| *at >= HEADER_BYTES as u64);
        let mut footer = vec![0; footer_len + TRAILER_BYTES];
        read_all_at(&*file, path, &mut footer, footer_at.ok_or_else(|| refused(FormatError::Short))?)?;
        let footer = Footer::decode(&footer, key).map_err(refused)?;
        if footer.group != header.group || footer.attempt != header.attempt {
            return Err(refused(FormatError::Field("the header")));
        }
        Ok(Self::of(file, path, footer))
    }

    /// What is already open, with a footer that is not in it yet.
    #[must_use]
    pub fn of(file: Box<dyn StorageFile>, path: &Path, footer: Footer) -> Self {
        Self { file, path: path.to_owned(), footer, directory: None, slice: None, read_bytes: 0 }
    }

    /// What it is of.
    #[must_use]
    pub const fn footer(&self) -> &Footer {
        &self.footer
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    ///
    /// # Errors
    /// Where that cannot be told.
    pub fn len_bytes(&self) -> Result<u64, ImageError> {
        self.file.len().map_err(failed("read", &self.path))
    }

    /// Bytes that were read so far.
    #[must_use]
    pub const fn read_bytes(&self) -> u64 {
        self.read_bytes
    }

    /// Where the blocks of an extent have their content, in order and without a gap. Blocks beyond the volume's end are zeros.
    ///
    /// # Errors
    /// Where the index cannot be read, or is damaged.
    pub fn places(&mut self, slot: VolumeSlot, extent: Extent) -> Result<Vec<(Extent, Place)>, ImageError> {
        let mut places = Vec::new();
        let (mut next, end) = (u64::from(extent.start.0), extent.end());
        while next < end {
            let slice = (next / u64::from(SLICE_BLOCKS)) as u32;
            let first = u64::from(slice) * u64::from(SLICE_BLOCKS);
            let slice_end = (first + u64::from(SLICE_BLOCKS)).min(end);
            let mut give = |from: u64, to: u64, place: Place| {
                if from < to {
                    places.push((Extent { start: Block(from as u32), count: (to - from) as u32 }, place));
                }
            };
            for run in self.runs(slot, slice)? {
                let (start, run_end) = (first + u64::from(run.start), first + u64::from(run.start + run.count));
                let (from, to) = (start.max(next), run_end.min(slice_end));
                if from < to {
                    give(next, from, Place::Zeros);
                    give(from, to, run.place);
                    next = to;
                }
            }
            give(next, slice_end, Place::Zeros);
            next = slice_end;
        }
        Ok(places)
    }

    fn runs(&mut self, slot: VolumeSlot, slice: u32) -> Result<&[Run], ImageError> {
        if self.slice.as_ref().is_none_or(|(of, number, _)| (*of, *number) != (slot, slice)) {
            let runs = self.read_slice(slot, slice)?;
            self.slice = Some((slot, slice, runs));
        }
        Ok(&self.slice.as_ref().expect("just read").2)
    }

    fn read_slice(&mut self, slot: VolumeSlot, slice: u32) -> Result<Vec<Run>, ImageError> {
        let entry = self.directory(slot)?.get(slice as usize).copied().unwrap_or_default();
        if entry == SliceEntry::default() {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; entry.len as usize];
        self.read(&mut bytes, entry.at)?;
        let what = || format!("the index of slice {slice} of slot {slot}");
        if slice_hash(slot, slice, &bytes) != entry.hash {
            return Err(self.damaged(what()));
        }
        decode_slice(&bytes).map_err(|error| self.damaged(format!("{}: {error}", what())))
    }

    fn directory(&mut self, slot: VolumeSlot) -> Result<&[SliceEntry], ImageError> {
        if self.directory.as_ref().is_none_or(|(of, _)| *of != slot) {
            let entries = self.read_directory(slot)?;
            self.directory = Some((slot, entries));
        }
        Ok(&self.directory.as_ref().expect("just read").1)
    }

    fn read_directory(&mut self, slot: VolumeSlot) -> Result<Vec<SliceEntry>, ImageError> {
        let volume = self.footer.volumes.iter().find(|entry| entry.volume.slot == slot).cloned();
        let volume = volume.ok_or_else(|| self.damaged(format!("it has no slot {slot}")))?;
        let mut bytes = vec![0; slices_of(volume.volume.size_bytes) as usize * ENTRY_BYTES];
        self.read(&mut bytes, volume.directory_at)?;
        let what = || format!("the directory of volume {}", volume.volume.name);
        if *blake3::hash(&bytes).as_bytes() != volume.directory_hash {
            return Err(self.damaged(what()));
        }
        SliceEntry::decode_all(&bytes).map_err(|error| self.damaged(format!("{}: {error}", what())))
    }

    /// The frame of a volume's content that begins at `at`, whole and with its checksums in order; its seal is not opened.
    ///
    /// # Errors
    /// Where it cannot be read, or is not that.
    pub fn frame(&mut self, slot: VolumeSlot, at: u64) -> Result<Vec<u8>, ImageError> {
        let (header, mut bytes) = self.head(slot, at)?;
        let have = bytes.len().min(header.frame_len());
        bytes.resize(header.frame_len(), 0);
        self.read(&mut bytes[have..], at + have as u64)?;
        match frame::decode(&self.footer.group, &bytes) {
            Ok(_) => Ok(bytes),
            Err(error) => Err(self.damaged(format!("the frame at {at}: {error}"))),
        }
    }

    /// What that frame tells of the digests of its blocks, its content unread.
    ///
    /// # Errors
    /// Where it cannot be read, or is not that.
    pub fn held(&mut self, slot: VolumeSlot, at: u64) -> Result<Held, ImageError> {
        let (header, bytes) = self.head(slot, at)?;
        let digests_at = header.header_len() + (header.payload_len - header.digests_len) as usize;
        let mut digests = vec![0; header.digests_len as usize];
        self.read(&mut digests, at + digests_at as u64)?;
        Ok(Held::Frame { header: bytes[..header.header_len()].to_vec(), digests })
    }

    /// The header of the frame of content at `at`, and what was read for it.
    fn head(&mut self, slot: VolumeSlot, at: u64) -> Result<(frame::Header, Vec<u8>), ImageError> {
        let mut bytes = vec![0; HEAD_BYTES];
        let read = self.file.read_at(&mut bytes, at).map_err(failed("read", &self.path))?;
        self.read_bytes += read as u64;
        bytes.truncate(read);
        let header = frame::decode_header(&self.footer.group, &bytes);
        let header = header.map_err(|error: FrameError| self.damaged(format!("the frame at {at}: {error}")))?;
        let is_it = header.kind == Kind::Extents
            && header.encoding.has_content()
            && (header.sequence.0, header.volume, header.attempt) == (at, slot, self.footer.attempt);
        if is_it { Ok((header, bytes)) } else { Err(self.damaged(format!("the frame at {at} belongs elsewhere"))) }
    }

    fn read(&mut self, buffer: &mut [u8], at: u64) -> Result<(), ImageError> {
        self.read_bytes += buffer.len() as u64;
        read_all_at(&*self.file, &self.path, buffer, at)
    }

    fn damaged(&self, what: String) -> ImageError {
        ImageError::Damaged { path: self.path.clone(), what }
    }
}

fn read_all_at(file: &dyn StorageFile, path: &Path, buffer: &mut [u8], at: u64) -> Result<(), ImageError> {
    let read = file.read_at(buffer, at).map_err(failed("read", path))?;
    if read == buffer.len() {
        return Ok(());
    }
    Err(ImageError::Format { path: path.to_owned(), reason: FormatError::Short })
}
