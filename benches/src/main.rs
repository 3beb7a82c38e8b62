//! `cdp-benches`: the end-to-end benchmarks behind `scripts/bench`, each printed as rows of a table.
//!
//! Every figure that is judged is a ratio of two runs taken in turn, so that it holds when the machine's speed drifts.
//! Needs root and loop devices.

#![allow(clippy::disallowed_methods, reason = "a benchmark measures with the real clock on real files")]

mod cut;
mod drain;
mod export;
mod first_copy;
mod log_file;
mod machine;
mod nbd;
mod packing;
mod programs;
mod scale;
mod tracker;
mod workloads;

use anyhow::{Result, bail};
use std::path::{Path, PathBuf};

/// A benchmark gets a folder for its files and prints its tables.
type Benchmark = fn(&Path) -> Result<()>;

/// All there are, in the order they run.
const BENCHMARKS: [(&str, Benchmark); 9] = [
    ("tracker", tracker::run),
    ("drain", drain::run),
    ("cut", cut::run),
    ("first-copy", first_copy::run),
    ("packing", packing::run),
    ("workloads", workloads::run),
    ("scale", scale::run),
    ("export", export::run),
    ("nbd", nbd::run),
];

fn main() -> Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if let [first, arguments @ ..] = wanted.as_slice()
        && first == scale::CHILD
    {
        return scale::child(arguments);
    }
    for entry in &wanted {
        if !BENCHMARKS.iter().any(|(name, _)| name == entry) {
            bail!("no benchmark {entry}: there are {}", BENCHMARKS.map(|(name, _)| name).join(", "));
        }
    }
    let folder =
        tempfile::tempdir_in(std::env::var_os("CDP_BENCH_FOLDER").map_or_else(std::env::temp_dir, PathBuf::from))?;
    println!("{}", machine::describe()?);
    for (name, benchmark) in BENCHMARKS {
        if wanted.is_empty() || wanted.iter().any(|entry| entry == name) {
            benchmark(folder.path())?;
        }
    }
    Ok(())
}

/// The middle one of `figures`.
fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
