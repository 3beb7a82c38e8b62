//! The source's machine: simulated volumes, and over them an agent's group with its session, which dies and comes back.
//!
//! The group is the product's, stepped without its thread; the session is the product's, and this is what stands between the
//! two and the line in the program (`sender/group.rs`), with every hand-over a step of its own.

use std::collections::{BTreeMap, VecDeque};
use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use cdp_protocol::escrow::Envelope;
use cdp_protocol::message::{self, Instance, PROTOCOL_VERSION, RefusalReason, SourceMessage, TargetMessage};
use cdp_protocol::record::{Begin, Volume};
use cdp_protocol::session::memo::Memo;
use cdp_protocol::session::source::{GroupFacts, Next, Outgoing, SourceEvent, SourceSession};
use cdp_protocol::units::{AttemptId, Epoch, Head, KeyId, Timestamp, VolumeSlot};
use cdp_seams::clock::Clock;
use cdp_seams::random::{Random, SimRandom, array};
use cdp_seams::storage::Storage;
use cdp_seams::storage::sim::{Fault, SimStorage};
use cdp_source::agent::group::steps::GroupSteps;
use cdp_source::agent::group::{Devices, GroupSetup, Input, Link};
use cdp_source::agent::status::GroupStatus;
use cdp_source::cut::CutLimits;
use cdp_source::digests::Digests;
use cdp_source::encoder::Encoder;
use cdp_source::exclusion::NothingExcluded;
use cdp_source::sim::{Died, Instant, Profile, SimReader, SimTracker, World};
use cdp_source::spool::{Spool, SpoolLimits};
use cdp_source::state::MemoFile;

use super::line::{OnStream, Wire};
use super::model::{GROUP, Model, key};
use super::tally::Tally;
use super::trace::trace;

const KEY_ID: KeyId = KeyId([1; 8]);
const STATE: &str = "/state";

/// The machine.
pub(crate) struct Source {
    pub(crate) world: Arc<World>,
    disk: SimStorage,
    random: Arc<Witness>,
    sectors: Vec<u32>,
    limits: CutLimits,
    /// Whether it keeps digests, and sends nothing that has not changed.
    is_thrifty: bool,
    /// What may wait for the line.
    spool: SpoolLimits,
    agent: Option<Agent>,
    /// What became of the spool.
    pub(crate) tally: Tally,
}

/// Randomness that notes at which instant an attempt got its id: it may be submitted long after it was cut, by another agent.
struct Witness {
    random: SimRandom,
    world: Arc<World>,
    instants: Mutex<BTreeMap<AttemptId, Arc<Instant>>>,
}

impl Random for Witness {
    fn fill(&self, bytes: &mut [u8]) {
        self.random.fill(bytes);
        if let Ok(id) = <[u8; 16]>::try_from(&*bytes) {
            lock(&self.instants).insert(AttemptId(id), self.world.flipped());
        }
    }
}

/// An agent's process.
struct Agent {
    group: GroupSteps,
    end: Arc<Mutex<End>>,
    status: Arc<Mutex<GroupStatus>>,
    /// Points that it has merged.
    merged: u64,
}

/// The session, and what is on its way between it and the group.
struct End {
    witness: Arc<Witness>,
    session: Option<SourceSession>,
    world: Arc<World>,
    facts: GroupFacts,
    submissions: VecDeque<(Outgoing, Arc<Instant>)>,
    proceeds: VecDeque<Head>,
    events: VecDeque<SourceEvent>,
    unchanged: Option<(Epoch, Timestamp, Arc<Instant>)>,
    /// The point after which the target is asked what it was sent.
    question: Option<Head>,
    /// The connection that stands.
    wire: Option<u64>,
    /// Whether the group was put off and is to be opened again.
    asks_again: bool,
    is_superseded: bool,
    is_welcome: bool,
}

