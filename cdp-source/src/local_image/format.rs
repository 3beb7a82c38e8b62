//! The bytes of a local image around its frames (`docs/format/local-image.md`): header, slices, directories, footer.
//!
//! The footer is written last, and only once everything before it was read again and found whole: a file without one is no image. It
//! is vouched for by the group's key, and vouches for the directories; these for the slices; a slice names where the newest frame of
//! each block begins, and a frame's sequence is that place: so nothing can be put in another's place. Only bytes here, no files.

use cdp_protocol::limits::{NAME_BYTES_MAX, VOLUMES_MAX, is_name};
use cdp_protocol::record::Volume;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{
    AttemptId, Class, Epoch, Generation, GroupId, KeyId, Timestamp, VOLUME_BYTES_MAX, VolumeSlot, blocks_in,
};

/// First bytes of an image, and its last.
pub const MAGIC: [u8; 8] = *b"CDPLOCAL";
/// The layout described here.
pub const VERSION: u16 = 1;
/// Bytes of the header; the frames follow.
pub const HEADER_BYTES: usize = 64;
/// Bytes behind the footer: its length, its CRC-32 and the magic.
pub const TRAILER_BYTES: usize = 16;
/// Bytes of a footer at most.
pub const FOOTER_BYTES_MAX: usize = 64 * 1024;
/// Blocks of a slice: 64 MiB.
pub const SLICE_BLOCKS: u32 = 16 * 1024;
/// Bytes of a directory's entry for a slice.
pub const ENTRY_BYTES: usize = 44;
/// Bytes of a run of a slice.
const RUN_BYTES: usize = 12;
/// Bytes of a slice at most: every block a run of its own.
pub const SLICE_BYTES_MAX: usize = 4 + SLICE_BLOCKS as usize * RUN_BYTES;
const FOOTER_MAGIC: [u8; 8] = *b"CDPLFOOT";
const MAC_BYTES: usize = 32;
/// In the place of a frame: the device could not read the blocks.
const UNREADABLE: u64 = 1;

/// Why bytes are none of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not the first bytes of an image.
    #[error("it is no local image")]
    Magic,
    /// A layout this program does not know.
    #[error("it is of version {0}, this program reads {VERSION}: a newer program made it")]
    Version(u16),
    /// The bytes end before it does.
    #[error("it is cut short")]
    Short,
    /// A checksum is wrong.
    #[error("a checksum of {0} does not hold")]
    Sum(&'static str),
    /// The footer was not made by a holder of this key.
    #[error("it was not sealed under this key of the group")]
    Key,
    /// The checksum holds, but the fields contradict each other or pass their bounds.
    #[error("{0} is not valid")]
    Field(&'static str),
}

/// The first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The group.
    pub group: GroupId,
    /// The one attempt that all frames are sealed under.
    pub attempt: AttemptId,
    /// The generation they name.
    pub generation: Generation,
}

/// What the image is of, and where everything in it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// The group.
    pub group: GroupId,
    /// The attempt of all frames.
    pub attempt: AttemptId,
    /// Which of the group's keys it is sealed under.
    pub key: KeyId,
    /// The point that it holds.
    pub epoch: Epoch,
    /// The instant of that point.
    pub cut_time: Timestamp,
    /// When the image was finished.
    pub made: Timestamp,
    /// The point's class.
    pub class: Class,
    /// The point's label.
    pub label: Option<String>,
    /// The volumes, by slot.
    pub volumes: Vec<ImageVolume>,
}

/// A volume of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageVolume {
    /// Slot, size and name.
    pub volume: Volume,
    /// Where its directory begins.
    pub directory_at: u64,
    /// BLAKE3 of its directory.
    pub directory_hash: [u8; 32],
    /// Blocks with content.
    pub content_blocks: u64,
    /// Blocks that the device could not read.
    pub unreadable_blocks: u64,
    /// BLAKE3 of the volume's raw image, unreadable blocks as zeros.
    pub image_hash: [u8; 32],
}

