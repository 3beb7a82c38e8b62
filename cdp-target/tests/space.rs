//! What pruning gives back: with the key files hold at most 1.15 times what the points that stay need, without it whole frames.

use cdp_protocol::codec::{FrameListHasher, Sealer};
use cdp_protocol::escrow::Envelope;
use cdp_protocol::frame::{self, Encoding, Kind};
use cdp_protocol::record::{Begin, Commit, Meters, Predecessor, Volume};
use cdp_protocol::seal::DataKey;
use cdp_protocol::session::lineage::Line;
use cdp_protocol::units::{
    AttemptId, BLOCK_BYTES, Block, Class, Epoch, Extent, Generation, GroupId, KeyId, Sequence, Timestamp, VolumeSlot,
};
use cdp_seams::random::{Random, SimRandom, array};
use cdp_seams::storage::SystemStorage;
use cdp_target::journal::{GroupIdentity, GroupJournal, JournalLimits};
use cdp_target::prune::{CHUNK_BYTES_MAX, Prune, sweep};
use cdp_target::restore::keyring::Keyring;
use cdp_target::retention::Ladder;
use cdp_target::verify::verify;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

const GROUP: GroupId = GroupId([7; 16]);
const SEGMENT_BYTES_MAX: u64 = 1 << 20;
/// Of the volume; content is in the first of them.
const BLOCKS: u32 = 20_000;
const CONTENT_BLOCKS: u32 = 2_000;
const HOT_BLOCKS: u64 = 800;
const MINUTE_MS: i64 = 60_000;
/// Every quarter of an hour a point, for three days.
const POINTS: u64 = 4 * 24 * 3;
/// Every point for six hours, hourly for a day, daily for two.
const LADDER: Ladder = Ladder { every_s: 6 * 3600, hourly_s: 24 * 3600, daily_s: 48 * 3600, weekly_s: 0 };

fn volume() -> Volume {
    Volume { slot: VolumeSlot(0), size_bytes: u64::from(BLOCKS) * BLOCK_BYTES as u64, name: "data".into() }
}

fn received(epoch: u64) -> Timestamp {
    Timestamp(1_800_000_000_000 + epoch as i64 * 15 * MINUTE_MS)
}

/// Appends a point that writes these blocks, with content that does not compress; the first is all the rest as well, as holes.
fn append(journal: &mut GroupJournal, random: &SimRandom, key: &DataKey, epoch: u64, blocks: &BTreeSet<u32>) {
    let sealer = Sealer::new(GROUP, Epoch(epoch), Generation(1), AttemptId(array(random)), key);
    let mut frames = vec![sealer.begin(&Begin { key: KeyId([1; 8]), volumes: vec![volume()] })];
    let extent = |start, count| Extent::new(Block(start), count).expect("an extent");
    if epoch == 1 {
        let holes =
            vec![extent(CONTENT_BLOCKS, 10_000), extent(CONTENT_BLOCKS + 10_000, BLOCKS - CONTENT_BLOCKS - 10_000)];
        frames.push(sealer.bare(Encoding::Hole, VolumeSlot(0), Sequence(1), holes));
    }
    for part in blocks.iter().collect::<Vec<_>>().chunks(32) {
        let mut content = vec![0; part.len() * BLOCK_BYTES];
        random.fill(&mut content);
        let extents = part.iter().map(|block| extent(**block, 1)).collect();
        frames.push(sealer.content(VolumeSlot(0), Sequence(frames.len() as u64), extents, &content));
    }
    let mut list = FrameListHasher::default();
    for frame in &frames {
        list.push(&frame::hash(frame));
    }
    let commit = Commit {
        predecessor: journal.chain().head().map(|(head, attempt)| Predecessor { head, attempt }),
        frames: list.list(),
        parts: None,
        first_epoch: Epoch(epoch),
        after_rollback_to: None,
        class: Class::Crash,
        cut_time: received(epoch),
        meters: Meters::default(),
        label: None,
        volumes: vec![],
        layouts: Vec::new(),
    };
    frames.push(sealer.record(Kind::Commit, Sequence(frames.len() as u64), commit.encode()));
    for bytes in &frames {
        let frame = frame::decode(&GROUP, bytes).expect("a frame we made");
        journal.append(&frame, received(epoch)).expect("it follows");
    }
    journal.sync().expect("synced");
}