struct SimLink(Arc<Mutex<End>>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn encoder() -> Arc<Encoder> {
    static ENCODER: OnceLock<Arc<Encoder>> = OnceLock::new();
    Arc::clone(ENCODER.get_or_init(|| Arc::new(Encoder::inline())))
}

impl Link for SimLink {
    fn submit(&self, outgoing: Outgoing) {
        let mut end = lock(&self.0);
        let instant = Arc::clone(&lock(&end.witness.instants)[&outgoing.attempt]);
        end.submissions.push_back((outgoing, instant));
    }

    fn proceed(&self, head: Head) {
        lock(&self.0).proceeds.push_back(head);
    }

    fn unchanged(&self, epoch: Epoch, as_of: Timestamp) {
        let mut end = lock(&self.0);
        let instant = end.world.flipped();
        end.unchanged = Some((epoch, as_of, instant));
    }

    fn list_changes(&self, since: Head) {
        lock(&self.0).question = Some(since);
    }

    fn is_connected(&self) -> bool {
        lock(&self.0).wire.is_some()
    }
}

impl Source {
    /// A machine with empty volumes and no agent.
    pub(crate) fn new(seed: u64, profile: Profile, limits: CutLimits, sabotage: cdp_source::sim::Sabotage) -> Self {
        let disk = SimStorage::new(seed ^ 0xd15c);
        disk.create_dir_all(Path::new(STATE)).expect("no fault is set");
        let sectors = profile.sectors.clone();
        let world = World::new(seed, profile, sabotage);
        let random = SimRandom::new(seed ^ 0xa6e7);
        let random = Arc::new(Witness { random, world: Arc::clone(&world), instants: Mutex::default() });
        Self {
            world,
            disk,
            random,
            sectors,
            limits,
            is_thrifty: false,
            spool: SpoolLimits::new(0, 1000),
            agent: None,
            tally: Tally::default(),
        }
    }

    /// Keeps digests from here on: to be said before the first agent starts.
    pub(crate) const fn save_bytes(&mut self) {
        self.is_thrifty = true;
    }

    /// Lets so much wait for the line from here on: to be said before the first agent starts.
    pub(crate) const fn let_wait(&mut self, limits: SpoolLimits) {
        self.spool = limits;
    }

    pub(crate) const fn is_up(&self) -> bool {
        self.agent.is_some()
    }

    /// Starts an agent.
    pub(crate) fn start(&mut self) {
        trace(|| "agent starts".into());
        let facts = self.facts();
        let end = Arc::new(Mutex::new(End {
            witness: Arc::clone(&self.random),
            session: None,
            world: Arc::clone(&self.world),
            facts: facts.clone(),
            submissions: VecDeque::new(),
            proceeds: VecDeque::new(),
            events: VecDeque::new(),
            unchanged: None,
            question: None,
            wire: None,
            asks_again: false,
            is_superseded: false,
            is_welcome: false,
        }));
        let storage: Arc<dyn Storage> = Arc::new(self.disk.clone());
        let digests = if self.is_thrifty {
            let folder = Path::new(STATE).join("digests");
            Self::living(|| Digests::open(storage, &folder, GROUP, key().digest_key(), &facts.volumes, &*self.random))
        } else {
            Some(Digests::none(storage, key().digest_key()))
        };
        let Some(digests) = digests.filter(|_| !self.disk.is_down()) else {
            self.after_disk();
            return;
        };
        let (link, status, world) = (Arc::clone(&end), Arc::default(), Arc::clone(&self.world));
        let setup = GroupSetup {
            begin: Begin { key: KEY_ID, volumes: facts.volumes.clone() },
            facts,
            data_key: key(),
            interval: Duration::from_secs(1),
            audit_interval: Duration::from_secs(60),
            limits: self.limits,
            hooks: None,
            freezer: None,
            opener: Box::new(move || Ok(devices(&world))),
            connect: Box::new(move |memo: Memo| {
                let mut end = lock(&link);
                end.session = Some(SourceSession::new(end.facts.clone(), memo));
                drop(end);
                Box::new(SimLink(link))
            }),
            kept_memo: Box::new(MemoFile::new(Arc::new(self.disk.clone()), Path::new(STATE).join("memo"))),
            saver: None,
            proofs: None,
            learner: None,
            layouts: None,
            restoring: Box::new(|| None),
            opened: None,
            encoder: encoder(),
            digests,
            spool: Spool::new(Arc::new(self.disk.clone()), &Path::new(STATE).join("spool"), GROUP, self.spool),
            clock: Arc::clone(&self.world.clock) as Arc<dyn Clock>,
            random: Arc::clone(&self.random) as Arc<_>,
            status: Arc::clone(&status),
        };
        let (sender, inputs) = channel();
        let started = Self::living(|| GroupSteps::start(setup, inputs, sender));
        self.agent = started.and_then(Result::ok).map(|group| Agent { group, end, status, merged: 0 });
        let waiting = |agent: &Agent| lock(&agent.status).spool.waiting_points > 0;
        self.tally.taken_up += u64::from(self.agent.as_ref().is_some_and(waiting));
        if self.after_disk() {
            self.agent = None;
        }
    }

    /// Nothing goes wrong here any more.
    pub(crate) fn spare(&self) {
        self.world.mortality.spare();
        self.disk.clear_faults();
    }

    fn facts(&self) -> GroupFacts {
        let volume = |(slot, sectors): (usize, &u32)| Volume {
            slot: VolumeSlot(slot as u16),
            size_bytes: u64::from(*sectors) * 512,
            name: format!("v{slot}"),
        };
        GroupFacts {
            group: GROUP,
            name: "main".into(),
            instance: Instance { process: array(&*self.random), host: "branch".into() },
            envelope: Envelope { key: KEY_ID, encapsulated: vec![2; 32], sealed: vec![3; 48] },
            volumes: self.sectors.iter().enumerate().map(volume).collect(),
        }
    }

    /// Does what an agent does, which may be its last; `None` where it was.
    fn living<T>(work: impl FnOnce() -> T) -> Option<T> {
        match catch_unwind(AssertUnwindSafe(work)) {
            Ok(done) => Some(done),
            Err(why) if why.is::<Died>() => None,
            Err(why) => resume_unwind(why),
        }
    }

    /// The agent's process ends as if killed; the tracking goes on. Gives the connection that it had.
    pub(crate) fn kill(&mut self) -> Option<u64> {
        self.world.mortality.spare();
        trace(|| "agent is killed".into());
        self.agent.take().and_then(|agent| lock(&agent.end).wire)
    }

    /// The machine loses its power, and with it the tracking.
    pub(crate) fn power_loss(&mut self) -> Option<u64> {
        let wire = self.kill();
        trace(|| "source loses its power".into());
        self.world.power_loss();
        self.disk.power_cut();
        self.disk.restart();
        wire
    }

    /// Lets one of the next calls to the agent's state folder fail, or be the agent's last, perhaps its machine's.
    pub(crate) fn harm_disk(&self) {
        let faults = [Fault::Death, Fault::Error(ErrorKind::Other), Fault::Error(ErrorKind::StorageFull)];
        let fault = faults[self.random.random.below(faults.len() as u64) as usize];
        self.disk.fault_at(self.disk.calls() + self.random.random.below(6), fault);
    }

    /// A clean end of the agent.
    pub(crate) fn stop(&mut self) -> Option<u64> {
        let agent = self.agent.take()?;
        trace(|| "agent stops".into());
        let wire = lock(&agent.end).wire;
        Self::living(|| agent.group.finish());
        self.world.mortality.spare();
        self.after_disk();
        wire
    }

    /// Lets the group do what is due. `Err` where the agent died of it, with the connection that it had.
    pub(crate) fn act(&mut self) -> Result<(), Option<u64>> {
        let acted = self.with_group(GroupSteps::act);
        if let Some(agent) = &mut self.agent {
            let spool = lock(&agent.status).spool.clone();
            self.tally.spooled += u64::from(spool.spooled_bytes > 0);
            self.tally.merged += spool.merged_points - std::mem::replace(&mut agent.merged, spool.merged_points);
        }
        acted
    }

    /// Hands the group its next event.
    pub(crate) fn hear(&mut self) -> Result<(), Option<u64>> {
        let Some(event) = self.end().and_then(|mut end| end.events.pop_front()) else { return Ok(()) };
        trace(|| format!("group hears {event:?}"));
        self.with_group(|group| group.take(Input::Link(event)))
    }

    fn with_group(&mut self, work: impl FnOnce(&mut GroupSteps)) -> Result<(), Option<u64>> {
        let Some(mut agent) = self.agent.take() else { return Ok(()) };
        let lives = Self::living(|| work(&mut agent.group)).is_some();
        if lives && !self.after_disk() {
            self.agent = Some(agent);
            return Ok(());
        }
        self.world.mortality.spare();
        trace(|| "agent dies".into());
        let wire = lock(&agent.end).wire;
        Err(wire)
    }

    /// Whether the agent's end came with a call to its state folder; with that of the machine the tracking is gone as well.
    fn after_disk(&mut self) -> bool {
        let is_down = self.disk.is_down();
        if is_down {
            self.disk.restart();
            self.disk.clear_faults();
            if self.random.random.below(2) == 0 {
                trace(|| "source loses its power".into());
                self.world.power_loss();
                self.disk.power_cut();
                self.disk.restart();
            }
        }
        is_down
    }

    fn end(&self) -> Option<MutexGuard<'_, End>> {
        self.agent.as_ref().map(|agent| lock(&agent.end))
    }

    /// Whether nothing is captured and not acked, and nothing is left to be captured.
    pub(crate) fn is_idle(&self) -> bool {
        self.agent.as_ref().is_some_and(|agent| {
            let status = lock(&agent.status);
            status.unacked_epochs == 0 && status.dirty_bytes == 0
        })
    }

    /// How the group says it stands, for a report.
    pub(crate) fn standing(&self) -> String {
        self.agent.as_ref().map_or_else(|| "dead".into(), |agent| format!("{:?}", lock(&agent.status)))
    }

    /// Whether a connection is wanted.
    pub(crate) fn wants_line(&self) -> bool {
        self.end().is_some_and(|end| end.wire.is_none() && !end.is_superseded)
    }

    /// Whether another process is said to have taken the group over.
    pub(crate) fn is_superseded(&self) -> bool {
        self.end().is_some_and(|end| end.is_superseded)
    }

    /// Says hello on a new connection.
    pub(crate) fn connect(&mut self, wire: &mut Wire) {
        let time = Timestamp(self.world.clock.wall_ms());
        let Some(mut end) = self.end() else { return };
        (end.wire, end.asks_again, end.is_welcome) = (Some(wire.number), false, false);
        let hello = SourceMessage::Hello { version: PROTOCOL_VERSION, software: "sim".into(), time };
        wire.to_target.push_back(message::encode(&hello));
    }

    /// The connection is gone.
    pub(crate) fn line_down(&mut self, wire: u64) {
        let Some(mut end) = self.end() else { return };
        if end.wire == Some(wire) {
            end.wire = None;
            if let Some(session) = &mut end.session {
                session.line_down();
            }
        }
    }

    /// Asks again for a group that was put off.
    pub(crate) fn ask_again(&mut self, wire: &mut Wire) {
        let Some(mut end) = self.end() else { return };
        if std::mem::take(&mut end.asks_again) && end.wire == Some(wire.number) {
            end.open_group(wire);
        }
    }

    /// One message of the target. `may_contradict`: whether its store was hurt.
    pub(crate) fn receive(&mut self, bytes: &[u8], wire: &mut Wire, may_contradict: bool) -> Result<(), String> {
        let Some(mut end) = self.end() else { return Ok(()) };
        if end.wire != Some(wire.number) {
            return Ok(());
        }
        let message: TargetMessage = message::decode(bytes).map_err(|error| error.to_string())?;
        end.message(&message, wire, may_contradict)
    }

    /// Brings one thing of the group to the session, and puts one on the line.
    pub(crate) fn pump(&mut self, wire: Option<&mut Wire>, model: &mut Model) -> Result<(), String> {
        let Some(mut end) = self.end() else { return Ok(()) };
        end.pump(wire, model)
    }
}

