//! Sender and receiver over lines that break, targets that restart, disks that fill up: every epoch becomes a point once.

mod hostile;
mod memory;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use cdp_protocol::codec::{FrameListHasher, Sealer, open_content};
use cdp_protocol::escrow::Envelope;
use cdp_protocol::frame::{self, Kind};
use cdp_protocol::message::{Instance, RefusalReason, Verdict};
use cdp_protocol::record::{Begin, Meters, Volume};
use cdp_protocol::seal::DataKey;
use cdp_protocol::session::memo::Memo;
use cdp_protocol::session::source::{CommitDraft, End, GroupFacts, Outgoing, SourceEvent};
use cdp_protocol::units::{
    AttemptId, BLOCK_BYTES, Block, Class, Epoch, Extent, FrameHash, Generation, GroupId, Head, KeyId, Sequence,
    Timestamp, VolumeSlot,
};
use cdp_seams::clock::SystemClock;
use cdp_seams::line::{BoxFuture, Cut, Line, sim_line};
use cdp_seams::random::{SimRandom, array};
use cdp_source::sender::{ConnectError, Connector, GroupHandle, Sender};
use cdp_target::receiver::Receiver;
use memory::{MemoryStore, replay};

const GROUP: GroupId = GroupId([1; 16]);
const EPOCHS: u64 = 4;
/// Real time after which a run that makes no progress has failed.
const DEADLINE: Duration = Duration::from_secs(20);

fn key() -> DataKey {
    DataKey::new([7; 32])
}

fn facts() -> GroupFacts {
    let volumes = vec![Volume { slot: VolumeSlot(0), size_bytes: 1 << 20, name: "root".into() }];
    let envelope = Envelope { key: KeyId::default(), encapsulated: vec![], sealed: vec![] };
    GroupFacts { group: GROUP, name: "main".into(), instance: Instance::default(), envelope, volumes }
}

fn outgoing(epoch: u64, generation: Generation, random: &SimRandom) -> Outgoing {
    let attempt = AttemptId(array(random));
    let sealer = Sealer::new(GROUP, Epoch(epoch), generation, attempt, &key());
    let begin = Begin { key: KeyId::default(), volumes: facts().volumes };
    let mut frames = vec![Bytes::from(sealer.begin(&begin))];
    for sequence in 1..=3 {
        let extents = vec![Extent { start: Block(sequence as u32), count: 1 }];
        frames.push(sealer.content(VolumeSlot(0), Sequence(sequence), extents, &[epoch as u8; BLOCK_BYTES]).into());
    }
    let mut list = FrameListHasher::default();
    for bytes in &frames {
        list.push(&frame::hash(bytes));
    }
    let end = End::Commit(CommitDraft {
        class: Class::Crash,
        cut_time: Timestamp(epoch as i64),
        meters: Meters::default(),
        first_epoch: Epoch(epoch),
        after_rollback_to: None,
        label: None,
        volumes: vec![],
        layouts: Vec::new(),
    });
    let bytes = frames.iter().map(|bytes| bytes.len() as u64).sum();
    Outgoing { epoch: Epoch(epoch), attempt, frames, list: list.list(), bytes, end, sealer: Arc::new(sealer) }
}

/// The target's machine: each connection may meet a line that breaks, and a target that has just died.
struct Target {
    store: MemoryStore,
    receiver: Mutex<Arc<Receiver>>,
    random: SimRandom,
    /// Bytes the next lines carry before they break; then they hold.
    cuts: Mutex<Vec<Cut>>,
    restarts: bool,
    connections: AtomicU64,
}

impl Target {
    fn new(store: MemoryStore, seed: u64, cuts: Vec<Cut>, restarts: bool) -> Arc<Self> {
        let receiver = Receiver::new(Arc::new(store.clone()), Arc::new(SystemClock::new()), "test");
        let (random, connections) = (SimRandom::new(seed), AtomicU64::new(0));
        Arc::new(Self { store, receiver: receiver.into(), random, cuts: cuts.into(), restarts, connections })
    }
}

