//! Damaged frames and what is put in their place: only what their own seals prove, whatever was damaged and whatever came since.

mod journal_support;

use cdp_protocol::frame::{self, Kind};
use cdp_protocol::units::{Epoch, VolumeSlot};
use cdp_seams::random::SimRandom;
use cdp_seams::storage::sim::{Fault, SimStorage};
use cdp_seams::storage::{Storage, read_all};
use cdp_target::heal::{Outcome, heal};
use cdp_target::journal::{Damage, GroupJournal, GroupView, JournalLimits};
use cdp_target::restore::keyring::Keyring;
use cdp_target::scrub::read_now;
use cdp_target::verify::{Healed, VerifyReport, verify};
use journal_support::{Cell, GROUP, Source, identity, image_cells, key};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const FOLDER: &str = "/store/branch/main";
/// The first epoch fills its segment.
const LIMITS: JournalLimits = JournalLimits { segment_bytes_max: 17_000 };
/// Does not compress well, so that the content is most of the frame.
const FIRST: [u64; 4] = [13, 26, 39, 52];

/// A journal whose segment 1 is the first epoch: a frame of four blocks of volume 0 from block 5 on, and another.
struct Bench {
    disk: SimStorage,
    journal: GroupJournal,
    source: Source,
    /// Where the frame is, how long, and how long its header.
    at: (u64, u64, u64),
}

impl Bench {
    fn new() -> Self {
        Self::with(&[&[(0, 5, &FIRST), (1, 0, &[1, 2])]])
    }

    /// Attempts of the first epoch, all but the last of them parts. The frame is the first of the first.
    fn with(attempts: &[&[(usize, u32, &[u64])]]) -> Self {
        let disk = SimStorage::new(1);
        let journal = GroupJournal::create(Arc::new(disk.clone()), Path::new(FOLDER), identity(), LIMITS);
        let (mut journal, mut source) = (journal.expect("made"), Source::new(1));
        source.grant(&mut journal).expect("granted");
        let mut bench_at = None;
        for (number, runs) in attempts.iter().enumerate() {
            source.make_runs(number + 1 < attempts.len(), runs);
            let frames = source.attempt.as_ref().map_or(0, |attempt| attempt.frames.len());
            source.send(&mut journal, 0, frames).expect("sent");
            bench_at = bench_at.or_else(|| source.attempt.as_ref().map(|attempt| attempt.frames[1].clone()));
        }
        source.sync(&mut journal).expect("synced");
        let lost = bench_at.expect("an attempt");
        let bytes = read_all(&disk, &segment(1), 1 << 20).expect("read");
        let offset = bytes.windows(lost.len()).position(|window| window == lost).expect("it is there");
        let header = frame::decode_header(&GROUP, &lost).expect("a header");
        let at = (offset as u64, lost.len() as u64, header.header_len() as u64);
        Self { disk, journal, source, at }
    }

    /// Another epoch.
    fn epoch(&mut self, runs: &[(usize, u32, &[u64])]) {
        self.source.make_runs(false, runs);
        let frames = self.source.attempt.as_ref().map_or(0, |attempt| attempt.frames.len());
        self.source.send(&mut self.journal, 0, frames).expect("sent");
        self.source.sync(&mut self.journal).expect("synced");
    }

    /// Flips a bit of the frame, which is in segment 1; gives the damage as the scrub finds it, which is kept.
    fn hurt(&mut self, byte: u64) -> Damage {
        self.disk.flip_bit(&segment(1), 8 * (self.at.0 + byte) + 3);
        let found = read_now(&self.journal.view(), 1).expect("read");
        self.journal
            .note_damages(cdp_target::journal::file::FileId::Segment { number: 1, revision: 0 }, &found)
            .expect("kept");
        let mut of_content = found.into_iter().filter(|damage| damage.first_epoch.is_some());
        let damage = of_content.next().expect("it is found");
        assert_eq!((damage.offset, of_content.next()), (self.at.0, None));
        damage
    }

    const fn in_content(&self) -> u64 {
        self.at.2 + 100
    }

    /// The last byte of the sealed digests.
    const fn in_digests(&self) -> u64 {
        self.at.1 - 5
    }

    fn heal(&mut self, damage: &Damage) -> Outcome {
        let outcome = heal(&self.journal.view(), damage, &keys(), &SimRandom::new(4)).expect("no fault is set");
        self.journal.look_again();
        outcome
    }

    fn verify(&self) -> VerifyReport {
        let views = [self.journal.view(), self.beside()];
        let [served, beside] = views.map(|view| verify(&view, Some(&keys()), None, &mut |_| {}).expect("read"));
        assert_eq!((&served.damages, &served.healed), (&beside.damages, &beside.healed));
        served
    }

    fn beside(&self) -> Arc<GroupView> {
        Arc::new(GroupView::open(Arc::new(self.disk.clone()), Path::new(FOLDER)).expect("a view"))
    }

