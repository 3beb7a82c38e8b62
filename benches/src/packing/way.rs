//! Ways to compress the content of frames, and what each comes to over some points.
//!
//! Frames are made as the source makes them: 32 blocks in block order, one sealed content. What is around the content is had
//! from real frames, so that only the content's length differs from way to way.

use super::workload::{Change, Point};
use anyhow::{Result, ensure};
use cdp_protocol::codec::Sealer;
use cdp_protocol::frame;
use cdp_protocol::limits::{CONTENT_BLOCKS_MAX, CONTENT_BYTES_MAX};
use cdp_protocol::record::{Begin, Commit, FrameList, Meters, Predecessor, Volume};
use cdp_protocol::seal::{DataKey, TAG_BYTES};
use cdp_protocol::units::{
    AttemptId, Block, Class, Epoch, Extent, FrameHash, Generation, GroupId, Head, KeyId, Sequence, Timestamp,
    VolumeSlot,
};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::time::Duration;
use zstd::zstd_safe::{CCtx, CParameter, DCtx};

const GROUP: GroupId = GroupId([1; 16]);
/// Bytes of a dictionary: half of a frame's content.
const DICTIONARY_BYTES: usize = 64 << 10;
/// Blocks whose content is kept since it was sent: 32 MiB.
const SENT_BLOCKS_MAX: usize = 8192;

#[derive(Clone, Copy)]
pub(crate) enum Way {
    Lz4,
    Zstd(i32),
    /// With a dictionary that was trained on the points before.
    Dictionary(i32),
    /// Against what the blocks held before, wherever that may be had from: the best a delta could be.
    OldContent(i32),
    /// Blocks that were sent as a whole before, and are still kept, against that; the others as a whole.
    SentContent(i32),
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lz4 => write!(f, "lz4"),
            Self::Zstd(level) => write!(f, "zstd {level}"),
            Self::Dictionary(level) => write!(f, "zstd {level}, trained dictionary"),
            Self::OldContent(level) => write!(f, "zstd {level}, delta to the old content"),
            Self::SentContent(level) => write!(f, "zstd {level}, delta to what was sent as a whole"),
        }
    }
}

/// What some points came to.
#[derive(Default)]
pub(crate) struct Packed {
    pub(crate) sent: u64,
    pub(crate) changed: u64,
    pub(crate) packing: Duration,
    pub(crate) unpacking: Duration,
}

impl Way {
    pub(crate) fn pack(self, before: &[Point], measured: &[Point]) -> Result<Packed> {
        let dictionary = match self {
            Self::Dictionary(_) => train(before),
            _ => Vec::new(),
        };
        let mut sent = Sent::default();
        if let Self::SentContent(_) = self {
            before.iter().flatten().for_each(|change| sent.keep(change));
        }
        let mut packed = Packed::default();
        for point in measured {
            packed.sent += around_a_point();
            packed.changed += (point.len() * cdp_protocol::units::BLOCK_BYTES) as u64;
            let (known, fresh): (Vec<_>, Vec<_>) = point.iter().partition(|change| sent.has(change.block));
            for changes in known.chunks(CONTENT_BLOCKS_MAX) {
                let base: Vec<u8> = changes.iter().flat_map(|change| sent.content(change.block)).copied().collect();
                self.frame(changes, &base, &mut packed)?;
            }
            for changes in fresh.chunks(CONTENT_BLOCKS_MAX) {
                let base = match self {
                    Self::OldContent(_) => changes.iter().flat_map(|change| &*change.old).copied().collect(),
                    Self::Dictionary(_) => dictionary.clone(),
                    _ => Vec::new(),
                };
                self.frame(changes, &base, &mut packed)?;
                if let Self::SentContent(_) = self {
                    for change in changes {
                        sent.keep(change);
                    }
                }
            }
        }
        Ok(packed)
    }

    /// Packs a frame, proves that it is had back, and counts it.
    fn frame(self, changes: &[&Change], base: &[u8], packed: &mut Packed) -> Result<()> {
        let content: Vec<u8> = changes.iter().flat_map(|change| &*change.new).copied().collect();
        let (fixed, lz4) = around_a_frame(changes, &content)?;
        let (stored, packing, unpacking) = match self {
            Self::Lz4 => lz4,
            Self::Zstd(level) | Self::Dictionary(level) | Self::OldContent(level) | Self::SentContent(level) => {
                zstd(&content, base, matches!(self, Self::Dictionary(_)), level)?
            }
        };
        packed.sent += (fixed + stored.min(content.len())) as u64;
        packed.packing += packing;
        packed.unpacking += unpacking;
        Ok(())
    }
}

/// Length, and time to pack and to unpack.
type Taken = (usize, Duration, Duration);

