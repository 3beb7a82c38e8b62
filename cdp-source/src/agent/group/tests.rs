//! A group's thread against a target in memory: the real session and chain, an image for every point, no line and no root.

#![allow(clippy::disallowed_methods, reason = "a test writes a real image file")]

mod hooks;
mod line_audit;
mod outage;

use super::{Devices, Ending, GroupSetup, Input, KeptMemo, Link, Opener, PointRequest, run};
use crate::agent::status::{GroupPhase, GroupStatus};
use crate::config::HooksConfig;
use crate::control::{PointReply, Reply};
use crate::cut::CutLimits;
use crate::digests::Digests;
use crate::encoder::Encoder;
use crate::exclusion::NothingExcluded;
use crate::reader::{self, ReadTarget};
use crate::spool::{Spool, SpoolLimits};
use crate::tracker::scan::ScanTracker;
use cdp_protocol::codec;
use cdp_protocol::escrow::Envelope;
use cdp_protocol::frame::{self, Encoding, Kind};
use cdp_protocol::message::{GroupOpened, Instance, RefusalReason, TargetMessage, Verdict};
use cdp_protocol::record::{Begin, Commit, Volume};
use cdp_protocol::seal::DataKey;
use cdp_protocol::session::chain::{Chain, Step};
use cdp_protocol::session::memo::Memo;
use cdp_protocol::session::source::{GroupFacts, Next, Outgoing, SourceEvent, SourceSession};
use cdp_protocol::units::{BLOCK_BYTES, Block, Epoch, Extent, Generation, GroupId, Head, KeyId, Timestamp, VolumeSlot};
use cdp_seams::clock::{Clock as _, SystemClock};
use cdp_seams::random::SystemRandom;
use cdp_seams::storage::SystemStorage;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::oneshot;

/// The image's tracker keeps its memo in a file already.
struct NothingKept;

impl KeptMemo for NothingKept {
    fn load(&self) -> Result<Memo, String> {
        Ok(Memo::default())
    }

    fn keep(&self, _: &Memo) {}
}

const GROUP: GroupId = GroupId([7; 16]);
const KEY: [u8; 32] = [5; 32];
const SLOT: VolumeSlot = VolumeSlot(3);
/// Two parts of 8 MiB and something to cut.
const SIZE_BYTES: usize = 17 << 20;
const DEADLINE: Duration = Duration::from_secs(30);

/// What the target holds, and the session it is reached by.
#[derive(Default)]
struct Target {
    chain: Chain,
    session: Option<SourceSession>,
    inputs: Option<Sender<Input>>,
    /// Frames of the attempt under way, of the acked parts, and the image.
    open: Vec<Vec<u8>>,
    parts: Vec<Vec<u8>>,
    image: Vec<u8>,
    points: Vec<(Head, Commit, Vec<u8>)>,
    /// The blocks that the newest point brought.
    brought: Vec<u32>,
    parts_acked: usize,
    unchanged: Vec<Epoch>,
    /// Frames are held back: nothing is acked.
    is_deaf: bool,
    /// What a source that comes is told.
    verdict: Option<Verdict>,
    /// Blocks that it tells something else of than they were sent as, until they are sent again.
    stale: BTreeMap<u32, Vec<u8>>,
}

