//! Every storage call fails once, with every kind of error: nothing acked is lost, nothing panics.

mod journal_support;

use cdp_seams::storage::sim::{Fault, SimStorage};
use cdp_target::journal::{GroupJournal, JournalError, JournalLimits};
use journal_support::{Source, check, identity};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

const FOLDER: &str = "/store/branch/main";
const LIMITS: JournalLimits = JournalLimits { segment_bytes_max: 6000 };

fn work(journal: &mut GroupJournal, source: &mut Source) -> Result<(), JournalError> {
    for _ in 0..10 {
        source.step(journal)?;
    }
    source.sync(journal)
}

/// A small workload and a recovery, with call `call` failing; gives whether it came to that call.
fn run(call: u64, fault: Fault, cut_after: bool) -> bool {
    let disk = SimStorage::new(call);
    disk.fault_at(call, fault);
    let mut source = Source::new(42);
    let create = || GroupJournal::create(Arc::new(disk.clone()), Path::new(FOLDER), identity(), LIMITS);
    let mut journal = match create() {
        Ok(journal) => journal,
        Err(_) => match create() {
            Ok(journal) => journal,
            // The manifest came to be, and the call behind it failed.
            Err(JournalError::Exists(_)) => open(&disk),
            Err(error) => panic!("call {call}: {error}"),
        },
    };
    let worked = work(&mut journal, &mut source);
    if let (Err(error), Fault::Error(ErrorKind::StorageFull)) = (&worked, fault) {
        let full = error.is_full() || matches!(error, JournalError::Poisoned { .. });
        assert!(full, "call {call}: {error}");
        assert!(matches!(journal.sync(), Err(JournalError::Poisoned { .. })), "no sync is tried twice");
    }
    drop(journal);
    if cut_after {
        disk.power_cut();
        disk.restart();
    }
    // The fault may still be to come, in recovery: then recovery is tried again.
    let mut journal = match GroupJournal::open(Arc::new(disk.clone()), Path::new(FOLDER), LIMITS) {
        Ok((journal, report)) => {
            assert_eq!(report.damages, [], "call {call}");
            journal
        }
        Err(_) => open(&disk),
    };
    let came_to_it = disk.calls() > call;
    disk.clear_faults();
    source.line_up(&mut journal).expect("no fault is set");
    work(&mut journal, &mut source).expect("no fault is set");
    drop(journal);
    disk.power_cut();
    disk.restart();
    check(&open(&disk).view(), &source.points, |at| at % 3 == 0);
    came_to_it
}

fn open(disk: &SimStorage) -> GroupJournal {
    GroupJournal::open(Arc::new(disk.clone()), Path::new(FOLDER), LIMITS).expect("recovered").0
}

#[test]
fn every_call_fails_once() {
    let mut calls = 0;
    for kind in [ErrorKind::Other, ErrorKind::StorageFull] {
        for cut_after in [false, true] {
            let mut call = 0;
            while run(call, Fault::Error(kind), cut_after) {
                call += 1;
            }
            calls += call;
        }
    }
    println!("{calls} failed calls");
    assert!(calls > 200, "{calls}");
}
