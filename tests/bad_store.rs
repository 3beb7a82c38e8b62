//! Stores that are not fit, under real programs: copied while they are written, on a disk that turned read-only.
//!
//! Damaged files stand in `cdp-target/tests/bad_files.rs`, a second server in `cdp-target/tests/cli.rs`, a full disk in `bad_input.rs`.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::acked::{VOLUME_BYTES, Writer, check};
use cdp_tests::loop_device::{LoopDevice, Mount};
use cdp_tests::process::{program, tool, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use std::path::Path;
use std::process::Command;

const MIB: u64 = 1 << 20;
/// Large, so that segments end soon.
const PIECE_BYTES_MAX: usize = 64 << 10;

/// A site whose volume is a file, written to by nobody yet.
fn site_with(folder: &Path, store: &Path) -> Result<(Site, std::path::PathBuf)> {
    let mut site = Site::new_with_store(folder, store)?;
    let volume = folder.join("volume.img");
    std::fs::write(&volume, vec![0; VOLUME_BYTES])?;
    site.source(&["protect", &format!("data={}", volume.display())])?;
    site.start_source()?;
    Ok((site, volume))
}

/// `cp` takes one file after the other while all of them change: what was acked before it began is in the copy.
#[test]
fn a_store_copied_while_it_is_written_opens() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut site, volume) = site_with(folder.path(), &folder.path().join("target"))?;
    // Segments that end while they are copied.
    site.stop_target()?;
    let config = site.data.join("target.toml");
    let text = std::fs::read_to_string(&config)?;
    let lines = text.lines().filter(|line| !line.contains("segment_bytes_max"));
    std::fs::write(&config, format!("segment_bytes_max = 1048576\n{}\n", lines.collect::<Vec<_>>().join("\n")))?;
    site.start_target()?;
    let writer = Writer::start(volume, site.state.clone(), 9, PIECE_BYTES_MAX);
    for round in 0..5_u32 {
        writer.wait_beyond(writer.acked().len() + 3)?;
        let acked = writer.acked();
        let copy = folder.path().join(format!("copy-{round}"));
        tool("cp", &["-a", &site.data.display().to_string(), &copy.display().to_string()])?;
        let state = folder.path().join("none");
        let mut beside = site.beside(state);
        beside.data = copy;
        for point in acked.iter().rev().take(3).chain(acked.first()) {
            check(&beside, *point, folder.path()).with_context(|| format!("copy {round}"))?;
        }
        beside.verify()?;
    }
    writer.stop()?;
    site.stop_source()?;
    site.stop_target()
}

/// A command that fails, in a line that says why, and with the next step.
fn fails(site: &Site, arguments: &[&str], words: &[&str]) -> Result<()> {
    let output = Command::new(program("cdp-target")).args(arguments).env("CDP_TARGET_DATA", &site.data).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "{arguments:?} succeeds");
    for word in words {
        ensure!(stderr.contains(word), "{arguments:?}: {word:?} is not in {stderr}");
    }
    ensure!(stderr.lines().any(|line| line.starts_with("hint: ")), "{arguments:?}: no hint in {stderr}");
    Ok(())
}

/// The kernel turns a file system read-only when it finds it damaged: nothing is acked from then on, what is there is served,
/// and all goes on when it can be written again.
#[test]
fn a_store_on_a_disk_that_turned_read_only_is_served_and_acks_nothing() -> Result<()> {
    if !cdp_tests::privileged("a_store_on_a_disk_that_turned_read_only_is_served_and_acks_nothing") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), 64 * MIB)?;
    let node = device.node().display().to_string();
    tool("mkfs.ext4", &["-q", "-F", &node])?;
    let place = folder.path().join("place");
    let mount = Mount::new(device.node(), &place, "errors=remount-ro")?;
    let (mut site, volume) = site_with(folder.path(), &place.join("store"))?;
    let writer = Writer::start(volume, site.state.clone(), 4, PIECE_BYTES_MAX);
    writer.wait_beyond(3)?;
    let name = device.node().file_name().context("a name")?.to_string_lossy().into_owned();
    std::fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "1")?;
    let status = wait_for("the source to be told", PATIENCE, || {
        let status = site.source_status()?;
        Ok(status["reason"].is_string().then_some(status))
    })?;
    eprintln!("the source says: {}", status["reason"]);
    let acked = writer.acked();
    ensure!(site.source_daemon().is_running()? && site.target_daemon().is_running()?, "both keep running");
    let newest = *acked.last().context("a point")?;
    check(&site, newest, folder.path())?;
    check(&site, acked[0], folder.path())?;
    let log = site.target_daemon().log();
    ensure!(log.contains("Read-only file system"), "the target names it: {log}");
    fails(&site, &["label", "office/main", "latest", "now"], &["Read-only file system"])?;
    site.kill_target()?;
    check(&site, newest, folder.path())?;
    fails(&site, &["serve"], &["Read-only file system"])?;

    mount.unmount()?;
    let _ = Command::new("e2fsck").args(["-f", "-p", &node]).output()?;
    let mount = Mount::new(device.node(), &place, "rw")?;
    site.start_target()?;
    writer.wait_beyond(acked.len())?;
    let acked = writer.acked();
    writer.stop()?;
    for point in &acked {
        check(&site, *point, folder.path())?;
    }
    eprintln!("{} points acked before and after: all there", acked.len());
    site.stop_source()?;
    site.stop_target()?;
    mount.unmount()
}
