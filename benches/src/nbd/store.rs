//! The store that `nbd` serves: a volume that is full to three quarters, and points that write to a part of it.

use anyhow::{Context, Result};
use cdp_protocol::bundle::Bundle;
use cdp_protocol::codec::{Draft, FrameListHasher, Sealer};
use cdp_protocol::escrow;
use cdp_protocol::frame::{self, Encoding, Kind};
use cdp_protocol::limits::{CONTENT_BLOCKS_MAX, HOLE_BLOCKS_MAX};
use cdp_protocol::packer::{Packer, Packing};
use cdp_protocol::record::{Begin, Commit, Meters, Predecessor, Volume};
use cdp_protocol::seal::DataKey;
use cdp_protocol::session::lineage::Line;
use cdp_protocol::units::{
    AttemptId, BLOCK_BYTES, Block, Class, Epoch, Extent, Generation, GroupId, KeyId, Sequence, Timestamp, VolumeSlot,
};
use cdp_seams::random::{Random, SimRandom};
use cdp_seams::storage::SystemStorage;
use cdp_target::journal::{GroupIdentity, GroupJournal, JournalLimits};
use cdp_tests::process::{program, run};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

/// Bytes of the volume: its content is six times what the server keeps decoded.
pub(super) const BYTES: u64 = 2 << 30;
/// Points, the first copy among them.
pub(super) const POINTS: u64 = 200;
/// Points of a long history: 30 days of one every 5 s.
pub(super) const LONG_POINTS: u64 = 500_000;
const POINTS_A_SYNC: u64 = 1000;
const GROUP: GroupId = GroupId([7; 16]);
const SLOT: VolumeSlot = VolumeSlot(0);
const BLOCKS: u32 = (BYTES / BLOCK_BYTES as u64) as u32;
const FULL_BLOCKS: u32 = BLOCKS / 4 * 3;
/// Runs of blocks that a point writes, and blocks of a run.
const RUNS: u64 = 16;
const RUN_BLOCKS: u32 = 8;
const ZSTD_LEVEL: u8 = 3;
const START_MS: i64 = 1_794_268_800_000;

pub(super) fn make(data: &Path) -> Result<()> {
    let data_text = data.to_str().context("a path of text")?;
    let target =
        |arguments: &[&str]| run(Command::new(program("cdp-target")).args(arguments).env("CDP_TARGET_DATA", data));
    target(&["init", "--listen", "127.0.0.1:7443"])?;
    let bundle = format!("{data_text}.bundle");
    target(&["enroll", "branch", "--output", &bundle])?;
    let bundle = Bundle::parse(&std::fs::read(&bundle)?).map_err(|error| anyhow::anyhow!("{error}"))?;
    let key = DataKey::new([3; 32]);
    let envelope = escrow::seal(&GROUP, KeyId([1; 8]), &key, &bundle.escrow_public)?;
    let identity = GroupIdentity { group: GROUP, office: "branch".into(), name: "main".into(), envelope };
    let folder = data.join(format!("offices/{}/groups/{GROUP}", bundle.office));
    let mut journal = GroupJournal::create(Arc::new(SystemStorage), &folder, identity, JournalLimits::default())?;
    journal.begin(Line { generation: Generation(1), after: None, from: None })?;
    let mut packer = Packer::new(Packing::zstd(ZSTD_LEVEL));
    for epoch in 1..=POINTS {
        append(&mut journal, &key, &mut packer, epoch)?;
        journal.sync()?;
    }
    Ok(())
}

