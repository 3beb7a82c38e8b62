//! One flipped bit anywhere in a fully synced journal: never taken for a torn tail, never served as content, the points named.

mod journal_support;

use cdp_protocol::frame::{self, Kind};
use cdp_protocol::units::Epoch;
use cdp_seams::random::SimRandom;
use cdp_seams::storage::Storage;
use cdp_seams::storage::sim::SimStorage;
use cdp_target::journal::segment::Header;
use cdp_target::journal::{GroupJournal, GroupView, JournalLimits};
use cdp_target::verify::verify;
use journal_support::{GROUP, ModelPoint, Source, damaged_blocks, identity, image_cells, key};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const FOLDER: &str = "/store/branch/main";

/// A synced journal in memory, made the same way every time.
struct Made {
    files: Vec<(PathBuf, Vec<u8>)>,
    points: Vec<ModelPoint>,
    limits: JournalLimits,
}

impl Made {
    fn new(seed: u64, segment_bytes_max: u64, steps: u64, sync_each: bool) -> Self {
        let disk = SimStorage::new(seed);
        let limits = JournalLimits { segment_bytes_max };
        let mut journal =
            GroupJournal::create(Arc::new(disk.clone()), Path::new(FOLDER), identity(), limits).expect("made");
        let mut source = Source::new(seed);
        source.grant(&mut journal).expect("granted");
        for step in 0..steps {
            source.make(sync_each && step % 5 == 3, 3);
            let frames = source.attempt.as_ref().map_or(0, |attempt| attempt.frames.len());
            source.send(&mut journal, 0, frames).expect("sent");
            if sync_each {
                source.sync(&mut journal).expect("synced");
            }
        }
        source.sync(&mut journal).expect("synced");
        drop(journal);
        let mut files = Vec::new();
        for folder in [FOLDER.to_owned(), format!("{FOLDER}/journal")] {
            let paths =
                disk.list(Path::new(&folder)).expect("listed").into_iter().map(|name| Path::new(&folder).join(name));
            for path in paths.filter(|path| disk.list(path).is_err()) {
                let bytes = cdp_seams::storage::read_all(&disk, &path, 1 << 30).expect("read");
                files.push((path, bytes));
            }
        }
        Self { files, points: source.points, limits }
    }

    fn disk(&self) -> SimStorage {
        let disk = SimStorage::new(1);
        for folder in ["journal", "aside"] {
            disk.create_dir_all(&Path::new(FOLDER).join(folder)).expect("made");
        }
        for (path, bytes) in &self.files {
            let file = disk.create_new(path).expect("made");
            file.write_at(bytes, 0).expect("written");
            file.sync().expect("synced");
            disk.sync_dir(path.parent().expect("a folder")).expect("synced");
        }
        disk
    }

    /// Opens the journal with one bit flipped, and holds what it serves against the model. Gives whether any block was lost.
    fn flip(&self, path: &Path, bit: u64, deep: usize) -> bool {
        let place = format!("{} byte {} bit {}", path.display(), bit / 8, bit % 8);
        self.hurt(&place, bit, deep, |disk| disk.flip_bit(path, bit))
    }

