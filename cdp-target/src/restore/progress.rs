//! The record of an export that is under way: which image it is, and what was written of it, by hash. See docs/format/progress.md.
//!
//! Invariant: a help, not a proof. It is appended to without a sync; what is gone on with is read again and held against it, and what
//! does not fit, or has no line, is written anew. A line that is torn, damaged or of another record ends it.

use super::tree_hash::Value;
use cdp_protocol::units::{Epoch, FrameHash, GroupId, VolumeSlot};
use cdp_seams::storage::{Storage, StorageFile, read_all};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8; 8] = b"CDPEXPRT";
const VERSION: u16 = 1;
/// Bytes of the header.
const HEADER_BYTES: usize = 96;
/// Bytes of a line.
const LINE_BYTES: usize = 44;
/// A record is not read beyond this: a line for each stride of the largest volume.
const BYTES_MAX: u64 = 128 << 20;

/// How an image is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Form {
    /// Byte by byte.
    Raw = 0,
    /// As qcow2, not compressed.
    Qcow2 = 1,
}

/// Which image it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageId {
    /// How it is written.
    pub form: Form,
    /// The group.
    pub group: GroupId,
    /// The point.
    pub epoch: Epoch,
    /// The hash of the point's commit.
    pub commit: FrameHash,
    /// The volume.
    pub slot: VolumeSlot,
    /// The volume's size.
    pub size_bytes: u64,
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let form = if self.form == Form::Raw { "raw" } else { "qcow2" };
        let Self { group, epoch, slot, size_bytes, .. } = self;
        write!(f, "point {epoch}, volume {slot} ({size_bytes} bytes) of group {group}, as {form}")
    }
}

/// A stride that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its hash, as a subtree.
    pub value: Value,
    /// Bytes of it that were not zeros by the point's index.
    pub content_bytes: u64,
}

impl ImageId {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[self.form as u8, 0]);
        bytes.extend_from_slice(&self.slot.0.to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&self.group.0);
        bytes.extend_from_slice(&self.epoch.0.to_le_bytes());
        bytes.extend_from_slice(&self.size_bytes.to_le_bytes());
        bytes.extend_from_slice(&self.commit.0);
        bytes.resize(HEADER_BYTES - 4, 0);
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; HEADER_BYTES] = bytes.first_chunk()?;
        let word = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("within the header"));
        let form = if bytes[10] == Form::Raw as u8 { Form::Raw } else { Form::Qcow2 };
        let id = Self {
            form,
            slot: VolumeSlot(u16::from_le_bytes([bytes[12], bytes[13]])),
            group: GroupId(*bytes[16..].first_chunk().expect("within the header")),
            epoch: Epoch(word(32)),
            size_bytes: word(40),
            commit: FrameHash(*bytes[48..].first_chunk().expect("within the header")),
        };
        // Magic, version, form, padding and sum: there is one way to write it.
        (id.encode() == bytes).then_some(id)
    }
}

/// What line `at` of the record with such a header is.
fn encode_line(header_crc: u32, at: u64, line: Line) -> [u8; LINE_BYTES] {
    let mut bytes = [0; LINE_BYTES];
    bytes[..32].copy_from_slice(&line.value);
    bytes[32..40].copy_from_slice(&line.content_bytes.to_le_bytes());
    // The sum is bound to the record and to the line's place in it.
    let mut sum = crc32fast::Hasher::new_with_initial(header_crc);
    sum.update(&at.to_le_bytes());
    sum.update(&bytes[..40]);
    bytes[40..].copy_from_slice(&sum.finalize().to_le_bytes());
    bytes
}

fn decode_line(header_crc: u32, at: u64, bytes: &[u8]) -> Option<Line> {
    let content_bytes = u64::from_le_bytes(*bytes.get(32..)?.first_chunk()?);
    let line = Line { value: *bytes.first_chunk()?, content_bytes };
    (encode_line(header_crc, at, line) == bytes).then_some(line)
}

/// Decodes a record: which image, and its lines up to the first that is none.
#[must_use]
pub fn decode(bytes: &[u8]) -> Option<(ImageId, Vec<Line>)> {
    let id = ImageId::decode(bytes)?;
    let crc = header_crc(&bytes[..HEADER_BYTES]);
    let lines = bytes[HEADER_BYTES..].chunks_exact(LINE_BYTES);
    let lines = lines.enumerate().map_while(|(at, line)| decode_line(crc, at as u64, line));
    Some((id, lines.collect()))
}

/// Encodes a record whole.
#[must_use]
pub fn encode(id: &ImageId, lines: &[Line]) -> Vec<u8> {
    let mut bytes = id.encode();
    let crc = header_crc(&bytes);
    for (at, line) in lines.iter().enumerate() {
        bytes.extend_from_slice(&encode_line(crc, at as u64, *line));
    }
    bytes
}

/// The header's own sum: that of the header with its sum behind it would be the same for all.
fn header_crc(header: &[u8]) -> u32 {
    u32::from_le_bytes(*header[HEADER_BYTES - 4..].first_chunk().expect("within the header"))
}

