//! A branch office on one thread: simulated volumes, disk and clock, the group's real ledger, digests and spool, and a target in memory that
//! holds every point against the instant of its cut.

use super::super::super::{Devices, Group, GroupSetup, Input, KeptMemo, Link};
use crate::agent::status::GroupStatus;
use crate::cut::CutLimits;
use crate::digests::Digests;
use crate::encoder::Encoder;
use crate::exclusion::NothingExcluded;
use crate::sim::{Image, Instant, Profile, Sabotage, SimReader, SimTracker, World, sectors_of};
use crate::spool::{Spool, SpoolLimits};
use cdp_protocol::codec;
use cdp_protocol::escrow::Envelope;
use cdp_protocol::frame::{self, Encoding, Kind};
use cdp_protocol::message::{GroupOpened, Instance, TargetMessage, Verdict};
use cdp_protocol::record::{Begin, Commit, Volume};
use cdp_protocol::seal::DataKey;
use cdp_protocol::session::chain::{Chain, Step};
use cdp_protocol::session::memo::Memo;
use cdp_protocol::session::source::{GroupFacts, Next, Outgoing, SourceEvent, SourceSession};
use cdp_protocol::units::{
    AttemptId, BLOCK_BYTES, BLOCK_SECTORS, Epoch, Generation, GroupId, Head, KeyId, Timestamp, VolumeSlot,
};
use cdp_seams::clock::Clock;
use cdp_seams::random::{Random, SimRandom};
use cdp_seams::storage::Storage;
use cdp_seams::storage::sim::SimStorage;
use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::oneshot;

const GROUP: GroupId = GroupId([9; 16]);
const KEY: [u8; 32] = [6; 32];
/// Randomness that notes at which instant an attempt got its id.
struct Witness {
    random: SimRandom,
    world: Arc<World>,
    instants: Mutex<HashMap<AttemptId, Arc<Instant>>>,
}

impl Random for Witness {
    fn fill(&self, bytes: &mut [u8]) {
        self.random.fill(bytes);
        if let Ok(id) = <[u8; 16]>::try_from(&*bytes) {
            self.instants.lock().expect("no panic").insert(AttemptId(id), self.world.flipped());
        }
    }
}

/// A point that the target has.
pub(super) struct Point {
    pub(super) head: Head,
    pub(super) commit: Commit,
    /// Blocks that came with it, each as often as it came.
    pub(super) came: Vec<(usize, u32)>,
}

/// The line, and what is at its other end.
pub(super) struct Far {
    world: Arc<World>,
    witness: Arc<Witness>,
    session: Option<SourceSession>,
    pub(super) chain: Chain,
    pub(super) is_up: bool,
    /// Frames of the attempt under way, and of the acked parts.
    open: Vec<Vec<u8>>,
    parts: Vec<Vec<u8>>,
    pub(super) image: Image,
    pub(super) points: Vec<Point>,
    events: VecDeque<SourceEvent>,
    pub(super) voided: usize,
}

#[derive(Clone)]
pub(super) struct Wire(Arc<Mutex<Far>>);

impl Wire {
    pub(super) fn lock(&self) -> MutexGuard<'_, Far> {
        self.0.lock().expect("no panic")
    }
}

impl Link for Wire {
    fn submit(&self, outgoing: Outgoing) {
        self.lock().session.as_mut().expect("connected").submit(outgoing);
    }

    fn proceed(&self, head: Head) {
        self.lock().session.as_mut().expect("connected").proceed(head);
    }

    fn unchanged(&self, _: Epoch, _: Timestamp) {
        let far = self.lock();
        far.world.flipped().explain(&far.image).expect("what is called unchanged is");
    }

    fn list_changes(&self, since: Head) {
        self.lock().hear(&TargetMessage::ChangesUnknown { group: GROUP, since });
    }

    fn is_connected(&self) -> bool {
        self.lock().is_up
    }
}

impl Far {
    fn hear(&mut self, message: &TargetMessage) {
        let events = self.session.as_mut().expect("connected").message(message).expect("what was sent");
        self.voided += events.iter().filter(|event| matches!(event, SourceEvent::Voided)).count();
        self.events.extend(events);
    }

