//! The history that `scale` measures: many small points over 30 days on a volume of 1 TiB, through the target's own writer.
//!
//! What a block holds at a point is a function of the two, so that every read is checked and nothing has to be remembered. Only
//! the generator may do this: it syncs once in many points, and seals under a key that it made up.

use anyhow::{Context, Result};
use cdp_protocol::codec::{Draft, FrameListHasher, Sealer};
use cdp_protocol::escrow::Envelope;
use cdp_protocol::frame::{self, Encoding, Kind};
use cdp_protocol::limits::{CONTENT_BLOCKS_MAX, HOLE_BLOCKS_MAX};
use cdp_protocol::packer::{Packer, Packing};
use cdp_protocol::record::{Begin, Commit, Meters, PartChain, PartEnd, Predecessor, Volume};
use cdp_protocol::seal::DataKey;
use cdp_protocol::session::lineage::Line;
use cdp_protocol::units::{
    AttemptId, BLOCK_BYTES, Block, Class, Epoch, Extent, FrameHash, Generation, GroupId, Head, KeyId, Sequence,
    Timestamp, VolumeSlot,
};
use cdp_seams::random::{SimRandom, array};
use cdp_seams::storage::SystemStorage;
use cdp_target::journal::{GroupIdentity, GroupJournal, JournalLimits};
use std::path::Path;
use std::sync::Arc;

pub(super) const SLOT: VolumeSlot = VolumeSlot(0);
pub(super) const DAY_MS: i64 = 86_400_000;
pub(super) const DAYS: u64 = 30;
const GROUP: GroupId = GroupId([7; 16]);
const GENERATION: Generation = Generation(1);
const VOLUME_BLOCKS: u32 = 1 << 28;
/// Stretches of content, spread evenly; what is between them is zeros.
const PLACES: u32 = 512;
const PLACE_BLOCKS: u32 = 1024;
const STRIDE_BLOCKS: u32 = VOLUME_BLOCKS / PLACES;
/// One of so many places is the database's, which all later writes go to.
const DATABASE_EVERY: u32 = 4;
const DATABASE_BLOCKS: u32 = PLACES / DATABASE_EVERY * PLACE_BLOCKS;
/// Places that a part of the first copy has.
const PART_PLACES: u32 = 32;
const POINTS_A_SYNC: u64 = 1000;
/// 2026-11-10, a midnight.
const START_MS: i64 = 1_794_268_800_000;

pub(super) fn key() -> DataKey {
    DataKey::new([3; 32])
}

/// What there is in the files.
#[derive(Clone, Copy)]
pub(super) struct Plan {
    /// Points that the 30 days have.
    pub(super) points: u64,
    /// zstd's level; lz4 where there is none.
    pub(super) level: Option<u8>,
}

impl Plan {
    /// When point `epoch` was received.
    pub(super) fn received(self, epoch: u64) -> Timestamp {
        Timestamp(START_MS + (epoch * DAYS * DAY_MS as u64 / self.points) as i64)
    }

    pub(super) const fn points_a_day(self) -> u64 {
        self.points / DAYS
    }

    fn packer(self) -> Packer {
        Packer::new(self.level.map_or(Packing::Lz4, Packing::zstd))
    }
}

/// A block of the database by its number there.
pub(super) const fn database_block(number: u32) -> u32 {
    (number / PLACE_BLOCKS) * DATABASE_EVERY * STRIDE_BLOCKS + number % PLACE_BLOCKS
}

/// A block that was written by the first copy, and by nothing later.
pub(super) fn file_block(random: &SimRandom) -> u32 {
    let place = random.below(u64::from(PLACES / DATABASE_EVERY)) as u32 * DATABASE_EVERY;
    let place = place + 1 + random.below(u64::from(DATABASE_EVERY) - 1) as u32;
    place * STRIDE_BLOCKS + random.below(u64::from(PLACE_BLOCKS)) as u32
}

/// A block of the database, a few of them far more often than others: by the third power, and not next to each other.
pub(super) fn skewed(random: &SimRandom) -> u32 {
    let share = random.below(1 << 32) as f64 / f64::from(u32::MAX);
    let rank = (f64::from(DATABASE_BLOCKS) * share.powi(3)) as u32;
    rank.wrapping_mul(40_503) % DATABASE_BLOCKS
}

