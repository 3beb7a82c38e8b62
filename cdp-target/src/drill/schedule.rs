//! Drills by the clock: which group is due, and the program that does it.
//!
//! A drill is run by a `cdp-target drill` of its own, one at a time and at the lowest priority: it works beside the server as an operator's does,
//! and whatever happens to it, the server goes on.

use super::report::last_finished;
use crate::authority::AuthorityError;
use crate::catalog::{Catalog, open_group};
use crate::restore::image::one_line;
use crate::store::{GroupPlace, Store};
use cdp_protocol::units::Timestamp;
use cdp_seams::clock::Clock;
use std::collections::HashMap;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// How often it is looked whether a drill is due.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// How long a group waits whose drill could not be done.
const RETRY_AFTER: Duration = Duration::from_secs(3600);
/// How often it is looked whether a drill is over, or the server.
const CHILD_LOOK: Duration = Duration::from_millis(500);
/// How long a drill may take to clean up when the server ends.
const CHILD_GRACE: Duration = Duration::from_secs(5);

/// Whether a group's last drill is so old that a person has to look: half as old again as it should ever be.
#[must_use]
pub fn is_overdue(interval_s: u64, since: Timestamp, now: Timestamp) -> bool {
    let most_ms = i64::try_from(interval_s.saturating_mul(1500)).unwrap_or(i64::MAX);
    interval_s > 0 && now.0.saturating_sub(since.0) > most_ms
}

/// What drills are run on and with.
pub struct Schedule<'a> {
    /// The store.
    pub store: &'a Store,
    /// Names the offices and their groups.
    pub catalog: &'a dyn Fn() -> Result<Catalog, AuthorityError>,
    /// Time.
    pub clock: &'a dyn Clock,
}

impl Schedule<'_> {
    /// Works until the other end of `ended` is dropped.
    pub fn run(&self, ended: &Receiver<()>) {
        let mut tried = HashMap::new();
        let interval = Duration::from_secs(self.store.config().drill_interval_s);
        while ended.recv_timeout(interval.min(LOOK_EVERY)) == Err(RecvTimeoutError::Timeout) {
            if let Err(error) = self.look(&mut tried, ended) {
                tracing::warn!(error = format!("{error:#}"), "no drill is done for now");
            }
        }
    }

    /// Does what is due, one group after the other.
    fn look(&self, tried: &mut HashMap<GroupPlace, Duration>, ended: &Receiver<()>) -> anyhow::Result<()> {
        for office in (self.catalog)()?.offices() {
            for place in self.store.groups(office.id)? {
                if !self.is_due(place, tried.get(&place).copied()) {
                    continue;
                }
                tried.insert(place, self.clock.monotonic());
                let group = match open_group(self.store, place) {
                    Ok(group) if group.view().newest()?.is_some() => group,
                    Ok(_) => continue,
                    Err(error) => {
                        tracing::error!(office = office.name, group = %place.group, error = one_line(&error), "no drill");
                        continue;
                    }
                };
                if !self.drill(&office.name, group.name(), ended)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn is_due(&self, place: GroupPlace, tried: Option<Duration>) -> bool {
        let interval_ms = i64::try_from(self.store.config().drill_interval_s.saturating_mul(1000)).unwrap_or(i64::MAX);
        let waits = tried.is_some_and(|at| self.clock.monotonic().saturating_sub(at) < RETRY_AFTER);
        let last = last_finished(self.store, place);
        let is_old = last.is_none_or(|last| self.clock.wall_ms().saturating_sub(last.0) >= interval_ms);
        is_old && (!waits || interval_ms < RETRY_AFTER.as_millis() as i64)
    }

    /// Runs a drill; `false` where the server ends meanwhile.
    fn drill(&self, office: &str, group: &str, ended: &Receiver<()>) -> anyhow::Result<bool> {
        tracing::info!(office, group, "drill begins");
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["drill", &format!("{office}/{group}"), "--scheduled", "--data"]).arg(self.store.folder());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        loop {
            if let Some(status) = child.try_wait()? {
                if status.success() {
                    tracing::info!(office, group, "drill passed");
                } else {
                    let code = status.code();
                    tracing::error!(
                        office,
                        group,
                        code,
                        "drill failed: `cdp-target status`, and the report in the group's `drills`"
                    );
                }
                return Ok(true);
            }
            if ended.recv_timeout(CHILD_LOOK) != Err(RecvTimeoutError::Timeout) {
                break;
            }
        }
        let pid = rustix::process::Pid::from_child(&child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let start = self.clock.monotonic();
        while child.try_wait()?.is_none() && self.clock.monotonic().saturating_sub(start) < CHILD_GRACE {
            std::thread::park_timeout(CHILD_LOOK);
        }
        let _ = child.kill();
        let _ = child.wait();
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::is_overdue;
    use cdp_protocol::units::Timestamp;

    #[test]
    fn a_drill_is_overdue_half_an_interval_after_its_time() {
        let at = |ms| is_overdue(100, Timestamp(1000), Timestamp(ms));
        assert!(!at(151_000) && at(151_001));
        assert!(!is_overdue(0, Timestamp(0), Timestamp(i64::MAX)), "none is wanted");
        assert!(!is_overdue(u64::MAX, Timestamp(0), Timestamp(i64::MAX)));
    }
}