/// A slice of a volume in its directory; all zeros where it holds none but zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SliceEntry {
    /// Where it begins.
    pub at: u64,
    /// Its bytes.
    pub len: u32,
    /// Its hash (`slice_hash`).
    pub hash: [u8; 32],
}

/// Where blocks have their content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: they are zeros.
    Zeros,
    /// Nowhere: the device could not read them.
    Unreadable,
    /// In the frame that begins there.
    Frame(u64),
}

/// Blocks of a slice one after the other with one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first of them, counted from the slice's.
    pub start: u32,
    /// How many.
    pub count: u32,
    /// Where their content is; never `Zeros`.
    pub place: Place,
}

impl Place {
    /// As a number: 0 for zeros, 1 for unreadable, else where the frame begins.
    #[must_use]
    pub const fn number(self) -> u64 {
        match self {
            Self::Zeros => 0,
            Self::Unreadable => UNREADABLE,
            Self::Frame(at) => at,
        }
    }

    /// Of a number; `None` for one that no frame can begin at.
    #[must_use]
    pub const fn of(number: u64) -> Option<Self> {
        match number {
            0 => Some(Self::Zeros),
            UNREADABLE => Some(Self::Unreadable),
            at if at >= HEADER_BYTES as u64 => Some(Self::Frame(at)),
            _ => None,
        }
    }
}

/// Slices of a volume.
#[must_use]
pub const fn slices_of(size_bytes: u64) -> u32 {
    blocks_in(size_bytes).div_ceil(SLICE_BLOCKS as u64) as u32
}

impl Header {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 6]);
        out.extend_from_slice(&self.group.0);
        out.extend_from_slice(&self.attempt.0);
        out.extend_from_slice(&self.generation.0.to_le_bytes());
        out.resize(HEADER_BYTES - 4, 0);
        out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
        out
    }

    /// Reads it at the beginning of `bytes`.
    ///
    /// # Errors
    /// Where there is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() < 10 {
            return Err(FormatError::Short);
        }
        if bytes[..8] != MAGIC {
            return Err(FormatError::Magic);
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        let header = bytes.first_chunk::<HEADER_BYTES>().ok_or(FormatError::Short)?;
        let (summed, sum) = header.split_at(HEADER_BYTES - 4);
        if sum != crc32fast::hash(summed).to_le_bytes() {
            return Err(FormatError::Sum("the header"));
        }
        let mut input = Input(&summed[10..]);
        let zeros: [u8; 6] = input.take()?;
        let decoded = Self {
            group: GroupId(input.take()?),
            attempt: AttemptId(input.take()?),
            generation: Generation(input.u64()?),
        };
        let is_plain = zeros == [0; 6] && input.0.iter().all(|byte| *byte == 0);
        is_plain.then_some(decoded).ok_or(FormatError::Field("the header"))
    }
}

