//! What a point's source is told when it asks it back, held against a model of every point: with the key and without, from the
//! journal, from packs that were sealed anew and from packs of whole frames.

mod journal_support;

use cdp_protocol::codec::{open_content, open_digests};
use cdp_protocol::frame::{self, Encoding};
use cdp_protocol::holding::{self, Held};
use cdp_protocol::recall::{Answer, Question, Told, to_extents};
use cdp_protocol::seal::Digest;
use cdp_protocol::units::{BLOCK_BYTES, Block, Extent, Head, Timestamp, VolumeSlot};
use cdp_seams::random::SimRandom;
use cdp_seams::storage::sim::SimStorage;
use cdp_target::journal::{GroupJournal, GroupView, JournalLimits};
use cdp_target::prune::{CHUNK_BYTES_MAX, Prune};
use cdp_target::restore::keyring::Keyring;
use cdp_target::restore::recalled::Recalled;
use cdp_target::retention::Ladder;
use journal_support::{Cell, GROUP, ModelPoint, Source, block_of, identity, key};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

const FOLDER: &str = "/store/branch/main";
const LIMITS: JournalLimits = JournalLimits { segment_bytes_max: 5000 };

fn made(seed: u64, points: usize) -> (GroupJournal, Source) {
    let disk = SimStorage::new(seed);
    let made = GroupJournal::create(Arc::new(disk), Path::new(FOLDER), identity(), LIMITS);
    let (mut journal, mut source) = (made.expect("made"), Source::new(seed));
    while source.points.len() < points {
        source.step(&mut journal).expect("no fault is set");
    }
    source.sync(&mut journal).expect("no fault is set");
    (journal, source)
}

fn ask(point: &mut Recalled, view: &GroupView, slot: VolumeSlot, question: &Question) -> Vec<Answer> {
    let mut answers = Vec::new();
    let mut tell = |answer| {
        answers.push(answer);
        true
    };
    point.answer(view, slot, question, &mut tell).expect("answered");
    answers
}

/// Some of the blocks of a volume, as extents that do not touch.
fn some(random: &SimRandom, blocks: u32) -> Vec<Extent> {
    let (mut extents, mut at) = (Vec::new(), random.below(4) as u32);
    while at < blocks {
        let count = (1 + random.below(6) as u32).min(blocks - at);
        extents.push(Extent { start: Block(at), count });
        at += count + 1 + random.below(5) as u32;
    }
    extents
}

fn named(extents: &[Extent]) -> Vec<(Block, u32)> {
    extents.iter().map(|extent| (extent.start, extent.count)).collect()
}

/// What is told to be held, block by block; content that the point does not have anywhere is damage.
fn told(answers: Vec<Answer>, slot: VolumeSlot, asked: &[Block], point: &ModelPoint) -> Vec<Cell> {
    let (digest_key, mut cells) = (key().digest_key(), Vec::new());
    let fills = point.cells.iter().flatten().filter_map(|cell| match cell {
        Cell::Filled(fill) => Some(*fill),
        _ => None,
    });
    let by_digest: BTreeMap<_, _> = fills.map(|fill| (digest_key.digest(&block_of(fill)), fill)).collect();
    let filled = |digest: &Digest| by_digest.get(digest).map_or(Cell::Damaged, |fill| Cell::Filled(*fill));
    for answer in answers {
        let Answer::Holdings { runs } = answer else { panic!("{answer:?}") };
        for run in runs {
            match run {
                Told::Digests(digests) => cells.extend(digests.iter().map(filled)),
                Told::Run(count, Held::Frame { header, digests }) => {
                    let blocks = Extent { start: asked[cells.len()], count };
                    let opened = holding::open(&GROUP, slot, blocks, (&header, &digests), &key()).expect("opens");
                    cells.extend(opened.iter().map(filled));
                }
                Told::Run(count, held) => {
                    let cell = match held {
                        Held::Nothing => Cell::NotCovered,
                        Held::Hole => Cell::Zero,
                        Held::Unreadable => Cell::Unreadable,
                        _ => Cell::Damaged,
                    };
                    cells.extend(vec![cell; count as usize]);
                }
            }
        }
    }
    cells
}

