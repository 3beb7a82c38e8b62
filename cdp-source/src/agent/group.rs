//! One group's capture thread: when to cut, what becomes of a capture, and what the target's answers mean for the tracker.
//!
//! Owns tracker and reader, the account of blocks (`ledger`) and the group's memo. Invariants:
//! * a block leaves the tracker's `unacked` only after the target has acked an attempt that holds it;
//! * the memo names a commit before the commit leaves, and a new generation only once all it voids is in `unacked`;
//! * nothing is written for an epoch but the tracker's own pinned memory, so that an idle volume stays idle.
//!
//! Does not know the line: a `Link` takes attempts and answers with events. `capturing` is what it does of itself, `auditing`
//! what it finds out besides, `metering` what it counts, `answers` what it does when it is told something, `spooling` what becomes of what
//! the line does not take, `layouts` what its disks are, `learning` how digests that are lost come back, `hooking` what is done around a point that is asked for, `opening` how it begins, `volumes` how it gets over devices
//! that fail, `leaving` what it leaves behind, `standing` what others see.

mod answers;
mod auditing;
mod capturing;
mod hooking;
mod layouts;
mod learning;
mod leaving;
mod metering;
mod opening;
mod setup;
mod spooling;
mod standing;
#[cfg(feature = "sim")]
pub mod steps;
mod volumes;

pub use layouts::DiskLayouts;
pub use opening::FIRST_TRIES;
pub use setup::{
    Connect, Devices, Ending, GroupSetup, Input, IsRestoring, KeptMemo, Learner, Link, Opener, PointRequest,
};

use super::encoding::{Encoded, Encoding};
use super::ledger::Ledger;
use super::status::{AuditStatus, CutStatus, GroupStatus, HooksStatus};
use crate::audit::Audit;
use crate::audit::line::LineAudit;
use crate::control::{PointReply, Reply};
use crate::cut::HeldInstant;
use capturing::Cuts;
use cdp_protocol::session::memo::Memo;
use cdp_protocol::units::{BLOCK_BYTES, Epoch, Generation, Timestamp, VolumeSlot, blocks_in};
use cdp_seams::pulse;
use hooking::Hooked;
use learning::learn;
use metering::Metering;
use opening::first_open;
use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// Bytes captured and not acked above which nothing more is captured, unless the spool takes it. With the capture being read and the one being
/// encoded (32 MiB each at most by default) it bounds the agent's memory to about 100 MiB.
const UNACKED_BYTES_MAX: u64 = 32 << 20;
/// Attempts captured and not acked above which nothing more is captured, unless the spool takes it. Below what the sender takes without waiting: this
/// thread must never wait for the line, or nobody would let commits go.
const ATTEMPTS_MAX: usize = 16;
/// Epochs captured and not acked above which no cut is made, unless the spool takes it: `session::SENT_MAX` commits may be under way.
const UNACKED_EPOCHS_MAX: u64 = 8;
/// Blocks of a part: 8 MiB, so that four are under way at a time.
const PART_BLOCKS: u64 = (8 << 20) / BLOCK_BYTES as u64;
/// How often `unacked` is brought up to date while parts are being acked; each time its whole bitmap is written.
const RETAIN_EVERY: Duration = Duration::from_secs(1);
/// How often the target is told that nothing has changed: 2 kB a minute are all an idle group may take.
const UNCHANGED_EVERY: Duration = Duration::from_secs(20);
/// How soon volumes that failed are tried again.
const REOPEN_EVERY: Duration = Duration::from_secs(5);
/// How long the thread sleeps where nothing is due: so often the status is brought up to date.
const IDLE_WAIT: Duration = Duration::from_secs(1);
/// How often the target is asked again what it was sent: the question, or some of the answer, may have gone with a line.
const ASK_EVERY: Duration = Duration::from_secs(10);
/// How often it is looked whether a restore is over, which may have ended without a word.
const RESTORING_EVERY: Duration = Duration::from_secs(5);
/// How often blocks that could not be read are tried again.
const UNREADABLE_EVERY: Duration = Duration::from_secs(60);
/// Cuts in a row that do not validate after which file systems are frozen for the next, where that is allowed.
const FREEZE_AFTER: u64 = 3;
/// Cuts in a row that do not validate after which the group is called stalled.
const FAILED_CUTS_MAX: u64 = 10;

