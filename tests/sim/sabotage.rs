//! What is done wrong on purpose, from the outside: the simulation is worth what it finds of it.
//!
//! Between the journal and its disk, between the receiver and its journal, in the simulated tracker; and, for what nobody can
//! do from outside, behind the feature `sabotage` of the protocol, with which no program is built.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cdp_protocol::frame::Frame;
use cdp_protocol::message::{OpenGroup, PointSummary};
use cdp_protocol::session::chain::{Chain, Step};
use cdp_protocol::session::lineage::{Line, Lineage};
use cdp_protocol::session::target::{Claim, Ruling};
use cdp_protocol::units::{Epoch, Generation, GroupId, Head, Timestamp};
use cdp_seams::storage::sim::SimStorage;
use cdp_seams::storage::{Storage, StorageFile};
use cdp_source::sim;
use cdp_target::journal::change::Change;
use cdp_target::journal::file::FileId;
use cdp_target::journal::{Damage, Fork, GroupView};
use cdp_target::prune::Prune;
use cdp_target::receiver::{Changed, GroupStore, GroupWriter, StoreError};
use cdp_target::retention::{Candidate, Decision, Held, Verdict, decide, keeps_only_newest};

/// What is done wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Sabotage {
    /// Nothing.
    #[default]
    None,
    /// Files are said to be durable and are not.
    SyncLeftOut,
    /// Names are said to be durable and are not.
    FolderSyncLeftOut,
    /// The ack leaves before the sync.
    AckBeforeSync,
    /// A failed sync is tried again, and the second one is believed.
    SyncRetried,
    /// Frames need not follow one another, lists of frames need not match. (Feature `sabotage`.)
    #[cfg(feature = "sabotage")]
    ChainUnchecked,
    /// A block is called unchanged though something is under way for it. (Feature `sabotage`.)
    #[cfg(feature = "sabotage")]
    UnderWayPassedOver,
    /// The tracker does not wait for its runs under way when it flips.
    BarrierLeftOut,
    /// What was read is not held against the marks of writes issued meanwhile.
    ValidationLeftOut,
    /// A point's age is counted from its cut, by the source's clock.
    PruneBySourceClock,
}

impl Sabotage {
    /// Everything the simulation has to find.
    pub(crate) const ALL: &[Self] = &[
        Self::SyncLeftOut,
        Self::FolderSyncLeftOut,
        Self::AckBeforeSync,
        Self::SyncRetried,
        #[cfg(feature = "sabotage")]
        Self::ChainUnchecked,
        #[cfg(feature = "sabotage")]
        Self::UnderWayPassedOver,
        Self::BarrierLeftOut,
        Self::ValidationLeftOut,
        Self::PruneBySourceClock,
    ];

    /// What is wrong with the source's tracker.
    pub(crate) const fn of_tracker(self) -> sim::Sabotage {
        match self {
            Self::BarrierLeftOut => sim::Sabotage::SkipBarrier,
            Self::ValidationLeftOut => sim::Sabotage::SkipValidation,
            _ => sim::Sabotage::None,
        }
    }

    /// What is removed by the wrong clock, as far as settings do not forbid it.
    pub(crate) fn removes(self, view: &GroupView, prune: &Prune<'_>) -> Option<Change> {
        if self != Self::PruneBySourceClock {
            return None;
        }
        let points = view.points().filter_map(Result::ok).map(|point| Candidate {
            epoch: point.epoch,
            time: point.cut_time,
            received: point.cut_time,
            held: (point.pinned || point.label.is_some()).then_some(Held::Pinned),
        });
        let decisions: Vec<Decision> = decide(prune.ladder, points, prune.now).collect();
        let goes = |decision: &&Decision| matches!(decision.verdict, Verdict::Removed(_));
        let removed: Vec<_> = decisions.iter().filter(goes).map(|decision| (decision.epoch, decision.epoch)).collect();
        let is_refused = keeps_only_newest(decisions) && !prune.keep_only_newest;
        (!removed.is_empty() && !is_refused).then_some(Change::Remove { removed })
    }

    /// The target's disk, as its programs see it.
    pub(crate) fn storage(self, disk: &SimStorage) -> Arc<dyn Storage> {
        match self {
            Self::SyncLeftOut | Self::FolderSyncLeftOut | Self::SyncRetried => {
                Arc::new(LyingStorage(disk.clone(), self))
            }
            _ => Arc::new(disk.clone()),
        }
    }

