//! The spool's index: which attempts are in the file, where, and how each ends; and the memo beside it (`docs/format/spool.md`).
//!
//! An index is written whole, in the place of the one before the last, so the last one stands until the next is written. It is
//! believed only while the memo in the file is the one that lives as long as the tracking: whatever was told to the target or heard
//! of it since, by whomever, shows there. Not a promise beyond the machine: nothing is synced.

use super::file::Place;
use cdp_protocol::limits::VOLUMES_MAX;
use cdp_protocol::record::layouts::LAYOUTS_BYTES_MAX;
use cdp_protocol::record::{Commit, FrameList, MAC_BYTES};
use cdp_protocol::session::memo::{MEMO_BYTES_MAX, Memo};
use cdp_protocol::session::source::{CommitDraft, End};
use cdp_protocol::units::{AttemptId, Epoch, FrameHash, Generation, GroupId};

const MAGIC: [u8; 4] = *b"CDPQ";
const MEMO_MAGIC: [u8; 4] = *b"CDPP";
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 56;
const CRC_BYTES: usize = 4;
/// Attempts of an index at most.
const ENTRIES_MAX: u32 = 1 << 16;
/// Frames of an attempt at most: a capture of 4 GiB in single blocks of all volumes.
const FRAMES_MAX: u32 = (1 << 20) + VOLUMES_MAX as u32;
/// Slabs of an attempt at most: all there are.
const SLABS_MAX: u32 = 1 << 16;
/// Bytes of a commit's record without its keyed hash at most: a group of the most volumes is told of in 5 kB, and in as many bytes as layouts
/// may have.
const COMMIT_BYTES_MAX: usize = 8192 + LAYOUTS_BYTES_MAX;

/// An index.
#[derive(Debug, PartialEq)]
pub struct Index {
    /// Its number: the higher of two counts.
    pub number: u64,
    /// The group.
    pub group: GroupId,
    /// What everything is sealed under.
    pub generation: Generation,
    /// Bytes of a slab.
    pub slab_bytes: u64,
    /// The attempts, in the order in which they are sent.
    pub entries: Vec<IndexEntry>,
}

/// An attempt that is in the file.
#[derive(Debug, PartialEq)]
pub struct IndexEntry {
    /// Its epoch.
    pub epoch: Epoch,
    /// The attempt.
    pub attempt: AttemptId,
    /// Parts of its epoch before it.
    pub parts_before: u32,
    /// The list of its frames.
    pub list: FrameList,
    /// How it ends.
    pub end: End,
    /// Where its frames are.
    pub place: Place,
}

impl Index {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; HEADER_BYTES];
        for entry in &self.entries {
            entry.encode(&mut out);
        }
        out[..4].copy_from_slice(&MAGIC);
        out[4] = VERSION;
        out[8..16].copy_from_slice(&self.number.to_le_bytes());
        out[16..32].copy_from_slice(&self.group.0);
        out[32..40].copy_from_slice(&self.generation.0.to_le_bytes());
        out[40..48].copy_from_slice(&self.slab_bytes.to_le_bytes());
        out[48..52].copy_from_slice(&(self.entries.len() as u32).to_le_bytes());
        let len = out.len() as u32;
        out[52..56].copy_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
        out
    }

    /// Reads an index at the beginning of `bytes`; `None` where there is none, or a damaged one.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let header = bytes.first_chunk::<HEADER_BYTES>()?;
        let len = u32::from_le_bytes(header[52..56].try_into().ok()?) as usize;
        if header[..4] != MAGIC || header[4] != VERSION || header[5..8] != [0; 3] || len < HEADER_BYTES {
            return None;
        }
        let (summed, crc) = bytes.get(..len.checked_add(CRC_BYTES)?)?.split_at(len);
        if crc != crc32fast::hash(summed).to_le_bytes() {
            return None;
        }
        let mut input = Input(&summed[8..]);
        let number = input.u64()?;
        let group = GroupId(input.take()?);
        let (generation, slab_bytes) = (Generation(input.u64()?), input.u64()?);
        let count = input.u32()?;
        input.u32()?;
        if count > ENTRIES_MAX {
            return None;
        }
        let entries = (0..count).map(|_| IndexEntry::decode(&mut input)).collect::<Option<Vec<_>>>()?;
        input.0.is_empty().then_some(Self { number, group, generation, slab_bytes, entries })
    }
}

