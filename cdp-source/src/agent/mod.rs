//! The agent: watches the groups, cuts, and sends.
//!
//! One thread a group (`group`), one encoding pool and one line for all of them. A change of the configuration ends the
//! groups and starts them again, which costs what an agent's restart costs: nothing but what was under way, since the
//! tracking goes on in the kernel. The agent's lock is held by the caller, before anything here runs.

mod devices;
mod encoding;
pub mod group;
pub mod ledger;
mod requests;
pub mod status;
mod uplink;
pub mod visit;

use crate::config::{Config, FreezePolicy, GroupConfig};
use crate::connect::Identity;
use crate::control;
use crate::cut::CutLimits;
use crate::digests::{self, Digests};
use crate::encoder::Encoder;
use crate::freeze::Freezer;
use crate::metrics;
use crate::packing::Chooser;
use crate::restore::learn::{self, LearnError, Lost};
use crate::restore::marker::Restoring;
use crate::saved::proofs::Proofs;
use crate::saved::saving::Saver;
use crate::saved::taking::TakeUp;
use crate::spool::{self, Spool, SpoolLimits};
use crate::state::{GroupState, StateFolder};
use crate::tracker::ebpf;
use crate::unprotected::Wanted;
use anyhow::{Context, Result};
use cdp_protocol::message::Instance;
use cdp_protocol::record::volume_meters::VolumeMeters;
use cdp_protocol::record::{Begin, Volume};
use cdp_protocol::seal::DataKey;
use cdp_protocol::session::source::GroupFacts;
use cdp_protocol::units::{BLOCK_BYTES, GroupId};
use cdp_seams::clock::{Clock, SystemClock};
use cdp_seams::random::{self, SystemRandom};
use cdp_seams::service::{self, Watchdog};
use group::{DiskLayouts, Ending, FIRST_TRIES, GroupSetup, Input, IsRestoring, Learner};
use requests::Shared;
use status::{GroupStatus, VolumeStatus};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use uplink::Uplink;

