//! The segment file: header, frames, and once it is sealed the index and a footer (`docs/format/segment.md`).
//!
//! Owns the bytes of header and footer and how sections of an index are found and verified. The header tells the place in
//! the chain at which the segment starts, so that a segment can be walked alone. Frames begin right behind it. Does not
//! know what is in an index (`index`) nor when a segment is sealed (`writer`).

use super::bytes::{FieldError, Input, put_volumes};
use cdp_protocol::record::{FrameList, PartChain, Volume};
use cdp_protocol::session::chain::{Chain, OpenAttempt};
use cdp_protocol::units::{AttemptId, Epoch, FrameHash, Generation, GroupId, Head};
use std::path::{Path, PathBuf};

/// First bytes of a segment.
pub const MAGIC: [u8; 8] = *b"CDPSEGMT";
/// First bytes of the index of a sealed segment.
pub const INDEX_MAGIC: [u8; 8] = *b"CDPINDEX";
/// Last bytes of a sealed segment.
pub const FOOTER_MAGIC: [u8; 8] = *b"CDPSEALD";
/// The layout described here.
pub const VERSION: u16 = 1;
/// The longest header, in bytes.
pub const HEADER_BYTES_MAX: usize = 8 * 1024;
/// Bytes of a footer.
pub const FOOTER_BYTES: usize = 8 + 8 + 8 + SECTIONS * (8 + 32) + 8 + 4 + 8;
/// Sections of an index.
pub const SECTIONS: usize = 6;

/// Why bytes are not a header or a footer of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// Not the first or last bytes of such a thing.
    #[error("no {0} magic")]
    Magic(&'static str),
    /// A layout this program does not know.
    #[error("segment format version {0}, this program reads {VERSION}")]
    Version(u16),
    /// Cut short.
    #[error("cut short")]
    Short,
    /// The checksum is wrong.
    #[error("{0} checksum mismatch")]
    Crc(&'static str),
    /// The checksum holds but a field is impossible.
    #[error(transparent)]
    Field(#[from] FieldError),
}

/// A place between two frames: what the chain says there, and the volumes last seen.
#[derive(Clone, Default)]
pub struct Place {
    /// Where the group stands.
    pub chain: Chain,
    /// The volumes of the open attempt, or of the last one.
    pub volumes: Vec<Volume>,
}

/// What the first bytes of a segment say.
#[derive(Clone)]
pub struct Header {
    /// Whose history it is.
    pub group: GroupId,
    /// Its number, from 1.
    pub number: u64,
    /// Where its frames go on from.
    pub place: Place,
}

/// Which part of an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Section {
    /// Attempts that have frames here.
    Runs = 0,
    /// Points.
    Commits = 1,
    /// Stretches that were damaged when it was sealed.
    Lost = 2,
    /// A bitmap of the blocks touched, per volume.
    Bitmaps = 3,
    /// Extents with content.
    Content = 4,
    /// Extents without: holes and unreadable ones.
    Bare = 5,
}

/// The last bytes of a sealed segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Where the frames end and the index begins.
    pub frames_end: u64,
    /// Bytes and BLAKE3 of each section; they stand one after the other behind the index's magic.
    pub sections: [(u64, [u8; 32]); SECTIONS],
}

/// Where segment `number` of the group in `folder` is.
#[must_use]
pub fn path(folder: &Path, number: u64) -> PathBuf {
    folder.join("journal").join(format!("{number:016x}.seg"))
}

impl Header {
    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.group.0);
        out.extend_from_slice(&self.number.to_le_bytes());
        put_place(&mut out, &self.place);
        let len = out.len() as u32 + 4;
        out[12..16].copy_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
        out
    }

    /// Parses the header at the start of `bytes`; gives it and its length.
    ///
    /// # Errors
    /// Where it is none, is damaged, or is of another version.
    pub fn decode(bytes: &[u8]) -> Result<(Self, usize), SegmentError> {
        let fixed = bytes.first_chunk::<16>().ok_or(SegmentError::Short)?;
        if fixed[..8] != MAGIC {
            return Err(SegmentError::Magic("segment"));
        }
        let version = u16::from_le_bytes([fixed[8], fixed[9]]);
        if version != VERSION {
            return Err(SegmentError::Version(version));
        }
        let len = u32::from_le_bytes([fixed[12], fixed[13], fixed[14], fixed[15]]) as usize;
        if !(20..=HEADER_BYTES_MAX).contains(&len) || bytes.len() < len {
            return Err(SegmentError::Short);
        }
        let (summed, sum) = bytes[..len].split_at(len - 4);
        if crc32fast::hash(summed).to_le_bytes() != sum {
            return Err(SegmentError::Crc("segment header"));
        }
        if fixed[10..12] != [0; 2] {
            return Err(FieldError("reserved bytes").into());
        }
        let mut input = Input::new(&summed[16..]);
        let (group, number) = (GroupId(input.array()?), input.u64()?);
        let place = take_place(&mut input)?;
        input.finish()?;
        Ok((Self { group, number, place }, len))
    }
}

