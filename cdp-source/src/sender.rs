//! The sender: one outgoing connection for all groups, and the sessions of the groups on it.
//!
//! Owns connecting and coming back (back-off with jitter), the hello, the signs of life, and the control stream. Each group
//! has a task of its own (`sender/group.rs`) and a stream of its own, so none waits for another; the transport shares the
//! line among the streams. Persists nothing.

mod group;
mod meter;
mod status;

pub use group::{GroupHandle, SenderGone, TrySubmitError};
pub use status::{LinkSnapshot, LinkStatus};

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cdp_protocol::limits::MESSAGE_BYTES_MAX;
use cdp_protocol::message::{self, MessageError, PROTOCOL_VERSION, PointSummary, SourceMessage, TargetMessage};
use cdp_protocol::session::memo::Memo;
use cdp_protocol::session::source::{GroupFacts, SourceSession};
use cdp_protocol::units::{Epoch, GroupId, Timestamp};
use cdp_seams::clock::Clock;
use cdp_seams::line::{BoxFuture, Control, Line, ReceiveStream, SendStream, read_packet, write_packet};
use cdp_seams::random::{Random, array};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

/// For the answer to the hello. How long a connection may take to be made is the connector's to say: it knows how many
/// addresses there are to be tried.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two asks for a sign of life.
const PING_INTERVAL: Duration = Duration::from_secs(15);
/// Without a message, three of those.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(45);
/// Before the first try to come back; doubles with each failure.
const BACKOFF_MIN: Duration = Duration::from_secs(1);
/// Between two tries at most.
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// A connection that lasted so long was a good one, even where nothing was acked on it.
const LASTED: Duration = Duration::from_secs(60);
/// For the target to be told of a clean end.
pub(crate) const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);
/// Messages waiting for the line: an opening and a few words for each of 64 groups.
const CONTROL_MESSAGES: usize = 256;
/// Answers waiting for a group: its 8 acks under way, the acks of its parts, and a few more.
const GROUP_MESSAGES: usize = 256;

/// Clocks further apart than this are worth a warning: no line delays a welcome so long.
const CLOCKS_APART_MS: u64 = 60_000;