    /// The same with any damage that `hurt` does; `number` tells one from another.
    fn hurt(&self, place: &str, number: u64, deep: usize, hurt: impl FnOnce(&SimStorage)) -> bool {
        let disk = self.disk();
        hurt(&disk);
        let opened = GroupJournal::open(Arc::new(disk.clone()), Path::new(FOLDER), self.limits);
        let (journal, report) = opened.unwrap_or_else(|error| panic!("{place}: {error}"));
        let view = journal.view();
        let points: Vec<_> = view.points().map(|point| point.expect("a point")).collect();
        let epochs: BTreeSet<Epoch> = points.iter().map(|point| point.epoch).collect();
        let verified = verify(&view, Some(&(&key()).into()), None, &mut |_| {}).expect("verified");
        let clean = report.damages.is_empty() && !report.manifest_repaired && verified.is_clean();
        let mut named: BTreeSet<Epoch> =
            points.iter().filter(|point| point.damaged.is_some()).map(|point| point.epoch).collect();
        named.extend(verified.damages.iter().flat_map(|damage| &damage.points));
        let mut lost = false;
        let stride = self.points.len().div_ceil(deep);
        for (at, point) in self.points.iter().enumerate() {
            let epoch = point.head.epoch;
            if !epochs.contains(&epoch) {
                // Hidden beyond telling: then a damage has to reach over it.
                assert!(!clean, "{place}: point {epoch} vanished silently");
                lost = true;
                continue;
            }
            if at % stride != 0 && at + 1 != self.points.len() && !named.contains(&epoch) {
                continue;
            }
            let Ok(cells) = image_cells(&view, epoch) else {
                assert!(named.contains(&epoch), "{place}: point {epoch} is lost and not named");
                lost = true;
                continue;
            };
            let damaged = damaged_blocks(&cells, &point.cells);
            assert!(damaged.is_empty() || named.contains(&epoch), "{place}: point {epoch} is hit and not named");
            lost |= !damaged.is_empty();
        }
        assert!(epochs.len() <= self.points.len(), "{place}: a point nobody made");
        // All of it was proven durable, so the chain stands where it stood, and the source can go on.
        let head = journal.chain().head().map(|(head, _)| head);
        assert_eq!(head, self.points.last().map(|point| point.head), "{place}");
        // Whatever was found, the journal stands: opened again it says the same, and a reader beside it too.
        drop(journal);
        let (again, second) =
            GroupJournal::open(Arc::new(disk.clone()), Path::new(FOLDER), self.limits).expect("again");
        assert_eq!((second.damages.len(), second.torn_bytes), (0, 0), "{place}: found anew");
        let same = again.view().points().map(|point| point.expect("a point")).collect::<Vec<_>>();
        assert_eq!(same, points, "{place}");
        let beside = GroupView::open(Arc::new(disk), Path::new(FOLDER)).expect("a view");
        assert_eq!(beside.points().count(), points.len(), "{place}");
        if number.is_multiple_of(5) {
            self.go_on(again, place);
        }
        lost
    }
}

impl Made {
    /// The source goes on with the damaged journal: new points are taken, and hold what was sent wherever they can be read.
    fn go_on(&self, mut journal: GroupJournal, place: &str) {
        let mut source = Source::new(99);
        source.points.clone_from(&self.points);
        source.generation = journal.chain().generation();
        source.grant(&mut journal).expect("granted");
        for _ in 0..3 {
            source.make(false, 3);
            let frames = source.attempt.as_ref().map_or(0, |attempt| attempt.frames.len());
            source.send(&mut journal, 0, frames).unwrap_or_else(|error| panic!("{place}: {error}"));
            source.sync(&mut journal).expect("no fault is set");
        }
        let newest = source.points.last().expect("a point");
        let cells = image_cells(&journal.view(), newest.head.epoch).unwrap_or_else(|error| panic!("{place}: {error}"));
        damaged_blocks(&cells, &newest.cells);
    }
}

#[test]
fn every_byte_of_a_synced_journal() {
    let made = Made::new(5, 6_000, 8, true);
    assert!(made.files.len() >= 4, "several segments: {}", made.files.len());
    let random = SimRandom::new(11);
    let (mut flips, mut lost) = (0, 0);
    for (path, bytes) in &made.files {
        for byte in 0..bytes.len() as u64 {
            // Content is alike from byte to byte: everything else is tried whole.
            if bytes.len() > 4000 && random.below(8) > 0 {
                continue;
            }
            lost += u64::from(made.flip(path, byte * 8 + random.below(8), 4));
            flips += 1;
        }
    }
    println!("{flips} flips, {lost} hit blocks");
    assert!(lost > 0 && lost < flips);
}

/// The frames of a segment of ours, in order: where each begins, and its bytes.
fn frames_of(bytes: &[u8]) -> Vec<(usize, &[u8])> {
    let mut at = Header::decode(bytes).expect("a header").1;
    let mut frames = Vec::new();
    while let Ok(frame) = frame::decode(&GROUP, &bytes[at..]) {
        frames.push((at, frame.bytes));
        at += frame.bytes.len();
    }
    frames
}

fn is(kind: Kind, bytes: &[u8]) -> bool {
    frame::decode(&GROUP, bytes).is_ok_and(|frame| frame.header.kind == kind)
}