impl Footer {
    /// Its bytes, vouched for by the key, and the trailer.
    #[must_use]
    pub fn encode(&self, key: &DataKey) -> Vec<u8> {
        let mut out = FOOTER_MAGIC.to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[self.class as u8, 0]);
        out.extend_from_slice(&self.group.0);
        out.extend_from_slice(&self.attempt.0);
        out.extend_from_slice(&self.key.0);
        out.extend_from_slice(&self.epoch.0.to_le_bytes());
        out.extend_from_slice(&self.cut_time.0.to_le_bytes());
        out.extend_from_slice(&self.made.0.to_le_bytes());
        put_text(&mut out, self.label.as_deref().unwrap_or_default());
        out.extend_from_slice(&(self.volumes.len() as u16).to_le_bytes());
        for entry in &self.volumes {
            entry.encode(&mut out);
        }
        out.extend_from_slice(&key.record_mac(&out));
        let (len, sum) = (out.len() as u32, crc32fast::hash(&out));
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&sum.to_le_bytes());
        out.extend_from_slice(&MAGIC);
        out
    }

    /// Bytes of the footer before a trailer.
    ///
    /// # Errors
    /// Where that is no trailer.
    pub fn len_by(trailer: &[u8; TRAILER_BYTES]) -> Result<usize, FormatError> {
        if trailer[8..] != MAGIC {
            return Err(FormatError::Short);
        }
        let len = u32::from_le_bytes(trailer[..4].try_into().expect("4 bytes")) as usize;
        (MAC_BYTES..=FOOTER_BYTES_MAX).contains(&len).then_some(len).ok_or(FormatError::Field("the footer's length"))
    }

    /// Reads a footer and the trailer behind it.
    ///
    /// # Errors
    /// Where it is damaged, or of another key.
    pub fn decode(bytes: &[u8], key: &DataKey) -> Result<Self, FormatError> {
        let (footer, trailer) = bytes.split_last_chunk::<TRAILER_BYTES>().ok_or(FormatError::Short)?;
        if Self::len_by(trailer)? != footer.len() {
            return Err(FormatError::Field("the footer's length"));
        }
        if trailer[4..8] != crc32fast::hash(footer).to_le_bytes() {
            return Err(FormatError::Sum("the footer"));
        }
        let (told, mac) = footer.split_at(footer.len() - MAC_BYTES);
        if mac != key.record_mac(told) {
            return Err(FormatError::Key);
        }
        Self::parse(told)
    }

    fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut input = Input(bytes);
        if input.take()? != FOOTER_MAGIC || input.u16()? != VERSION {
            return Err(FormatError::Field("the footer"));
        }
        let class = match input.take()? {
            [0, 0] => Class::Crash,
            [1, 0] => Class::Filesystem,
            [2, 0] => Class::Application,
            _ => return Err(FormatError::Field("the class")),
        };
        let (group, attempt, key) = (GroupId(input.take()?), AttemptId(input.take()?), KeyId(input.take()?));
        let (epoch, cut_time) = (Epoch(input.u64()?), Timestamp(input.u64()? as i64));
        let made = Timestamp(input.u64()? as i64);
        let label = Some(input.text()?).filter(|label| !label.is_empty());
        let count = usize::from(input.u16()?);
        if count > VOLUMES_MAX {
            return Err(FormatError::Field("the count of volumes"));
        }
        let volumes = (0..count).map(|_| ImageVolume::decode(&mut input)).collect::<Result<Vec<_>, _>>()?;
        let in_order = volumes.windows(2).all(|pair| pair[0].volume.slot < pair[1].volume.slot);
        if !in_order || !input.0.is_empty() {
            return Err(FormatError::Field("the footer"));
        }
        Ok(Self { group, attempt, key, epoch, cut_time, made, class, label, volumes })
    }
}

impl ImageVolume {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.volume.slot.0.to_le_bytes());
        out.extend_from_slice(&self.volume.size_bytes.to_le_bytes());
        put_text(out, &self.volume.name);
        out.extend_from_slice(&self.directory_at.to_le_bytes());
        out.extend_from_slice(&self.directory_hash);
        out.extend_from_slice(&self.content_blocks.to_le_bytes());
        out.extend_from_slice(&self.unreadable_blocks.to_le_bytes());
        out.extend_from_slice(&self.image_hash);
    }

    fn decode(input: &mut Input<'_>) -> Result<Self, FormatError> {
        let volume = Volume { slot: VolumeSlot(input.u16()?), size_bytes: input.u64()?, name: input.text()? };
        if volume.size_bytes > VOLUME_BYTES_MAX || !is_name(&volume.name) {
            return Err(FormatError::Field("a volume"));
        }
        let directory_at = input.u64()?;
        if directory_at < HEADER_BYTES as u64 {
            return Err(FormatError::Field("a directory's place"));
        }
        Ok(Self {
            volume,
            directory_at,
            directory_hash: input.take()?,
            content_blocks: input.u64()?,
            unreadable_blocks: input.u64()?,
            image_hash: input.take()?,
        })
    }
}

