//! The one line of the agent, as its groups see it: the sender, and for each group a thread that passes its events on.

use super::group::{Connect, Input, Link};
use crate::connect::{ConnectError, Identity, QuicConnector};
use crate::sender::{self, Connector, GroupHandle, LinkSnapshot, Sender};
use anyhow::Result;
use cdp_protocol::message::PointSummary;
use cdp_protocol::session::source::{GroupFacts, Outgoing};
use cdp_protocol::units::{Epoch, Extent, GroupId, Head, Timestamp, VolumeSlot};
use cdp_seams::clock::SystemClock;
use cdp_seams::line::{BoxFuture, Line};
use cdp_seams::random::SystemRandom;
use std::sync::{Arc, mpsc};
use tokio::runtime::Handle;

/// The line of all groups. It closes when the last clone and the last group's end are gone.
#[derive(Clone)]
pub(super) struct Uplink(Arc<Sender>);

struct Quic(QuicConnector);

impl Connector for Quic {
    fn connect(&self) -> BoxFuture<'_, Result<Box<dyn Line>, sender::ConnectError>> {
        Box::pin(async { self.0.line().await.map_err(transport) })
    }
}

/// The step is what the connector says; what would help is said with it.
fn transport(error: ConnectError) -> sender::ConnectError {
    let step = match error.hint() {
        Some(hint) => format!("connect to the target ({hint})"),
        None => "connect to the target".to_owned(),
    };
    sender::ConnectError::Transport { step, source: Box::new(error) }
}

impl Uplink {
    /// Starts to connect. Has to be called within a runtime.
    pub(super) fn start(identity: Identity) -> Result<Self> {
        let clock = Arc::new(SystemClock::new());
        let connector = Arc::new(Quic(QuicConnector::new(identity, clock.clone())?));
        Ok(Self(Arc::new(Sender::start(&Handle::current(), connector, clock, Arc::new(SystemRandom)))))
    }

    /// What puts a group on the line; its events go to `inputs`.
    pub(super) fn connect(&self, facts: GroupFacts, inputs: mpsc::Sender<Input>) -> Connect {
        let uplink = self.clone();
        Box::new(move |memo| {
            let mut handle = uplink.0.open_group(facts, memo);
            let (_, nothing) = mpsc::sync_channel(0);
            let events = std::mem::replace(&mut handle.events, nothing);
            std::thread::Builder::new()
                .name("group-events".into())
                .spawn(move || {
                    // Ends with the sender's end of the group, or with the group.
                    for event in events {
                        if inputs.send(Input::Link(event)).is_err() {
                            return;
                        }
                    }
                })
                .expect("the system has a thread to give");
            Box::new(handle)
        })
    }

    /// Tells the target that this is the end.
    pub(super) async fn close(self) {
        self.0.close().await;
    }

    /// All recovery points of a group, oldest first.
    pub(super) async fn points(&self, group: GroupId) -> Result<Vec<PointSummary>> {
        let mut all: Vec<PointSummary> = Vec::new();
        loop {
            let after = all.last().map(|point| point.epoch);
            let (page, more) = self.0.points(group, after).await?;
            let before = all.len();
            // Each page goes on from the one before; a target that gives nothing new has no more.
            all.extend(page.into_iter().filter(|point| Some(point.epoch) > after));
            if !more || all.len() == before {
                return Ok(all);
            }
        }
    }

    /// What the line carries, in bytes a second, once it is known: without holding the line open.
    pub(super) fn rate(&self) -> impl Fn() -> Option<f64> + Send + Sync + use<> {
        let status = self.0.status();
        move || status.bytes_per_s()
    }

    /// How the line stands.
    pub(super) fn snapshot(&self) -> LinkSnapshot {
        self.0.status().snapshot()
    }
}

/// A sender that has ended takes nothing; the agent is about to end then, and every block is still in `unacked`.
impl Link for GroupHandle {
    fn submit(&self, outgoing: Outgoing) {
        let _ = Self::submit(self, outgoing);
    }

    fn proceed(&self, head: Head) {
        let _ = Self::proceed(self, head);
    }

    fn unchanged(&self, epoch: Epoch, as_of: Timestamp) {
        Self::unchanged(self, epoch, as_of);
    }

    fn list_changes(&self, since: Head) {
        Self::list_changes(self, since);
    }

    fn list_digests(&self, head: Head, volume: VolumeSlot, blocks: Extent) {
        Self::list_digests(self, head, volume, blocks);
    }

    fn bytes_per_s(&self) -> Option<f64> {
        self.link.bytes_per_s()
    }

    fn is_connected(&self) -> bool {
        self.link.snapshot().connected_since.is_some()
    }
}