/// A disk may put a whole frame where another one belongs: valid, of this group, and out of its place.
#[test]
fn a_frame_that_went_astray_is_damage_and_no_torn_tail() {
    let made = Made::new(5, 6_000, 10, true);
    let (mut writes, mut lost) = (0, 0);
    for (path, bytes) in made.files.iter().filter(|(path, _)| path.extension().is_some()) {
        let frames = frames_of(bytes);
        let (last_proof, _) = *frames.iter().rev().find(|(_, bytes)| is(Kind::Synced, bytes)).expect("a proof");
        for (at, stray) in &frames {
            for (over, _) in frames.iter().filter(|(over, _)| over != at && over + stray.len() <= last_proof) {
                let place = format!("{}: the frame of {at} at {over}", path.display());
                lost += u64::from(made.hurt(&place, writes, 4, |disk| {
                    let file = disk.open_write(path).expect("opened");
                    file.write_at(stray, *over as u64).and_then(|()| file.sync()).expect("written");
                }));
                writes += 1;
            }
        }
    }
    println!("{writes} stray frames, {lost} hit blocks");
    assert!(lost > 0 && lost < writes);
}

/// A frame's header and a byte of the index over it are gone, in one segment: older content must not stand in for what is lost.
#[test]
fn a_frame_and_a_part_of_the_index_damaged_together_serve_nothing_older() {
    let made = Made::new(5, 6_000, 10, true);
    let (path, bytes) = made.files.iter().find(|(path, _)| path.extension().is_some()).expect("a sealed segment");
    let frames = frames_of(bytes);
    let (newest, frame) = frames.last().expect("frames");
    let (mut flips, mut lost) = (0, 0);
    for (at, _) in frames.iter().filter(|(_, bytes)| !is(Kind::Synced, bytes)) {
        for index in (newest + frame.len()..bytes.len()).step_by(37) {
            let disk = made.disk();
            disk.flip_bit(path, (*at as u64 + 20) * 8);
            disk.flip_bit(path, index as u64 * 8 + 3);
            let view = Arc::new(GroupView::open(Arc::new(disk), Path::new(FOLDER)).expect("a view"));
            for point in &made.points {
                // What cannot be read says so; what can be read holds what it has to, which this checks.
                let cells = image_cells(&view, point.head.epoch);
                lost += u64::from(cells.map_or(true, |cells| !damaged_blocks(&cells, &point.cells).is_empty()));
            }
            flips += 1;
        }
    }
    println!("{flips} pairs of flips, {lost} hit points");
    assert!(flips > 100 && lost > 0, "{flips} {lost}");
}

/// The header of a frame is gone, its blocks are known: exactly the points that read one of them are named.
#[test]
fn without_the_header_of_a_frame_the_index_names_the_points() {
    let made = Made::new(8, 6_000, 14, true);
    let segments: Vec<_> = made.files.iter().filter(|(path, _)| path.extension().is_some()).collect();
    let (_, sealed) = segments.split_last().expect("segments");
    let (mut frames, mut partly) = (0, 0);
    for (path, bytes) in sealed {
        for (at, _) in frames_of(bytes).into_iter().filter(|(_, bytes)| is(Kind::Extents, bytes)) {
            let disk = made.disk();
            disk.flip_bit(path, (at as u64 + 33) * 8);
            let journal = GroupJournal::open(Arc::new(disk), Path::new(FOLDER), made.limits).expect("opened").0;
            let report = verify(&journal.view(), None, None, &mut |_| {}).expect("verified");
            let named: BTreeSet<Epoch> = report.damages.iter().flat_map(|damage| &damage.points).copied().collect();
            let needs = |point: &&ModelPoint| {
                let cells = image_cells(&journal.view(), point.head.epoch).expect("an image");
                !damaged_blocks(&cells, &point.cells).is_empty()
            };
            let hit: BTreeSet<Epoch> = made.points.iter().filter(needs).map(|point| point.head.epoch).collect();
            assert_eq!(named, hit, "{} at {at}: {:?}", path.display(), report.damages);
            assert!(!report.is_clean());
            frames += 1;
            partly += u32::from(made.points.last().is_some_and(|point| !hit.contains(&point.head.epoch)));
        }
    }
    println!("{frames} frames, {partly} not needed by the newest point");
    assert!(partly > 0 && frames > partly);

    // Nothing tells in the open segment: then every later point is named, and the message says why.
    let made = Made::new(8, 1 << 30, 6, true);
    let open = made.files.iter().find(|(path, _)| path.extension().is_some()).expect("a segment");
    let (at, _) = frames_of(&open.1).into_iter().find(|(_, bytes)| is(Kind::Extents, bytes)).expect("extents");
    let disk = made.disk();
    disk.flip_bit(&open.0, (at as u64 + 33) * 8);
    let view = GroupView::open(Arc::new(disk), Path::new(FOLDER)).expect("a view");
    let report = verify(&view, None, None, &mut |_| {}).expect("verified");
    let newest = made.points.last().expect("a point").head.epoch;
    let coarse = "frames are damaged beyond telling; extents unknown: every later point may be affected";
    let says = |damage: &cdp_target::verify::Damage| damage.what == coarse && damage.points.contains(&newest);
    assert!(report.damages.iter().any(says), "{:?}", report.damages);
}