#[derive(Clone, Default)]
struct Shared(Arc<(Mutex<Target>, Condvar)>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Target> {
        self.0.0.lock().expect("no test thread has panicked")
    }

    fn until(&self, what: &str, is_so: impl Fn(&Target) -> bool) -> MutexGuard<'_, Target> {
        let waited = self.0.1.wait_timeout_while(self.lock(), DEADLINE, |target| !is_so(target));
        let (target, result) = waited.expect("no test thread has panicked");
        assert!(!result.timed_out(), "waited too long until {what}");
        target
    }

    /// Takes the group up on a new line.
    fn open(&self, verdict: Verdict) {
        let mut target = self.lock();
        let generation = match verdict {
            Verdict::Continue => target.chain.generation(),
            _ => Generation(target.chain.generation().0 + 1),
        };
        target.chain.grant(generation);
        if verdict != Verdict::Continue {
            (target.open, target.parts) = (Vec::new(), Vec::new());
        }
        let opened = GroupOpened {
            group: GROUP,
            generation,
            verdict,
            head: target.chain.head(),
            parts: target.chain.parts(),
            resume: None,
        };
        target.hear(&TargetMessage::GroupOpened(opened));
        target.pump();
        drop(target);
        self.0.1.notify_all();
    }

    fn change(&self, change: impl FnOnce(&mut Target)) {
        change(&mut self.lock());
        self.0.1.notify_all();
    }
}

impl Target {
    fn tell(&self, event: SourceEvent) {
        // A group that has stopped hears nothing.
        let _ = self.inputs.as_ref().expect("connected").send(Input::Link(event));
    }

    fn hear(&mut self, message: &TargetMessage) {
        let events = self.session.as_mut().expect("connected").message(message).expect("what was sent");
        for event in events {
            self.tell(event);
        }
    }

    fn pump(&mut self) {
        while !self.is_deaf {
            match self.session.as_mut().expect("connected").next_frame() {
                Next::Frame(bytes) => self.receive(&bytes),
                Next::Committing(head) => self.tell(SourceEvent::Committing(head)),
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
                self.parts_acked += 1;
                self.hear(&TargetMessage::PartAcked { group: GROUP, attempt, parts });
            }
            Step::Committed(head, commit) => {
                self.image.resize(SIZE_BYTES, 0);
                let frames: Vec<Vec<u8>> = self.parts.drain(..).chain(self.open.drain(..)).collect();
                self.brought.clear();
                for frame in &frames {
                    apply(&mut self.image, frame);
                    self.brought.extend(blocks_of(frame));
                }
                self.stale.retain(|block, _| !self.brought.contains(block));
                self.points.push((head, *commit, self.image.clone()));
                self.hear(&TargetMessage::Acked { group: GROUP, head });
            }
            Step::Duplicate | Step::Synced => {}
        }
    }
}

fn blocks_of(bytes: &[u8]) -> Vec<u32> {
    let header = frame::decode_header(&GROUP, bytes).expect("a frame");
    header.extents.iter().flat_map(|extent| extent.blocks()).map(|block| block.0).collect()
}

fn apply(image: &mut [u8], bytes: &[u8]) {
    let frame = frame::decode(&GROUP, bytes).expect("a frame");
    if frame.header.kind != Kind::Extents {
        return;
    }
    assert_eq!(frame.header.volume, SLOT);
    let key = DataKey::new(KEY).attempt_key(&frame.header.attempt);
    let content = match frame.header.encoding {
        Encoding::Hole => vec![0; frame.header.blocks() as usize * BLOCK_BYTES],
        _ => codec::open_content(&frame, &key).expect("opens"),
    };
    let blocks = frame.header.extents.iter().flat_map(|extent| extent.blocks());
    for (block, content) in blocks.zip(content.chunks_exact(BLOCK_BYTES)) {
        let at = block.to_bytes() as usize;
        image[at..at + BLOCK_BYTES].copy_from_slice(content);
    }
}

impl Link for Shared {
    fn submit(&self, outgoing: Outgoing) {
        self.change(|target| {
            target.session.as_mut().expect("connected").submit(outgoing);
            target.pump();
        });
    }

    fn proceed(&self, head: Head) {
        self.change(|target| {
            target.session.as_mut().expect("connected").proceed(head);
            target.pump();
        });
    }

    fn unchanged(&self, epoch: Epoch, _: Timestamp) {
        self.change(|target| target.unchanged.push(epoch));
    }

    fn list_changes(&self, since: Head) {
        self.change(|target| target.hear(&TargetMessage::ChangesUnknown { group: GROUP, since }));
    }