impl Connector for Target {
    fn connect(&self) -> BoxFuture<'_, Result<Box<dyn Line>, ConnectError>> {
        Box::pin(async {
            self.connections.fetch_add(1, Ordering::SeqCst);
            let cut = self.cuts.lock().expect("cuts").pop().unwrap_or(Cut::NEVER);
            let (ours, theirs) = sim_line(cut);
            let mut receiver = self.receiver.lock().expect("receiver");
            if self.restarts && self.random.below(2) == 0 {
                let store = self.store.crash(|unsynced| self.random.below(unsynced as u64 + 1) as usize);
                *receiver = Receiver::new(Arc::new(store), Arc::new(SystemClock::new()), "test");
            }
            let serving = receiver.clone();
            tokio::spawn(async move { serving.serve_connection(Box::new(theirs), "office").await });
            Ok(Box::new(ours) as Box<dyn Line>)
        })
    }
}

/// Captures: submits epochs under the generation it is told, cuts again what was voided. Ends when all are acked.
fn capture(handle: &GroupHandle, random: &SimRandom, mut memo: Memo) -> (Vec<Head>, Memo) {
    let (mut acked, mut submitted) = (Vec::<Head>::new(), false);
    while acked.len() < EPOCHS as usize {
        match handle.events.recv_timeout(DEADLINE).expect("progress") {
            SourceEvent::Opened { generation, .. } => {
                memo.generation = Some(generation);
                if !submitted {
                    for epoch in acked.len() as u64 + 1..=EPOCHS {
                        handle.submit(outgoing(epoch, generation, random)).expect("the sender lives");
                    }
                    submitted = true;
                }
            }
            SourceEvent::Voided => submitted = false,
            SourceEvent::Committing(head) => {
                memo.committing(head);
                handle.proceed(head).expect("the sender lives");
            }
            SourceEvent::Acked(head) => {
                assert!(!acked.contains(&head), "acked twice");
                memo.acked(head);
                acked.push(head);
            }
            SourceEvent::PartAcked { .. }
            | SourceEvent::Busy { .. }
            | SourceEvent::SendAgain { .. }
            | SourceEvent::Changes { .. }
            | SourceEvent::ChangesUnknown(_)
            | SourceEvent::Digests { .. } => {}
            SourceEvent::Refused(reason) => panic!("refused: {reason:?}"),
        }
    }
    (acked, memo)
}

/// Runs a group against a target until `work` on the capture thread has ended.
fn run<T: Send>(target: &Arc<Target>, memo: Memo, work: impl FnOnce(&GroupHandle) -> T + Send) -> (T, u64) {
    run_as(target, "", memo, work)
}

/// The same as a process of its own, on a machine of this name.
fn run_as<T: Send>(
    target: &Arc<Target>,
    host: &str,
    memo: Memo,
    work: impl FnOnce(&GroupHandle) -> T + Send,
) -> (T, u64) {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().start_paused(true).build().expect("a runtime");
    let random = Arc::new(SimRandom::new(1));
    let sender = Sender::start(runtime.handle(), target.clone(), Arc::new(SystemClock::new()), random);
    let mut process = [0; 16];
    process[..host.len()].copy_from_slice(host.as_bytes());
    let instance = Instance { process, host: host.to_owned() };
    let handle = sender.open_group(GroupFacts { instance, ..facts() }, memo);
    std::thread::scope(|scope| {
        let (done, ended) = tokio::sync::oneshot::channel::<()>();
        let working = scope.spawn(move || {
            let result = work(&handle);
            drop(done);
            (result, handle.link.snapshot().sent_bytes)
        });
        let _ = runtime.block_on(ended);
        working.join().expect("the capture thread")
    })
}

fn check(store: &MemoryStore, acked: &[Head]) {
    let entries = store.with(GROUP, |disk| disk.entries.clone());
    let (_, points) = replay(GROUP, &entries);
    assert_eq!(points.iter().map(|(head, _)| *head).collect::<Vec<_>>(), acked, "the points are those acked, in order");
    for (head, frames) in points {
        let parsed: Vec<_> = frames.iter().map(|bytes| frame::decode(&GROUP, bytes).expect("a frame")).collect();
        assert!(parsed.iter().all(|frame| frame.header.attempt == parsed[0].header.attempt), "one attempt a point");
        let content: Vec<_> = parsed.iter().filter(|frame| frame.header.kind == Kind::Extents).collect();
        assert_eq!(content.len(), 3);
        for frame in content {
            let bytes = open_content(frame, &key().attempt_key(&frame.header.attempt)).expect("opens");
            assert_eq!(bytes, [head.epoch.0 as u8; BLOCK_BYTES]);
        }
    }
}