/// Runs a group until `Input::Stop`, or until nobody can say so any more. `sender` is the other end of `inputs`.
pub fn run(mut setup: GroupSetup, inputs: &Receiver<Input>, sender: Sender<Input>) {
    let _entered = pulse::enter(&format!("group {}", setup.facts.name));
    let Some((devices, memo, is_kept)) = first_open(&mut setup, inputs) else { return };
    // Where nobody waits for it, it does not matter.
    let _ = setup.opened.take().map(|opened| opened.send(()));
    if !learn(&mut setup, &memo, inputs) {
        return;
    }
    let mut group = Group::new(setup, devices, (memo, is_kept), sender);
    let ending = loop {
        pulse::beat();
        match inputs.recv_timeout(group.wait()) {
            Ok(Input::Stop(ending)) => break ending,
            Err(RecvTimeoutError::Disconnected) => break Ending::Reload,
            Ok(input) => group.take(input),
            Err(RecvTimeoutError::Timeout) => {}
        }
        loop {
            match inputs.try_recv() {
                Ok(Input::Stop(ending)) => return group.finish(ending),
                Ok(input) => group.take(input),
                Err(_) => break,
            }
        }
        group.act();
        group.publish();
    };
    group.finish(ending);
}

/// The thread's state.
struct Group {
    setup: GroupSetup,
    devices: Option<Devices>,
    link: Box<dyn Link>,
    /// The volumes' places in the group.
    slots: Vec<VolumeSlot>,
    encoding: Encoding,
    ledger: Ledger,
    memo: Memo,
    /// Set once the target has taken the group up, or what an agent before left in the spool goes on.
    open: Option<Open>,
    /// Whether the target has taken the group up.
    is_taken_up: bool,
    /// Why nothing is written to the spool, when that was told last.
    spool_failure: Option<String>,
    wanted: VecDeque<PointRequest>,
    /// A point that is made with hooks around it.
    hooked: Option<Hooked>,
    hooks: HooksStatus,
    /// When a point with hooks is due that nobody asks for.
    hooks_at: Duration,
    /// The other end of what is taken: for hooks, which run on a thread of their own.
    inputs: Sender<Input>,
    freezes: u64,
    freeze_failure: Option<String>,
    /// Points that are waited for, by epoch.
    awaited: Vec<(PointReply, oneshot::Sender<Reply>)>,
    /// Why no points are made.
    trouble: Option<String>,
    /// Why the target takes nothing.
    refused: Option<String>,
    /// Whether it only takes nothing for now: what is captured meanwhile waits.
    is_put_off: bool,
    /// Which volume is being restored: until that is over no cut is made.
    restoring: Option<String>,
    /// When that is looked at again.
    restoring_at: Duration,
    /// Who waits for the word that no points are made.
    told_held: Vec<oneshot::Sender<Option<String>>>,
    /// Why the target took nothing when it was asked last. It stands until something is acked: a target that takes the
    /// group up again may have no more room than before.
    put_off: Option<String>,
    /// Why everything is captured again.
    rescan: Option<String>,
    /// Whether the tracker was flipped before parts are read.
    primed: bool,
    /// What parts are read for: the next point may be of it.
    instant: Option<HeldInstant>,
    /// Whether the memo was kept beside the tracker's, and so may be older than what the target has of us.
    memo_is_kept: bool,
    next_cut: Duration,
    /// When blocks that could not be read are tried again.
    unreadable_at: Duration,
    /// When the target is asked again what it was sent.
    ask_at: Duration,
    reopen_at: Duration,
    retain_at: Option<Duration>,
    told_unchanged: Option<Duration>,
    failed_cuts: u64,
    /// What the tracker had captured again when that was told last, and how often it had made everything dirty.
    recaptured_blocks: u64,
    rescans: u64,
    cuts: Cuts,
    captured_epoch: Option<Epoch>,
    acked_time: Option<Timestamp>,
    unchanged_as_of: Option<Timestamp>,
    acked_bytes: u64,
    /// Bytes of blocks that were marked and not sent, since the target had them.
    unchanged_bytes: u64,
    audit: Audit,
    line_audit: Option<LineAudit>,
    audit_counts: AuditStatus,
    metering: Metering,
    /// Since when there is something left to be sent, on a line, and how many blocks were done then.
    behind_since: Option<(Duration, u64)>,
    last_cut: Option<CutStatus>,
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
    fn new(mut setup: GroupSetup, devices: Devices, (memo, memo_is_kept): (Memo, bool), sender: Sender<Input>) -> Self {
        let volume_blocks = setup.facts.volumes.iter().map(|volume| blocks_in(volume.size_bytes)).collect();
        let slots: Vec<VolumeSlot> = setup.facts.volumes.iter().map(|volume| volume.slot).collect();
        let connect = std::mem::replace(&mut setup.connect, Box::new(|_| unreachable!("connected once")));
        let link = connect(memo.clone());
        let inputs = sender.clone();
        let encoding =
            Encoding::start(Arc::clone(&setup.encoder), slots.clone(), setup.begin.clone(), move |encoded| {
                // Without a group there is nobody to send it for.
                let _ = sender.send(Input::Encoded(encoded));
            });
        let metering = Metering::new(slots.clone());
        let mut group = Self {
            hooked: None,
            hooks: HooksStatus::default(),
            hooks_at: Duration::ZERO,
            inputs,
            freezes: 0,
            freeze_failure: None,
            ledger: Ledger::new(volume_blocks),
            link,
            slots,
            encoding,
            devices: None,
            memo,
            open: None,
            is_taken_up: false,
            spool_failure: None,
            wanted: VecDeque::new(),
            awaited: Vec::new(),
            trouble: None,
            refused: None,
            is_put_off: false,
            restoring: (setup.restoring)(),
            restoring_at: Duration::ZERO,
            told_held: Vec::new(),
            put_off: None,
            rescan: None,
            primed: false,
            instant: None,
            memo_is_kept,
            next_cut: Duration::ZERO,
            unreadable_at: Duration::ZERO,
            ask_at: Duration::ZERO,
            reopen_at: Duration::ZERO,
            retain_at: None,
            told_unchanged: None,
            failed_cuts: 0,
            recaptured_blocks: 0,
            rescans: 0,
            cuts: Cuts::default(),
            captured_epoch: None,
            acked_time: None,
            unchanged_as_of: None,
            acked_bytes: 0,
            unchanged_bytes: 0,
            audit: Audit::default(),
            line_audit: None,
            audit_counts: AuditStatus::default(),
            metering,
            behind_since: None,
            last_cut: None,
            setup,
        };
        group.take_up_spool();
        group.take_up(devices);
        group.publish();
        group
    }

