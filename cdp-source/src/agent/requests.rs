//! What the control socket is answered.

use super::group::{Input, PointRequest};
use super::status::{AgentStatus, GroupStatus};
use super::uplink::Uplink;
use crate::control::{Handler, Reply, Request};
use crate::local_image::schedule::Images;
use crate::unprotected::{Unprotected, Wanted, unprotected};
use cdp_protocol::units::GroupId;
use cdp_seams::storage::Storage;
use std::collections::BTreeMap;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

/// Told once the agent has taken up the changed configuration, or why not.
pub(super) type ReloadDone = oneshot::Sender<Result<(), String>>;

/// What requests see of the agent.
pub(super) struct Shared {
    target: String,
    uplink: Mutex<Option<Uplink>>,
    groups: Mutex<BTreeMap<String, Known>>,
    storage: Arc<dyn Storage>,
    wanted: Mutex<Wanted>,
    /// Whether the groups are started: a request that comes earlier waits.
    ready: watch::Sender<bool>,
}

struct Known {
    id: GroupId,
    inputs: Sender<Input>,
    status: Arc<Mutex<GroupStatus>>,
    images: Option<Images>,
}

impl Shared {
    pub(super) fn new(target: String, storage: Arc<dyn Storage>) -> Self {
        Self {
            target,
            uplink: Mutex::default(),
            groups: Mutex::default(),
            storage,
            wanted: Mutex::default(),
            ready: watch::Sender::new(false),
        }
    }

