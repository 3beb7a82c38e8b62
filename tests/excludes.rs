//! Files that are left out, on real file systems: they cost nothing, are holes in the points, and give nothing of anybody else's away.
//!
//! Needs root, kernel BTF and loop devices; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::file_system::FileSystem;
use cdp_tests::files::content;
use cdp_tests::image::{assert_same, check_ext4};
use cdp_tests::loop_device::{LoopDevice, Mount};
use cdp_tests::process::{tool, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// With blocks as large as ours: only whole ones are left out.
fn make_ext4(device: &Path) -> Result<()> {
    tool("mkfs.ext4", &["-q", "-F", "-b", "4096", &text(device)?]).map(drop)
}

fn write(path: &Path, seed: u64, len: u64) -> Result<()> {
    let file = std::fs::File::options().create(true).truncate(false).write(true).open(path)?;
    for piece in 0..len / MIB {
        file.write_all_at(&content(seed * 1000 + piece, MIB as usize), piece * MIB)?;
    }
    Ok(file.sync_all()?)
}

fn holds(path: &Path, seed: u64, len: u64) -> Result<()> {
    let found = std::fs::read(path)?;
    ensure!(found.len() as u64 == len, "{} has {} bytes", path.display(), found.len());
    for (piece, bytes) in found.chunks(MIB as usize).enumerate() {
        ensure!(bytes == content(seed * 1000 + piece as u64, MIB as usize), "{} at MiB {piece}", path.display());
    }
    Ok(())
}

/// What the agent says of an excluded path, once `is_so`.
fn excluded(site: &Site, path: &Path, is_so: impl Fn(&Value) -> bool) -> Result<Value> {
    let mut last = Value::Null;
    let found = wait_for("the exclusion", PATIENCE, || {
        let status = site.source_status().unwrap_or_default();
        let named = |entry: &&Value| entry["path"].as_str() == path.to_str();
        last = status["excludes"].as_array().and_then(|list| list.iter().find(named)).cloned().unwrap_or_default();
        Ok(is_so(&last).then(|| last.clone()))
    });
    found.with_context(|| format!("{}: {last}", path.display()))
}

fn exclude(site: &Site, paths: &[&Path]) -> Result<()> {
    let paths: Vec<String> = paths.iter().map(|path| format!("\"{}\"", path.display())).collect();
    site.set_group_option(&format!("exclude = [{}]", paths.join(", ")))
}

fn protect(site: &Site, device: &Path) -> Result<()> {
    site.source(&["protect", &format!("data={}", device.display())])?;
    site.set_group_option("interval_ms = 100")
}

fn sent(site: &Site) -> Result<u64> {
    site.source_status()?["acked_bytes"].as_u64().context("acked_bytes")
}

/// A point cut now, as an image.
fn image_now(site: &Site, folder: &Path) -> Result<std::path::PathBuf> {
    tool("sync", &[])?;
    let epoch = site.point_now()?;
    let image = folder.join(format!("{epoch}.img"));
    site.export("data", epoch, &image)?;
    Ok(image)
}

#[test]
fn an_excluded_file_costs_nothing_and_its_blocks_are_captured_once_they_are_anothers() -> Result<()> {
    if !cdp_tests::privileged("an_excluded_file_costs_nothing_and_its_blocks_are_captured_once_they_are_anothers") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), 96 * MIB)?;
    make_ext4(device.node())?;
    let mount = Mount::new(device.node(), &folder.path().join("live"), "rw")?;
    let (scratch, kept) = (mount.folder().join("scratch.bin"), mount.folder().join("kept.bin"));
    write(&scratch, 1, 40 * MIB)?;
    write(&kept, 2, 4 * MIB)?;
    let swap = mount.folder().join("swap");
    write(&swap, 3, 8 * MIB)?;
    let swap_text = swap.to_str().context("text")?;
    tool("chmod", &["600", swap_text])?;
    tool("mkswap", &[swap_text])?;
    tool("swapon", &[swap_text])?;
    let swapped = SwapOff(swap_text.to_owned());

    let mut site = Site::new(folder.path())?;
    protect(&site, device.node())?;
    exclude(&site, &[&scratch, &mount.folder().join("none")])?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    excluded(&site, &scratch, |found| found["bytes"] == 40 * MIB && found["reason"].is_null())?;
    let of_swap = excluded(&site, &swap, |found| found["kind"] == "swap" && found["reason"].is_null())?;
    ensure!(of_swap["bytes"] == 8 * MIB - 4096, "all but the header: {of_swap}");
    excluded(&site, &mount.folder().join("none"), |found| found["reason"] == "it does not exist")?;
    // Written anew while cuts go on: only the file system's own blocks are sent.
    image_now(&site, folder.path())?;
    let (before, points) = (sent(&site)?, site.points()?.len());
    ensure!(before < 12 * MIB, "{before} bytes sent of a volume of which 48 MiB are excluded");
    for round in 0..6 {
        write(&scratch, 10 + round, 40 * MIB)?;
    }
    let image = image_now(&site, folder.path())?;
    let (sent_bytes, new_points) = (sent(&site)? - before, site.points()?.len() - points);
    eprintln!("{sent_bytes} bytes sent in {new_points} points while 240 MiB were written");
    ensure!(sent_bytes < 2 * MIB, "{sent_bytes} bytes were sent in {new_points} points");
    check_ext4(&image, folder.path(), |root| {
        holds(&root.join("kept.bin"), 2, 4 * MIB)?;
        let restored = std::fs::read(root.join("scratch.bin"))?;
        ensure!(restored.len() as u64 == 40 * MIB, "{} bytes", restored.len());
        ensure!(restored.iter().all(|byte| *byte == 0), "an excluded file is a hole");
        tool("swaplabel", &[root.join("swap").to_str().context("text")?]).map(drop)
    })?;

    // Its blocks become another file's; the volume has no others for all of it.
    std::fs::remove_file(&scratch)?;
    let other = mount.folder().join("other.bin");
    tool("sync", &[])?;
    write(&other, 4, 60 * MIB)?;
    let image = image_now(&site, folder.path())?;
    check_ext4(&image, folder.path(), |root| holds(&root.join("other.bin"), 4, 60 * MIB))?;
    excluded(&site, &scratch, |found| found["bytes"] == 0 && found["reason"] == "it does not exist")?;
    drop(swapped);
    std::fs::remove_file(&swap)?;
    mount.unmount()?;
    assert_same(device.node(), &image_now(&site, folder.path())?)?;
    let log = site.source_daemon().log();
    ensure!(log.matches("it does not exist").count() == 2, "each missing file is told of once: {log}");
    site.verify()
}

