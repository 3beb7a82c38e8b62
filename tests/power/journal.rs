//! The journal by plain system calls on a real file system, cut at a random write or flush of the disk below it.

#[path = "../../cdp-target/tests/journal_support/mod.rs"]
mod journal_support;

use crate::{Machine, can_run, env};
use anyhow::{Context, Result, ensure};
use cdp_seams::random::SimRandom;
use cdp_seams::storage::{Storage, StorageFile, SystemStorage};
use cdp_target::journal::{GroupJournal, JournalError, JournalLimits, RecoveryReport};
use cdp_tests::file_system::FileSystem;
use journal_support::{Source, check, identity};
use std::io;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Writes and flushes of the disk after which the power fails, at most: a dozen epochs' worth.
const REQUESTS_MAX: u64 = 120;

struct Lives {
    machine: Machine,
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    limits: JournalLimits,
    random: SimRandom,
    source: Source,
    cuts: u64,
    lost_sectors: usize,
}

impl Lives {
    /// Steps until the disk fails, or a bounded number of them; cuts the power then at the latest.
    fn live(&mut self, mut journal: GroupJournal) -> Result<()> {
        self.machine.disk().cut_in(1 + self.random.below(REQUESTS_MAX));
        for _ in 0..40 {
            if let Err(error) = self.source.step(&mut journal) {
                ensure!(self.machine.disk().is_cut().is_some(), "{error:?}");
                break;
            }
        }
        drop(journal);
        self.cut()
    }

    fn cut(&mut self) -> Result<()> {
        self.lost_sectors += self.machine.down()?.lost;
        self.cuts += 1;
        self.machine.up()
    }

    fn open(&self) -> Result<(GroupJournal, RecoveryReport), JournalError> {
        GroupJournal::open(Arc::clone(&self.storage), &self.folder, self.limits)
    }

    /// Opens the journal, with cuts on the way; checks what it says.
    fn recover(&mut self) -> Result<GroupJournal> {
        while self.random.below(3) == 0 {
            self.machine.disk().cut_in(1 + self.random.below(20));
            let opened = self.open();
            let is_cut = self.machine.disk().is_cut().is_some();
            if let (Err(error), false) = (&opened, is_cut) {
                return Err(anyhow::anyhow!("{error:?}"));
            }
            drop(opened);
            self.cut()?;
        }
        let (mut journal, report) = self.open()?;
        ensure!(report.damages.is_empty(), "a power cut is no damage: {:?}", report.damages);
        self.source.line_up(&mut journal)?;
        self.source.sync(&mut journal)?;
        let newest = self.source.points.len().saturating_sub(1);
        let sample = self.random.below(1 + newest as u64) as usize;
        check(&journal.view(), &self.source.points, |at| at == sample || at == newest);
        Ok(journal)
    }
}

fn lives(kind: FileSystem, seed: u64, cuts: u64, storage: Arc<dyn Storage>) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let machine = Machine::new(scratch.path(), kind, seed)?;
    let folder = machine.folder().join("branch/main");
    let random = SimRandom::new(seed ^ 0x5eed);
    let limits = JournalLimits { segment_bytes_max: 5_000 + random.below(40_000) };
    let mut journal = GroupJournal::create(Arc::clone(&storage), &folder, identity(), limits)?;
    let source = Source::new(seed);
    let mut lives = Lives { machine, storage, folder, limits, random, source, cuts: 0, lost_sectors: 0 };
    while lives.cuts < cuts {
        lives.live(journal)?;
        journal = lives.recover()?;
    }
    check(&journal.view(), &lives.source.points, |_| true);
    drop(journal);
    let Lives { cuts, lost_sectors, source, .. } = &lives;
    eprintln!("{kind:?}: {cuts} power cuts, {lost_sectors} sectors lost, {} points, all there", source.points.len());
    ensure!(*lost_sectors > 0, "a cut that loses nothing shows nothing");
    lives.machine.down().map(drop)
}

#[test]
fn the_journal_on_real_file_systems() -> Result<()> {
    if !can_run("the_journal_on_real_file_systems") {
        return Ok(());
    }
    let (cuts, seed) = (env("CDP_REAL_POWER_CUTS", 20), env("CDP_SEED", 1));
    for kind in [FileSystem::Ext4, FileSystem::Xfs, FileSystem::Btrfs] {
        lives(kind, seed, cuts, Arc::new(SystemStorage)).with_context(|| format!("{kind:?} with CDP_SEED={seed}"))?;
    }
    Ok(())
}

/// Says of content that it is durable, and leaves it to the page cache.
struct NeverSynced;

struct NeverSyncedFile(Box<dyn StorageFile>);

impl Storage for NeverSynced {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        Ok(Box::new(NeverSyncedFile(SystemStorage.create_new(path)?)))
    }
    fn open(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        SystemStorage.open(path)
    }
    fn open_write(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        Ok(Box::new(NeverSyncedFile(SystemStorage.open_write(path)?)))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        SystemStorage.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        SystemStorage.remove(path)
    }
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        SystemStorage.create_dir_all(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        SystemStorage.list(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        SystemStorage.sync_dir(path)
    }
    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        SystemStorage.free_bytes(path)
    }
}

impl StorageFile for NeverSyncedFile {
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
        Ok(())
    }
    fn try_lock(&self) -> io::Result<bool> {
        self.0.try_lock()
    }
}

/// The cuts are worth what they find.
#[test]
fn content_that_is_never_synced_is_missed() -> Result<()> {
    if !can_run("content_that_is_never_synced_is_missed") {
        return Ok(());
    }
    for kind in [FileSystem::Ext4, FileSystem::Xfs, FileSystem::Btrfs] {
        let lived = std::panic::catch_unwind(AssertUnwindSafe(|| lives(kind, 5, 20, Arc::new(NeverSynced))));
        ensure!(!matches!(lived, Ok(Ok(()))), "{kind:?}: nothing was missed");
    }
    Ok(())
}
