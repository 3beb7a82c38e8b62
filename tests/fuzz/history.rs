//! The bytes of a group's history: frames, what is sealed in them, records.

use crate::{Check, Format};
use cdp_protocol::codec::{Draft, FrameListHasher, Sealer, open_content};
use cdp_protocol::frame::{self, Encoding, FIXED_BYTES, Header, Kind};
use cdp_protocol::layout::{Content, Layout, Partition, Table};
use cdp_protocol::limits::CONTENT_BYTES_MAX;
use cdp_protocol::packer::{Packer, Packing};
use cdp_protocol::record::volume_meters::VolumeMeters;
use cdp_protocol::record::{Begin, Commit, MAC_BYTES, Meters, PartChain, PartEnd, Predecessor, Synced, Volume};
use cdp_protocol::seal::{DataKey, Section, TAG_BYTES};
use cdp_protocol::units::{
    AttemptId, BLOCK_BYTES, Block, Class, Epoch, Extent, FrameHash, Generation, GroupId, Head, KeyId, Sequence,
    Timestamp, VolumeSlot,
};

pub(crate) const GROUP: GroupId = GroupId([7; 16]);
const ATTEMPT: AttemptId = AttemptId([5; 16]);
pub(crate) const DATA_KEY: [u8; 32] = [3; 32];

fn sealer() -> Sealer {
    Sealer::new(GROUP, Epoch(9), Generation(2), ATTEMPT, &DataKey::new(DATA_KEY))
}

/// A frame with content that is packed in some way.
fn packed(packer: &mut Packer, content: &[u8]) -> Vec<u8> {
    let mut draft = Draft::default();
    draft.push(content);
    let extents = extents(&[(0, (content.len() / BLOCK_BYTES) as u32)]);
    sealer().content_of(packer, VolumeSlot(0), Sequence(1), extents, draft).into()
}

fn extents(of: &[(u32, u32)]) -> Vec<Extent> {
    of.iter().map(|(start, count)| Extent { start: Block(*start), count: *count }).collect()
}

pub(crate) fn crc(group: &GroupId, bytes: &[u8]) -> [u8; 4] {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&group.0);
    hasher.update(bytes);
    hasher.finalize().to_le_bytes()
}

/// Puts the two sums of the frame at the start of `bytes` in order; gives its length, if it has one.
pub(crate) fn mend_frame(group: &GroupId, bytes: &mut [u8]) -> Option<usize> {
    let word = |at: usize, bytes: &[u8]| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?) as usize);
    let header_end = word(12, bytes)?.checked_sub(4).filter(|end| *end >= FIXED_BYTES)?;
    let payload_at = header_end + 4;
    let sum = crc(group, bytes.get(..header_end)?);
    bytes.get_mut(header_end..payload_at)?.copy_from_slice(&sum);
    let payload_end = payload_at.checked_add(word(16, bytes)?)?;
    let sum = crc(group, bytes.get(payload_at..payload_end)?);
    bytes.get_mut(payload_end..payload_end + 4)?.copy_from_slice(&sum);
    Some(payload_end + 4)
}

/// A frame, of every kind and encoding.
pub(crate) struct FrameFormat;

impl Format for FrameFormat {
    const CHECK: Check = Check::Crc;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let (sealer, slot) = (sealer(), VolumeSlot(3));
        let noise = noise_of(BLOCK_BYTES);
        let mut frames = vec![
            sealer.content(slot, Sequence(1), extents(&[(1, 2), (u32::MAX, 1)]), &[6; 3 * BLOCK_BYTES]),
            sealer.content(slot, Sequence(2), extents(&[(8, 1)]), &noise),
            sealer.bare(Encoding::Hole, slot, Sequence(3), extents(&[(0, 16_384), (20_000, 1)])),
            sealer.bare(Encoding::Unreadable, slot, Sequence(4), extents(&[(7, 1)])),
        ];
        frames.push(sealer.begin(&begin()));
        frames.push(sealer.record(Kind::PartEnd, Sequence(5), part_end().encode()));
        frames.push(sealer.record(Kind::Commit, Sequence(6), commit().encode()));
        frames.push(packed(&mut Packer::new(Packing::zstd(3)), &[6; 2 * BLOCK_BYTES]));
        frames
    }

    fn mend(bytes: &mut [u8]) {
        let _ = mend_frame(&GROUP, bytes);
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let frame = frame::decode(&GROUP, bytes).ok()?;
        assert!(frame.header.blocks() > 0 || frame.header.kind != Kind::Extents);
        assert_eq!(frame.bytes.len(), frame.header.frame_len());
        let mut again = frame::encode(&GROUP, &frame.header, frame.payload);
        again.extend_from_slice(&bytes[frame.bytes.len()..]);
        Some(again)
    }
}

