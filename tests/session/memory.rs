//! A store in memory that forgets at a crash what was not synced, or some of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use cdp_protocol::frame::{self, Frame};
use cdp_protocol::message::{OpenGroup, PointSummary};
use cdp_protocol::session::chain::{Chain, Step};
use cdp_protocol::session::lineage::{Line, Lineage};
use cdp_protocol::session::target::{Claim, Ruling};
use cdp_protocol::units::{Epoch, Generation, GroupId, Head, Timestamp};
use cdp_target::journal::change::Change;
use cdp_target::journal::file::FileId;
use cdp_target::journal::{Damage, Fork};
use cdp_target::receiver::{Changed, GroupStore, GroupWriter, StoreError};

/// What a disk holds of a group, in order.
#[derive(Clone)]
pub(crate) enum Entry {
    Grant(Line),
    Frame(Vec<u8>),
}

#[derive(Default)]
pub(crate) struct Disk {
    pub(crate) entries: Vec<Entry>,
    synced: usize,
    pub(crate) full: bool,
    pub(crate) fail_next_sync: bool,
    frozen: Option<String>,
}

impl Disk {
    pub(crate) fn is_frozen(&self) -> bool {
        self.frozen.is_some()
    }

    fn lineage(&self) -> Lineage {
        let line = |entry: &Entry| if let Entry::Grant(line) = entry { Some(*line) } else { None };
        Lineage::new(self.entries.iter().filter_map(line).collect()).expect("rising")
    }
}

/// The disks, as one process sees them: one of a lower life is dead and can do nothing any more.
#[derive(Clone, Default)]
pub(crate) struct MemoryStore {
    disks: Arc<Mutex<Machine>>,
    life: u64,
}

#[derive(Default)]
struct Machine {
    life: u64,
    disks: HashMap<(String, GroupId), Disk>,
}

impl MemoryStore {
    /// The target dies: of what was not synced `kept` says how many entries survive. Gives its successor's view.
    pub(crate) fn crash(&self, mut kept: impl FnMut(usize) -> usize) -> Self {
        let mut machine = self.disks.lock().expect("disk");
        machine.life += 1;
        for disk in machine.disks.values_mut() {
            let survives = disk.synced + kept(disk.entries.len() - disk.synced);
            disk.entries.truncate(survives);
            disk.synced = survives;
        }
        Self { disks: self.disks.clone(), life: machine.life }
    }

    pub(crate) fn with<T>(&self, group: GroupId, look: impl FnOnce(&mut Disk) -> T) -> T {
        self.with_office("office", group, look)
    }

    pub(crate) fn with_office<T>(&self, office: &str, group: GroupId, look: impl FnOnce(&mut Disk) -> T) -> T {
        let mut machine = self.disks.lock().expect("disk");
        look(machine.disks.entry((office.into(), group)).or_default())
    }
}

/// A group's points, each with the frames of its attempt.
pub(crate) type Points = Vec<(Head, Vec<Vec<u8>>)>;

/// Walks what the disk holds; gives the chain and, in order, the points with the frames of their attempts.
pub(crate) fn replay(group: GroupId, entries: &[Entry]) -> (Chain, Points) {
    let (mut chain, mut points, mut open) = (Chain::default(), Vec::new(), Vec::new());
    for entry in entries {
        match entry {
            Entry::Grant(line) => chain.grant(line.generation),
            Entry::Frame(bytes) => {
                let frame = frame::decode(&group, bytes).expect("a whole frame");
                if frame.header.kind == frame::Kind::Begin {
                    open.clear();
                }
                open.push(bytes.clone());
                match chain.step(&frame, frame.hash()).expect("what was appended follows") {
                    Step::Committed(head, _) => points.push((head, std::mem::take(&mut open))),
                    step => assert_ne!(step, Step::Duplicate, "duplicates are not appended"),
                }
            }
        }
    }
    (chain, points)
}

struct MemoryWriter {
    store: MemoryStore,
    key: (String, GroupId),
    chain: Chain,
    lineage: Lineage,
    ruling: Ruling,
}

impl GroupStore for MemoryStore {
    fn open_or_create(&self, office: &str, request: &OpenGroup) -> Result<Box<dyn GroupWriter>, StoreError> {
        self.open(office, request.group)
    }

