//! A target with a real store and receiver, and sources that speak the protocol by hand.

use super::support::{Office, Target, authority, within};
use cdp_protocol::codec::{FrameListHasher, Sealer};
use cdp_protocol::escrow::Envelope;
use cdp_protocol::frame::{self, Kind};
use cdp_protocol::limits::MESSAGE_BYTES_MAX;
use cdp_protocol::message::{
    self, GroupOpened, Instance, OpenGroup, PROTOCOL_VERSION, PointSummary, RefusalReason, SourceMessage, TargetMessage,
};
use cdp_protocol::record::{Begin, Commit, Meters, PartChain, PartEnd, Predecessor, Volume};
use cdp_protocol::seal::DataKey;
use cdp_protocol::session::target::Claim;
use cdp_protocol::units::{
    AttemptId, BLOCK_BYTES, Block, Class, Epoch, Extent, Generation, GroupId, Head, KeyId, OfficeId, Sequence,
    Timestamp, VolumeSlot,
};
use cdp_seams::clock::SimClock;
use cdp_seams::line::{BoxFuture, Control, Line, SendStream, read_packet, write_packet};
use cdp_seams::storage::{Storage, SystemStorage};
use cdp_target::config::{Config, LISTEN_DEFAULT};
use cdp_target::enroll::Admitted;
use cdp_target::groups::StoreGroups;
use cdp_target::listener::{ListenerLimits, Serve};
use cdp_target::receiver::{GroupWriter, LiveGroup, Receiver, StoreError as ReceiverError};
use cdp_target::store::{self, Store, StoreError};
use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Arc;
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;

/// What a server does with an admitted office.
struct Desk {
    groups: Arc<StoreGroups>,
    receiver: Arc<Receiver>,
}

impl Serve for Desk {
    fn serve(&self, office: Admitted, line: Box<dyn Line>) -> BoxFuture<'static, ()> {
        self.groups.admit(&office.name, office.office);
        let receiver = Arc::clone(&self.receiver);
        Box::pin(async move {
            // Why it ended is the business of the test.
            let _ = receiver.serve_connection(line, &office.name).await;
        })
    }
}

/// A target on loopback with a store.
pub(crate) struct Site {
    target: Target,
    store: Store,
    receiver: Arc<Receiver>,
    pub(crate) clock: Arc<SimClock>,
    _folder: TempDir,
}

impl Site {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let storage: Arc<dyn Storage> = Arc::new(SystemStorage);
        let clock = Arc::new(SimClock::new(super::support::now_ms()));
        store::init(&storage, folder.path(), &Config::new(LISTEN_DEFAULT, vec![]), Timestamp(0), |path| {
            drop(authority(path, clock.clone()));
            Ok::<_, StoreError>("0".repeat(32))
        })
        .expect("made");
        let store = Store::open(storage, folder.path()).expect("opened");
        let groups = Arc::new(StoreGroups::new(store.clone()));
        let receiver = Receiver::new(groups.clone(), clock.clone(), "test");
        let desk = Desk { groups, receiver: receiver.clone() };
        let target = Target::start_serving(ListenerLimits::default(), Arc::new(desk));
        Self { target, store, receiver, clock, _folder: folder }
    }

    pub(crate) async fn office(&self, name: &str) -> Enrolled {
        let office = self.target.office(name).await;
        let certificate = office.credentials().certificate;
        let admitted = self.target.authority.lock().expect("not poisoned").admit(&certificate).expect("known");
        Enrolled { office, id: admitted.office }
    }

    /// The groups the store has of an office.
    pub(crate) fn groups(&self, office: &Enrolled) -> Vec<GroupId> {
        let mut groups: Vec<_> =
            self.store.groups(office.id).expect("listed").into_iter().map(|place| place.group).collect();
        groups.sort_unstable();
        groups
    }

    /// How many threads of groups run.
    pub(crate) fn threads(&self) -> usize {
        self.receiver.threads()
    }

    /// Ends a fork as an operator does.
    pub(crate) async fn resolve(&self, office: &Enrolled, group: &Group, head: &str) -> Result<Claim, ReceiverError> {
        let (answer, resolved) = tokio::sync::oneshot::channel();
        let name = self.target.authority.lock().expect("not poisoned").offices()[0].name.clone();
        assert_eq!(self.groups(office), [group.id]);
        let head = head.to_owned();
        let work = move |writer: Result<&mut dyn GroupWriter, ReceiverError>| {
            answer.send(writer.and_then(|writer| writer.resolve(&head))).expect("waited for");
        };
        self.receiver.with_group(&name, group.id, work).await;
        within(resolved).await.expect("answered")
    }

    pub(crate) fn live(&self, group: GroupId) -> LiveGroup {
        self.receiver.live().into_iter().find(|(_, of, _)| *of == group).expect("opened").2
    }
}

