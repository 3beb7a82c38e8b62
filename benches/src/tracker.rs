//! What the tracker costs: nanoseconds an event by the kernel's own accounting, and random writes with and without it.

use crate::median;
use anyhow::{Context, Result, ensure};
use cdp_protocol::units::{GroupId, VolumeSlot};
use cdp_seams::storage::SystemStorage;
use cdp_source::tracker::ebpf::{self, BPFFS, EbpfOptions, EbpfTracker};
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::tool;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

const GROUP: GroupId = GroupId([0xbe; 16]);
const ROUNDS: usize = 5;
const STATS: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Attaches the tracker to a loop device.
pub(crate) fn attach(device: &LoopDevice, folder: &Path) -> Result<EbpfTracker> {
    let volumes = vec![(VolumeSlot(0), device.node().to_owned())];
    Ok(EbpfTracker::open(&EbpfOptions::new(GROUP, volumes, folder.to_owned(), Arc::new(SystemStorage)))?)
}

/// Takes the tracker off again, pins and all.
pub(crate) fn detach(tracker: EbpfTracker, folder: &Path) -> Result<()> {
    drop(tracker);
    Ok(ebpf::remove(Path::new(BPFFS), folder, &SystemStorage, GROUP)?)
}

pub(crate) fn run(folder: &Path) -> Result<()> {
    let device = LoopDevice::new(&folder.join("tracker.img"), 1 << 30)?;
    // Once over the whole file, so that no run pays for its allocation.
    tool(
        "dd",
        &[
            "if=/dev/zero",
            &format!("of={}", device.node().display()),
            "bs=1M",
            "count=1024",
            "oflag=direct",
            "status=none",
        ],
    )?;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let tracker = attach(&device, folder)?;
        with.push(random_writes(&device)?);
        detach(tracker, folder)?;
        without.push(random_writes(&device)?);
    }
    let ratios: Vec<f64> = with.iter().zip(&without).map(|(with, without)| with / without).collect();
    println!("\n| random 4 KiB writes, depth 8 | IOPS, median of {ROUNDS} |\n|---|---|");
    println!("| without the tracker | {:.0} |\n| with it | {:.0} |", median(&without), median(&with));
    println!("| ratio, pair by pair | {:.3} ({}) |", median(&ratios), spread(&ratios));

    // Other groups may be tracked on this machine: only programs that were not there before are ours.
    let others = programs()?;
    std::fs::write(STATS, "1")?;
    let tracker = attach(&device, folder)?;
    random_writes(&device)?;
    let programs = programs();
    std::fs::write(STATS, "0")?;
    detach(tracker, folder)?;
    println!("\n| program | runs | ns a run |\n|---|---|---|");
    let (mut time_ns, mut writes) = (0.0, 0.0_f64);
    for Program { id, name, runs, run_ns } in programs? {
        if runs == 0.0 || others.iter().any(|other| other.id == id) {
            continue;
        }
        println!("| `{name}` | {runs} | {:.0} |", run_ns / runs);
        time_ns += run_ns;
        writes = writes.max(runs);
    }
    ensure!(writes > 0.0, "no program ran");
    println!("| a write, all of them together | | {:.0} |", time_ns / writes);
    Ok(())
}

fn spread(figures: &[f64]) -> String {
    let (low, high) =
        figures.iter().fold((f64::MAX, f64::MIN), |(low, high), figure| (low.min(*figure), high.max(*figure)));
    format!("{low:.3} to {high:.3}")
}

fn random_writes(device: &LoopDevice) -> Result<f64> {
    let output = tool(
        "fio",
        &[
            "--name=writes",
            &format!("--filename={}", device.node().display()),
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=8",
            "--ioengine=io_uring",
            "--direct=1",
            "--time_based",
            "--runtime=4",
            "--output-format=json",
        ],
    )?;
    let report: Value = serde_json::from_str(output.get(output.find('{').unwrap_or(0)..).unwrap_or(""))?;
    report["jobs"][0]["write"]["iops"].as_f64().context("iops in fio's report")
}

/// A program in the kernel, by its own accounting.
struct Program {
    id: u64,
    name: String,
    runs: f64,
    run_ns: f64,
}

fn programs() -> Result<Vec<Program>> {
    let list: Value = serde_json::from_str(&tool("bpftool", &["--json", "prog", "show"])?)?;
    let program = |entry: &Value| {
        let figure = |name: &str| entry[name].as_f64().unwrap_or(0.0);
        let name = entry["name"].as_str()?.to_owned();
        Some(Program { id: entry["id"].as_u64()?, name, runs: figure("run_cnt"), run_ns: figure("run_time_ns") })
    };
    Ok(list.as_array().context("bpftool's list")?.iter().filter_map(program).collect())
}
