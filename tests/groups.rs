//! A group of several volumes on several disks, of which one fails: no point is made without it, and nothing is missing afterwards.
//!
//! Needs root, kernel BTF, loop devices and FUSE; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::files::noise;
use cdp_tests::image::assert_same;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::mortal_disk::MortalDisk;
use cdp_tests::process::wait_for;
use cdp_tests::site::{PATIENCE, Site};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

const VOLUME_BYTES: u64 = 8 << 20;

/// Writes what only `seed` gives to some places of a device.
fn scribble(device: &Path, seed: u64) -> Result<()> {
    let file = std::fs::File::options().write(true).open(device)?;
    let mut bytes = vec![0; 32 << 10];
    for at in 0..4 {
        noise(seed * 4 + at, &mut bytes);
        file.write_all_at(&bytes, (seed * 977 + at * 313) % 2000 * 4096)?;
    }
    Ok(file.sync_all()?)
}

/// Makes a point, and holds it against the volumes.
fn point_equals(site: &Site, volumes: &[(&str, &Path)], folder: &Path) -> Result<u64> {
    let epoch = site.point_now()?;
    for (name, device) in volumes {
        let image = folder.join(format!("{name}-{epoch}.img"));
        site.export(name, epoch, &image)?;
        assert_same(device, &image).with_context(|| format!("{name} at point {epoch}"))?;
    }
    Ok(epoch)
}

/// Waits until the group is in a state; gives why.
fn wait_for_state(site: &Site, state: &str) -> Result<String> {
    wait_for(&format!("the group to be {state}"), PATIENCE, || {
        // None while the agent starts.
        let status = site.source_status().ok().filter(|status| status["state"] == state);
        Ok(status.map(|status| status["reason"].as_str().unwrap_or_default().to_owned()))
    })
    .with_context(|| site.source(&["status", "--json"]).unwrap_or_default())
}

/// Writes a block of a disk that is dead: the write fails, and the block is marked all the same.
fn write_in_vain(device: &Path) -> Result<()> {
    let file = std::fs::File::options().write(true).open(device)?;
    let written = file.write_all_at(&[7; 4096], 300 * 4096).and_then(|()| file.sync_all());
    ensure!(written.is_err(), "a dead disk took a write");
    Ok(())
}

#[test]
fn a_volume_that_fails_stops_the_points_of_its_group_and_nothing_is_missing_afterwards() -> Result<()> {
    if !cdp_tests::privileged("a_volume_that_fails_stops_the_points_of_its_group_and_nothing_is_missing_afterwards") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let (first, last) = (folder.path().join("first.img"), folder.path().join("last.img"));
    let (first, last) = (LoopDevice::new(&first, VOLUME_BYTES)?, LoopDevice::new(&last, VOLUME_BYTES)?);
    let mortal = MortalDisk::new(folder.path(), VOLUME_BYTES)?;
    let volumes = [("first", first.node()), ("mortal", mortal.node()), ("last", last.node())];
    let mut site = Site::new(folder.path())?;
    let named = volumes.map(|(name, device)| format!("{name}={}", device.display()));
    site.source(&["protect", &named[0], &named[1], &named[2]])?;
    site.set_group_option("interval_ms = 100")?;
    for (seed, (_, device)) in volumes.iter().enumerate() {
        scribble(device, seed as u64)?;
    }
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    let before = point_equals(&site, &volumes, folder.path())?;

    // The middle one dies, and somebody notices by writing to it.
    mortal.set_dead(true);
    write_in_vain(mortal.node())?;
    let reason = wait_for_state(&site, "stalled")?;
    ensure!(reason.contains("volume mortal"), "{reason}");
    let stopped_at = site.points()?.last().context("a point")?.epoch;
    scribble(first.node(), 11)?;
    scribble(last.node(), 12)?;
    let refused = site.source(&["point", "--wait"]).expect_err("a point without a volume").to_string();
    ensure!(refused.contains("volume mortal"), "{refused}");
    // Longer than it takes to try again.
    let stalled_at = Instant::now();
    wait_for("the volumes to be tried again", PATIENCE, || {
        let status = site.source_status()?;
        let says_which = status["reason"].as_str().is_some_and(|reason| reason.contains("volume mortal"));
        ensure!(status["state"] == "stalled" && says_which, "{status}");
        Ok((stalled_at.elapsed() > Duration::from_secs(6)).then_some(()))
    })?;
    ensure!(site.points()?.last().context("a point")?.epoch == stopped_at, "a point was made without a volume");

    // It is back: what was written to the others meanwhile is in the next point, which is no rescan.
    mortal.set_dead(false);
    wait_for_state(&site, "continuous")?;
    let after = point_equals(&site, &volumes, folder.path())?;
    ensure!(after > before, "point {after} after {before}");
    let tracker = site.source_status()?["tracker"].clone();
    ensure!(tracker["started_over"].is_null() || tracker["first_copy"].is_string(), "{tracker}");
    for (seed, (_, device)) in volumes.iter().enumerate() {
        scribble(device, 20 + seed as u64)?;
    }
    point_equals(&site, &volumes, folder.path())?;

    // It dies for good, and an operator takes it out: the others go on, with all that was written since.
    mortal.set_dead(true);
    write_in_vain(mortal.node())?;
    wait_for_state(&site, "stalled")?;
    scribble(first.node(), 31)?;
    scribble(last.node(), 32)?;
    site.stop_source()?;
    site.source(&["unprotect", "mortal"])?;
    site.start_source()?;
    wait_for_state(&site, "continuous")?;
    point_equals(&site, &[volumes[0], volumes[2]], folder.path())?;
    site.verify()
}