    /// Nothing is wrong any more, for any reader.
    fn assert_healed(&self) {
        let report = self.verify();
        assert_eq!(
            (report.damages.as_slice(), report.healed.as_slice()),
            (&[][..], &[Healed { segment: 1, offset: self.at.0 }][..])
        );
        for view in [self.journal.view(), self.beside()] {
            for (listed, point) in view.points().zip(&self.source.points) {
                assert_eq!(listed.expect("a point").damaged, None);
                assert_eq!(image_cells(&view, point.head.epoch).expect("an image"), *point.cells);
            }
        }
    }

    /// The points up to and with `last` are named and miss exactly the blocks 5 to 9; those after it are whole.
    fn assert_damaged_up_to(&self, last: u64) {
        let report = self.verify();
        let epochs: Vec<Epoch> = (1..=last).map(Epoch).collect();
        assert_eq!(report.healed, []);
        assert!(report.damages.iter().any(|damage| damage.points == epochs), "{:?}", report.damages);
        for view in [self.journal.view(), self.beside()] {
            for (listed, point) in view.points().zip(&self.source.points) {
                let (epoch, cells) = (point.head.epoch, image_cells(&view, point.head.epoch).expect("an image"));
                assert_eq!(listed.expect("a point").damaged.is_some(), epoch.0 <= last, "{epoch}");
                let damaged = (0..).zip(&cells[0]).filter(|(_, cell)| **cell == Cell::Damaged).map(|(block, _)| block);
                let damaged: Vec<u32> = damaged.collect();
                assert_eq!(damaged.is_empty(), epoch.0 > last, "{epoch}: {damaged:?}");
                assert!(damaged.iter().all(|block| (5..9).contains(block)));
            }
        }
    }

    fn repairs(&self) -> Vec<PathBuf> {
        self.disk.list(&Path::new(FOLDER).join("repairs")).unwrap_or_default()
    }
}

fn segment(number: u64) -> PathBuf {
    cdp_target::journal::segment::path(Path::new(FOLDER), number)
}

fn keys() -> Keyring {
    Keyring::from(&key())
}

fn waiting(outcome: &Outcome) -> Vec<u32> {
    let Outcome::Waiting { volume: VolumeSlot(0), blocks } = outcome else { panic!("{outcome:?}") };
    blocks.iter().collect()
}

fn lost(outcome: &Outcome) -> &str {
    let Outcome::Lost(why) = outcome else { panic!("{outcome:?}") };
    why
}

#[test]
fn what_comes_again_as_it_was_is_put_in_the_damaged_frames_place() {
    let mut bench = Bench::new();
    bench.epoch(&[(1, 3, &[77])]);
    let damage = bench.hurt(bench.in_content());
    bench.assert_damaged_up_to(2);
    assert_eq!(waiting(&bench.heal(&damage)), [5, 6, 7, 8], "all of it is to be asked for");
    bench.epoch(&[(0, 5, &FIRST[..2]), (0, 30, &[3])]);
    assert_eq!(waiting(&bench.heal(&damage)), [7, 8]);
    assert_eq!(bench.repairs(), Vec::<PathBuf>::new());
    bench.epoch(&[(0, 7, &FIRST[2..])]);
    bench.assert_damaged_up_to(3);
    assert!(matches!(bench.heal(&damage), Outcome::Healed { blocks: 4 }));
    bench.assert_healed();
    // What is written behind it is another point's.
    bench.epoch(&[(0, 6, &[99])]);
    bench.assert_healed();
    let (again, report) =
        GroupJournal::open(Arc::new(bench.disk.clone()), Path::new(FOLDER), LIMITS).expect("opened again");
    assert_eq!(report.damages, []);
    assert!(again.view().points().all(|point| point.expect("a point").damaged.is_none()));
}

#[test]
fn content_that_is_whole_behind_a_damaged_frames_digests_proves_itself() {
    for byte in [0, 4] {
        let mut bench = Bench::new();
        let damage = bench.hurt(bench.in_digests() + byte);
        bench.assert_damaged_up_to(1);
        assert!(matches!(bench.heal(&damage), Outcome::Healed { blocks: 4 }), "without its source");
        bench.assert_healed();
    }
}

#[test]
fn without_content_and_digests_nothing_is_put_in_its_place() {
    let mut bench = Bench::new();
    bench.disk.flip_bit(&segment(1), 8 * (bench.at.0 + bench.in_digests()));
    let damage = bench.hurt(bench.in_content());
    assert_eq!(waiting(&bench.heal(&damage)), [5, 6, 7, 8], "asked for all the same, for the points to come");
    bench.epoch(&[(0, 5, &FIRST)]);
    assert!(lost(&bench.heal(&damage)).contains("digests"));
    assert_eq!(bench.repairs(), Vec::<PathBuf>::new());
    bench.assert_damaged_up_to(1);
}