/// How often metrics are brought up to date.
const METRICS_EVERY: Duration = Duration::from_secs(1);
/// How often mounted file systems are looked for that are in no group.
const UNPROTECTED_EVERY: Duration = Duration::from_secs(60);
/// How often it is checked that every group's thread still runs.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// A group's thread, and the ways to it.
struct RunningGroup {
    inputs: Sender<Input>,
    thread: JoinHandle<()>,
    /// Told when its volumes were opened for the first time.
    opened: Option<oneshot::Receiver<()>>,
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// Where the configuration cannot be read, the socket not be made, or a group's thread dies.
pub async fn run(state: StateFolder, identity: Identity) -> Result<()> {
    let shared = Arc::new(Shared::new(identity.target.targets.join(", "), Arc::clone(state.storage())));
    let (reload, mut reloads) = mpsc::channel(1);
    // The socket comes before the configuration is read: whoever changes it later finds somebody to tell.
    let listener = control::listen(&state)?;
    let handler = requests::handler(Arc::clone(&shared), reload);
    let server = tokio::spawn(control::serve(listener, handler));
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let config = load(&state).await?;
    if let Some(listen) = config.metrics_listen {
        metrics::serve(listen)?;
    }
    let recorder = tokio::spawn(record_metrics(Arc::clone(&shared)));
    let watcher = tokio::spawn(watch_unprotected(Arc::clone(&shared)));
    let instance = instance();
    let mut groups = start(&state, &identity, &instance, config, &shared).await?;
    // What waits for this unit may mount the volumes.
    wait_for_volumes(&mut groups.1).await;
    tell_manager(service::READY);
    tracing::info!(groups = groups.1.len(), "running");
    let (clock, mut watch) = (SystemClock::new(), GroupsWatch(Watchdog::of_environment(), None));
    let ended = loop {
        tokio::select! {
            _ = terminate.recv() => break Ok(()),
            _ = interrupt.recv() => break Ok(()),
            Some(done) = reloads.recv() => {
                let done: requests::ReloadDone = done;
                match load(&state).await {
                    Err(error) => _ = done.send(Err(format!("{error:#}"))),
                    Ok(config) => {
                        shared.clear();
                        watched(stop(groups, Ending::Reload), &mut watch, &clock).await;
                        let started = start(&state, &identity, &instance, config, &shared);
                        groups = watched(started, &mut watch, &clock).await?;
                        _ = done.send(Ok(()));
                    }
                }
            }
            () = tokio::time::sleep(WATCH_EVERY) => {
                watch.look(clock.monotonic());
                if groups.1.iter().any(|group| group.thread.is_finished()) {
                    break Err(anyhow::anyhow!("a group's thread has died"));
                }
            }
        }
    };
    tracing::info!("stopping; tracking goes on");
    tell_manager(service::STOPPING);
    server.abort();
    recorder.abort();
    watcher.abort();
    shared.clear();
    stop(groups, Ending::Agent).await;
    // The socket is of no use to anybody any more; a crash leaves it, and the next agent takes its place.
    let _ = state.storage().remove(&state.socket());
    ended
}

/// Waits until every group has opened its volumes, so that it has seen them before anybody mounts them; not for long where one cannot.
async fn wait_for_volumes(groups: &mut [RunningGroup]) {
    let opened = groups.iter_mut().filter_map(|group| group.opened.take());
    let all = async {
        for opened in opened {
            // A group that ended has said why.
            let _ = opened.await;
        }
    };
    if tokio::time::timeout(FIRST_TRIES, all).await.is_err() {
        tracing::warn!(
            "volumes could not be opened yet: those that are written to before they are will be compared in whole"
        );
    }
}

fn tell_manager(state: &str) {
    if let Err(error) = service::tell(state) {
        tracing::debug!(%error, "the service manager was not told");
    }
}

/// The service manager's watchdog, and which thread did not go on when that was said last.
struct GroupsWatch(Option<Watchdog>, Option<String>);

impl GroupsWatch {
    fn look(&mut self, now: Duration) {
        let Some(watchdog) = &mut self.0 else { return };
        match watchdog.look(now) {
            Ok(stuck) if stuck != self.1 => {
                if let Some(thread) = &stuck {
                    tracing::error!(thread, "a thread does not go on: the watchdog is not told until it does");
                }
                self.1 = stuck;
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "the watchdog was not told"),
        }
    }
}

/// Waits for what takes its time, and looks at the groups meanwhile.
async fn watched<T>(work: impl Future<Output = T>, watch: &mut GroupsWatch, clock: &SystemClock) -> T {
    let (mut work, mut every) = (std::pin::pin!(work), tokio::time::interval(WATCH_EVERY));
    loop {
        tokio::select! {
            done = &mut work => return done,
            _ = every.tick() => watch.look(clock.monotonic()),
        }
    }
}

async fn load(state: &StateFolder) -> Result<Config> {
    let state = state.clone();
    let loaded = tokio::task::spawn_blocking(move || state.config()).await;
    Ok(loaded.context("read the configuration")??)
}

async fn record_metrics(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(METRICS_EVERY).await;
        shared.statuses().iter().for_each(metrics::record);
    }
}

/// Tells of mounted file systems that nobody copies: by the metric, and in the log when there are others than before.
async fn watch_unprotected(shared: Arc<Shared>) {
    let (mut before, mut every) = (Vec::new(), tokio::time::interval(UNPROTECTED_EVERY));
    loop {
        every.tick().await;
        let found = shared.unprotected().await;
        metrics::record_unprotected(found.len());
        for entry in found.iter().filter(|entry| !before.contains(*entry)) {
            let (device, mounted_on) = (entry.device.display(), entry.mounted_on.join(", "));
            tracing::warn!(%device, mounted_on, "a mounted file system is in no group");
        }
        before = found;
    }
}

