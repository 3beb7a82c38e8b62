//! What the tracker costs whoever writes: random writes with and without it, and what its programs take (`programs`).

use crate::{median, programs};
use anyhow::{Context, Result};
use cdp_protocol::units::{GroupId, VolumeSlot};
use cdp_seams::storage::SystemStorage;
use cdp_source::tracker::ebpf::{self, BPFFS, EbpfOptions, EbpfTracker};
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::tool;
use cdp_tests::zram_device::{self, ZramDevice};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

const GROUP: GroupId = GroupId([0xbe; 16]);
const ROUNDS: usize = 5;
const SECONDS: u32 = 3;
const LOOP_MIB: u32 = 1024;
const ZRAM_MIB: u32 = 256;

/// Attaches the tracker to a device.
pub(crate) fn attach(node: &Path, folder: &Path) -> Result<EbpfTracker> {
    let volumes = vec![(VolumeSlot(0), node.to_owned())];
    Ok(EbpfTracker::open(&EbpfOptions::new(GROUP, volumes, folder.to_owned(), Arc::new(SystemStorage)))?)
}

/// Takes the tracker off again, pins and all.
pub(crate) fn detach(tracker: EbpfTracker, folder: &Path) -> Result<()> {
    drop(tracker);
    Ok(ebpf::remove(Path::new(BPFFS), folder, &SystemStorage, GROUP)?)
}

pub(crate) fn run(folder: &Path) -> Result<()> {
    println!(
        "\n| random 4 KiB writes, depth 8, median of {ROUNDS} pairs | IOPS without | with | ratio, pair by pair |"
    );
    println!("|---|---|---|---|");
    let device = LoopDevice::new(&folder.join("tracker.img"), u64::from(LOOP_MIB) << 20)?;
    with_and_without("loop over a file on the disk", device.node(), LOOP_MIB, folder)?;
    drop(device);
    if zram_device::is_there("writes to a bio-based device") {
        let device = ZramDevice::new(u64::from(ZRAM_MIB) << 20)?;
        with_and_without("zram", device.node(), ZRAM_MIB, folder)?;
    }
    programs::run(folder)
}

fn with_and_without(what: &str, node: &Path, mib: u32, folder: &Path) -> Result<()> {
    // Once over all of it, so that no run pays for its allocation.
    let (output, count) = (format!("of={}", node.display()), format!("count={mib}"));
    tool("dd", &["if=/dev/urandom", &output, "bs=1M", &count, "oflag=direct", "status=none"])?;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let tracker = attach(node, folder)?;
        with.push(random_writes(node, SECONDS)?);
        detach(tracker, folder)?;
        without.push(random_writes(node, SECONDS)?);
    }
    let ratios: Vec<f64> = with.iter().zip(&without).map(|(with, without)| with / without).collect();
    let (low, high) =
        ratios.iter().fold((f64::MAX, f64::MIN), |(low, high), ratio| (low.min(*ratio), high.max(*ratio)));
    let (without, with, ratio) = (median(&without), median(&with), median(&ratios));
    println!("| {what} | {without:.0} | {with:.0} | {ratio:.3} ({low:.3} to {high:.3}) |");
    Ok(())
}

/// Random writes of a block each for as many seconds; gives how many a second.
pub(crate) fn random_writes(node: &Path, seconds: u32) -> Result<f64> {
    let output = tool(
        "fio",
        &[
            "--name=writes",
            &format!("--filename={}", node.display()),
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=8",
            "--ioengine=io_uring",
            "--direct=1",
            "--time_based",
            &format!("--runtime={seconds}"),
            "--output-format=json",
        ],
    )?;
    let report: Value = serde_json::from_str(output.get(output.find('{').unwrap_or(0)..).unwrap_or(""))?;
    report["jobs"][0]["write"]["iops"].as_f64().context("iops in fio's report")
}