/// Makes connections to the target.
pub trait Connector: Send + Sync {
    /// One try, which comes to an end by itself.
    fn connect(&self) -> BoxFuture<'_, Result<Box<dyn Line>, ConnectError>>;
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nothing came back in time.
    #[error("no answer from the target in {0:?}; is UDP blocked on the way, or the target down?")]
    Timeout(Duration),
    /// The transport failed: which step, on what.
    #[error("{step}")]
    Transport {
        /// What was tried, on what.
        step: String,
        /// What came back.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The line broke.
    #[error("the line broke")]
    Line(#[from] io::Error),
    /// The target does not take this source.
    #[error(
        "the target refused the connection: {reason} (it speaks versions {versions:?}, this source {PROTOCOL_VERSION})"
    )]
    Refused {
        /// Why, in the target's words.
        reason: String,
        /// The versions it speaks.
        versions: Vec<u32>,
    },
    /// The target says what no target of this version does.
    #[error("the target's message cannot be read")]
    Message(#[from] MessageError),
    /// Anything else that ends a connection.
    #[error("{0}")]
    Ended(&'static str),
}

/// The sender; its tasks end when it and the handles of its groups are dropped.
pub struct Sender {
    shared: Arc<Shared>,
    runtime: Handle,
    task: tokio::task::JoinHandle<()>,
}

/// Points, oldest first, and whether there are more after them.
pub type PointsPage = (Vec<PointSummary>, bool);

/// What the connection and the groups share.
struct Shared {
    connector: Arc<dyn Connector>,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    status: Arc<LinkStatus>,
    line: watch::Sender<Option<Up>>,
    groups: Mutex<HashMap<GroupId, mpsc::Sender<(u64, TargetMessage)>>>,
    requests: Mutex<HashMap<u64, oneshot::Sender<PointsPage>>>,
    numbers: AtomicU64,
    /// Something was acked on this connection.
    acked: AtomicBool,
}

/// A connection that was welcomed.
#[derive(Clone)]
struct Up {
    number: u64,
    line: Arc<dyn Line>,
    control: mpsc::Sender<SourceMessage>,
}

impl Sender {
    /// Starts connecting.
    #[must_use]
    pub fn start(
        runtime: &Handle,
        connector: Arc<dyn Connector>,
        clock: Arc<dyn Clock>,
        random: Arc<dyn Random>,
    ) -> Self {
        let shared = Arc::new(Shared {
            connector,
            status: Arc::new(LinkStatus::new(clock.clone())),
            clock,
            random,
            line: watch::Sender::new(None),
            groups: Mutex::default(),
            requests: Mutex::default(),
            numbers: AtomicU64::new(1),
            acked: AtomicBool::new(false),
        });
        let task = runtime.spawn(shared.clone().run());
        Self { shared, runtime: runtime.clone(), task }
    }

    /// Adds a group; `memo` is what is remembered of it.
    #[must_use]
    pub fn open_group(&self, facts: GroupFacts, memo: Memo) -> GroupHandle {
        let (inbound, messages) = mpsc::channel(GROUP_MESSAGES);
        lock(&self.shared.groups).insert(facts.group, inbound);
        let session = SourceSession::new(facts, memo);
        group::start(&self.runtime, session, self.shared.line.subscribe(), messages, self.shared.status.clone())
    }

    /// The connection, for people.
    #[must_use]
    pub fn status(&self) -> Arc<LinkStatus> {
        self.shared.status.clone()
    }

    /// Ends the connection, and waits a little until the target was told: else it would believe us there until it has heard
    /// nothing for long enough. Nothing is sent any more.
    pub async fn close(&self) {
        self.task.abort();
        if let Some(up) = self.shared.line.send_replace(None) {
            let _ = timeout(FAREWELL_TIMEOUT, up.line.end("the agent stops")).await;
        }
    }

    /// Asks the target for a page of points above `after`, oldest first; the second is whether there are more.
    ///
    /// # Errors
    /// Where there is no connection, or it ends before the answer.
    pub async fn points(&self, group: GroupId, after: Option<Epoch>) -> Result<PointsPage, ConnectError> {
        let up =
            self.shared.line.borrow().clone().ok_or(ConnectError::Ended("there is no connection to the target"))?;
        let request = self.shared.number();
        let (answer, answered) = oneshot::channel();
        lock(&self.shared.requests).insert(request, answer);
        let message = SourceMessage::ListPoints { request, group, after };
        let gone = || ConnectError::Ended("the connection ended before the answer came");
        let result = match up.control.send(message).await {
            Ok(()) => timeout(SILENCE_TIMEOUT, answered).await.ok().and_then(Result::ok).ok_or_else(gone),
            Err(_) => Err(gone()),
        };
        lock(&self.shared.requests).remove(&request);
        result
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.task.abort();
        self.shared.line.send_replace(None);
    }
}

impl Shared {
    /// Connects, and comes back after each end: sooner after a connection that was of use, later after each that was not.
    async fn run(self: Arc<Self>) {
        let mut backoff = BACKOFF_MIN;
        loop {
            let error = match self.connect().await {
                Ok((up, control, outgoing)) => {
                    let since = self.clock.monotonic();
                    let error = self.serve(up, control, outgoing).await;
                    // Not where it is welcomed only to be thrown out: a frame that is refused is refused each time.
                    let acked = self.acked.swap(false, Ordering::Relaxed);
                    if acked || self.clock.monotonic().saturating_sub(since) >= LASTED {
                        backoff = BACKOFF_MIN;
                    }
                    error
                }
                Err(error) => error,
            };
            let reason = text(&error);
            warn!(reason, "no connection to the target");
            self.status.down(reason);
            sleep(self.jittered(backoff)).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// Connects and says hello.
    async fn connect(&self) -> Result<(Up, Control, mpsc::Receiver<SourceMessage>), ConnectError> {
        let line: Arc<dyn Line> = self.connector.connect().await?.into();
        let software = format!("cdp-source {}", env!("CARGO_PKG_VERSION"));
        let hello = SourceMessage::Hello { version: PROTOCOL_VERSION, software, time: Timestamp(self.clock.wall_ms()) };
        let greeting = async {
            let mut control = line.open_control().await?;
            write_packet(&mut *control.send, &message::encode(&hello)).await?;
            let bytes = read_packet(&mut *control.receive, MESSAGE_BYTES_MAX).await?;
            Ok::<_, ConnectError>((control, message::decode(&bytes)?))
        };
        let greeted = timeout(HELLO_TIMEOUT, greeting).await.map_err(|_| ConnectError::Timeout(HELLO_TIMEOUT))?;
        match greeted? {
            (control, TargetMessage::Welcome { software, time, .. }) => {
                info!(software, "connected to the target");
                let now = Timestamp(self.clock.wall_ms());
                if let Some(warning) = clock_warning(now, time) {
                    warn!("{warning}");
                }
                self.status.up(now);
                let (outbox, outgoing) = mpsc::channel(CONTROL_MESSAGES);
                Ok((Up { number: self.number(), line, control: outbox }, control, outgoing))
            }
            (_, TargetMessage::Refused { reason, versions }) => Err(ConnectError::Refused { reason, versions }),
            _ => Err(ConnectError::Ended("the target answered the hello with something else")),
        }
    }

    /// Serves a connection until it ends.
    async fn serve(&self, up: Up, control: Control, outgoing: mpsc::Receiver<SourceMessage>) -> ConnectError {
        let (line, number) = (up.line.clone(), up.number);
        self.line.send_replace(Some(up));
        let error = tokio::select! {
            error = self.read_messages(&*line, number, control.receive) => error,
            error = write_messages(control.send, outgoing) => error,
            () = line.closed() => ConnectError::Line(io::ErrorKind::ConnectionReset.into()),
        };
        self.line.send_replace(None);
        lock(&self.requests).clear();
        line.close("going away");
        error
    }

    async fn read_messages(&self, line: &dyn Line, number: u64, mut receive: ReceiveStream) -> ConnectError {
        loop {
            let bytes = match timeout(SILENCE_TIMEOUT, read_packet(&mut *receive, MESSAGE_BYTES_MAX)).await {
                Ok(Ok(bytes)) => bytes,
                Ok(Err(error)) => return error.into(),
                Err(_) => return ConnectError::Timeout(SILENCE_TIMEOUT),
            };
            self.status.round_trip(line.round_trip());
            match message::decode(&bytes) {
                Ok(message) => {
                    if let Err(error) = self.distribute(number, message) {
                        return error;
                    }
                }
                Err(error) => return error.into(),
            }
        }
    }

    fn distribute(&self, number: u64, message: TargetMessage) -> Result<(), ConnectError> {
        let group = match message {
            TargetMessage::Pong => return Ok(()),
            TargetMessage::Refused { reason, versions } => return Err(ConnectError::Refused { reason, versions }),
            TargetMessage::Welcome { .. } => return Err(ConnectError::Ended("the target said welcome twice")),
            TargetMessage::PointOpened(_) | TargetMessage::PointRefused { .. } | TargetMessage::Answer { .. } => {
                return Err(ConnectError::Ended("the target speaks of a point that was not asked for"));
            }
            TargetMessage::Points { request, points, more } => {
                if let Some(answer) = lock(&self.requests).remove(&request) {
                    // Whoever asked may have given up.
                    let _ = answer.send((points, more));
                }
                return Ok(());
            }
            TargetMessage::GroupOpened(ref opened) => opened.group,
            TargetMessage::GroupRefused { group, .. }
            | TargetMessage::Acked { group, .. }
            | TargetMessage::PartAcked { group, .. }
            | TargetMessage::Busy { group, .. }
            | TargetMessage::SendAgain { group, .. }
            | TargetMessage::Changes { group, .. }
            | TargetMessage::ChangesUnknown { group, .. }
            | TargetMessage::Digests { group, .. } => group,
        };
        if matches!(message, TargetMessage::Acked { .. } | TargetMessage::PartAcked { .. }) {
            self.acked.store(true, Ordering::Relaxed);
        }
        let groups = lock(&self.groups);
        let inbound =
            groups.get(&group).ok_or(ConnectError::Ended("the target speaks of a group it was not asked for"))?;
        match inbound.try_send((number, message)) {
            Err(mpsc::error::TrySendError::Full(_)) => Err(ConnectError::Ended("a group does not take its answers")),
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
        }
    }

    /// Between half of `backoff` and all of it, so that many offices do not come back at once.
    fn jittered(&self, backoff: Duration) -> Duration {
        let share = f64::from(u32::from_le_bytes(array(&*self.random))) / f64::from(u32::MAX);
        backoff.mul_f64(0.5 + share / 2.0)
    }

    fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }
}

/// A warning where our clock and the target's are far apart: everything works, but the times of points mislead.
fn clock_warning(ours: Timestamp, target: Timestamp) -> Option<String> {
    let ahead_ms = ours.0.saturating_sub(target.0);
    let side = if ahead_ms > 0 { "ahead of" } else { "behind" };
    let seconds = ahead_ms.unsigned_abs() / 1000;
    (ahead_ms.unsigned_abs() > CLOCKS_APART_MS)
        .then(|| format!("this machine's clock is {seconds} s {side} the target's: the times of points mislead"))
}

/// Writes what the groups have to say, and asks for a sign of life when they have nothing.
async fn write_messages(mut send: SendStream, mut outgoing: mpsc::Receiver<SourceMessage>) -> ConnectError {
    loop {
        let message = match timeout(PING_INTERVAL, outgoing.recv()).await {
            Ok(Some(message)) => message,
            Ok(None) => return ConnectError::Ended("the sender ends"),
            Err(_) => SourceMessage::Ping,
        };
        if let Err(error) = write_packet(&mut *send, &message::encode(&message)).await {
            return error.into();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error with its causes, in a line.
fn text(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        line = format!("{line}: {source}");
        cause = source.source();
    }
    line
}

#[cfg(test)]
mod tests;
