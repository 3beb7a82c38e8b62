//! What the two sides say to each other, and what a source keeps of it.

use crate::{Check, Format};
use cdp_protocol::bundle::{Bundle, StoreId, Token};
use cdp_protocol::escrow::Envelope;
use cdp_protocol::holding::{Held, Holding};
use cdp_protocol::join::{JoinAnswer, JoinRefusal, JoinRequest, KnownGroup};
use cdp_protocol::limits::MESSAGE_BYTES_MAX;
use cdp_protocol::message::{
    self, GroupOpened, Instance, OpenGroup, PointSummary, RefusalReason, Resume, SourceMessage, TargetMessage, Verdict,
};
use cdp_protocol::recall::{Answer, Asked, OpenedPoint, Question, Told};
use cdp_protocol::record::{FrameList, Meters, PartChain, Volume};
use cdp_protocol::seal::DataKey;
use cdp_protocol::session::memo::Memo;
use cdp_protocol::session::source::{CommitDraft, End};
use cdp_protocol::units::{
    AttemptId, Block, Class, Epoch, FrameHash, Generation, GroupId, Head, KeyId, OfficeId, Sequence, Timestamp,
    VolumeSlot,
};
use cdp_seams::storage::{Storage, replace, sim::SimStorage};
use cdp_source::saved::{Found, Saved, SavedVolume};
use cdp_source::spool::{Index, IndexEntry, Place};
use cdp_source::state::{GroupState, StateFolder};
use roaring::RoaringBitmap;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::Path;
use std::sync::Arc;

const GROUP: GroupId = GroupId([7; 16]);

fn head(epoch: u64) -> Head {
    Head { epoch: Epoch(epoch), hash: FrameHash([epoch as u8; 32]) }
}

fn parts() -> (Epoch, PartChain) {
    (Epoch(9), PartChain { count: 2, hash: FrameHash([9; 32]) })
}

fn envelope() -> Envelope {
    Envelope { key: KeyId([1; 8]), encapsulated: vec![2; 32], sealed: vec![3; 48] }
}

fn asked(question: Question) -> SourceMessage {
    SourceMessage::AskPoint(Asked { request: 7, volume: VolumeSlot(3), question })
}

fn answer(answer: Answer) -> TargetMessage {
    TargetMessage::Answer { request: 7, answer }
}

fn again<M: Serialize + DeserializeOwned>(bytes: &[u8]) -> Option<Vec<u8>> {
    message::decode::<M>(bytes).ok().map(|message| message::encode(&message))
}

/// Room for 1 MiB of elements is made on a list's word (serde's own bound), whatever comes then; lists stand two deep.
const WORDS_MEMORY_MAX: usize = (2 << 20) + 8 * MESSAGE_BYTES_MAX;

/// What a source says.
pub(crate) struct SourceWords;

impl Format for SourceWords {
    const CHECK: Check = Check::Nothing;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let open = OpenGroup {
            group: GROUP,
            name: "main".into(),
            generation: Some(Generation(2)),
            acked: vec![head(8), head(7)],
            sent: vec![head(9)],
            parts: Some(parts()),
            parts_sent: vec![parts()],
            anew: true,
            instance: Instance { process: [4; 16], host: "office".into() },
            envelope: envelope(),
            volumes: vec![Volume { slot: VolumeSlot(0), size_bytes: 1 << 30, name: "data".into() }],
        };
        [
            SourceMessage::Hello { version: 1, software: "cdp-source 0.1.0".into(), time: Timestamp(5) },
            SourceMessage::OpenGroup(open),
            SourceMessage::Unchanged { group: GROUP, epoch: Epoch(8), as_of: Timestamp(6) },
            SourceMessage::ListPoints { request: 1, group: GROUP, after: Some(Epoch(3)) },
            SourceMessage::Ping,
            SourceMessage::ListChanges { group: GROUP, since: head(7) },
            SourceMessage::ListDigests {
                group: GROUP,
                head: head(7),
                volume: VolumeSlot(3),
                start: Block(9),
                count: 512,
            },
            SourceMessage::OpenPoint { group: GROUP, at: "2h".into() },
            asked(Question::Points),
            asked(Question::Changes { since: head(7) }),
            asked(Question::Holdings { extents: vec![(Block(7), 2), (Block(90), 1)] }),
            asked(Question::Content { extents: vec![(Block(7), 2)] }),
            asked(Question::Key),
        ]
        .map(|message| message::encode(&message))
        .to_vec()
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let is_hello = bytes.get(..4) == Some(&[0; 4]);
        assert!(is_hello || message::hello_version(bytes).is_none(), "no other message is taken for a hello");
        again::<SourceMessage>(bytes)
    }

    fn memory_max(_len: usize) -> usize {
        WORDS_MEMORY_MAX
    }
}