/// Bytes that the points that stay need: the image of the first of them, and for each other the blocks written since the one before.
fn needed_bytes(history: &BTreeMap<u64, BTreeSet<u32>>, kept: &[Epoch]) -> u64 {
    let mut blocks = u64::from(CONTENT_BLOCKS);
    for pair in kept.windows(2) {
        let between = history.range(pair[0].0 + 1..=pair[1].0).flat_map(|(_, blocks)| blocks);
        blocks += between.collect::<BTreeSet<_>>().len() as u64;
    }
    blocks * BLOCK_BYTES as u64
}

/// Three days of points, pruned every six hours; gives how much more than is needed the files hold at each prune, at worst.
fn three_days(with_key: bool) -> f64 {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().join("group");
    let key = DataKey::new([3; 32]);
    let envelope = Envelope { key: KeyId([1; 8]), encapsulated: vec![2; 32], sealed: vec![3; 48] };
    let identity = GroupIdentity { group: GROUP, office: "branch".into(), name: "main".into(), envelope };
    let limits = JournalLimits { segment_bytes_max: SEGMENT_BYTES_MAX };
    let mut journal = GroupJournal::create(Arc::new(SystemStorage), &folder, identity, limits).expect("made");
    journal.begin(Line { generation: Generation(1), after: None, from: None }).expect("begun");
    let random = SimRandom::new(17);
    let keyring = Keyring::from(&key);
    let mut history = BTreeMap::new();
    let mut worst: f64 = 0.0;
    for epoch in 1..=POINTS {
        let hot = (0..20 + random.below(40)).map(|_| random.below(HOT_BLOCKS) as u32).collect();
        let blocks = if epoch == 1 { (0..CONTENT_BLOCKS).collect() } else { hot };
        append(&mut journal, &random, &key, epoch, &blocks);
        history.insert(epoch, blocks);
        if epoch % 24 > 0 {
            continue;
        }
        let prune = Prune {
            ladder: &LADDER,
            now: received(epoch),
            wall: received(epoch),
            keys: Some(&keyring).filter(|_| with_key),
            random: &random,
            segment_bytes_max: SEGMENT_BYTES_MAX,
            chunk_bytes_max: CHUNK_BYTES_MAX,
            checkpoint_share: 0.5,
            keep_only_newest: false,
        };
        let view = journal.view();
        let done = prune.run(view, &mut journal, &mut |_| true, &mut |_, _| {}).expect("pruned");
        assert!(!done.leased);
        let kept: Vec<Epoch> = journal.view().points().map(|point| point.expect("a point").epoch).collect();
        let needed = needed_bytes(&history, &kept);
        let held = sweep::held_bytes(&journal.view()).expect("counted");
        let factor = held as f64 / needed as f64;
        println!("{epoch} points, {} stay: {needed} bytes needed, {held} held: {factor:.3}", kept.len());
        worst = worst.max(factor);
    }
    let report = verify(&journal.view(), Some(&keyring), None, &mut |_| {}).expect("verified");
    assert_eq!(report.damages, vec![]);
    assert!(journal.view().manifest().floor.is_some(), "the first days went altogether");
    worst
}

#[test]
fn files_hold_little_more_than_the_points_that_stay_need() {
    let (with_key, without) = (three_days(true), three_days(false));
    println!("files hold at most {with_key:.3} times what is needed with the key, {without:.3} times without");
    assert!(with_key <= 1.15, "{with_key}");
}
