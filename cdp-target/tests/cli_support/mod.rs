//! A store with a group in it, the program over it, and a server of it.

#![allow(dead_code, reason = "each test uses a part")]
#![allow(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

use cdp_protocol::bundle::Bundle;
use cdp_protocol::codec::{FrameListHasher, Sealer};
use cdp_protocol::escrow;
use cdp_protocol::frame::{self, Encoding, Kind};
use cdp_protocol::record::{Begin, Commit, Meters, Predecessor, Volume};
use cdp_protocol::seal::DataKey;
use cdp_protocol::session::chain::Step;
use cdp_protocol::session::lineage::Line as GenerationLine;
use cdp_protocol::units::{
    AttemptId, BLOCK_BYTES, Block, Class, Epoch, Extent, Generation, GroupId, KeyId, Sequence, Timestamp, VolumeSlot,
};
use cdp_seams::random::{Random, SimRandom};
use cdp_seams::storage::SystemStorage;
use cdp_target::journal::{GroupIdentity, GroupJournal, JournalLimits};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use tempfile::TempDir;

pub(crate) const GROUP: GroupId = GroupId([7; 16]);
const KEY: DataKey = DataKey::new([3; 32]);
/// Blocks of the volume; its last one is there in half.
pub(crate) const BLOCKS: u32 = 600;
pub(crate) const SIZE_BYTES: u64 = BLOCKS as u64 * BLOCK_BYTES as u64 - 2048;
/// 2026-11-10T00:00:00Z; a point a minute from there.
pub(crate) const START_MS: i64 = 1_794_268_800_000;

pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cdp-target"));
    command.env_remove("CDP_TARGET_DATA").env_remove("CDP_LOG").stdin(Stdio::null());
    command
}

/// A store with one office, and with a group of three points where it was filled.
pub(crate) struct Store {
    pub(crate) folder: TempDir,
}

impl Store {
    pub(crate) fn new() -> Self {
        let store = Self { folder: tempfile::tempdir().expect("a folder") };
        store.done(&["init", "--listen", "127.0.0.1:0", "--name", "backup.example"]);
        store
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        program().args(arguments).env("CDP_TARGET_DATA", self.data()).output().expect("the program starts")
    }

