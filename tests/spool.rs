//! What the line does not take, on a real file system: it waits on the volume it is of, outlives its agent, and comes to rest.
//!
//! Needs root, kernel BTF and loop devices; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::files::content;
use cdp_tests::image::check_ext4;
use cdp_tests::loop_device::{LoopDevice, Mount};
use cdp_tests::process::{tool, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use serde_json::Value;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// So long nothing is captured of a volume that is at rest.
const REST: Duration = Duration::from_secs(4);

/// How the group stands, once `is_so`.
fn status(site: &Site, what: &str, is_so: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut last = Value::Null;
    let found = wait_for(what, PATIENCE, || {
        last = site.source_status().unwrap_or_default();
        Ok(is_so(&last).then(|| last.clone()))
    });
    found.with_context(|| last.to_string())
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

#[test]
fn points_wait_on_the_volume_they_are_of_and_outlive_their_agent() -> Result<()> {
    if !cdp_tests::privileged("points_wait_on_the_volume_they_are_of_and_outlive_their_agent") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), 256 * MIB)?;
    tool("mkfs.ext4", &["-q", "-F", "-b", "4096", device.node().to_str().context("text")?])?;
    let mount = Mount::new(device.node(), &folder.path().join("live"), "rw")?;
    let mut site = Site::new_with_store(mount.folder(), &folder.path().join("target"))?;
    site.source(&["protect", &format!("data={}", device.node().display())])?;
    site.set_group_option("interval_ms = 100")?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    status(&site, "all to be acked", |status| status["state"] == "continuous" && status["unacked_epochs"] == 0)?;
    let before = site.points()?.len();

    site.kill_target()?;
    let write = |number: u64| -> Result<()> {
        let captured = site.source_status()?["captured_epoch"].as_u64();
        std::fs::write(mount.folder().join(format!("file-{number}")), content(number, 2 * MIB as usize))?;
        tool("sync", &[])?;
        status(&site, "a capture", |status| status["captured_epoch"].as_u64() > captured).map(drop)
    };
    (0..28).try_for_each(write)?;
    let waiting = status(&site, "the spool", |status| number(&status["spool"]["spooled_bytes"]) > 4 * MIB)?;
    ensure!(number(&waiting["spool"]["waiting_points"]) > 4, "{waiting}");
    let frames = site.state.join("groups/main/spool/frames");
    let is_left_out = |entry: &Value| entry["path"].as_str() == frames.to_str() && number(&entry["bytes"]) >= 64 * MIB;
    status(&site, "the file to be left out", |status| {
        status["excludes"].as_array().is_some_and(|list| list.iter().any(is_left_out))
    })?;
    // What the agent itself writes makes points for a while, and then no more.
    let mut captured = (Value::Null, Instant::now());
    wait_for("the volume to come to rest", PATIENCE, || {
        let now = site.source_status()?["captured_epoch"].clone();
        if now != captured.0 {
            captured = (now, Instant::now());
        }
        Ok((captured.1.elapsed() >= REST).then_some(()))
    })?;

    let waited = number(&site.source_status()?["spool"]["waiting_points"]);
    site.kill_source()?;
    site.start_source()?;
    let taken_up = status(&site, "the next agent", |status| number(&status["spool"]["waiting_points"]) > 0)?;
    ensure!(number(&taken_up["captured_epoch"]) > 4, "{taken_up}");
    std::fs::write(mount.folder().join("last"), content(99, MIB as usize))?;
    tool("sync", &[])?;
    site.start_target()?;
    status(&site, "all to be acked", |status| status["unacked_epochs"] == 0 && status["dirty_bytes"] == 0)?;
    let points = site.points()?;
    eprintln!("{waited} points waited, {} came in all", points.len() - before);
    ensure!(points.len() as u64 > before as u64 + waited / 2, "{} points of {waited}", points.len() - before);
    let image = folder.path().join("point.img");
    let newest = points.len() - 1;
    for point in [before, before + 3, newest] {
        site.export("data", points[point].epoch, &image)?;
        check_ext4(&image, folder.path(), |root| {
            let is_last = std::fs::read(root.join("last")).is_ok_and(|found| found == content(99, MIB as usize));
            ensure!(is_last == (point == newest), "point {point}: the last file is there: {is_last}");
            Ok(())
        })?;
        std::fs::remove_file(&image)?;
    }
    site.stop_source()?;
    mount.unmount()
}
