//! What the kernel accounts to each of the tracker's programs, on each way a write can take.
//!
//! A write is what the programs counted as issued to the tracked disk. The files behind loop devices lie in memory, so
//! that the programs run for no other disk's writes. Programs of other groups on this machine are left out.

use crate::tracker::{attach, detach, random_writes};
use crate::{machine, median};
use anyhow::{Context, Result, ensure};
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::tool;
use cdp_tests::zram_device::{self, ZramDevice};
use serde_json::Value;
use std::path::Path;

const PROGRAMS: [&str; 4] = ["issue", "remap", "complete", "bio_complete"];
const WINDOWS: usize = 5;
const WINDOW_SECONDS: u32 = 1;
const DEVICE_BYTES: u64 = 256 << 20;
const PARTITION_START: u64 = 2048;

pub(crate) fn run(folder: &Path) -> Result<()> {
    let memory = machine::memory_folder()?;
    let mut columns = Vec::new();
    let device = LoopDevice::new(&memory.path().join("programs.img"), DEVICE_BYTES)?;
    columns.push(("loop, requests", costs(device.node(), folder)?));
    let partition = device.add_partition(1, PARTITION_START, DEVICE_BYTES / 512 - PARTITION_START)?;
    columns.push(("a partition of it", costs(&partition, folder)?));
    drop(device);
    if zram_device::is_there("programs on a bio-based device") {
        let device = ZramDevice::new(DEVICE_BYTES)?;
        columns.push(("zram, bios", costs(device.node(), folder)?));
    }
    let row = |name: &str, cell: &dyn Fn(&(&str, Costs)) -> String| {
        println!("| {name} | {} |", columns.iter().map(cell).collect::<Vec<_>>().join(" | "));
    };
    println!();
    let what = format!("ns a run × runs a write, median of {WINDOWS} windows of {WINDOW_SECONDS} s");
    row(&what, &|(title, _)| (*title).to_owned());
    row("---", &|_| "---".to_owned());
    for (index, program) in PROGRAMS.iter().enumerate() {
        row(&format!("`{program}`"), &|(_, costs)| costs.programs[index].clone());
    }
    row("a write, all of them together, ns", &|(_, costs)| format!("{:.0}", costs.ns_a_write));
    Ok(())
}

/// What the programs took on one device.
struct Costs {
    /// A cell for each of `PROGRAMS`.
    programs: Vec<String>,
    ns_a_write: f64,
}

fn costs(node: &Path, folder: &Path) -> Result<Costs> {
    let others: Vec<u64> = programs()?.into_iter().map(|program| program.id).collect();
    let tracker = attach(node, folder)?;
    let accounting = Accounting::switched_on()?;
    let mut windows = Vec::new();
    for _ in 0..WINDOWS {
        let (before, issued) = (programs()?, tracker.counts()?.issued);
        random_writes(node, WINDOW_SECONDS)?;
        let (after, writes) = (programs()?, tracker.counts()?.issued - issued);
        ensure!(writes > 0, "no write to {} was counted", node.display());
        windows.push(Window::between(&before, &after, &others, writes as f64));
    }
    drop(accounting);
    detach(tracker, folder)?;
    let middle = |figure: &dyn Fn(&Window) -> f64| median(&windows.iter().map(figure).collect::<Vec<_>>());
    let cell = |row: usize| {
        let runs = middle(&|window| window.programs[row].runs / window.writes);
        // A stray run for another disk's write is not worth a figure.
        if runs < 0.05 {
            return "does not run".to_owned();
        }
        format!("{:.0} × {runs:.2}", middle(&|window| window.programs[row].run_ns / window.programs[row].runs))
    };
    Ok(Costs { programs: (0..PROGRAMS.len()).map(cell).collect(), ns_a_write: middle(&Window::ns_a_write) })
}

/// What the programs did while `writes` writes were issued.
struct Window {
    writes: f64,
    /// For each of `PROGRAMS`.
    programs: [Runs; PROGRAMS.len()],
}

impl Window {
    fn between(before: &[Program], after: &[Program], others: &[u64], writes: f64) -> Self {
        let runs = |name: &str| {
            let mut runs = Runs::default();
            for program in after.iter().filter(|program| program.name == name && !others.contains(&program.id)) {
                let earlier = before.iter().find(|earlier| earlier.id == program.id).map(|earlier| earlier.runs);
                let earlier = earlier.unwrap_or_default();
                runs.runs += program.runs.runs - earlier.runs;
                runs.run_ns += program.runs.run_ns - earlier.run_ns;
            }
            runs
        };
        Self { writes, programs: PROGRAMS.map(runs) }
    }

    fn ns_a_write(&self) -> f64 {
        self.programs.iter().map(|program| program.run_ns).sum::<f64>() / self.writes
    }
}

/// A program in the kernel, by its own accounting.
struct Program {
    id: u64,
    name: String,
    runs: Runs,
}

#[derive(Clone, Copy, Default)]
struct Runs {
    runs: f64,
    run_ns: f64,
}

fn programs() -> Result<Vec<Program>> {
    let list: Value = serde_json::from_str(&tool("bpftool", &["--json", "prog", "show"])?)?;
    let program = |entry: &Value| {
        let figure = |name: &str| entry[name].as_f64().unwrap_or(0.0);
        let runs = Runs { runs: figure("run_cnt"), run_ns: figure("run_time_ns") };
        Some(Program { id: entry["id"].as_u64()?, name: entry["name"].as_str()?.to_owned(), runs })
    };
    Ok(list.as_array().context("bpftool's list")?.iter().filter_map(program).collect())
}

/// The kernel's accounting of programs, switched on until this is dropped.
struct Accounting {
    before: String,
}

impl Accounting {
    const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

    fn switched_on() -> Result<Self> {
        let before = std::fs::read_to_string(Self::SWITCH)?;
        std::fs::write(Self::SWITCH, "1")?;
        Ok(Self { before })
    }
}

impl Drop for Accounting {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::SWITCH, &self.before);
    }
}