struct SwapOff(String);

impl Drop for SwapOff {
    fn drop(&mut self) {
        let _ = tool("swapoff", &[&self.0]);
    }
}

/// The agent's death forgets what is settled, not what was skipped; and what is excluded no more is captured.
#[test]
fn what_was_skipped_is_captured_by_an_agent_that_excludes_it_no_more() -> Result<()> {
    if !cdp_tests::privileged("what_was_skipped_is_captured_by_an_agent_that_excludes_it_no_more") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), 64 * MIB)?;
    make_ext4(device.node())?;
    let mount = Mount::new(device.node(), &folder.path().join("live"), "rw")?;
    let scratch = mount.folder().join("scratch.bin");
    write(&scratch, 1, 16 * MIB)?;
    let mut site = Site::new(folder.path())?;
    protect(&site, device.node())?;
    exclude(&site, &[&scratch])?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    excluded(&site, &scratch, |found| found["bytes"] == 16 * MIB)?;
    write(&scratch, 2, 16 * MIB)?;
    image_now(&site, folder.path())?;
    site.kill_source()?;
    write(&scratch, 3, 16 * MIB)?;
    site.start_source()?;
    excluded(&site, &scratch, |found| found["bytes"] == 16 * MIB)?;
    image_now(&site, folder.path())?;
    let again = sent(&site)?;
    ensure!(again < MIB, "{again} bytes were sent after the agent's death");
    site.kill_source()?;
    exclude(&site, &[])?;
    site.start_source()?;
    wait_for("the agent to answer", PATIENCE, || Ok(site.source_status().ok().map(drop)))?;
    let image = image_now(&site, folder.path())?;
    check_ext4(&image, folder.path(), |root| holds(&root.join("scratch.bin"), 3, 16 * MIB))?;
    mount.unmount()?;
    assert_same(device.node(), &image_now(&site, folder.path())?)
}

