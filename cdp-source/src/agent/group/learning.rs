//! Digests that are lost come back from the target, before the group goes on: of a machine that was put back from a point, where they were
//! left out, or whose state folder is damaged.
//!
//! Without them everything would be sent once more. Until they are there nothing is captured, and a line that is down is waited for: what
//! cannot be told apart cannot be left out. A group that never had a point has nothing to ask for.

use super::{GroupSetup, Input, lock, refuse};
use crate::agent::status::GroupPhase;
use crate::restore::learn::LearnError;
use cdp_protocol::session::memo::Memo;
use cdp_seams::pulse;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;

/// Between two tries.
const TRY_EVERY: Duration = Duration::from_secs(5);

/// Learns them, where they are lost; `false` where the group is to end.
pub(super) fn learn(setup: &mut GroupSetup, memo: &Memo, inputs: &Receiver<Input>) -> bool {
    let Some(mut learner) = setup.learner.take() else { return true };
    if *memo == Memo::default() || !setup.digests.are_new() {
        return true;
    }
    let group = setup.facts.name.clone();
    tracing::info!(group, "what the target holds of each block is not known here any more: it is asked");
    loop {
        let mut is_stopped = false;
        let learnt = learner(&mut |done, all| {
            pulse::beat();
            let percent = 100 * done / all.max(1);
            tell(setup, format!("the target is asked what it holds of each block: {percent} % done"));
            is_stopped |= take(setup, inputs);
            !is_stopped
        });
        match learnt {
            _ if is_stopped => return false,
            Ok(digests) => {
                setup.digests = digests;
                tracing::info!(group, "the target has told what it holds: only what differs will be sent");
                return true;
            }
            Err(LearnError::Refused(reason)) => {
                tracing::warn!(
                    group,
                    reason,
                    "the target does not tell what it holds of each block: all of it is sent"
                );
                return true;
            }
            Err(LearnError::Lost(reason)) => {
                tell(
                    setup,
                    format!("what the target holds of each block is not known here, and it cannot be asked: {reason}"),
                );
                if !wait(setup, inputs) {
                    return false;
                }
            }
        }
    }
}

fn tell(setup: &GroupSetup, reason: String) {
    let mut status = lock(&setup.status);
    (status.state, status.reason) = (GroupPhase::Rescan, Some(reason));
}

fn reason_of(setup: &GroupSetup) -> String {
    lock(&setup.status).reason.clone().unwrap_or_default()
}

/// Takes what has come in meanwhile; whether the group is to end.
fn take(setup: &GroupSetup, inputs: &Receiver<Input>) -> bool {
    loop {
        match inputs.try_recv() {
            Ok(Input::Stop(_)) | Err(TryRecvError::Disconnected) => return true,
            Ok(Input::Point(request)) => refuse(request, &reason_of(setup)),
            Ok(_) => {}
            Err(TryRecvError::Empty) => return false,
        }
    }
}

/// Waits for the next try; `false` where the group is to end.
fn wait(setup: &GroupSetup, inputs: &Receiver<Input>) -> bool {
    let deadline = setup.clock.monotonic() + TRY_EVERY;
    loop {
        pulse::beat();
        match inputs.recv_timeout(deadline.saturating_sub(setup.clock.monotonic())) {
            Ok(Input::Stop(_)) | Err(RecvTimeoutError::Disconnected) => return false,
            Ok(Input::Point(request)) => refuse(request, &reason_of(setup)),
            Ok(_) => {}
            Err(RecvTimeoutError::Timeout) => return true,
        }
    }
}