/// Reads the record at `path`; `None` where there is none that can be used.
#[must_use]
pub fn read(storage: &dyn Storage, path: &Path) -> Option<(ImageId, Vec<Line>)> {
    decode(&read_all(storage, path, BYTES_MAX).ok()?)
}

/// A record that is written, and removed with this unless it is kept.
pub struct Progress {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    file: Box<dyn StorageFile>,
    crc: u32,
    lines: u64,
    is_over: bool,
    is_kept: bool,
}

impl Progress {
    /// Begins a record, with the lines that were proved, in the place of an older one. A crash at any step leaves one that ends early,
    /// or none.
    ///
    /// # Errors
    /// As the file system says.
    pub fn begin(storage: &Arc<dyn Storage>, path: &Path, id: &ImageId, proved: &[Line]) -> io::Result<Self> {
        match storage.remove(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = storage.create_new(path)?;
        let bytes = encode(id, proved);
        file.write_at(&bytes, 0)?;
        let crc = header_crc(&bytes[..HEADER_BYTES]);
        let (storage, path, lines) = (Arc::clone(storage), path.to_owned(), proved.len() as u64);
        Ok(Self { storage, path, file, crc, lines, is_over: false, is_kept: false })
    }

    /// Adds a stride that was handed to the output; where that fails, the record ends here.
    pub fn add(&mut self, line: Line) {
        if self.is_over {
            return;
        }
        let bytes = encode_line(self.crc, self.lines, line);
        match self.file.write_at(&bytes, HEADER_BYTES as u64 + self.lines * LINE_BYTES as u64) {
            Ok(()) => self.lines += 1,
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "the record of an export ends early");
                self.is_over = true;
            }
        }
    }

    /// Whether there is anything to go on from.
    #[must_use]
    pub const fn is_worth_keeping(&self) -> bool {
        self.lines > 0
    }

    /// Leaves the record when it is dropped.
    pub const fn keep(&mut self) {
        self.is_kept = true;
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if !self.is_kept
            && let Err(error) = self.storage.remove(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the record of an export is left behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Form, HEADER_BYTES, ImageId, LINE_BYTES, Line, Progress, decode, encode, read};
    use cdp_protocol::units::{Epoch, FrameHash, GroupId, VolumeSlot};
    use cdp_seams::storage::Storage;
    use cdp_seams::storage::sim::SimStorage;
    use std::path::Path;
    use std::sync::Arc;

    fn id() -> ImageId {
        ImageId {
            form: Form::Qcow2,
            group: GroupId([7; 16]),
            epoch: Epoch(12),
            commit: FrameHash([9; 32]),
            slot: VolumeSlot(3),
            size_bytes: 1 << 40,
        }
    }

    fn lines() -> Vec<Line> {
        (1..=5).map(|at| Line { value: [at; 32], content_bytes: u64::from(at) << 12 }).collect()
    }

    #[test]
    fn the_format_is_what_it_was() {
        let frozen = include_bytes!("../../../tests/testdata/progress/1/qcow2.record");
        assert_eq!(encode(&id(), &lines()), frozen);
        assert_eq!(decode(frozen), Some((id(), lines())));
    }

    #[test]
    fn the_lines_before_what_is_damaged_or_torn_are_read() {
        let bytes = encode(&id(), &lines());
        assert_eq!(decode(&bytes), Some((id(), lines())));
        for cut in 0..bytes.len() {
            let whole = cut.checked_sub(HEADER_BYTES).map(|rest| rest / LINE_BYTES);
            assert_eq!(decode(&bytes[..cut]).map(|(_, lines)| lines.len()), whole, "cut at {cut}");
        }
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            let before = at.checked_sub(HEADER_BYTES).map(|rest| rest / LINE_BYTES);
            assert_eq!(decode(&flipped).map(|(_, lines)| lines), before.map(|count| lines()[..count].to_vec()), "{at}");
        }
    }

    #[test]
    fn a_line_counts_only_in_its_place_and_its_record() {
        let bytes = encode(&id(), &lines());
        let mut moved = bytes.clone();
        moved.copy_within(HEADER_BYTES..HEADER_BYTES + LINE_BYTES, HEADER_BYTES + LINE_BYTES);
        assert_eq!(decode(&moved).map(|(_, lines)| lines.len()), Some(1));
        let mut other = encode(&ImageId { epoch: Epoch(13), ..id() }, &[]);
        other.extend_from_slice(&bytes[HEADER_BYTES..]);
        assert_eq!(decode(&other).map(|(_, lines)| lines.len()), Some(0));
    }

    #[test]
    fn a_record_goes_with_its_export_unless_it_is_kept() {
        let storage: Arc<dyn Storage> = Arc::new(SimStorage::new(1));
        let path = Path::new("/record");
        let mut progress = Progress::begin(&storage, path, &id(), &lines()[..2]).expect("begun");
        progress.add(lines()[2]);
        assert_eq!(read(storage.as_ref(), path), Some((id(), lines()[..3].to_vec())));
        progress.keep();
        drop(progress);
        assert!(read(storage.as_ref(), path).is_some());
        drop(Progress::begin(&storage, path, &id(), &[]).expect("begun"));
        assert_eq!(read(storage.as_ref(), path), None);
    }
}
