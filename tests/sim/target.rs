//! The target's machine: a disk that loses what it may, and over it a server's group, which dies and comes back.
//!
//! Store, group and journal are the product's; this stands for the connections (`receiver/connection.rs`) and for the queue of
//! the group's thread. Answers count as given the moment they leave the group.

mod upkeep;

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cdp_protocol::frame::{self, Kind};
use cdp_protocol::message::{self, GroupOpened, TargetMessage, Verdict};
use cdp_protocol::session::target::{TargetAction, TargetSession};
use cdp_protocol::units::{Head, OfficeId, Timestamp};
use cdp_seams::clock::{Clock, SimClock};
use cdp_seams::random::SimRandom;
use cdp_seams::storage::Storage;
use cdp_seams::storage::sim::SimStorage;
use cdp_target::config::{Config, LISTEN_DEFAULT};
use cdp_target::groups::StoreGroups;
use cdp_target::heal::{Healer, OpenGroup, Tools};
use cdp_target::journal::file::FileId;
use cdp_target::journal::manifest::Checkpoint;
use cdp_target::journal::{Damage, GroupView, JournalLimits};
use cdp_target::receiver::GroupWriter;
use cdp_target::receiver::steps::{Answers, GroupSteps};
use cdp_target::restore::keyring::Keyring;
use cdp_target::scrub::read_now;
use cdp_target::store::{self, GroupPlace, Store, StoreError};

use super::check::{Depth, Extent, check};
use super::line::{OnStream, Wire};
use super::model::{GROUP, Model, key};
use super::sabotage::Sabotage;
use super::trace::trace;
pub(crate) use upkeep::{Care, Upkeep};

const FOLDER: &str = "/store";
const OFFICE: OfficeId = OfficeId([4; 16]);
const OFFICE_NAME: &str = "branch";

/// The machine.
pub(crate) struct Target {
    pub(crate) disk: SimStorage,
    pub(crate) clock: Arc<SimClock>,
    /// Bits were flipped at rest.
    pub(crate) is_hurt: bool,
    sabotage: Sabotage,
    /// Attempts of repairs.
    random: SimRandom,
    limits: JournalLimits,
    /// Looks after the points; none where nobody does.
    upkeep: Option<Upkeep>,
    process: Option<Process>,
}

/// A server's process.
struct Process {
    storage: Arc<dyn Storage>,
    groups: Arc<StoreGroups>,
    steps: GroupSteps,
    healer: Healer,
    connections: Vec<Connection>,
    /// Sessions so far.
    sessions: u64,
    /// A change failed: whether it came to be the next recovery tells.
    is_unsure: bool,
    /// A checkpoint that was built and is not taken yet.
    built: Option<Checkpoint>,
}

struct Connection {
    wire: u64,
    session: TargetSession,
    answers: Answers,
    /// The group's session here.
    held: Option<u64>,
    /// The session that the stream of frames began in.
    stream: Option<u64>,
}

impl Target {
    /// A machine with an empty store, and no server.
    pub(crate) fn new(seed: u64, limits: JournalLimits, sabotage: Sabotage) -> Self {
        let disk = SimStorage::new(seed);
        let storage: Arc<dyn Storage> = Arc::new(disk.clone());
        let config = Config::new(LISTEN_DEFAULT, vec![]);
        let made =
            store::init(&storage, Path::new(FOLDER), &config, Timestamp(0), |_| Ok::<_, StoreError>("5".repeat(32)));
        made.expect("no fault is set");
        let clock = Arc::new(SimClock::new(1_700_000_000_000));
        Self {
            disk,
            clock,
            is_hurt: false,
            sabotage,
            random: SimRandom::new(seed ^ 0x4ea1),
            limits,
            upkeep: None,
            process: None,
        }
    }

    pub(crate) const fn is_up(&self) -> bool {
        self.process.is_some()
    }

    fn place() -> GroupPlace {
        GroupPlace { office: OFFICE, group: GROUP }
    }

