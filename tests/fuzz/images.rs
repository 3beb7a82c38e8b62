//! The files of checkpoints: packs' headers, image indexes and their records.

use crate::{Check, Format};
use cdp_protocol::record::Volume;
use cdp_protocol::units::{AttemptId, Epoch, FrameHash, Generation, GroupId, Head, Timestamp, VolumeSlot};
use cdp_target::checkpoint::index::{
    Header as ImageHeader, RECORD_BYTES, SliceContent, SliceRecord, encode, slices_of, take_record,
};
use cdp_target::journal::file::{FileId, Sealed, SliceId};
use cdp_target::journal::index::CommitEntry;
use cdp_target::journal::pack::Header as PackHeader;

const GROUP: GroupId = GroupId([7; 16]);
const SLICE: SliceId = SliceId { slot: VolumeSlot(1), slice: 0, epoch: Epoch(9) };

/// The first bytes of a pack.
pub(crate) struct PackStart;

impl Format for PackStart {
    const CHECK: Check = Check::Crc;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let files = [FileId::Segment { number: 3, revision: 8 }, FileId::Slice(SLICE)];
        let header = |file: FileId| PackHeader {
            group: GROUP,
            file,
            repacked: matches!(file, FileId::Slice(_)),
            frames_end: 4711,
            frames_hash: [5; 32],
        };
        files.map(|file| header(file).encode()).to_vec()
    }

    fn mend(bytes: &mut [u8]) {
        let Some(sum_at) = bytes.len().checked_sub(4) else { return };
        let sum = crc32fast::hash(&bytes[..sum_at]).to_le_bytes();
        bytes[sum_at..].copy_from_slice(&sum);
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let header = PackHeader::decode(bytes).ok()?;
        let mut again = header.encode();
        again.extend_from_slice(bytes.get(again.len()..)?);
        Some(again)
    }
}

/// The first bytes of an image index.
pub(crate) struct ImageStart;

/// A point of two volumes, the second of them of two slices.
fn commit() -> CommitEntry {
    let volume = |slot: u16, size_bytes: u64| Volume { slot: VolumeSlot(slot), size_bytes, name: format!("v{slot}") };
    CommitEntry {
        head: Head { epoch: Epoch(9), hash: FrameHash([3; 32]) },
        generation: Generation(2),
        attempt: AttemptId([8; 16]),
        offset: 4000,
        frame_len: 300,
        received: Timestamp(1_800_000_000_000),
        record: None,
        volumes: vec![volume(1, 1 << 20), volume(4, (64 << 20) + 1)],
    }
}

fn record(content: SliceContent) -> SliceRecord {
    SliceRecord { content, unreadable: true, lost: false, needed_bytes: 77 }
}

fn pack() -> SliceContent {
    let sealed = Sealed { id: FileId::Slice(SLICE), len: 900, frames_end: 700, footer_hash: [4; 32], points: None };
    SliceContent::Pack { sealed, repacked: true }
}

/// An index of one record a slice: its bytes, and where the records begin.
fn image() -> (Vec<u8>, usize) {
    let commit = commit();
    let slices: u32 = commit.volumes.iter().map(slices_of).sum();
    let records: Vec<SliceRecord> = (0..slices).map(|_| record(pack())).collect();
    let bytes = encode(GROUP, &commit, &records);
    let start = bytes.len() - records.len() * RECORD_BYTES;
    (bytes, start)
}

impl Format for ImageStart {
    const CHECK: Check = Check::Crc;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let (bytes, start) = image();
        vec![bytes[..start].to_vec()]
    }

    fn mend(bytes: &mut [u8]) {
        let len = bytes.get(12..).and_then(|bytes| bytes.first_chunk()).map(|len| u32::from_le_bytes(*len) as usize);
        let Some(sum_at) = len.and_then(|len| len.checked_sub(4)).filter(|at| at + 4 <= bytes.len()) else { return };
        let sum = crc32fast::hash(&bytes[..sum_at]).to_le_bytes();
        bytes[sum_at..sum_at + 4].copy_from_slice(&sum);
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let (header, len) = ImageHeader::decode(bytes).ok()?;
        assert!(len <= bytes.len());
        let mut again = encode(header.group, &header.commit, &[]);
        // Without its records it says that it has none: the count is the header's last field.
        again[len - 12..len - 4].copy_from_slice(&header.records.to_le_bytes());
        Self::mend(&mut again);
        again.extend_from_slice(&bytes[len..]);
        Some(again)
    }
}

/// A record of an image index.
pub(crate) struct ImageRecord;

impl Format for ImageRecord {
    const CHECK: Check = Check::Crc;
    const ONE_FORM: bool = false;

    fn specimens() -> Vec<Vec<u8>> {
        // A record is bound to its checkpoint and its slice: that of the commit above, and the first of its volumes.
        let (bytes, start) = image();
        vec![bytes[start..start + RECORD_BYTES].to_vec()]
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let commit = commit();
        let slot = commit.volumes.first()?.slot;
        let whole: &[u8; RECORD_BYTES] = bytes.try_into().ok()?;
        let record = take_record(whole, GROUP, commit.head.epoch, slot, 0).ok()?;
        assert!(take_record(whole, GROUP, Epoch(commit.head.epoch.0 + 1), slot, 0).is_err(), "of another checkpoint");
        assert!(take_record(whole, GROUP, commit.head.epoch, slot, 1).is_err(), "of another slice");
        Some(format!("{record:?}").into_bytes())
    }
}
