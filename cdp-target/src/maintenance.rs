//! What a store does for itself in the background: checkpoints when they are due, pruning by the ladder.
//!
//! Owns when it is done, by whom (one at a time: a lock in the group's folder, shared with the commands), the clock of
//! retention of each group, and the pace. What is done is `checkpoint`'s and `prune`'s.

use crate::authority::AuthorityError;
use crate::catalog::{Catalog, CatalogError, open_group};
use crate::checkpoint::builder::{self, Builder, Step};
use crate::config::Config;
use crate::journal::change::Change;
use crate::journal::manifest::Checkpoint;
use crate::journal::{GroupView, JournalError};
use crate::metrics;
use crate::pace::Pace;
use crate::points::Instant;
use crate::prune::{CHUNK_BYTES_MAX, Owner, Prune, PruneError, Pruned, journal_bytes};
use crate::restore::image::one_line;
use crate::restore::keyring::Keyring;
use crate::retention::clock::{ClockJump, RetentionClock, Watch};
use crate::store::{GroupPlace, Store, StoreError};
use cdp_protocol::units::{Epoch, Timestamp};
use cdp_seams::clock::Clock;
use cdp_seams::random::Random;
use cdp_seams::storage::{Storage, StorageFile, read_all, replace};
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// How often it is looked whether anything is due.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// How often a group that no source has open is looked at where nothing is pruned: to open it is to read its newest segment.
const LOOK_AT_CLOSED_EVERY: Duration = Duration::from_secs(3600);
const CLOCK_BYTES_MAX: u64 = 4096;

/// The right to build in a group's folder, until dropped.
pub struct Hold {
    _file: Box<dyn StorageFile>,
}

/// Takes the right to build in `folder`; `None` where another has it.
///
/// # Errors
/// As the storage says.
pub fn hold(storage: &dyn Storage, folder: &Path) -> Result<Option<Hold>, JournalError> {
    let path = folder.join("maintenance.lock");
    let file = match storage.open_write(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => storage.create_new(&path),
        opened => opened,
    };
    let file = file.map_err(JournalError::io("open", &path))?;
    let locked = file.try_lock().map_err(JournalError::io("lock", &path))?;
    Ok(locked.then_some(Hold { _file: file }))
}

fn clock_path(folder: &Path) -> PathBuf {
    folder.join("retention-clock")
}

/// Why it is not known what time it is for the purpose of removing points.
#[derive(Debug, thiserror::Error)]
pub enum ClockError {
    /// The machine's clock is not believed.
    #[error(transparent)]
    Jump(#[from] ClockJump),
    /// The file with the last time.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// What time it is for the purpose of removing points of the group of `view`; `accept`: an operator says that the machine's clock is
/// right. Does not write it down.
///
/// # Errors
/// Where the machine's clock moved on further than is believed, or what was written down cannot be read.
pub fn retention_clock(view: &GroupView, wall: Timestamp, accept: bool) -> Result<RetentionClock, ClockError> {
    let (storage, folder) = view.place();
    let path = clock_path(folder);
    let known = match read_all(storage.as_ref(), &path, CLOCK_BYTES_MAX) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        read => serde_json::from_slice(&read.map_err(JournalError::io("read", &path))?).ok(),
    };
    // Without one the newest point tells how late it was at least.
    let newest = || view.newest().map(|newest| newest.map_or(wall, |newest| newest.received));
    let known = match known {
        Some(known) => known,
        None => RetentionClock { now: newest()? },
    };
    Ok(if accept { known.accept(wall) } else { known.advance(wall)? })
}

/// Writes down what time it was.
///
/// # Errors
/// As the storage says.
pub fn keep_clock(view: &GroupView, clock: RetentionClock) -> Result<(), JournalError> {
    let (storage, folder) = view.place();
    let path = clock_path(folder);
    let text = serde_json::to_vec(&clock).expect("a number");
    // A crash leaves the old time or the new one.
    replace(storage.as_ref(), &path, &text).map_err(JournalError::io("write", &path))
}

/// The point at which a checkpoint is due, if one is: the newest, once the last checkpoint is old or the journal since is long.
///
/// # Errors
/// Where a segment cannot be read.
pub fn checkpoint_due(view: &GroupView, config: &Config, now: Timestamp) -> Result<Option<Epoch>, JournalError> {
    let Some(newest) = view.newest()? else { return Ok(None) };
    let interval_ms = i64::try_from(config.checkpoint_interval_s.saturating_mul(1000)).unwrap_or(i64::MAX);
    if interval_ms == 0 || newest.damaged.is_some() {
        return Ok(None);
    }
    let (storage, folder) = view.place();
    if let Some(begun) = builder::building(storage.as_ref(), folder)
        && view.listed(begun)?.is_some()
    {
        return Ok(Some(begun));
    }
    let last = view.manifest().checkpoints.last();
    let (since, from, image_bytes) = if let Some(last) = last {
        (last.made, last.epoch, last.needed_bytes)
    } else {
        let Some(first) = view.points().next().transpose()? else { return Ok(None) };
        (first.received, first.epoch, first.bytes)
    };
    if from == newest.epoch {
        return Ok(None);
    }
    let is_old = now.0.saturating_sub(since.0) >= interval_ms;
    let journal = journal_bytes(view, from, newest.epoch);
    let is_long = journal as f64 > image_bytes as f64 * config.checkpoint_share && journal > config.segment_bytes_max;
    Ok((is_old || is_long).then_some(newest.epoch))
}

/// Has the group's writer take a change.
pub type ChangeOf<'a> = dyn Fn(&str, GroupPlace, &Change) -> anyhow::Result<()> + 'a;

/// What the maintenance works on and with.
pub struct Maintenance<'a> {
    /// The store.
    pub store: &'a Store,
    /// Names the offices and their groups.
    pub catalog: &'a dyn Fn() -> Result<Catalog, AuthorityError>,
    /// A group that is open already.
    pub view: &'a dyn Fn(GroupPlace) -> Option<Arc<GroupView>>,
    /// Has a group's writer take a change.
    pub change: &'a ChangeOf<'a>,
    /// Whether a view in the server still goes by an older manifest.
    pub is_leased: &'a dyn Fn(&str, GroupPlace) -> anyhow::Result<bool>,
    /// Time.
    pub clock: &'a dyn Clock,
    /// For attempts.
    pub random: &'a dyn Random,
}

