//! Checkpoints and pruning over random histories, against a model that remembers every block of every point.

mod journal_support;

use cdp_protocol::units::{Block, Epoch, Extent, Timestamp, VolumeSlot};
use cdp_seams::random::SimRandom;
use cdp_seams::storage::Storage;
use cdp_seams::storage::sim::SimStorage;
use cdp_target::checkpoint::builder::{Builder, end};
use cdp_target::journal::change::Change;
use cdp_target::journal::file::FileId;
use cdp_target::journal::manifest::{Checkpoint, SealedSegment};
use cdp_target::journal::{Damage, GroupJournal, GroupView, JournalError, JournalLimits};
use cdp_target::prune::{CHUNK_BYTES_MAX, Prune, PruneError, Pruned};
use cdp_target::restore::keyring::Keyring;
use cdp_target::retention::Ladder;
use cdp_target::verify::verify;
use journal_support::{Cell, ModelPoint, Source, identity, image_cells, key};
use proptest::prelude::{ProptestConfig, TestCaseError, any, prop_assert, prop_assert_eq, proptest};
use std::path::Path;
use std::sync::Arc;

const FOLDER: &str = "/store/branch/main";
const HOUR_MS: i64 = 3_600_000;
const LADDER: Ladder = Ladder { every_s: 4 * 3600, hourly_s: 12 * 3600, daily_s: 4 * 86_400, weekly_s: 6 * 86_400 };

fn create(disk: &SimStorage, segment_bytes_max: u64) -> GroupJournal {
    let limits = JournalLimits { segment_bytes_max };
    GroupJournal::create(Arc::new(disk.clone()), Path::new(FOLDER), identity(), limits).expect("made")
}

fn open(disk: &SimStorage, segment_bytes_max: u64) -> GroupJournal {
    let limits = JournalLimits { segment_bytes_max };
    GroupJournal::open(Arc::new(disk.clone()), Path::new(FOLDER), limits).expect("opened").0
}

fn beside(disk: &SimStorage) -> Arc<GroupView> {
    Arc::new(GroupView::open(Arc::new(disk.clone()), Path::new(FOLDER)).expect("a view"))
}

/// Makes a checkpoint and has the journal take it.
fn checkpoint(journal: &mut GroupJournal, disk: &SimStorage, epoch: Epoch, keys: Option<&Keyring>) {
    let view = journal.view();
    let random = SimRandom::new(epoch.0 + 77);
    let builder = Builder { view: &view, keys, random: &random, now: Timestamp(5) };
    let made = builder.build(epoch, &mut |_| true, &mut |_, _| {}).expect("built");
    assert!(made.needed_bytes <= made.held_bytes);
    journal.adopt(&Change::Checkpoint(made)).expect("taken");
    end(disk, Path::new(FOLDER)).expect("ended");
}

fn prune(journal: &mut GroupJournal, keys: Option<&Keyring>, now: i64, max: u64) -> Result<Pruned, PruneError> {
    prune_in_chunks(journal, keys, now, max, CHUNK_BYTES_MAX)
}

/// The same, with so many bytes of segments giving way at once.
fn prune_in_chunks(
    journal: &mut GroupJournal,
    keys: Option<&Keyring>,
    now: i64,
    max: u64,
    chunk_bytes_max: u64,
) -> Result<Pruned, PruneError> {
    let random = SimRandom::new(now as u64);
    let prune = Prune {
        ladder: &LADDER,
        now: Timestamp(now),
        wall: Timestamp(now),
        keys,
        random: &random,
        segment_bytes_max: max,
        chunk_bytes_max,
        checkpoint_share: 0.5,
        keep_only_newest: true,
    };
    let view = journal.view();
    prune.run(view, journal, &mut |_| true, &mut |_, _| {})
}

