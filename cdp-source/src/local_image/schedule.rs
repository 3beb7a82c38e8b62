//! When a group's images are made: a thread that waits, makes them, and tells how they stand.
//!
//! What is due is arithmetic over wall time (`due`): after an interval, and then at a time of day, UTC. A try that failed is made again within the
//! hour, one that could not be begun yet within a minute. The thread is left alone when the agent ends: what it was at is removed by the
//! next.

use super::maker::{MakeError, Making};
use super::status::{ImageFailure, ImagePhase, Kept, LocalImageStatus};
use crate::agent::group::Input;
use crate::agent::status::GroupStatus;
use crate::config::{LocalImageConfig, TimeOfDay};
use crate::state::{GroupState, StateFolder};
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::Timestamp;
use cdp_seams::clock::Clock;
use cdp_seams::random::Random;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often it is looked whether one is due: wall time may jump.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// After a try that failed.
const RETRY_MS: i64 = 3_600_000;
/// After one that could not be begun yet.
const NOT_YET_MS: i64 = 30_000;
const DAY_MS: i64 = 86_400_000;

/// What the thread is made of.
pub struct Schedule {
    /// The state folder.
    pub state: StateFolder,
    /// The group's name.
    pub group: String,
    /// Its id and its key's name.
    pub facts: GroupState,
    /// Its key.
    pub key: DataKey,
    /// What the operator says.
    pub config: LocalImageConfig,
    /// The volumes' devices, by slot.
    pub devices: Vec<PathBuf>,
    /// Every protected device.
    pub protected: Vec<PathBuf>,
    /// The group's thread.
    pub inputs: Sender<Input>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Attempts' ids.
    pub random: Arc<dyn Random>,
    /// Where others see how it stands.
    pub status: Arc<Mutex<GroupStatus>>,
}

/// The way to the thread.
#[derive(Clone)]
pub struct Images {
    now: Sender<()>,
    stop: Arc<AtomicBool>,
}

impl Images {
    /// Starts the thread.
    ///
    /// # Errors
    /// Where the system has none to give.
    pub fn start(schedule: Schedule) -> std::io::Result<Self> {
        let (now, asked) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let images = Self { now, stop: Arc::clone(&stop) };
        let name = format!("images-{}", schedule.group);
        std::thread::Builder::new().name(name).spawn(move || Keeper::new(schedule, stop).run(&asked))?;
        Ok(images)
    }

    /// Has one made now; `false` where the thread is gone.
    #[must_use]
    pub fn make_now(&self) -> bool {
        self.now.send(()).is_ok()
    }

    /// Ends it, soon.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        // One that sleeps looks at once.
        let _ = self.now.send(());
    }
}

/// When the next image is due. `last`: the instant of the newest; `since`: when the agent began to look.
#[must_use]
pub fn due(last: Option<Timestamp>, since: Timestamp, every_s: u64, at: Option<TimeOfDay>) -> Timestamp {
    let interval_ms = i64::try_from(every_s.saturating_mul(1000)).unwrap_or(i64::MAX);
    let Some(at) = at else { return last.map_or(since, |last| Timestamp(last.0.saturating_add(interval_ms))) };
    // Half a day of grace: one that took its time, or was made a little late, does not shift the next by a day.
    let after = last
        .map_or(since.0, |last| last.0.saturating_add(interval_ms).saturating_sub((DAY_MS / 2).min(interval_ms / 2)));
    let day = after.div_euclid(DAY_MS).saturating_mul(DAY_MS);
    let today = day.saturating_add(at.ms());
    Timestamp(if today >= after { today } else { today.saturating_add(DAY_MS) })
}

/// Whether one that was due is late by half an interval.
#[must_use]
pub const fn is_overdue(now: Timestamp, due: Timestamp, every_s: u64) -> bool {
    now.0.saturating_sub(due.0) / 500 > every_s as i64
}

/// The thread's state.
struct Keeper {
    schedule: Schedule,
    stop: Arc<AtomicBool>,
    kept: Kept,
    since: Timestamp,
    not_before: Timestamp,
    is_told_not_yet: bool,
    tries: u64,
}

impl Keeper {
    fn new(schedule: Schedule, stop: Arc<AtomicBool>) -> Self {
        let mut kept = Kept::load(&schedule.state, &schedule.group);
        // One in another folder is not there for who looks into this one.
        kept.last = kept.last.filter(|last| last.path.starts_with(&schedule.config.folder));
        let since = Timestamp(schedule.clock.wall_ms());
        Self { schedule, stop, kept, since, not_before: Timestamp(i64::MIN), is_told_not_yet: false, tries: 0 }
    }