    fn list_digests(&self, head: Head, volume: VolumeSlot, blocks: Extent) {
        self.change(|target| target.tell_digests(head, volume, blocks));
    }

    fn bytes_per_s(&self) -> Option<f64> {
        Some(1e9)
    }

    fn is_connected(&self) -> bool {
        true
    }
}

/// An image file, and what runs over it.
struct Bench {
    folder: tempfile::TempDir,
    target: Shared,
    hooks: Option<HooksConfig>,
    audit_interval: Duration,
    limits: SpoolLimits,
}

struct Running {
    inputs: Sender<Input>,
    thread: JoinHandle<()>,
    status: Arc<Mutex<GroupStatus>>,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let limits = SpoolLimits::new(0, 1000);
        let audit_interval = Duration::from_secs(60);
        let bench = Self { folder, target: Shared::default(), hooks: None, audit_interval, limits };
        let mut file = std::fs::File::create(bench.image_path()).expect("made");
        let noise: Vec<u8> = (0..SIZE_BYTES).map(|at| (at / 512 * 31 + at) as u8 | 1).collect();
        file.write_all(&noise).expect("written");
        bench
    }

    fn image_path(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(self.image_path()).expect("read")
    }

    fn write(&self, block: u64, byte: u8) {
        let file = std::fs::OpenOptions::new().write(true).open(self.image_path()).expect("opened");
        file.write_all_at(&[byte; BLOCK_BYTES], block * BLOCK_BYTES as u64).expect("written");
    }

    fn opener(&self) -> Opener {
        let (node, folder) = (self.image_path(), self.folder.path().to_owned());
        Box::new(move || {
            let target = ReadTarget { node: node.clone(), offset_bytes: 0, size_bytes: SIZE_BYTES as u64 };
            let targets = [target.clone()];
            let open = || reader::open(&targets).map_err(|error| error.to_string());
            let storage = Arc::new(SystemStorage);
            let tracker = ScanTracker::open(&[(SLOT, target)], open()?, storage, &folder, &SystemRandom);
            let tracker = Box::new(tracker.map_err(|error| error.to_string())?);
            Ok(Devices { tracker, reader: open()?, exclusion: Box::new(NothingExcluded) })
        })
    }

    fn start(&self) -> Running {
        let volumes = vec![Volume { slot: SLOT, size_bytes: SIZE_BYTES as u64, name: "data".into() }];
        let envelope = Envelope { key: KeyId::default(), encapsulated: Vec::new(), sealed: Vec::new() };
        let facts = GroupFacts {
            group: GROUP,
            name: "main".into(),
            instance: Instance::default(),
            envelope,
            volumes: volumes.clone(),
        };
        let (inputs, receiver) = channel();
        let (link, to_group, session_facts) = (self.target.clone(), inputs.clone(), facts.clone());
        let status = Arc::new(Mutex::new(GroupStatus::default()));
        let begin = Begin { key: KeyId::default(), volumes };
        let setup = GroupSetup {
            facts,
            begin: begin.clone(),
            data_key: DataKey::new(KEY),
            interval: Duration::from_millis(20),
            audit_interval: self.audit_interval,
            limits: CutLimits { bound: Duration::from_secs(2), blocks_max: 512 },
            hooks: self.hooks.clone(),
            freezer: None,
            opener: self.opener(),
            connect: Box::new(move |memo: Memo| {
                let verdict = {
                    let mut target = link.lock();
                    target.session = Some(SourceSession::new(session_facts, memo));
                    target.inputs = Some(to_group);
                    target.verdict
                };
                if let Some(verdict) = verdict {
                    link.open(verdict);
                }
                Box::new(link)
            }),
            kept_memo: Box::new(NothingKept),
            saver: None,
            proofs: None,
            learner: None,
            layouts: None,
            restoring: Box::new(|| None),
            opened: None,
            encoder: Arc::new(Encoder::new(2)),
            digests: Digests::open(
                Arc::new(SystemStorage),
                &self.folder.path().join("digests"),
                GROUP,
                DataKey::new(KEY).digest_key(),
                &begin.volumes,
                &SystemRandom,
            ),
            spool: Spool::new(Arc::new(SystemStorage), &self.folder.path().join("spool"), GROUP, self.limits),
            clock: Arc::new(SystemClock::new()),
            random: Arc::new(SystemRandom),
            status: Arc::clone(&status),
        };
        let sender = inputs.clone();
        let thread = std::thread::spawn(move || run(setup, &receiver, sender));
        Running { inputs, thread, status }
    }

    fn answer(&self, verdict: Verdict) {
        self.target.lock().verdict = Some(verdict);
    }
}