/// Starts a thread for every group that has volumes, and the line for all of them.
async fn start(
    state: &StateFolder,
    identity: &Identity,
    instance: &Instance,
    config: Config,
    shared: &Arc<Shared>,
) -> Result<(Uplink, Vec<RunningGroup>)> {
    let uplink = Uplink::start(identity.clone())?;
    shared.set_uplink(uplink.clone());
    shared.set_wanted(Wanted::from(&config));
    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get).min(4);
    let chooser = Chooser::new(config.packing, Arc::new(SystemClock::new()), uplink.rate());
    let encoder = Arc::new(Encoder::new(threads).choosing(chooser));
    let mut groups = Vec::new();
    // Whichever group's volume they lie on.
    let slots = config.groups.iter().flat_map(|(name, group)| group.volumes.iter().map(move |v| (name, v.slot)));
    let mut own: Vec<PathBuf> = slots.map(|(name, slot)| digests::slots_path(&state.digests(name), slot)).collect();
    own.extend(config.groups.keys().map(|name| spool::file_path(&state.spool(name))));
    for (name, group) in config.groups {
        let own = own.clone();
        let (state, name, identity) = (state.clone(), name.clone(), identity.clone());
        let (uplink, encoder, shared) = (uplink.clone(), Arc::clone(&encoder), Arc::clone(shared));
        let instance = instance.clone();
        let started = tokio::task::spawn_blocking(move || {
            if group.volumes.is_empty() {
                forget_tracking(&state, &name);
                return Ok(None);
            }
            start_group(&state, &name, group, own, &identity, instance, &uplink, encoder, &shared).map(Some)
        });
        groups.extend(started.await.context("start a group")??);
    }
    shared.set_ready();
    Ok((uplink, groups))
}

#[expect(clippy::too_many_arguments, reason = "what all groups share, and what is one group's own")]
fn start_group(
    state: &StateFolder,
    name: &str,
    config: GroupConfig,
    own: Vec<PathBuf>,
    identity: &Identity,
    instance: Instance,
    uplink: &Uplink,
    encoder: Arc<Encoder>,
    shared: &Shared,
) -> Result<RunningGroup> {
    let mut facts = state.group(name)?.with_context(|| {
        format!(
            "group {name} has no state: were its volumes written into source.toml by hand? use `cdp-source protect`"
        )
    })?;
    state.renew_envelope(name, &mut facts, &identity.target.escrow_public)?;
    let volumes = wire_volumes(&config, &facts)?;
    let status = Arc::new(Mutex::new(GroupStatus {
        group: name.to_owned(),
        volumes: config
            .volumes
            .iter()
            .zip(&volumes)
            .map(|(volume, wire)| VolumeStatus {
                name: volume.name.clone(),
                slot: volume.slot,
                device: volume.device.clone(),
                size_bytes: wire.size_bytes,
                meters: VolumeMeters::default(),
            })
            .collect(),
        ..GroupStatus::default()
    }));
    let (inputs, receiver) = channel();
    shared.add(name, facts.group, inputs.clone(), Arc::clone(&status));
    let data_key = state.data_key(name)?;
    let (begin, envelope) = (Begin { key: facts.key, volumes: volumes.clone() }, facts.envelope.clone());
    let (storage, folder) = (Arc::clone(state.storage()), state.digests(name));
    let digests = Digests::open(storage, &folder, facts.group, data_key.digest_key(), &volumes, &SystemRandom);
    let layouts = DiskLayouts::new(&volumes, config.volumes.iter().map(|volume| volume.device.clone()));
    let learner =
        learner(state.clone(), name.to_owned(), identity.clone(), (facts.group, volumes.clone()), data_key.clone());
    let group_facts = GroupFacts { group: facts.group, name: name.to_owned(), instance, envelope, volumes };
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let (storage, folder) = (Arc::clone(state.storage()), state.tracking(name));
    // Before anything is opened: whatever comes of it, the record is gone.
    let left = TakeUp::new(Arc::clone(&storage), &folder, &state.kept_memo_path(name), data_key.digest_key());
    let saver = Saver::new(Arc::clone(&storage), &folder, Arc::clone(&clock), Arc::new(SystemRandom));
    let (opened, has_opened) = oneshot::channel();
    let limits = SpoolLimits::new(config.spool_bytes_max, config.spool_points_max);
    let spool = Spool::new(Arc::clone(state.storage()), &state.spool(name), facts.group, limits);
    let setup = GroupSetup {
        connect: uplink.connect(group_facts.clone(), inputs.clone()),
        facts: group_facts,
        begin,
        digests,
        learner: Some(learner),
        layouts: Some(layouts),
        spool,
        data_key,
        interval: Duration::from_millis(config.interval_ms),
        audit_interval: Duration::from_secs(config.audit_interval_s),
        limits: CutLimits {
            bound: Duration::from_millis(config.cut_bound_ms()),
            blocks_max: config.capture_bytes_max / BLOCK_BYTES as u64,
        },
        hooks: config.hooks.clone(),
        freezer: (config.freeze == FreezePolicy::Fallback).then(|| Freezer {
            storage: Arc::clone(state.storage()),
            devices: config.volumes.iter().map(|volume| volume.device.clone()).collect(),
            deadline: Duration::from_millis(config.freeze_deadline_ms),
        }),
        kept_memo: Box::new(state.kept_memo(name)),
        saver: Some(saver),
        proofs: Some(Proofs::new(storage, &folder)),
        restoring: is_restoring(state.clone(), name.to_owned()),
        opened: Some(opened),
        opener: devices::opener(state.clone(), name.to_owned(), facts, config, own, Arc::clone(&clock), Arc::new(left)),
        encoder,
        clock,
        random: Arc::new(SystemRandom),
        status,
    };
    let sender = inputs.clone();
    let thread = std::thread::Builder::new()
        .name(format!("group-{name}"))
        .spawn(move || group::run(setup, &receiver, sender))
        .context("start a group's thread")?;
    Ok(RunningGroup { inputs, thread, opened: Some(has_opened) })
}

