//! What a target says that it holds of some blocks: the digests of their content, sealed as they came.
//!
//! The digests of a frame are sealed apart from its content, so they are told without it, and by a target that has no key. Who
//! has the key opens them: they are of a frame that a holder of the key made, for these blocks. That the frame is the newest is the
//! target's word, and so is what it says of blocks without content.

use crate::codec::{ContentError, open_digest_section};
use crate::frame::{self, Encoding, Frame, FrameError};
use crate::seal::{DataKey, Digest};
use crate::units::{Extent, GroupId, VolumeSlot};
use serde::{Deserialize, Serialize};

/// Blocks that one question may be about: 2 MiB of a volume, whose frames a target reads again to answer.
pub const QUESTION_BLOCKS_MAX: u32 = 512;
/// Bytes of holdings in one answer; what does not fit is asked for again.
pub const ANSWER_BYTES_MAX: usize = 48 * 1024;
/// Bytes of a holding beside what its frame gives.
const HOLDING_BYTES: usize = 24;

/// Blocks one after the other that are held alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// How many.
    pub count: u32,
    /// How.
    pub held: Held,
}

/// How blocks are held.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Held {
    /// They were never sent.
    Nothing,
    /// As zeros.
    Hole,
    /// The source's device could not read them.
    Unreadable,
    /// They cannot be read, and the target knows.
    Damaged,
    /// With content.
    Frame {
        /// The header of the frame that holds them, with its checksum.
        header: Vec<u8>,
        /// The digests of all blocks of that frame, sealed.
        digests: Vec<u8>,
    },
}

impl Held {
    /// How a frame holds its blocks.
    #[must_use]
    pub fn of(frame: &Frame<'_>) -> Self {
        let header = &frame.header;
        match header.encoding {
            Encoding::Hole => Self::Hole,
            Encoding::Unreadable => Self::Unreadable,
            Encoding::Lost => Self::Damaged,
            Encoding::Raw | Encoding::Lz4 | Encoding::Zstd => Self::Frame {
                header: frame.bytes[..header.header_len()].to_vec(),
                digests: frame.payload[(header.payload_len - header.digests_len) as usize..].to_vec(),
            },
        }
    }

    /// About the bytes it takes on the line.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        match self {
            Self::Frame { header, digests } => HOLDING_BYTES + header.len() + digests.len(),
            _ => HOLDING_BYTES,
        }
    }
}

/// The digests of `blocks`, which lie within one extent of a frame, from its header and its sealed digests.
///
/// # Errors
/// Where they are not of a frame of this group and volume with these blocks, or not sealed under `key`.
pub fn open(
    group: &GroupId,
    volume: VolumeSlot,
    blocks: Extent,
    (header_bytes, digests): (&[u8], &[u8]),
    key: &DataKey,
) -> Result<Vec<Digest>, ContentError> {
    let header = frame::decode_header(group, header_bytes)?;
    let elsewhere = || ContentError::Frame(FrameError::Field("extents"));
    let is_whole = header_bytes.len() == header.header_len() && digests.len() == header.digests_len as usize;
    if header.volume != volume || !is_whole {
        return Err(elsewhere());
    }
    let mut before = 0;
    let mut at = None;
    for extent in &header.extents {
        if extent.start <= blocks.start && blocks.end() <= extent.end() {
            at = Some(before + (blocks.start.0 - extent.start.0) as usize);
        }
        before += extent.count as usize;
    }
    let at = at.ok_or_else(elsewhere)?;
    let associated_data = &header_bytes[..header.associated_data_len()];
    let opened = open_digest_section(&header, associated_data, digests, &key.attempt_key(&header.attempt))?;
    opened.get(at..at + blocks.count as usize).map(<[Digest]>::to_vec).ok_or_else(elsewhere)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Draft, Sealer};
    use crate::packer::{Packer, Packing};
    use crate::units::{AttemptId, BLOCK_BYTES, Block, Epoch, Generation, Sequence};

    const GROUP: GroupId = GroupId([3; 16]);
    const SLOT: VolumeSlot = VolumeSlot(4);

    fn extent(start: u32, count: u32) -> Extent {
        Extent::new(Block(start), count).expect("an extent")
    }

    fn sealer() -> Sealer {
        Sealer::new(GROUP, Epoch(5), Generation(1), AttemptId([6; 16]), &DataKey::new([8; 32]))
    }

    #[test]
    fn digests_open_without_content_and_for_their_blocks_alone() {
        let content: Vec<u8> = (0..5 * BLOCK_BYTES).map(|at| (at / BLOCK_BYTES) as u8 + 1).collect();
        let mut draft = Draft::default();
        draft.push(&content);
        let extents = vec![extent(7, 2), extent(20, 3)];
        let bytes = sealer().content_of(&mut Packer::new(Packing::Lz4), SLOT, Sequence(1), extents, draft);
        let frame = frame::decode(&GROUP, &bytes).expect("a frame");
        let held = Held::of(&frame);
        let Held::Frame { header, digests } = &held else { panic!("content") };
        assert!(held.bytes() < 400, "{} bytes for five blocks", held.bytes());
        let key = DataKey::new([8; 32]);
        let expected = key.digest_key().digests(&content);
        let parts = (header.as_slice(), digests.as_slice());
        assert_eq!(open(&GROUP, SLOT, extent(7, 2), parts, &key), Ok(expected[..2].to_vec()));
        assert_eq!(open(&GROUP, SLOT, extent(21, 2), parts, &key), Ok(expected[3..].to_vec()));
        for elsewhere in [extent(6, 2), extent(8, 2), extent(22, 2), extent(7, 16), extent(0, 1)] {
            assert!(open(&GROUP, SLOT, elsewhere, parts, &key).is_err(), "{elsewhere:?}");
        }
        assert!(open(&GROUP, VolumeSlot(5), extent(7, 2), parts, &key).is_err(), "another volume");
        assert!(open(&GroupId([4; 16]), SLOT, extent(7, 2), parts, &key).is_err(), "another group");
        assert!(open(&GROUP, SLOT, extent(7, 2), parts, &DataKey::new([9; 32])).is_err(), "another key");
        for at in 0..header.len() + digests.len() {
            let (mut header, mut digests) = (header.clone(), digests.clone());
            *header.iter_mut().chain(&mut digests).nth(at).expect("a byte") ^= 1;
            assert!(open(&GROUP, SLOT, extent(7, 2), (&header, &digests), &key).is_err(), "byte {at}");
        }
        for len in 0..digests.len() {
            assert!(open(&GROUP, SLOT, extent(7, 2), (header, &digests[..len]), &key).is_err(), "cut to {len}");
        }
    }

    #[test]
    fn what_has_no_content_says_so() {
        for (encoding, held) in [(Encoding::Hole, Held::Hole), (Encoding::Unreadable, Held::Unreadable)] {
            let bytes = sealer().bare(encoding, SLOT, Sequence(1), vec![extent(7, 2)]);
            assert_eq!(Held::of(&frame::decode(&GROUP, &bytes).expect("a frame")), held);
        }
    }
}
