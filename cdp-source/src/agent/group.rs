//! One group's capture thread: when to cut, what becomes of a capture, and what the target's answers mean for the tracker.
//!
//! Owns tracker and reader, the account of blocks (`ledger`) and the group's memo. Invariants:
//! * a block leaves the tracker's `unacked` only after the target has acked an attempt that holds it;
//! * the memo names a commit before the commit leaves, and a new generation only once all it voids is in `unacked`;
//! * nothing is written for an epoch but the tracker's own pinned memory, so that an idle volume stays idle.
//!
//! Does not know the line: a `Link` takes attempts and answers with events.

use super::encoding::{Encoding, Job};
use super::ledger::{Captured, Ledger, to_bytes};
use super::status::{CutStatus, GroupPhase, GroupStatus};
use crate::capture::Capture;
use crate::control::{PointReply, Reply};
use crate::cut::{self, Cut, CutError, CutLimits};
use crate::encoder::Encoder;
use crate::reader::BlockReader;
use crate::tracker::{Tracker, TrackerError};
use cdp_protocol::codec::Sealer;
use cdp_protocol::message::{GroupOpened, RefusalReason, Verdict};
use cdp_protocol::record::{Begin, PartChain};
use cdp_protocol::seal::DataKey;
use cdp_protocol::session::memo::Memo;
use cdp_protocol::session::source::{CommitDraft, End, GroupFacts, Outgoing, SourceEvent};
use cdp_protocol::units::{AttemptId, BLOCK_BYTES, Class, Epoch, Generation, Head, Timestamp, VolumeSlot, blocks_in};
use cdp_seams::clock::Clock;
use cdp_seams::random::{self, Random};
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// Bytes captured and not acked above which nothing more is captured. With the capture being read and the one being
/// encoded (32 MiB each at most by default) it bounds the agent's memory to about 100 MiB.
const UNACKED_BYTES_MAX: u64 = 32 << 20;
/// Attempts captured and not acked above which nothing more is captured. Below what the sender takes without waiting: this
/// thread must never wait for the line, or nobody would let commits go.
const ATTEMPTS_MAX: usize = 16;
/// Epochs captured and not acked above which no cut is made: `session::SENT_MAX` commits may be under way.
const UNACKED_EPOCHS_MAX: u64 = 8;
/// Blocks of a part: 8 MiB, so that four are under way at a time.
const PART_BLOCKS: u64 = (8 << 20) / BLOCK_BYTES as u64;
/// How often `unacked` is brought up to date while parts are being acked; each time its whole bitmap is written.
const RETAIN_EVERY: Duration = Duration::from_secs(1);
/// How often the target is told that nothing has changed: 2 kB a minute are all an idle group may take.
const UNCHANGED_EVERY: Duration = Duration::from_secs(20);
/// How soon volumes that failed are tried again.
const REOPEN_EVERY: Duration = Duration::from_secs(30);
/// How long the thread sleeps where nothing is due: so often the status is brought up to date.
const IDLE_WAIT: Duration = Duration::from_secs(1);
/// Cuts in a row that do not validate after which the group is called stalled.
const FAILED_CUTS_MAX: u64 = 10;

/// The way to the target.
pub trait Link: Send {
    /// Takes an attempt; of a generation that is over it is passed over.
    fn submit(&self, outgoing: Outgoing);
    /// The memo names this commit: it may leave.
    fn proceed(&self, head: Head);
    /// The volumes are as they were at `epoch`.
    fn unchanged(&self, epoch: Epoch, as_of: Timestamp);
    /// Whether there is a line now.
    fn is_connected(&self) -> bool;
}

/// What happens to a group.
pub enum Input {
    /// The line or the target says something.
    Link(SourceEvent),
    /// An attempt is encoded.
    Encoded(Outgoing),
    /// A point is wanted now.
    Point(PointRequest),
    /// The end. The tracking goes on in the kernel.
    Stop,
}

/// A point that is wanted now.
pub struct PointRequest {
    /// Its name.
    pub label: Option<String>,
    /// Whether to answer only once it is acked.
    pub wait: bool,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Reply>,
}

/// What a group's volumes are watched and read with.
pub struct Devices {
    /// Watches them.
    pub tracker: Box<dyn Tracker>,
    /// Reads them.
    pub reader: Box<dyn BlockReader>,
}

