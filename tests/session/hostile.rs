//! An office that was let in and misbehaves: its connection ends with a reason, nothing of it is journaled, the others
//! notice nothing.

use std::sync::Arc;
use std::time::Duration;

use cdp_protocol::codec::{FrameListHasher, Sealer};
use cdp_protocol::frame::{self, Kind};
use cdp_protocol::limits::MESSAGE_BYTES_MAX;
use cdp_protocol::message::{self, Instance, OpenGroup, PROTOCOL_VERSION, SourceMessage, TargetMessage};
use cdp_protocol::record::{Begin, Commit, Meters};
use cdp_protocol::session::target::GROUPS_MAX;
use cdp_protocol::units::{
    AttemptId, BLOCK_BYTES, Block, Class, Epoch, Extent, Generation, GroupId, KeyId, Sequence, Timestamp, VolumeSlot,
};
use cdp_seams::clock::SystemClock;
use cdp_seams::line::{Control, Cut, Line, SimLine, read_packet, sim_line, write_packet};
use cdp_target::receiver::{ConnectionError, Receiver};
use tokio::io::AsyncWriteExt;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::memory::{Entry, MemoryStore};
use super::{GROUP, facts, key};

const DEADLINE: Duration = Duration::from_secs(20);
const OTHER: GroupId = GroupId([9; 16]);

/// What an office may do that no program of ours does.
#[derive(Clone, Copy, Debug)]
enum Act {
    GarbageMessage,
    OversizeMessage,
    SecondHello,
    UnopenedGroup,
    UnopenedStream,
    GarbageFrame,
    OversizeFrame,
    FlippedHeader,
    FlippedPayload,
    OutOfOrder,
    OtherGroupsFrame,
    UngrantedGeneration,
    TooManyStreams,
    TooManyGroups,
}

const ACTS: [(Act, &str); 14] = [
    (Act::GarbageMessage, "does not decode"),
    (Act::OversizeMessage, "at most"),
    (Act::SecondHello, "second hello"),
    (Act::UnopenedGroup, "is not open"),
    (Act::UnopenedStream, "is not open"),
    (Act::GarbageFrame, "group"),
    (Act::OversizeFrame, "beyond its bound"),
    (Act::FlippedHeader, "group"),
    (Act::FlippedPayload, "group"),
    (Act::OutOfOrder, "group"),
    (Act::OtherGroupsFrame, "group"),
    (Act::UngrantedGeneration, "group"),
    (Act::TooManyStreams, "streams"),
    (Act::TooManyGroups, "groups"),
];

/// An office's end of a connection, by hand.
struct Peer {
    line: SimLine,
    control: Control,
    serving: JoinHandle<Result<(), ConnectionError>>,
}

fn open(group: GroupId) -> SourceMessage {
    let facts = facts();
    let name = format!("g{}", &group.to_string()[..6]);
    SourceMessage::OpenGroup(OpenGroup {
        group,
        name,
        generation: None,
        acked: vec![],
        sent: vec![],
        parts: None,
        parts_sent: vec![],
        anew: false,
        instance: Instance::default(),
        envelope: facts.envelope,
        volumes: facts.volumes,
    })
}

impl Peer {
    async fn connect(receiver: &Arc<Receiver>, office: &'static str) -> Self {
        let (line, theirs) = sim_line(Cut::NEVER);
        let serving = Arc::clone(receiver);
        let serving = tokio::spawn(async move { serving.serve_connection(Box::new(theirs), office).await });
        let control = line.open_control().await.expect("open");
        let mut peer = Self { line, control, serving };
        peer.say(&hello()).await;
        assert!(matches!(peer.next().await, TargetMessage::Welcome { .. }));
        peer.say(&open(GROUP)).await;
        assert!(matches!(peer.next().await, TargetMessage::GroupOpened(_)));
        peer
    }

    async fn say(&mut self, message: &SourceMessage) {
        write_packet(&mut *self.control.send, &message::encode(message)).await.expect("sent");
    }

    async fn next(&mut self) -> TargetMessage {
        let read = timeout(DEADLINE, read_packet(&mut *self.control.receive, MESSAGE_BYTES_MAX)).await;
        message::decode(&read.expect("in time").expect("an answer")).expect("a message")
    }

    async fn send(&self, group: GroupId, bytes: &[u8]) {
        let mut stream = self.line.open_frames().await.expect("a stream");
        // The line may be closed before all is written.
        let _ = stream.write_all(&[&group.0, bytes].concat()).await;
    }