    /// Starts a server, and lets it recover the group. Faults that are set may end it, or keep it from doing so.
    pub(crate) fn start(&mut self) {
        let storage = self.sabotage.storage(&self.disk);
        let Ok(store) = Store::open(Arc::clone(&storage), Path::new(FOLDER)) else { return };
        let groups = Arc::new(StoreGroups::new(store).with_limits(self.limits));
        groups.admit(OFFICE_NAME, OFFICE);
        let shown = self.sabotage.store(Arc::clone(&groups) as Arc<_>);
        let mut steps = GroupSteps::new(OFFICE_NAME, GROUP, shown, Arc::clone(&self.clock) as Arc<dyn Clock>);
        trace(|| "target starts".into());
        // As an operator's command would: opens the group, if there is one.
        steps.with_writer(|_| {});
        self.process = Some(Process {
            storage,
            groups,
            steps,
            healer: Healer::default(),
            connections: Vec::new(),
            sessions: 0,
            is_unsure: false,
            built: None,
        });
    }

    /// The server's process is gone, with its connections; gives their wires.
    pub(crate) fn end(&mut self) -> Vec<u64> {
        trace(|| "target ends".into());
        self.disk.restart();
        let process = self.process.take();
        process.map_or_else(Vec::new, |process| process.connections.iter().map(|connection| connection.wire).collect())
    }