/// Opens a group's volumes; tells in a line why not.
pub type Opener = Box<dyn FnMut() -> Result<Devices, String> + Send>;
/// Makes the way to the target, for a group that remembers this.
pub type Connect = Box<dyn FnOnce(Memo) -> Box<dyn Link> + Send>;

/// What a group is made of.
pub struct GroupSetup {
    /// What the target is told of it.
    pub facts: GroupFacts,
    /// Names the key, in each attempt.
    pub begin: Begin,
    /// The key.
    pub data_key: DataKey,
    /// From cut to cut.
    pub interval: Duration,
    /// How far a cut goes.
    pub limits: CutLimits,
    /// Opens its volumes.
    pub opener: Opener,
    /// Makes its way to the target.
    pub connect: Connect,
    /// Encodes.
    pub encoder: Arc<Encoder>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Ids of attempts.
    pub random: Arc<dyn Random>,
    /// Where others see how it stands.
    pub status: Arc<Mutex<GroupStatus>>,
}

/// Runs a group until `Input::Stop`, or until nobody can say so any more. `sender` is the other end of `inputs`.
pub fn run(mut setup: GroupSetup, inputs: &Receiver<Input>, sender: Sender<Input>) {
    let Some((devices, memo)) = first_open(&mut setup, inputs) else { return };
    let mut group = Group::new(setup, devices, memo, sender);
    loop {
        match inputs.recv_timeout(group.wait()) {
            Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => break,
            Ok(input) => group.take(input),
            Err(RecvTimeoutError::Timeout) => {}
        }
        loop {
            match inputs.try_recv() {
                Ok(Input::Stop) => return group.finish(),
                Ok(input) => group.take(input),
                Err(_) => break,
            }
        }
        group.act();
        group.publish();
    }
    group.finish();
}

/// Opens the volumes, now and then again until it works: without them nothing is known about the group's history.
fn first_open(setup: &mut GroupSetup, inputs: &Receiver<Input>) -> Option<(Devices, Memo)> {
    let mut said = None;
    loop {
        let opened = (setup.opener)().and_then(|devices| {
            let memo = devices.tracker.memo().map_err(|error| format!("{:#}", anyhow::Error::new(error)))?;
            Ok((devices, memo))
        });
        match opened {
            Ok((devices, memo)) => {
                let memo = Memo::decode(&memo).unwrap_or_else(|error| {
                    tracing::error!(group = setup.facts.name, %error, "the memo is lost: everything is compared");
                    Memo::default()
                });
                return Some((devices, memo));
            }
            Err(reason) => {
                if said.as_ref() != Some(&reason) {
                    tracing::error!(
                        group = setup.facts.name,
                        reason,
                        "no recovery points: the volumes cannot be opened"
                    );
                }
                let mut status = lock(&setup.status);
                (status.state, status.reason) = (GroupPhase::Stalled, Some(reason.clone()));
                said = Some(reason);
            }
        }
        let deadline = setup.clock.monotonic() + REOPEN_EVERY;
        loop {
            let left = deadline.saturating_sub(setup.clock.monotonic());
            match inputs.recv_timeout(left) {
                Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => return None,
                Ok(Input::Point(request)) => refuse(request, said.as_deref().unwrap_or_default()),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => break,
            }
        }
    }
}

/// The thread's state.
struct Group {
    setup: GroupSetup,
    devices: Option<Devices>,
    link: Box<dyn Link>,
    encoding: Encoding,
    ledger: Ledger,
    memo: Memo,
    /// Set once the target has taken the group up.
    open: Option<Open>,
    wanted: VecDeque<PointRequest>,
    /// Points that are waited for, by epoch.
    awaited: Vec<(PointReply, oneshot::Sender<Reply>)>,
    /// Why no points are made.
    trouble: Option<String>,
    /// Why the target takes nothing.
    refused: Option<String>,
    /// Why the target took nothing when it was asked last. It stands until something is acked: a target that takes the
    /// group up again may have no more room than before.
    put_off: Option<String>,
    /// Why everything is captured again.
    rescan: Option<String>,
    /// Whether the tracker was flipped before parts are read.
    primed: bool,
    next_cut: Duration,
    reopen_at: Duration,
    retain_at: Option<Duration>,
    told_unchanged: Option<Duration>,
    failed_cuts: u64,
    cuts: Cuts,
    captured_epoch: Option<Epoch>,
    acked_time: Option<Timestamp>,
    unchanged_as_of: Option<Timestamp>,
    acked_bytes: u64,
    opened_at: Option<Duration>,
    last_cut: Option<CutStatus>,
}

