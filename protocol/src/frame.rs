//! The frame: one entry of a group's history, the same bytes on the wire, in the spool and in the journal.
//!
//! Owns the byte layout (`docs/format/frame.md`): a fixed little-endian header and its extent list with a CRC-32 of their
//! own, then the payload with its CRC-32. Both sums start from the group's id, so that a frame of another group, or a
//! stale one in a reused file, never validates. Lengths are checked against `limits` before they are used: verify, then
//! parse, then allocate. Does not know what a payload means (`record`), nor how it is compressed and sealed (`codec`).

use crate::limits::{CONTENT_BLOCKS_MAX, CONTENT_BYTES_MAX, EXTENTS_MAX, HOLE_BLOCKS_MAX, PAYLOAD_BYTES_MAX};
use crate::units::{
    AttemptId, BLOCK_BYTES, Block, Epoch, Extent, FrameHash, Generation, GroupId, Sequence, VolumeSlot,
};

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"CDPF";
/// The layout described here.
pub const VERSION: u8 = 1;
/// Bytes before the extent list.
pub const FIXED_BYTES: usize = 72;
/// Bytes of one entry of the extent list.
const EXTENT_BYTES: usize = 8;
/// Bytes of a CRC-32.
const CRC_BYTES: usize = 4;
/// The longest frame, in bytes.
pub const FRAME_BYTES_MAX: usize = FIXED_BYTES + EXTENTS_MAX * EXTENT_BYTES + CRC_BYTES + PAYLOAD_BYTES_MAX + CRC_BYTES;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Starts an attempt: key, volumes (`record::Begin`).
    Begin = 1,
    /// Content of extents of one volume.
    Extents = 2,
    /// Ends a part: durable at the target, no recovery point yet (`record::PartEnd`).
    PartEnd = 3,
    /// Ends an epoch: makes it a recovery point (`record::Commit`).
    Commit = 4,
    /// Written by the target: everything before an offset was durable (`record::Synced`).
    Synced = 5,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Begin, Self::Extents, Self::PartEnd, Self::Commit, Self::Synced]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// How the content of an `Extents` frame is stored. Every other kind is `Raw`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Encoding {
    /// As it is.
    Raw = 0,
    /// One lz4 block (no frame, no length prefix).
    Lz4 = 1,
    /// One zstd frame that tells its content's length and needs no dictionary.
    Zstd = 2,
    /// Zeros: no content. Discarded blocks are defined as zeros.
    Hole = 4,
    /// The device could not read the blocks: no content, and never zeros.
    Unreadable = 5,
    /// The target had lost them when it sealed what was around them anew: no content, no payload, and never zeros.
    Lost = 7,
    // Reserved: 3 zstd with the group's dictionary, 6 delta.
}

impl Encoding {
    fn from_byte(byte: u8) -> Option<Self> {
        let known = [Self::Raw, Self::Lz4, Self::Zstd, Self::Hole, Self::Unreadable, Self::Lost];
        known.into_iter().find(|encoding| *encoding as u8 == byte)
    }

    /// Whether the blocks of such a frame have bytes of their own.
    #[must_use]
    pub const fn has_content(self) -> bool {
        matches!(self, Self::Raw | Self::Lz4 | Self::Zstd)
    }
}

/// Everything in a frame before its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// How its content is stored.
    pub encoding: Encoding,
    /// The volume of an `Extents` frame; 0 otherwise.
    pub volume: VolumeSlot,
    /// The epoch it belongs to.
    pub epoch: Epoch,
    /// The incarnation of the source that made it.
    pub generation: Generation,
    /// The sealing run it belongs to; zeros in a `Synced` frame.
    pub attempt: AttemptId,
    /// Its position within the attempt.
    pub sequence: Sequence,
    /// Sealed anew by the target, as what the blocks held at `epoch`. No source sends such a frame.
    pub resealed: bool,
    /// Bytes of the payload, as stored.
    pub payload_len: u32,
    /// Bytes of the content once opened and decompressed; 0 where there is none.
    pub content_len: u32,
    /// Bytes at the payload's end that are the sealed digests; 0 where there are none.
    pub digests_len: u32,
    /// The blocks, in ascending order and disjoint; the content holds them one after the other.
    pub extents: Vec<Extent>,
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The bytes end before the frame does.
    #[error("cut short: {needed} bytes needed")]
    Short {
        /// Bytes needed to go on: to the end of the header, or of the frame.
        needed: usize,
    },
    /// Not the first bytes of a frame.
    #[error("no frame magic")]
    Magic,
    /// A layout this program does not know.
    #[error("frame version {0}, this program reads {VERSION}")]
    Version(u8),
    /// A length or count beyond its bound.
    #[error("{0} is beyond its bound")]
    Bound(&'static str),
    /// The header's checksum is wrong.
    #[error("header checksum mismatch")]
    HeaderCrc,
    /// The payload's checksum is wrong.
    #[error("payload checksum mismatch")]
    PayloadCrc,
    /// The checksum holds but the fields contradict each other.
    #[error("{0} is not valid")]
    Field(&'static str),
}

/// A frame over borrowed bytes: checked, not copied.
#[derive(Clone, Debug)]
pub struct Frame<'a> {
    /// The parsed header.
    pub header: Header,
    /// The payload as stored.
    pub payload: &'a [u8],
    /// The whole frame.
    pub bytes: &'a [u8],
}