/// What is remembered from one look to the next.
#[derive(Default)]
pub struct Looks(HashMap<GroupPlace, Look>);

#[derive(Default)]
struct Look {
    /// When it was pruned last, or would have been.
    pruned: Option<Duration>,
    /// A checkpoint that was due could not be made: it is tried again when pruning is due.
    has_failed: bool,
    /// How time has gone on since it was pruned first.
    watch: Option<Watch>,
}

/// Why a group was not seen to.
#[derive(Debug, thiserror::Error)]
enum TurnError {
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Prune(#[from] PruneError),
    #[error(transparent)]
    Clock(#[from] ClockError),
}

/// The writer of one group, wherever it runs.
struct GroupOwner<'a> {
    of: &'a Maintenance<'a>,
    office: &'a str,
    place: GroupPlace,
}

impl Owner for GroupOwner<'_> {
    fn adopt(&mut self, change: &Change) -> Result<Arc<GroupView>, JournalError> {
        (self.of.change)(self.office, self.place, change).map_err(refused)?;
        Ok(Arc::clone(open_group(self.of.store, self.place)?.view()))
    }

    fn is_leased(&mut self) -> Result<bool, JournalError> {
        (self.of.is_leased)(self.office, self.place).map_err(refused)
    }
}

/// What a group's writer answered, from wherever it came.
pub(crate) fn refused(error: anyhow::Error) -> JournalError {
    match error.downcast::<JournalError>() {
        Ok(error) => error,
        Err(error) => JournalError::Refused(format!("{error:#}")),
    }
}

