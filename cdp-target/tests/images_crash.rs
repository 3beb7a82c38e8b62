//! Checkpoints and pruning cut off at every storage call, or met by an error there: nothing that stays is lost, and the same once
//! more comes to its end.
//!
//! A case is a history, an operation and a call of it. After a cut the group is opened anew; what is listed then is what was listed
//! before, or what the ladder leaves, each point exact. `CDP_CRASH_IMAGES` says how many images of what a cut leaves are looked at.

mod journal_support;

use cdp_protocol::units::{Epoch, Timestamp};
use cdp_seams::random::SimRandom;
use cdp_seams::storage::Storage;
use cdp_seams::storage::sim::{Fault, SimStorage};
use cdp_target::checkpoint::builder::{Builder, end};
use cdp_target::journal::change::Change;
use cdp_target::journal::{GroupJournal, GroupView, JournalError, JournalLimits};
use cdp_target::prune::{CHUNK_BYTES_MAX, Prune, PruneError};
use cdp_target::restore::keyring::Keyring;
use cdp_target::retention::Ladder;
use cdp_target::verify::verify;
use journal_support::{Source, identity, image_cells, key};
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

const FOLDER: &str = "/store/branch/main";
const LIMITS: JournalLimits = JournalLimits { segment_bytes_max: 5000 };
const HOUR_MS: i64 = 3_600_000;
const LADDER: Ladder = Ladder { every_s: 3 * 3600, hourly_s: 6 * 3600, daily_s: 86_400, weekly_s: 0 };
const POINTS: usize = 12;

/// What is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    /// A checkpoint at the newest point.
    Checkpoint,
    /// A prune, which makes a checkpoint, rewrites and sweeps.
    Prune,
    /// A prune after one: what it reads stands on a checkpoint.
    SecondPrune,
}

const OPERATIONS: [(Operation, bool); 6] = [
    (Operation::Checkpoint, true),
    (Operation::Checkpoint, false),
    (Operation::Prune, true),
    (Operation::Prune, false),
    (Operation::SecondPrune, true),
    (Operation::SecondPrune, false),
];

/// A group before the operation.
struct Group {
    disk: SimStorage,
    journal: GroupJournal,
    source: Source,
    /// Its points then, and those of them that are to stay.
    before: BTreeSet<Epoch>,
    after: BTreeSet<Epoch>,
}

fn open(disk: &SimStorage) -> Result<GroupJournal, JournalError> {
    GroupJournal::open(Arc::new(disk.clone()), Path::new(FOLDER), LIMITS).map(|(journal, _)| journal)
}

fn listed(view: &GroupView) -> BTreeSet<Epoch> {
    view.points().map(|point| point.expect("a point").epoch).collect()
}

/// A small history; `seed` decides what comes of a cut, the history is always the same.
fn group(seed: u64, operation: Operation, with_key: bool) -> Group {
    let disk = SimStorage::new(seed);
    let mut journal =
        GroupJournal::create(Arc::new(disk.clone()), Path::new(FOLDER), identity(), LIMITS).expect("made");
    let mut source = Source::new(42);
    grow(&mut source, &mut journal, POINTS);
    if matches!(operation, Operation::SecondPrune) {
        prune(&mut journal, source.time, with_key).expect("no fault is set");
        grow(&mut source, &mut journal, POINTS + 8);
    }
    let before = listed(&journal.view());
    let after = if operation == Operation::Checkpoint {
        before.clone()
    } else {
        let plan =
            settings(source.time, None, &SimRandom::new(1), &mut |prune| prune.plan(&journal.view()).expect("planned"));
        before.iter().copied().filter(|epoch| plan.removed.iter().all(|removed| removed.epoch != *epoch)).collect()
    };
    Group { disk, journal, source, before, after }
}

fn grow(source: &mut Source, journal: &mut GroupJournal, points: usize) {
    while source.points.len() < points {
        source.time += HOUR_MS * 2 / 3;
        source.step(journal).expect("no fault is set");
    }
    source.sync(journal).expect("no fault is set");
}

