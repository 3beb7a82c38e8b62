//! A naive oracle, a block map per point, against what the index serves over random histories.

mod journal_support;

use cdp_protocol::session::target::{Claim, Ruling};
use cdp_protocol::units::{Block, Epoch, Extent, FrameHash, Generation, Head, Timestamp, VolumeSlot};
use cdp_seams::storage::sim::SimStorage;
use cdp_seams::storage::{Storage, SystemStorage};
use cdp_target::journal::{Fork, GroupJournal, GroupView, JournalError, JournalLimits, short_claim};
use cdp_target::restore::point::{Content, ReadError};
use cdp_target::verify::verify;
use journal_support::{BLOCKS, Cell, Source, check, identity, key};
use proptest::prelude::{ProptestConfig, any, prop_assert, prop_assert_eq, proptest};
use std::path::Path;
use std::sync::Arc;

const FOLDER: &str = "/store/branch/main";

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Overlapping extents, holes, unreadable blocks, parts, abandoned attempts, generations, segments of any size.
    #[test]
    fn every_point_is_what_was_sent(seed in any::<u64>(), segment_bytes_max in 1500_u64..60_000, steps in 1_u64..40) {
        let disk = SimStorage::new(seed);
        let limits = JournalLimits { segment_bytes_max };
        let mut journal =
            GroupJournal::create(Arc::new(disk.clone()), Path::new(FOLDER), identity(), limits).expect("made");
        let mut source = Source::new(seed);
        for _ in 0..steps {
            source.step(&mut journal).expect("no fault is set");
        }
        // What was appended and not synced is not shown.
        let shown = journal.view().points().count();
        prop_assert!(shown >= source.acked_points);
        source.sync(&mut journal).expect("no fault is set");
        check(&journal.view(), &source.points, |_| true);
        let beside = Arc::new(GroupView::open(Arc::new(disk.clone()), Path::new(FOLDER)).expect("a view"));
        check(&beside, &source.points, |at| at % 4 == 0);
        let report = verify(&beside, Some(&(&key()).into()), None, &mut |_| {}).expect("verified");
        prop_assert_eq!(report.damages, vec![]);
        prop_assert_eq!(report.points, source.points.len() as u64);
        drop(journal);
        let (journal, _) = GroupJournal::open(Arc::new(disk), Path::new(FOLDER), limits).expect("opened");
        check(&journal.view(), &source.points, |at| at % 4 == 1);
        any_window(&journal.view(), &source);
    }
}