/// An office with its id.
pub(crate) struct Enrolled {
    office: Office,
    pub(crate) id: OfficeId,
}

impl Deref for Enrolled {
    type Target = Office;

    fn deref(&self) -> &Office {
        &self.office
    }
}

/// A group as its source knows it.
#[derive(Clone)]
pub(crate) struct Group {
    pub(crate) id: GroupId,
    pub(crate) cut_time: Timestamp,
    name: String,
    generation: Option<Generation>,
    acked: Option<Predecessor>,
    parts: Option<PartChain>,
    attempts: u8,
    pub(crate) process: [u8; 16],
}

impl Group {
    pub(crate) fn new(id: u8, name: &str) -> Self {
        Self {
            id: GroupId([id; 16]),
            cut_time: Timestamp(1_794_268_800_000),
            name: name.to_owned(),
            generation: None,
            acked: None,
            parts: None,
            attempts: 0,
            process: [1; 16],
        }
    }

    pub(crate) fn head(&self) -> Option<Head> {
        self.acked.map(|acked| acked.head)
    }

    pub(crate) fn generation(&self) -> Generation {
        self.generation.expect("opened")
    }

    /// Says it stands where another group does.
    pub(crate) fn pretend(&mut self, other: &Self) {
        (self.generation, self.acked) = (other.generation, other.acked);
    }

    /// The same on another machine, or in a process that was started anew.
    pub(crate) fn copied(&self, process: u8) -> Self {
        Self { process: [process; 16], ..self.clone() }
    }

    /// Stands where the target does from now on, as a source does that was granted a new generation.
    pub(crate) fn adopt(&mut self, opened: &GroupOpened) {
        self.acked = opened.head.map(|(head, attempt)| Predecessor { head, attempt });
        self.parts = None;
    }

    fn request(&self) -> OpenGroup {
        OpenGroup {
            group: self.id,
            name: self.name.clone(),
            generation: self.generation,
            acked: self.head().into_iter().collect(),
            sent: vec![],
            parts: self.parts.map(|parts| (Epoch(self.head().map_or(0, |head| head.epoch.0) + 1), parts)),
            parts_sent: vec![],
            anew: false,
            instance: Instance { process: self.process, host: "test".into() },
            envelope: Envelope { key: KeyId([1; 8]), encapsulated: vec![2; 32], sealed: vec![3; 48] },
            volumes: volumes(),
        }
    }

    /// The frames of a part or of a point, and the hash of the last.
    fn attempt(&mut self, is_part: bool) -> (Vec<u8>, Predecessor) {
        self.attempts = self.attempts.wrapping_add(1);
        let epoch = Epoch(self.head().map_or(0, |head| head.epoch.0) + 1);
        let mut id = [self.attempts; 16];
        id[..8].copy_from_slice(&epoch.0.to_le_bytes());
        let attempt = AttemptId(id);
        let sealer = Sealer::new(self.id, epoch, self.generation(), attempt, &DataKey::new([3; 32]));
        let extents = vec![Extent { start: Block(1), count: 1 }];
        let mut frames = vec![
            sealer.begin(&Begin { key: KeyId([1; 8]), volumes: volumes() }),
            sealer.content(VolumeSlot(0), Sequence(1), extents, &[epoch.0 as u8; BLOCK_BYTES]),
        ];
        let mut list = FrameListHasher::default();
        for bytes in &frames {
            list.push(&frame::hash(bytes));
        }
        let (kind, record) = if is_part {
            (Kind::PartEnd, PartEnd { predecessor: self.parts, frames: list.list() }.encode())
        } else {
            let commit = Commit {
                predecessor: self.acked,
                frames: list.list(),
                parts: self.parts,
                first_epoch: epoch,
                after_rollback_to: None,
                class: Class::Crash,
                cut_time: self.cut_time,
                meters: Meters { frame_bytes: frames.concat().len() as u64, ..Meters::default() },
                label: None,
                volumes: vec![],
                layouts: Vec::new(),
            };
            (Kind::Commit, commit.encode())
        };
        frames.push(sealer.record(kind, Sequence(2), record));
        let hash = frame::hash(&frames[2]);
        (frames.concat(), Predecessor { head: Head { epoch, hash }, attempt })
    }
}

