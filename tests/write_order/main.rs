//! The strict write-order oracle on real devices: every captured point is what the disk held at one instant.
//!
//! Threads write chained records past the page cache, each naming what the others have finished; the product's tracker and
//! cut run beside them as fast as they can. `CDP_CUTS` is the number of cuts over all devices. Needs root, kernel BTF and loop
//! devices; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real clock")]

#[cfg(feature = "sabotage")]
mod bites;
mod board;
mod check;
mod cutter;
mod damage;
mod given_back;
mod layout;
mod raw;
mod record;
mod slow;
mod whole_path;
mod writers;

use anyhow::{Context, Result, bail, ensure};
use board::{Board, StopAtEnd};
use cdp_source::tracker::ebpf::EbpfOptions;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::zram_device::{self, ZramDevice};
use check::Violation;
use cutter::{BOUND, Cutter, Figures, Outcome};
use layout::{Layout, VOLUME_BYTES};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Kinds of devices.
const DEVICES: u64 = 4;
/// Cuts over all devices without `CDP_CUTS`.
const CUTS: u64 = 2400;

/// How long no cut may validate.
const PATIENCE: Duration = Duration::from_secs(30);

/// One at a time: a device that has the machine for itself is cut more often.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn cuts_each() -> Result<u64> {
    let all = match std::env::var("CDP_CUTS") {
        Ok(number) => number.parse().with_context(|| format!("CDP_CUTS={number}"))?,
        Err(_) => CUTS,
    };
    Ok(all.div_ceil(DEVICES))
}

/// What came of cuts under load.
struct Run {
    figures: Figures,
    violation: Option<Violation>,
}

/// Cuts `node` until the cuts captured are `enough` or one of them is none the device ever held, and rests between two cuts;
/// then lets it come to rest and compares.
fn run(
    node: &Path,
    layout: &Layout,
    enough: impl Fn(&Figures) -> bool,
    rest: Duration,
    change: impl FnOnce(&mut EbpfOptions),
) -> Result<Run> {
    let board = Board::default();
    let mut cutter = Cutter::open(node, layout, change)?;
    ensure!(cutter.cut(&board, BOUND)? == Outcome::Checked, "the first point is all of the volume");
    cutter.figures = Figures::default();
    let violation = std::thread::scope(|scope| -> Result<Option<Violation>> {
        let stop = StopAtEnd(&board);
        let handles = writers::start(scope, node, layout, &board);
        let mut violation = None;
        let mut last = (Instant::now(), 0);
        while violation.is_none() && !enough(&cutter.figures) && !board.is_stopped() {
            match cutter.cut(&board, BOUND)? {
                Outcome::Violated(found) => {
                    violation = Some(found);
                    cutter.follow_up(&board)?;
                }
                Outcome::Checked | Outcome::NotValidated | Outcome::Unchanged => {}
            }
            if last.1 != cutter.figures.validated {
                last = (Instant::now(), cutter.figures.validated);
            }
            ensure!(last.0.elapsed() < PATIENCE, "no cut validates any more: {}", cutter.figures);
            if !rest.is_zero() {
                std::thread::park_timeout(rest);
            }
        }
        drop(stop);
        writers::join(handles)?;
        Ok(violation)
    })?;
    let figures = cutter.figures.clone();
    if violation.is_some() {
        return Ok(Run { figures, violation });
    }
    match cutter.come_to_rest(&board)? {
        Outcome::Unchanged => cutter.equals(node)?,
        Outcome::Violated(found) => return Ok(Run { figures, violation: Some(found) }),
        other => bail!("{other:?}"),
    }
    Ok(Run { figures, violation })
}

/// So many cuts are enough.
fn captured(cuts: u64) -> impl Fn(&Figures) -> bool {
    move |figures| figures.validated >= cuts
}

/// The tracker as the product has it.
fn as_it_is(_: &mut EbpfOptions) {}

/// Cuts a device as often as is asked for, without a violation.
fn prove(name: &str, node: &Path, sector_bytes: u64) -> Result<()> {
    let cuts = cuts_each()?;
    let run = run(node, &Layout::new(sector_bytes), captured(cuts), Duration::ZERO, as_it_is)
        .with_context(|| name.to_owned())?;
    eprintln!("{name}: {}", run.figures);
    if let Some(violation) = run.violation {
        bail!("{name}: cut {} is none the device ever held: {violation}", run.figures.tried);
    }
    ensure!(run.figures.validated >= cuts, "{name}: {} of {cuts} cuts", run.figures.validated);
    Ok(())
}

/// A folder in memory: files in it are as fast as they can be.
fn in_memory() -> Result<tempfile::TempDir> {
    Ok(tempfile::tempdir_in("/dev/shm")?)
}

#[test]
fn every_cut_of_a_loop_device_is_one_instant() -> Result<()> {
    if !cdp_tests::privileged("every_cut_of_a_loop_device_is_one_instant") {
        return Ok(());
    }
    let _alone = alone();
    let folder = in_memory()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), VOLUME_BYTES + 1536)?;
    prove("loop", device.node(), 512)
}

#[test]
fn every_cut_of_a_loop_device_over_a_loop_device_is_one_instant() -> Result<()> {
    if !cdp_tests::privileged("every_cut_of_a_loop_device_over_a_loop_device_is_one_instant") {
        return Ok(());
    }
    let _alone = alone();
    let folder = tempfile::tempdir()?;
    // On the disk: what the outer device takes away, the inner one must be able to.
    let inner = LoopDevice::new(&folder.path().join("disk.img"), VOLUME_BYTES)?;
    let outer = LoopDevice::attach(inner.node())?;
    prove("loop over loop", outer.node(), 512)
}

#[test]
fn every_cut_of_a_partition_at_sector_63_is_one_instant() -> Result<()> {
    if !cdp_tests::privileged("every_cut_of_a_partition_at_sector_63_is_one_instant") {
        return Ok(());
    }
    let _alone = alone();
    // On the disk: completions come from another place than where the writes were issued.
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), VOLUME_BYTES + (1 << 20))?;
    let partition = device.add_partition(1, 63, VOLUME_BYTES / 512 + 1)?;
    prove("partition at sector 63", &partition, 512)
}

#[test]
fn every_cut_of_a_zram_device_is_one_instant() -> Result<()> {
    let test = "every_cut_of_a_zram_device_is_one_instant";
    if !cdp_tests::privileged(test) || !zram_device::is_there(test) {
        return Ok(());
    }
    let _alone = alone();
    let device = ZramDevice::new(VOLUME_BYTES)?;
    prove("zram", device.node(), 4096)
}
