//! Many offices at once: each sends a point of a few frames every 5 s to a real server on this machine, and waits for its ack.
//!
//! The offices are tasks of this program that speak the protocol by hand; joining and the line are the agent's own. The server is
//! its program, with a store of its own for each number of offices.

use anyhow::{Context, Result, bail};
use cdp_protocol::codec::{FrameListHasher, Sealer};
use cdp_protocol::escrow::Envelope;
use cdp_protocol::frame::{self, Kind};
use cdp_protocol::limits::MESSAGE_BYTES_MAX;
use cdp_protocol::message::{self, Instance, OpenGroup, PROTOCOL_VERSION, SourceMessage, TargetMessage};
use cdp_protocol::record::{Begin, Commit, Meters, Predecessor, Volume};
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{
    AttemptId, BLOCK_BYTES, Block, Class, Epoch, Extent, Generation, GroupId, Head, KeyId, Sequence, Timestamp,
    VolumeSlot,
};
use cdp_seams::clock::{Clock, SystemClock};
use cdp_seams::line::{Control, FrameStream, Line, read_packet, write_packet};
use cdp_seams::random::SystemRandom;
use cdp_seams::storage::SystemStorage;
use cdp_source::connect::{Identity, QuicConnector};
use cdp_source::join::join;
use cdp_tests::process::{Daemon, program, run as run_command};
use cdp_tests::site::PATIENCE;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::time::interval_at;

const OFFICES: [usize; 3] = [10, 50, 200];
const INTERVAL: Duration = Duration::from_secs(5);
/// A minute of them.
const POINTS: usize = 12;
const FRAMES: u64 = 3;
const FRAME_BLOCKS: u32 = 4;
const VOLUME_BLOCKS: u32 = 1 << 20;
const CONNECTED_AT_ONCE: usize = 16;

pub(super) fn run(folder: &Path) -> Result<()> {
    println!(
        "\n| offices, a point of {FRAMES} frames every 5 s each | acks | ack, ms: median | 99 % | longest | CPU s a minute of the server | its peak MiB |"
    );
    println!("|---|---|---|---|---|---|---|");
    for offices in OFFICES {
        let folder = folder.join(format!("ingest-{offices}"));
        std::fs::create_dir(&folder)?;
        let taken = ingest(&folder, offices).with_context(|| format!("{offices} offices"))?;
        let at = |share: f64| taken.acks_ms[((taken.acks_ms.len() - 1) as f64 * share).round() as usize];
        println!(
            "| {offices} | {} | {:.1} | {:.1} (aim 250) | {:.1} | {:.1} | {} |",
            taken.acks_ms.len(),
            at(0.5),
            at(0.99),
            at(1.0),
            taken.cpu.as_secs_f64() * 60.0 / taken.time.as_secs_f64(),
            taken.peak_bytes >> 20
        );
        std::fs::remove_dir_all(&folder)?;
    }
    Ok(())
}

struct Taken {
    /// Sorted.
    acks_ms: Vec<f64>,
    time: Duration,
    cpu: Duration,
    peak_bytes: u64,
}

fn ingest(folder: &Path, offices: usize) -> Result<Taken> {
    let store = folder.join("target");
    let port = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port();
    let target = |arguments: &[&str]| {
        run_command(Command::new(program("cdp-target")).args(arguments).env("CDP_TARGET_DATA", &store))
    };
    target(&["init", "--listen", &format!("127.0.0.1:{port}")])?;
    let bundles: Vec<PathBuf> = (0..offices).map(|office| folder.join(format!("{office}.bundle"))).collect();
    for (office, bundle) in bundles.iter().enumerate() {
        target(&["enroll", &format!("office-{office}"), "--output", bundle.to_str().context("a path of text")?])?;
    }
    let mut server = Daemon::start(Command::new(program("cdp-target")).arg("serve").env("CDP_TARGET_DATA", &store))?;
    server.wait_for_line("listening on", PATIENCE)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    // One after the other: to join is not what is measured. All join before the first connects.
    let mut identities = Vec::new();
    for (office, bundle) in bundles.iter().enumerate() {
        let (bundle, state) = (std::fs::read(bundle)?, folder.join(format!("source-{office}")));
        runtime.block_on(join(&bundle, None, Arc::new(SystemStorage), &state, Arc::clone(&clock)))?;
        identities.push(Identity::load(&SystemStorage, &state)?);
    }
    let sources = runtime.block_on(connect(identities, &clock))?;
    let (cpu, start) = (server.cpu_time()?, Instant::now());
    let mut acks_ms = runtime.block_on(async {
        let first = tokio::time::Instant::now();
        let tasks: Vec<_> = sources
            .into_iter()
            .enumerate()
            .map(|(at, source)| tokio::spawn(source.run(first + INTERVAL.mul_f64(at as f64 / offices as f64))))
            .collect();
        let mut acks = Vec::new();
        for task in tasks {
            acks.extend(task.await??);
        }
        anyhow::Ok(acks)
    })?;
    let (time, cpu) = (start.elapsed(), server.cpu_time()?.saturating_sub(cpu));
    let peak_bytes = server.peak_memory()?;
    server.stop()?;
    acks_ms.sort_by(f64::total_cmp);
    Ok(Taken { acks_ms, time, cpu, peak_bytes })
}

