//! What a group's store says that it holds, by sealed digests: always that of its newest point, from wherever it stands.

mod journal_support;

use cdp_protocol::holding::{self, ANSWER_BYTES_MAX, Held, Holding, QUESTION_BLOCKS_MAX};
use cdp_protocol::units::{Block, Extent, GroupId, Head, Timestamp, VolumeSlot};
use cdp_seams::random::SimRandom;
use cdp_seams::storage::sim::SimStorage;
use cdp_seams::storage::{Storage, read_all, replace};
use cdp_target::journal::{GroupJournal, GroupView, JournalLimits};
use cdp_target::prune::{CHUNK_BYTES_MAX, Prune};
use cdp_target::restore::keyring::Keyring;
use cdp_target::retention::Ladder;
use journal_support::{Cell, ModelPoint, Source, block_of, identity, key};
use std::path::Path;
use std::sync::Arc;

const FOLDER: &str = "/store/branch/main";
const LIMITS: JournalLimits = JournalLimits { segment_bytes_max: 5000 };

fn made(seed: u64) -> (SimStorage, GroupJournal, Source) {
    let disk = SimStorage::new(seed);
    let made = GroupJournal::create(Arc::new(disk.clone()), Path::new(FOLDER), identity(), LIMITS);
    let (mut journal, mut source) = (made.expect("made"), Source::new(seed));
    while source.points.len() < 6 {
        source.step(&mut journal).expect("no fault is set");
    }
    source.sync(&mut journal).expect("no fault is set");
    (disk, journal, source)
}

/// All holdings of a volume, asked for as a source does: on from where the last answer ended.
fn holdings(view: &GroupView, head: Head, slot: VolumeSlot, blocks: u32) -> Vec<(Extent, Held)> {
    let (mut told, mut at) = (Vec::new(), 0);
    while at < blocks {
        let asked = Extent::new(Block(at), (blocks - at).min(QUESTION_BLOCKS_MAX)).expect("some blocks");
        let answer = view.holdings(head, slot, asked).expect("told").expect("the newest point");
        assert!(!answer.is_empty(), "the answer gets on");
        assert!(answer.iter().map(|holding| holding.held.bytes()).sum::<usize>() <= ANSWER_BYTES_MAX);
        for Holding { count, held } in answer {
            told.push((Extent::new(Block(at), count).expect("some blocks"), held));
            at += count;
        }
    }
    assert_eq!(at, blocks, "no answer goes beyond what was asked");
    told
}

/// Whether a store says of every block just what the newest point holds.
fn check(view: &GroupView, point: &ModelPoint) {
    let (group, digest_key) = (identity().group, key().digest_key());
    for (volume, cells) in point.cells.iter().enumerate() {
        let slot = VolumeSlot(volume as u16);
        for (blocks, held) in holdings(view, point.head, slot, cells.len() as u32) {
            let cells = &cells[blocks.start.0 as usize..][..blocks.count as usize];
            match &held {
                Held::Nothing => assert!(cells.iter().all(|cell| *cell == Cell::NotCovered), "{blocks:?}: {cells:?}"),
                Held::Hole => assert!(cells.iter().all(|cell| *cell == Cell::Zero), "{blocks:?}: {cells:?}"),
                Held::Unreadable => {
                    assert!(cells.iter().all(|cell| *cell == Cell::Unreadable), "{blocks:?}: {cells:?}");
                }
                Held::Damaged => panic!("{blocks:?} are not damaged"),
                Held::Frame { header, digests } => {
                    let opened = holding::open(&group, slot, blocks, (header, digests), &key()).expect("opens");
                    let digest = |cell: &Cell| match cell {
                        Cell::Filled(fill) => digest_key.digest(&block_of(*fill)),
                        other => panic!("{blocks:?} have content: {other:?}"),
                    };
                    assert_eq!(opened, cells.iter().map(digest).collect::<Vec<_>>(), "{blocks:?}");
                    assert!(holding::open(&GroupId([9; 16]), slot, blocks, (header, digests), &key()).is_err());
                }
            }
        }
    }
}

/// From the journal, from packs that were sealed anew, and from packs of whole frames, where the target has no key.
#[test]
fn the_newest_point_is_told_wherever_its_blocks_stand() {
    for seed in 0..30 {
        let (_, mut journal, source) = made(seed);
        let newest = source.points.last().expect("a point");
        check(&journal.view(), newest);
        let has_key = seed % 2 == 0;
        let keys = Keyring::from(&key());
        let now = Timestamp(source.time + 1);
        let settings = Prune {
            ladder: &Ladder { every_s: 0, hourly_s: 0, daily_s: 0, weekly_s: 0 },
            now,
            wall: now,
            keys: has_key.then_some(&keys),
            random: &SimRandom::new(seed),
            segment_bytes_max: LIMITS.segment_bytes_max,
            chunk_bytes_max: CHUNK_BYTES_MAX,
            checkpoint_share: 0.5,
            keep_only_newest: true,
        };
        let pruned = settings.run(journal.view(), &mut journal, &mut |_| true, &mut |_, _| {}).expect("pruned");
        assert!(pruned.points > 0, "older points went");
        check(&journal.view(), newest);
    }
}

#[test]
fn of_a_point_that_is_not_the_newest_nothing_is_told() {
    let (_, journal, source) = made(1);
    let blocks = Extent::new(Block(0), 10).expect("ten blocks");
    let view = journal.view();
    for point in &source.points[..source.points.len() - 1] {
        assert_eq!(view.holdings(point.head, VolumeSlot(0), blocks).expect("told"), None);
    }
    let newest = source.points.last().expect("a point").head;
    let other = Head { hash: source.points[0].head.hash, ..newest };
    assert_eq!(view.holdings(other, VolumeSlot(0), blocks).expect("told"), None, "another history");
    let beyond = view.holdings(newest, VolumeSlot(9), blocks).expect("told").expect("the newest point");
    assert_eq!(beyond, [Holding { count: 10, held: Held::Nothing }], "a volume that it does not have");
}

/// A frame that rotted below its index: the target reads it again to answer, and says so.
#[test]
fn a_frame_that_is_not_as_it_was_written_is_told_to_be_damaged() {
    let (disk, journal, source) = made(2);
    let newest = source.points.last().expect("a point");
    let slot = VolumeSlot(0);
    let all = newest.cells[0].len() as u32;
    let before = holdings(&journal.view(), newest.head, slot, all);
    let (blocks, held) = before.iter().find(|(_, held)| matches!(held, Held::Frame { .. })).expect("content");
    let Held::Frame { header, .. } = held else { unreachable!("it was looked for") };
    drop(journal);
    let folder = Path::new(FOLDER).join("journal");
    let is_hit = disk.list(&folder).expect("listed").iter().any(|name| {
        let path = folder.join(name);
        let mut bytes = read_all(&disk, &path, 1 << 20).expect("read");
        let Some(at) = bytes.windows(header.len()).position(|window| window == header.as_slice()) else { return false };
        // The content, behind the header.
        bytes[at + header.len()] ^= 1;
        replace(&disk, &path, &bytes).is_ok()
    });
    assert!(is_hit, "the frame is in a segment");
    let (journal, _) = GroupJournal::open(Arc::new(disk), Path::new(FOLDER), LIMITS).expect("opened");
    let after = holdings(&journal.view(), newest.head, slot, all);
    let of = |told: &[(Extent, Held)]| told.iter().find(|(extent, _)| extent.start == blocks.start).cloned();
    assert_eq!(of(&after).map(|(_, held)| held), Some(Held::Damaged), "{blocks:?}");
}
