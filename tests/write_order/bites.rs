//! The oracle bites: a tracker that is wrong in one way is caught within so many cuts, one that is only hindered is not.

use crate::cutter::Figures;
use crate::layout::{Layout, VOLUME_BYTES};
use crate::{alone, captured, in_memory, run};
use anyhow::{Context, Result, ensure};
use cdp_source::tracker::ebpf::Sabotage;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::slow_disk::{Landing, SlowDisk};
use cdp_tests::zram_device::ZramDevice;
use std::path::Path;
use std::time::Duration;

/// Cuts until a defect must have shown, several times as many as it ever took.
const CUTS_MAX: u64 = 4000;
/// Between two cuts of a disk that answers late.
const REST: Duration = Duration::from_millis(3);
/// Cuts that must be clean where nothing is wrong.
const CUTS_CLEAN: u64 = 200;

/// What the tracker is to be tried on.
enum On {
    /// A file in memory.
    Fast,
    /// A disk that answers late.
    Slow(Landing),
    /// A bio-based disk in memory.
    Zram,
}

impl On {
    fn layout(&self) -> Layout {
        Layout::new(if matches!(self, Self::Zram) { 4096 } else { 512 })
    }
}

fn on<T>(disk: &On, look: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let _alone = alone();
    let folder = in_memory()?;
    match disk {
        On::Fast => look(LoopDevice::new(&folder.path().join("disk.img"), VOLUME_BYTES)?.node()),
        On::Slow(landing) => {
            look(SlowDisk::new(folder.path(), VOLUME_BYTES, Duration::from_millis(5), *landing)?.node())
        }
        On::Zram => look(ZramDevice::new(VOLUME_BYTES)?.node()),
    }
}

fn rest(disk: &On) -> Duration {
    match disk {
        On::Fast | On::Zram => Duration::ZERO,
        On::Slow(_) => REST,
    }
}

fn is_caught(test: &str, disk: &On, layout: &Layout, sabotage: Sabotage) -> Result<()> {
    if !cdp_tests::privileged(test) {
        return Ok(());
    }
    on(disk, |node| {
        let run = run(node, layout, captured(CUTS_MAX), rest(disk), |options| options.sabotage = Some(sabotage))?;
        let violation = run.violation.with_context(|| format!("{sabotage:?} is not noticed: {}", run.figures))?;
        eprintln!("{sabotage:?}: caught at cut {}: {violation}", run.figures.tried);
        Ok(())
    })
}

/// Clean for [`CUTS_CLEAN`] cuts, and for as many more as it takes until `shown` says that the sabotage has come to something.
fn is_clean(disk: &On, sabotage: Sabotage, shown: impl Fn(&Figures) -> bool) -> Result<Figures> {
    let enough =
        |figures: &Figures| figures.validated >= CUTS_MAX || (figures.validated >= CUTS_CLEAN && shown(figures));
    on(disk, |node| {
        let run = run(node, &disk.layout(), enough, rest(disk), |options| options.sabotage = Some(sabotage))?;
        eprintln!("{sabotage:?}: {}", run.figures);
        ensure!(run.violation.is_none(), "{sabotage:?}: cut {}: {:?}", run.figures.tried, run.violation);
        Ok(run.figures)
    })
}

#[test]
fn marks_at_issue_only_are_caught_where_reads_overtake_writes() -> Result<()> {
    is_caught(
        "marks_at_issue_only_are_caught_where_reads_overtake_writes",
        &On::Slow(Landing::WithAnswer),
        &Layout::new(512),
        Sabotage::IssueOnly,
    )
}

#[test]
fn marks_at_completion_only_are_caught() -> Result<()> {
    is_caught(
        "marks_at_completion_only_are_caught",
        &On::Slow(Landing::AtOnce),
        &Layout::new(512),
        Sabotage::CompletionOnly,
    )
}

#[test]
fn flips_that_do_not_wait_for_runs_are_caught() -> Result<()> {
    is_caught(
        "flips_that_do_not_wait_for_runs_are_caught",
        &On::Slow(Landing::WithAnswer),
        &Layout::new(512),
        Sabotage::NoBarrier,
    )
}

#[test]
fn reads_that_are_not_validated_are_caught() -> Result<()> {
    is_caught("reads_that_are_not_validated_are_caught", &On::Fast, &Layout::new(512), Sabotage::NoValidation)
}

#[test]
fn flips_that_wait_for_runs_that_are_held_up_are_clean() -> Result<()> {
    if !cdp_tests::privileged("flips_that_wait_for_runs_that_are_held_up_are_clean") {
        return Ok(());
    }
    is_clean(&On::Fast, Sabotage::HoldRuns, |_| true).map(drop)
}

/// Without the sums the same loss is one: they are what saves the update.
#[test]
fn completions_that_are_not_seen_lose_writes_where_the_sums_are_not_listened_to() -> Result<()> {
    is_caught(
        "completions_that_are_not_seen_lose_writes_where_the_sums_are_not_listened_to",
        &On::Slow(Landing::WithAnswer),
        &Layout::new(512),
        Sabotage::IgnoreSums,
    )
}

/// Of every thousand completions one is not seen: the sums notice, and nothing is missing from any point. How many cuts it
/// takes until one is missed depends on how much is written between two.
#[test]
fn completions_that_are_not_seen_are_noticed_and_nothing_is_lost() -> Result<()> {
    if !cdp_tests::privileged("completions_that_are_not_seen_are_noticed_and_nothing_is_lost") {
        return Ok(());
    }
    let zram = cdp_tests::zram_device::is_there("dropped completions of bios").then_some(On::Zram);
    for disk in [On::Fast, On::Slow(Landing::WithAnswer)].into_iter().chain(zram) {
        let figures = is_clean(&disk, Sabotage::DropCompletions, |figures| figures.completions_lost > 0)?;
        ensure!(figures.completions_lost > 0, "nothing was noticed: {figures}");
    }
    Ok(())
}
