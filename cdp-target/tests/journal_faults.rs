//! Every storage call fails, with every kind of error, once and for good: nothing acked is lost, nothing panics.
//!
//! The workload makes a group, appends, syncs, seals segments, names points, begins generations and recovers.

mod journal_support;

use cdp_seams::storage::sim::{Fault, SimStorage};
use cdp_target::journal::{GroupJournal, JournalError, JournalLimits};
use journal_support::{Source, check, identity};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

const FOLDER: &str = "/store/branch/main";
const LIMITS: JournalLimits = JournalLimits { segment_bytes_max: 6000 };
/// EIO, ENOSPC, EDQUOT, EINTR, EROFS, EACCES.
const KINDS: [ErrorKind; 6] = [
    ErrorKind::Other,
    ErrorKind::StorageFull,
    ErrorKind::QuotaExceeded,
    ErrorKind::Interrupted,
    ErrorKind::ReadOnlyFilesystem,
    ErrorKind::PermissionDenied,
];

/// How a call fails, and what comes after.
#[derive(Clone, Copy, Debug)]
struct Failure {
    kind: ErrorKind,
    /// All calls after it fail too, until the disk is mended.
    for_good: bool,
    /// The power is cut before the recovery.
    cut_after: bool,
}

fn work(journal: &mut GroupJournal, source: &mut Source) -> Result<(), JournalError> {
    for step in 0..10 {
        source.step(journal)?;
        if let Some(head) = journal.synced_head().filter(|_| step % 3 == 2) {
            journal.label(head.epoch, Some("named"))?;
        }
    }
    source.sync(journal)
}

/// A small workload and a recovery, with call `call` failing; gives whether it came to that call.
fn run(call: u64, failure: Failure) -> bool {
    let Failure { kind, for_good, cut_after } = failure;
    let what = format!("call {call}, {failure:?}");
    let disk = SimStorage::new(call);
    if for_good {
        disk.fail_from(call, kind);
    } else {
        disk.fault_at(call, Fault::Error(kind));
    }
    let mut source = Source::new(42);
    let mut journal = create(&disk, for_good, &what);
    let worked = work(&mut journal, &mut source);
    if let (Err(error), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) = (&worked, kind) {
        let full = error.is_full() || matches!(error, JournalError::Poisoned { .. });
        assert!(full, "{what}: {error}");
    }
    if worked.is_err() {
        assert!(matches!(journal.sync(), Err(JournalError::Poisoned { .. })), "{what}: no sync is tried twice");
    }
    drop(journal);
    if cut_after {
        disk.power_cut();
        disk.restart();
    }
    // The fault may still be to come, in recovery, or still be there: then recovery is tried again, on a mended disk.
    let recovered = GroupJournal::open(Arc::new(disk.clone()), Path::new(FOLDER), LIMITS);
    let came_to_it = disk.calls() > call;
    disk.clear_faults();
    let mut journal = recovered.map_or_else(
        |_| open(&disk),
        |(journal, report)| {
            assert_eq!(report.damages, [], "{what}");
            journal
        },
    );
    source.line_up(&mut journal).expect("no fault is set");
    work(&mut journal, &mut source).expect("no fault is set");
    drop(journal);
    disk.power_cut();
    disk.restart();
    check(&open(&disk).view(), &source.points, |at| at % 3 == 0);
    came_to_it
}

/// Makes the group; again on a mended disk, where it would go on failing.
fn create(disk: &SimStorage, for_good: bool, what: &str) -> GroupJournal {
    let create = || GroupJournal::create(Arc::new(disk.clone()), Path::new(FOLDER), identity(), LIMITS);
    create().unwrap_or_else(|_| {
        if for_good {
            disk.clear_faults();
        }
        match create() {
            Ok(journal) => journal,
            // The manifest came to be, and the call behind it failed.
            Err(JournalError::Exists(_)) => open(disk),
            Err(error) => panic!("{what}: {error}"),
        }
    })
}

fn open(disk: &SimStorage) -> GroupJournal {
    GroupJournal::open(Arc::new(disk.clone()), Path::new(FOLDER), LIMITS).expect("recovered").0
}

#[test]
fn every_call_fails_in_every_way() {
    let mut cases = 0;
    for kind in KINDS {
        for (for_good, cut_after) in [(false, false), (false, true), (true, false), (true, true)] {
            let mut call = 0;
            while run(call, Failure { kind, for_good, cut_after }) {
                call += 1;
            }
            assert!(call > 100, "{call} calls");
            cases += call;
        }
    }
    println!("{cases} cases: every call of the workload, {} errors, once and for good", KINDS.len());
}