    /// How long nothing is due.
    fn wait(&self) -> Duration {
        let now = self.setup.clock.monotonic();
        if self.devices.is_none() {
            return self.reopen_at.saturating_sub(now).min(IDLE_WAIT);
        }
        let retain = self.retain_at.map_or(IDLE_WAIT, |at| at.saturating_sub(now));
        let restoring = self.restoring.as_ref().map_or(IDLE_WAIT, |_| self.restoring_at.saturating_sub(now));
        let cut = match self.due() {
            Due::Part | Due::Cut => Duration::ZERO,
            Due::Nothing if self.is_merge_due() => Duration::ZERO,
            Due::Nothing if self.open.is_some() && self.may_capture() && !self.is_too_large() => {
                self.next_cut.saturating_sub(now)
            }
            Due::Nothing => IDLE_WAIT,
        };
        cut.min(retain).min(restoring).min(IDLE_WAIT)
    }

    /// Whether there is room for one more capture, in memory or in the spool.
    fn has_room(&self) -> bool {
        // Until the target has told what it was sent, nothing could be said to be unchanged; while it cannot be asked, all is captured.
        let can_tell = self.link.is_connected() && !self.is_put_off || !self.setup.spool.is_on();
        (self.refused.is_none() || self.is_put_off)
            && (self.setup.digests.asking().is_none() || !can_tell)
            && (self.fits_in_memory() || self.setup.spool.has_room(self.ledger.unacked_epochs()))
    }

    fn fits_in_memory(&self) -> bool {
        self.ledger.unacked_bytes() < UNACKED_BYTES_MAX
            && self.ledger.unacked_epochs() < UNACKED_EPOCHS_MAX
            && self.ledger.attempts() < ATTEMPTS_MAX
    }

    /// Whether anything may be captured now: no volume is half restored, what is to be left out is known, and there is room.
    fn may_capture(&self) -> bool {
        self.restoring.is_none()
            && self.has_room()
            && self.devices.as_ref().is_some_and(|devices| !devices.exclusion.is_pending())
    }

    /// Whether what is carried does not fit into one cut.
    fn is_too_large(&self) -> bool {
        self.ledger.carried() > self.setup.limits.blocks_max
    }

