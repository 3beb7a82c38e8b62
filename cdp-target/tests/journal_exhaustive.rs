//! Small and whole: every history of at most three operations, every moment of its last one, everything a power cut there
//! could leave. Most bugs of crash consistency need no more.
//!
//! With `CDP_EXHAUSTIVE=1` the blocks of parts do not compress: more sectors are pending at a time, and there are many more images.

mod journal_support;

use cdp_seams::storage::sim::{Fault, SimStorage};
use cdp_target::journal::{GroupJournal, JournalError, JournalLimits};
use journal_support::{Cell, Source, check, identity};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

const FOLDER: &str = "/store/branch/main";
/// Pending changes of which every subset is tried; of more, those of the newest so many, with the older ones all kept or all lost.
const PENDING_MAX: usize = 12;

/// What is done to a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// Frames of an attempt that has no end yet.
    Extents,
    /// An attempt that ends as a part.
    Part,
    /// An attempt that ends as a point.
    Commit,
    /// What was appended is made durable, and the segment sealed if it is full.
    Sync,
    /// A new generation.
    Grant,
    /// The newest durable point gets a name.
    Label,
    /// The process ends, another recovers, and the source goes on from where that stands.
    Reopen,
}

const ACTS: [Act; 7] = [Act::Extents, Act::Part, Act::Commit, Act::Sync, Act::Grant, Act::Label, Act::Reopen];
/// Segments that are full at every sync, and those that never are.
const SEGMENT_BYTES: [u64; 2] = [1, 1 << 20];

struct Machine {
    disk: SimStorage,
    limits: JournalLimits,
    source: Source,
    journal: Option<GroupJournal>,
    fills: u64,
}

/// What was seen.
#[derive(Default)]
struct Count {
    histories: u64,
    moments: u64,
    subsets: u64,
    distinct: u64,
    bounded: u64,
}

impl Machine {
    fn new(segment_bytes_max: u64) -> Self {
        let limits = JournalLimits { segment_bytes_max };
        Self { disk: SimStorage::new(1), limits, source: Source::new(7), journal: None, fills: 0 }
    }

    /// A group with one durable point.
    fn with_a_point(segment_bytes_max: u64) -> Self {
        let mut machine = Self::new(segment_bytes_max);
        machine.create().and_then(|()| machine.all(&[Act::Grant, Act::Commit, Act::Sync])).expect("no fault is set");
        machine
    }

    fn create(&mut self) -> Result<(), JournalError> {
        let storage = Arc::new(self.disk.clone());
        self.journal = Some(GroupJournal::create(storage, Path::new(FOLDER), identity(), self.limits)?);
        Ok(())
    }

    fn all(&mut self, acts: &[Act]) -> Result<(), JournalError> {
        acts.iter().try_for_each(|act| self.act(*act))
    }

    fn act(&mut self, act: Act) -> Result<(), JournalError> {
        let journal = self.journal.as_mut().expect("open");
        match act {
            Act::Extents | Act::Part | Act::Commit => {
                self.fills += 1;
                // A block that is filled with a multiple of 13 does not compress.
                let is_noise = act == Act::Part && std::env::var_os("CDP_EXHAUSTIVE").is_some();
                let fill = if is_noise { 13 * self.fills } else { self.fills };
                self.source.make_of(act == Act::Part, &[(0, self.fills as u32, Cell::Filled(fill))]);
                let ends = usize::from(act == Act::Extents);
                let frames = self.source.attempt.as_ref().map_or(0, |attempt| attempt.frames.len()) - ends;
                self.source.send(journal, 0, frames)
            }
            Act::Sync => self.source.sync(journal),
            Act::Grant => self.source.grant(journal),
            Act::Label => match journal.synced_head() {
                Some(head) => journal.label(head.epoch, Some("name")),
                None => Ok(()),
            },
            Act::Reopen => {
                self.journal = None;
                let storage = Arc::new(self.disk.clone());
                let journal = self.journal.insert(GroupJournal::open(storage, Path::new(FOLDER), self.limits)?.0);
                self.source.line_up(journal)
            }
        }
    }
}

