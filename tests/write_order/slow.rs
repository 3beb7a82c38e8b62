//! A disk that takes 5 ms for a write and lets reads overtake it: cuts still validate, end within their bound, and an idle
//! volume is idle.

#![allow(clippy::disallowed_methods, reason = "tests use the real clock and real files")]

use crate::board::{Board, StopAtEnd};
use crate::cutter::{BOUND, Cutter, Figures, Outcome};
use crate::layout::{Layout, VOLUME_BYTES};
use crate::{alone, as_it_is, captured, in_memory, run, writers};
use anyhow::{Context, Result, bail, ensure};
use cdp_tests::loop_device::{LoopDevice, Mount};
use cdp_tests::process::{tool, wait_for};
use cdp_tests::slow_disk::{Landing, SlowDisk};
use std::path::Path;
use std::thread::park_timeout;
use std::time::{Duration, Instant};

/// Cuts while one block is rewritten.
const CUTS: u64 = 50;
const LATENCY: Duration = Duration::from_millis(5);
/// Between two cuts: four times as long as a write takes.
const REST: Duration = Duration::from_millis(20);
/// A round that has begun is read to its end, on a machine that has other things to do.
const LAST_ROUND: Duration = Duration::from_millis(750);

#[test]
fn cuts_of_a_slow_disk_validate_under_scattered_writes() -> Result<()> {
    if !cdp_tests::privileged("cuts_of_a_slow_disk_validate_under_scattered_writes") {
        return Ok(());
    }
    let _alone = alone();
    let folder = in_memory()?;
    let disk = SlowDisk::new(folder.path(), VOLUME_BYTES, LATENCY, Landing::WithAnswer)?;
    let run = run(disk.node(), &Layout::scattered(), captured(200), REST, as_it_is)?;
    eprintln!("slow disk, 8 writes in flight: {}", run.figures);
    ensure!(run.violation.is_none(), "cut {}: {:?}", run.figures.tried, run.violation);
    let (tried, validated) = (run.figures.tried - run.figures.unchanged, run.figures.validated);
    ensure!(validated * 100 >= tried * 99, "{validated} of {tried} validated");
    Ok(())
}

#[test]
fn every_cut_of_a_slow_disk_is_one_instant() -> Result<()> {
    if !cdp_tests::privileged("every_cut_of_a_slow_disk_is_one_instant") {
        return Ok(());
    }
    let _alone = alone();
    for landing in [Landing::WithAnswer, Landing::AtOnce] {
        let folder = in_memory()?;
        let disk = SlowDisk::new(folder.path(), VOLUME_BYTES, LATENCY, landing)?;
        let run = run(disk.node(), &Layout::new(512), captured(200), REST, as_it_is)?;
        eprintln!("slow disk, all writers, landing {landing:?}: {}", run.figures);
        ensure!(run.violation.is_none(), "cut {}: {:?}", run.figures.tried, run.violation);
    }
    Ok(())
}

#[test]
fn cuts_of_a_slow_disk_end_while_one_block_is_rewritten_flat_out() -> Result<()> {
    if !cdp_tests::privileged("cuts_of_a_slow_disk_end_while_one_block_is_rewritten_flat_out") {
        return Ok(());
    }
    let _alone = alone();
    let folder = in_memory()?;
    let disk = SlowDisk::new(folder.path(), VOLUME_BYTES, LATENCY, Landing::WithAnswer)?;
    one_block_flat_out("slow disk", disk.node())
}

#[test]
fn cuts_of_a_fast_disk_end_while_one_block_is_rewritten_flat_out() -> Result<()> {
    if !cdp_tests::privileged("cuts_of_a_fast_disk_end_while_one_block_is_rewritten_flat_out") {
        return Ok(());
    }
    let _alone = alone();
    let folder = in_memory()?;
    let disk = LoopDevice::new(&folder.path().join("disk.img"), VOLUME_BYTES)?;
    one_block_flat_out("fast disk", disk.node())
}

/// A block that is never at rest makes no cut take longer than it may, and is in the first point after it came to rest.
fn one_block_flat_out(name: &str, node: &Path) -> Result<()> {
    let (board, layout) = (Board::default(), Layout::one_block());
    let mut cutter = Cutter::open(node, &layout, as_it_is)?;
    ensure!(cutter.cut(&board, BOUND)? == Outcome::Checked, "the first point is all of the volume");
    cutter.figures = Figures::default();
    let mut slowest = Duration::ZERO;
    std::thread::scope(|scope| -> Result<()> {
        let stop = StopAtEnd(&board);
        let handles = writers::start(scope, node, &layout, &board);
        for _ in 0..CUTS {
            let start = Instant::now();
            if let Outcome::Violated(violation) = cutter.cut(&board, BOUND)? {
                bail!("cut {}: {violation}", cutter.figures.tried);
            }
            slowest = slowest.max(start.elapsed());
            park_timeout(REST);
        }
        drop(stop);
        writers::join(handles)
    })?;
    eprintln!("{name}, one block flat out: slowest of all {slowest:?}; {}", cutter.figures);
    ensure!(slowest < BOUND + LAST_ROUND, "a cut took {slowest:?}");
    ensure!(cutter.cut(&board, BOUND)? == Outcome::Checked, "the first cut at rest has the block");
    ensure!(cutter.cut(&board, BOUND)? == Outcome::Unchanged, "and nothing is left for another");
    cutter.equals(node)
}

#[test]
fn an_idle_ext4_is_captured_in_one_round_and_stays_idle() -> Result<()> {
    if !cdp_tests::privileged("an_idle_ext4_is_captured_in_one_round_and_stays_idle") {
        return Ok(());
    }
    let _alone = alone();
    let folder = in_memory()?;
    let disk = SlowDisk::new(folder.path(), VOLUME_BYTES, LATENCY, Landing::WithAnswer)?;
    let node = disk.node().to_str().context("a path of text")?;
    tool("mkfs.ext4", &["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", node])?;
    let mount = Mount::new(disk.node(), &folder.path().join("live"), "noatime")?;
    let board = Board::default();
    let mut cutter = Cutter::open(disk.node(), &Layout::nobody(), as_it_is)?;
    wait_for("the mount to come to rest", Duration::from_secs(60), || {
        tool("sync", &["--file-system", &mount.folder().display().to_string()])?;
        Ok((cutter.cut(&board, BOUND)? == Outcome::Unchanged).then_some(()))
    })?;
    cutter.figures = Figures::default();
    std::fs::write(mount.folder().join("file"), vec![7; 1 << 20])?;
    tool("sync", &["--file-system", &mount.folder().display().to_string()])?;
    ensure!(cutter.cut(&board, BOUND)? == Outcome::Checked, "the file is new");
    ensure!(cutter.figures.rounds == [1], "nobody writes, and the cut took {:?} rounds", cutter.figures.rounds);
    for flip in 0..20 {
        park_timeout(Duration::from_millis(50));
        let outcome = cutter.cut(&board, BOUND)?;
        ensure!(outcome == Outcome::Unchanged, "flip {flip} of an idle volume: {outcome:?}, {}", cutter.figures);
    }
    mount.unmount()
}