/// Asks the target, on a line of its own, for digests that are lost.
fn learner(
    state: StateFolder,
    name: String,
    identity: Identity,
    (group, volumes): (GroupId, Vec<Volume>),
    key: DataKey,
) -> Learner {
    Box::new(move |goes_on| {
        let (storage, folder) = (state.storage(), state.digests(&name));
        let lost = Lost { storage, folder: &folder, group, volumes: &volumes, key: &key };
        learn::learn(&lost, identity.clone(), goes_on)?;
        Ok::<_, LearnError>(Digests::open(
            Arc::clone(storage),
            &folder,
            group,
            key.digest_key(),
            &volumes,
            &SystemRandom,
        ))
    })
}

/// Which volume of a group is being restored in place; a file that cannot be read is no sign that none is.
fn is_restoring(state: StateFolder, group: String) -> IsRestoring {
    Box::new(move || match Restoring::load(&state, &group) {
        Ok(restoring) => restoring.filter(Restoring::holds_points).map(|restoring| restoring.word(&group)),
        Err(error) => Some(format!("whether a volume is being restored cannot be told: {error}")),
    })
}

/// This process, as the target tells it from a copy of its machine and from the agent after it.
fn instance() -> Instance {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let host = name.chars().take_while(char::is_ascii_graphic).take(64).collect();
    Instance { process: random::array(&SystemRandom), host }
}

/// The volumes as the target is told of them: of the size they were protected with.
fn wire_volumes(config: &GroupConfig, facts: &GroupState) -> Result<Vec<Volume>> {
    let wire = config.volumes.iter().map(|volume| {
        let size_bytes = facts.protected_size_bytes(volume.slot).with_context(|| {
            format!(
                "volume {} has no recorded size: was it written into source.toml by hand? use `cdp-source protect`",
                volume.name
            )
        })?;
        Ok(Volume { slot: volume.slot, size_bytes, name: volume.name.clone() })
    });
    wire.collect()
}

/// Takes down what is pinned for a group without volumes: it is not tracked any more.
pub(crate) fn forget_tracking(state: &StateFolder, name: &str) {
    let Ok(Some(facts)) = state.group(name) else { return };
    let folder = state.tracking(name);
    if let Err(error) = ebpf::remove(Path::new("/sys/fs/bpf"), &folder, &**state.storage(), facts.group) {
        tracing::warn!(group = name, error = format!("{:#}", anyhow::Error::new(error)), "the tracking stays");
    }
}

/// Ends the groups, then the line.
async fn stop((uplink, groups): (Uplink, Vec<RunningGroup>), ending: Ending) {
    for group in &groups {
        // A thread that has died needs no telling.
        let _ = group.inputs.send(Input::Stop(ending));
    }
    let joined = tokio::task::spawn_blocking(move || {
        for group in groups {
            if group.thread.join().is_err() {
                tracing::error!("a group's thread ended with a panic");
            }
        }
    });
    if joined.await.is_err() {
        tracing::error!("waiting for the groups failed");
    }
    uplink.close().await;
}

/// A status that a panicking thread left is still the newest there is.
fn read(status: &Mutex<GroupStatus>) -> GroupStatus {
    status.lock().unwrap_or_else(PoisonError::into_inner).clone()
}