    /// Misbehaves. The line may break while it does.
    async fn act(&mut self, act: Act) {
        let good = frames(GROUP, Generation(1));
        match act {
            Act::GarbageMessage => {
                write_packet(&mut *self.control.send, &[0xff; 40]).await.expect("sent");
            }
            Act::OversizeMessage => self.control.send.write_u32_le(1 << 20).await.expect("sent"),
            Act::SecondHello => self.say(&hello()).await,
            Act::UnopenedGroup => {
                self.say(&SourceMessage::ListPoints { request: 1, group: OTHER, after: None }).await;
            }
            Act::UnopenedStream => self.send(OTHER, &[]).await,
            Act::GarbageFrame => self.send(GROUP, &[0xff; 4096]).await,
            Act::OversizeFrame => {
                let header = frame::decode_header(&GROUP, &good[1]).expect("a header");
                let header = frame::Header { payload_len: 1 << 30, content_len: 1 << 30, ..header };
                self.send(GROUP, &frame::start(&GROUP, &header)).await;
            }
            Act::FlippedHeader => self.send(GROUP, &flipped(&good[0], 20)).await,
            Act::FlippedPayload => self.send(GROUP, &flipped(&good[0], good[0].len() - 6)).await,
            Act::OutOfOrder => self.send(GROUP, &good[1]).await,
            Act::OtherGroupsFrame => self.send(GROUP, &frames(OTHER, Generation(1))[0]).await,
            Act::UngrantedGeneration => self.send(GROUP, &frames(GROUP, Generation(7))[0]).await,
            Act::TooManyStreams => {
                let mut streams = Vec::new();
                while let Ok(mut stream) = self.line.open_frames().await {
                    if stream.write_all(&GROUP.0).await.is_err() {
                        break;
                    }
                    streams.push(stream);
                }
            }
            Act::TooManyGroups => {
                for id in 0..=GROUPS_MAX as u8 {
                    self.say(&open(GroupId([100 + id; 16]))).await;
                }
            }
        }
    }

    /// Waits until the target ends the connection; gives the reason.
    async fn ended(mut self) -> String {
        while let Ok(Ok(_)) = timeout(DEADLINE, read_packet(&mut *self.control.receive, MESSAGE_BYTES_MAX)).await {}
        self.line.close("told");
        let ended = timeout(DEADLINE, self.serving).await.expect("in time").expect("no panic");
        let error = ended.expect_err("the connection ends");
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        format!("{error}: {cause}")
    }
}

fn hello() -> SourceMessage {
    SourceMessage::Hello { version: PROTOCOL_VERSION, software: "test".into(), time: Timestamp(0) }
}

fn flipped(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] ^= 1;
    bytes
}

/// An epoch, as a sound source sends it.
fn frames(group: GroupId, generation: Generation) -> Vec<Vec<u8>> {
    let sealer = Sealer::new(group, Epoch(1), generation, AttemptId([4; 16]), &key());
    let extents = vec![Extent { start: Block(1), count: 1 }];
    let mut frames = vec![
        sealer.begin(&Begin { key: KeyId::default(), volumes: facts().volumes }),
        sealer.content(VolumeSlot(0), Sequence(1), extents, &[5; BLOCK_BYTES]),
    ];
    let mut list = FrameListHasher::default();
    for bytes in &frames {
        list.push(&frame::hash(bytes));
    }
    let commit = Commit {
        predecessor: None,
        frames: list.list(),
        parts: None,
        first_epoch: Epoch(1),
        after_rollback_to: None,
        class: Class::Crash,
        cut_time: Timestamp(1),
        meters: Meters::default(),
        label: None,
        volumes: vec![],
        layouts: Vec::new(),
    };
    frames.push(sealer.record(Kind::Commit, Sequence(2), commit.encode()));
    frames
}

fn journaled(store: &MemoryStore, office: &str) -> usize {
    store
        .with_office(office, GROUP, |disk| disk.entries.iter().filter(|entry| matches!(entry, Entry::Frame(_))).count())
}

#[test]
fn a_hostile_office_ends_its_own_connection_and_nothing_else() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    for (act, words) in ACTS {
        let store = MemoryStore::default();
        let receiver = Receiver::new(Arc::new(store.clone()), Arc::new(SystemClock::new()), "test");
        runtime.block_on(async {
            let mut honest = Peer::connect(&receiver, "office").await;
            let mut hostile = Peer::connect(&receiver, "hostile").await;
            hostile.act(act).await;
            let reason = hostile.ended().await;
            assert!(reason.contains(words), "{act:?}: {reason}");
            assert_eq!(journaled(&store, "hostile"), 0, "{act:?}");

            honest.send(GROUP, &frames(GROUP, Generation(1)).concat()).await;
            let acked = honest.next().await;
            assert!(matches!(acked, TargetMessage::Acked { head, .. } if head.epoch == Epoch(1)), "{act:?}: {acked:?}");
            assert_eq!(journaled(&store, "office"), 3, "{act:?}");
            // And the hostile one may come back and behave.
            let again = Peer::connect(&receiver, "hostile").await;
            drop((again, honest));
        });
    }
}
