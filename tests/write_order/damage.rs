//! What may happen to a tracking under load: its pins removed, bpffs taken away, the counts switched off. The cuts that are made
//! afterwards are still instants, whoever comes next starts over or goes on, and the replica equals the device in the end.

#![allow(clippy::disallowed_methods, reason = "tests use real files")]

use crate::board::{Board, StopAtEnd};
use crate::cutter::{BOUND, Cutter, Outcome};
use crate::layout::{Layout, VOLUME_BYTES};
use crate::{PATIENCE, alone, in_memory, writers};
use anyhow::{Context, Result, bail, ensure};
use cdp_source::tracker::ebpf::EbpfOptions;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::tool;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Cuts before the damage, and after it.
const CUTS: u64 = 40;

/// A bpffs of its own, so that nobody else's tracking is touched.
struct Bpffs(PathBuf);

impl Bpffs {
    fn mount(folder: &Path) -> Result<Self> {
        let place = folder.join("bpf");
        std::fs::create_dir_all(&place)?;
        tool("mount", &["-t", "bpf", "bpf", &place.display().to_string()])?;
        Ok(Self(place))
    }

    fn unmount(&self) -> Result<()> {
        tool("umount", &["--lazy", &self.0.display().to_string()]).map(drop)
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = self.unmount();
    }
}

/// What is at hand to be damaged.
struct Scene<'a> {
    bpffs: &'a Bpffs,
    /// The folder of the tracking's pins.
    pins: PathBuf,
}

impl Scene<'_> {
    fn remove(&self, chosen: impl Fn(&str) -> bool) -> Result<()> {
        for entry in std::fs::read_dir(&self.pins)? {
            let path = entry?.path();
            if path.file_name().and_then(|name| name.to_str()).is_some_and(&chosen) {
                std::fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

/// Cuts under load, damages, cuts on; then whoever comes next takes over and must come to the device's content. `reason`: what
/// the next one says, which starts over.
fn survives(test: &str, damage: impl FnOnce(&Scene<'_>) -> Result<()>, reason: &str) -> Result<()> {
    if !cdp_tests::privileged(test) {
        return Ok(());
    }
    let _alone = alone();
    let folder = in_memory()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), VOLUME_BYTES)?;
    let bpffs = Bpffs::mount(folder.path())?;
    let (board, layout) = (Board::default(), Layout::new(512));
    let change = |options: &mut EbpfOptions| options.bpffs.clone_from(&bpffs.0);
    let mut cutter = Cutter::open(device.node(), &layout, change)?;
    ensure!(cutter.cut(&board, BOUND)? == Outcome::Checked, "the first point is all of the volume");
    std::thread::scope(|scope| -> Result<()> {
        let stop = StopAtEnd(&board);
        let handles = writers::start(scope, device.node(), &layout, &board);
        cut_on(&mut cutter, &board)?;
        damage(&Scene { bpffs: &bpffs, pins: cutter.pin_folder() })?;
        cut_on(&mut cutter, &board)?;
        drop(stop);
        writers::join(handles)
    })?;
    let rest = cutter.come_to_rest(&board)?;
    ensure!(rest == Outcome::Unchanged, "{rest:?}");
    cutter.equals(device.node())?;
    eprintln!("{test}: {}", cutter.figures);
    let state = cutter.close();
    let mut next = Cutter::open_in(state, device.node(), &layout, change)?;
    let found = next.started_over().context("it went on")?;
    ensure!(found.contains(reason), "{found}");
    let rest = next.come_to_rest(&board)?;
    ensure!(rest == Outcome::Unchanged, "{rest:?}");
    next.equals(device.node())
}

fn cut_on(cutter: &mut Cutter, board: &Board) -> Result<()> {
    let (start, until) = (Instant::now(), cutter.figures.validated + CUTS);
    while cutter.figures.validated < until && !board.is_stopped() {
        ensure!(start.elapsed() < PATIENCE, "{CUTS} cuts of a busy device are not to be had: {}", cutter.figures);
        if let Outcome::Violated(violation) = cutter.cut(board, BOUND)? {
            bail!("cut {}: {violation}", cutter.figures.tried);
        }
    }
    Ok(())
}

#[test]
fn a_tracking_whose_links_are_removed_goes_on_until_its_end() -> Result<()> {
    let test = "a_tracking_whose_links_are_removed_goes_on_until_its_end";
    survives(test, |scene| scene.remove(|name| name.ends_with("_link")), "detached")
}

#[test]
fn a_tracking_whose_pins_are_half_gone_goes_on_until_its_end() -> Result<()> {
    let test = "a_tracking_whose_pins_are_half_gone_goes_on_until_its_end";
    survives(test, |scene| scene.remove(|name| name.ends_with("_1") || name == "complete_program"), "gone")
}

#[test]
fn a_tracking_whose_bpffs_is_unmounted_goes_on_until_its_end() -> Result<()> {
    let test = "a_tracking_whose_bpffs_is_unmounted_goes_on_until_its_end";
    survives(test, |scene| scene.bpffs.unmount(), "gone")
}

/// `losetup --detach` under load: the kernel puts it off while anybody has the device open, as the tracker's reader has.
#[test]
fn a_device_that_is_detached_under_load_is_cut_until_it_is_let_go() -> Result<()> {
    let test = "a_device_that_is_detached_under_load_is_cut_until_it_is_let_go";
    if !cdp_tests::privileged(test) {
        return Ok(());
    }
    let _alone = alone();
    let folder = in_memory()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), VOLUME_BYTES)?;
    let (board, layout) = (Board::default(), Layout::new(512));
    let mut cutter = Cutter::open(device.node(), &layout, crate::as_it_is)?;
    ensure!(cutter.cut(&board, BOUND)? == Outcome::Checked, "the first point is all of the volume");
    std::thread::scope(|scope| -> Result<()> {
        let stop = StopAtEnd(&board);
        let handles = writers::start(scope, device.node(), &layout, &board);
        cut_on(&mut cutter, &board)?;
        tool("losetup", &["--detach", &device.node().display().to_string()])?;
        cut_on(&mut cutter, &board)?;
        drop(stop);
        writers::join(handles)
    })?;
    let rest = cutter.come_to_rest(&board)?;
    ensure!(rest == Outcome::Unchanged, "{rest:?}");
    // Read from the file: the device is let go with the cutter, and opening it again would not bring it back.
    cutter.equals(device.file())?;
    let state = cutter.close();
    let gone = Cutter::open_in(state, device.node(), &layout, crate::as_it_is).err().context("it was opened again")?;
    ensure!(format!("{gone:#}").contains("has no size"), "{gone:#}");
    Ok(())
}