/// What a target says.
pub(crate) struct TargetWords;

impl Format for TargetWords {
    const CHECK: Check = Check::Nothing;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let opened = |verdict| GroupOpened {
            group: GROUP,
            generation: Generation(3),
            verdict,
            head: Some((head(8), AttemptId([5; 16]))),
            parts: Some(parts()),
            resume: Some(Resume { epoch: Epoch(9), attempt: AttemptId([6; 16]), next: Sequence(4) }),
        };
        let point = PointSummary {
            epoch: Epoch(8),
            cut_time: Timestamp(7),
            class: Class::Crash,
            label: Some("nightly".into()),
            bytes: 4096,
            cut_us: 250,
            cut_rounds: 2,
        };
        let superseded = RefusalReason::Superseded { by: "other".into(), at: Timestamp(9) };
        [
            TargetMessage::Welcome { version: 1, software: "cdp-target 0.1.0".into(), time: Timestamp(5) },
            TargetMessage::Refused { reason: "no".into(), versions: vec![1, 2] },
            TargetMessage::GroupOpened(opened(Verdict::Continue)),
            TargetMessage::GroupOpened(opened(Verdict::Rollback { to: Some(Epoch(3)) })),
            TargetMessage::GroupRefused { group: GROUP, reason: superseded },
            TargetMessage::GroupRefused { group: GROUP, reason: RefusalReason::Failed("disk".into()) },
            TargetMessage::Acked { group: GROUP, head: head(9) },
            TargetMessage::PartAcked { group: GROUP, attempt: AttemptId([6; 16]), parts: parts().1 },
            TargetMessage::Busy { group: GROUP, reason: "full".into(), retry_after_ms: 5000 },
            TargetMessage::Points { request: 1, points: vec![point.clone(), point.clone()], more: true },
            TargetMessage::Pong,
            TargetMessage::SendAgain {
                group: GROUP,
                volume: VolumeSlot(3),
                extents: vec![(Block(7), 2), (Block(90), 1)],
            },
            TargetMessage::Changes {
                group: GROUP,
                since: head(9),
                volume: VolumeSlot(3),
                extents: vec![(Block(7), 2), (Block(90), 1)],
                page: 0,
                more: true,
            },
            TargetMessage::ChangesUnknown { group: GROUP, since: head(9) },
            TargetMessage::Digests {
                group: GROUP,
                head: head(9),
                volume: VolumeSlot(3),
                start: Block(7),
                holdings: vec![
                    Holding { count: 2, held: Held::Hole },
                    Holding { count: 1, held: Held::Frame { header: vec![1; 90], digests: vec![2; 32] } },
                ],
            },
            TargetMessage::PointOpened(OpenedPoint {
                head: head(9),
                cut_time: Timestamp(7),
                class: Class::Crash,
                label: Some("nightly".into()),
                volumes: vec![Volume { slot: VolumeSlot(0), size_bytes: 1 << 30, name: "data".into() }],
                has_key: true,
            }),
            TargetMessage::PointRefused { reason: "there is no point 9".into() },
            answer(Answer::Points { points: vec![point.clone()] }),
            answer(Answer::Changed { extents: vec![(Block(7), 2)] }),
            answer(Answer::ChangesUnknown),
            answer(Answer::Holdings { runs: vec![Told::Digests(vec![[3; 16]; 2]), Told::Run(9, Held::Hole)] }),
            answer(Answer::Frame { blocks: vec![(Block(7), 2)], bytes: vec![4; 90], more: true }),
            answer(Answer::Lost { start: Block(7), count: 2, reason: "damaged".into() }),
            answer(Answer::Done),
            answer(Answer::Failed { reason: "disk".into() }),
            answer(Answer::Key { key: (&DataKey::new([5; 32])).into() }),
        ]
        .map(|message| message::encode(&message))
        .to_vec()
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        again::<TargetMessage>(bytes)
    }

    fn memory_max(_len: usize) -> usize {
        WORDS_MEMORY_MAX
    }
}

/// The join exchange: what a stranger says, and the answer to it. The first byte tells which.
pub(crate) struct JoinWords;