    /// The line comes back.
    pub(super) fn connect(&mut self, verdict: Verdict) {
        self.is_up = true;
        if verdict != Verdict::Continue {
            self.chain.grant(Generation(self.chain.generation().0 + 1));
            (self.open, self.parts) = (Vec::new(), Vec::new());
        }
        let (generation, head, parts) = (self.chain.generation(), self.chain.head(), self.chain.parts());
        let opened = GroupOpened { group: GROUP, generation, verdict, head, parts, resume: None };
        self.hear(&TargetMessage::GroupOpened(opened));
    }

    pub(super) fn cut(&mut self) {
        self.is_up = false;
        self.session.as_mut().expect("connected").line_down();
    }

    /// The target is there, and takes nothing for now.
    pub(super) fn put_off(&mut self) {
        self.hear(&TargetMessage::Busy { group: GROUP, reason: "no room".into(), retry_after_ms: 1 });
    }

    fn pump(&mut self) {
        while self.is_up {
            match self.session.as_mut().expect("connected").next_frame() {
                Next::Frame(bytes) => self.receive(&bytes),
                Next::Committing(head) => self.events.push_back(SourceEvent::Committing(head)),
                Next::Nothing => return,
            }
        }
    }

    fn receive(&mut self, bytes: &[u8]) {
        let frame = frame::decode(&GROUP, bytes).expect("a frame");
        match self.chain.step(&frame, frame::hash(bytes)).expect("follows") {
            Step::Taken => {
                if frame.header.kind == Kind::Begin {
                    self.open.clear();
                }
                self.open.push(bytes.to_vec());
            }
            Step::PartEnded(attempt, parts) => {
                self.parts.append(&mut self.open);
                self.hear(&TargetMessage::PartAcked { group: GROUP, attempt, parts });
            }
            Step::Committed(head, commit) => {
                let mut came = Vec::new();
                let frames: Vec<Vec<u8>> = self.parts.drain(..).chain(self.open.drain(..)).collect();
                for frame in &frames {
                    apply(&mut self.image, frame, &mut came);
                }
                let instant = Arc::clone(&self.witness.instants.lock().expect("no panic")[&frame.header.attempt]);
                instant.explain(&self.image).unwrap_or_else(|why| panic!("point {} was never so: {why}", head.epoch));
                self.points.push(Point { head, commit: *commit, came });
                self.hear(&TargetMessage::Acked { group: GROUP, head });
            }
            Step::Duplicate | Step::Synced => {}
        }
    }
}

fn apply(image: &mut Image, bytes: &[u8], came: &mut Vec<(usize, u32)>) {
    let frame = frame::decode(&GROUP, bytes).expect("a frame");
    if frame.header.kind != Kind::Extents {
        return;
    }
    let volume = usize::from(frame.header.volume.0);
    let key = DataKey::new(KEY).attempt_key(&frame.header.attempt);
    let content = match frame.header.encoding {
        Encoding::Hole => vec![0; frame.header.blocks() as usize * BLOCK_BYTES],
        _ => codec::open_content(&frame, &key).expect("opens"),
    };
    let blocks = frame.header.extents.iter().flat_map(|extent| extent.blocks());
    for (block, content) in blocks.zip(content.chunks_exact(BLOCK_BYTES)) {
        came.push((volume, block.0));
        let first = block.0 as usize * BLOCK_SECTORS as usize;
        for (sector, number) in image[volume][first..].iter_mut().zip(sectors_of(content)) {
            *sector = number;
        }
    }
}

/// A branch office.
pub(super) struct Office {
    pub(super) world: Arc<World>,
    pub(super) disk: SimStorage,
    pub(super) wire: Wire,
    limits: SpoolLimits,
    blocks_max: u64,
    status: Arc<Mutex<GroupStatus>>,
    pub(super) agent: Option<(Group, Receiver<Input>)>,
    /// What a clean end has kept beside the tracking's memo.
    pub(super) kept: Memo,
    /// The volume that is being restored, as the group's folder has it.
    pub(super) restoring: Arc<Mutex<Option<String>>>,
}