fn zstd(content: &[u8], base: &[u8], trained: bool, level: i32) -> Result<Taken> {
    let error = |code| anyhow::anyhow!(zstd::zstd_safe::get_error_name(code));
    let (mut out, mut back) = (Vec::with_capacity(2 * CONTENT_BYTES_MAX), Vec::with_capacity(CONTENT_BYTES_MAX));
    let (mut pack, mut unpack) = (CCtx::create(), DCtx::create());
    pack.set_parameter(CParameter::CompressionLevel(level)).map_err(error)?;
    pack.set_parameter(CParameter::ContentSizeFlag(false)).map_err(error)?;
    pack.set_parameter(CParameter::DictIdFlag(false)).map_err(error)?;
    if trained {
        // Loaded once for many frames, so it is no part of a frame's time.
        pack.load_dictionary(base).map_err(error)?;
        unpack.load_dictionary(base).map_err(error)?;
        pack.compress2(&mut out, &[0; 64]).map_err(error)?;
    }
    let start = cpu_time();
    if !trained && !base.is_empty() {
        pack.ref_prefix(base).map_err(error)?;
    }
    let len = pack.compress2(&mut out, content).map_err(error)?;
    let packed = cpu_time();
    if !trained && !base.is_empty() {
        unpack.ref_prefix(base).map_err(error)?;
    }
    unpack.decompress(&mut back, &out[..len]).map_err(error)?;
    ensure!(back == content, "the content is not had back");
    Ok((len, packed.saturating_sub(start), cpu_time().saturating_sub(packed)))
}

/// Bytes of a frame beside its stored content; and how lz4 does.
fn around_a_frame(changes: &[&Change], content: &[u8]) -> Result<(usize, Taken)> {
    let mut extents: Vec<Extent> = Vec::new();
    for change in changes {
        match extents.last_mut() {
            Some(last) if last.end() == u64::from(change.block) => last.count += 1,
            _ => extents.push(Extent { start: Block(change.block), count: 1 }),
        }
    }
    let bytes = sealer().content(VolumeSlot(0), Sequence(1), extents, content);
    let header = frame::decode_header(&GROUP, &bytes)?;
    let stored = (header.payload_len - header.digests_len) as usize - TAG_BYTES;
    let start = cpu_time();
    let packed = lz4_flex::block::compress(content);
    let between = cpu_time();
    let back = lz4_flex::block::decompress(&packed, content.len())?;
    ensure!(back == content, "the content is not had back");
    let (packing, unpacking) = (between.saturating_sub(start), cpu_time().saturating_sub(between));
    Ok((bytes.len() - stored, (stored, packing, unpacking)))
}

/// Bytes of a point's begin and commit.
fn around_a_point() -> u64 {
    let volumes = vec![Volume { slot: VolumeSlot(0), size_bytes: 1 << 30, name: "data".into() }];
    let begin = sealer().begin(&Begin { key: KeyId([1; 8]), volumes });
    let head = Head { epoch: Epoch(1), hash: FrameHash([1; 32]) };
    let commit = Commit {
        predecessor: Some(Predecessor { head, attempt: AttemptId([1; 16]) }),
        frames: FrameList { count: 1, hash: FrameHash([1; 32]) },
        parts: None,
        first_epoch: Epoch(2),
        after_rollback_to: None,
        class: Class::Crash,
        cut_time: Timestamp(1),
        meters: Meters::default(),
        label: None,
        volumes: vec![],
        layouts: Vec::new(),
    };
    let commit = sealer().record(frame::Kind::Commit, Sequence(2), commit.encode());
    (begin.len() + commit.len()) as u64
}

fn sealer() -> Sealer {
    Sealer::new(GROUP, Epoch(2), Generation(1), AttemptId([1; 16]), &DataKey::new([1; 32]))
}

/// A dictionary of what changed blocks look like. None where there are too few of them.
fn train(points: &[Point]) -> Vec<u8> {
    let samples: Vec<&[u8]> = points.iter().flatten().map(|change| &*change.new).collect();
    zstd::dict::from_samples(&samples, DICTIONARY_BYTES).unwrap_or_default()
}

/// Blocks as they were last sent as a whole, the newest ones.
#[derive(Default)]
struct Sent {
    blocks: HashMap<u32, Box<[u8]>>,
    order: VecDeque<u32>,
}

impl Sent {
    fn has(&self, block: u32) -> bool {
        self.blocks.contains_key(&block)
    }

    fn content(&self, block: u32) -> &[u8] {
        &self.blocks[&block]
    }

    fn keep(&mut self, change: &Change) {
        if self.blocks.insert(change.block, change.new.clone()).is_none() {
            self.order.push_back(change.block);
        }
        if self.order.len() > SENT_BLOCKS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.blocks.remove(&oldest);
        }
    }
}

/// Processor time of this thread.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