/// Checks that every point that is listed is one that was sent, and reads as the model has it.
fn check(view: &Arc<GroupView>, source: &Source, damage_allowed: bool) -> Vec<Epoch> {
    let listed: Vec<_> = view.points().map(|point| point.expect("a point")).collect();
    for point in &listed {
        let model: &ModelPoint =
            source.points.iter().find(|model| model.head.epoch == point.epoch).expect("a point that was sent");
        assert_eq!((model.head.hash, model.received), (point.hash, point.received));
        let cells = image_cells(view, point.epoch).expect("an image");
        if damage_allowed {
            journal_support::damaged_blocks(&cells, &model.cells);
            continue;
        }
        assert_eq!(point.damaged, None);
        assert_eq!(cells, *model.cells, "point {}", point.epoch);
        let standing = model.cells.iter().flatten().filter(|cell| **cell == Cell::Unreadable).count() as u64;
        assert_eq!(view.unreadable().blocks(point.epoch, &journal_support::volumes()), standing);
    }
    let overview = view.overview().expect("an overview");
    assert_eq!(overview.points, listed.len() as u64);
    assert_eq!(overview.newest.map(|(point, _)| point.epoch), listed.last().map(|point| point.epoch));
    listed.into_iter().map(|point| point.epoch).collect()
}

fn is_sound(view: &GroupView) {
    let keys: Keyring = (&key()).into();
    let report = verify(view, Some(&keys), None, &mut |_| {}).expect("verified");
    assert_eq!(report.damages, vec![]);
}

/// Checks that all is read of the journal where a pack above the floor is rotten.
fn reads_round(disk: &SimStorage, source: &Source) {
    let view = beside(disk);
    let (floor, random) = (view.manifest().floor, SimRandom::new(disk.calls()));
    let above = |file: FileId| matches!(file, FileId::Slice(slice) if Some(slice.epoch) > floor);
    for pack in view.packs().into_iter().filter(|pack| above(pack.id)) {
        let path = pack.id.path(Path::new(FOLDER));
        let bit = random.below(8 * pack.len);
        disk.flip_bit(&path, bit);
        check(&beside(disk), source, false);
        disk.flip_bit(&path, bit);
    }
}