/// The memo of a clean end; nothing is kept besides.
struct KeptBefore(Memo);

impl KeptMemo for KeptBefore {
    fn load(&self) -> Result<Memo, String> {
        Ok(self.0.clone())
    }

    fn keep(&self, _: &Memo) {}
}

impl Office {
    pub(super) fn new(seed: u64, limits: SpoolLimits) -> Self {
        Self::with_cuts_of(1000, seed, limits)
    }

    /// An office of which a cut, and a part, may hold so many blocks.
    pub(super) fn with_cuts_of(blocks_max: u64, seed: u64, limits: SpoolLimits) -> Self {
        // Where a cut holds little, less is written while it is read.
        let issue_permille = if blocks_max < 80 { 10 } else { Profile::default().issue_permille };
        let sectors = vec![8 * 60, 8 * 20 + 3];
        let profile = Profile { sectors, issue_permille, repeat_permille: 300, ..Profile::default() };
        let image = profile.sectors.iter().map(|sectors| vec![0; *sectors as usize]).collect();
        let world = World::new(seed, profile, Sabotage::None);
        let random = SimRandom::new(seed ^ 0xb0);
        let witness = Arc::new(Witness { random, world: Arc::clone(&world), instants: Mutex::default() });
        let far = Far {
            world: Arc::clone(&world),
            witness,
            session: None,
            chain: Chain::default(),
            is_up: false,
            open: Vec::new(),
            parts: Vec::new(),
            image,
            points: Vec::new(),
            events: VecDeque::new(),
            voided: 0,
        };
        let wire = Wire(Arc::new(Mutex::new(far)));
        let mut office = Self {
            world,
            disk: SimStorage::new(seed),
            wire,
            limits,
            blocks_max,
            status: Arc::default(),
            agent: None,
            kept: Memo::default(),
            restoring: Arc::default(),
        };
        office.start();
        office.wire.lock().connect(Verdict::New);
        office.settle();
        assert_eq!(office.status().dirty_bytes, 0);
        office
    }

    /// An agent starts, without a line.
    pub(super) fn start(&mut self) {
        let volume = |slot| Volume {
            slot: VolumeSlot(slot as u16),
            size_bytes: self.world.size_bytes(slot),
            name: format!("v{slot}"),
        };
        let volumes: Vec<Volume> = (0..self.world.volumes()).map(volume).collect();
        let envelope = Envelope { key: KeyId::default(), encapsulated: Vec::new(), sealed: Vec::new() };
        let facts = GroupFacts {
            group: GROUP,
            name: "main".into(),
            instance: Instance::default(),
            envelope,
            volumes: volumes.clone(),
        };
        let storage: Arc<dyn Storage> = Arc::new(self.disk.clone());
        let (wire, session_facts, world) = (self.wire.clone(), facts.clone(), Arc::clone(&self.world));
        self.wire.lock().is_up = false;
        let witness = Arc::clone(&self.wire.lock().witness);
        let restoring = Arc::clone(&self.restoring);
        let key = DataKey::new(KEY);
        let digests =
            Digests::open(Arc::clone(&storage), Path::new("/digests"), GROUP, key.digest_key(), &volumes, &*witness);
        let setup = GroupSetup {
            facts,
            begin: Begin { key: KeyId::default(), volumes },
            data_key: key,
            interval: Duration::from_secs(1),
            audit_interval: Duration::from_secs(3600),
            limits: CutLimits { bound: Duration::from_millis(20), blocks_max: self.blocks_max },
            hooks: None,
            freezer: None,
            opener: Box::new(move || Ok(devices(&world))),
            connect: Box::new(move |memo: Memo| {
                let mut far = wire.lock();
                far.session = Some(SourceSession::new(session_facts, memo));
                far.events.clear();
                drop(far);
                Box::new(wire)
            }),
            kept_memo: Box::new(KeptBefore(self.kept.clone())),
            saver: None,
            proofs: None,
            learner: None,
            layouts: None,
            restoring: Box::new(move || restoring.lock().expect("no panic").clone()),
            opened: None,
            encoder: Arc::new(Encoder::inline()),
            digests,
            spool: Spool::new(storage, Path::new("/spool"), GROUP, self.limits),
            clock: Arc::clone(&self.world.clock) as Arc<dyn Clock>,
            random: witness,
            status: Arc::clone(&self.status),
        };
        let devices = devices(&self.world);
        let memo = devices.tracker.memo().expect("simulated");
        let (memo, is_kept) = match Memo::decode(&memo).expect("a memo") {
            memo if memo == Memo::default() => (setup.kept_memo.load().expect("none"), true),
            memo => (memo, false),
        };
        let (sender, inputs) = channel();
        self.agent = Some((Group::new(setup, devices, (memo, is_kept), sender), inputs));
    }