impl Frame<'_> {
    /// BLAKE3 of the whole frame.
    #[must_use]
    pub fn hash(&self) -> FrameHash {
        hash(self.bytes)
    }

    /// The part of the frame that is associated data of its seal: the header without its checksum.
    #[must_use]
    pub fn associated_data(&self) -> &[u8] {
        &self.bytes[..self.header.associated_data_len()]
    }
}

/// BLAKE3 of a whole frame's bytes.
#[must_use]
pub fn hash(bytes: &[u8]) -> FrameHash {
    FrameHash(*blake3::hash(bytes).as_bytes())
}

impl Header {
    /// Bytes of the header with its extent list and checksum.
    #[must_use]
    pub fn header_len(&self) -> usize {
        header_len(self.extents.len())
    }

    /// Bytes of the header without its checksum.
    #[must_use]
    pub fn associated_data_len(&self) -> usize {
        self.header_len() - CRC_BYTES
    }

    /// Bytes of the whole frame.
    #[must_use]
    pub fn frame_len(&self) -> usize {
        self.header_len() + self.payload_len as usize + CRC_BYTES
    }

    /// Blocks the frame covers.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.extents.iter().map(|extent| u64::from(extent.count)).sum()
    }

    /// The header's bytes without its checksum: what the seal of the payload is bound to.
    ///
    /// `payload_len`, `content_len` and `digests_len` have to be final.
    #[must_use]
    pub fn associated_data(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.header_len());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[VERSION, self.kind as u8, self.encoding as u8, u8::from(self.resealed)]);
        out.extend_from_slice(&self.volume.0.to_le_bytes());
        out.extend_from_slice(&[0, 0]);
        out.extend_from_slice(&(self.header_len() as u32).to_le_bytes());
        out.extend_from_slice(&self.payload_len.to_le_bytes());
        out.extend_from_slice(&self.content_len.to_le_bytes());
        out.extend_from_slice(&self.digests_len.to_le_bytes());
        out.extend_from_slice(&(self.extents.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.epoch.0.to_le_bytes());
        out.extend_from_slice(&self.generation.0.to_le_bytes());
        out.extend_from_slice(&self.attempt.0);
        out.extend_from_slice(&self.sequence.0.to_le_bytes());
        for extent in &self.extents {
            out.extend_from_slice(&extent.start.0.to_le_bytes());
            out.extend_from_slice(&extent.count.to_le_bytes());
        }
        out
    }
}

/// Builds a frame of `header` and `payload`, whose length has to be the header's `payload_len`.
#[must_use]
pub fn encode(group: &GroupId, header: &Header, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(header.frame_len());
    out.extend_from_slice(&start(group, header));
    out.extend_from_slice(payload);
    finish(group, header, &mut out, 0);
    out
}

/// The beginning of a frame, its header with checksum: for payloads that are made in place.
#[must_use]
pub fn start(group: &GroupId, header: &Header) -> Vec<u8> {
    let mut out = header.associated_data();
    out.extend_from_slice(&crc(group, &out).to_le_bytes());
    out
}

/// Ends the frame at `out[frame_at..]`, which is what `start` gave and the whole payload behind it.
pub fn finish(group: &GroupId, header: &Header, out: &mut Vec<u8>, frame_at: usize) {
    let payload = &out[frame_at + header.header_len()..];
    assert_eq!(header.payload_len as usize, payload.len(), "the header tells the payload's length");
    let sum = crc(group, payload);
    out.extend_from_slice(&sum.to_le_bytes());
}