    fn due(&self) -> Due {
        let now = self.setup.clock.monotonic();
        if self.open.is_none() || !self.may_capture() {
            Due::Nothing
        } else if self.is_too_large() {
            if self.may_take_part() { Due::Part } else { Due::Nothing }
        } else if now >= self.next_cut || self.is_point_due() || self.instant.is_some() {
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
        if now >= self.unreadable_at {
            self.unreadable_at = now + UNREADABLE_EVERY;
            self.ledger.carry_unreadable();
        }
        if self.restoring.is_some() && now >= self.restoring_at {
            self.look_at_restoring();
        }
        self.note_progress(now);
        self.want_in_time(now);
        self.start_hooks();
        let done = match self.due() {
            Due::Part => self.part(),
            Due::Cut => self.cut(),
            Due::Nothing => Ok(()),
        };
        if let Err(error) = done {
            self.fail(format!("{:#}", anyhow::Error::new(error)));
        }
        self.let_go_in_time();
        self.tend_spool();
        self.tell_held();
        if self.retain_at.is_some_and(|at| at <= self.setup.clock.monotonic()) {
            self.retain();
        }
        if let Some(since) = self.setup.digests.asking().filter(|_| now >= self.ask_at) {
            self.ask_at = now + ASK_EVERY;
            self.link.list_changes(since);
        }
        self.audit_over_line(now);
        self.setup.digests.write_if_due(now);
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Link(event) => self.event(event),
            Input::Encoded(mut encoded) => {
                self.metering.encoded(&mut encoded);
                let Encoded { outgoing, digests, .. } = encoded;
                // One that was voided meanwhile is nobody's any more.
                if let Some(blocks) = self.ledger.blocks_of(outgoing.attempt) {
                    self.setup.digests.encoded(outgoing.attempt, digests);
                    self.ledger.encoded(outgoing.attempt, outgoing.bytes);
                    self.setup.spool.push(outgoing, blocks);
                    self.feed();
                }
            }
            Input::Restoring(reply) => {
                self.look_at_restoring();
                self.told_held.push(reply);
            }
            Input::Point(request) => match self.no_points_because() {
                // What is put off can be made, but not waited for.
                Some(reason) if request.wait || !self.is_only_put_off() => refuse(request, reason),
                _ if !self.is_taken_up && !request.wait => {
                    refuse(request, "the target has not been reached yet");
                }
                _ => {
                    // Whoever asked earlier may have stopped waiting: requests do not pile up.
                    self.wanted.retain(|request| !request.reply.is_closed());
                    self.awaited.retain(|(_, reply)| !reply.is_closed());
                    // The point is to hold what was written before it was asked for.
                    self.instant = None;
                    self.wanted.push_back(request);
                }
            },
            Input::Hook(event) => self.hook(event),
            Input::Stop(_) => {}
        }
    }

    /// Whether a volume is being restored, as it stands in the group's folder now.
    fn look_at_restoring(&mut self) {
        let restoring = (self.setup.restoring)();
        if restoring != self.restoring {
            tracing::info!(group = self.setup.facts.name, restoring, "looked whether a volume is being restored");
        }
        self.restoring = restoring;
        self.restoring_at = self.setup.clock.monotonic() + RESTORING_EVERY;
        if let Some(reason) = self.restoring.clone() {
            self.refuse_wanted(&reason);
        }
    }

    /// Why no points are made, where an operator has to do something about it.
    fn no_points_because(&self) -> Option<&String> {
        self.restoring.as_ref().or(self.trouble.as_ref()).or(self.refused.as_ref())
    }

    const fn is_only_put_off(&self) -> bool {
        self.is_put_off && self.trouble.is_none() && self.restoring.is_none()
    }

    fn finish(mut self, ending: Ending) {
        self.retain();
        self.setup.digests.write();
        self.setup.spool.leave(&self.memo);
        self.setup.kept_memo.keep(&self.memo);
        if ending == Ending::Agent {
            self.leave();
        }
        self.refuse_awaited("the agent is stopping");
        self.refuse_wanted("the agent is stopping");
    }
}

fn refuse(request: PointRequest, reason: &str) {
    let hint = Some("cdp-source status says how the group stands".to_owned());
    let _ = request.reply.send(Reply::Failed { message: format!("no recovery point: {reason}"), hint });
}

fn lock(status: &Mutex<GroupStatus>) -> std::sync::MutexGuard<'_, GroupStatus> {
    status.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