/// What point `epoch` writes, by numbers within the database.
fn written(epoch: u64) -> Vec<u32> {
    let random = SimRandom::new(epoch.wrapping_mul(0x5851_f42d));
    let mut numbers: Vec<u32> = (0..2 + random.below(3)).map(|_| skewed(&random)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// The point that wrote each block of the database last, as of point `epoch`.
pub(super) fn last_writes(epoch: u64) -> Vec<u32> {
    let mut last = vec![1; DATABASE_BLOCKS as usize];
    for epoch in 2..=epoch {
        for number in written(epoch) {
            last[number as usize] = epoch as u32;
        }
    }
    last
}

/// The first bytes of a block.
pub(super) fn stamp(block: u32, epoch: u64) -> [u8; 16] {
    let mut stamp = [0; 16];
    stamp[..8].copy_from_slice(&u64::from(block).to_le_bytes());
    stamp[8..].copy_from_slice(&epoch.to_le_bytes());
    stamp
}

/// Compresses to about half.
fn fill(block: u32, epoch: u64, bytes: &mut [u8]) {
    let random = SimRandom::new((u64::from(block) << 32) ^ epoch);
    let (noise, text) = bytes.split_at_mut(BLOCK_BYTES / 2);
    noise.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
    noise[..16].copy_from_slice(&stamp(block, epoch));
    text.chunks_mut(64).for_each(|line| line.fill(random.next() as u8));
}

/// A journal that is written.
pub(super) struct History {
    pub(super) journal: GroupJournal,
    plan: Plan,
    newest: Option<Predecessor>,
    parts: Option<PartChain>,
    packer: Packer,
}

impl History {
    pub(super) fn create(folder: &Path, plan: Plan) -> Result<Self> {
        let envelope = Envelope { key: KeyId([1; 8]), encapsulated: vec![2; 32], sealed: vec![3; 48] };
        let identity = GroupIdentity { group: GROUP, office: "branch".into(), name: "main".into(), envelope };
        let mut journal = GroupJournal::create(Arc::new(SystemStorage), folder, identity, JournalLimits::default())?;
        journal.begin(Line { generation: GENERATION, after: None, from: None })?;
        Ok(Self { journal, plan, newest: None, parts: None, packer: plan.packer() })
    }

    pub(super) fn open(folder: &Path, plan: Plan) -> Result<Self> {
        let (journal, _) = GroupJournal::open(Arc::new(SystemStorage), folder, JournalLimits::default())?;
        let newest = journal.chain().head().map(|(head, attempt)| Predecessor { head, attempt });
        Ok(Self { journal, plan, newest, parts: None, packer: plan.packer() })
    }

    /// The newest point's number; 0 where there is none.
    pub(super) fn newest(&self) -> u64 {
        self.newest.map_or(0, |newest| newest.head.epoch.0)
    }

    /// Point 1: 1 TiB, of which all but the places is zeros, in parts.
    pub(super) fn first_copy(&mut self) -> Result<()> {
        for first in (0..PLACES).step_by(PART_PLACES as usize) {
            let mut attempt = Attempt::new(1, u64::from(first));
            for place in first..first + PART_PLACES {
                let start = place * STRIDE_BLOCKS;
                for from in (start..start + PLACE_BLOCKS).step_by(CONTENT_BLOCKS_MAX) {
                    let blocks: Vec<u32> = (from..from + CONTENT_BLOCKS_MAX as u32).collect();
                    attempt.content(&mut self.packer, &blocks);
                }
                let (from, end) = (start + PLACE_BLOCKS, start + STRIDE_BLOCKS);
                let holes = (from..end).step_by(HOLE_BLOCKS_MAX as usize);
                attempt.holes(holes.map(|at| (at, HOLE_BLOCKS_MAX.min(end - at))).collect());
            }
            let (predecessor, frames) = (self.parts, attempt.list.list());
            let end = attempt.end(Kind::PartEnd, PartEnd { predecessor, frames }.encode());
            self.append(&attempt)?;
            self.parts = Some(PartChain { count: self.parts.map_or(1, |parts| parts.count + 1), hash: end });
        }
        self.commit(Attempt::new(1, u64::from(PLACES)))
    }

    /// The next point, in the middle of a day's work.
    pub(super) fn point(&mut self) -> Result<()> {
        let epoch = self.newest() + 1;
        let mut attempt = Attempt::new(epoch, 0);
        attempt.content(&mut self.packer, &written(epoch).into_iter().map(database_block).collect::<Vec<_>>());
        self.commit(attempt)
    }

    /// Points up to `epoch`, durable.
    pub(super) fn points_up_to(&mut self, epoch: u64) -> Result<()> {
        while self.newest() < epoch {
            self.point()?;
            if self.newest().is_multiple_of(POINTS_A_SYNC) {
                self.journal.sync()?;
            }
        }
        Ok(self.journal.sync()?)
    }

    fn commit(&mut self, mut attempt: Attempt) -> Result<()> {
        let epoch = attempt.sealer.epoch();
        let received = self.plan.received(epoch.0);
        let frame_bytes = attempt.frames.iter().map(|frame| frame.len() as u64).sum();
        let commit = Commit {
            predecessor: self.newest,
            frames: attempt.list.list(),
            parts: self.parts.take(),
            first_epoch: epoch,
            after_rollback_to: None,
            class: Class::Crash,
            cut_time: Timestamp(received.0 - 200),
            meters: Meters { frame_bytes, ..Meters::default() },
            label: None,
            volumes: vec![],
            layouts: Vec::new(),
        };
        let hash = attempt.end(Kind::Commit, commit.encode());
        self.append(&attempt)?;
        self.newest = Some(Predecessor { head: Head { epoch, hash }, attempt: attempt.sealer.attempt() });
        Ok(())
    }

    fn append(&mut self, attempt: &Attempt) -> Result<()> {
        let received = self.plan.received(attempt.sealer.epoch().0);
        for bytes in &attempt.frames {
            let frame = frame::decode(&GROUP, bytes).context("a frame just made")?;
            self.journal.append(&frame, received)?;
        }
        Ok(())
    }
}

/// The frames of an attempt.
struct Attempt {
    sealer: Sealer,
    list: FrameListHasher,
    frames: Vec<Vec<u8>>,
}

impl Attempt {
    fn new(epoch: u64, part: u64) -> Self {
        let attempt = AttemptId(array(&SimRandom::new((epoch << 20) ^ part)));
        let sealer = Sealer::new(GROUP, Epoch(epoch), GENERATION, attempt, &key());
        let size_bytes = u64::from(VOLUME_BLOCKS) * BLOCK_BYTES as u64;
        let volumes = vec![Volume { slot: SLOT, size_bytes, name: "data".into() }];
        let begin = sealer.begin(&Begin { key: KeyId([1; 8]), volumes });
        let mut attempt = Self { sealer, list: FrameListHasher::default(), frames: Vec::new() };
        attempt.push(begin);
        attempt
    }

    fn next(&self) -> Sequence {
        Sequence(self.frames.len() as u64)
    }

    fn push(&mut self, frame: Vec<u8>) {
        self.list.push(&frame::hash(&frame));
        self.frames.push(frame);
    }

    /// A frame with these blocks, in order.
    fn content(&mut self, packer: &mut Packer, blocks: &[u32]) {
        let epoch = self.sealer.epoch().0;
        let mut content = vec![0; blocks.len() * BLOCK_BYTES];
        blocks.iter().zip(content.chunks_exact_mut(BLOCK_BYTES)).for_each(|(block, bytes)| fill(*block, epoch, bytes));
        let mut extents: Vec<Extent> = Vec::new();
        for block in blocks {
            match extents.last_mut() {
                Some(last) if last.end() == u64::from(*block) => last.count += 1,
                _ => extents.push(Extent { start: Block(*block), count: 1 }),
            }
        }
        let mut draft = Draft::default();
        draft.push(&content);
        let frame = self.sealer.content_of(packer, SLOT, self.next(), extents, draft);
        self.push(frame.to_vec());
    }

    fn holes(&mut self, runs: Vec<(u32, u32)>) {
        let extents = runs.into_iter().map(|(start, count)| Extent { start: Block(start), count }).collect();
        self.push(self.sealer.bare(Encoding::Hole, SLOT, self.next(), extents));
    }

    fn end(&mut self, kind: Kind, record: Vec<u8>) -> FrameHash {
        let frame = self.sealer.record(kind, self.next(), record);
        let hash = frame::hash(&frame);
        self.frames.push(frame);
        hash
    }
}