impl Maintenance<'_> {
    /// Works until the other end of `ended` is dropped.
    pub fn run(&self, ended: &Receiver<()>) {
        let mut looks = Looks::default();
        while ended.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
            self.look(&mut looks, ended);
        }
    }

    /// Sees to every group once.
    pub fn look(&self, looks: &mut Looks, ended: &Receiver<()>) {
        if let Err(error) = self.see_to_all(looks, ended) {
            tracing::warn!(error = one_line(&error), "nothing is maintained for now");
        }
    }

    fn see_to_all(&self, looks: &mut Looks, ended: &Receiver<()>) -> Result<(), TurnError> {
        for office in (self.catalog)()?.offices() {
            for place in self.store.groups(office.id)? {
                match self.turn(&office.name, place, looks, ended) {
                    Ok(()) => {}
                    Err(
                        TurnError::Journal(JournalError::Interrupted)
                        | TurnError::Prune(PruneError::Journal(JournalError::Interrupted)),
                    ) => return Ok(()),
                    Err(error) => {
                        let (office, group) = (&office.name, place.group);
                        if matches!(error, TurnError::Prune(_) | TurnError::Clock(_)) {
                            metrics::prunes_failed(1);
                        }
                        tracing::error!(office, %group, error = one_line(&error), "a group is not maintained");
                    }
                }
            }
        }
        Ok(())
    }

    /// Sees to one group.
    fn turn(&self, office: &str, place: GroupPlace, looks: &mut Looks, ended: &Receiver<()>) -> Result<(), TurnError> {
        let (config, wall) = (self.store.config(), Timestamp(self.clock.wall_ms()));
        let folder = self.store.group_folder(place);
        let (prunes, now) = (config.prune_interval_s > 0, self.clock.monotonic());
        let interval = if prunes { Duration::from_secs(config.prune_interval_s) } else { LOOK_AT_CLOSED_EVERY };
        let look = looks.0.entry(place).or_default();
        let is_due = look.pruned.is_none_or(|at| now.saturating_sub(at) >= interval);
        // By the view of the server where it has one: to open the group would be to read its newest segment, every minute.
        let due = |view: Arc<GroupView>| checkpoint_due(&view, config, wall).is_ok_and(|due| due.is_some());
        if !is_due && (look.has_failed || !(self.view)(place).is_some_and(due)) {
            return Ok(());
        }
        // A command has it: it does the same.
        let Some(_hold) = hold(self.store.storage().as_ref(), &folder)? else { return Ok(()) };
        let group = open_group(self.store, place)?;
        let view = Arc::clone(group.view());
        let keys = self.keys(&group);
        let mut owner = GroupOwner { of: self, office, place };
        let mut budget = Pace::new(self.clock, ended, config.maintenance_bytes_per_s);
        let mut step = |bytes: u64| budget.spend(bytes);
        let builder = Builder { view: &view, keys: keys.as_ref(), random: self.random, now: wall };
        let made = checkpoint(&builder, config, &mut owner, &mut step);
        look.has_failed = made.is_err();
        match made {
            Ok(None) => {}
            Ok(Some(Checkpoint { epoch, needed_bytes: bytes, .. })) => {
                tracing::info!(office, group = group.name(), %epoch, bytes, "checkpoint made");
                metrics::checkpoints(1, 0);
            }
            Err(error @ JournalError::Interrupted) => return Err(error.into()),
            // A prune may make the room, or give up what cannot be read.
            Err(error) => {
                tracing::error!(office, group = group.name(), error = one_line(&error), "no checkpoint is made");
                metrics::checkpoints(0, 1);
            }
        }
        if is_due {
            look.pruned = Some(now);
        }
        // Of a group whose histories are two, nothing goes before an operator has decided.
        if !prunes || !is_due || view.manifest().frozen.is_some() {
            return Ok(());
        }
        let clock = self.retention_now(office, &view, &mut look.watch)?;
        let prune = settings(config, clock.now, wall, keys.as_ref(), self.random);
        let view = Arc::clone(open_group(self.store, place)?.view());
        let done = prune.run(view, &mut owner, &mut step, &mut |_, _| {})?;
        let Pruned { points, base, rewritten_segments, bytes_before, bytes_after, .. } = done;
        metrics::checkpoints(u64::from(base.is_some()), 0);
        metrics::pruned(points, bytes_before.saturating_sub(bytes_after));
        if points > 0 || rewritten_segments > 0 {
            tracing::info!(office, group = group.name(), points, bytes_before, bytes_after, "pruned");
        }
        Ok(())
    }

    /// What time it is for a prune, and writes it down: by the machine's clock, but no later than time has gone on while this server ran.
    fn retention_now(
        &self,
        office: &str,
        view: &GroupView,
        watch: &mut Option<Watch>,
    ) -> Result<RetentionClock, ClockError> {
        let (wall, monotonic) = (Timestamp(self.clock.wall_ms()), self.clock.monotonic());
        let limit = watch.map_or(wall, |watch| watch.limit(monotonic));
        let mut clock = retention_clock(view, wall.min(limit), false)?;
        if watch.is_none() || clock.now > limit {
            // The first prune of this server; or an operator has confirmed that it is later.
            let begun = watch.insert(Watch::new(clock, monotonic));
            clock = clock.advance(wall.min(begun.limit(monotonic)))?;
        }
        if wall > clock.now {
            let (group, now) = (&view.identity().name, Instant(clock.now).to_string());
            let ahead_s = wall.0.saturating_sub(clock.now.0) / 1000;
            tracing::error!(
                office,
                group,
                now,
                ahead_s,
                "the machine's clock moved on further than time did: points are removed as of an earlier time until an \
                 operator confirms that it is right (`cdp-target prune --accept-clock`)"
            );
        }
        keep_clock(view, clock)?;
        Ok(clock)
    }

    /// The group's keys; none where the target does not have them, which is no error: frames are then taken over whole.
    fn keys(&self, group: &crate::catalog::Group) -> Option<Keyring> {
        let keys = (self.catalog)().map_err(CatalogError::from).and_then(|catalog| catalog.keys(group));
        keys.inspect_err(|error| {
            tracing::warn!(group = group.name(), error = one_line(error), "no key: frames are kept whole");
        })
        .ok()
    }
}

/// Makes the checkpoint that is due, if one is.
fn checkpoint(
    builder: &Builder<'_>,
    config: &Config,
    owner: &mut GroupOwner<'_>,
    step: &mut Step<'_>,
) -> Result<Option<Checkpoint>, JournalError> {
    let Some(epoch) = checkpoint_due(builder.view, config, builder.now)? else { return Ok(None) };
    let made = builder.build(epoch, step, &mut |_, _| {})?;
    owner.adopt(&Change::Checkpoint(made))?;
    let (storage, folder) = builder.view.place();
    builder::end(storage.as_ref(), folder)?;
    Ok(Some(made))
}

/// How a prune goes by the configuration.
pub fn settings<'a>(
    config: &'a Config,
    now: Timestamp,
    wall: Timestamp,
    keys: Option<&'a Keyring>,
    random: &'a dyn Random,
) -> Prune<'a> {
    Prune {
        ladder: &config.retention,
        now,
        wall,
        keys,
        random,
        segment_bytes_max: config.segment_bytes_max,
        chunk_bytes_max: CHUNK_BYTES_MAX,
        checkpoint_share: config.checkpoint_share,
        keep_only_newest: false,
    }
}