impl Format for JoinWords {
    const CHECK: Check = Check::Nothing;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let request = JoinRequest { store: StoreId([1; 16]), token: Token::new([2; 32]), request: vec![0x30; 200] };
        let welcome = JoinAnswer::Welcome {
            office: OfficeId([3; 16]),
            name: "north".into(),
            certificate: "-----BEGIN CERTIFICATE-----\n".into(),
            time: Timestamp(4),
            groups: vec![KnownGroup { name: "main".into(), group: GROUP }],
        };
        let refused = JoinAnswer::Refused { reason: JoinRefusal::Unknown, time: Timestamp(5) };
        let of = |which: u8, bytes: Vec<u8>| [&[which], bytes.as_slice()].concat();
        vec![of(0, message::encode(&request)), of(1, message::encode(&welcome)), of(1, message::encode(&refused))]
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let (which, bytes) = bytes.split_first()?;
        let again = if *which == 0 { again::<JoinRequest>(bytes)? } else { again::<JoinAnswer>(bytes)? };
        Some([&[*which], again.as_slice()].concat())
    }

    fn memory_max(_len: usize) -> usize {
        WORDS_MEMORY_MAX
    }
}

/// The one-time bundle.
pub(crate) struct BundleText;

impl Format for BundleText {
    const CHECK: Check = Check::Hash;
    const ONE_FORM: bool = false;

    fn specimens() -> Vec<Vec<u8>> {
        let bundle = Bundle {
            store: StoreId([1; 16]),
            targets: vec!["backup.example.org:7443".into()],
            server_names: vec!["backup.example.org".into()],
            authority: "-----BEGIN CERTIFICATE-----\n".into(),
            escrow_public: vec![9; 32],
            office: OfficeId([2; 16]),
            office_name: "north".into(),
            token: Token::new([3; 32]),
            expires: Timestamp(1_800_000_000_000),
        };
        vec![bundle.to_text().into_bytes()]
    }

    fn mend(bytes: &mut [u8]) {
        let Some(last) = bytes.windows(10).rposition(|window| window == b"\nchecksum ") else { return };
        let text = bytes[..=last].to_vec();
        // The sum is over lines that end with a line feed alone, however they ended on the way.
        let text: Vec<u8> = String::from_utf8_lossy(&text).replace("\r\n", "\n").into_bytes();
        let digits = blake3::hash(&text).to_hex();
        if let Some(place) = bytes.get_mut(last + 10..last + 74) {
            place.copy_from_slice(digits.as_bytes());
        }
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let text = Bundle::parse(bytes).ok()?.to_text();
        let again = Bundle::parse(text.as_bytes()).expect("what was written is read").to_text();
        assert_eq!(text, again);
        Some(text.into_bytes())
    }
}

/// What a source remembers of a session.
pub(crate) struct MemoFormat;

impl Format for MemoFormat {
    const CHECK: Check = Check::Crc;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let memo = Memo {
            generation: Some(Generation(3)),
            acked: vec![head(8), head(7)],
            sent: vec![head(9)],
            parts: Some(parts()),
        };
        vec![memo.encode(), Memo::default().encode()]
    }

    fn mend(bytes: &mut [u8]) {
        let Some(sum_at) = bytes.len().checked_sub(4) else { return };
        let sum = crc32fast::hash(&bytes[..sum_at]).to_le_bytes();
        bytes[sum_at..].copy_from_slice(&sum);
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let memo = Memo::decode(bytes).ok()?;
        // Nothing is a memo that knows nothing; an older version is read, and written by this one.
        let is_other_form = bytes.is_empty() || bytes[4] == 1;
        Some(if is_other_form { bytes.to_vec() } else { memo.encode() })
    }
}

/// What is in a source's spool.
pub(crate) struct SpoolIndex;

impl Format for SpoolIndex {
    const CHECK: Check = Check::Crc;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let entry = |number: u8, end| IndexEntry {
            epoch: Epoch(7),
            attempt: AttemptId([number; 16]),
            parts_before: u32::from(number),
            list: FrameList { count: 2, hash: FrameHash([number; 32]) },
            end,
            place: Place { slabs: vec![3, u32::from(number)], frames: vec![100, 70_000] },
        };
        let draft = CommitDraft {
            class: Class::Crash,
            cut_time: Timestamp(1_800_000_000_000),
            meters: Meters { cut_rounds: 2, dirty_blocks: 9, ..Meters::default() },
            first_epoch: Epoch(4),
            after_rollback_to: None,
            label: Some("nightly".into()),
            volumes: Vec::new(),
            layouts: Vec::new(),
        };
        let entries = vec![entry(0, End::Part), entry(1, End::Commit(draft))];
        let index = |entries| Index { number: 5, group: GROUP, generation: Generation(3), slab_bytes: 65536, entries };
        vec![index(entries).encode(), index(Vec::new()).encode()]
    }

    fn mend(bytes: &mut [u8]) {
        let Some(len) = bytes.get(52..56).map(|len| u32::from_le_bytes(len.try_into().expect("four bytes"))) else {
            return;
        };
        let Some((summed, rest)) = bytes.split_at_mut_checked(len as usize) else { return };
        if let Some(place) = rest.get_mut(..4) {
            place.copy_from_slice(&crc32fast::hash(summed).to_le_bytes());
        }
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let encoded = Index::decode(bytes)?.encode();
        // What is left behind it of a longer one means nothing.
        assert_eq!(encoded, bytes[..encoded.len()]);
        (encoded.len() == bytes.len()).then_some(encoded)
    }

    /// An attempt takes more in memory than its few bytes.
    fn memory_max(len: usize) -> usize {
        (64 << 10) + 32 * len
    }
}

