//! A line that is down for long: what waits, what becomes of it, and what comes after. One thread, simulated volumes, disk and clock, the
//! group's real ledger, digests and spool, and a target in memory that holds every point against the instant of its cut.

use super::super::{Devices, Group, GroupSetup, Input, Link};
use super::NothingKept;
use crate::agent::status::GroupStatus;
use crate::cut::CutLimits;
use crate::digests::Digests;
use crate::encoder::Encoder;
use crate::exclusion::NothingExcluded;
use crate::sim::{Image, Instant, Profile, Sabotage, SimReader, SimTracker, World, sectors_of};
use crate::spool::{Spool, SpoolLimits};
use crate::tracker::Tracker as _;
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
use cdp_seams::storage::sim::{Fault, SimStorage};
use std::collections::{HashMap, VecDeque};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

const GROUP: GroupId = GroupId([9; 16]);
const KEY: [u8; 32] = [6; 32];
/// A 64th of the spool's size, in whole pages.
const INDEX_BYTES: u64 = 12 * (1 << 20) / 64;
const FRAMES: &str = "/spool/frames";
/// So little that everything that waits goes to the file.
const TIGHT: SpoolLimits = SpoolLimits { bytes_max: 12 << 20, points_max: 40, memory_bytes_max: 0, window_epochs: 2 };

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
struct Point {
    head: Head,
    commit: Commit,
    /// Blocks that came with it, each as often as it came.
    came: Vec<(usize, u32)>,
}

/// The line, and what is at its other end.
struct Far {
    world: Arc<World>,
    witness: Arc<Witness>,
    session: Option<SourceSession>,
    chain: Chain,
    is_up: bool,
    /// Frames of the attempt under way, and of the acked parts.
    open: Vec<Vec<u8>>,
    parts: Vec<Vec<u8>>,
    image: Image,
    points: Vec<Point>,
    events: VecDeque<SourceEvent>,
    voided: usize,
}

#[derive(Clone)]
struct Wire(Arc<Mutex<Far>>);

impl Wire {
    fn lock(&self) -> MutexGuard<'_, Far> {
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
    fn connect(&mut self, verdict: Verdict) {
        self.is_up = true;
        if verdict != Verdict::Continue {
            self.chain.grant(Generation(self.chain.generation().0 + 1));
            (self.open, self.parts) = (Vec::new(), Vec::new());
        }
        let (generation, head, parts) = (self.chain.generation(), self.chain.head(), self.chain.parts());
        let opened = GroupOpened { group: GROUP, generation, verdict, head, parts, resume: None };
        self.hear(&TargetMessage::GroupOpened(opened));
    }