    /// Checks what a reader sees that opens the files beside the server, and what the server itself has recovered.
    pub(crate) fn check(&mut self, model: &mut Model, depth: Depth) -> Result<(), String> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let view = match process.groups.view(Self::place()) {
            Some(view) => view,
            None if model.acked.is_empty() => return Ok(()),
            // The server could not open it: a fault was set.
            None => return self.check_beside(model, Depth::Sample(0)),
        };
        let extent = if process.is_unsure { Extent::Unsure } else { Extent::Whole };
        let missing = check(&view, model, depth, extent, self.is_hurt)?;
        model.lost(&missing);
        if self.is_hurt { Ok(()) } else { process.check_lineage(model, depth) }
    }

    /// Checks what a reader sees that opens the files.
    pub(crate) fn check_beside(&self, model: &mut Model, depth: Depth) -> Result<(), String> {
        if model.acked.is_empty() {
            return Ok(());
        }
        let storage: Arc<dyn Storage> = Arc::new(self.disk.clone());
        let folder =
            Store::open(Arc::clone(&storage), Path::new(FOLDER)).map(|store| store.group_folder(Self::place()));
        let folder = folder.map_err(|error| format!("the store cannot be opened: {error}"))?;
        let view = GroupView::open(storage, &folder).map_err(|error| format!("the group cannot be read: {error}"))?;
        check(&Arc::new(view), model, depth, Extent::Beside, self.is_hurt).map(drop)
    }

    /// What is durable of the group.
    pub(crate) fn view(&self) -> Option<Arc<GroupView>> {
        self.process.as_ref()?.groups.view(Self::place())
    }

    fn group_folder() -> PathBuf {
        let place = Self::place();
        Path::new(FOLDER).join("offices").join(place.office.to_string()).join("groups").join(place.group.to_string())
    }

    /// Where the group's files are.
    pub(crate) fn folder(&self) -> PathBuf {
        let storage: Arc<dyn Storage> = Arc::new(self.disk.clone());
        Store::open(storage, Path::new(FOLDER)).expect("a sound store").group_folder(Self::place())
    }

    /// A file of the group's journal, by a number that is drawn; for a bit to be flipped in.
    pub(crate) fn hurt(&mut self, drawn: u64) -> bool {
        let storage: Arc<dyn Storage> = Arc::new(self.disk.clone());
        let Ok(store) = Store::open(Arc::clone(&storage), Path::new(FOLDER)) else { return false };
        let journal = store.group_folder(Self::place()).join("journal");
        let Ok(names) = storage.list(&journal) else { return false };
        let Some(name) = names.get(drawn as usize % names.len().max(1)) else { return false };
        let path = journal.join(name);
        let bits = self.disk.file_len(&path) * 8;
        if bits > 0 {
            trace(|| format!("bit {} of {bits} of {} flips", drawn / 7 % bits, path.display()));
            self.disk.flip_bit(&path, drawn / 7 % bits);
            self.is_hurt = true;
        }
        bits > 0
    }

    /// Reads all sealed segments again and keeps what is wrong with them; gives how many damages of points nothing stands for.
    pub(crate) fn scrub(&mut self) -> usize {
        let Some(process) = &mut self.process else { return 0 };
        let Some(view) = process.groups.view(Self::place()) else { return 0 };
        for segment in view.manifest().sealed.iter().map(|sealed| sealed.number) {
            let Ok(found) = read_now(&view, segment) else { continue };
            let file = FileId::Segment { number: segment, revision: 0 };
            // A fault that is set may keep it from being kept; then the next scrub finds it.
            process.steps.with_writer(move |writer| drop(writer.and_then(|writer| writer.note_damages(file, &found))));
        }
        let Some(view) = process.groups.view(Self::place()) else { return 0 };
        let hurts = |damage: &&Damage| damage.first_epoch.is_some() && !view.is_healed(damage);
        view.damages().iter().filter(hurts).count()
    }

    /// Heals what can be healed, and asks the source for the rest.
    pub(crate) fn heal(&mut self, wires: &mut [Wire], model: &mut Model) -> Result<(), String> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let connected_since = process.steps.live().connected_since;
        let (asked, healed) = (RefCell::new(Vec::new()), Cell::new(false));
        let tools = Tools {
            open: &|| {
                let view = process.groups.view(Self::place());
                let group = view.map(|view| OpenGroup {
                    office: OFFICE_NAME.into(),
                    place: Self::place(),
                    view,
                    connected_since,
                });
                group.into_iter().collect()
            },
            keys: &|_| Ok(Keyring::from(&key())),
            ask: &|_, volume, extents| asked.borrow_mut().push((volume, extents)),
            healed: &|_| healed.set(true),
            clock: &*self.clock,
            random: &self.random,
        };
        process.healer.look(&tools);
        if healed.get() {
            trace(|| "target has healed".into());
            process.steps.with_writer(|writer| drop(writer.map(GroupWriter::look_again)));
        }
        for (volume, extents) in asked.into_inner() {
            process.steps.send_again(volume, extents);
        }
        self.answer(wires, model)
    }

    /// One control message.
    pub(crate) fn receive(
        &mut self,
        bytes: &[u8],
        wires: &mut [Wire],
        at: usize,
        model: &mut Model,
    ) -> Result<(), String> {
        let now = Timestamp(self.clock.wall_ms());
        let Some(process) = &mut self.process else { return Ok(()) };
        let wire = &mut wires[at];
        let connection = process.connection(wire.number);
        match connection.session.receive(bytes, now) {
            Ok(TargetAction::Reply(reply)) => wire.to_source.push_back(message::encode(&reply)),
            Ok(TargetAction::Open(request)) => {
                process.sessions += 1;
                let number = process.sessions;
                let at = process.connection_at(wire.number);
                process.connections[at].held = Some(number);
                process.steps.open(number, &process.connections[at].answers, *request);
            }
            Ok(TargetAction::Unchanged { epoch, as_of, .. }) => {
                let session = connection.held.unwrap_or(0);
                process.steps.unchanged(session, epoch, as_of);
            }
            Ok(TargetAction::ListPoints { .. } | TargetAction::OpenPoint { .. } | TargetAction::AskPoint(_)) => {}
            Ok(TargetAction::ListChanges { since, .. }) => {
                let session = connection.held.unwrap_or(0);
                process.steps.changes(session, since);
            }
            Ok(TargetAction::ListDigests { head, volume, blocks, .. }) => {
                let session = connection.held.unwrap_or(0);
                process.steps.digests(session, head, volume, blocks);
            }
            // What comes twice may be one too many; its connection ends.
            Err(_) => {
                self.close(wire);
                return Ok(());
            }
        }
        self.answer(wires, model)
    }

    /// One thing of a stream of frames.
    pub(crate) fn frame(
        &mut self,
        on_stream: OnStream,
        wires: &mut [Wire],
        at: usize,
        model: &mut Model,
    ) -> Result<(), String> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let connection = process.connection(wires[at].number);
        match on_stream {
            OnStream::Opened => connection.stream = connection.held,
            OnStream::Frame(bytes) => {
                if let Some(session) = connection.stream {
                    note_arrival(&bytes, self.clock.wall_ms(), model);
                    process.steps.frame(session, bytes.to_vec());
                }
            }
        }
        self.answer(wires, model)
    }

    /// Syncs, if anything waits for it.
    pub(crate) fn sync(&mut self, wires: &mut [Wire], model: &mut Model) -> Result<(), String> {
        let Some(process) = &mut self.process else { return Ok(()) };
        if process.steps.is_sync_due() {
            process.steps.sync();
        }
        self.answer(wires, model)
    }

    /// The connection is gone.
    pub(crate) fn close(&mut self, wire: &mut Wire) {
        wire.target_gone = true;
        let Some(process) = &mut self.process else { return };
        let Some(at) = process.connections.iter().position(|connection| connection.wire == wire.number) else { return };
        let connection = process.connections.remove(at);
        if let Some(session) = connection.held {
            process.steps.closed(session);
        }
    }

    /// Puts the answers that left the group on their wires, and takes each at its word.
    pub(crate) fn answer(&mut self, wires: &mut [Wire], model: &mut Model) -> Result<(), String> {
        let Some(process) = &mut self.process else { return Ok(()) };
        let mut ended = Vec::new();
        for connection in &mut process.connections {
            let mut wire = wires.iter_mut().find(|wire| wire.number == connection.wire);
            while let Some(answer) = connection.answers.next_answer() {
                trace(|| format!("target says on line {}: {answer:?}", connection.wire));
                if let TargetMessage::GroupOpened(GroupOpened { verdict, head, .. }) = &answer {
                    if *verdict == Verdict::TargetBehind && !self.is_hurt {
                        return Err("the target says that it has lost points, and nothing was hurt".into());
                    }
                    // Of a store that was hurt the source is told where it stands now.
                    if self.is_hurt {
                        model.behind(head.map(|(head, _)| head));
                    }
                }
                if let Some(head) = promised(&answer) {
                    model.promise(head)?;
                }
                if let Some(wire) = wire.as_mut().filter(|wire| !wire.source_gone) {
                    wire.to_source.push_back(message::encode(&answer));
                }
            }
            if connection.answers.ending().is_some() {
                ended.push(connection.wire);
            }
        }
        for wire in wires.iter_mut().filter(|wire| ended.contains(&wire.number)) {
            self.close(wire);
        }
        Ok(())
    }
}

/// The target goes by when a commit came to it.
fn note_arrival(bytes: &[u8], now: i64, model: &mut Model) {
    let frame = frame::decode(&GROUP, bytes).expect("a frame of ours");
    if frame.header.kind == Kind::Commit {
        model.kept.arrived(frame.hash(), now);
    }
}

/// The point that an answer says is durable.
fn promised(answer: &TargetMessage) -> Option<Head> {
    match answer {
        TargetMessage::Acked { head, .. } => Some(*head),
        TargetMessage::GroupOpened(opened) => opened.head.map(|(head, _)| head),
        _ => None,
    }
}

impl Process {
    fn connection_at(&mut self, wire: u64) -> usize {
        if let Some(at) = self.connections.iter().position(|connection| connection.wire == wire) {
            return at;
        }
        self.connections.push(Connection {
            wire,
            session: TargetSession::new("sim"),
            answers: Answers::new(wire),
            held: None,
            stream: None,
        });
        self.connections.len() - 1
    }

    fn connection(&mut self, wire: u64) -> &mut Connection {
        let at = self.connection_at(wire);
        &mut self.connections[at]
    }
}