fn volumes() -> Vec<Volume> {
    vec![Volume { slot: VolumeSlot(0), size_bytes: 1 << 20, name: "root".into() }]
}

/// A source's end of a connection.
pub(crate) struct Source {
    pub(crate) line: Box<dyn Line>,
    pub(crate) welcome_time: Timestamp,
    control: Control,
    frames: HashMap<GroupId, SendStream>,
}

impl Source {
    /// Connects, with a clock that says `wall_ms`.
    pub(crate) async fn connect(office: &Office, wall_ms: i64) -> Self {
        let line = within(office.connect()).await.expect("admitted");
        let control = line.open_control().await.expect("open");
        let mut source = Self { line, control, welcome_time: Timestamp(0), frames: HashMap::new() };
        let time = Timestamp(wall_ms);
        source.say(&SourceMessage::Hello { version: PROTOCOL_VERSION, software: "test".into(), time }).await;
        let TargetMessage::Welcome { time, .. } = source.next().await else { panic!("not welcome") };
        source.welcome_time = time;
        source
    }

    pub(crate) async fn say(&mut self, message: &SourceMessage) {
        within(write_packet(&mut *self.control.send, &message::encode(message))).await.expect("sent");
    }

    /// The same on a connection that may be closed by now.
    pub(crate) async fn try_say(&mut self, message: &SourceMessage) -> std::io::Result<()> {
        within(write_packet(&mut *self.control.send, &message::encode(message))).await
    }

    pub(crate) async fn next(&mut self) -> TargetMessage {
        let bytes = within(read_packet(&mut *self.control.receive, MESSAGE_BYTES_MAX)).await.expect("an answer");
        message::decode(&bytes).expect("a message")
    }

    pub(crate) async fn try_open(&mut self, group: &Group) -> Result<GroupOpened, RefusalReason> {
        self.say(&SourceMessage::OpenGroup(group.request())).await;
        match self.next().await {
            TargetMessage::GroupOpened(opened) => Ok(opened),
            TargetMessage::GroupRefused { reason, .. } => Err(reason),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn open(&mut self, group: &mut Group) -> GroupOpened {
        let opened = self.try_open(group).await.expect("opened");
        group.generation = Some(opened.generation);
        opened
    }

    async fn send(&mut self, group: GroupId, bytes: &[u8]) {
        if !self.frames.contains_key(&group) {
            let mut stream = within(self.line.open_frames()).await.expect("a stream");
            stream.write_all(&group.0).await.expect("sent");
            self.frames.insert(group, stream);
        }
        let stream = self.frames.get_mut(&group).expect("just opened");
        within(stream.write_all(bytes)).await.expect("sent");
        within(stream.flush()).await.expect("sent");
    }

    /// Sends a part; gives how many the epoch has then.
    pub(crate) async fn send_part(&mut self, group: &mut Group) -> u32 {
        let (bytes, _) = group.attempt(true);
        self.send(group.id, &bytes).await;
        let TargetMessage::PartAcked { parts, .. } = self.next().await else { panic!("the part is not acked") };
        group.parts = Some(parts);
        parts.count
    }

    /// Sends a point and waits for its ack.
    pub(crate) async fn send_point(&mut self, group: &mut Group) -> Head {
        self.send_points(group, 1).await
    }

    /// Sends points without waiting in between.
    pub(crate) async fn send_points(&mut self, group: &mut Group, count: usize) -> Head {
        for _ in 0..count {
            let (bytes, point) = group.attempt(false);
            self.send(group.id, &bytes).await;
            (group.acked, group.parts) = (Some(point), None);
        }
        let newest = group.head().expect("sent");
        loop {
            match self.next().await {
                TargetMessage::Acked { head, .. } if head == newest => return newest,
                TargetMessage::Acked { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// A page of points, and whether there are more.
    pub(crate) async fn list(&mut self, group: &Group, after: Option<Epoch>) -> (Vec<PointSummary>, bool) {
        self.say(&SourceMessage::ListPoints { request: 9, group: group.id, after }).await;
        let TargetMessage::Points { request: 9, points, more } = self.next().await else { panic!("no points") };
        (points, more)
    }
}
