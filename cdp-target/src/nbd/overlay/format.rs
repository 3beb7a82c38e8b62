//! The bytes of an overlay's header and of the pages of its map (`docs/format/overlay.md`).
//!
//! Where what is in the file follows from the volumes alone, so no offset is stored that could lie. Lengths are bounded before
//! anything is allocated.

use super::map::State;
use cdp_protocol::limits::{VOLUMES_MAX, is_name};
use cdp_protocol::record::Volume;
use cdp_protocol::units::{BLOCK_BYTES, Epoch, FrameHash, GroupId, Head, VOLUME_BYTES_MAX, VolumeSlot, blocks_in};

/// Version that this program writes, and the newest it reads.
pub const VERSION: u16 = 1;
/// Bytes that the header has to itself.
pub const HEADER_BYTES: usize = 8192;
/// Bytes of a page of the map.
pub const PAGE_BYTES: usize = BLOCK_BYTES;
/// Blocks that a page tells of, two bits each: 63.5 MiB.
pub const PAGE_BLOCKS: u32 = 16_256;

const MAGIC: &[u8; 8] = b"cdp-ovl\n";
const PAGE_MAGIC: &[u8; 4] = b"ovmp";
const FIXED_BYTES: usize = 72;
const STATES_FROM: usize = 20;
const STATES_TO: usize = STATES_FROM + PAGE_BLOCKS as usize / 4;
const PAGE_CRC_FROM: usize = PAGE_BYTES - 4;
const _: () = assert!(STATES_TO <= PAGE_CRC_FROM);
const _: () = assert!(FIXED_BYTES + VOLUMES_MAX * (11 + 64) + 4 <= HEADER_BYTES);

/// What an overlay lies over: a point of a group, and its volumes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// The group.
    pub group: GroupId,
    /// The point.
    pub head: Head,
    /// Its volumes, at most `VOLUMES_MAX`.
    pub volumes: Vec<Volume>,
}

/// Why the beginning of a file is none of an overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Something else.
    #[error("it is no overlay")]
    NotAnOverlay,
    /// Written by a newer program.
    #[error("it has version {0}, this program reads up to {VERSION}")]
    Newer(u16),
    /// Its checksum or a field is wrong.
    #[error("its header is damaged")]
    Damaged,
}

/// What a copy of a page is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Copy {
    /// Never written.
    Blank,
    /// Whole: the how manyth writing of the page it is, and the states of its blocks that are not untouched, from 0.
    Whole {
        /// From 1.
        sequence: u64,
        /// Numbers within the page, rising.
        states: Vec<(u32, State)>,
    },
    /// Neither.
    Bad,
}

/// Where things are in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// For each volume where its pages begin, and where its blocks do.
    volumes: Vec<(u64, u64)>,
    /// Bytes of the file.
    pub(super) len: u64,
}

impl Layout {
    pub(super) fn of(volumes: &[Volume]) -> Self {
        let mut at = HEADER_BYTES as u64;
        let mut pages = Vec::new();
        for volume in volumes {
            pages.push(at);
            at += u64::from(page_count(volume)) * 2 * PAGE_BYTES as u64;
        }
        let mut places = Vec::new();
        for (volume, pages) in volumes.iter().zip(pages) {
            places.push((pages, at));
            at += blocks_in(volume.size_bytes) * BLOCK_BYTES as u64;
        }
        Self { volumes: places, len: at }
    }

    /// Where the first of a volume's blocks is.
    pub(super) fn data(&self, volume: usize) -> u64 {
        self.volumes[volume].1
    }

    /// Where a copy of a page is: the writings of a page go to its two copies in turn.
    pub(super) fn page(&self, volume: usize, page: u32, sequence: u64) -> u64 {
        self.volumes[volume].0 + (u64::from(page) * 2 + sequence % 2) * PAGE_BYTES as u64
    }
}

/// Pages of a volume's map.
pub(super) fn page_count(volume: &Volume) -> u32 {
    blocks_in(volume.size_bytes).div_ceil(u64::from(PAGE_BLOCKS)) as u32
}