#[test]
fn a_journal_of_500_epochs_synced_in_one_go() {
    let made = Made::new(6, 1 << 30, 500, false);
    assert_eq!(made.points.len(), 500);
    let random = SimRandom::new(12);
    let segment = made.files.iter().find(|(path, _)| path.extension().is_some()).expect("a segment");
    for _ in 0..60 {
        made.flip(&segment.0, random.below(segment.1.len() as u64 * 8), 10);
    }
}

#[test]
fn without_a_sealed_segment_the_other_points_are_served_and_the_missing_ones_named() {
    let made = Made::new(5, 6_000, 12, true);
    for shorten in [false, true] {
        let disk = made.disk();
        let path = Path::new(FOLDER).join("journal/0000000000000002.seg");
        if shorten {
            let file = disk.open_write(&path).expect("opened");
            file.set_len(3000).expect("cut");
        } else {
            disk.remove(&path).expect("removed");
        }
        let (journal, report) =
            GroupJournal::open(Arc::new(disk.clone()), Path::new(FOLDER), made.limits).expect("opened");
        assert_eq!(report.damages.len(), 1, "{:?}", report.damages);
        let view = journal.view();
        let points: Vec<_> = view.points().filter_map(Result::ok).collect();
        let (mut whole, mut hit) = (0, 0);
        for point in &made.points {
            let epoch = point.head.epoch;
            let listed = points.iter().find(|listed| listed.epoch == epoch);
            let damaged = match image_cells(&view, epoch) {
                Ok(cells) => !damaged_blocks(&cells, &point.cells).is_empty(),
                Err(_) => true,
            };
            let named = listed.is_none_or(|listed| listed.damaged.is_some());
            assert!(named || !damaged, "point {epoch} is hit and not named");
            whole += u32::from(!damaged);
            hit += u32::from(damaged);
        }
        assert!(whole > 0 && hit > 0, "{whole} whole, {hit} hit");
        let verified = verify(&view, None, None, &mut |_| {}).expect("verified");
        assert!(verified.damages.iter().any(|damage| damage.file.ends_with("2.seg") && !damage.points.is_empty()));
    }
}

#[test]
fn a_wrong_key_opens_nothing_and_verify_says_so() {
    let made = Made::new(5, 6_000, 6, true);
    let journal = GroupJournal::open(Arc::new(made.disk()), Path::new(FOLDER), made.limits).expect("opened").0;
    let view = journal.view();
    let wrong = cdp_protocol::seal::DataKey::new([9; 32]);
    assert!(verify(&view, None, None, &mut |_| {}).expect("verified").is_clean());
    assert!(verify(&view, Some(&(&key()).into()), None, &mut |_| {}).expect("verified").is_clean());
    let report = verify(&view, Some(&(&wrong).into()), None, &mut |_| {}).expect("verified");
    assert!(report.damages.len() as u64 > report.points);
    let newest = made.points.last().expect("a point").head.epoch;
    assert!(
        verify(&view, Some(&(&wrong).into()), Some(newest), &mut |_| {}).expect("verified").damages.len()
            <= report.damages.len()
    );
}
