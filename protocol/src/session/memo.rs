//! What a source remembers of a group's session beyond its own death: generation, acked points and parts, commits under way.
//!
//! It lives as long as the tracking does (pinned beside it, at most 1 KiB), because it says what the tracking is relative
//! to: the newest acked point. From it the target judges how the two histories stand to each other. The owner stores it
//! *before* a commit leaves (`committing`), so that a successor knows what may have been acked unheard; and stores an
//! adopted head (`opened` with a new generation) only once everything that has to be captured again is in the tracker; and an
//! acked part before the part's blocks are forgotten, so that a target that lost it is noticed.

use super::{ACKED_MAX, SENT_MAX};
use crate::record::PartChain;
use crate::units::{Epoch, FrameHash, Generation, Head};

/// Bytes a memo may have.
pub const MEMO_BYTES_MAX: usize = 1024;
const MAGIC: [u8; 4] = *b"CDPM";
/// Version 1 knew no parts.
const VERSION: u8 = 2;
const FIXED_BYTES: usize = 16;
const HEAD_BYTES: usize = 40;
const PARTS_BYTES: usize = 44;
const CRC_BYTES: usize = 4;
const _: () = assert!(FIXED_BYTES + (ACKED_MAX + SENT_MAX) * HEAD_BYTES + PARTS_BYTES + CRC_BYTES <= MEMO_BYTES_MAX);

/// A source's memory of a group's session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memo {
    /// The generation last granted; `None` before the first time.
    pub generation: Option<Generation>,
    /// The newest acked points, newest first, at most `ACKED_MAX`.
    pub acked: Vec<Head>,
    /// Commits sent after those, newest first, at most `SENT_MAX`.
    pub sent: Vec<Head>,
    /// The newest acked part of the epoch after them, and that epoch's number.
    pub parts: Option<(Epoch, PartChain)>,
}

/// Why bytes are not a memo. Whoever finds this knows nothing about the group and starts over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoError {
    /// Not of the length its counts tell, or the counts are beyond their bounds.
    #[error("memo has the wrong length")]
    Length,
    /// Not a memo of a version this program reads.
    #[error("not a memo of version 1 to {VERSION}")]
    Version,
    /// The checksum is wrong.
    #[error("memo checksum mismatch")]
    Crc,
}

impl Memo {
    /// The newest acked point.
    #[must_use]
    pub fn head(&self) -> Option<Head> {
        self.acked.first().copied()
    }

    /// A commit is about to leave.
    pub fn committing(&mut self, head: Head) {
        // One of the same or a higher number was a predecessor's of this process, and can no longer be acked.
        self.sent.retain(|sent| sent.epoch < head.epoch);
        self.sent.insert(0, head);
        self.sent.truncate(SENT_MAX);
    }

    /// A point was acked; commits up to it are no longer under way.
    pub fn acked(&mut self, head: Head) {
        if !self.acked.contains(&head) {
            self.acked.insert(0, head);
            self.acked.truncate(ACKED_MAX);
        }
        self.sent.retain(|sent| sent.epoch > head.epoch);
        self.parts = self.parts.filter(|(epoch, _)| *epoch > head.epoch);
    }

    /// A part was acked.
    pub const fn part_acked(&mut self, epoch: Epoch, parts: PartChain) {
        self.parts = Some((epoch, parts));
    }

    /// The target's answer: its head is where the source stands from now on, its parts are what the next point takes in.
    pub fn opened(&mut self, generation: Generation, head: Option<Head>, parts: Option<(Epoch, PartChain)>) {
        if self.generation != Some(generation) {
            // Frames of the lower generation are fenced off: what was under way can no longer be acked.
            self.sent.retain(|sent| Some(*sent) == head);
        }
        self.generation = Some(generation);
        match head {
            // Commits under way in this generation may yet be acked: they go again, or are still on their way.
            None => self.acked.clear(),
            Some(head) => {
                // A target that lost points may stand below what it has acked, whatever else it finds of the two histories.
                self.acked.retain(|acked| acked.epoch < head.epoch || *acked == head);
                self.acked(head);
            }
        }
        self.parts = parts;
    }