/// Parses the header at the start of `bytes`; the payload need not be there yet.
///
/// # Errors
/// `Short` with the bytes needed for the next step where `bytes` is a true prefix; any other error is final.
pub fn decode_header(group: &GroupId, bytes: &[u8]) -> Result<Header, FrameError> {
    let known = bytes.len().min(MAGIC.len());
    if bytes[..known] != MAGIC[..known] {
        return Err(FrameError::Magic);
    }
    let Some((fixed, _)) = bytes.split_first_chunk::<FIXED_BYTES>() else {
        return Err(FrameError::Short { needed: FIXED_BYTES });
    };
    if fixed[4] != VERSION {
        return Err(FrameError::Version(fixed[4]));
    }
    let extent_count = u32_at(fixed, 28) as usize;
    if extent_count > EXTENTS_MAX {
        return Err(FrameError::Bound("extent count"));
    }
    let header_len = header_len(extent_count);
    if u32_at(fixed, 12) as usize != header_len {
        return Err(FrameError::Bound("header length"));
    }
    if bytes.len() < header_len {
        return Err(FrameError::Short { needed: header_len });
    }
    let (summed, sum) = bytes[..header_len].split_at(header_len - CRC_BYTES);
    if crc(group, summed).to_le_bytes() != sum {
        return Err(FrameError::HeaderCrc);
    }
    let header = Header {
        kind: Kind::from_byte(fixed[5]).ok_or(FrameError::Field("kind"))?,
        encoding: Encoding::from_byte(fixed[6]).ok_or(FrameError::Field("encoding"))?,
        volume: VolumeSlot(u16::from_le_bytes([fixed[8], fixed[9]])),
        payload_len: u32_at(fixed, 16),
        content_len: u32_at(fixed, 20),
        digests_len: u32_at(fixed, 24),
        epoch: Epoch(u64_at(fixed, 32)),
        generation: Generation(u64_at(fixed, 40)),
        attempt: AttemptId(fixed[48..64].try_into().expect("16 bytes")),
        sequence: Sequence(u64_at(fixed, 64)),
        resealed: fixed[7] == 1,
        extents: decode_extents(&summed[FIXED_BYTES..])?,
    };
    if fixed[7] > 1 || fixed[10..12] != [0, 0] {
        return Err(FrameError::Field("reserved byte"));
    }
    check(&header)?;
    Ok(header)
}

/// Parses and verifies the frame at the start of `bytes`, which may go on behind it.
///
/// # Errors
/// `Short` where `bytes` is a true prefix of a frame; any other error is final.
pub fn decode<'a>(group: &GroupId, bytes: &'a [u8]) -> Result<Frame<'a>, FrameError> {
    let header = decode_header(group, bytes)?;
    let frame_len = header.frame_len();
    if bytes.len() < frame_len {
        return Err(FrameError::Short { needed: frame_len });
    }
    let bytes = &bytes[..frame_len];
    let (payload, sum) = bytes[header.header_len()..].split_at(header.payload_len as usize);
    if crc(group, payload).to_le_bytes() != sum {
        return Err(FrameError::PayloadCrc);
    }
    Ok(Frame { header, payload, bytes })
}

/// Parses the frame at the start of `bytes` and verifies its header alone: of the payload only what its seals prove may be
/// believed.
///
/// # Errors
/// As `decode`, but for the payload's checksum.
pub fn decode_damaged<'a>(group: &GroupId, bytes: &'a [u8]) -> Result<Frame<'a>, FrameError> {
    let header = decode_header(group, bytes)?;
    let bytes = bytes.get(..header.frame_len()).ok_or(FrameError::Short { needed: header.frame_len() })?;
    let payload = &bytes[header.header_len()..][..header.payload_len as usize];
    Ok(Frame { header, payload, bytes })
}

fn decode_extents(bytes: &[u8]) -> Result<Vec<Extent>, FrameError> {
    let mut extents = Vec::with_capacity(bytes.len() / EXTENT_BYTES);
    let mut end = 0;
    for entry in bytes.chunks_exact(EXTENT_BYTES) {
        let extent = Extent::new(Block(u32_at(entry, 0)), u32_at(entry, 4)).ok_or(FrameError::Field("extent"))?;
        if u64::from(extent.start.0) < end {
            return Err(FrameError::Field("extent order"));
        }
        end = extent.end();
        extents.push(extent);
    }
    Ok(extents)
}