#[test]
fn what_is_shared_or_lies_elsewhere_is_captured_and_said_so() -> Result<()> {
    if !cdp_tests::privileged("what_is_shared_or_lies_elsewhere_is_captured_and_said_so") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), FileSystem::Xfs.size_bytes())?;
    FileSystem::Xfs.make(device.node())?;
    let mount = Mount::new(device.node(), &folder.path().join("live"), "rw")?;
    let file = |name: &str| mount.folder().join(name);
    write(&file("image"), 1, 8 * MIB)?;
    let cloned = tool("cp", &["--reflink=always", &text(&file("image"))?, &text(&file("clone"))?]);
    cloned.context("XFS shares extents")?;
    write(&file("plain"), 2, 4 * MIB)?;
    write(&file("named"), 3, MIB)?;
    std::fs::hard_link(file("named"), file("other-name"))?;
    let elsewhere = folder.path().join("elsewhere");
    write(&elsewhere, 4, MIB)?;
    let mut site = Site::new(folder.path())?;
    protect(&site, device.node())?;
    let key = site.state.join("groups/main/data.key");
    exclude(&site, &[&key])?;
    let refused = site.source(&["status"]).expect_err("refused").to_string();
    ensure!(refused.contains("lies in the state folder"), "{refused}");
    exclude(&site, &[&file("image"), &file("plain"), &file("named"), &elsewhere, mount.folder()])?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    excluded(&site, &file("plain"), |found| found["bytes"] == 4 * MIB && found["reason"].is_null())?;
    let is = |bytes: u64, part: &'static str| {
        move |found: &Value| found["bytes"] == bytes && found["reason"].as_str().is_some_and(|text| text.contains(part))
    };
    excluded(&site, &file("image"), is(0, "reflinks"))?;
    excluded(&site, &file("named"), is(0, "other names"))?;
    excluded(&site, &elsewhere, |found| found["bytes"] == 0 && found["reason"].is_string())?;
    excluded(&site, mount.folder(), is(0, "not a regular file"))?;
    // Half of it is written anew, and so is its own.
    write(&file("image"), 5, 4 * MIB)?;
    tool("sync", &[])?;
    excluded(&site, &file("image"), is(4 * MIB, "reflinks"))?;
    let image = image_now(&site, folder.path())?;
    let restored = LoopDevice::attach(&image)?;
    let looked = Mount::new(restored.node(), &folder.path().join("restored"), "rw,nouuid")?;
    holds(&looked.folder().join("clone"), 1, 8 * MIB)?;
    holds(&looked.folder().join("named"), 3, MIB)?;
    ensure!(std::fs::read(looked.folder().join("plain"))?.iter().all(|byte| *byte == 0), "a hole");
    looked.unmount()
}

fn text(path: &Path) -> Result<String> {
    Ok(path.to_str().context("a path of text")?.to_owned())
}

/// Nothing but the agent writes to the volume, whose state lies on it: it comes to rest, digests written and all.
#[test]
fn a_volume_that_holds_the_agents_own_state_comes_to_rest() -> Result<()> {
    if !cdp_tests::privileged("a_volume_that_holds_the_agents_own_state_comes_to_rest") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), 128 * MIB)?;
    make_ext4(device.node())?;
    let mount = Mount::new(device.node(), &folder.path().join("live"), "rw")?;
    write(&mount.folder().join("data"), 1, 16 * MIB)?;
    let mut site = Site::new_with_store(mount.folder(), &folder.path().join("target"))?;
    protect(&site, device.node())?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    excluded(&site, &site.state.join("groups/main/digests/0.slots"), |found| {
        found["kind"] == "own" && found["bytes"].as_u64().is_some_and(|bytes| bytes >= 128 * MIB / 256)
    })?;
    // Digests of more than 1024 blocks are written a minute after the first copy, the last thing that happens: the long run sees it.
    let rest = Duration::from_secs(std::env::var("CDP_REST_S").map_or(Ok(12), |seconds| seconds.parse())?);
    let patience = 4 * rest + PATIENCE;
    let mut points = (site.points()?.len(), Instant::now());
    wait_for("a time without a point", patience, || {
        let now = site.points()?.len();
        if now != points.0 {
            points = (now, Instant::now());
        }
        Ok((points.1.elapsed() >= rest).then_some(()))
    })?;
    let status = site.source_status()?;
    eprintln!("{} points in all, then none in {rest:?}; excluded {}", points.0, status["excludes"]);
    ensure!(points.0 < 40, "{} points of a volume that nobody uses", points.0);
    ensure!(status["cuts_unchanged"].as_u64().is_some_and(|cuts| cuts > 50), "{status}");
    site.stop_source()?;
    mount.unmount()
}