fn devices(world: &Arc<World>) -> Devices {
    let mut tracker = SimTracker::attach(world);
    (tracker.straggler_permille, tracker.false_hit_permille) = (10, 2);
    Devices {
        tracker: Box::new(tracker),
        reader: Box::new(SimReader::new(world)),
        exclusion: Box::new(NothingExcluded),
    }
}

impl End {
    fn session(&mut self) -> &mut SourceSession {
        self.session.as_mut().expect("a group that started is connected")
    }

    fn open_group(&mut self, wire: &mut Wire) {
        let request = self.session().open_group();
        trace(|| {
            format!(
                "source asks on line {}: {:?} acked {:?} sent {:?} parts {:?} anew {}",
                wire.number, request.generation, request.acked, request.sent, request.parts, request.anew
            )
        });
        wire.to_target.push_back(message::encode(&SourceMessage::OpenGroup(request)));
    }

    fn message(&mut self, message: &TargetMessage, wire: &mut Wire, may_contradict: bool) -> Result<(), String> {
        match message {
            TargetMessage::Welcome { .. } if !self.is_welcome => {
                self.is_welcome = true;
                self.open_group(wire);
                return Ok(());
            }
            TargetMessage::Refused { reason, .. } => {
                return Err(format!("the target refuses the connection: {reason}"));
            }
            TargetMessage::GroupRefused {
                reason: reason @ (RefusalReason::Fork | RefusalReason::Left | RefusalReason::NameTaken),
                ..
            } => {
                return Err(format!("the one source there is is refused: {reason:?}"));
            }
            _ => {}
        }
        match self.session().message(message) {
            Ok(events) => self.events.extend(events),
            // A store that was hurt may have lost what it said it had. The line is closed, and a new generation asked for.
            Err(_) if may_contradict => {
                self.session().line_down();
                self.wire = None;
                wire.source_gone = true;
                return Ok(());
            }
            Err(contradiction) => return Err(contradiction.to_string()),
        }
        match message {
            TargetMessage::GroupOpened(_) => {
                wire.frames.push_back(OnStream::Opened);
            }
            TargetMessage::GroupRefused { reason: RefusalReason::Superseded { .. }, .. } => self.is_superseded = true,
            TargetMessage::Busy { .. } | TargetMessage::GroupRefused { .. } => self.asks_again = true,
            _ => {}
        }
        Ok(())
    }