impl IndexEntry {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.epoch.0.to_le_bytes());
        out.extend_from_slice(&self.attempt.0);
        out.extend_from_slice(&self.parts_before.to_le_bytes());
        out.extend_from_slice(&self.list.count.to_le_bytes());
        out.extend_from_slice(&self.list.hash.0);
        let commit = match &self.end {
            End::Part => Vec::new(),
            End::Commit(draft) => to_record(draft, self.list).encode(),
        };
        out.extend_from_slice(&(commit.len() as u16).to_le_bytes());
        out.extend_from_slice(&commit);
        for numbers in [&self.place.slabs, &self.place.frames] {
            out.extend_from_slice(&(numbers.len() as u32).to_le_bytes());
            for number in numbers {
                out.extend_from_slice(&number.to_le_bytes());
            }
        }
    }

    fn decode(input: &mut Input<'_>) -> Option<Self> {
        let (epoch, attempt) = (Epoch(input.u64()?), AttemptId(input.take()?));
        let parts_before = input.u32()?;
        let list = FrameList { count: input.u64()?, hash: FrameHash(input.take()?) };
        let commit_len = usize::from(u16::from_le_bytes(input.take()?));
        let commit = input.bytes(commit_len)?;
        let end = if commit.is_empty() { End::Part } else { End::Commit(from_record(commit, list)?) };
        let place = Place { slabs: input.numbers(SLABS_MAX)?, frames: input.numbers(FRAMES_MAX)? };
        (place.frames.len() as u64 == list.count).then_some(Self { epoch, attempt, parts_before, list, end, place })
    }
}

/// A commit as it will be, but for what stands before it.
fn to_record(draft: &CommitDraft, frames: FrameList) -> Commit {
    Commit {
        predecessor: None,
        frames,
        parts: None,
        first_epoch: draft.first_epoch,
        after_rollback_to: draft.after_rollback_to,
        class: draft.class,
        cut_time: draft.cut_time,
        meters: draft.meters,
        label: draft.label.clone(),
        volumes: draft.volumes.clone(),
        layouts: draft.layouts.clone(),
    }
}

fn from_record(bytes: &[u8], list: FrameList) -> Option<CommitDraft> {
    if bytes.len() > COMMIT_BYTES_MAX {
        return None;
    }
    // In a frame a keyed hash stands behind it.
    let (commit, end) = Commit::decode(&[bytes, &[0; MAC_BYTES]].concat()).ok()?;
    let is_draft = end == bytes.len() && commit.predecessor.is_none() && commit.parts.is_none();
    (is_draft && commit.frames == list).then_some(CommitDraft {
        class: commit.class,
        cut_time: commit.cut_time,
        meters: commit.meters,
        first_epoch: commit.first_epoch,
        after_rollback_to: commit.after_rollback_to,
        label: commit.label,
        volumes: commit.volumes,
        layouts: commit.layouts,
    })
}

/// The page with the memo.
pub(super) fn encode_memo(memo: &Memo) -> Vec<u8> {
    let memo = memo.encode();
    let mut out = MEMO_MAGIC.to_vec();
    out.extend_from_slice(&[VERSION, 0]);
    out.extend_from_slice(&(memo.len() as u16).to_le_bytes());
    out.extend_from_slice(&memo);
    out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
    out
}

