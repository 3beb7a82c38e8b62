//! How long a flip takes, its drain included, on large volumes: against their size and the number of their dirty blocks.
//!
//! Beside it stands a look at every word for the same marks, which is what a drain would be without the summaries; it
//! takes nothing out, so it is cheap for what it is. The volumes are sparse files behind loop devices: what is written
//! is little, and a million blocks are dirtied by zeroing what is a hole already. Caches are cold for each figure.

use crate::tracker::{attach, detach};
use crate::{machine, median};
use anyhow::{Context, Result, ensure};
use cdp_protocol::units::BLOCK_BYTES;
use cdp_source::tracker::Tracker;
use cdp_source::tracker::ebpf::EbpfTracker;
use cdp_source::tracker::memory::kernel_memory_bytes;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::tool;
use rustix::fs::{FallocateFlags, fallocate};
use serde_json::Value;
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

const VOLUMES: [(&str, u64); 2] = [("1 TiB", 1 << 40), ("15.9 TiB", 16_281 << 30)];
const DIRTY: [u64; 4] = [0, 100, 10_000, 1_000_000];
/// More than this are dirtied by zeroing.
const WRITTEN_MAX: u64 = 10_000;
const ROUNDS: u64 = 3;
/// Above this a bit stands for four blocks.
const GRANULES_ABOVE: u64 = 8 << 40;
/// More than any cache, in lines.
const CACHE_BYTES: usize = 512 << 20;
const LINE_BYTES: usize = 64;

pub(crate) fn run(folder: &Path) -> Result<()> {
    let memory = machine::memory_folder()?;
    println!(
        "\n| volume, its maps | dirty blocks | flip and drain, median of {ROUNDS}, ms | every word looked at, ms |"
    );
    println!("|---|---|---|---|");
    for (name, bytes) in VOLUMES {
        let device = LoopDevice::new(&memory.path().join("drain.img"), bytes)?;
        let others = maps()?;
        let mut tracker = attach(device.node(), folder)?;
        let kept: u64 = maps()?.iter().filter(|map| !others.contains(map)).map(|map| map.bytes).sum();
        let (kept, foretold) = (kept >> 20, kernel_memory_bytes(&[bytes]) >> 20);
        // The first set of a new tracking is every block; that is not what is measured.
        tracker.take_recovered();
        tracker.flip()?;
        for dirty in DIRTY {
            let times = (0..ROUNDS).map(|round| times(&mut tracker, &device, bytes, dirty, round));
            let times: Vec<Times> = times.collect::<Result<_>>()?;
            let middle = |figure: &dyn Fn(&Times) -> f64| median(&times.iter().map(figure).collect::<Vec<_>>());
            let (flip, look) = (middle(&|times| times.flip_ms), middle(&|times| times.look_ms));
            println!("| {name}, {kept} MiB ({foretold} foretold at most) | {dirty} | {flip:.2} | {look:.1} |");
        }
        detach(tracker, folder)?;
        let file = device.file().to_owned();
        drop(device);
        std::fs::remove_file(file)?;
    }
    Ok(())
}

struct Times {
    flip_ms: f64,
    look_ms: f64,
}

fn times(tracker: &mut EbpfTracker, device: &LoopDevice, bytes: u64, dirty: u64, round: u64) -> Result<Times> {
    // As it is when all is acked.
    tracker.retain_unacked(&[<_>::default()])?;
    scatter(device, bytes / BLOCK_BYTES as u64, dirty, round)?;
    let expected = if bytes > GRANULES_ABOVE { 4 * dirty } else { dirty };
    cool();
    let start = Instant::now();
    let marked = tracker.marked();
    let look_ms = start.elapsed().as_secs_f64() * 1e3;
    ensure!(marked[0].len() == expected, "{} blocks are marked, not {expected}", marked[0].len());
    cool();
    let start = Instant::now();
    let drained = tracker.flip()?;
    let flip_ms = start.elapsed().as_secs_f64() * 1e3;
    ensure!(drained == marked, "a flip gave {} blocks of {expected}", drained[0].len());
    Ok(Times { flip_ms, look_ms })
}

/// Dirties `count` of the volume's `blocks`, as far from each other as can be.
fn scatter(device: &LoopDevice, blocks: u64, count: u64, round: u64) -> Result<()> {
    let file = File::options().write(true).open(device.node())?;
    let content = cdp_tests::files::content(round + 1, BLOCK_BYTES);
    for number in 0..count {
        let at = (number * (blocks / count) + round) * BLOCK_BYTES as u64;
        if count > WRITTEN_MAX {
            fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, BLOCK_BYTES as u64)?;
        } else {
            file.write_all_at(&content, at)?;
        }
    }
    Ok(file.sync_all()?)
}

/// Fills the processor's caches with something else.
fn cool() {
    let mut other = vec![0_u8; CACHE_BYTES];
    other.iter_mut().step_by(LINE_BYTES).for_each(|byte| *byte = 1);
    black_box(&other);
}

/// A map in the kernel, and what it takes of memory.
#[derive(PartialEq, Eq)]
struct MapSize {
    id: u64,
    bytes: u64,
}

fn maps() -> Result<Vec<MapSize>> {
    let list: Value = serde_json::from_str(&tool("bpftool", &["--json", "map", "show"])?)?;
    let map = |entry: &Value| Some(MapSize { id: entry["id"].as_u64()?, bytes: entry["bytes_memlock"].as_u64()? });
    Ok(list.as_array().context("bpftool's list")?.iter().filter_map(map).collect())
}