/// The header.
#[must_use]
pub fn encode_header(base: &Base) -> Vec<u8> {
    assert!(base.volumes.len() <= VOLUMES_MAX, "a point has no more volumes");
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend(base.group.0);
    bytes.extend(base.head.epoch.0.to_le_bytes());
    bytes.extend(base.head.hash.0);
    bytes.extend((base.volumes.len() as u16).to_le_bytes());
    bytes.extend([0; 2]);
    assert_eq!(bytes.len(), FIXED_BYTES, "as the page says");
    for volume in &base.volumes {
        bytes.extend(volume.slot.0.to_le_bytes());
        bytes.extend(volume.size_bytes.to_le_bytes());
        bytes.push(volume.name.len() as u8);
        bytes.extend(volume.name.as_bytes());
    }
    bytes.resize(HEADER_BYTES - 4, 0);
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

/// Reads a header.
///
/// # Errors
/// Where it is none.
pub fn decode_header(bytes: &[u8; HEADER_BYTES]) -> Result<Base, HeaderError> {
    let (content, crc) = bytes.split_at(HEADER_BYTES - 4);
    let rest = content.strip_prefix(MAGIC).ok_or(HeaderError::NotAnOverlay)?;
    let version = u16::from_le_bytes([rest[0], rest[1]]);
    if version > VERSION {
        return Err(HeaderError::Newer(version));
    }
    if version == 0 || crc != crc32fast::hash(content).to_le_bytes() {
        return Err(HeaderError::Damaged);
    }
    decode_fields(content).ok_or(HeaderError::Damaged)
}

fn decode_fields(content: &[u8]) -> Option<Base> {
    let (fixed, mut rest) = content.split_at_checked(FIXED_BYTES)?;
    let count = u16::from_le_bytes(*fixed[68..].first_chunk()?);
    if usize::from(count) > VOLUMES_MAX || fixed[10..12] != [0; 2] || fixed[70..72] != [0; 2] {
        return None;
    }
    let head = Head {
        epoch: Epoch(u64::from_le_bytes(*fixed[28..].first_chunk()?)),
        hash: FrameHash(*fixed[36..].first_chunk()?),
    };
    let mut volumes: Vec<Volume> = Vec::new();
    for _ in 0..count {
        let (fields, names) = rest.split_at_checked(11)?;
        let (name, behind) = names.split_at_checked(usize::from(fields[10]))?;
        rest = behind;
        let slot = VolumeSlot(u16::from_le_bytes(*fields.first_chunk()?));
        let size_bytes = u64::from_le_bytes(*fields[2..].first_chunk()?);
        let name = std::str::from_utf8(name).ok().filter(|name| is_name(name))?.to_owned();
        if size_bytes > VOLUME_BYTES_MAX || volumes.iter().any(|volume| volume.slot == slot) {
            return None;
        }
        volumes.push(Volume { slot, size_bytes, name });
    }
    let is_end = rest.iter().all(|byte| *byte == 0);
    is_end.then_some(Base { group: GroupId(*fixed[12..].first_chunk().expect("16 bytes")), head, volumes })
}

/// A page, from the states of its blocks that are not untouched.
#[must_use]
pub fn encode_page(volume: u16, page: u32, sequence: u64, states: impl Iterator<Item = (u32, State)>) -> Vec<u8> {
    let mut bytes = PAGE_MAGIC.to_vec();
    bytes.extend(volume.to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend(page.to_le_bytes());
    bytes.extend(sequence.to_le_bytes());
    bytes.resize(PAGE_CRC_FROM, 0);
    for (number, state) in states {
        bytes[STATES_FROM + number as usize / 4] |= (state as u8) << (number % 4 * 2);
    }
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

/// Reads a copy of a page.
#[must_use]
pub fn decode_page(volume: u16, page: u32, bytes: &[u8; PAGE_BYTES]) -> Copy {
    if bytes.iter().all(|byte| *byte == 0) {
        return Copy::Blank;
    }
    decode_states(volume, page, bytes).map_or(Copy::Bad, |(sequence, states)| Copy::Whole { sequence, states })
}

fn decode_states(volume: u16, page: u32, bytes: &[u8; PAGE_BYTES]) -> Option<(u64, Vec<(u32, State)>)> {
    let (content, crc) = bytes.split_at(PAGE_CRC_FROM);
    let place = [PAGE_MAGIC.as_slice(), &volume.to_le_bytes(), &[0; 2], &page.to_le_bytes()].concat();
    let is_its = content.starts_with(&place) && crc == crc32fast::hash(content).to_le_bytes();
    let sequence = u64::from_le_bytes(*content[12..].first_chunk()?);
    if !is_its || sequence == 0 || content[STATES_TO..].iter().any(|byte| *byte != 0) {
        return None;
    }
    let mut states = Vec::new();
    for (at, byte) in content[STATES_FROM..STATES_TO].iter().enumerate().filter(|(_, byte)| **byte != 0) {
        for within in 0..4 {
            let state = match byte >> (within * 2) & 3 {
                0 => continue,
                1 => State::Written,
                2 => State::Zero,
                _ => return None,
            };
            states.push((at as u32 * 4 + within, state));
        }
    }
    Some((sequence, states))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Base {
        let volume = |slot, size_bytes, name: &str| Volume { slot: VolumeSlot(slot), size_bytes, name: name.into() };
        Base {
            group: GroupId([7; 16]),
            head: Head { epoch: Epoch(9), hash: FrameHash([3; 32]) },
            volumes: vec![volume(0, 10_000, "root"), volume(4, 200 << 20, "data")],
        }
    }

    #[test]
    fn a_header_is_read_as_it_was_written_and_every_flipped_bit_is_noticed() {
        let bytes: [u8; HEADER_BYTES] = encode_header(&base()).try_into().expect("its length");
        assert_eq!(decode_header(&bytes), Ok(base()));
        for at in (0..200).chain(HEADER_BYTES - 40..HEADER_BYTES) {
            let mut flipped = bytes;
            flipped[at] ^= 4;
            assert!(decode_header(&flipped).is_err(), "byte {at}");
        }
        assert_eq!(decode_header(&[0; HEADER_BYTES]), Err(HeaderError::NotAnOverlay));
        assert_eq!(decode_header(&[1; HEADER_BYTES]), Err(HeaderError::NotAnOverlay));
        let mut newer = bytes;
        newer[8] = 9;
        assert_eq!(decode_header(&newer), Err(HeaderError::Newer(9)));
    }

    #[test]
    fn a_page_belongs_to_its_place() {
        let states = vec![(0, State::Zero), (5, State::Written), (PAGE_BLOCKS - 1, State::Zero)];
        let bytes: [u8; PAGE_BYTES] = encode_page(1, 2, 3, states.iter().copied()).try_into().expect("its length");
        assert_eq!(decode_page(1, 2, &bytes), Copy::Whole { sequence: 3, states });
        assert_eq!(decode_page(0, 2, &bytes), Copy::Bad);
        assert_eq!(decode_page(1, 3, &bytes), Copy::Bad);
        for at in 0..PAGE_BYTES {
            let mut flipped = bytes;
            flipped[at] ^= 1;
            assert_eq!(decode_page(1, 2, &flipped), Copy::Bad, "byte {at}");
        }
        assert_eq!(decode_page(1, 2, &[0; PAGE_BYTES]), Copy::Blank);
    }

    #[test]
    fn nothing_in_the_file_overlaps() {
        let layout = Layout::of(&base().volumes);
        assert_eq!(layout.page(0, 0, 1), HEADER_BYTES as u64 + 4096);
        assert_eq!(layout.page(1, 0, 0), HEADER_BYTES as u64 + 2 * 4096);
        assert_eq!(page_count(&base().volumes[1]), 4);
        assert_eq!(layout.data(0), HEADER_BYTES as u64 + 10 * 4096);
        assert_eq!(layout.data(1), layout.data(0) + 3 * 4096);
        assert_eq!(layout.len, layout.data(1) + (200 << 20));
    }
}
