//! How soon the sender comes back, on a clock that stands still but for it.
#![expect(clippy::disallowed_methods, reason = "the paused clock of the runtime is the one that is tested by")]

use super::{BACKOFF_MAX, BACKOFF_MIN, ConnectError, Connector, LASTED, PROTOCOL_VERSION, Sender, clock_warning};
use cdp_protocol::escrow::Envelope;
use cdp_protocol::limits::MESSAGE_BYTES_MAX;
use cdp_protocol::message::{self, Instance, TargetMessage};
use cdp_protocol::session::memo::Memo;
use cdp_protocol::session::source::GroupFacts;
use cdp_protocol::units::{Epoch, FrameHash, GroupId, Head, KeyId, Timestamp};
use cdp_seams::clock::Clock;
use cdp_seams::line::{BoxFuture, Cut, Line, read_packet, sim_line, write_packet};
use cdp_seams::random::SimRandom;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::Instant;

const GROUP: GroupId = GroupId([4; 16]);

/// What a try to connect comes to.
#[derive(Clone, Copy)]
enum Fate {
    /// Nobody answers.
    Fails,
    /// Welcomed, and thrown out at once.
    ThrownOut,
    /// Welcomed, and something is acked.
    Acked,
    /// Welcomed, and thrown out after a while.
    Lasts,
}

/// A target whose connections all come to the same, and that tells when they were tried and when they ended.
struct Target {
    fate: Fate,
    tried: mpsc::UnboundedSender<Instant>,
    ended: mpsc::UnboundedSender<Instant>,
}

impl Connector for Target {
    fn connect(&self) -> BoxFuture<'_, Result<Box<dyn Line>, ConnectError>> {
        let _ = self.tried.send(Instant::now());
        Box::pin(async {
            if matches!(self.fate, Fate::Fails) {
                let _ = self.ended.send(Instant::now());
                return Err(ConnectError::Ended("nobody answers"));
            }
            let (ours, theirs) = sim_line(Cut::NEVER);
            tokio::spawn(serve(theirs, self.fate, self.ended.clone()));
            Ok(Box::new(ours) as Box<dyn Line>)
        })
    }
}

async fn serve(line: impl Line, fate: Fate, ended: mpsc::UnboundedSender<Instant>) {
    let mut control = line.accept_control().await.expect("a control stream");
    read_packet(&mut *control.receive, MESSAGE_BYTES_MAX).await.expect("a hello");
    let welcome = TargetMessage::Welcome { version: PROTOCOL_VERSION, software: "test".into(), time: Timestamp(0) };
    write_packet(&mut *control.send, &message::encode(&welcome)).await.expect("written");
    match fate {
        Fate::Acked => {
            let head = Head { epoch: Epoch(1), hash: FrameHash([1; 32]) };
            let ack = TargetMessage::Acked { group: GROUP, head };
            write_packet(&mut *control.send, &message::encode(&ack)).await.expect("written");
            // The ack of what was never sent ends the connection, from the other side.
            line.closed().await;
        }
        Fate::Lasts => {
            // Longer than silence is borne: answers keep it up.
            let until = Instant::now() + LASTED;
            while Instant::now() < until {
                let asked = read_packet(&mut *control.receive, MESSAGE_BYTES_MAX).await;
                let pong = message::encode(&TargetMessage::Pong);
                if asked.is_err() || write_packet(&mut *control.send, &pong).await.is_err() {
                    break;
                }
            }
        }
        Fate::ThrownOut | Fate::Fails => {}
    }
    let _ = ended.send(Instant::now());
    line.close("the end");
}

/// The clock that tokio's timers follow.
struct PausedClock(Instant);

impl Clock for PausedClock {
    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }

    fn wall_ms(&self) -> i64 {
        self.0.elapsed().as_millis() as i64
    }
}

/// How long the sender waits after each of `count` connections.
async fn waits(fate: Fate, count: usize) -> Vec<Duration> {
    let (attempted, mut tries) = mpsc::unbounded_channel();
    let (ended, mut ends) = mpsc::unbounded_channel();
    let connector = Arc::new(Target { fate, tried: attempted, ended });
    let clock = Arc::new(PausedClock(Instant::now()));
    let sender = Sender::start(&Handle::current(), connector, clock, Arc::new(SimRandom::new(7)));
    let envelope = Envelope { key: KeyId::default(), encapsulated: vec![], sealed: vec![] };
    let facts =
        GroupFacts { group: GROUP, name: "main".into(), instance: Instance::default(), envelope, volumes: vec![] };
    let _group = sender.open_group(facts, Memo::default());
    let mut waits = Vec::new();
    tries.recv().await.expect("a first try");
    for _ in 0..count {
        let ended = ends.recv().await.expect("an end");
        waits.push(tries.recv().await.expect("another try").duration_since(ended));
    }
    waits
}

/// Jitter takes up to half of a wait away; timers tick in milliseconds.
fn is_about(wait: Duration, backoff: Duration) -> bool {
    (backoff / 2..=backoff + Duration::from_millis(5)).contains(&wait)
}

#[tokio::test(start_paused = true)]
async fn waits_double_up_to_a_bound_while_nothing_comes_of_it() {
    for fate in [Fate::Fails, Fate::ThrownOut] {
        let mut backoff = BACKOFF_MIN;
        let waits = waits(fate, 10).await;
        for wait in &waits {
            assert!(is_about(*wait, backoff), "{waits:?}: {wait:?} is not between half of {backoff:?} and all of it");
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
        assert_eq!(backoff, BACKOFF_MAX);
        assert!(waits.windows(2).any(|pair| pair[0] * 2 != pair[1]), "no two offices wait alike: {waits:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_was_of_use_or_lasted_is_followed_by_the_shortest_wait() {
    for fate in [Fate::Acked, Fate::Lasts] {
        let waits = waits(fate, 5).await;
        assert!(waits.iter().all(|wait| is_about(*wait, BACKOFF_MIN)), "{waits:?}");
    }
}

#[test]
fn clocks_more_than_a_minute_apart_are_worth_a_warning() {
    let warning = |ours, target| clock_warning(Timestamp(ours), Timestamp(target));
    assert_eq!(warning(60_000, 0), None);
    assert!(warning(61_000, 0).is_some_and(|text| text.contains("61 s ahead of")));
    assert!(warning(0, 90_500).is_some_and(|text| text.contains("90 s behind")));
    assert!(warning(i64::MIN, i64::MAX).is_some());
}