/// Any window gives what the whole gives.
fn any_window(view: &Arc<GroupView>, source: &Source) {
    let Some(point) = source.points.last() else { return };
    let image = view.image(point.head.epoch, &key()).expect("an image");
    for _ in 0..20 {
        let volume = source.below(2) as usize;
        let start = source.below(u64::from(BLOCKS[volume])) as u32;
        let count = 1 + source.below(u64::from(BLOCKS[volume] - start)) as u32;
        let extent = Extent::new(Block(start), count).expect("within");
        let mut at = start;
        let read = image.read_blocks(VolumeSlot(volume as u16), extent, &mut |piece, content| {
            assert_eq!(piece.start.0, at);
            at += piece.count;
            let expected = &point.cells[volume][piece.start.0 as usize];
            let kind = match content {
                Content::Zero => Cell::Zero,
                Content::Unreadable => Cell::Unreadable,
                Content::Bytes(bytes) => {
                    assert_eq!(bytes.len() as u64, piece.to_bytes());
                    Cell::Filled(u64::from_le_bytes(*bytes.first_chunk().expect("a block")))
                }
            };
            assert_eq!(kind, *expected);
        });
        let cells = &point.cells[volume][start as usize..(start + count) as usize];
        match read {
            Ok(()) => assert!(at == start + count && !cells.contains(&Cell::NotCovered)),
            Err(ReadError::NotCovered { .. }) => assert!(cells.contains(&Cell::NotCovered)),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn points_are_found_by_number_time_and_label_and_marks_last() {
    let disk = SimStorage::new(9);
    let limits = JournalLimits { segment_bytes_max: 4000 };
    let open = || GroupJournal::open(Arc::new(disk.clone()), Path::new(FOLDER), limits).expect("opened").0;
    let mut journal =
        GroupJournal::create(Arc::new(disk.clone()), Path::new(FOLDER), identity(), limits).expect("made");
    let mut source = Source::new(9);
    for _ in 0..20 {
        source.step(&mut journal).expect("no fault is set");
    }
    source.sync(&mut journal).expect("no fault is set");
    let some = source.points[source.points.len() / 2].head;
    assert!(journal.made_in(some).expect("read").is_some());
    for strange in [Head { epoch: Epoch(9999), ..some }, Head { hash: FrameHash([9; 32]), ..some }] {
        assert_eq!(journal.made_in(strange).expect("read"), None);
    }
    assert!(journal.label(Epoch(9999), Some("nothing")).is_err());
    journal.label(some.epoch, Some("before-upgrade")).expect("labelled");
    journal.pin(some.epoch, true).expect("pinned");
    assert!(matches!(journal.resolve("1"), Err(JournalError::NotForked)));
    let claim = Claim { generation: Generation(1), head: Head { epoch: Epoch(7), hash: FrameHash([0xab; 32]) } };
    let fork = Fork { claim, host: "north".into(), at: Timestamp(5) };
    journal.freeze("fork", Some(fork.clone())).expect("frozen");
    journal.freeze("again", Some(fork)).expect("known");
    let lineage = journal.lineage().clone();
    drop(journal);
    let journal = open();
    assert_eq!(journal.frozen(), Some("fork"));
    assert!(!lineage.lines().is_empty() && *journal.lineage() == lineage);
    let view = journal.view();
    let labelled = view.point_labelled("before-upgrade").expect("read").expect("a point");
    assert_eq!((labelled.epoch, labelled.pinned), (some.epoch, true));
    let points: Vec<_> = view.points().map(|point| point.expect("a point")).collect();
    assert_eq!(view.newest().expect("read").as_ref(), points.last());
    for time in [0, 1000, 1005, 1020, 99_999] {
        let found = view.point_at_or_before(Timestamp(time)).expect("read").map(|point| point.epoch);
        let expected = points.iter().rev().find(|point| point.cut_time.0 <= time).map(|point| point.epoch);
        assert_eq!(found, expected, "at {time}");
    }
    let mut journal = journal;
    source.make(false, 2);
    assert!(source.send(&mut journal, 0, 1).is_err(), "frozen");

    let ours = journal.synced_head().expect("points");
    let ours = Claim { generation: journal.chain().generation(), head: ours };
    let known = [short_claim(ours), "1/7:abababababab".to_owned()];
    for wrong in ["9999", "7:ac", "x", "2/7", "/7", "1/7:ac"] {
        let error = journal.resolve(wrong).expect_err("no history ends there");
        assert!(matches!(&error, JournalError::NoHistory { known: named, .. } if *named == known), "{error}");
    }
    for named in ["7", "1/7", "1/7:ab", "7:AB"] {
        assert_eq!(journal.resolve(named).expect("resolved"), claim, "{named}");
    }
    drop(journal);
    let mut journal = open();
    assert_eq!(journal.frozen(), None);
    assert_eq!(*journal.ruling(), Ruling { chosen: Some(claim), left: vec![ours] });
    journal.resolve(&short_claim(ours)).expect("another choice, before anybody came");
    assert_eq!(*journal.ruling(), Ruling { chosen: Some(ours), left: vec![claim] });
    source.grant(&mut journal).expect("granted");
    assert_eq!(*journal.ruling(), Ruling { chosen: None, left: vec![claim] });
    assert!(matches!(journal.resolve("7"), Err(JournalError::NotForked)));
}

#[test]
fn a_real_file_system_keeps_a_history_and_a_reader_beside_the_writer_sees_what_was_synced() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().join("branch/main");
    let storage: Arc<dyn Storage> = Arc::new(SystemStorage);
    let limits = JournalLimits { segment_bytes_max: 8000 };
    let mut journal = GroupJournal::create(Arc::clone(&storage), &folder, identity(), limits).expect("made");
    assert!(GroupJournal::create(Arc::clone(&storage), &folder, identity(), limits).is_err(), "there is one already");
    let mut source = Source::new(3);
    for _ in 0..15 {
        source.step(&mut journal).expect("a working disk");
        let beside = Arc::new(GroupView::open(Arc::clone(&storage), &folder).expect("a view"));
        check(&beside, &source.points[..source.acked_points], |at| at + 1 == source.acked_points);
    }
    source.sync(&mut journal).expect("a working disk");
    drop(journal);
    let (journal, report) = GroupJournal::open(storage, &folder, limits).expect("opened");
    assert_eq!((report.torn_bytes, report.damages.len()), (0, 0));
    check(&journal.view(), &source.points, |_| true);
}

/// A block that could not be read is a warning of every point up to the one before it was written again.
#[test]
fn a_point_warns_of_blocks_that_stand_unreadable() {
    for segment_bytes_max in [600, 1 << 20] {
        let disk = SimStorage::new(1);
        let limits = JournalLimits { segment_bytes_max };
        let made = GroupJournal::create(Arc::new(disk), Path::new(FOLDER), identity(), limits);
        let (mut journal, mut source) = (made.expect("made"), Source::new(1));
        source.grant(&mut journal).expect("granted");
        for epoch in 1..=10_u64 {
            let cells = match epoch {
                5 => vec![(0, 3, Cell::Unreadable), (1, 4, Cell::Unreadable), (0, 3, Cell::Unreadable)],
                6 => vec![(0, 4, Cell::Filled(6)), (1, 3, Cell::Zero)],
                7 => vec![(1, 4, Cell::Zero)],
                8 => vec![(0, 3, Cell::Filled(8))],
                _ => vec![(0, 9, Cell::Filled(epoch))],
            };
            // Those of 5 come in a part: no meter of a commit counts them.
            if epoch == 5 {
                source.make_of(true, &cells);
                source.send(&mut journal, 0, usize::MAX).expect("sent");
            }
            source.make_of(false, if epoch == 5 { &[] } else { &cells });
            source.send(&mut journal, 0, usize::MAX).expect("sent");
            source.sync(&mut journal).expect("synced");
        }
        check(&journal.view(), &source.points, |_| true);
        let points = cdp_target::catalog::points_of(&journal.view()).expect("listed");
        let warned: Vec<_> =
            points.iter().filter_map(|point| Some((point.epoch.0, point.warning.as_deref()?))).collect();
        let blocks = |count: u64| format!("{count} blocks unreadable at the source");
        assert_eq!(warned, [(5, blocks(2).as_str()), (6, blocks(2).as_str()), (7, blocks(1).as_str())]);
    }
}