/// Whether a disk counts what it completes. It stays as it is put when the device gets another file.
struct Counts(PathBuf);

impl Counts {
    fn of(device: &LoopDevice) -> Result<Self> {
        let name = device.node().file_name().and_then(|name| name.to_str()).context("a name")?;
        Ok(Self(PathBuf::from(format!("/sys/block/{name}/queue/iostats"))))
    }

    fn switch(&self, on: bool) -> Result<()> {
        Ok(std::fs::write(&self.0, if on { "1" } else { "0" })?)
    }
}

impl Drop for Counts {
    fn drop(&mut self) {
        let _ = self.switch(true);
    }
}

/// Without the kernel's counts a lost completion would show nowhere: no cut is believed, and nothing is forgotten.
#[test]
fn no_cut_is_believed_while_the_counts_are_switched_off() -> Result<()> {
    let test = "no_cut_is_believed_while_the_counts_are_switched_off";
    if !cdp_tests::privileged(test) {
        return Ok(());
    }
    let _alone = alone();
    let folder = in_memory()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), VOLUME_BYTES)?;
    let counts = Counts::of(&device)?;
    let (board, layout) = (Board::default(), Layout::new(512));
    let mut cutter = Cutter::open(device.node(), &layout, crate::as_it_is)?;
    ensure!(cutter.cut(&board, BOUND)? == Outcome::Checked, "the first point is all of the volume");
    std::thread::scope(|scope| -> Result<()> {
        let stop = StopAtEnd(&board);
        let handles = writers::start(scope, device.node(), &layout, &board);
        cut_on(&mut cutter, &board)?;
        counts.switch(false)?;
        for _ in 0..10 {
            let outcome = cutter.cut(&board, BOUND)?;
            ensure!(outcome == Outcome::NotValidated, "{outcome:?} without counts");
        }
        drop(stop);
        writers::join(handles)
    })?;
    counts.switch(true)?;
    let rest = cutter.come_to_rest(&board)?;
    ensure!(rest == Outcome::Unchanged, "{rest:?}");
    cutter.equals(device.node())
}
