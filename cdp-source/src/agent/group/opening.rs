//! How a group begins: its volumes opened for the first time, and what is remembered of it found.

use super::{Devices, GroupSetup, Input, REOPEN_EVERY, lock, refuse};
use crate::agent::status::GroupPhase;
use cdp_protocol::session::memo::Memo;
use cdp_seams::pulse;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// For so long after the group's start volumes that cannot be opened are tried again sooner. What an earlier boot left is taken up no later.
pub const FIRST_TRIES: Duration = Duration::from_secs(10);
const FIRST_TRIES_EVERY: Duration = Duration::from_millis(500);

/// Opens the volumes, now and then again until it works: without them nothing is known about the group's history. Also
/// tells whether the memo is the one kept beside the tracker's.
pub(super) fn first_open(setup: &mut GroupSetup, inputs: &Receiver<Input>) -> Option<(Devices, Memo, bool)> {
    let mut said = None;
    loop {
        match open_once(setup) {
            Ok(opened) => return Some(opened),
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
        let now = setup.clock.monotonic();
        // While the machine starts, devices come one after the other.
        let deadline = now + if now < FIRST_TRIES { FIRST_TRIES_EVERY } else { REOPEN_EVERY };
        loop {
            pulse::beat();
            let left = deadline.saturating_sub(setup.clock.monotonic());
            match inputs.recv_timeout(left) {
                Ok(Input::Stop(_)) | Err(RecvTimeoutError::Disconnected) => return None,
                Ok(Input::Point(request)) => refuse(request, said.as_deref().unwrap_or_default()),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => break,
            }
        }
    }
}

/// Opens the volumes and finds what is remembered of the group.
pub(super) fn open_once(setup: &mut GroupSetup) -> Result<(Devices, Memo, bool), String> {
    let devices = (setup.opener)()?;
    let memo = devices.tracker.memo().map_err(|error| format!("{:#}", anyhow::Error::new(error)))?;
    // A tracking that starts over has everything dirty, so an older memo is as good as none, and says more.
    let is_kept = memo.is_empty();
    if is_kept {
        return Ok((devices, setup.kept_memo.load()?, true));
    }
    let memo = Memo::decode(&memo).unwrap_or_else(|error| {
        tracing::error!(group = setup.facts.name, %error, "the memo is lost: everything is compared");
        Memo::default()
    });
    Ok((devices, memo, false))
}
