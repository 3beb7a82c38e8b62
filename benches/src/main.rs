//! `cdp-benches`: the end-to-end benchmarks behind `scripts/bench`, each printed as rows of a table.
//!
//! Every figure that is judged is a ratio of two runs taken in turn, so that it holds when the machine's speed drifts.
//! Needs root and loop devices.

#![allow(clippy::disallowed_methods, reason = "a benchmark measures with the real clock on real files")]

mod cut;
mod first_copy;
mod machine;
mod tracker;

use anyhow::{Result, bail};
use std::path::PathBuf;

fn main() -> Result<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    for name in &wanted {
        if !["tracker", "first-copy", "cut"].contains(&name.as_str()) {
            bail!("no benchmark {name}: there are tracker, first-copy and cut");
        }
    }
    let runs = |name: &str| wanted.is_empty() || wanted.iter().any(|entry| entry == name);
    let folder =
        tempfile::tempdir_in(std::env::var_os("CDP_BENCH_FOLDER").map_or_else(std::env::temp_dir, PathBuf::from))?;
    println!("{}", machine::describe()?);
    if runs("tracker") {
        tracker::run(folder.path())?;
    }
    if runs("cut") {
        cut::run(folder.path())?;
    }
    if runs("first-copy") {
        first_copy::run(folder.path())?;
    }
    Ok(())
}

/// The middle one of `figures`.
fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