/// The fields against each other and against `limits`: what a checksum cannot say.
fn check(header: &Header) -> Result<(), FrameError> {
    if header.payload_len as usize > PAYLOAD_BYTES_MAX {
        return Err(FrameError::Bound("payload length"));
    }
    if header.content_len as usize > CONTENT_BYTES_MAX {
        return Err(FrameError::Bound("content length"));
    }
    if header.digests_len > header.payload_len {
        return Err(FrameError::Bound("digests length"));
    }
    if header.kind != Kind::Extents {
        if header.resealed {
            return Err(FrameError::Field("record header"));
        }
        let bare = header.extents.is_empty() && header.content_len == 0 && header.digests_len == 0;
        let plain = header.encoding == Encoding::Raw && header.volume == VolumeSlot(0);
        return if bare && plain { Ok(()) } else { Err(FrameError::Field("record header")) };
    }
    if header.extents.is_empty() {
        return Err(FrameError::Field("extent count"));
    }
    if header.encoding.has_content() {
        let blocks = header.blocks();
        if blocks > CONTENT_BLOCKS_MAX as u64 || u64::from(header.content_len) != blocks * BLOCK_BYTES as u64 {
            return Err(FrameError::Field("content length"));
        }
    } else if header.content_len != 0 || header.extents.iter().any(|extent| extent.count > HOLE_BLOCKS_MAX) {
        return Err(FrameError::Field("hole"));
    }
    if header.encoding == Encoding::Lost && (!header.resealed || header.payload_len != 0) {
        return Err(FrameError::Field("lost blocks"));
    }
    Ok(())
}

/// Bytes of a header with so many extents, and its checksum.
pub(crate) const fn header_len(extent_count: usize) -> usize {
    FIXED_BYTES + extent_count * EXTENT_BYTES + CRC_BYTES
}

fn crc(group: &GroupId, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&group.0);
    hasher.update(bytes);
    hasher.finalize()
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: GroupId = GroupId([7; 16]);

    fn sample() -> Vec<u8> {
        let header = Header {
            kind: Kind::Extents,
            encoding: Encoding::Lz4,
            volume: VolumeSlot(3),
            epoch: Epoch(9),
            generation: Generation(2),
            attempt: AttemptId([5; 16]),
            sequence: Sequence(4),
            payload_len: 100,
            content_len: 3 * BLOCK_BYTES as u32,
            digests_len: 64,
            resealed: false,
            extents: vec![Extent { start: Block(1), count: 2 }, Extent { start: Block(u32::MAX), count: 1 }],
        };
        encode(&GROUP, &header, &[0xa5; 100])
    }

    #[test]
    fn a_frame_decodes_to_what_was_encoded() {
        let mut bytes = sample();
        let frame_len = bytes.len();
        bytes.extend_from_slice(b"what follows");
        let frame = decode(&GROUP, &bytes).expect("a whole frame");
        assert_eq!(frame.bytes.len(), frame_len);
        assert_eq!(frame.payload, [0xa5; 100]);
        assert_eq!(frame.associated_data(), frame.header.associated_data());
        assert_eq!(encode(&GROUP, &frame.header, frame.payload), frame.bytes);
    }

    #[test]
    fn every_single_bit_flip_is_refused() {
        let bytes = sample();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&GROUP, &flipped).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_prefix_asks_for_more() {
        let bytes = sample();
        for len in 0..bytes.len() {
            match decode(&GROUP, &bytes[..len]) {
                Err(FrameError::Short { needed }) => assert!(needed > len && needed <= bytes.len(), "prefix of {len}"),
                other => panic!("prefix of {len}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_damaged_frame_is_its_header_and_whatever_stands_behind() {
        let mut bytes = sample();
        let at = bytes.len() - 60;
        bytes[at] ^= 1;
        let frame = decode_damaged(&GROUP, &bytes).expect("the header is intact");
        assert_eq!((frame.bytes, frame.payload.len()), (&bytes[..], 100));
        assert_eq!(decode(&GROUP, &bytes).err(), Some(FrameError::PayloadCrc));
        assert!(decode_damaged(&GROUP, &bytes[..bytes.len() - 1]).is_err());
        bytes[20] ^= 1;
        assert_eq!(decode_damaged(&GROUP, &bytes).err(), Some(FrameError::HeaderCrc));
    }

    #[test]
    fn a_frame_of_another_group_is_refused() {
        assert_eq!(decode(&GroupId([8; 16]), &sample()).err(), Some(FrameError::HeaderCrc));
    }
}