/// Connects all and opens their groups, some at a time: a line is closed where nothing is heard for a minute.
async fn connect(identities: Vec<Identity>, clock: &Arc<dyn Clock>) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    let mut waiting = identities.into_iter().enumerate().peekable();
    while waiting.peek().is_some() {
        let some = waiting.by_ref().take(CONNECTED_AT_ONCE);
        let tasks: Vec<_> =
            some.map(|(office, identity)| tokio::spawn(Source::start(identity, office, Arc::clone(clock)))).collect();
        for task in tasks {
            sources.push(task.await??);
        }
    }
    Ok(sources)
}

/// An office with a group that is open.
struct Source {
    // What is dropped is closed.
    _line: Box<dyn Line>,
    _connector: QuicConnector,
    control: Control,
    frames: FrameStream,
    group: GroupId,
    generation: Generation,
    newest: Option<Predecessor>,
    clock: Arc<dyn Clock>,
}

impl Source {
    async fn start(identity: Identity, office: usize, clock: Arc<dyn Clock>) -> Result<Self> {
        let connector = QuicConnector::new(identity, Arc::clone(&clock))?;
        let line = connector.line().await?;
        let mut control = line.open_control().await?;
        let time = Timestamp(clock.wall_ms());
        say(&mut control, &SourceMessage::Hello { version: PROTOCOL_VERSION, software: "bench".into(), time }).await?;
        let TargetMessage::Welcome { .. } = hear(&mut control).await? else { bail!("not welcome") };
        let mut group = [9; 16];
        group[..8].copy_from_slice(&(office as u64).to_le_bytes());
        let group = GroupId(group);
        let open = OpenGroup {
            group,
            name: "main".into(),
            generation: None,
            acked: vec![],
            sent: vec![],
            parts: None,
            parts_sent: vec![],
            anew: false,
            instance: Instance { process: [1; 16], host: "bench".into() },
            envelope: Envelope { key: KeyId([1; 8]), encapsulated: vec![2; 32], sealed: vec![3; 48] },
            volumes: volumes(),
        };
        say(&mut control, &SourceMessage::OpenGroup(open)).await?;
        let TargetMessage::GroupOpened(opened) = hear(&mut control).await? else { bail!("the group is not opened") };
        let mut frames = line.open_frames().await?;
        frames.write_all(&group.0).await?;
        let generation = opened.generation;
        Ok(Self { _line: line, _connector: connector, control, frames, group, generation, newest: None, clock })
    }

    /// Sends the points, the first at `first`; how long each ack took, in milliseconds.
    async fn run(mut self, first: tokio::time::Instant) -> Result<Vec<f64>> {
        let mut ticks = interval_at(first, INTERVAL);
        let mut acks = Vec::new();
        for _ in 0..POINTS {
            ticks.tick().await;
            let (bytes, point) = self.point();
            let start = Instant::now();
            self.frames.write_all(&bytes).await?;
            self.frames.flush().await?;
            loop {
                match hear(&mut self.control).await? {
                    TargetMessage::Acked { head, .. } if head == point.head => break,
                    TargetMessage::GroupRefused { reason, .. } => bail!("refused: {reason:?}"),
                    _ => {}
                }
            }
            acks.push(start.elapsed().as_secs_f64() * 1e3);
            self.newest = Some(point);
        }
        Ok(acks)
    }

    fn point(&self) -> (Vec<u8>, Predecessor) {
        let epoch = Epoch(self.newest.map_or(0, |newest| newest.head.epoch.0) + 1);
        let attempt = AttemptId(cdp_seams::random::array(&SystemRandom));
        let sealer = Sealer::new(self.group, epoch, self.generation, attempt, &DataKey::new([3; 32]));
        let mut frames = vec![sealer.begin(&Begin { key: KeyId([1; 8]), volumes: volumes() })];
        for sequence in 1..=FRAMES {
            let mut content = vec![0; FRAME_BLOCKS as usize * BLOCK_BYTES];
            cdp_tests::files::noise(epoch.0 * FRAMES + sequence, &mut content);
            let start = (epoch.0 * 7919 + sequence * 104_729) as u32 % (VOLUME_BLOCKS - FRAME_BLOCKS);
            let extents = vec![Extent { start: Block(start), count: FRAME_BLOCKS }];
            frames.push(sealer.content(VolumeSlot(0), Sequence(sequence), extents, &content));
        }
        let mut list = FrameListHasher::default();
        for bytes in &frames {
            list.push(&frame::hash(bytes));
        }
        let commit = Commit {
            predecessor: self.newest,
            frames: list.list(),
            parts: None,
            first_epoch: epoch,
            after_rollback_to: None,
            class: Class::Crash,
            cut_time: Timestamp(self.clock.wall_ms()),
            meters: Meters { frame_bytes: frames.iter().map(|frame| frame.len() as u64).sum(), ..Meters::default() },
            label: None,
            volumes: vec![],
            layouts: Vec::new(),
        };
        frames.push(sealer.record(Kind::Commit, Sequence(FRAMES + 1), commit.encode()));
        let hash = frame::hash(frames.last().expect("the commit"));
        (frames.concat(), Predecessor { head: Head { epoch, hash }, attempt })
    }
}

fn volumes() -> Vec<Volume> {
    let size_bytes = u64::from(VOLUME_BLOCKS) * BLOCK_BYTES as u64;
    vec![Volume { slot: VolumeSlot(0), size_bytes, name: "data".into() }]
}

async fn say(control: &mut Control, message: &SourceMessage) -> Result<()> {
    Ok(write_packet(&mut *control.send, &message::encode(message)).await?)
}

async fn hear(control: &mut Control) -> Result<TargetMessage> {
    let bytes = read_packet(&mut *control.receive, MESSAGE_BYTES_MAX).await?;
    message::decode(&bytes).context("a message")
}