    /// Runs a command that has to succeed; gives its stdout.
    pub(crate) fn done(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}");
        String::from_utf8(output.stdout).expect("text")
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.done(arguments)).expect("one JSON document")
    }

    /// Runs a command that has to fail by the user's mistake; the error has to hold `words`, and a hint has to follow.
    pub(crate) fn refused(&self, arguments: &[&str], words: &[&str]) {
        refused(&self.run(arguments), arguments, words);
    }

    /// Enrols an office while the store has a port, and gives its bundle.
    pub(crate) fn enroll(&self, office: &str) -> Bundle {
        let config = self.data().join("target.toml");
        let text = std::fs::read_to_string(&config).expect("configured");
        std::fs::write(&config, text.replace("127.0.0.1:0", "127.0.0.1:7443")).expect("written");
        let bundle = self.path(&format!("{office}.bundle"));
        self.done(&["enroll", office, "--output", bundle.to_str().expect("text")]);
        std::fs::write(&config, text).expect("written");
        Bundle::parse(&std::fs::read(&bundle).expect("written")).expect("a bundle")
    }

    /// Makes the group `paris/main` with three points, a minute apart; gives their images.
    pub(crate) fn fill(&self) -> Vec<Vec<u8>> {
        self.fill_within(JournalLimits::default())
    }

    /// The group `paris/main`, empty.
    fn journal(&self, limits: JournalLimits) -> GroupJournal {
        let bundle = self.enroll("paris");
        let envelope = escrow::seal(&GROUP, KeyId([1; 8]), &KEY, &bundle.escrow_public).expect("sealed");
        let identity = GroupIdentity { group: GROUP, office: "paris".into(), name: "main".into(), envelope };
        let folder = self.data().join(format!("offices/{}/groups/{GROUP}", bundle.office));
        let mut journal = GroupJournal::create(Arc::new(SystemStorage), &folder, identity, limits).expect("made");
        journal.begin(GenerationLine { generation: Generation(1), after: None, from: None }).expect("begun");
        journal
    }

    /// The same with so many points that write the same 300 blocks, with content that does not compress, in segments of 1 MiB.
    pub(crate) fn fill_with_noise(&self, points: u8) -> Vec<Vec<u8>> {
        let mut journal = self.journal(JournalLimits { segment_bytes_max: 1 << 20 });
        let extent = |start, count| Extent::new(Block(start), count).expect("an extent");
        let mut image = vec![0; SIZE_BYTES as usize];
        let mut images = Vec::new();
        for epoch in 1..=points {
            let noise = SimRandom::new(u64::from(epoch));
            noise.fill(&mut image[..300 * BLOCK_BYTES]);
            let sealer = Sealer::new(GROUP, Epoch(epoch.into()), Generation(1), AttemptId([epoch; 16]), &KEY);
            let mut frames = vec![sealer.begin(&Begin { key: KeyId([1; 8]), volumes: vec![volume()] })];
            if epoch == 1 {
                frames.push(sealer.bare(Encoding::Hole, VolumeSlot(0), Sequence(1), vec![extent(300, BLOCKS - 300)]));
            }
            for start in (0..300).step_by(30) {
                let content = &image[start as usize * BLOCK_BYTES..][..30 * BLOCK_BYTES];
                let sequence = Sequence(frames.len() as u64);
                frames.push(sealer.content(VolumeSlot(0), sequence, vec![extent(start, 30)], content));
            }
            let predecessor = journal.chain().head().map(|(head, attempt)| Predecessor { head, attempt });
            end(&mut frames, &sealer, epoch, predecessor, cut_time(epoch));
            take(&mut journal, &frames, epoch);
            images.push(image.clone());
        }
        images
    }

    /// The same with four points of nothing but holes; the source's clock is set back by so much after the second.
    pub(crate) fn fill_with_a_clock_set_back(&self, back_ms: i64) {
        let mut journal = self.journal(JournalLimits::default());
        for epoch in 1..=4_u8 {
            let sealer = Sealer::new(GROUP, Epoch(epoch.into()), Generation(1), AttemptId([epoch; 16]), &KEY);
            let all = vec![Extent::new(Block(0), BLOCKS).expect("an extent")];
            let mut frames = vec![
                sealer.begin(&Begin { key: KeyId([1; 8]), volumes: vec![volume()] }),
                sealer.bare(Encoding::Hole, VolumeSlot(0), Sequence(1), all),
            ];
            let predecessor = journal.chain().head().map(|(head, attempt)| Predecessor { head, attempt });
            let back_ms = if epoch > 2 { back_ms } else { 0 };
            end(&mut frames, &sealer, epoch, predecessor, Timestamp(cut_time(epoch).0 - back_ms));
            take(&mut journal, &frames, epoch);
        }
    }

    /// The same with a point for each list of volumes, whole: `(name, content)`, in slots of their order. Blocks of zeros are holes.
    pub(crate) fn fill_with_volumes(&self, points: &[Vec<(&str, &[u8])>]) {
        let mut journal = self.journal(JournalLimits::default());
        for (epoch, volumes) in (1..).zip(points) {
            let sealer = Sealer::new(GROUP, Epoch(epoch.into()), Generation(1), AttemptId([epoch; 16]), &KEY);
            let slots = || (0..).map(VolumeSlot).zip(volumes);
            let named = |(slot, (name, content)): (VolumeSlot, &(&str, &[u8]))| Volume {
                slot,
                size_bytes: content.len() as u64,
                name: (*name).into(),
            };
            let mut frames = vec![sealer.begin(&Begin { key: KeyId([1; 8]), volumes: slots().map(named).collect() })];
            for (slot, (_, content)) in slots() {
                for (at, blocks) in content.chunks(32 * BLOCK_BYTES).enumerate() {
                    volume_frame(&sealer, &mut frames, slot, at as u32 * 32, blocks);
                }
            }
            let predecessor = journal.chain().head().map(|(head, attempt)| Predecessor { head, attempt });
            end(&mut frames, &sealer, epoch, predecessor, cut_time(epoch));
            take(&mut journal, &frames, epoch);
        }
    }

    pub(crate) fn fill_within(&self, limits: JournalLimits) -> Vec<Vec<u8>> {
        let key = KEY;
        let mut journal = self.journal(limits);
        let mut image = vec![0; SIZE_BYTES as usize];
        let mut images = Vec::new();
        for epoch in 1..=3_u8 {
            append(&mut journal, &key, epoch);
            let first = usize::from(epoch) * 10 * BLOCK_BYTES;
            image[first..first + 20 * BLOCK_BYTES].fill(epoch);
            let len = image.len();
            image[len - 2048..].fill(epoch);
            images.push(image.clone());
        }
        images
    }
}

/// Adds frames of up to 32 blocks from `first` on: a content frame, and one of the holes.
fn volume_frame(sealer: &Sealer, frames: &mut Vec<Vec<u8>>, slot: VolumeSlot, first: u32, content: &[u8]) {
    let (mut extents, mut holes, mut whole) = (Vec::new(), Vec::new(), Vec::new());
    for (block, bytes) in (first..).zip(content.chunks(BLOCK_BYTES)) {
        let one = Extent::new(Block(block), 1).expect("an extent");
        if bytes.iter().all(|byte| *byte == 0) {
            holes.push(one);
        } else {
            extents.push(one);
            whole.extend_from_slice(bytes);
            whole.resize(whole.len().next_multiple_of(BLOCK_BYTES), 0);
        }
    }
    let sequence = |frames: &[Vec<u8>]| Sequence(frames.len() as u64);
    if !extents.is_empty() {
        frames.push(sealer.content(slot, sequence(frames), merged(extents), &whole));
    }
    if !holes.is_empty() {
        frames.push(sealer.bare(Encoding::Hole, slot, sequence(frames), merged(holes)));
    }
}

