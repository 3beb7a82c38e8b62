//! What is overwritten is kept first, and the agent holds its points meanwhile.
//!
//! In place: a running agent makes a point of what is there, which outlives it or is acked before anything is overwritten, and no other until
//! the restore is over; where none runs, nothing may be overwritten that no point has, and none is started meanwhile. The marker is there before the first byte is written, so that whoever
//! looks knows that the volume is neither old nor new. `--discard-current` says that what is there may be lost.

use crate::cli::RestoreArgs;
use crate::cli::failure::UserError;
use crate::cli::show;
use crate::control::{self, ControlError, Reply, Request};
use crate::probe::Probe;
use crate::restore::Plan;
use crate::restore::marker::{self, Restoring};
use crate::state::{Lock, StateError, StateFolder};
use anyhow::{Result, bail};
use cdp_protocol::units::{BLOCK_BYTES, Epoch, Timestamp, VolumeSlot};

/// For the agent to make a point, in milliseconds.
const POINT_WAIT_MS: u64 = 120_000;

/// What is done around a restore.
pub(super) struct Keeping<'a> {
    args: &'a RestoreArgs,
    volume: &'a str,
    /// Held where no agent runs, so that none is started.
    agent: Option<Lock>,
    begun: Option<Restoring>,
    kept: Option<Epoch>,
    is_marked: bool,
}