/// Cuts since the agent's start. One that is too large is none: parts come first.
#[derive(Clone, Copy, Default)]
struct Cuts {
    tried: u64,
    validated: u64,
    unchanged: u64,
}

impl Cuts {
    fn count(&mut self, cut: &Cut) {
        let (tried, validated, unchanged) = match cut {
            Cut::Captured(_) => (1, 1, 0),
            Cut::Unchanged { .. } => (1, 1, 1),
            Cut::NotValidated => (1, 0, 0),
            Cut::TooLarge => (0, 0, 0),
        };
        self.tried += tried;
        self.validated += validated;
        self.unchanged += unchanged;
    }
}

/// Where the group stands with the target.
#[derive(Clone, Copy)]
struct Open {
    generation: Generation,
    /// The next point's number.
    next_epoch: Epoch,
    /// Told in the first commit.
    after_rollback_to: Option<Epoch>,
    /// Whether the target's newest point is one of ours to build on.
    has_point: bool,
}

/// What is to be done next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Due {
    Part,
    Cut,
    Nothing,
}

impl Group {
    fn new(mut setup: GroupSetup, devices: Devices, memo: Memo, sender: Sender<Input>) -> Self {
        let volume_blocks = setup.facts.volumes.iter().map(|volume| blocks_in(volume.size_bytes)).collect();
        let slots: Vec<VolumeSlot> = setup.facts.volumes.iter().map(|volume| volume.slot).collect();
        let connect = std::mem::replace(&mut setup.connect, Box::new(|_| unreachable!("connected once")));
        let link = connect(memo.clone());
        let encoding = Encoding::start(Arc::clone(&setup.encoder), slots, setup.begin.clone(), move |outgoing| {
            // Without a group there is nobody to send it for.
            let _ = sender.send(Input::Encoded(outgoing));
        });
        let mut group = Self {
            ledger: Ledger::new(volume_blocks),
            link,
            encoding,
            devices: None,
            memo,
            open: None,
            wanted: VecDeque::new(),
            awaited: Vec::new(),
            trouble: None,
            refused: None,
            put_off: None,
            rescan: None,
            primed: false,
            next_cut: Duration::ZERO,
            reopen_at: Duration::ZERO,
            retain_at: None,
            told_unchanged: None,
            failed_cuts: 0,
            cuts: Cuts::default(),
            captured_epoch: None,
            acked_time: None,
            unchanged_as_of: None,
            acked_bytes: 0,
            opened_at: None,
            last_cut: None,
            setup,
        };
        group.take_up(devices);
        group.publish();
        group
    }

    /// Goes on with volumes that were opened: what is not acked of old is to be captured.
    fn take_up(&mut self, mut devices: Devices) {
        let recovered = devices.tracker.take_recovered();
        self.ledger.carry_more(&recovered);
        if let Some(reason) = devices.tracker.report().started_over {
            tracing::warn!(group = self.setup.facts.name, reason, "tracking was interrupted: everything is sent again");
            self.rescan = Some(reason);
        }
        self.devices = Some(devices);
        self.primed = false;
        self.trouble = None;
    }

    /// How long nothing is due.
    fn wait(&self) -> Duration {
        let now = self.setup.clock.monotonic();
        if self.devices.is_none() {
            return self.reopen_at.saturating_sub(now).min(IDLE_WAIT);
        }
        let retain = self.retain_at.map_or(IDLE_WAIT, |at| at.saturating_sub(now));
        let cut = match (self.open, self.has_room()) {
            (Some(_), true) if self.is_too_large() || !self.wanted.is_empty() => Duration::ZERO,
            (Some(_), true) => self.next_cut.saturating_sub(now),
            _ => IDLE_WAIT,
        };
        cut.min(retain).min(IDLE_WAIT)
    }

    fn has_room(&self) -> bool {
        self.refused.is_none()
            && self.ledger.unacked_bytes() < UNACKED_BYTES_MAX
            && self.ledger.unacked_epochs() < UNACKED_EPOCHS_MAX
            && self.ledger.attempts() < ATTEMPTS_MAX
    }

    /// Whether what is carried does not fit into one cut.
    fn is_too_large(&self) -> bool {
        self.ledger.carried() > self.setup.limits.blocks_max
    }