/// A random history with checkpoints and prunes in between.
fn what_stays(seed: u64, max: u64, steps: u64, with_key: bool, chunk: u64) -> Result<(), TestCaseError> {
    let disk = SimStorage::new(seed);
    let mut journal = create(&disk, max);
    let mut source = Source::new(seed);
    let keyring: Keyring = (&key()).into();
    let mut expected: Vec<Epoch> = Vec::new();
    for _ in 0..steps {
        let known = source.points.len();
        source.time += match source.below(12) {
            0 => 60 * HOUR_MS,
            halves => halves as i64 % 3 * HOUR_MS / 2,
        };
        source.step(&mut journal).expect("no fault is set");
        expected.extend(source.points[known..].iter().map(|point| point.head.epoch));
        // With and without the key, one after the other.
        let keys = Some(&keyring).filter(|_| with_key || source.below(2) == 0);
        match source.below(10) {
            0 | 1 if !source.points.is_empty() => {
                source.sync(&mut journal).expect("no fault is set");
                let listed: Vec<Epoch> = journal.view().points().map(|point| point.expect("a point").epoch).collect();
                let at = listed[source.below(listed.len() as u64) as usize];
                if journal.view().manifest().floor.is_none_or(|floor| floor <= at) {
                    checkpoint(&mut journal, &disk, at, keys);
                }
            }
            2 | 3 => {
                source.sync(&mut journal).expect("no fault is set");
                let pruned = prune_in_chunks(&mut journal, keys, source.time, max, chunk).expect("pruned");
                reads_round(&disk, &source);
                let listed = check(&journal.view(), &source, false);
                prop_assert!(listed.iter().all(|epoch| expected.contains(epoch)), "nothing comes back");
                prop_assert_eq!(expected.len() - listed.len(), pruned.points as usize);
                expected = listed;
            }
            4 => {
                source.sync(&mut journal).expect("no fault is set");
                drop(journal);
                journal = open(&disk, max);
            }
            _ => {}
        }
    }
    source.sync(&mut journal).expect("no fault is set");
    prop_assert_eq!(&check(&journal.view(), &source, false), &expected);
    prop_assert_eq!(&check(&beside(&disk), &source, false), &expected);
    reads_round(&disk, &source);
    is_sound(&beside(&disk));
    // The chain is whole: commits are never pruned.
    for point in &source.points {
        prop_assert!(journal.made_in(point.head).expect("read").is_some(), "{}", point.head.epoch);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_stays_reads_as_it_was_sent(seed in any::<u64>(), max in 3000_u64..60_000, steps in 5_u64..60, with_key in any::<bool>(), chunk in 1_u64..100_000) {
        what_stays(seed, max, steps, with_key, chunk)?;
    }
}

#[test]
fn histories_that_found_something_are_kept() {
    // Blocks below the floor that were read again since still counted as unreadable.
    what_stays(14_208_890_870_332_252_079, 9171, 38, true, CHUNK_BYTES_MAX).expect("sound");
}

/// A history of 40 points over segments of a few frames.
fn history(seed: u64, max: u64) -> (SimStorage, GroupJournal, Source) {
    let disk = SimStorage::new(seed);
    let mut journal = create(&disk, max);
    let mut source = Source::new(seed);
    for _ in 0..40 {
        source.time += HOUR_MS;
        source.step(&mut journal).expect("no fault is set");
    }
    source.sync(&mut journal).expect("no fault is set");
    (disk, journal, source)
}

#[test]
fn a_checkpoint_is_read_with_the_whole_journal_before_it_deleted() {
    let keyring: Keyring = (&key()).into();
    for (seed, keys) in (0..12).flat_map(|seed| [(seed, Some(&keyring)), (seed, None)]) {
        let (disk, mut journal, source) = history(seed, 5000);
        let at = source.points[source.points.len() / 2].head.epoch;
        checkpoint(&mut journal, &disk, at, keys);
        let manifest = journal.view().manifest().clone();
        drop(journal);
        let older = manifest.sealed.iter().filter(|sealed| sealed.newest_run <= at);
        let older: Vec<FileId> = older.map(SealedSegment::id).collect();
        assert!(older.len() > 3, "there is a journal before it");
        for file in older {
            disk.remove(&file.path(Path::new(FOLDER))).expect("deleted");
        }
        let view = beside(&disk);
        for point in source.points.iter().filter(|point| point.head.epoch >= at) {
            assert_eq!(image_cells(&view, point.head.epoch).expect("an image"), *point.cells, "{}", point.head.epoch);
        }
        // The server starts too, and names what is missing, and no point that does not need it.
        let journal = open(&disk, 5000);
        assert!(!journal.view().damages().is_empty());
        for point in journal.view().points().filter_map(Result::ok).filter(|point| point.epoch >= at) {
            assert_eq!(point.damaged, None, "point {}", point.epoch);
        }
        let report = verify(&journal.view(), keys, None, &mut |_| {}).expect("verified");
        let named = report.damages.iter().flat_map(|damage| &damage.points);
        assert!(
            named.clone().count() > 0 && named.clone().all(|epoch| *epoch < at),
            "only older points need what is gone"
        );
    }
}

#[test]
fn a_damaged_checkpoint_is_read_around_and_named_where_nothing_else_is_left() {
    let keyring: Keyring = (&key()).into();
    let (disk, mut journal, source) = history(3, 5000);
    let at = source.points[source.points.len() / 2].head.epoch;
    checkpoint(&mut journal, &disk, at, Some(&keyring));
    let packs = journal.view().packs();
    assert!(!packs.is_empty());
    for pack in &packs {
        let path = pack.id.path(Path::new(FOLDER));
        let whole = cdp_seams::storage::read_all(&disk, &path, 1 << 30).expect("read");
        for damaged in [None, Some(whole.len() / 3), Some(whole.len() - 30), Some(2)] {
            let _may_be_gone = disk.remove(&path);
            if let Some(at) = damaged {
                let mut bytes = whole.clone();
                bytes[at] ^= 0x10;
                put(&disk, &path, &bytes);
            }
            // The journal before it stands: all is read.
            check(&beside(&disk), &source, false);
            let report = verify(&beside(&disk), Some(&keyring), None, &mut |_| {}).expect("verified");
            assert!(!report.damages.is_empty(), "{damaged:?}");
            assert!(report.damages.iter().all(|damage| damage.points.is_empty()), "no point needs it: {report:?}");
        }
        let _gone = disk.remove(&path);
        put(&disk, &path, &whole);
    }
    is_sound(&beside(&disk));
    // Once what is before it is gone, its damage is the points'.
    let now = source.time + 31 * 24 * HOUR_MS;
    prune(&mut journal, Some(&keyring), now, 5000).expect("pruned");
    let floor = journal.view().manifest().floor.expect("older points went");
    let listed = check(&journal.view(), &source, false);
    for pack in journal.view().packs() {
        let path = pack.id.path(Path::new(FOLDER));
        let whole = cdp_seams::storage::read_all(&disk, &path, 1 << 30).expect("read");
        let mut bytes = whole.clone();
        bytes[whole.len() / 3] ^= 0x10;
        disk.remove(&path).expect("removed");
        put(&disk, &path, &bytes);
        check(&beside(&disk), &source, true);
        let report = verify(&beside(&disk), Some(&keyring), None, &mut |_| {}).expect("verified");
        let named: Vec<Epoch> = report.damages.iter().flat_map(|damage| damage.points.clone()).collect();
        let is_base = matches!(pack.id, FileId::Slice(slice) if slice.epoch == floor);
        assert_eq!(named.contains(&listed[0]), is_base, "{report:?}");
        disk.remove(&path).expect("removed");
        put(&disk, &path, &whole);
    }
}

fn put(disk: &SimStorage, path: &Path, bytes: &[u8]) {
    let file = disk.create_new(path).expect("made");
    file.write_at(bytes, 0).and_then(|()| file.sync()).expect("written");
}

#[test]
fn round_a_rotten_pack_nothing_older_is_read_than_what_stands_between_it_and_a_rewritten_segment() {
    let keyring: Keyring = (&key()).into();
    let disk = SimStorage::new(1);
    let mut journal = create(&disk, 1 << 20);
    let mut source = Source::new(1);
    source.grant(&mut journal).expect("granted");
    // Blocks that do not compress: each segment is as much as gives way at once.
    let noise = |number: u64| Cell::Filled(13 * number);
    let many = |number: u64| (2..10).map(|block| (0, block, noise(number + u64::from(block)))).collect::<Vec<_>>();
    let older = [(0, 0, noise(1)), (0, 1, noise(2))];
    let waste = [many(100), vec![(0, 1, noise(3))]].concat();
    for cells in [&older[..], &waste, &[(0, 0, noise(4))], &[(0, 30, noise(5))], &many(200), &[(0, 31, noise(6))]] {
        source.make_of(false, cells);
        // A segment a point.
        drop(journal);
        journal =
            open(&disk, source.attempt.iter().flat_map(|made| &made.frames).map(|frame| frame.len() as u64).sum());
        source.send(&mut journal, 0, usize::MAX).expect("no fault is set");
        source.sync(&mut journal).expect("no fault is set");
    }
    journal.pin(Epoch(1), true).expect("pinned");
    journal.pin(Epoch(5), true).expect("pinned");
    checkpoint(&mut journal, &disk, Epoch(4), Some(&keyring));
    let now = source.time + 40 * 24 * HOUR_MS;
    let pruned = prune_in_chunks(&mut journal, Some(&keyring), now, 16_000, 1).expect("pruned");
    assert_eq!((pruned.points, pruned.rewritten_segments), (3, 1));
    let manifest = journal.view().manifest().clone();
    let newest_runs: Vec<Epoch> = manifest.sealed.iter().map(|sealed| sealed.newest_run).collect();
    assert_eq!(newest_runs[..4], [Epoch(1), Epoch(5), Epoch(3), Epoch(4)], "what is newer stands before what is older");
    assert_eq!((manifest.floor, manifest.checkpoints.len()), (None, 1));
    for pack in journal.view().packs() {
        disk.flip_bit(&pack.id.path(Path::new(FOLDER)), 8 * pack.len / 2);
        assert_eq!(check(&beside(&disk), &source, false), [Epoch(1), Epoch(5), Epoch(6)]);
    }
}

#[test]
fn a_rotten_frame_with_holes_in_it_is_read_round_in_one_go() {
    let keyring: Keyring = (&key()).into();
    let disk = SimStorage::new(1);
    let mut journal = create(&disk, 1 << 20);
    let mut source = Source::new(1);
    source.grant(&mut journal).expect("granted");
    let filled = [0, 1, 3, 4, 6].map(|block| (0, block, Cell::Filled(u64::from(block))));
    source.make_of(false, &[&filled[..], &[(0, 2, Cell::Zero), (0, 5, Cell::Zero)]].concat());
    source.send(&mut journal, 0, usize::MAX).expect("no fault is set");
    source.sync(&mut journal).expect("no fault is set");
    checkpoint(&mut journal, &disk, Epoch(1), Some(&keyring));
    let pack = journal.view().packs()[0];
    disk.flip_bit(&pack.id.path(Path::new(FOLDER)), 8 * 300);
    let image = beside(&disk).image(Epoch(1), &key()).expect("an image");
    let mut blocks = 0;
    let whole = Extent::new(Block(0), 7).expect("blocks");
    image.read_blocks(VolumeSlot(0), whole, &mut |extent, _| blocks += extent.count).expect("all is in the journal");
    assert_eq!(blocks, 7);
    check(&beside(&disk), &source, false);
}

#[test]
fn points_of_a_segment_that_is_missing_stay_and_with_them_what_they_need() {
    let keyring: Keyring = (&key()).into();
    for (seed, with_pin) in (0..6).flat_map(|seed| [(seed, false), (seed, true)]) {
        let (disk, mut journal, source) = history(seed, 5000);
        let manifest = journal.view().manifest().clone();
        let missing =
            manifest.sealed[manifest.sealed.len() / 2..].iter().find_map(|sealed| Some((sealed.id(), sealed.points?)));
        let (file, points) = missing.expect("a segment with points");
        if with_pin {
            journal.pin(points.last, true).expect("pinned");
        }
        drop(journal);
        let path = file.path(Path::new(FOLDER));
        let whole = cdp_seams::storage::read_all(&disk, &path, 1 << 30).expect("read");
        disk.remove(&path).expect("moved to lost+found");
        let mut journal = open(&disk, 5000);
        assert_eq!(journal.view().unlisted().iter().map(|(_, range)| *range).collect::<Vec<_>>(), [points]);
        for days in [40, 80] {
            prune(&mut journal, Some(&keyring), source.time + days * 24 * HOUR_MS, 5000).expect("pruned");
        }
        drop(journal);
        put(&disk, &path, &whole);
        let view = beside(&disk);
        let were = source.points.iter().map(|point| point.head.epoch);
        let were: Vec<Epoch> = were.filter(|epoch| (points.first..=points.last).contains(epoch)).collect();
        let listed = check(&view, &source, true);
        assert!(were.iter().all(|epoch| listed.contains(epoch)), "{were:?} of {listed:?}");
        assert!(listed.len() < source.points.len(), "older ones went");
        for point in source.points.iter().filter(|point| were.contains(&point.head.epoch)) {
            assert_eq!(image_cells(&view, point.head.epoch).expect("an image"), *point.cells, "{}", point.head.epoch);
        }
    }
}

#[test]
fn a_base_that_is_rotten_ends_no_prune_and_an_older_one_stands_for_it() {
    let keyring: Keyring = (&key()).into();
    let (disk, mut journal, source) = history(8, 5000);
    let (older, newest) = (source.points[10].head.epoch, source.points.last().expect("points").head.epoch);
    for at in [older, newest] {
        checkpoint(&mut journal, &disk, at, Some(&keyring));
    }
    let of_newest = |file: FileId| matches!(file, FileId::Slice(slice) if slice.epoch == newest);
    let pack = journal.view().packs().into_iter().find(|pack| of_newest(pack.id)).expect("a pack of its own");
    disk.flip_bit(&pack.id.path(Path::new(FOLDER)), 4 * pack.len);
    let now = source.time + 31 * 24 * HOUR_MS;
    let pruned = prune(&mut journal, Some(&keyring), now, 5000).expect("pruned");
    assert_eq!(journal.view().manifest().floor, Some(older));
    assert!(pruned.rewritten_segments > 0 && pruned.bytes_after < pruned.bytes_before, "{pruned:?}");
    assert_eq!(check(&journal.view(), &source, false), [newest]);
}

#[test]
fn a_damage_goes_with_the_checkpoint_whose_pack_it_is_in() {
    let keyring: Keyring = (&key()).into();
    let (disk, mut journal, source) = history(9, 5000);
    let at = source.points[10].head.epoch;
    checkpoint(&mut journal, &disk, at, Some(&keyring));
    let pack = journal.view().packs()[0];
    disk.flip_bit(&pack.id.path(Path::new(FOLDER)), 4 * pack.len);
    let damage = Damage { first_epoch: Some(at), ..Damage::of(pack.id, "rotten".to_owned()) };
    journal.note_damages(pack.id, &[damage]).expect("noted");
    // One more does not take it away, what it is in is there yet.
    checkpoint(&mut journal, &disk, source.points[20].head.epoch, Some(&keyring));
    assert_eq!(journal.view().damages().len(), 1);
    journal.adopt(&Change::Release { checkpoints: vec![at], floor: None }).expect("released");
    assert!(journal.view().damages().is_empty(), "{:?}", journal.view().damages());
    is_sound(&beside(&disk));
}

#[test]
fn lost_blocks_are_charged_once() {
    let keyring: Keyring = (&key()).into();
    let (disk, journal, source) = history(4, 5000);
    let missing = journal.view().manifest().sealed.iter().rev().map(SealedSegment::id).nth(1).expect("segments");
    drop(journal);
    disk.remove(&missing.path(Path::new(FOLDER))).expect("removed");
    let (view, random) = (beside(&disk), SimRandom::new(1));
    let builder = Builder { view: &view, keys: Some(&keyring), random: &random, now: Timestamp(5) };
    let (mut charged, newest) = (0, source.points.last().expect("points").head.epoch);
    let mut step = |bytes| {
        charged += bytes;
        true
    };
    let made = builder.build(newest, &mut step, &mut |_, _| {}).expect("built");
    assert!(made.lost_blocks > 10, "{made:?}");
    assert_eq!(charged, journal_support::volumes().iter().map(|volume| volume.size_bytes).sum::<u64>());
}

#[test]
fn settings_that_would_delete_everything_are_refused() {
    let (disk, mut journal, source) = history(5, 5000);
    let random = SimRandom::new(1);
    let ladder = Ladder { every_s: 0, hourly_s: 0, daily_s: 0, weekly_s: 0 };
    let (now, segment_bytes_max) = (Timestamp(source.time + 1), 5000);
    let mut settings = Prune {
        ladder: &ladder,
        now,
        wall: now,
        keys: None,
        random: &random,
        segment_bytes_max,
        chunk_bytes_max: CHUNK_BYTES_MAX,
        checkpoint_share: 0.5,
        keep_only_newest: false,
    };
    let view = journal.view();
    let refused = settings.run(Arc::clone(&view), &mut journal, &mut |_| true, &mut |_, _| {});
    assert!(matches!(refused, Err(PruneError::OnlyNewest(_))));
    assert_eq!(check(&beside(&disk), &source, false).len(), source.points.len(), "nothing went");
    settings.keep_only_newest = true;
    settings.run(view, &mut journal, &mut |_| true, &mut |_, _| {}).expect("asked for");
    assert_eq!(check(&beside(&disk), &source, false), [source.points.last().expect("points").head.epoch]);
    is_sound(&beside(&disk));
}

#[test]
fn a_change_that_does_not_fit_is_refused_and_changes_nothing() {
    let (_disk, mut journal, source) = history(6, 5000);
    let newest = source.points.last().expect("points").head.epoch;
    let pinned = source.points[3].head.epoch;
    journal.pin(pinned, true).expect("pinned");
    let before = journal.view().manifest().clone();
    for change in [
        Change::Remove { removed: vec![(Epoch(1), newest)] },
        Change::Remove { removed: vec![(pinned, pinned)] },
        Change::Remove { removed: vec![(Epoch(9), Epoch(8))] },
        Change::Release { checkpoints: vec![], floor: Some(Epoch(4)) },
        Change::Rewrite { replaced: vec![(1, 9)], by: vec![] },
        Change::Rewrite { replaced: vec![], by: vec![] },
    ] {
        let refused = journal.adopt(&change);
        assert!(matches!(refused, Err(JournalError::Stale(_))), "{change:?}: {refused:?}");
        assert_eq!(*journal.view().manifest(), before);
    }
}

#[test]
fn what_lacks_blocks_never_replaces_the_floor() {
    let keyring: Keyring = (&key()).into();
    let (_disk, mut journal, source) = history(6, 5000);
    prune(&mut journal, Some(&keyring), source.time + 31 * 24 * HOUR_MS, 5000).expect("pruned");
    let before = journal.view().manifest().clone();
    let floor = before.checkpoints.iter().find(|base| Some(base.epoch) == before.floor).expect("a floor");
    let refused = journal.adopt(&Change::Checkpoint(Checkpoint { lost_blocks: 1, ..*floor }));
    assert!(matches!(refused, Err(JournalError::Stale(_))), "{refused:?}");
    assert_eq!(*journal.view().manifest(), before);
}