    pub(super) fn status(&self) -> GroupStatus {
        self.status.lock().expect("no panic").clone()
    }

    /// Lets the agent do what is due and hear what there is to hear; it may die of its disk.
    fn step(&mut self) {
        let Some((group, inputs)) = &mut self.agent else { return };
        let event = self.wire.lock().events.pop_front();
        if let Some(event) = event {
            group.take(Input::Link(event));
        }
        group.act();
        while let Ok(input) = inputs.try_recv() {
            group.take(input);
        }
        group.publish();
        if self.disk.is_down() {
            self.agent = None;
            return;
        }
        self.wire.lock().pump();
    }

    /// Writes, a second, and what is due then.
    pub(super) fn second(&mut self) {
        self.world.run(40);
        self.world.pass(Duration::from_secs(1));
        let due = |office: &Self| office.agent.as_ref().is_some_and(|(group, _)| group.wait() == Duration::ZERO);
        for _ in 0..100 {
            self.step();
            if !due(self) {
                break;
            }
        }
        assert!(!due(self), "the agent comes to rest");
    }

    /// A restore begins: what the agent says of it, once it does.
    pub(super) fn hold(&mut self) -> Option<String> {
        *self.restoring.lock().expect("no panic") = Some("data is being restored".into());
        let (reply, mut word) = oneshot::channel();
        self.agent.as_mut().expect("it lives").0.take(Input::Restoring(reply));
        self.step();
        self.step();
        word.try_recv().expect("it says")
    }

    /// A restore is over, and nobody says so: the agent sees it by itself.
    pub(super) fn release(&mut self) {
        *self.restoring.lock().expect("no panic") = None;
        for _ in 0..6 {
            self.second();
        }
        assert_eq!(self.status().restoring, None);
    }

    /// Until nothing is under way any more.
    pub(super) fn settle(&mut self) {
        for _ in 0..2000 {
            self.world.pass(Duration::from_secs(1));
            self.step();
            let status = self.status();
            if status.unacked_epochs == 0 && status.dirty_bytes == 0 && self.wire.lock().events.is_empty() {
                return;
            }
        }
        panic!("no end: {:?}", self.status());
    }

    /// Writers rest, the line comes back, everything is sent, and that is what there is.
    pub(super) fn end_well(&mut self) {
        self.world.set_quiet(true);
        self.world.run(5000);
        if !self.wire.lock().is_up {
            self.wire.lock().connect(Verdict::Continue);
        }
        self.settle();
        assert!(self.wire.lock().image == self.world.media(), "the target holds something else");
    }

    pub(super) fn points(&self) -> usize {
        self.wire.lock().points.len()
    }

    /// The agent dies, or its machine; another one starts.
    pub(super) fn die(&mut self, is_power_cut: bool) {
        self.agent = None;
        if self.disk.is_down() {
            self.disk.restart();
        }
        self.disk.clear_faults();
        if is_power_cut {
            self.world.power_loss();
            self.disk.power_cut();
            self.disk.restart();
        }
        self.start();
    }
}

fn devices(world: &Arc<World>) -> Devices {
    Devices {
        tracker: Box::new(SimTracker::attach(world)),
        reader: Box::new(SimReader::new(world)),
        exclusion: Box::new(NothingExcluded),
    }
}