impl Running {
    fn stop(self) {
        self.inputs.send(Input::Stop(Ending::Agent)).expect("it runs");
        self.thread.join().expect("it ends well");
    }

    fn point(&self, label: Option<&str>) -> oneshot::Receiver<Reply> {
        let (reply, answer) = oneshot::channel();
        let request = PointRequest { label: label.map(str::to_owned), wait: true, reply };
        self.inputs.send(Input::Point(request)).expect("it runs");
        answer
    }

    fn acked_point(&self, label: Option<&str>) -> PointReply {
        match self.point(label).blocking_recv().expect("answered") {
            Reply::Point(point) => point,
            other => panic!("no point: {other:?}"),
        }
    }

    fn status(&self) -> GroupStatus {
        self.status.lock().expect("no panic").clone()
    }

    /// Waits until the group says so of itself, which it does within a second of anything.
    fn until(&self, what: &str, is_so: impl Fn(&GroupStatus) -> bool) {
        let clock = SystemClock::new();
        while !is_so(&self.status()) {
            assert!(clock.monotonic() < DEADLINE, "waited too long until {what}: {:?}", self.status());
            std::thread::yield_now();
        }
    }
}

#[test]
fn the_first_copy_goes_in_parts_and_then_only_what_changed() {
    let bench = Bench::new();
    bench.answer(Verdict::New);
    let running = bench.start();
    let first = running.acked_point(None);
    {
        let target = bench.target.until("a point", |target| !target.points.is_empty());
        assert_eq!(target.points.len(), 1);
        assert_eq!((target.points[0].0.epoch, first.epoch), (Epoch(1), Epoch(1)));
        assert!(target.parts_acked >= 2, "the first copy came in {} parts", target.parts_acked);
        assert!(target.points[0].2 == bench.image(), "the point is the image");
    }
    bench.write(1000, 0xaa);
    bench.write(4000, 0);
    let target =
        bench.target.until("the next points", |target| target.points.last().is_some_and(|p| p.2 == bench.image()));
    let changed: u64 = target.points[1..].iter().map(|(_, commit, _)| commit.meters.dirty_blocks).sum();
    assert_eq!(changed, 2, "only what was written is sent");
    assert!(target.points[1..].iter().all(|(_, commit, _)| commit.parts.is_none()));
    drop(target);
    running.stop();
}

#[test]
fn an_idle_group_says_so_and_makes_no_points_but_those_asked_for() {
    let bench = Bench::new();
    bench.answer(Verdict::New);
    let running = bench.start();
    running.acked_point(None);
    drop(bench.target.until("it says so", |target| target.unchanged == [Epoch(1)]));
    assert_eq!(bench.target.lock().points.len(), 1);
    let point = running.acked_point(Some("before-upgrade"));
    assert_eq!((point.epoch, point.label.as_deref(), point.acked), (Epoch(2), Some("before-upgrade"), true));
    let target = bench.target.lock();
    assert_eq!(target.points[1].1.label.as_deref(), Some("before-upgrade"));
    assert_eq!(target.points[1].1.meters.dirty_blocks, 0);
    drop(target);
    assert_eq!(running.status().state, GroupPhase::Continuous);
    running.stop();
}

