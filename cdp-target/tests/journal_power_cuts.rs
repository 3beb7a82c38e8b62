//! Power cuts at random storage calls, also during recovery: no acked point is ever lost, no torn one offered.

mod journal_support;

use cdp_seams::random::SimRandom;
use cdp_seams::storage::sim::{Fault, SimStorage};
use cdp_seams::storage::{Storage, StorageFile};
use cdp_target::journal::{GroupJournal, GroupView, JournalError, JournalLimits};
use journal_support::{Source, check, identity};
use std::io;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
        0 => Fault::Error(io::ErrorKind::Other),
        1 => Fault::Error(io::ErrorKind::StorageFull),
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

/// What is done wrong between the journal and the disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wrong {
    /// Names are said to be durable and are not.
    NoFolderSync,
    /// A failed sync is tried again, and the second one is believed.
    SyncRetried,
}

#[derive(Clone)]
struct Sabotaged(SimStorage, Wrong);

struct RetriedFile(Box<dyn StorageFile>);

impl Sabotaged {
    fn file(&self, file: Box<dyn StorageFile>) -> Box<dyn StorageFile> {
        if self.1 == Wrong::SyncRetried { Box::new(RetriedFile(file)) } else { file }
    }
}

impl Storage for Sabotaged {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        self.0.create_new(path).map(|file| self.file(file))
    }
    fn open(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        self.0.open(path)
    }
    fn open_write(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        self.0.open_write(path).map(|file| self.file(file))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.remove(path)
    }
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        self.0.create_dir_all(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        self.0.list(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        if self.1 == Wrong::NoFolderSync { Ok(()) } else { self.0.sync_dir(path) }
    }
    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.0.free_bytes(path)
    }
}

impl StorageFile for RetriedFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync().or_else(|_| self.0.sync())
    }
    fn try_lock(&self) -> io::Result<bool> {
        self.0.try_lock()
    }
}

fn without_folder_sync(disk: SimStorage) -> Arc<dyn Storage> {
    Arc::new(Sabotaged(disk, Wrong::NoFolderSync))
}

fn with_sync_retried(disk: SimStorage) -> Arc<dyn Storage> {
    Arc::new(Sabotaged(disk, Wrong::SyncRetried))
}

/// The first seed at which the simulation finds the fault.
fn found_at(wrap: Wrap, ack_early: bool) -> Option<u64> {
    let silent = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let found = (1..2000).find(|seed| std::panic::catch_unwind(|| lives(*seed, wrap, ack_early)).is_err());
    std::panic::set_hook(silent);
    found
}

/// The simulation is worth what it finds: each of these has lost data somewhere.
#[test]
fn sabotage_is_found() {
    let found = [
        ("ack before sync", found_at(plain, true)),
        ("no folder sync", found_at(without_folder_sync, false)),
        ("sync tried again", found_at(with_sync_retried, false)),
    ];
    for (what, seed) in found {
        println!("{what}: found with seed {}", seed.unwrap_or_else(|| panic!("{what}: not found")));
    }
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