/// The memo of a page; `None` where it is damaged.
pub(super) fn decode_memo(page: &[u8]) -> Option<Memo> {
    let header = page.first_chunk::<8>()?;
    let len = usize::from(u16::from_le_bytes([header[6], header[7]]));
    if header[..4] != MEMO_MAGIC || header[4..6] != [VERSION, 0] || len > MEMO_BYTES_MAX {
        return None;
    }
    let (summed, crc) = page.get(..8 + len + CRC_BYTES)?.split_at(8 + len);
    if crc != crc32fast::hash(summed).to_le_bytes() {
        return None;
    }
    Memo::decode(&summed[8..]).ok()
}

/// What is left to be read.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// A count, which has to be within its bound and what is left, and so many numbers.
    fn numbers(&mut self, max: u32) -> Option<Vec<u32>> {
        let count = self.u32().filter(|count| *count <= max)?;
        let bytes = self.bytes((count as usize).checked_mul(4)?)?;
        Some(bytes.as_chunks::<4>().0.iter().map(|number| u32::from_le_bytes(*number)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_protocol::record::volume_meters::VolumeMeters;
    use cdp_protocol::record::{Meters, PartChain};
    use cdp_protocol::units::{Class, Head, Timestamp, VolumeSlot};

    fn entry(number: u8, end: End) -> IndexEntry {
        IndexEntry {
            epoch: Epoch(7),
            attempt: AttemptId([number; 16]),
            parts_before: u32::from(number),
            list: FrameList { count: 2, hash: FrameHash([number; 32]) },
            end,
            place: Place { slabs: vec![3, u32::from(number)], frames: vec![100, 70_000] },
        }
    }

    fn index() -> Index {
        let draft = CommitDraft {
            class: Class::Application,
            cut_time: Timestamp(-5),
            meters: Meters { cut_rounds: 2, dirty_blocks: 9, ..Meters::default() },
            first_epoch: Epoch(4),
            after_rollback_to: Some(Epoch(2)),
            label: Some("before-upgrade".into()),
            volumes: vec![(VolumeSlot(3), VolumeMeters { dirty_blocks: 9, ..VolumeMeters::default() })],
            layouts: Vec::new(),
        };
        Index {
            number: 12,
            group: GroupId([1; 16]),
            generation: Generation(3),
            slab_bytes: 65536,
            entries: vec![entry(0, End::Part), entry(1, End::Commit(draft))],
        }
    }

    #[test]
    fn an_index_comes_back_whatever_is_left_behind_it() {
        let mut bytes = index().encode();
        assert_eq!(Index::decode(&bytes), Some(index()));
        bytes.extend_from_slice(&[0xa5; 100]);
        assert_eq!(Index::decode(&bytes), Some(index()));
        assert_eq!(Index::decode(&[]), None);
    }

    #[test]
    fn any_flipped_bit_and_any_end_too_soon_are_noticed() {
        let bytes = index().encode();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << (at % 8);
            assert_eq!(Index::decode(&changed), None, "byte {at}");
            assert_eq!(Index::decode(&bytes[..at]), None, "{at} bytes");
        }
    }

    #[test]
    fn the_memo_comes_back_and_a_damaged_one_does_not() {
        let head = Head { epoch: Epoch(7), hash: FrameHash([2; 32]) };
        let parts = Some((Epoch(8), PartChain { count: 1, hash: FrameHash([3; 32]) }));
        let memo = Memo { generation: Some(Generation(2)), acked: vec![head], sent: Vec::new(), parts };
        let page = encode_memo(&memo);
        assert_eq!(decode_memo(&[page.as_slice(), &[0; 50]].concat()), Some(memo));
        for at in 0..page.len() {
            let mut changed = page.clone();
            changed[at] ^= 1;
            assert_eq!(decode_memo(&changed), None, "byte {at}");
        }
        assert!(
            encode_memo(&Memo::default()).len() < 100
                && MEMO_BYTES_MAX + 12 <= super::super::file::MEMO_PAGE_BYTES as usize
        );
    }
}