    fn pump(&mut self, wire: Option<&mut Wire>, model: &mut Model) -> Result<(), String> {
        if let Some(head) = self.proceeds.pop_front() {
            self.session().proceed(head);
        }
        if let Some((outgoing, instant)) = self.submissions.pop_front() {
            trace(|| format!("submitted {} {:?}", outgoing.epoch, outgoing.end));
            model.submitted(&outgoing, instant);
            self.session().submit(outgoing);
        }
        let number = self.wire;
        let Some(wire) = wire.filter(|wire| Some(wire.number) == number && !wire.source_gone) else { return Ok(()) };
        if let Some((epoch, as_of, instant)) = self.unchanged.take() {
            model.unchanged(epoch, &instant)?;
            wire.to_target.push_back(message::encode(&SourceMessage::Unchanged { group: GROUP, epoch, as_of }));
        }
        if let Some(since) = self.question.take() {
            wire.to_target.push_back(message::encode(&SourceMessage::ListChanges { group: GROUP, since }));
        }
        match self.session().next_frame() {
            Next::Frame(bytes) => {
                model.sent(&bytes)?;
                wire.frames.push_back(OnStream::Frame(bytes));
            }
            Next::Committing(head) => self.events.push_back(SourceEvent::Committing(head)),
            Next::Nothing => {}
        }
        Ok(())
    }
}