    /// The memo's bytes: magic, version, counts, generation (0 is none), heads, parts if any, and a CRC-32 over all of it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.acked.len() <= ACKED_MAX && self.sent.len() <= SENT_MAX, "the lists are cut where they grow");
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&[
            VERSION,
            self.acked.len() as u8,
            self.sent.len() as u8,
            u8::from(self.parts.is_some()),
        ]);
        out.extend_from_slice(&self.generation.unwrap_or_default().0.to_le_bytes());
        for head in self.acked.iter().chain(&self.sent) {
            out.extend_from_slice(&head.epoch.0.to_le_bytes());
            out.extend_from_slice(&head.hash.0);
        }
        if let Some((epoch, parts)) = &self.parts {
            out.extend_from_slice(&epoch.0.to_le_bytes());
            out.extend_from_slice(&parts.count.to_le_bytes());
            out.extend_from_slice(&parts.hash.0);
        }
        out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
        out
    }

    /// Parses a memo; no bytes at all are the memo of a source that knows nothing yet.
    ///
    /// # Errors
    /// Where the bytes are not a whole memo.
    pub fn decode(bytes: &[u8]) -> Result<Self, MemoError> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let (fixed, rest) = bytes.split_first_chunk::<FIXED_BYTES>().ok_or(MemoError::Length)?;
        if fixed[..4] != MAGIC || !(1..=VERSION).contains(&fixed[4]) || fixed[7] > u8::from(fixed[4] > 1) {
            return Err(MemoError::Version);
        }
        let (acked, sent) = (usize::from(fixed[5]), usize::from(fixed[6]));
        let heads_bytes = (acked + sent) * HEAD_BYTES;
        let parts_bytes = usize::from(fixed[7]) * PARTS_BYTES;
        if acked > ACKED_MAX || sent > SENT_MAX || rest.len() != heads_bytes + parts_bytes + CRC_BYTES {
            return Err(MemoError::Length);
        }
        let (summed, crc) = bytes.split_at(bytes.len() - CRC_BYTES);
        if crc32fast::hash(summed).to_le_bytes() != crc {
            return Err(MemoError::Crc);
        }
        let mut heads = rest[..heads_bytes].chunks_exact(HEAD_BYTES).map(|entry| Head {
            epoch: Epoch(u64::from_le_bytes(entry[..8].try_into().expect("eight bytes"))),
            hash: FrameHash(entry[8..].try_into().expect("32 bytes")),
        });
        let generation = u64::from_le_bytes(fixed[8..].try_into().expect("eight bytes"));
        Ok(Self {
            generation: (generation != 0).then_some(Generation(generation)),
            acked: heads.by_ref().take(acked).collect(),
            sent: heads.collect(),
            parts: rest[heads_bytes..].first_chunk::<PARTS_BYTES>().filter(|_| parts_bytes > 0).map(decode_parts),
        })
    }
}

fn decode_parts(bytes: &[u8; PARTS_BYTES]) -> (Epoch, PartChain) {
    let (epoch, rest) = bytes.split_first_chunk().expect("eight bytes");
    let (count, hash) = rest.split_first_chunk().expect("four bytes");
    let hash = FrameHash(hash.try_into().expect("32 bytes"));
    (Epoch(u64::from_le_bytes(*epoch)), PartChain { count: u32::from_le_bytes(*count), hash })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(epoch: u64) -> Head {
        Head { epoch: Epoch(epoch), hash: FrameHash([epoch as u8; 32]) }
    }

    const PARTS: PartChain = PartChain { count: 7, hash: FrameHash([9; 32]) };

    fn full() -> Memo {
        let mut memo = Memo { generation: Some(Generation(3)), ..Memo::default() };
        (1..=40).for_each(|epoch| memo.acked(head(epoch)));
        (41..=60).for_each(|epoch| memo.committing(head(epoch)));
        memo.part_acked(Epoch(61), PARTS);
        memo
    }

    #[test]
    fn a_memo_comes_back_and_fits() {
        for memo in [Memo::default(), full()] {
            let bytes = memo.encode();
            assert!(bytes.len() <= MEMO_BYTES_MAX);
            assert_eq!(Memo::decode(&bytes), Ok(memo));
        }
        assert_eq!(Memo::decode(&[]), Ok(Memo::default()));
        assert_eq!((full().acked.len(), full().sent.len()), (ACKED_MAX, SENT_MAX));
    }

    #[test]
    fn flips_cuts_and_tails_are_refused() {
        let bytes = full().encode();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Memo::decode(&flipped).is_err(), "bit {bit}");
        }
        for len in 1..bytes.len() {
            assert!(Memo::decode(&bytes[..len]).is_err(), "cut to {len}");
        }
        assert!(Memo::decode(&[bytes.as_slice(), &[0]].concat()).is_err());
    }

    #[test]
    fn the_targets_head_becomes_the_sources() {
        let parts = Some((Epoch(4), PARTS));
        let mut memo = Memo {
            generation: Some(Generation(1)),
            acked: vec![head(2), head(1)],
            sent: vec![head(4), head(3)],
            parts,
        };
        memo.opened(Generation(1), Some(head(3)), parts);
        assert_eq!((memo.head(), memo.sent.as_slice()), (Some(head(3)), [head(4)].as_slice()));
        assert_eq!(memo.parts, parts);
        memo.opened(Generation(2), Some(head(1)), None);
        assert_eq!((memo.acked.as_slice(), memo.sent.len(), memo.parts), ([head(1)].as_slice(), 0, None));
        memo.opened(Generation(3), Some(head(9)), None);
        assert_eq!(memo.acked, [head(9), head(1)]);
        memo.part_acked(Epoch(10), PARTS);
        memo.acked(head(10));
        assert_eq!(memo.parts, None, "the point has taken them in");
        memo.opened(Generation(4), None, None);
        assert_eq!(memo, Memo { generation: Some(Generation(4)), ..Memo::default() });
    }

    #[test]
    fn commits_under_way_stay_known_where_the_target_has_no_point_yet() {
        let mut memo = Memo { generation: Some(Generation(1)), sent: vec![head(1)], ..Memo::default() };
        memo.opened(Generation(1), None, None);
        assert_eq!(memo.sent, [head(1)], "it goes again, and may be acked unheard");
        memo.opened(Generation(2), None, None);
        assert_eq!(memo.sent, [], "fenced off");
    }

    #[test]
    fn a_memo_of_version_1_is_read() {
        let memo = Memo { parts: None, ..full() };
        let mut bytes = memo.encode();
        bytes[4] = 1;
        let summed = bytes.len() - CRC_BYTES;
        let crc = crc32fast::hash(&bytes[..summed]).to_le_bytes();
        bytes[summed..].copy_from_slice(&crc);
        assert_eq!(Memo::decode(&bytes), Ok(memo));
    }
}
