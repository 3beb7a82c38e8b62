//! Power cuts at random storage calls, also during recovery: no acked point is ever lost, no torn one offered.

mod support;

use cdp_seams::random::SimRandom;
use cdp_seams::storage::Storage;
use cdp_seams::storage::sim::{Fault, SimStorage};
use cdp_target::journal::{GroupJournal, GroupView, JournalError, JournalLimits};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::Arc;
use support::{Source, check, identity};

const FOLDER: &str = "/store/branch/main";

/// What a simulation is run with: the storage as the journal sees it, around the disk.
type Wrap = fn(SimStorage) -> Arc<dyn Storage>;

/// One machine: a workload with 1 to 4 power cuts. Gives the number of cuts.
fn lives(seed: u64, wrap: Wrap, ack_early: bool) -> u64 {
    let disk = SimStorage::new(seed);
    let random = SimRandom::new(seed ^ 0x5eed);
    let storage = wrap(disk.clone());
    let limits = JournalLimits { segment_bytes_max: 2000 + random.below(8000) };
    let mut source = Source::new(seed);
    let mut cuts = 0;
    let mut journal = GroupJournal::create(Arc::clone(&storage), Path::new(FOLDER), identity(), limits).expect("made");
    for _ in 0..=random.below(4) {
        let in_calls = random.below(60);
        disk.fault_at(disk.calls() + in_calls, random_fault(&random));
        live(&mut journal, &mut source, ack_early);
        disk.clear_faults();
        drop(journal);
        // Not every failure is a power cut: often enough the process alone is started anew.
        if !disk.is_down() && random.below(2) == 0 {
            disk.power_cut();
        }
        cuts += u64::from(disk.is_down());
        disk.restart();
        journal = recover(&disk, &storage, limits, &random, &mut source, &mut cuts);
    }
    check(&journal.view(), &source.points, |_| true);
    cuts
}

fn random_fault(random: &SimRandom) -> Fault {
    match random.below(8) {
        0 => Fault::Error(std::io::ErrorKind::Other),
        1 => Fault::Error(std::io::ErrorKind::StorageFull),
        _ => Fault::PowerCut,
    }
}

/// Steps until something fails, or a bounded number of them.
fn live(journal: &mut GroupJournal, source: &mut Source, ack_early: bool) {
    for _ in 0..12 {
        let mut step = || -> Result<(), JournalError> {
            source.step(journal)?;
            if ack_early {
                source.acked();
            }
            Ok(())
        };
        if step().is_err() {
            return;
        }
    }
}

/// Opens the journal, with cuts on the way, twice; checks what it says.
fn recover(
    disk: &SimStorage,
    storage: &Arc<dyn Storage>,
    limits: JournalLimits,
    random: &SimRandom,
    source: &mut Source,
    cuts: &mut u64,
) -> GroupJournal {
    let open = || GroupJournal::open(Arc::clone(storage), Path::new(FOLDER), limits);
    while random.below(3) == 0 {
        disk.fault_at(disk.calls() + random.below(20), Fault::PowerCut);
        let _cut_or_not = open();
        disk.clear_faults();
        disk.power_cut();
        disk.restart();
        *cuts += 1;
    }
    let beside = GroupView::open(Arc::clone(storage), Path::new(FOLDER)).expect("a view");
    let shown = beside.points().count();
    let (journal, report) = open().expect("recovered");
    assert_eq!(report.damages, [], "a crash is no damage");
    let first = standing(&journal);
    assert!(shown <= first.0.len(), "a reader sees no more than the recovered journal");
    drop(journal);
    let (mut journal, report) = open().expect("recovered again");
    assert_eq!(report.torn_bytes, 0, "a second recovery has nothing to cut");
    assert_eq!(standing(&journal), first);
    source.line_up(&mut journal).expect("no fault is set");
    source.sync(&mut journal).expect("no fault is set");
    let sample = random.below(1 + source.points.len() as u64) as usize;
    let newest = source.points.len().saturating_sub(1);
    check(&journal.view(), &source.points, |at| at == sample || at == newest);
    journal
}

type Standing = (Vec<cdp_target::journal::Point>, Option<cdp_protocol::units::Head>, u32, Option<u64>);

fn standing(journal: &GroupJournal) -> Standing {
    let points = journal.view().points().map(|point| point.expect("a point")).collect();
    let chain = journal.chain();
    let parts = chain.parts().map_or(0, |(_, parts)| parts.count);
    (points, chain.head().map(|(head, _)| head), parts, chain.open().map(|open| open.next.0))
}

fn plain(disk: SimStorage) -> Arc<dyn Storage> {
    Arc::new(disk)
}

fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn power_cuts() {
    let wanted = env("CDP_POWER_CUTS", 500);
    let first = env("CDP_SEED", 1);
    let (mut cuts, mut seed) = (0, first);
    while cuts < wanted {
        let lived = std::panic::catch_unwind(AssertUnwindSafe(|| lives(seed, plain, false)));
        cuts += lived.unwrap_or_else(|_| panic!("failed with CDP_SEED={seed}"));
        seed += 1;
    }
    println!("{cuts} power cuts, seeds {first}..{seed}: no acked point lost");
}