    fn run(mut self, asked: &Receiver<()>) {
        self.publish();
        loop {
            let is_asked = match asked.recv_timeout(LOOK_EVERY.min(self.wait())) {
                Ok(()) => true,
                Err(RecvTimeoutError::Timeout) => false,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let now = Timestamp(self.schedule.clock.wall_ms());
            if is_asked || now >= self.due().max(self.not_before) {
                self.make(is_asked);
                // Whoever asked meanwhile has it.
                while asked.try_recv().is_ok() {}
                if self.stop.load(Ordering::Relaxed) {
                    return;
                }
            }
            self.publish();
        }
    }

    fn due(&self) -> Timestamp {
        let LocalImageConfig { every_s, at, .. } = self.schedule.config;
        let now = Timestamp(self.schedule.clock.wall_ms());
        // One of the future is of a clock that was wrong: nobody waits for that time to come.
        let last = self.kept.last.as_ref().map(|last| last.time).filter(|last| *last <= now);
        due(last, self.since.min(now), every_s, at)
    }

    fn wait(&self) -> Duration {
        let left = self.due().max(self.not_before).0.saturating_sub(self.schedule.clock.wall_ms());
        Duration::from_millis(left.max(0) as u64)
    }

    fn make(&mut self, is_asked: bool) {
        let schedule = &self.schedule;
        let (clock, due) = (Arc::clone(&schedule.clock), self.due());
        let progress = |phase, done, all| {
            let overdue = is_overdue(Timestamp(clock.wall_ms()), due, schedule.config.every_s);
            set_progress(&schedule.status, phase, (done, all), overdue);
        };
        let making = Making {
            state: &schedule.state,
            group: &schedule.group,
            facts: &schedule.facts,
            key: &schedule.key,
            config: &schedule.config,
            devices: &schedule.devices,
            protected: &schedule.protected,
            inputs: &schedule.inputs,
            clock: Arc::clone(&schedule.clock),
            random: Arc::clone(&schedule.random),
            stop: &self.stop,
            progress: &progress,
        };
        let made = making.make();
        let (group, now) = (schedule.group.clone(), Timestamp(schedule.clock.wall_ms()));
        match made {
            Ok(last) => {
                tracing::info!(group, epoch = last.epoch.0, bytes = last.bytes, path = %last.path.display(), "a local image is made and verified");
                (self.kept.last, self.kept.failure) = (Some(last), None);
                self.not_before = now;
                self.is_told_not_yet = false;
            }
            Err(MakeError::Stopped) => return,
            Err(MakeError::NotYet(reason)) if !is_asked => {
                if !self.is_told_not_yet {
                    tracing::info!(group, reason, "a local image is due, and waits");
                }
                self.is_told_not_yet = true;
                self.not_before = Timestamp(now.0 + NOT_YET_MS);
                return;
            }
            Err(error) => {
                let failure = match error {
                    MakeError::Image(error) => ImageFailure::of(error, now),
                    other => ImageFailure { time: now, reason: format!("{:#}", anyhow::Error::new(other)), hint: None },
                };
                tracing::error!(group, reason = failure.reason, hint = failure.hint, "there is no new local image");
                self.kept.failure = Some(failure);
                self.not_before = Timestamp(now.0 + RETRY_MS);
            }
        }
        self.tries += 1;
        if let Err(error) = self.kept.store(&self.schedule.state, &self.schedule.group) {
            tracing::warn!(
                group,
                error = format!("{:#}", anyhow::Error::new(error)),
                "how the local images stand is not kept"
            );
        }
    }

    fn publish(&self) {
        let (now, due) = (Timestamp(self.schedule.clock.wall_ms()), self.due());
        let status = LocalImageStatus {
            folder: self.schedule.config.folder.clone(),
            since: self.since,
            phase: None,
            done_bytes: 0,
            all_bytes: 0,
            last: self.kept.last.clone(),
            next: Some(due.max(self.not_before)),
            overdue: is_overdue(now, due, self.schedule.config.every_s),
            failure: self.kept.failure.clone(),
            tries: self.tries,
        };
        lock(&self.schedule.status).local_image = Some(status);
    }
}

fn set_progress(status: &Mutex<GroupStatus>, phase: ImagePhase, (done, all): (u64, u64), overdue: bool) {
    if let Some(status) = &mut lock(status).local_image {
        (status.phase, status.done_bytes, status.all_bytes, status.overdue) = (Some(phase), done, all, overdue);
    }
}

/// A status that a panicking thread left is still the newest there is.
fn lock(status: &Mutex<GroupStatus>) -> MutexGuard<'_, GroupStatus> {
    status.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