/// The content that is told, by block; and whether each frame has just the blocks it is told for.
fn content(answers: Vec<Answer>, slot: VolumeSlot) -> (BTreeMap<u32, Vec<u8>>, bool) {
    let (mut content, mut is_exact, mut bytes, mut of) = (BTreeMap::new(), true, Vec::new(), Vec::new());
    for answer in answers {
        match answer {
            Answer::Frame { blocks, bytes: piece, more } => {
                if bytes.is_empty() {
                    of = to_extents(&blocks).expect("extents");
                }
                bytes.extend(piece);
                if more {
                    continue;
                }
                let frame = frame::decode(&GROUP, &bytes).expect("a frame");
                let attempt_key = key().attempt_key(&frame.header.attempt);
                assert_eq!(frame.header.volume, slot);
                let opened = open_content(&frame, &attempt_key).expect("opens");
                let held = frame.header.extents.iter().flat_map(|extent| extent.blocks());
                is_exact &= frame.header.extents == of;
                if frame.header.encoding.has_content() {
                    let digests = open_digests(&frame, &attempt_key).expect("digests");
                    for ((block, bytes), digest) in held.zip(opened.chunks(BLOCK_BYTES)).zip(digests) {
                        assert_eq!(key().digest_key().digest(bytes), digest);
                        if of.iter().any(|extent| extent.blocks().any(|wanted| wanted == block)) {
                            assert_eq!(content.insert(block.0, bytes.to_vec()), None, "{block} comes twice");
                        }
                    }
                } else if frame.header.encoding == Encoding::Hole {
                    content.extend(
                        of.iter().flat_map(|extent| extent.blocks()).map(|block| (block.0, vec![0; BLOCK_BYTES])),
                    );
                }
                bytes.clear();
            }
            Answer::Lost { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(bytes.is_empty(), "every frame has its end");
    (content, is_exact)
}

fn check(view: &Arc<GroupView>, point: &ModelPoint, keys: Option<Keyring>, random: &SimRandom) {
    let has_key = keys.is_some();
    let mut recalled = Recalled::new(Arc::clone(view), point.head.epoch, keys, random).expect("opened");
    assert_eq!((recalled.head(), recalled.has_key()), (point.head, has_key));
    for (volume, cells) in point.cells.iter().enumerate() {
        let (slot, extents) = (VolumeSlot(volume as u16), some(random, cells.len() as u32));
        let asked: Vec<Block> = extents.iter().flat_map(|extent| extent.blocks()).collect();
        let expected: Vec<Cell> = asked.iter().map(|block| cells[block.0 as usize]).collect();
        let answers = ask(&mut recalled, view, slot, &Question::Holdings { extents: named(&extents) });
        assert_eq!(told(answers, slot, &asked, point), expected, "point {} volume {volume}", point.head.epoch);
        let answers = ask(&mut recalled, view, slot, &Question::Content { extents: named(&extents) });
        let (content, is_exact) = content(answers, slot);
        assert!(is_exact || !has_key, "with the key only what was asked for is told");
        for (block, cell) in asked.iter().zip(&expected) {
            match (content.get(&block.0), cell) {
                (Some(bytes), Cell::Filled(fill)) => assert_eq!(*bytes, block_of(*fill), "block {block}"),
                (Some(bytes), Cell::Zero) => assert!(bytes.iter().all(|byte| *byte == 0), "block {block}"),
                (None, Cell::NotCovered | Cell::Unreadable) => {}
                // Zeros of a checkpoint are in no frame; whoever asks knows by the holdings.
                (None, Cell::Zero) => assert!(!has_key, "block {block}"),
                (got, cell) => panic!("block {block} is {cell:?}, told {:?}", got.is_some()),
            }
        }
    }
}

#[test]
fn every_point_is_told_as_it_is_with_the_key_and_without() {
    for seed in 0..40 {
        let (mut journal, mut source) = made(seed, 8);
        let (random, keys) = (SimRandom::new(seed), Keyring::from(&key()));
        for point in &source.points {
            check(&journal.view(), point, Some(keys.clone()), &random);
            check(&journal.view(), point, None, &random);
        }
        // What is kept stands on a checkpoint from here on, sealed anew or of whole frames.
        let pinned = source.points[5].head.epoch;
        journal.pin(pinned, true).expect("pinned");
        let now = Timestamp(source.time + 1);
        let settings = Prune {
            ladder: &Ladder { every_s: 0, hourly_s: 0, daily_s: 0, weekly_s: 0 },
            now,
            wall: now,
            keys: seed.is_multiple_of(2).then_some(&keys),
            random: &random,
            segment_bytes_max: LIMITS.segment_bytes_max,
            chunk_bytes_max: CHUNK_BYTES_MAX,
            checkpoint_share: 0.5,
            keep_only_newest: true,
        };
        settings.run(journal.view(), &mut journal, &mut |_| true, &mut |_, _| {}).expect("pruned");
        for point in source.points.clone().iter().filter(|point| !journal.view().is_removed(point.head.epoch)) {
            check(&journal.view(), point, Some(keys.clone()), &random);
            check(&journal.view(), point, None, &random);
        }
        // A view that was opened before goes on to give what it had.
        let (before, newest) = (journal.view(), source.points.last().expect("a point").clone());
        while source.points.len() < 10 {
            source.step(&mut journal).expect("no fault is set");
        }
        check(&before, &newest, Some(keys.clone()), &random);
    }
}

#[test]
fn a_point_that_was_removed_is_not_opened_and_the_others_are_listed() {
    let (mut journal, source) = made(3, 6);
    let random = SimRandom::new(3);
    journal_support::prune_to_newest(&mut journal, Timestamp(source.time + 1), &random, LIMITS.segment_bytes_max);
    let (view, first, newest) = (journal.view(), source.points[0].head, source.points.last().expect("a point").head);
    assert!(Recalled::new(Arc::clone(&view), first.epoch, None, &random).is_err(), "it is gone");
    let mut point = Recalled::new(Arc::clone(&view), newest.epoch, None, &random).expect("opened");
    let listed: Vec<_> = ask(&mut point, &view, VolumeSlot(0), &Question::Points)
        .into_iter()
        .flat_map(|answer| match answer {
            Answer::Points { points } => points.into_iter().map(|point| point.epoch),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(listed.last(), Some(&newest.epoch));
    assert!(!listed.contains(&first.epoch));
    // A history that is not ours has no changes to tell.
    let since = Head { hash: first.hash, ..newest };
    let unknown = ask(&mut point, &view, VolumeSlot(0), &Question::Changes { since });
    assert_eq!(unknown, [Answer::ChangesUnknown]);
}