fn put_place(out: &mut Vec<u8>, place: &Place) {
    let chain = &place.chain;
    out.extend_from_slice(&chain.generation().0.to_le_bytes());
    out.push(u8::from(chain.head().is_some()));
    if let Some((head, attempt)) = chain.head() {
        out.extend_from_slice(&head.epoch.0.to_le_bytes());
        out.extend_from_slice(&head.hash.0);
        out.extend_from_slice(&attempt.0);
    }
    out.push(u8::from(chain.parts().is_some()));
    if let Some((epoch, parts)) = chain.parts() {
        out.extend_from_slice(&epoch.0.to_le_bytes());
        out.extend_from_slice(&parts.count.to_le_bytes());
        out.extend_from_slice(&parts.hash.0);
    }
    let open = chain.open().filter(|open| open.is_whole());
    out.push(u8::from(open.is_some()));
    if let Some(open) = open {
        out.extend_from_slice(&open.epoch.0.to_le_bytes());
        out.extend_from_slice(&open.attempt.0);
        out.extend_from_slice(&open.list().count.to_le_bytes());
        out.extend_from_slice(&open.list().hash.0);
    }
    put_volumes(out, open.map_or(&place.volumes, |open| &open.volumes));
}

fn take_place(input: &mut Input<'_>) -> Result<Place, FieldError> {
    let generation = Generation(input.u64()?);
    let head = if input.flag()? {
        let head = Head { epoch: Epoch(input.u64()?), hash: FrameHash(input.array()?) };
        Some((head, AttemptId(input.array()?)))
    } else {
        None
    };
    let parts = if input.flag()? {
        let epoch = Epoch(input.u64()?);
        Some((epoch, PartChain { count: input.u32()?, hash: FrameHash(input.array()?) }))
    } else {
        None
    };
    let open = if input.flag()? {
        let (epoch, attempt) = (Epoch(input.u64()?), AttemptId(input.array()?));
        Some((epoch, attempt, FrameList { count: input.u64()?, hash: FrameHash(input.array()?) }))
    } else {
        None
    };
    let volumes = input.volumes()?;
    let open = open.map(|(epoch, attempt, list)| OpenAttempt::resume(epoch, attempt, volumes.clone(), list));
    Ok(Place { chain: Chain::at(head, generation, parts).with_open(open), volumes })
}

impl Footer {
    /// The footer of an index whose sections are `sections`, and the index's bytes from its magic on, footer included.
    #[must_use]
    pub fn build(frames_end: u64, sections: &[Vec<u8>; SECTIONS]) -> (Self, Vec<u8>) {
        let described = std::array::from_fn(|at| (sections[at].len() as u64, *blake3::hash(&sections[at]).as_bytes()));
        let footer = Self { frames_end, sections: described };
        let mut out = INDEX_MAGIC.to_vec();
        for section in sections {
            out.extend_from_slice(section);
        }
        out.extend_from_slice(&footer.encode());
        (footer, out)
    }

    /// The footer's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = FOOTER_MAGIC.to_vec();
        out.extend_from_slice(&u64::from(VERSION).to_le_bytes());
        out.extend_from_slice(&self.frames_end.to_le_bytes());
        for (len, hash) in &self.sections {
            out.extend_from_slice(&len.to_le_bytes());
            out.extend_from_slice(hash);
        }
        out.extend_from_slice(&self.file_len().to_le_bytes());
        out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
        out.extend_from_slice(&FOOTER_MAGIC);
        out
    }

    /// Parses the last `FOOTER_BYTES` of a file of `file_len` bytes.
    ///
    /// # Errors
    /// Where they are no footer, are damaged, or belong to a file of another length.
    pub fn decode(bytes: &[u8], file_len: u64) -> Result<Self, SegmentError> {
        if bytes.len() != FOOTER_BYTES {
            return Err(SegmentError::Short);
        }
        if bytes[..8] != FOOTER_MAGIC || bytes[FOOTER_BYTES - 8..] != FOOTER_MAGIC {
            return Err(SegmentError::Magic("footer"));
        }
        let (summed, sum) = bytes[..FOOTER_BYTES - 8].split_at(FOOTER_BYTES - 12);
        if crc32fast::hash(summed).to_le_bytes() != sum {
            return Err(SegmentError::Crc("footer"));
        }
        let mut input = Input::new(&summed[8..]);
        let version = input.u64()?;
        if version != u64::from(VERSION) {
            return Err(SegmentError::Version(u16::try_from(version).unwrap_or(u16::MAX)));
        }
        let frames_end = input.u64()?;
        let mut sections = [(0, [0; 32]); SECTIONS];
        for section in &mut sections {
            *section = (input.u64()?, input.array()?);
        }
        let footer = Self { frames_end, sections };
        let fits = footer.checked_file_len() == Some(file_len);
        if input.u64()? != file_len || !fits {
            return Err(FieldError("file length").into());
        }
        Ok(footer)
    }

    /// Where in the file a section begins.
    #[must_use]
    pub fn offset(&self, section: Section) -> u64 {
        let before: u64 = self.sections[..section as usize].iter().map(|(len, _)| len).sum();
        self.frames_end + INDEX_MAGIC.len() as u64 + before
    }

    /// BLAKE3 of the footer's bytes: names the whole index.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        *blake3::hash(&self.encode()).as_bytes()
    }

    fn file_len(&self) -> u64 {
        self.checked_file_len().expect("we made the sections, they fit")
    }

    fn checked_file_len(&self) -> Option<u64> {
        let start = self.frames_end.checked_add((INDEX_MAGIC.len() + FOOTER_BYTES) as u64)?;
        self.sections.iter().try_fold(start, |sum, (len, _)| sum.checked_add(*len))
    }
}