#[test]
fn without_its_header_it_is_asked_for_by_the_index_and_nothing_is_put_in_its_place() {
    let mut bench = Bench::new();
    let damage = bench.hurt(40);
    assert_eq!(waiting(&bench.heal(&damage)), [5, 6, 7, 8]);
    bench.epoch(&[(0, 5, &FIRST)]);
    assert!(lost(&bench.heal(&damage)).contains("header"));
    assert_eq!(bench.repairs(), Vec::<PathBuf>::new());
    bench.assert_damaged_up_to(1);
}

#[test]
fn where_a_block_had_been_changed_nothing_is_put_in_its_place_and_newer_points_are_whole() {
    let mut bench = Bench::new();
    let damage = bench.hurt(bench.in_content());
    bench.epoch(&[(0, 6, &[1000])]);
    assert_eq!(waiting(&bench.heal(&damage)), [5, 7, 8]);
    // Came again, and the changed one as well, as it was before.
    bench.epoch(&[(0, 5, &[FIRST[0]]), (0, 7, &FIRST[2..])]);
    assert!(lost(&bench.heal(&damage)).starts_with("3 of 4 blocks"));
    assert_eq!(bench.repairs(), Vec::<PathBuf>::new());
    bench.assert_damaged_up_to(2);
}

#[test]
fn a_block_that_came_as_it_was_and_was_changed_later_is_proved_all_the_same() {
    let mut bench = Bench::new();
    let damage = bench.hurt(bench.in_content());
    bench.epoch(&[(0, 5, &FIRST)]);
    bench.epoch(&[(0, 5, &[7, 7, 7, 7])]);
    assert!(matches!(bench.heal(&damage), Outcome::Healed { blocks: 4 }));
    bench.assert_healed();
}

#[test]
fn only_blocks_that_a_point_reads_have_to_be_proved() {
    let mut bench = Bench::with(&[&[(0, 5, &FIRST), (1, 0, &[1, 2])], &[(0, 6, &[500])]]);
    let damage = bench.hurt(bench.in_content());
    assert_eq!(waiting(&bench.heal(&damage)), [5, 7, 8], "the same point has 6 from another frame");
    bench.epoch(&[(0, 5, &[FIRST[0], 500, FIRST[2], FIRST[3]])]);
    assert!(matches!(bench.heal(&damage), Outcome::Healed { blocks: 3 }));
    bench.assert_healed();
}

#[test]
fn a_repair_that_rots_is_none_and_is_made_again() {
    let mut bench = Bench::new();
    let damage = bench.hurt(bench.in_content());
    bench.epoch(&[(0, 5, &FIRST)]);
    assert!(matches!(bench.heal(&damage), Outcome::Healed { .. }));
    let repair = Path::new(FOLDER).join("repairs").join(&bench.repairs()[0]);
    for byte in [3, 20, 40, 49, 60, 200, 4000, bench.disk.file_len(&repair) - 1] {
        bench.disk.flip_bit(&repair, 8 * byte);
        bench.journal.look_again();
        bench.assert_damaged_up_to(1);
        assert!(matches!(bench.heal(&damage), Outcome::Healed { .. }));
        bench.assert_healed();
    }
}

#[test]
fn a_power_cut_at_any_call_leaves_the_damage_or_the_whole_repair() {
    for call in 0.. {
        let mut bench = Bench::new();
        let damage = bench.hurt(bench.in_content());
        bench.epoch(&[(0, 5, &FIRST)]);
        let view = bench.beside();
        bench.disk.fault_at(bench.disk.calls() + call, Fault::PowerCut);
        let healed = heal(&view, &damage, &keys(), &SimRandom::new(4));
        bench.disk.clear_faults();
        let was_cut = bench.disk.is_down();
        bench.disk.restart();
        let opened = GroupJournal::open(Arc::new(bench.disk.clone()), Path::new(FOLDER), LIMITS).expect("opened");
        bench.journal = opened.0;
        if bench.verify().healed.is_empty() {
            assert!(was_cut && healed.is_err(), "call {call}");
            bench.assert_damaged_up_to(1);
            assert!(matches!(bench.heal(&damage), Outcome::Healed { .. }), "call {call}");
        }
        bench.assert_healed();
        if !was_cut {
            assert!(call > 4, "{call} calls");
            return;
        }
    }
}

#[test]
fn records_and_holes_are_not_healed() {
    let mut bench = Bench::new();
    let bytes = read_all(&bench.disk, &segment(1), 1 << 20).expect("read");
    let commit = (0..bytes.len())
        .find(|at| frame::decode(&GROUP, &bytes[*at..]).is_ok_and(|frame| frame.header.kind == Kind::Commit));
    bench.at.0 = commit.expect("a commit") as u64;
    let damage = bench.hurt(120);
    assert!(lost(&bench.heal(&damage)).contains("no content"));
}