/// Makes the history a long one: points of a few blocks each.
pub(super) fn lengthen(data: &Path) -> Result<()> {
    let offices = std::fs::read_dir(data.join("offices"))?.collect::<Result<Vec<_>, _>>()?;
    let [office] = offices.as_slice() else { anyhow::bail!("one office") };
    let folder = office.path().join(format!("groups/{GROUP}"));
    let (mut journal, _) = GroupJournal::open(Arc::new(SystemStorage), &folder, JournalLimits::default())?;
    let (key, mut packer) = (DataKey::new([3; 32]), Packer::new(Packing::zstd(ZSTD_LEVEL)));
    for epoch in POINTS + 1..=LONG_POINTS {
        append(&mut journal, &key, &mut packer, epoch)?;
        if epoch.is_multiple_of(POINTS_A_SYNC) {
            journal.sync()?;
        }
    }
    Ok(journal.sync()?)
}

/// A point, not synced: the first has all of the volume, the others a few runs of it, those of the long history a block here and there.
fn append(journal: &mut GroupJournal, key: &DataKey, packer: &mut Packer, epoch: u64) -> Result<()> {
    let random = SimRandom::new(epoch);
    let sealer = Sealer::new(GROUP, Epoch(epoch), Generation(1), AttemptId(u128::from(epoch).to_le_bytes()), key);
    let volumes = vec![Volume { slot: SLOT, size_bytes: BYTES, name: "data".into() }];
    let mut frames = vec![sealer.begin(&Begin { key: KeyId([1; 8]), volumes })];
    let mut content = |frames: &mut Vec<Vec<u8>>, start: u32, count: u32| {
        let mut bytes = vec![0; count as usize * BLOCK_BYTES];
        bytes.chunks_exact_mut(BLOCK_BYTES).for_each(|block| fill(&random, block));
        let mut draft = Draft::default();
        draft.push(&bytes);
        let extents = vec![Extent { start: Block(start), count }];
        frames.push(sealer.content_of(packer, SLOT, Sequence(frames.len() as u64), extents, draft).to_vec());
    };
    if epoch == 1 {
        for start in (0..FULL_BLOCKS).step_by(CONTENT_BLOCKS_MAX) {
            content(&mut frames, start, CONTENT_BLOCKS_MAX as u32);
        }
        for start in (FULL_BLOCKS..BLOCKS).step_by(HOLE_BLOCKS_MAX as usize) {
            let hole = vec![Extent { start: Block(start), count: HOLE_BLOCKS_MAX.min(BLOCKS - start) }];
            frames.push(sealer.bare(Encoding::Hole, SLOT, Sequence(frames.len() as u64), hole));
        }
    } else {
        let (runs, blocks) = if epoch > POINTS { (2, 1) } else { (RUNS, RUN_BLOCKS) };
        let mut starts: Vec<u32> = (0..runs).map(|_| random.below(u64::from(FULL_BLOCKS / blocks)) as u32).collect();
        starts.sort_unstable();
        starts.dedup();
        for start in starts {
            content(&mut frames, start * blocks, blocks);
        }
    }
    let mut list = FrameListHasher::default();
    for bytes in &frames {
        list.push(&frame::hash(bytes));
    }
    let predecessor = journal.chain().head().map(|(head, attempt)| Predecessor { head, attempt });
    let cut_time = Timestamp(START_MS + epoch as i64 * 5000);
    let commit = Commit {
        predecessor,
        frames: list.list(),
        parts: None,
        first_epoch: Epoch(epoch),
        after_rollback_to: None,
        class: Class::Crash,
        cut_time,
        meters: Meters::default(),
        label: None,
        volumes: vec![],
        layouts: Vec::new(),
    };
    frames.push(sealer.record(Kind::Commit, Sequence(frames.len() as u64), commit.encode()));
    for bytes in &frames {
        let frame = frame::decode(&GROUP, bytes).context("a frame just made")?;
        journal.append(&frame, Timestamp(cut_time.0 + 200))?;
    }
    Ok(())
}

/// Half noise, half text.
fn fill(random: &SimRandom, block: &mut [u8]) {
    let (noise, text) = block.split_at_mut(BLOCK_BYTES / 2);
    random.fill(noise);
    text.chunks_mut(64).for_each(|line| line.fill(random.next() as u8));
}