    /// The store, as the receiver sees it.
    pub(crate) fn store(self, store: Arc<dyn GroupStore>) -> Arc<dyn GroupStore> {
        if self == Self::AckBeforeSync { Arc::new(HastyStore(store)) } else { store }
    }
}

struct LyingStorage(SimStorage, Sabotage);

struct LyingFile(Box<dyn StorageFile>, Sabotage);

impl LyingStorage {
    fn file(&self, file: io::Result<Box<dyn StorageFile>>) -> io::Result<Box<dyn StorageFile>> {
        Ok(Box::new(LyingFile(file?, self.1)))
    }
}

impl Storage for LyingStorage {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        self.file(self.0.create_new(path))
    }
    fn open(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        self.0.open(path)
    }
    fn open_write(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        self.file(self.0.open_write(path))
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
        if self.1 == Sabotage::FolderSyncLeftOut { Ok(()) } else { self.0.sync_dir(path) }
    }
    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.0.free_bytes(path)
    }
}

impl StorageFile for LyingFile {
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
        match self.1 {
            Sabotage::SyncLeftOut => Ok(()),
            Sabotage::SyncRetried => self.0.sync().or_else(|_| self.0.sync()),
            _ => self.0.sync(),
        }
    }
    fn try_lock(&self) -> io::Result<bool> {
        self.0.try_lock()
    }
}

struct HastyStore(Arc<dyn GroupStore>);

/// Says that it has synced, and does it at the next call.
struct HastyWriter(Box<dyn GroupWriter>, bool);

impl HastyWriter {
    fn catch_up(&mut self) -> Result<(), StoreError> {
        if std::mem::take(&mut self.1) { self.0.sync() } else { Ok(()) }
    }
}

impl GroupStore for HastyStore {
    fn open_or_create(&self, office: &str, request: &OpenGroup) -> Result<Box<dyn GroupWriter>, StoreError> {
        Ok(Box::new(HastyWriter(self.0.open_or_create(office, request)?, false)))
    }
    fn open(&self, office: &str, group: GroupId) -> Result<Box<dyn GroupWriter>, StoreError> {
        Ok(Box::new(HastyWriter(self.0.open(office, group)?, false)))
    }
}

impl GroupWriter for HastyWriter {
    fn chain(&self) -> &Chain {
        self.0.chain()
    }
    fn made_in(&self, point: Head) -> Result<Option<Generation>, StoreError> {
        self.0.made_in(point)
    }
    fn lineage(&self) -> &Lineage {
        self.0.lineage()
    }
    fn ruling(&self) -> &Ruling {
        self.0.ruling()
    }
    fn identify(&mut self, request: &OpenGroup) -> Result<(), StoreError> {
        self.catch_up()?;
        self.0.identify(request)
    }
    fn begin(&mut self, line: Line) -> Result<(), StoreError> {
        self.catch_up()?;
        self.0.begin(line)
    }
    fn append(&mut self, frame: &Frame<'_>, received: Timestamp) -> Result<Step, StoreError> {
        self.catch_up()?;
        self.0.append(frame, received)
    }
    fn sync(&mut self) -> Result<(), StoreError> {
        self.catch_up()?;
        self.1 = true;
        Ok(())
    }
    fn frozen(&self) -> Option<String> {
        self.0.frozen()
    }
    fn freeze(&mut self, reason: &str, fork: Option<Fork>) -> Result<(), StoreError> {
        self.0.freeze(reason, fork)
    }
    fn resolve(&mut self, head: &str) -> Result<Claim, StoreError> {
        self.0.resolve(head)
    }
    fn points(&self, after: Option<Epoch>, max: usize) -> Result<Vec<PointSummary>, StoreError> {
        self.0.points(after, max)
    }
    fn changes_since(&self, since: Head) -> Result<Option<Vec<Changed>>, StoreError> {
        self.0.changes_since(since)
    }
    fn note_damages(&mut self, file: FileId, damages: &[Damage]) -> Result<(), StoreError> {
        self.0.note_damages(file, damages)
    }
    fn adopt(&mut self, change: &Change) -> Result<(), StoreError> {
        self.0.adopt(change)
    }
    fn oldest_lease(&self) -> Option<u64> {
        self.0.oldest_lease()
    }

    fn look_again(&mut self) {
        self.0.look_again();
    }

    fn pin(&mut self, epoch: Epoch, pinned: bool) -> Result<(), StoreError> {
        self.0.pin(epoch, pinned)
    }

    fn label(&mut self, epoch: Epoch, label: Option<&str>) -> Result<(), StoreError> {
        self.0.label(epoch, label)
    }
}