    /// What the configuration says of what is to be protected.
    pub(super) fn set_wanted(&self, wanted: Wanted) {
        *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) = wanted;
    }

    /// Mounted file systems in no group, but for those that are to be left: looked for now.
    pub(super) async fn unprotected(&self) -> Vec<Unprotected> {
        let wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let storage = Arc::clone(&self.storage);
        let looked = tokio::task::spawn_blocking(move || unprotected(&*storage, &wanted)).await;
        looked.unwrap_or_default().into_iter().filter(|found| !found.is_left).collect()
    }

    /// Makes a group known, in the place of an earlier one of its name.
    pub(super) fn add(&self, name: &str, id: GroupId, inputs: Sender<Input>, status: Arc<Mutex<GroupStatus>>) {
        self.lock().insert(name.to_owned(), Known { id, inputs, status, images: None });
    }

    /// What makes a group's local images.
    pub(super) fn set_images(&self, name: &str, images: Images) {
        if let Some(known) = self.lock().get_mut(name) {
            known.images = Some(images);
        }
    }

    /// The line, in the place of an earlier one.
    pub(super) fn set_uplink(&self, uplink: Uplink) {
        *self.uplink.lock().unwrap_or_else(PoisonError::into_inner) = Some(uplink);
    }

    /// All groups are started.
    pub(super) fn set_ready(&self) {
        self.ready.send_replace(true);
    }

    async fn until_ready(&self) {
        // The sender of this channel is `self`, so waiting ends only with readiness.
        let _ = self.ready.subscribe().wait_for(|ready| *ready).await;
    }

    fn uplink(&self) -> Option<Uplink> {
        self.uplink.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets line and groups: they are about to be started again, or to end.
    pub(super) fn clear(&self) {
        self.ready.send_replace(false);
        *self.uplink.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.lock().clear();
    }

    pub(super) fn statuses(&self) -> Vec<GroupStatus> {
        self.lock().values().map(|known| super::read(&known.status)).collect()
    }

    fn find<T>(&self, group: &str, pick: impl Fn(&Known) -> T) -> Result<T, Reply> {
        let groups = self.lock();
        groups.get(group).map(pick).ok_or_else(|| {
            let names: Vec<&str> = groups.keys().map(String::as_str).collect();
            let hint = match names.as_slice() {
                [] => "cdp-source protect NAME=DEVICE".to_owned(),
                names => format!("there is {}", names.join(", ")),
            };
            Reply::Failed { message: format!("no group named {group:?} is protected"), hint: Some(hint) }
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Known>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers requests.
pub(super) fn handler(shared: Arc<Shared>, reload: mpsc::Sender<ReloadDone>) -> Handler {
    Arc::new(move |request| {
        let (shared, reload) = (Arc::clone(&shared), reload.clone());
        Box::pin(async move {
            if request != Request::Reload {
                shared.until_ready().await;
            }
            match request {
                Request::Status => Reply::Status(Box::new(status(&shared).await)),
                Request::Reload => reloaded(&reload).await,
                Request::Point { group, label, wait, timeout_ms } => {
                    let limit = timeout_ms.map(Duration::from_millis);
                    let point = point(&shared, &group, label, wait);
                    match limit {
                        Some(limit) => timeout(limit, point).await.unwrap_or_else(|_| late(&group, wait, limit)),
                        None => point.await,
                    }
                }
                Request::Points { group } => points(&shared, &group).await,
                Request::Restoring { group } => restoring(&shared, &group).await,
                Request::Image { group } => image(&shared, &group),
            }
        })
    })
}

fn failed(message: impl Into<String>) -> Reply {
    Reply::Failed { message: message.into(), hint: None }
}

async fn reloaded(reload: &mpsc::Sender<ReloadDone>) -> Reply {
    let (done, answer) = oneshot::channel();
    if reload.send(done).await.is_err() {
        return failed("the agent is stopping");
    }
    match answer.await {
        Ok(Ok(())) => Reply::Reloaded,
        Ok(Err(message)) => failed(message),
        Err(_) => failed("the agent is stopping"),
    }
}

/// Whoever asked waits no longer; a point that is under way is made all the same.
fn late(group: &str, wait: bool, limit: Duration) -> Reply {
    let what = if wait { "committed at the target" } else { "cut" };
    Reply::Failed {
        message: format!("no point of group {group} was {what} within {} s", limit.as_secs_f64()),
        hint: Some("cdp-source status says how the group stands; --timeout waits longer, 0 for ever".into()),
    }
}

async fn point(shared: &Shared, group: &str, label: Option<String>, wait: bool) -> Reply {
    let inputs = match shared.find(group, |known| known.inputs.clone()) {
        Ok(inputs) => inputs,
        Err(reply) => return reply,
    };
    let (reply, answer) = oneshot::channel();
    if inputs.send(Input::Point(PointRequest { label, wait, closes_image: false, reply })).is_err() {
        return failed("the group is stopping");
    }
    answer.await.unwrap_or_else(|_| failed("the group is stopping; ask again"))
}

async fn restoring(shared: &Shared, group: &str) -> Reply {
    let inputs = match shared.find(group, |known| known.inputs.clone()) {
        Ok(inputs) => inputs,
        Err(reply) => return reply,
    };
    let (reply, answer) = oneshot::channel();
    if inputs.send(Input::Restoring(reply)).is_err() {
        return failed("the group is stopping");
    }
    let held = answer.await;
    held.map_or_else(|_| failed("the group is stopping; ask again"), |held| Reply::Restoring { held })
}

fn image(shared: &Shared, group: &str) -> Reply {
    match shared.find(group, |known| known.images.clone()) {
        Err(reply) => reply,
        Ok(Some(images)) if images.make_now() => Reply::Image,
        Ok(Some(_)) => failed("the agent is stopping"),
        Ok(None) => Reply::Failed {
            message: format!("group {group} has no local_image in source.toml, or the agent has not read it yet"),
            hint: Some(format!("write local_image.folder under [groups.{group}], and start the agent again")),
        },
    }
}

async fn points(shared: &Shared, group: &str) -> Reply {
    let id = match shared.find(group, |known| known.id) {
        Ok(id) => id,
        Err(reply) => return reply,
    };
    let Some(uplink) = shared.uplink() else { return failed("the agent is stopping") };
    match uplink.points(id).await {
        Ok(points) => Reply::Points { points },
        Err(error) => Reply::Failed {
            message: format!("list the points of group {group}: {error:#}"),
            hint: Some("cdp-source status says how the line stands".into()),
        },
    }
}

async fn status(shared: &Shared) -> AgentStatus {
    let line = shared.uplink().map(|uplink| uplink.snapshot()).unwrap_or_default();
    AgentStatus {
        pid: std::process::id(),
        target: shared.target.clone(),
        connected_since: line.connected_since,
        last_error: line.last_error,
        round_trip_us: line.round_trip.map(|round_trip| round_trip.as_micros() as u64),
        sent_bytes: line.sent_bytes,
        unprotected: shared.unprotected().await,
        groups: shared.statuses(),
    }
}