fn noise_of(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    cdp_tests::files::noise(1, &mut bytes);
    bytes
}

/// What a frame of a source that holds the key has inside: a source may be hostile.
///
/// Bytes: encoding, blocks, length of the digests, then what is sealed.
pub(crate) struct ContentFormat;

impl ContentFormat {
    fn specimen(packing: Packing, content: &[u8]) -> Vec<u8> {
        let blocks = content.len() / BLOCK_BYTES;
        let bytes = packed(&mut Packer::new(packing), content);
        let frame = frame::decode(&GROUP, &bytes).expect("a frame");
        let sealed_len = (frame.header.payload_len - frame.header.digests_len) as usize;
        let mut sealed = frame.payload[..sealed_len].to_vec();
        let key = DataKey::new(DATA_KEY).attempt_key(&ATTEMPT);
        let plain = key.open(Sequence(1), Section::Content, frame.associated_data(), &mut sealed).expect("our seal");
        [&[frame.header.encoding as u8, blocks as u8, 0], &*plain].concat()
    }
}

impl Format for ContentFormat {
    const CHECK: Check = Check::Nothing;
    const ONE_FORM: bool = false;

    fn specimens() -> Vec<Vec<u8>> {
        let text: Vec<u8> = (0..BLOCK_BYTES as u32 / 4).flat_map(|word| (word / 9).to_le_bytes()).collect();
        vec![
            Self::specimen(Packing::Lz4, &vec![0x55; CONTENT_BYTES_MAX]),
            Self::specimen(Packing::Lz4, &text),
            Self::specimen(Packing::Lz4, &noise_of(BLOCK_BYTES)),
            vec![Encoding::Hole as u8, 1, 0],
            Self::specimen(Packing::zstd(1), &vec![0x55; CONTENT_BYTES_MAX]),
            Self::specimen(Packing::zstd(19), &text),
        ]
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let (&[encoding, blocks, digests_len], plain) = bytes.split_first_chunk()?;
        let encoding = [Encoding::Raw, Encoding::Lz4, Encoding::Zstd, Encoding::Hole, Encoding::Unreadable]
            .into_iter()
            .find(|known| *known as u8 == encoding)?;
        let content_len = if encoding.has_content() { usize::from(blocks) * BLOCK_BYTES } else { 0 };
        let digests_len = usize::from(digests_len).min(plain.len());
        let header = Header {
            kind: Kind::Extents,
            encoding,
            volume: VolumeSlot(0),
            epoch: Epoch(9),
            generation: Generation(2),
            attempt: ATTEMPT,
            sequence: Sequence(1),
            resealed: false,
            payload_len: (plain.len() + TAG_BYTES) as u32,
            content_len: content_len as u32,
            digests_len: digests_len as u32,
            extents: Vec::from_iter(Extent::new(Block(0), u32::from(blocks))),
        };
        let key = DataKey::new(DATA_KEY).attempt_key(&ATTEMPT);
        let (sealed, digests) = plain.split_at(plain.len() - digests_len);
        let mut payload = sealed.to_vec();
        key.seal(Sequence(1), Section::Content, &header.associated_data(), &mut payload, 0);
        payload.extend_from_slice(digests);
        let bytes = frame::encode(&GROUP, &header, &payload);
        let frame = frame::decode(&GROUP, &bytes).ok()?;
        let content = open_content(&frame, &key).ok()?;
        assert_eq!(content.len(), content_len, "the content is as long as the header says");
        Some(content)
    }