/// Bytes of frames a run on a sound line takes.
fn sound_bytes() -> u64 {
    let target = Target::new(MemoryStore::default(), 0, vec![], false);
    let ((acked, _), sent) =
        run(&target, Memo::default(), |handle| capture(handle, &SimRandom::new(3), Memo::default()));
    check(&target.store, &acked);
    sent
}

#[test]
fn a_line_that_breaks_anywhere_loses_nothing_and_sends_little_again() {
    let sound = sound_bytes();
    // What was on its way when the line broke may go again.
    let again_max = 4096;
    for after_bytes in (0..sound + 2000).step_by(5) {
        let cut = Cut { after_bytes, delivers: true };
        let target = Target::new(MemoryStore::default(), 0, vec![cut], false);
        let ((acked, _), sent) =
            run(&target, Memo::default(), |handle| capture(handle, &SimRandom::new(3), Memo::default()));
        check(&target.store, &acked);
        assert!(sent <= sound + again_max, "cut after {after_bytes}: {sent} bytes sent, {sound} on a sound line");
    }
}

/// Captures two epochs in parts, once: a new generation would void what was sent, and is a failure. Ends when both are points.
fn capture_in_parts(handle: &GroupHandle, random: &SimRandom) -> Vec<Head> {
    let (mut acked, mut parts, mut granted) = (Vec::new(), Vec::new(), None);
    while acked.len() < 2 {
        match handle.events.recv_timeout(DEADLINE).expect("progress") {
            SourceEvent::Opened { generation, .. } if granted.is_none() => {
                granted = Some(generation);
                for (epoch, is_part) in [(1, true), (1, true), (1, false), (2, true), (2, false)] {
                    let outgoing = outgoing(epoch, generation, random);
                    let end = if is_part { End::Part } else { outgoing.end.clone() };
                    handle.submit(Outgoing { end, ..outgoing }).expect("the sender lives");
                }
            }
            SourceEvent::Opened { generation, .. } => {
                assert_eq!(Some(generation), granted, "a new generation has everything sent again");
            }
            SourceEvent::Committing(head) => handle.proceed(head).expect("the sender lives"),
            SourceEvent::Acked(head) => acked.push(head),
            SourceEvent::PartAcked { attempt, .. } => {
                assert!(!parts.contains(&attempt), "acked twice");
                parts.push(attempt);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(parts.len(), 3);
    acked
}

#[test]
fn a_target_that_restarts_anywhere_within_the_parts_is_sent_nothing_again() {
    let ran = |seed, cuts| {
        let target = Target::new(MemoryStore::default(), seed, cuts, true);
        let (acked, sent) = run(&target, Memo::default(), |handle| capture_in_parts(handle, &SimRandom::new(3)));
        check(&target.store, &acked);
        sent
    };
    let sound = ran(0, vec![]);
    for after_bytes in (0..sound + 2000).step_by(43) {
        for seed in 0..4 {
            println!("cut after {after_bytes}, seed {seed}");
            ran(seed, vec![Cut { after_bytes, delivers: true }]);
        }
    }
}

#[test]
fn whatever_breaks_every_epoch_is_acked_once() {
    for seed in 0..400 {
        println!("seed {seed}");
        let random = SimRandom::new(seed);
        let cut = |_| Cut { after_bytes: random.below(4000), delivers: random.below(2) == 0 };
        let target = Target::new(MemoryStore::default(), seed, (0..6).map(cut).collect(), true);
        let ((acked, _), _) = run(&target, Memo::default(), |handle| capture(handle, &random, Memo::default()));
        check(&target.store, &acked);
    }
}

#[test]
fn a_full_disk_and_a_failed_sync_push_back_and_lose_nothing() {
    for failing in [false, true] {
        let target = Target::new(MemoryStore::default(), 0, vec![], false);
        target.store.with(GROUP, |disk| (disk.full, disk.fail_next_sync) = (!failing, failing));
        let store = target.store.clone();
        let ((acked, ()), _) = run(&target, Memo::default(), |handle| {
            let random = SimRandom::new(4);
            let opened = handle.events.recv_timeout(DEADLINE).expect("opened");
            let SourceEvent::Opened { generation, .. } = opened else { panic!("{opened:?}") };
            for epoch in 1..=EPOCHS {
                handle.submit(outgoing(epoch, generation, &random)).expect("the sender lives");
            }
            let mut acked = Vec::new();
            let mut busy = 0;
            while acked.len() < EPOCHS as usize {
                match handle.events.recv_timeout(DEADLINE).expect("progress") {
                    SourceEvent::Committing(head) => handle.proceed(head).expect("the sender lives"),
                    SourceEvent::Acked(head) => acked.push(head),
                    SourceEvent::Busy { .. } => {
                        busy += 1;
                        store.with(GROUP, |disk| disk.full = false);
                    }
                    SourceEvent::Opened { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
            assert!(busy > 0, "it was put off");
            (acked, ())
        });
        check(&target.store, &acked);
        assert_eq!(target.connections.load(Ordering::SeqCst), 1, "on the same connection");
    }
}

#[test]
fn restored_forked_and_returning_sources_are_told_apart() {
    let target = Target::new(MemoryStore::default(), 0, vec![], false);
    let ((acked, memo), _) =
        run(&target, Memo::default(), |handle| capture(handle, &SimRandom::new(5), Memo::default()));
    let first = |memo: Memo| run(&target, memo, |handle| handle.events.recv_timeout(DEADLINE).expect("an answer")).0;
    let verdict = |event: &SourceEvent| format!("{event:?}");
    let same = first(memo.clone());
    assert!(verdict(&same).contains("Continue") && verdict(&same).contains("Generation(1)"), "{same:?}");
    let unheard =
        Memo { generation: memo.generation, acked: vec![acked[1]], sent: vec![acked[3], acked[2]], parts: None };
    assert!(verdict(&first(unheard)).contains("Continue"), "an ack that was lost");
    let restored = Memo { generation: memo.generation, acked: vec![acked[1], acked[0]], ..Memo::default() };
    let event = first(restored);
    assert!(verdict(&event).contains("Rollback { to: Some(Epoch(2)) }") && verdict(&event).contains("Generation(2)"));
    let strange = Head { epoch: Epoch(9), hash: FrameHash([9; 32]) };
    let granted = first(Memo { generation: Some(Generation(2)), acked: vec![acked[3], acked[1]], ..Memo::default() });
    assert!(verdict(&granted).contains("Continue") && verdict(&granted).contains("Generation(2)"), "{granted:?}");
    let fork = Memo { generation: Some(Generation(2)), acked: vec![strange], ..Memo::default() };
    assert_eq!(first(fork), SourceEvent::Refused(RefusalReason::Fork));
    assert_eq!(first(memo), SourceEvent::Refused(RefusalReason::Fork), "frozen until it is resolved");
}

/// A copy that stands at point 2, while the original is connected and stands at 4.
#[test]
fn a_copy_takes_over_the_original_is_told_once_and_does_not_ask_again() {
    let target = Target::new(MemoryStore::default(), 0, vec![], false);
    let (told, _) = run(&target, Memo::default(), |handle| {
        let (acked, memo) = capture(handle, &SimRandom::new(5), Memo::default());
        let restored = Memo { generation: memo.generation, acked: vec![acked[1], acked[0]], ..Memo::default() };
        let copy =
            run_as(&target, "copy", restored, |handle| handle.events.recv_timeout(DEADLINE).expect("an answer")).0;
        assert!(
            matches!(copy, SourceEvent::Opened { verdict: Verdict::Rollback { to: Some(Epoch(2)) }, is_new: true, .. }),
            "{copy:?}"
        );
        let told = handle.events.recv_timeout(DEADLINE).expect("told");
        // The clock of this runtime runs ahead whenever nothing is to be done: hours, in which it could ask again.
        let asked_again = handle.events.recv_timeout(Duration::from_millis(300));
        assert!(asked_again.is_err(), "{asked_again:?}");
        told
    });
    let SourceEvent::Refused(RefusalReason::Superseded { by, .. }) = told else { panic!("{told:?}") };
    assert_eq!(by, "copy");
    assert!(target.store.with(GROUP, |disk| !disk.is_frozen()), "nothing was frozen by it");
    // Started anew, it is a fork: what it made after 2 is of a line that was left.
}