    fn open(&self, office: &str, group: GroupId) -> Result<Box<dyn GroupWriter>, StoreError> {
        let key = (office.to_owned(), group);
        let mut machine = self.disks.lock().expect("disk");
        if machine.life != self.life {
            return Err(dead());
        }
        let disk = machine.disks.entry(key.clone()).or_default();
        let (chain, _) = replay(group, &disk.entries);
        let lineage = disk.lineage();
        // As a journal's recovery does: what is there is made durable before anything follows it.
        disk.synced = disk.entries.len();
        Ok(Box::new(MemoryWriter { store: self.clone(), key, chain, lineage, ruling: Ruling::default() }))
    }
}

fn dead() -> StoreError {
    StoreError::Failed("this process is dead".into())
}

impl MemoryWriter {
    fn disk<T>(&self, work: impl FnOnce(&mut Disk) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut machine = self.store.disks.lock().expect("disk");
        if machine.life != self.store.life {
            return Err(dead());
        }
        work(machine.disks.get_mut(&self.key).expect("opened"))
    }
}

impl GroupWriter for MemoryWriter {
    fn chain(&self) -> &Chain {
        &self.chain
    }

    fn made_in(&self, point: Head) -> Result<Option<Generation>, StoreError> {
        let made_in =
            |frames: &Vec<Vec<u8>>| frame::decode(&self.key.1, &frames[0]).expect("a frame").header.generation;
        self.disk(|disk| {
            let (_, points) = replay(self.key.1, &disk.entries);
            Ok(points.iter().find(|(head, _)| *head == point).map(|(_, frames)| made_in(frames)))
        })
    }

    fn lineage(&self) -> &Lineage {
        &self.lineage
    }

    fn ruling(&self) -> &Ruling {
        &self.ruling
    }

    fn identify(&mut self, _request: &OpenGroup) -> Result<(), StoreError> {
        Ok(())
    }

    fn begin(&mut self, line: Line) -> Result<(), StoreError> {
        self.disk(|disk| {
            disk.entries.push(Entry::Grant(line));
            disk.synced = disk.entries.len();
            Ok(())
        })?;
        self.chain.grant(line.generation);
        self.lineage.begin(line);
        Ok(())
    }

    fn append(&mut self, frame: &Frame<'_>, _received: Timestamp) -> Result<Step, StoreError> {
        self.disk(|disk| if disk.full { Err(StoreError::Full("the disk is full".into())) } else { Ok(()) })?;
        let step = self.chain.step(frame, frame.hash())?;
        if step != Step::Duplicate {
            self.disk(|disk| {
                disk.entries.push(Entry::Frame(frame.bytes.to_vec()));
                Ok(())
            })?;
        }
        Ok(step)
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        self.disk(|disk| {
            if std::mem::take(&mut disk.fail_next_sync) {
                // The disk drops what it was to sync, and would say yes to a second try.
                disk.entries.truncate(disk.synced);
                return Err(StoreError::Failed("input/output error".into()));
            }
            disk.synced = disk.entries.len();
            Ok(())
        })
    }

    fn frozen(&self) -> Option<String> {
        self.disk(|disk| Ok(disk.frozen.clone())).ok().flatten()
    }

    fn resolve(&mut self, _head: &str) -> Result<Claim, StoreError> {
        Err(StoreError::Failed("a store in memory has no operator".into()))
    }

    fn freeze(&mut self, reason: &str, _fork: Option<Fork>) -> Result<(), StoreError> {
        self.disk(|disk| {
            disk.frozen = Some(reason.to_owned());
            Ok(())
        })
    }

    fn points(&self, _after: Option<Epoch>, _max: usize) -> Result<Vec<PointSummary>, StoreError> {
        Ok(Vec::new())
    }

    fn changes_since(&self, _since: Head) -> Result<Option<Vec<Changed>>, StoreError> {
        Ok(None)
    }

    fn adopt(&mut self, _change: &Change) -> Result<(), StoreError> {
        Ok(())
    }

    fn oldest_lease(&self) -> Option<u64> {
        None
    }

    fn note_damages(&mut self, _file: FileId, _damages: &[Damage]) -> Result<(), StoreError> {
        Ok(())
    }

    fn pin(&mut self, _epoch: Epoch, _pinned: bool) -> Result<(), StoreError> {
        Ok(())
    }

    fn label(&mut self, _epoch: Epoch, _label: Option<&str>) -> Result<(), StoreError> {
        Ok(())
    }
}