    fn memory_max(len: usize) -> usize {
        (64 << 10) + 2 * CONTENT_BYTES_MAX + 16 * len
    }
}

fn begin() -> Begin {
    let volume = |slot: u16, name: &str| Volume { slot: VolumeSlot(slot), size_bytes: 123_456_789, name: name.into() };
    Begin { key: KeyId([1; 8]), volumes: vec![volume(0, "root"), volume(7, "data")] }
}

fn head() -> Head {
    Head { epoch: Epoch(8), hash: FrameHash([4; 32]) }
}

fn part_end() -> PartEnd {
    PartEnd {
        predecessor: Some(PartChain { count: 2, hash: FrameHash([6; 32]) }),
        frames: FrameListHasher::default().list(),
    }
}

fn layout() -> Layout {
    let partition = Partition {
        number: 1,
        start_bytes: 1 << 20,
        size_bytes: 6 << 20,
        kind: [0x0f; 16],
        id: [3; 16],
        is_active: false,
        content: Content::Ext,
        name: "root".into(),
    };
    let (table, partitions) = (Table::Gpt([4; 16]), vec![partition]);
    Layout { sector_bytes: 512, size_bytes: 8 << 20, table, has_boot_code: true, partitions }
}

fn commit() -> Commit {
    Commit {
        predecessor: Some(Predecessor { head: head(), attempt: AttemptId([2; 16]) }),
        frames: part_end().frames,
        parts: part_end().predecessor,
        first_epoch: Epoch(7),
        after_rollback_to: Some(Epoch(1)),
        class: Class::Application,
        cut_time: Timestamp(-5),
        meters: Meters { cut_rounds: 2, dirty_blocks: 3, ..Meters::default() },
        label: Some("before-upgrade".into()),
        volumes: vec![(
            VolumeSlot(1),
            VolumeMeters { written_bytes: Some(9), dirty_blocks: 3, ..VolumeMeters::default() },
        )],
        layouts: vec![(VolumeSlot(1), layout())],
    }
}

/// The records: a byte that tells which, then the payload.
pub(crate) struct RecordFormat;

impl RecordFormat {
    fn of(kind: Kind, record: &[u8]) -> Vec<u8> {
        let mac = if kind == Kind::Synced { 0 } else { MAC_BYTES };
        [&[kind as u8], record, &vec![0xaa; mac]].concat()
    }
}

impl Format for RecordFormat {
    const CHECK: Check = Check::Nothing;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let first = Commit { predecessor: None, parts: None, after_rollback_to: None, label: None, ..commit() };
        let synced = Synced { segment: 3, offset: 4096, head: Some(head()), time: Timestamp(1) };
        vec![
            Self::of(Kind::Begin, &begin().encode()),
            Self::of(Kind::PartEnd, &part_end().encode()),
            Self::of(Kind::PartEnd, &PartEnd { predecessor: None, ..part_end() }.encode()),
            Self::of(Kind::Commit, &commit().encode()),
            Self::of(Kind::Commit, &first.encode()),
            Self::of(Kind::Synced, &synced.encode()),
            Self::of(Kind::Synced, &Synced { head: None, ..synced }.encode()),
        ]
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let (kind, payload) = bytes.split_first()?;
        let (mut again, mac_at) = if *kind == Kind::Begin as u8 {
            Begin::decode(payload).map(|(record, mac_at)| (record.encode(), mac_at)).ok()?
        } else if *kind == Kind::PartEnd as u8 {
            PartEnd::decode(payload).map(|(record, mac_at)| (record.encode(), mac_at)).ok()?
        } else if *kind == Kind::Commit as u8 {
            Commit::decode(payload).map(|(record, mac_at)| (record.encode(), mac_at)).ok()?
        } else {
            Synced::decode(payload).map(|record| (record.encode(), payload.len())).ok()?
        };
        again.extend_from_slice(&payload[mac_at..]);
        Some([&[*kind], again.as_slice()].concat())
    }
}