fn settings<T>(now: i64, keys: Option<&Keyring>, random: &SimRandom, work: &mut dyn FnMut(&Prune<'_>) -> T) -> T {
    work(&Prune {
        ladder: &LADDER,
        now: Timestamp(now),
        wall: Timestamp(now),
        keys,
        random,
        segment_bytes_max: LIMITS.segment_bytes_max,
        chunk_bytes_max: CHUNK_BYTES_MAX,
        checkpoint_share: 0.5,
        keep_only_newest: true,
    })
}

fn prune(journal: &mut GroupJournal, now: i64, with_key: bool) -> Result<(), JournalError> {
    let keyring: Keyring = (&key()).into();
    let keys = Some(&keyring).filter(|_| with_key);
    let done = settings(now, keys, &SimRandom::new(now as u64), &mut |prune| {
        let view = journal.view();
        prune.run(view, journal, &mut |_| true, &mut |_, _| {})
    });
    match done {
        Ok(_) => Ok(()),
        Err(PruneError::Journal(error)) => Err(error),
        Err(error @ PruneError::OnlyNewest(_)) => panic!("{error}"),
    }
}

fn build(disk: &SimStorage, journal: &mut GroupJournal, with_key: bool) -> Result<(), JournalError> {
    let keyring: Keyring = (&key()).into();
    let keys = Some(&keyring).filter(|_| with_key);
    let view = journal.view();
    let epoch = *listed(&view).last().expect("points");
    if view.manifest().checkpoints.last().is_none_or(|last| last.epoch < epoch) {
        let random = SimRandom::new(7);
        let builder = Builder { view: &view, keys, random: &random, now: Timestamp(5) };
        let made = builder.build(epoch, &mut |_| true, &mut |_, _| {})?;
        journal.adopt(&Change::Checkpoint(made))?;
    }
    end(disk, Path::new(FOLDER))
}

impl Group {
    fn work(&mut self, operation: Operation, with_key: bool) -> Result<(), JournalError> {
        match operation {
            Operation::Checkpoint => build(&self.disk, &mut self.journal, with_key),
            _ => prune(&mut self.journal, self.source.time, with_key),
        }
    }

    /// All is listed that was, or all that stays; each point is exact.
    fn check(&self, what: &str) {
        for view in [self.journal.view(), self.beside()] {
            let listed = listed(&view);
            assert!(listed == self.before || listed == self.after, "{what}: {listed:?}");
            for epoch in listed {
                let model = self.source.points.iter().find(|point| point.head.epoch == epoch).expect("it was sent");
                assert_eq!(image_cells(&view, epoch).expect("an image"), *model.cells, "{what}: point {epoch}");
            }
            assert!(view.damages().is_empty(), "{what}: {:?}", view.damages());
        }
        for point in &self.source.points {
            assert!(self.journal.made_in(point.head).expect("read").is_some(), "{what}: {}", point.head.epoch);
        }
    }

    fn beside(&self) -> Arc<GroupView> {
        Arc::new(GroupView::open(Arc::new(self.disk.clone()), Path::new(FOLDER)).expect("a view"))
    }

    /// The operation once more, to its end: what stays is whole, and no file is left that nothing names.
    fn finish(&mut self, operation: Operation, with_key: bool, what: &str) {
        self.work(operation, with_key).unwrap_or_else(|error| panic!("{what}: the second time: {error}"));
        self.check(what);
        assert_eq!(listed(&self.journal.view()), self.after, "{what}");
        // A checkpoint sweeps nothing: that is pruning's.
        prune(&mut self.journal, self.source.time, with_key).unwrap_or_else(|error| panic!("{what}: {error}"));
        let keys: Keyring = (&key()).into();
        let report = verify(&self.beside(), Some(&keys), None, &mut |_| {}).expect("verified");
        assert_eq!(report.damages, vec![], "{what}");
        assert_eq!(self.stray(), Vec::<String>::new(), "{what}");
    }

    /// Files that nothing names.
    fn stray(&self) -> Vec<String> {
        let manifest = self.beside().manifest().clone();
        let folder = Path::new(FOLDER);
        let mut named: BTreeSet<_> = manifest.sealed.iter().map(|sealed| sealed.id().path(folder)).collect();
        named.insert(cdp_target::journal::segment::path(folder, manifest.open));
        named.extend(self.beside().packs().iter().map(|pack| pack.id.path(folder)));
        let images = manifest.checkpoints.iter().map(|made| made.path(folder));
        named.extend(images);
        let files = ["journal", "packs", "checkpoints"].into_iter().flat_map(|name| {
            let folder = folder.join(name);
            let listed = self.disk.list(&folder).unwrap_or_default();
            listed.into_iter().map(move |name| folder.join(name))
        });
        files.filter(|path| !named.contains(path)).map(|path| path.display().to_string()).collect()
    }
}

/// Cuts the power at call `call` of the operation; gives whether it came to it.
fn cut(call: u64, seed: u64, fault: Fault, operation: Operation, with_key: bool) -> bool {
    let what = format!("{operation:?}, with the key: {with_key}, {fault:?} at call {call}, seed {seed}");
    let mut group = group(seed, operation, with_key);
    let first = group.disk.calls() + call;
    group.disk.fault_at(first, fault);
    let worked = group.work(operation, with_key);
    let (came_to_it, is_down) = (group.disk.calls() > first, group.disk.is_down());
    assert!(is_down || worked.is_ok(), "{what}: {worked:?}");
    group.disk.clear_faults();
    if !is_down {
        group.disk.power_cut();
    }
    group.disk.restart();
    if fault == Fault::Death && seed.is_multiple_of(2) {
        // A reader before recovery, then recovery, then the power goes after all.
        drop(open(&group.disk).unwrap_or_else(|error| panic!("{what}: {error}")));
        group.disk.power_cut();
        group.disk.restart();
    }
    group.journal = open(&group.disk).unwrap_or_else(|error| panic!("{what}: {error}"));
    group.check(&what);
    group.finish(operation, with_key, &what);
    came_to_it
}

/// Lets the calls from `call` on, `calls` of them, fail; gives whether it came to them.
fn fail(call: u64, calls: u64, kind: ErrorKind, operation: Operation, with_key: bool) -> bool {
    let what = format!("{operation:?}, with the key: {with_key}, {calls} x {kind:?} at call {call}");
    let mut group = group(call, operation, with_key);
    let first = group.disk.calls() + call;
    (first..first + calls).for_each(|call| group.disk.fault_at(call, Fault::Error(kind)));
    let worked = group.work(operation, with_key);
    let came_to_it = group.disk.calls() > first;
    group.disk.clear_faults();
    if worked.is_ok() && came_to_it {
        group.check(&what);
    }
    // A journal that failed stops; it is opened anew.
    group.journal = open(&group.disk).unwrap_or_else(|error| panic!("{what}: {error}"));
    group.check(&what);
    group.finish(operation, with_key, &what);
    came_to_it
}

#[test]
fn the_power_is_cut_at_every_call() {
    let images = std::env::var("CDP_CRASH_IMAGES").ok().and_then(|text| text.parse().ok()).unwrap_or(1_u64);
    let mut cases = 0;
    for (operation, with_key) in OPERATIONS {
        for fault in [Fault::PowerCut, Fault::Death] {
            let mut call = 0;
            loop {
                // Every image of a call, also where the first did not come to it.
                let seeds = call * images..(call + 1) * images;
                let came = seeds.filter(|seed| cut(call, *seed, fault, operation, with_key)).count();
                if came == 0 {
                    break;
                }
                call += 1;
                cases += images;
            }
            assert!(call > 20, "{operation:?}: {call} calls");
        }
    }
    println!("{cases} cuts and deaths: no point that stays is lost");
}

#[test]
fn every_call_fails() {
    let mut cases = 0;
    for (operation, with_key) in OPERATIONS {
        for (kind, calls) in [(ErrorKind::Other, 1), (ErrorKind::Other, 2), (ErrorKind::StorageFull, 1)] {
            let mut call = 0;
            while fail(call, calls, kind, operation, with_key) {
                call += 1;
                cases += 1;
            }
        }
    }
    println!("{cases} failed calls: no point that stays is lost");
}