/// Runs of single blocks as extents.
fn merged(blocks: Vec<Extent>) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for block in blocks {
        match extents.last_mut() {
            Some(last) if last.end() == u64::from(block.start.0) => last.count += 1,
            _ => extents.push(block),
        }
    }
    extents
}

/// One epoch: 20 blocks from ten times its number, and the last block; the first epoch covers all, as holes.
pub(crate) fn epoch_frames(key: &DataKey, epoch: u8, predecessor: Option<Predecessor>) -> Vec<Vec<u8>> {
    epoch_frames_like(key, epoch, epoch, predecessor)
}

/// The same with the blocks and the content of epoch `like`.
pub(crate) fn epoch_frames_like(key: &DataKey, epoch: u8, like: u8, predecessor: Option<Predecessor>) -> Vec<Vec<u8>> {
    let attempt = AttemptId([epoch; 16]);
    let sealer = Sealer::new(GROUP, Epoch(epoch.into()), Generation(1), attempt, key);
    let mut frames = vec![sealer.begin(&Begin { key: KeyId([1; 8]), volumes: vec![volume()] })];
    let extent = |start, count| Extent::new(Block(start), count).expect("an extent");
    if epoch == 1 {
        let holes = vec![extent(0, 10), extent(30, BLOCKS - 31)];
        frames.push(sealer.bare(Encoding::Hole, VolumeSlot(0), Sequence(1), holes));
    }
    let extents = vec![extent(u32::from(like) * 10, 20), extent(BLOCKS - 1, 1)];
    let content = vec![like; 21 * BLOCK_BYTES];
    frames.push(sealer.content(VolumeSlot(0), Sequence(frames.len() as u64), extents, &content));
    end(&mut frames, &sealer, epoch, predecessor, cut_time(epoch));
    frames
}

/// Points are a minute apart.
const fn cut_time(epoch: u8) -> Timestamp {
    Timestamp(START_MS + epoch as i64 * 60_000)
}

/// Adds the commit.
fn end(frames: &mut Vec<Vec<u8>>, sealer: &Sealer, epoch: u8, predecessor: Option<Predecessor>, cut_time: Timestamp) {
    let mut list = FrameListHasher::default();
    for bytes in frames.iter() {
        list.push(&frame::hash(bytes));
    }
    let commit = Commit {
        predecessor,
        frames: list.list(),
        parts: None,
        first_epoch: Epoch(epoch.into()),
        after_rollback_to: None,
        class: Class::Crash,
        cut_time,
        meters: Meters { cut_rounds: 2, cut_us: 1500, ..Meters::default() },
        label: None,
        volumes: vec![],
        layouts: Vec::new(),
    };
    frames.push(sealer.record(Kind::Commit, Sequence(frames.len() as u64), commit.encode()));
}

pub(crate) fn volume() -> Volume {
    Volume { slot: VolumeSlot(0), size_bytes: SIZE_BYTES, name: "root".into() }
}

pub(crate) fn append(journal: &mut GroupJournal, key: &DataKey, epoch: u8) {
    let predecessor = journal.chain().head().map(|(head, attempt)| Predecessor { head, attempt });
    take(journal, &epoch_frames(key, epoch, predecessor), epoch);
}

/// The target takes an epoch.
fn take(journal: &mut GroupJournal, frames: &[Vec<u8>], epoch: u8) {
    for bytes in frames {
        let frame = frame::decode(&GROUP, bytes).expect("a frame we made");
        let received = Timestamp(cut_time(epoch).0 + 200);
        let step = journal.append(&frame, received).expect("it follows");
        assert!(matches!(step, Step::Taken | Step::Committed(..)));
    }
    journal.sync().expect("synced");
}

pub(crate) fn refused(output: &Output, arguments: &[&str], words: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
    let (error, hint) = stderr.split_once('\n').expect("an error and a hint");
    assert!(error.starts_with("error: "), "{stderr}");
    assert!(hint.starts_with("hint: ") && hint.trim_end().lines().count() == 1, "{stderr}");
    for word in words {
        assert!(stderr.contains(word), "{word:?} is not in: {stderr}");
    }
    assert_eq!(output.stdout, b"", "no data where nothing was done");
}

/// A server of a store.
pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) address: String,
}

impl Server {
    pub(crate) fn start(store: &Store) -> Self {
        let mut child = program()
            .arg("serve")
            .env("CDP_TARGET_DATA", store.data())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let address = loop {
            let line = lines.next().expect("it says where it listens before it ends").expect("text");
            if let Some(address) = line.strip_prefix("listening on ") {
                break address.to_owned();
            }
        };
        // What it says later has to go somewhere.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    pub(crate) fn end(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
        assert!(self.child.wait().expect("it ends").success(), "SIGTERM is a clean end");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail where it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