    fn cut(&mut self) {
        self.is_up = false;
        self.session.as_mut().expect("connected").line_down();
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
struct Office {
    world: Arc<World>,
    disk: SimStorage,
    wire: Wire,
    limits: SpoolLimits,
    status: Arc<Mutex<GroupStatus>>,
    agent: Option<(Group, Receiver<Input>)>,
}

impl Office {
    fn new(seed: u64, limits: SpoolLimits) -> Self {
        let profile = Profile { sectors: vec![8 * 60, 8 * 20 + 3], repeat_permille: 300, ..Profile::default() };
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
        let mut office = Self { world, disk: SimStorage::new(seed), wire, limits, status: Arc::default(), agent: None };
        office.start();
        office.wire.lock().connect(Verdict::New);
        office.settle();
        assert_eq!(office.status().dirty_bytes, 0);
        office
    }

    /// An agent starts, without a line.
    fn start(&mut self) {
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
        let key = DataKey::new(KEY);
        let digests =
            Digests::open(Arc::clone(&storage), Path::new("/digests"), GROUP, key.digest_key(), &volumes, &*witness);
        let setup = GroupSetup {
            facts,
            begin: Begin { key: KeyId::default(), volumes },
            data_key: key,
            interval: Duration::from_secs(1),
            audit_interval: Duration::from_secs(3600),
            limits: CutLimits { bound: Duration::from_millis(20), blocks_max: 1000 },
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
            kept_memo: Box::new(NothingKept),
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

    fn status(&self) -> GroupStatus {
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
    fn second(&mut self) {
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

    /// Until nothing is under way any more.
    fn settle(&mut self) {
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
    fn end_well(&mut self) {
        self.world.set_quiet(true);
        self.world.run(5000);
        if !self.wire.lock().is_up {
            self.wire.lock().connect(Verdict::Continue);
        }
        self.settle();
        assert!(self.wire.lock().image == self.world.media(), "the target holds something else");
    }

    fn points(&self) -> usize {
        self.wire.lock().points.len()
    }

    /// The agent dies, or its machine; another one starts.
    fn die(&mut self, is_power_cut: bool) {
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

/// 30 days in steps of ten minutes.
#[test]
fn after_an_outage_of_30_days_every_point_that_was_kept_is_exact_and_nothing_is_copied_anew() {
    const STEPS: u64 = 30 * 24 * 6;
    let limits = SpoolLimits { window_epochs: 8, memory_bytes_max: 16 << 10, ..TIGHT };
    let mut office = Office::new(1, limits);
    office.wire.lock().cut();
    let (before, first) = (office.points(), office.status().captured_epoch.expect("a point"));
    for _ in 0..STEPS {
        office.world.pass(Duration::from_secs(600));
        office.second();
        let status = office.status();
        assert!(status.unacked_epochs <= limits.points_max, "{} points wait", status.unacked_epochs);
        assert!(office.disk.file_len(Path::new(FRAMES)) <= limits.bytes_max);
        assert_eq!(status.spool.failure, None);
    }
    let status = office.status();
    let captured = status.captured_epoch.expect("a point").0 - first.0;
    assert!(captured > STEPS * 9 / 10, "{captured} of {STEPS} points were cut");
    assert!(status.spool.merged_points > captured - limits.points_max, "{:?}", status.spool);
    office.end_well();
    let far = office.wire.lock();
    let points = &far.points[before..];
    assert!(points.len() as u64 <= limits.points_max + 2, "{} points", points.len());
    assert!(points.len() as u64 > limits.points_max / 2, "{} points", points.len());
    assert_eq!((far.voided, far.chain.generation()), (0, Generation(1)), "no new generation, no full resync");
    for point in points {
        let mut came = point.came.clone();
        came.sort_unstable();
        came.dedup();
        assert_eq!(came.len(), point.came.len(), "{} carries a block twice", point.head.epoch);
        let meters = &point.commit.meters;
        assert_eq!(came.len() as u64, meters.content_blocks + meters.hole_blocks, "{}", point.head.epoch);
    }
    // Every number is named by one point, and the older a point the longer it stands for.
    for pair in points.windows(2) {
        assert_eq!(pair[1].commit.first_epoch.0, pair[0].head.epoch.0 + 1);
    }
    let span = |point: &Point| point.head.epoch.0 - point.commit.first_epoch.0;
    let (older, newer): (u64, u64) = points[8..].iter().enumerate().fold((0, 0), |(older, newer), (at, point)| {
        if at < points.len() / 2 - 4 { (older + span(point), newer) } else { (older, newer + span(point)) }
    });
    assert!(older > 3 * newer, "older points stand for {older}, newer ones for {newer}");
}

/// A line that is down while the agent lives, dies and lives on; `fault`: at which call to the disk, and which. Gives how many calls
/// there were, how the group stood at the end of it, and whether the spool ever said that it cannot be written.
fn scenario(seed: u64, fault: Option<(u64, Fault)>) -> (u64, GroupStatus, bool) {
    let mut office = Office::new(seed, SpoolLimits { points_max: 8, ..TIGHT });
    office.wire.lock().cut();
    let calls = office.disk.calls();
    if let Some((call, fault)) = fault {
        office.disk.fault_at(calls + call, fault);
    }
    let mut has_failed = false;
    for second in 0..24 {
        office.second();
        has_failed |= office.status().spool.failure.is_some();
        if office.agent.is_none() {
            office.die(matches!(fault, Some((_, Fault::PowerCut))));
        }
        if second == 16 {
            office.die(false);
        }
    }
    let (calls, status) = (office.disk.calls() - calls, office.status());
    office.disk.clear_faults();
    let is_lost = status.rescan_percent.is_some() || office.agent.as_ref().is_some_and(|(group, _)| group.memo_is_kept);
    office.world.set_quiet(true);
    office.world.run(5000);
    office.wire.lock().connect(if is_lost { Verdict::TargetBehind } else { Verdict::Continue });
    office.settle();
    assert!(office.wire.lock().image == office.world.media(), "the target holds something else");
    (calls, status, has_failed)
}

#[test]
fn a_death_at_any_call_to_the_spool_leaves_exact_points_and_nothing_missing() {
    let (calls, status, _) = scenario(2, None);
    assert!(status.spool.waiting_points > 2 && status.spool.spooled_bytes > 0, "{:?}", status.spool);
    assert!(calls > 60, "{calls} calls");
    for call in 0..calls {
        scenario(2, Some((call, Fault::Death)));
        scenario(2, Some((call, Fault::End)));
    }
}

#[test]
fn a_power_cut_at_any_call_to_the_spool_leaves_a_rescan_and_nothing_missing() {
    let (calls, ..) = scenario(3, None);
    for call in 0..calls {
        scenario(3, Some((call, Fault::PowerCut)));
    }
}

#[test]
fn a_disk_that_fails_or_is_full_leaves_the_group_going_on_from_memory() {
    let (calls, ..) = scenario(4, None);
    let mut failures = 0;
    for call in 0..calls {
        for kind in [ErrorKind::StorageFull, ErrorKind::ReadOnlyFilesystem] {
            let (_, _, has_failed) = scenario(4, Some((call, Fault::Error(kind))));
            failures += u64::from(has_failed);
        }
    }
    assert!(failures > 10, "{failures} failures were told");
}

#[test]
fn a_successor_goes_on_with_what_waits_and_makes_points_before_the_line_is_back() {
    let mut office = Office::new(5, TIGHT);
    office.wire.lock().cut();
    (0..12).for_each(|_| office.second());
    let (waiting, captured) = (office.status().unacked_epochs, office.status().captured_epoch);
    assert!(waiting > 6, "{waiting} points wait");
    office.die(false);
    // The newest was in memory alone.
    assert_eq!(office.status().unacked_epochs, waiting - 1);
    (0..5).for_each(|_| office.second());
    assert!(office.status().captured_epoch > captured, "points are made without a line");
    let before = office.points();
    office.end_well();
    assert!(office.points() - before >= waiting as usize + 3, "{} points came", office.points() - before);
    // Once all of it is sent nothing is written any more.
    let calls = office.disk.calls();
    (0..30).for_each(|_| office.second());
    assert!(office.disk.calls() - calls < 10, "{} calls", office.disk.calls() - calls);
}

#[test]
fn a_spool_of_another_history_or_damaged_is_thrown_away() {
    let frames = Path::new(FRAMES);
    for what in ["another history", "a flipped bit", "no file"] {
        let mut office = Office::new(6, TIGHT);
        office.wire.lock().cut();
        (0..12).for_each(|_| office.second());
        office.agent = None;
        match what {
            "another history" => {
                let mut tracker = SimTracker::attach(&office.world);
                let mut memo = Memo::decode(&tracker.memo().expect("simulated")).expect("a memo");
                memo.sent.clear();
                memo.acked.truncate(0);
                tracker.set_memo(&memo.encode()).expect("simulated");
            }
            // Somewhere in the first slab.
            "a flipped bit" => office.disk.flip_bit(frames, 8 * ((4096 + 2 * INDEX_BYTES) + 300)),
            _ => office.disk.remove(frames).expect("removed"),
        }
        office.start();
        assert_eq!(office.status().spool.waiting_points, 0, "{what}");
        office.end_well();
    }
}

#[test]
fn what_rots_in_the_spool_while_it_waits_is_captured_again() {
    let mut office = Office::new(7, TIGHT);
    office.wire.lock().cut();
    (0..12).for_each(|_| office.second());
    let waiting = office.status().spool.waiting_points;
    assert!(waiting > 4);
    let slabs_at = 4096 + 2 * INDEX_BYTES;
    for slab in 0..12 {
        office.disk.flip_bit(Path::new(FRAMES), 8 * (slabs_at + slab * 65536 + 300));
    }
    office.end_well();
    assert!(office.status().spool.waiting_points == 0);
    assert_eq!(office.wire.lock().voided, 0, "what was handed over before stands");
}

#[test]
fn blocks_that_go_back_to_what_they_were_while_points_wait_are_not_left_out() {
    // Most writes put one of three contents back; exactness is checked at each point, and at the end.
    for seed in 10..30 {
        let mut office = Office::new(seed, SpoolLimits { points_max: 6, ..TIGHT });
        for _ in 0..4 {
            office.wire.lock().cut();
            (0..10).for_each(|_| office.second());
            office.wire.lock().connect(Verdict::Continue);
            (0..4).for_each(|_| office.second());
        }
        office.end_well();
    }
}