#[test]
fn what_the_target_has_lost_is_carried_once_more_though_nothing_was_written() {
    let bench = Bench::new();
    bench.answer(Verdict::New);
    let running = bench.start();
    running.acked_point(None);
    drop(bench.target.until("nothing changes", |target| target.unchanged == [Epoch(1)]));
    let ask = |volume, extents| TargetMessage::SendAgain { group: GROUP, volume, extents };
    let blocks = (SIZE_BYTES / BLOCK_BYTES) as u32;
    bench.target.change(|target| {
        target.hear(&ask(SLOT, vec![(Block(3), 2), (Block(900), 1), (Block(blocks - 1), 5), (Block(7), 0)]));
        target.hear(&ask(VolumeSlot(9), vec![(Block(1), 1)]));
    });
    let target = bench.target.until("they come again", |target| target.points.len() > 1);
    let (head, commit, image) = &target.points[1];
    assert_eq!((head.epoch, target.brought.as_slice()), (Epoch(2), [3, 4, 900, blocks - 1].as_slice()));
    assert_eq!(commit.meters.dirty_blocks, 4, "these and no others");
    assert!(*image == bench.image() && commit.parts.is_none());
    drop(target);
    let point = running.acked_point(None);
    assert_eq!((point.epoch, bench.target.lock().brought.len()), (Epoch(3), 0), "and only once");
    running.stop();
}

#[test]
fn a_successor_goes_on_in_the_same_chain() {
    let bench = Bench::new();
    bench.answer(Verdict::New);
    let running = bench.start();
    let before = running.acked_point(None);
    running.stop();
    bench.write(7, 0x77);
    bench.answer(Verdict::Continue);
    let running = bench.start();
    let after = running.acked_point(None);
    assert!(after.epoch > before.epoch);
    let target = bench.target.lock();
    assert_eq!(target.chain.generation(), Generation(1), "nothing was granted anew");
    let (_, commit, image) = target.points.last().expect("a point");
    assert_eq!(commit.predecessor.map(|before| before.head.epoch), Some(before.epoch));
    assert!(*image == bench.image());
    drop(target);
    running.stop();
}

#[test]
fn what_was_under_way_is_cut_again_in_a_new_generation() {
    let bench = Bench::new();
    bench.answer(Verdict::New);
    let running = bench.start();
    running.acked_point(None);
    bench.target.lock().is_deaf = true;
    bench.write(11, 0x11);
    let asked = running.point(Some("lost"));
    drop(bench.target.until("it is under way", |target| target.session.as_ref().is_some_and(|s| s.queued() > 0)));
    bench.target.lock().is_deaf = false;
    bench.target.open(Verdict::Rollback { to: Some(Epoch(1)) });
    assert!(matches!(asked.blocking_recv(), Ok(Reply::Failed { .. })), "who asked is told");
    let point = running.acked_point(Some("kept"));
    let target = bench.target.lock();
    assert_eq!(target.chain.generation(), Generation(2));
    let (_, first, _) = &target.points[1];
    assert_eq!(first.after_rollback_to, Some(Epoch(1)), "the first point says where the source stood");
    let (_, commit, image) = target.points.last().expect("a point");
    assert_eq!(commit.label.as_deref(), Some("kept"));
    assert!(*image == bench.image(), "nothing is missing");
    assert!(target.points.windows(2).all(|pair| pair[0].0.epoch < pair[1].0.epoch) && point.epoch > Epoch(1));
    drop(target);
    running.stop();
}