/// What a source's state folder says of a group.
pub(crate) struct GroupStateText;

impl GroupStateText {
    fn folder() -> (Arc<SimStorage>, StateFolder) {
        let disk = Arc::new(SimStorage::new(1));
        let folder = Path::new("/state/groups/main");
        disk.create_dir_all(folder).expect("made");
        (Arc::clone(&disk), StateFolder::new(disk, Path::new("/state")))
    }
}

impl Format for GroupStateText {
    const CHECK: Check = Check::Nothing;
    const ONE_FORM: bool = false;

    fn specimens() -> Vec<Vec<u8>> {
        let mut state = GroupState {
            group: GROUP,
            key: KeyId([1; 8]),
            next_slot: 2,
            escrow_key_hash: "00".repeat(32),
            envelope: envelope(),
            size_bytes: std::collections::BTreeMap::new(),
        };
        state.set_protected_size_bytes(VolumeSlot(0), 1 << 30);
        vec![toml::to_string(&state).expect("TOML").into_bytes()]
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let (disk, state) = Self::folder();
        replace(&*disk, Path::new("/state/groups/main/group.toml"), bytes).expect("written");
        let read = state.group("main").ok()??;
        state.set_group("main", &read).expect("written");
        assert_eq!(state.group("main").expect("read").as_ref(), Some(&read), "what was written is read");
        Some(toml::to_string(&read).expect("TOML").into_bytes())
    }

    /// The parser keeps spans and keys of its own.
    fn memory_max(len: usize) -> usize {
        (256 << 10) + 256 * len
    }
}

/// What a source leaves behind for its next boot.
pub(crate) struct SavedRecord;

const SAVED: &[u8] = include_bytes!("../testdata/saved/1/record");

impl SavedRecord {
    fn specimen() -> Saved {
        let mut dirty: RoaringBitmap = (0..70_000).chain([200_000, 262_144]).collect();
        dirty.optimize();
        let found = Found {
            size_bytes: (1 << 30) + 512,
            nature: "from sector 63, serial S-1, partition 8f2c".into(),
            dirty,
            samples: (0..20).map(|number| (Block(number * 13_000), [number as u8; 16])).collect(),
        };
        Saved {
            group: GROUP,
            tracker: "0123456789abcdef".repeat(2),
            boot: "6f3c2a52-7f0c-4a8e-9d55-0d9a3f1c2b7e".into(),
            saved_at: Timestamp(1_764_000_000_000),
            memo: Memo { generation: Some(Generation(3)), acked: vec![head(8)], ..Memo::default() }.encode(),
            volumes: vec![
                SavedVolume {
                    slot: VolumeSlot(0),
                    found: Err("it is mounted, or in use as part of something else".into()),
                },
                SavedVolume { slot: VolumeSlot(3), found: Ok(found) },
            ],
        }
    }
}

impl Format for SavedRecord {
    const CHECK: Check = Check::Hash;
    /// The offsets in a bitmap are not read.
    const ONE_FORM: bool = false;

    fn specimens() -> Vec<Vec<u8>> {
        let nothing = Saved { volumes: Vec::new(), memo: Vec::new(), ..Self::specimen() };
        vec![Self::specimen().encode(), nothing.encode()]
    }

    fn mend(bytes: &mut [u8]) {
        let Some(hash_at) = bytes.len().checked_sub(32) else { return };
        let hash = blake3::hash(&bytes[..hash_at]);
        bytes[hash_at..].copy_from_slice(hash.as_bytes());
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        Some(Saved::decode(bytes)?.encode())
    }

    /// A run of a bitmap takes some bytes, and 8 KiB once it is read: no more in all than a bit for each block of the volume.
    fn memory_max(len: usize) -> usize {
        (256 << 10) + 1024 * len
    }
}

#[test]
fn a_saved_record_of_version_1_reads_as_it_did() {
    assert_eq!(Saved::decode(SAVED), Some(SavedRecord::specimen()));
    assert_eq!(SavedRecord::specimen().encode(), SAVED);
}