impl<'a> Keeping<'a> {
    pub(super) fn new(
        state: &StateFolder,
        args: &'a RestoreArgs,
        volume: &'a str,
        begun: Option<Restoring>,
    ) -> Result<Self> {
        let agent = match state.lock_agent() {
            // Another device is nothing to the agent.
            Ok(_) if args.other_device().is_some() => None,
            Ok(lock) => Some(lock),
            Err(StateError::Locked { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let (kept, is_marked) = (begun.as_ref().and_then(|begun| begun.kept), begun.is_some());
        Ok(Self { args, volume, agent, begun, kept, is_marked })
    }

    /// Whether another device has to be empty: nothing was begun with, and the operator has not said that its content may be lost.
    pub(super) const fn overwrites_nothing(&self) -> bool {
        self.begun.is_none() && !self.args.discard_current
    }

    /// Another device with something on it is not overwritten unasked, unless it is what was begun with.
    pub(super) fn refuse_content(&self, probe: &Probe) -> Result<()> {
        let Some(content) = probe.content.filter(|_| self.overwrites_nothing()) else {
            return Ok(());
        };
        let error = UserError::new(format!("{} holds {content}", probe.device.display()));
        Err(error.hint("--discard-current overwrites it").into())
    }

    /// A point of which blocks are known to be lost is not begun with in place: what is there would be overwritten for less than the whole.
    pub(super) fn refuse_lost(&self, epoch: Epoch, plan: &Plan) -> Result<()> {
        let Some(first) = plan.lost.first().filter(|_| !self.args.accept_lost) else { return Ok(()) };
        let (blocks, reason) = (plan.lost_blocks(), &first.reason);
        let text = format!("{blocks} blocks of point {epoch} cannot be had ({reason}); {}", self.cut_off());
        let hint = "--at another point, whose blocks are whole; or --accept-lost, which leaves these as they are; --dry-run --json lists them";
        Err(UserError::new(text).hint(hint).into())
    }

    pub(super) fn marker(&self, slot: VolumeSlot, epoch: Epoch, now_ms: i64) -> Restoring {
        let to = self.args.other_device();
        let begun = self.begun.as_ref().map_or(Timestamp(now_ms), |begun| begun.begun);
        let mut marker = Restoring::new(self.volume, slot, to, (epoch, &self.args.at), begun);
        marker.is_disk = self.args.disk.is_some();
        marker.kept = self.kept;
        marker
    }

    /// Makes sure that what the plan overwrites may be overwritten, and that no point is made from here on.
    pub(super) fn keep(&mut self, state: &StateFolder, group: &str, plan: &Plan, mut marker: Restoring) -> Result<()> {
        let (was_marked, mut has_to_last) = (self.is_marked, None);
        if self.agent.is_some() {
            self.refuse_unkept(plan)?;
        } else if !self.is_held(state, group)? {
            self.kept = if self.args.discard_current { None } else { Some(point(state, group, marker.epoch)?) };
            marker.kept = self.kept;
            has_to_last = self.kept;
        }
        self.begin(state, group, &marker)?;
        if self.agent.is_some() {
            return Ok(());
        }
        let held = hold(state, group, &marker, has_to_last);
        if held.is_err() && !was_marked {
            // No byte was written.
            Restoring::remove(state, group)?;
            self.is_marked = false;
            // An agent that cannot be told looks again by itself.
            let _ = look_again(state, group);
        }
        held.map_err(|error| error.context(self.cut_off()))
    }

    /// The marker, before the first byte is written. What the last stop left of the tracking is not of this volume any more.
    pub(super) fn begin(&mut self, state: &StateFolder, group: &str, marker: &Restoring) -> Result<()> {
        if marker.holds_points() {
            marker::forget_saved(state, group)?;
        }
        marker.store(state, group)?;
        self.is_marked = true;
        Ok(())
    }

    /// It is over: points are made again.
    pub(super) fn end(&mut self, state: &StateFolder, group: &str) -> Result<()> {
        if self.is_marked {
            Restoring::remove(state, group)?;
            self.is_marked = false;
        }
        // Also where there was none: the command before may have ended between the two.
        match look_again(state, group) {
            Ok(_) => Ok(()),
            // One that ended meanwhile, or is just starting, reads what is there now.
            Err(error) if matches!(error.downcast_ref(), Some(ControlError::NotRunning(_))) => Ok(()),
            Err(error) => {
                Err(error.context("the volume is restored, but the agent was not told that it may make points again"))
            }
        }
    }

    /// The point that what was overwritten was kept as.
    pub(super) const fn kept(&self) -> Option<Epoch> {
        self.kept
    }

    /// What an error means for the volume.
    pub(super) fn cut_off(&self) -> String {
        if self.is_marked {
            "the restore is not over, and the volume neither old nor new: the same command goes on".to_owned()
        } else {
            "nothing was changed".to_owned()
        }
    }

    /// Whether a running agent holds its points already: then what is there is half restored, and nothing to keep.
    fn is_held(&self, state: &StateFolder, group: &str) -> Result<bool> {
        if self.begun.is_none() {
            return Ok(false);
        }
        // As it stood before this command: a marker that the agent was never told of has held nothing.
        match show::ask(state, &Request::Status)? {
            Reply::Status(status) => {
                Ok(status.groups.iter().any(|status| status.group == group && status.restoring.is_some()))
            }
            other => bail!("the agent answered status with {other:?}"),
        }
    }

    fn refuse_unkept(&self, plan: &Plan) -> Result<()> {
        if plan.unkept_blocks == 0 || self.args.discard_current {
            return Ok(());
        }
        let bytes = plan.unkept_blocks * BLOCK_BYTES as u64;
        let text =
            format!("{bytes} bytes that would be overwritten are not known to be in any point, and no agent runs");
        let hint = "start the agent, which makes a point of them first; or --discard-current";
        Err(UserError::new(text).hint(hint).into())
    }
}

/// Has the agent hold its points, and make sure that the one of what is there outlives it.
fn hold(state: &StateFolder, group: &str, marker: &Restoring, has_to_last: Option<Epoch>) -> Result<()> {
    let Some(word) = look_again(state, group)? else {
        bail!("the agent does not hold its points, although it was told to");
    };
    let Some(kept) = has_to_last else { return Ok(()) };
    let unkept = |reason: &str| {
        let error = UserError::new(format!("point {kept} of what is there could be lost yet: {reason}"));
        error.hint(
            "wait until the target has it, as cdp-source status shows; or --discard-current, which does without it",
        )
    };
    if word != marker.word(group) {
        return Err(unkept(&word).into());
    }
    // Not by an agent that was started since, and knows nothing of it.
    let Reply::Status(status) = show::ask(state, &Request::Status)? else {
        bail!("the agent does not tell its status")
    };
    let has = |epoch: Option<Epoch>| epoch >= Some(kept);
    let of_group = status.groups.iter().find(|status| status.group == group);
    if of_group.is_some_and(|status| has(status.captured_epoch) || has(status.acked_epoch)) {
        return Ok(());
    }
    Err(unkept("the agent was started anew and does not have it").into())
}

/// Has the agent make a point of what is there. It is captured when this returns, and in the agent's memory.
fn point(state: &StateFolder, group: &str, to: Epoch) -> Result<Epoch> {
    let label = Some(format!("before-restore-to-{to}"));
    let request = Request::Point { group: group.to_owned(), label, wait: false, timeout_ms: Some(POINT_WAIT_MS) };
    match control::ask(state, &request)? {
        Reply::Point(point) => Ok(point.epoch),
        Reply::Failed { message, .. } => {
            let error = UserError::new(format!("what is there cannot be kept as a point first: {message}"));
            Err(error.hint("cdp-source status says more; --discard-current does without that point").into())
        }
        other => bail!("the agent answered the wish for a point with {other:?}"),
    }
}

/// Has the agent look whether a volume is being restored; gives why it makes no points, if so: the marker's word, or why not all points
/// that it has made would outlive it.
fn look_again(state: &StateFolder, group: &str) -> Result<Option<String>> {
    match show::ask(state, &Request::Restoring { group: group.to_owned() })? {
        Reply::Restoring { held } => Ok(held),
        other => bail!("the agent answered the word of a restore with {other:?}"),
    }
}