#[test]
fn a_target_that_does_not_answer_is_not_fed_without_end() {
    let bench = Bench::new();
    bench.answer(Verdict::New);
    bench.target.lock().is_deaf = true;
    let running = bench.start();
    let queued = |target: &Target| target.session.as_ref().map_or(0, SourceSession::queued);
    drop(bench.target.until("two parts are under way", |target| queued(target) >= 2));
    bench.target.change(|target| {
        target.is_deaf = false;
        target.pump();
    });
    running.acked_point(None);
    bench.target.lock().is_deaf = true;
    let before = bench.target.lock().points.len();
    // Kept: a point that nobody waits for any more is not made.
    let mut asked = Vec::new();
    for number in 0..20 {
        bench.write(number, number as u8 + 1);
        asked.push(running.point(None));
    }
    drop(bench.target.until("the budget is used up", |target| queued(target) as u64 >= super::UNACKED_EPOCHS_MAX));
    assert_eq!(queued(&bench.target.lock()) as u64, super::UNACKED_EPOCHS_MAX);
    bench.target.change(|target| {
        target.is_deaf = false;
        target.pump();
    });
    drop(bench.target.until("all is there", |target| target.points.last().is_some_and(|p| p.2 == bench.image())));
    assert!(bench.target.lock().points.len() > before);
    running.stop();
}

#[test]
fn a_volume_that_changes_its_size_ends_the_points_and_a_refusal_is_told() {
    let bench = Bench::new();
    bench.answer(Verdict::New);
    let running = bench.start();
    running.acked_point(None);
    bench.target.lock().tell(SourceEvent::Refused(RefusalReason::Fork));
    let Ok(Reply::Failed { message, .. }) = running.point(None).blocking_recv() else { panic!("a frozen group") };
    assert!(message.contains("fork"), "{message}");
    bench.target.open(Verdict::Continue);
    running.acked_point(None);
    let file = std::fs::OpenOptions::new().write(true).open(bench.image_path()).expect("opened");
    file.set_len(SIZE_BYTES as u64 / 2).expect("shrunk");
    let message = loop {
        match running.point(None).blocking_recv().expect("answered") {
            Reply::Failed { message, .. } => break message,
            Reply::Point(_) => {}
            other => panic!("{other:?}"),
        }
    };
    assert!(message.contains("bytes"), "{message}");
    running.stop();
}

#[test]
fn points_that_wait_while_the_volume_has_another_size_are_sent_once_it_is_back() {
    let mut bench = Bench::new();
    bench.limits = SpoolLimits { memory_bytes_max: 0, window_epochs: 2, ..SpoolLimits::new(64 << 20, 100) };
    bench.answer(Verdict::New);
    let running = bench.start();
    running.acked_point(None);
    bench.target.lock().is_deaf = true;
    let mut images = Vec::new();
    for number in 0..10 {
        let captured = running.status().captured_epoch;
        bench.write(number, number as u8 + 1);
        images.push(bench.image());
        running.until("it is captured", |status| status.captured_epoch > captured);
    }
    running.until("they wait", |status| status.spool.waiting_points >= 8 && status.spool.spooled_bytes > 0);
    let file = std::fs::OpenOptions::new().write(true).open(bench.image_path()).expect("opened");
    file.set_len(SIZE_BYTES as u64 / 2).expect("shrunk");
    running.until("that is noticed", |status| status.state == GroupPhase::Stalled);
    bench.target.change(|target| {
        target.is_deaf = false;
        target.pump();
    });
    // A commit leaves only where the memo can be kept, which lies with the tracking.
    running.until("they still wait", |status| status.state == GroupPhase::Stalled && status.spool.waiting_points >= 8);
    file.set_len(SIZE_BYTES as u64).expect("grown again, with zeros");
    let is_all = |target: &Target| target.points.last().is_some_and(|point| point.2 == bench.image());
    let target = bench.target.until("all is there", is_all);
    assert!(target.points.len() > images.len() + 1, "{} points", target.points.len());
    for (point, image) in target.points[1..].iter().zip(&images) {
        assert!(point.2 == *image, "{} is exact", point.0.epoch);
    }
    drop(target);
    running.stop();
}