/// Recovers from an image, and checks what it says; twice, for recovery is to be cut off too.
fn recover(image: &SimStorage, machine: &Machine, what: &str) {
    let open = || GroupJournal::open(Arc::new(image.clone()), Path::new(FOLDER), machine.limits);
    let source = &machine.source;
    let journal = match open() {
        Ok((journal, report)) => {
            assert_eq!(report.damages, [], "{what}: a crash is no damage");
            journal
        }
        // Before it was made there was nothing to lose.
        Err(error) => return assert!(source.acked_points == 0 && source.generation.0 <= 1, "{what}: {error}"),
    };
    let kept = journal.view().points().count();
    assert!(kept >= source.acked_points, "{what}: an acked point is lost");
    assert!(kept <= source.points.len(), "{what}: a point that was never committed");
    check(&journal.view(), &source.points[..kept], |_| true);
    if kept == source.points.len() && journal.chain().generation() == source.generation {
        let parts = journal.chain().parts().map_or(0, |(_, parts)| parts.count as usize);
        assert!(parts >= source.acked_parts, "{what}: an acked part is lost");
    }
    drop(journal);
    let (journal, report) = open().expect("recovered again");
    assert_eq!(
        (report.torn_bytes, journal.view().points().count()),
        (0, kept),
        "{what}: a second recovery finds the same"
    );
}

/// Every image of every moment of `last`, which is run on a machine of its own for each. Moments that differ from the one
/// before in nothing that a disk holds have no images of their own; how it was before `last` is the history before's to try.
fn explore(
    what: &str,
    prepare: &dyn Fn() -> Machine,
    last: &dyn Fn(&mut Machine) -> Result<(), JournalError>,
    count: &mut Count,
) {
    count.histories += 1;
    let mut before = state(&prepare());
    let mut seen = HashSet::new();
    for moment in 0.. {
        assert!(moment < 1000, "{what}: it does not end");
        let mut machine = prepare();
        machine.disk.fault_at(machine.disk.calls() + moment, Fault::End);
        let ended = last(&mut machine).is_ok();
        machine.disk.clear_faults();
        let now = state(&machine);
        if std::mem::replace(&mut before, now) != now {
            count.moments += 1;
            try_images(&format!("{what}, moment {moment}"), &machine, &mut seen, count);
        }
        if ended {
            break;
        }
    }
}

/// What a disk holds and may come to hold, and what was promised of it.
fn state(machine: &Machine) -> (u64, u64, usize, usize, usize) {
    let (disk, source) = (&machine.disk, &machine.source);
    let (nothing, everything) = (disk.image(0).fingerprint(), disk.image(u64::MAX).fingerprint());
    (nothing, everything, disk.pending(), source.acked_points, source.acked_parts)
}

fn try_images(what: &str, machine: &Machine, seen: &mut HashSet<u64>, count: &mut Count) {
    let pending = machine.disk.pending();
    assert!(pending < 64, "{what}: {pending} changes are pending");
    let older = pending.saturating_sub(PENDING_MAX);
    count.bounded += u64::from(older > 0);
    for newer in 0..1u64 << (pending - older) {
        for kept_older in [0, (1u64 << older) - 1].into_iter().take(1 + usize::from(older > 0)) {
            count.subsets += 1;
            let kept = newer << older | kept_older;
            let image = machine.disk.image(kept);
            if seen.insert(image.fingerprint()) {
                count.distinct += 1;
                recover(&image, machine, &format!("{what}, kept {kept:b}"));
            }
        }
    }
}

#[test]
fn every_image_of_every_small_history() {
    let mut count = Count::default();
    for bytes in SEGMENT_BYTES {
        explore("create", &|| Machine::new(bytes), &Machine::create, &mut count);
        let first = [Act::Grant, Act::Commit, Act::Sync];
        for (at, act) in first.iter().enumerate() {
            let prepare = || {
                let mut machine = Machine::new(bytes);
                machine.create().and_then(|()| machine.all(&first[..at])).expect("no fault is set");
                machine
            };
            explore(&format!("first {act:?}"), &prepare, &|machine| machine.act(*act), &mut count);
        }
        for histories in [vec![vec![]], lists(1), lists(2)] {
            for history in histories {
                for act in ACTS {
                    let prepare = || {
                        let mut machine = Machine::with_a_point(bytes);
                        machine.all(&history).expect("no fault is set");
                        machine
                    };
                    let what = format!("segments of {bytes}: {history:?} {act:?}");
                    explore(&what, &prepare, &|machine| machine.act(act), &mut count);
                }
            }
        }
    }
    let Count { histories, moments, subsets, distinct, bounded } = count;
    println!(
        "{histories} histories, {moments} moments, {subsets} subsets, {distinct} distinct images recovered; at {bounded} moments more than {PENDING_MAX} changes were pending"
    );
    assert!(histories > 800 && moments > 5000 && distinct > 20_000, "{histories} {moments} {distinct}");
}

/// All lists of `len` operations.
fn lists(len: u32) -> Vec<Vec<Act>> {
    let count = ACTS.len().pow(len);
    (0..count).map(|number| (0..len).map(|at| ACTS[number / ACTS.len().pow(at) % ACTS.len()]).collect()).collect()
}