    fn due(&self) -> Due {
        let now = self.setup.clock.monotonic();
        if self.open.is_none() || self.devices.is_none() || !self.has_room() {
            Due::Nothing
        } else if self.is_too_large() {
            Due::Part
        } else if now >= self.next_cut || !self.wanted.is_empty() {
            Due::Cut
        } else {
            Due::Nothing
        }
    }

    fn act(&mut self) {
        let now = self.setup.clock.monotonic();
        if self.devices.is_none() && now >= self.reopen_at {
            self.reopen();
        }
        let done = match self.due() {
            Due::Part => self.part(),
            Due::Cut => self.cut(),
            Due::Nothing => Ok(()),
        };
        if let Err(error) = done {
            self.fail(format!("{:#}", anyhow::Error::new(error)));
        }
        if self.retain_at.is_some_and(|at| at <= self.setup.clock.monotonic()) {
            self.retain();
        }
    }

    /// Captures some of what is carried, while writes go on: durable at the target, no recovery point.
    fn part(&mut self) -> Result<(), CutError> {
        let Some(devices) = &mut self.devices else { return Ok(()) };
        if !self.primed {
            // What was marked so far is read now; a tracker that compares takes its first look. Without it the volume
            // would be sent once in parts and once more by the first cut.
            self.primed = true;
            match devices.tracker.flip() {
                Ok(marked) => self.ledger.carry_more(&marked),
                Err(TrackerError::Stragglers(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let capture = cut::read_part(&mut *devices.reader, &self.ledger.carry, PART_BLOCKS)?;
        if is_all_unreadable(&capture) {
            self.fail("every block read came back with an error".into());
            return Ok(());
        }
        self.send(capture, End::Part);
        Ok(())
    }

    fn cut(&mut self) -> Result<(), CutError> {
        let now = self.setup.clock.monotonic();
        // From the last one that was due, so that the interval does not grow by the cut's own time.
        let due = self.next_cut + self.setup.interval;
        self.next_cut = if due > now { due } else { now + self.setup.interval };
        let Some(devices) = &mut self.devices else { return Ok(()) };
        let clock = Arc::clone(&self.setup.clock);
        let cut =
            cut::cut(&mut *devices.tracker, &mut *devices.reader, &*clock, &mut self.ledger.carry, &self.setup.limits)?;
        self.cuts.count(&cut);
        match cut {
            Cut::Captured(capture) if is_all_unreadable(&capture) => {
                let blocks: Vec<_> = capture.volumes.iter().map(|volume| volume.blocks().clone()).collect();
                self.ledger.carry_more(&blocks);
                self.fail("every changed block came back with an error".into());
            }
            Cut::Captured(capture) => self.captured(capture),
            Cut::Unchanged { as_of } => self.unchanged(as_of),
            Cut::TooLarge => tracing::debug!(group = self.setup.facts.name, "too much for one cut: parts first"),
            Cut::NotValidated => {
                self.failed_cuts += 1;
                tracing::debug!(group = self.setup.facts.name, failed = self.failed_cuts, "the cut did not validate");
            }
        }
        Ok(())
    }

    fn captured(&mut self, capture: Capture) {
        let Some(open) = self.open else { return };
        self.failed_cuts = 0;
        self.unchanged_as_of = None;
        self.last_cut = Some(CutStatus {
            time: capture.cut_time,
            rounds: capture.meters.cut_rounds,
            cut_us: capture.meters.cut_us,
            blocks: capture.meters.dirty_blocks,
        });
        let request = self.wanted.pop_front();
        let label = request.as_ref().and_then(|request| request.label.clone());
        let first = self.ledger.unacked_epochs() == 0;
        let draft = CommitDraft {
            class: Class::Crash,
            cut_time: capture.cut_time,
            meters: capture.meters,
            first_epoch: open.next_epoch,
            after_rollback_to: open.after_rollback_to.filter(|_| first),
            label: label.clone(),
        };
        let point = PointReply { epoch: open.next_epoch, time: capture.cut_time, label, acked: false };
        self.captured_epoch = Some(open.next_epoch);
        self.send(capture, End::Commit(draft));
        self.open = Some(Open { next_epoch: Epoch(open.next_epoch.0 + 1), ..open });
        if let Some(request) = request {
            if request.wait {
                self.awaited.push((point, request.reply));
            } else {
                // Whoever asked may have gone; the point stands all the same.
                let _ = request.reply.send(Reply::Point(point));
            }
        }
    }

    /// Nothing has changed. A point that was asked for is made all the same, so that its name has something to stand on.
    fn unchanged(&mut self, as_of: Timestamp) {
        let Some(open) = self.open else { return };
        self.failed_cuts = 0;
        if !self.wanted.is_empty() || !open.has_point && self.ledger.unacked_epochs() == 0 {
            let mut capture = Capture::new(self.setup.facts.volumes.len());
            capture.cut_time = as_of;
            capture.meters.cut_rounds = 1;
            return self.captured(capture);
        }
        let Some(head) = self.memo.head().filter(|_| self.ledger.is_acked()) else { return };
        self.put_off = None;
        self.unchanged_as_of = Some(as_of);
        let now = self.setup.clock.monotonic();
        if self.told_unchanged.is_none_or(|told| now >= told + UNCHANGED_EVERY) {
            self.told_unchanged = Some(now);
            self.link.unchanged(head.epoch, as_of);
        }
    }

    /// Seals a capture under a fresh attempt and hands it to the encoder.
    fn send(&mut self, capture: Capture, end: End) {
        let Some(open) = self.open else { return };
        let attempt = AttemptId(random::array(&*self.setup.random));
        let group = self.setup.facts.group;
        let sealer = Sealer::new(group, open.next_epoch, open.generation, attempt, &self.setup.data_key);
        let blocks = capture.volumes.iter().map(|volume| volume.blocks().clone()).collect();
        self.ledger.capture(Captured {
            epoch: open.next_epoch,
            attempt,
            is_part: end == End::Part,
            cut_time: capture.cut_time,
            blocks,
            bytes: to_bytes(capture.meters.content_blocks),
        });
        self.encoding.submit(Job { capture, sealer: Arc::new(sealer), end });
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Link(event) => self.event(event),
            Input::Encoded(outgoing) => {
                self.ledger.encoded(outgoing.attempt, outgoing.bytes);
                self.link.submit(outgoing);
            }
            Input::Point(request) => match self.trouble.as_ref().or(self.refused.as_ref()) {
                Some(reason) => refuse(request, reason),
                None if self.open.is_none() && !request.wait => {
                    refuse(request, "the target has not been reached yet");
                }
                None => {
                    // Whoever asked earlier may have stopped waiting: requests do not pile up.
                    self.wanted.retain(|request| !request.reply.is_closed());
                    self.awaited.retain(|(_, reply)| !reply.is_closed());
                    self.wanted.push_back(request);
                }
            },
            Input::Stop => {}
        }
    }

    fn event(&mut self, event: SourceEvent) {
        match event {
            SourceEvent::Opened { verdict, generation, head, parts } => {
                self.opened(verdict, generation, head, parts);
            }
            SourceEvent::Committing(head) => {
                self.memo.committing(head);
                if self.keep_memo() {
                    self.link.proceed(head);
                }
            }
            SourceEvent::Acked(head) => self.acked(head),
            SourceEvent::PartAcked { attempt, .. } => {
                self.put_off = None;
                if let Some(part) = self.ledger.part_acked(attempt) {
                    self.acked_bytes += part.bytes;
                    self.retain_soon();
                }
            }
            SourceEvent::Busy { reason, retry_after_ms } => {
                let text = format!("the target takes nothing for now: {reason}");
                if self.put_off.as_ref() != Some(&text) {
                    tracing::warn!(group = self.setup.facts.name, retry_after_ms, reason = text, "pushed back");
                }
                self.refused = Some(text.clone());
                self.put_off = Some(text);
            }
            SourceEvent::Refused(reason) => {
                let text = refusal(&reason);
                if self.refused.as_ref() != Some(&text) {
                    tracing::error!(group = self.setup.facts.name, reason = text, "the target refuses the group");
                }
                self.wanted.drain(..).for_each(|request| refuse(request, &text));
                self.refused = Some(text);
            }
            SourceEvent::Voided => {
                tracing::info!(group = self.setup.facts.name, "what was under way is void and captured again");
                self.ledger.void();
                self.refuse_awaited("the point was voided by a new generation; ask again");
            }
        }
    }

    fn opened(
        &mut self,
        verdict: Verdict,
        generation: Generation,
        head: Option<Head>,
        parts: Option<(Epoch, PartChain)>,
    ) {
        self.refused = None;
        self.opened_at.get_or_insert(self.setup.clock.monotonic());
        let is_new = self.memo.generation != Some(generation);
        if !is_new && self.open.is_some() {
            return;
        }
        let newest = self.memo.head().map(|head| head.epoch).max(head.map(|head| head.epoch));
        let after = Epoch(newest.unwrap_or_default().0 + 1);
        if is_new {
            tracing::info!(group = self.setup.facts.name, %generation, ?verdict, "a new generation: everything is sent");
            self.ledger.carry_everything();
            self.rescan = match verdict {
                Verdict::New => None,
                Verdict::Continue => Some("a new generation".into()),
                Verdict::Rollback { .. } => Some("this source went on from an older point".into()),
                Verdict::TargetBehind => Some("the target lost points it had acked".into()),
            };
            self.retain();
        }
        let opened = GroupOpened {
            group: self.setup.facts.group,
            generation,
            verdict,
            head: head.map(|head| (head, AttemptId::default())),
            parts,
            resume: None,
        };
        self.memo.opened(&opened);
        self.keep_memo();
        let before = self.open.and_then(|open| open.after_rollback_to);
        let after_rollback_to = match verdict {
            Verdict::Rollback { to: Some(epoch) } if is_new => Some(epoch),
            _ => before,
        };
        let next_epoch = parts.map_or(after, |(epoch, _)| epoch);
        self.open = Some(Open { generation, next_epoch, after_rollback_to, has_point: head.is_some() && !is_new });
        self.next_cut = self.setup.clock.monotonic();
    }

    fn acked(&mut self, head: Head) {
        self.put_off = None;
        self.memo.acked(head);
        self.keep_memo();
        if let Some(point) = self.ledger.acked(head.epoch) {
            self.acked_time = Some(point.cut_time);
            self.acked_bytes += point.bytes;
            self.rescan = None;
        }
        if let Some(open) = &mut self.open {
            open.after_rollback_to = None;
            open.has_point = true;
        }
        if self.ledger.is_acked() {
            self.retain();
        } else {
            self.retain_soon();
        }
        let (done, waiting) =
            std::mem::take(&mut self.awaited).into_iter().partition(|(point, _)| point.epoch <= head.epoch);
        self.awaited = waiting;
        let done: Vec<(PointReply, oneshot::Sender<Reply>)> = done;
        for (point, reply) in done {
            let _ = reply.send(Reply::Point(PointReply { acked: true, ..point }));
        }
    }

    /// Stores the memo; `false` where it could not be.
    fn keep_memo(&mut self) -> bool {
        let Some(devices) = &mut self.devices else { return false };
        match devices.tracker.set_memo(&self.memo.encode()) {
            Ok(()) => true,
            Err(error) => {
                self.fail(format!("{:#}", anyhow::Error::new(error)));
                false
            }
        }
    }

    fn retain_soon(&mut self) {
        self.retain_at.get_or_insert(self.setup.clock.monotonic() + RETAIN_EVERY);
    }

    /// Lets the tracker forget what is acked.
    fn retain(&mut self) {
        self.retain_at = None;
        let Some(devices) = &mut self.devices else { return };
        if let Err(error) = devices.tracker.retain_unacked(&self.ledger.unacked()) {
            self.fail(format!("{:#}", anyhow::Error::new(error)));
        }
    }

    /// The volumes cannot be captured: no points until they can be opened again.
    fn fail(&mut self, reason: String) {
        if self.trouble.as_ref() != Some(&reason) {
            tracing::error!(group = self.setup.facts.name, reason, "no recovery points: the volumes failed");
        }
        self.wanted.drain(..).for_each(|request| refuse(request, &reason));
        self.trouble = Some(reason);
        self.devices = None;
        self.reopen_at = self.setup.clock.monotonic() + REOPEN_EVERY;
    }

    fn reopen(&mut self) {
        match (self.setup.opener)() {
            Ok(devices) => {
                tracing::info!(group = self.setup.facts.name, "the volumes are back");
                self.take_up(devices);
                self.retain();
                // Commits that were held back because their memo could not be stored are told again by the session only
                // on a new line; storing what is known now lets them go.
                if self.keep_memo() {
                    self.memo.sent.clone().into_iter().for_each(|head| self.link.proceed(head));
                }
            }
            Err(reason) => self.fail(reason),
        }
    }

    fn refuse_awaited(&mut self, reason: &str) {
        for (_, reply) in self.awaited.drain(..) {
            let _ = reply.send(Reply::Failed { message: reason.to_owned(), hint: None });
        }
    }

    fn finish(mut self) {
        self.retain();
        self.refuse_awaited("the agent is stopping");
        self.wanted.drain(..).for_each(|request| refuse(request, "the agent is stopping"));
    }

    fn publish(&self) {
        let (state, reason) = self.state();
        let now = Timestamp(self.setup.clock.wall_ms());
        let mut status = lock(&self.setup.status);
        status.state = state;
        status.reason = reason;
        status.captured_epoch = self.captured_epoch;
        status.sent_epoch = self.memo.sent.first().or(self.memo.acked.first()).map(|head| head.epoch);
        status.acked_epoch = self.memo.head().map(|head| head.epoch);
        status.acked_time = self.acked_time;
        status.unchanged_as_of = self.unchanged_as_of;
        let held = self.acked_time.max(self.unchanged_as_of);
        status.lag_ms = held.map(|time| now.0.saturating_sub(time.0).max(0) as u64);
        status.dirty_bytes = to_bytes(self.ledger.carried());
        status.unacked_epochs = self.ledger.unacked_epochs();
        status.unacked_bytes = self.ledger.unacked_bytes();
        status.acked_bytes = self.acked_bytes;
        status.estimate_s = self.estimate_s();
        status.last_cut = self.last_cut;
        status.failed_cuts = self.failed_cuts;
        status.cuts_tried = self.cuts.tried;
        status.cuts_validated = self.cuts.validated;
        status.cuts_unchanged = self.cuts.unchanged;
        if let Some(devices) = &self.devices {
            status.tracker = devices.tracker.report().into();
        }
    }

    /// At the speed since the agent's first connection.
    fn estimate_s(&self) -> Option<u64> {
        let since = self.setup.clock.monotonic().saturating_sub(self.opened_at?).as_secs_f64();
        let left = to_bytes(self.ledger.carried()) + self.ledger.unacked_bytes();
        (left > 0 && self.acked_bytes > 0).then(|| (left as f64 * since / self.acked_bytes as f64).ceil() as u64)
    }

    fn state(&self) -> (GroupPhase, Option<String>) {
        let many_failed = self.failed_cuts >= FAILED_CUTS_MAX;
        let has_point = self.open.is_some_and(|open| open.has_point);
        if let Some(reason) = self.trouble.as_ref().or(self.refused.as_ref()) {
            (GroupPhase::Stalled, Some(reason.clone()))
        } else if self.open.is_none() || !self.link.is_connected() {
            (GroupPhase::Disconnected, None)
        } else if let Some(reason) = &self.put_off {
            (GroupPhase::Stalled, Some(reason.clone()))
        } else if many_failed {
            (GroupPhase::Stalled, Some(format!("{} cuts in a row did not validate", self.failed_cuts)))
        } else if let Some(reason) = &self.rescan {
            (GroupPhase::Rescan, Some(reason.clone()))
        } else if !has_point {
            (GroupPhase::Seeding, None)
        } else if !self.has_room() || self.is_too_large() {
            (GroupPhase::Backlog, None)
        } else {
            (GroupPhase::Continuous, None)
        }
    }
}

fn is_all_unreadable(capture: &Capture) -> bool {
    let meters = &capture.meters;
    meters.dirty_blocks > 0 && meters.unreadable_blocks == meters.dirty_blocks
}

fn refuse(request: PointRequest, reason: &str) {
    let hint = Some("cdp-source status says how the group stands".to_owned());
    let _ = request.reply.send(Reply::Failed { message: format!("no recovery point: {reason}"), hint });
}

fn refusal(reason: &RefusalReason) -> String {
    match reason {
        RefusalReason::Fork => {
            "this source's history is a fork of the target's: frozen until `cdp-target resolve`".into()
        }
        RefusalReason::Fenced => "another source has taken the group over".into(),
        RefusalReason::InUse => "another connection holds the group".into(),
        RefusalReason::NameTaken => "the office has another group of this name".into(),
        RefusalReason::Failed(reason) => format!("the target cannot serve the group: {reason}"),
    }
}

fn lock(status: &Mutex<GroupStatus>) -> std::sync::MutexGuard<'_, GroupStatus> {
    status.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "group_tests.rs"]
mod tests;