impl SliceEntry {
    /// The bytes of a directory.
    #[must_use]
    pub fn encode_all(entries: &[Self]) -> Vec<u8> {
        let mut out = Vec::with_capacity(entries.len() * ENTRY_BYTES);
        for entry in entries {
            out.extend_from_slice(&entry.at.to_le_bytes());
            out.extend_from_slice(&entry.len.to_le_bytes());
            out.extend_from_slice(&entry.hash);
        }
        out
    }

    /// Reads a directory of as many slices as there are bytes for.
    ///
    /// # Errors
    /// Where an entry is none.
    pub fn decode_all(bytes: &[u8]) -> Result<Vec<Self>, FormatError> {
        if !bytes.len().is_multiple_of(ENTRY_BYTES) {
            return Err(FormatError::Short);
        }
        let mut input = Input(bytes);
        let mut entries = Vec::with_capacity(bytes.len() / ENTRY_BYTES);
        while !input.0.is_empty() {
            let entry = Self { at: input.u64()?, len: input.u32()?, hash: input.take()? };
            let is_one = entry.at >= HEADER_BYTES as u64 && (4..=SLICE_BYTES_MAX).contains(&(entry.len as usize));
            if !is_one && entry != Self::default() {
                return Err(FormatError::Field("a slice's place"));
            }
            entries.push(entry);
        }
        Ok(entries)
    }
}

/// The hash of a slice's bytes, bound to where they belong.
#[must_use]
pub fn slice_hash(slot: VolumeSlot, slice: u32, bytes: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&slot.0.to_le_bytes());
    hasher.update(&slice.to_le_bytes());
    hasher.update(bytes);
    *hasher.finalize().as_bytes()
}

/// The bytes of a slice.
#[must_use]
pub fn encode_slice(runs: &[Run]) -> Vec<u8> {
    let mut out = (runs.len() as u32).to_le_bytes().to_vec();
    for run in runs {
        out.extend_from_slice(&(run.start as u16).to_le_bytes());
        out.extend_from_slice(&(run.count as u16).to_le_bytes());
        out.extend_from_slice(&run.place.number().to_le_bytes());
    }
    out
}

/// Reads a slice: its runs, in order and disjoint.
///
/// # Errors
/// Where it is none.
pub fn decode_slice(bytes: &[u8]) -> Result<Vec<Run>, FormatError> {
    let mut input = Input(bytes);
    let count = input.u32()? as usize;
    if count > SLICE_BLOCKS as usize || input.0.len() != count * RUN_BYTES {
        return Err(FormatError::Field("a slice's length"));
    }
    let (mut runs, mut end) = (Vec::with_capacity(count), 0);
    for _ in 0..count {
        let (start, count) = (u32::from(input.u16()?), u32::from(input.u16()?));
        let place = Place::of(input.u64()?).filter(|place| *place != Place::Zeros);
        let place = place.ok_or(FormatError::Field("a frame's place"))?;
        if start < end || count == 0 || start + count > SLICE_BLOCKS {
            return Err(FormatError::Field("a run"));
        }
        end = start + count;
        runs.push(Run { start, count, place });
    }
    Ok(runs)
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.push(text.len() as u8);
    out.extend_from_slice(text.as_bytes());
}

/// What is left to be read.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(FormatError::Short)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u16(&mut self) -> Result<u16, FormatError> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, FormatError> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, FormatError> {
        self.take().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Result<String, FormatError> {
        let [len] = self.take()?;
        let (text, rest) = self.0.split_at_checked(len.into()).ok_or(FormatError::Short)?;
        self.0 = rest;
        let text = std::str::from_utf8(text).ok().filter(|text| text.len() <= NAME_BYTES_MAX);
        text.map(str::to_owned).ok_or(FormatError::Field("a name"))
    }
}

#[cfg(test)]
mod tests;
