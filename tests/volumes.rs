//! The main job on real devices: a live volume is protected, and every point that comes out of it is whole.
//!
//! Needs root, kernel BTF and loop devices; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::files::Churn;
use cdp_tests::image::{assert_same, check_ext4};
use cdp_tests::loop_device::{LoopDevice, Mount};
use cdp_tests::process::{tool, wait_for};
use cdp_tests::site::{PATIENCE, Point, Site};
use cdp_tests::sqlite::{Committed, Writer, counter_in};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const VOLUME_BYTES: u64 = 192 * MIB;

/// Everything that writes to the volume, and what it knows of it.
struct Load {
    writers: Vec<Writer>,
    churn: Churn,
}

impl Load {
    fn start(folder: &Path) -> Result<Self> {
        let writers =
            vec![Writer::start(&folder.join("wal.db"), "wal")?, Writer::start(&folder.join("rollback.db"), "delete")?];
        Ok(Self { writers, churn: Churn::start(&folder.join("churn"))? })
    }

    fn stop(self) -> Result<BTreeMap<String, Vec<Committed>>> {
        let operations = self.churn.stop()?;
        ensure!(operations > 0, "the churn did nothing");
        self.writers.into_iter().map(Writer::stop).collect()
    }
}

fn make_ext4(device: &Path, folder: &Path) -> Result<Mount> {
    tool("mkfs.ext4", &["-q", "-F", device.to_str().context("a path of text")?])?;
    Mount::new(device, folder, "rw")
}

fn protect(site: &Site, device: &Path) -> Result<()> {
    site.source(&["protect", &format!("data={}", device.display())]).map(drop)
}

/// Exports each of `points` and holds it against what the writers know: file system and databases are whole, counters
/// never shrink from point to point, and what was committed before a cut began is in its point.
fn check_points(
    site: &Site,
    points: &[Point],
    committed: &BTreeMap<String, Vec<Committed>>,
    scratch: &Path,
) -> Result<()> {
    let mut before: BTreeMap<&str, i64> = BTreeMap::new();
    for point in points {
        let image = scratch.join("point.img");
        site.export("data", point.epoch, &image)?;
        let counters = check_ext4(&image, scratch, |root| {
            committed.keys().map(|name| Ok((name.as_str(), counter_in(root, name)?.unwrap_or(0)))).collect()
        });
        let counters: BTreeMap<&str, i64> = counters.with_context(|| format!("point {}", point.epoch))?;
        let began_ms = cut_began_ms(point)?;
        for (name, counter) in &counters {
            let shrunk = before.get(name).is_some_and(|before| before > counter);
            ensure!(!shrunk, "{name}: {counter} at point {}, {before:?} before", point.epoch);
            let due =
                committed[*name].iter().rev().find(|commit| commit.at_ms < began_ms).map_or(0, |commit| commit.counter);
            ensure!(*counter >= due, "{name}: {counter} at point {}, {due} was committed before its cut", point.epoch);
        }
        before = counters;
        std::fs::remove_file(&image)?;
    }
    Ok(())
}

fn cut_began_ms(point: &Point) -> Result<i64> {
    let instant: jiff::Timestamp = point.time.parse()?;
    Ok(instant.as_millisecond() - point.cut_ms.ceil() as i64)
}

/// Waits until the agent has acked all there is, then holds the newest point against the device.
fn newest_point_equals(site: &Site, device: &Path, scratch: &Path) -> Result<u64> {
    tool("sync", &[])?;
    let epoch = site.point_now()?;
    let image = scratch.join("newest.img");
    let _ = std::fs::remove_file(&image);
    site.export("data", epoch, &image)?;
    assert_same(device, &image).with_context(|| format!("point {epoch}"))?;
    Ok(epoch)
}

/// Two databases and file churn on ext4: 200 cuts at 100 ms, 20 points at 1 s; all of them whole.
fn live_volume(device: &Path, folder: &Path) -> Result<()> {
    let mount = make_ext4(device, &folder.join("live"))?;
    let mut site = Site::new(folder)?;
    protect(&site, device)?;
    site.set_group_option("interval_ms = 100")?;
    let load = Load::start(mount.folder())?;
    site.start_source()?;
    site.wait_for_points(200, Duration::from_secs(120))?;
    let status = site.source_status()?;
    let (tried, validated) = (count(&status, "cuts_tried")?, count(&status, "cuts_validated")?);
    eprintln!("{validated} of {tried} cuts validated");
    ensure!(tried >= 200 && validated * 100 >= tried * 99, "{validated} of {tried} cuts validated: {status}");
    site.stop_source()?;

    let fast = site.points()?;
    site.set_group_option("interval_ms = 1000")?;
    site.start_source()?;
    let all = site.wait_for_points(fast.len() + 20, Duration::from_secs(120))?;
    let committed = load.stop()?;
    let sample: Vec<Point> =
        all[..fast.len()].iter().step_by(fast.len() / 10).chain(&all[fast.len()..]).cloned().collect();
    check_points(&site, &sample, &committed, folder)?;
    let rounds: BTreeMap<u64, usize> = all.iter().fold(BTreeMap::new(), |mut rounds, point| {
        *rounds.entry(point.cut_rounds).or_default() += 1;
        rounds
    });
    let commits: usize = committed.values().map(Vec::len).sum();
    eprintln!(
        "{} points, {} exported and checked, {commits} commits, points by rounds: {rounds:?}",
        all.len(),
        sample.len()
    );

    mount.unmount()?;
    newest_point_equals(&site, device, folder)?;
    site.verify()
}

fn count(status: &serde_json::Value, key: &str) -> Result<u64> {
    status[key].as_u64().with_context(|| format!("{key} in {status}"))
}

#[test]
fn every_point_of_a_live_ext4_is_whole() -> Result<()> {
    if !cdp_tests::privileged("every_point_of_a_live_ext4_is_whole") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), VOLUME_BYTES)?;
    live_volume(device.node(), folder.path())
}

#[test]
fn every_point_of_a_live_partition_is_whole() -> Result<()> {
    if !cdp_tests::privileged("every_point_of_a_live_partition_is_whole") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("disk.img");
    std::fs::File::create_new(&file)?.set_len(2 * VOLUME_BYTES)?;
    // The first partition starts at sector 63, as old tools made it; the second is the protected one.
    let table = format!("label: dos\nstart=63, size=2048\nstart=4095, size={}\n", VOLUME_BYTES / 512);
    let script = folder.path().join("table");
    std::fs::write(&script, table)?;
    tool("sh", &["-c", &format!("sfdisk -q {} < {}", file.display(), script.display())])?;
    let device = LoopDevice::attach(&file)?;
    live_volume(&device.partition(2)?, folder.path())
}

/// The folder in which the group's tracking is pinned: others run on the same machine.
fn pins(site: &Site) -> Result<String> {
    let facts = std::fs::read_to_string(site.state.join("groups/main/group.toml"))?;
    let id =
        facts.lines().find_map(|line| line.strip_prefix("group = ")).with_context(|| format!("an id in {facts}"))?;
    Ok(format!("/sys/fs/bpf/cdp/{}", id.trim_matches('"')))
}

/// What the tracking cannot vouch for is read again in whole, and the next point equals the device; only what differs is sent.
#[test]
fn whatever_does_not_match_is_compared_in_whole() -> Result<()> {
    if !cdp_tests::privileged("whatever_does_not_match_is_compared_in_whole") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let mut device = LoopDevice::new(&folder.path().join("disk.img"), 64 * MIB)?;
    let node = device.node().to_owned();
    let mut site = Site::new(folder.path())?;
    scribble(&node, 1)?;
    protect(&site, &node)?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    newest_point_equals(&site, &node, folder.path())?;

    // Control: nothing wrong, written to while the agent is down: goes on without starting over.
    site.stop_source()?;
    scribble(&node, 2)?;
    site.start_source()?;
    started_over(&mut site, None)?;
    newest_point_equals(&site, &node, folder.path())?;

    site.kill_source()?;
    // As after a power cut: the agent had no time for anything, and the pins are gone.
    let pins = pins(&site)?;
    tool("rm", &["-r", &pins])?;
    scribble(&node, 3)?;
    site.start_source()?;
    started_over(&mut site, Some(""))?;
    newest_point_equals(&site, &node, folder.path())?;
    only_scribbles_were_sent(&site)?;

    site.stop_source()?;
    tool("sh", &["-c", &format!("rm $(find {pins} -iname '*link*' -type f | head -n 1)")])?;
    scribble(&node, 4)?;
    site.start_source()?;
    started_over(&mut site, Some(""))?;
    newest_point_equals(&site, &node, folder.path())?;
    only_scribbles_were_sent(&site)?;

    site.stop_source()?;
    let other = folder.path().join("other.img");
    std::fs::copy(device.file(), &other)?;
    device.reattach(&other)?;
    scribble(&node, 5)?;
    site.start_source()?;
    started_over(&mut site, Some(""))?;
    newest_point_equals(&site, &node, folder.path())?;
    only_scribbles_were_sent(&site)?;

    site.stop_source()?;
    let boot_id = folder.path().join("boot_id");
    std::fs::write(&boot_id, "00000000-0000-4000-8000-000000000000\n")?;
    scribble(&node, 6)?;
    site.start_source_booted(&boot_id)?;
    started_over(&mut site, Some("boot"))?;
    newest_point_equals(&site, &node, folder.path())?;
    only_scribbles_were_sent(&site)?;
    Ok(())
}

/// The agent read 64 MiB, and sent the 8 MiB that differ.
fn only_scribbles_were_sent(site: &Site) -> Result<()> {
    let status = site.source_status()?;
    let (sent, unchanged) = (count(&status, "acked_bytes")?, count(&status, "unchanged_bytes")?);
    eprintln!("{sent} bytes sent, {unchanged} bytes compared and not sent");
    ensure!(sent < 9 * MIB, "{sent} bytes were sent where 8 MiB differ");
    ensure!(unchanged > 50 * MIB, "{unchanged} bytes were found to be unchanged of 56 MiB");
    Ok(())
}

/// Waits for the agent's tracking and holds the reason why it started over against `because` (`None`: it went on).
fn started_over(site: &mut Site, because: Option<&str>) -> Result<()> {
    let tracker = wait_for("the tracker's report", PATIENCE, || {
        let status = site.source_status().ok();
        let tracker = status.map(|status| status["tracker"].clone());
        Ok(tracker.filter(|tracker| tracker["kind"] == "ebpf"))
    })?;
    match (because, tracker["started_over"].as_str()) {
        (None, None) => Ok(()),
        (Some(text), Some(reason)) if reason.contains(text) => {
            eprintln!("started over: {reason}");
            Ok(())
        }
        (expected, found) => anyhow::bail!("started over: expected {expected:?}, found {found:?}"),
    }
}

/// Writes 8 MiB that only `seed` gives, at places that only `seed` gives.
fn scribble(device: &Path, seed: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().write(true).open(device)?;
    for piece in 0..128 {
        let place = u64::from(blake3::hash(&[seed, piece].map(u64::to_le_bytes).concat()).as_bytes()[0]);
        let offset = (place * 64 + piece / 2) * 4096 % (60 * MIB);
        file.write_all_at(&cdp_tests::files::content(seed * 1000 + piece, 65_536), offset)?;
    }
    file.sync_all()?;
    Ok(())
}

/// A block of the volume changes and nobody tells the tracker: the audit finds it, says so, and the next point equals the device.
#[test]
fn a_write_that_was_missed_is_found_by_the_audit() -> Result<()> {
    use std::os::unix::fs::FileExt;
    if !cdp_tests::privileged("a_write_that_was_missed_is_found_by_the_audit") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), 64 * MIB)?;
    let mut site = Site::new(folder.path())?;
    scribble(device.node(), 1)?;
    protect(&site, device.node())?;
    site.set_group_option("interval_ms = 50")?;
    site.set_group_option("audit_interval_s = 10")?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    newest_point_equals(&site, device.node(), folder.path())?;
    let audited = |site: &Site, what: &str, wanted: u64| {
        wait_for(what, PATIENCE, || {
            let count = count(&site.source_status()?["audit"], what)?;
            Ok((count >= wanted).then_some(count))
        })
    };
    audited(&site, "proved_blocks", 64 * MIB / 4096)?;
    ensure!(audited(&site, "differing_blocks", 0)? == 0, "a false alarm");
    // Behind the device's back: no write of its own goes to it.
    std::fs::File::options().write(true).open(device.file())?.write_all_at(&[0x5a; 4096], 777 * 4096)?;
    ensure!(audited(&site, "differing_blocks", 1)? == 1, "one block differs");
    newest_point_equals(&site, device.node(), folder.path())?;
    let log = site.source_daemon().log();
    ensure!(log.contains("a write was missed") && log.contains("first_block=777"), "{log}");
    Ok(())
}

/// In each interval more changes than fits into one cut: parts go first, and the cut follows them at once.
#[test]
fn points_are_made_where_more_changes_between_two_than_fits_into_a_cut() -> Result<()> {
    use std::os::unix::fs::FileExt;
    if !cdp_tests::privileged("points_are_made_where_more_changes_between_two_than_fits_into_a_cut") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), 64 * MIB)?;
    let mut site = Site::new(folder.path())?;
    protect(&site, device.node())?;
    site.set_group_option(&format!("capture_bytes_max = {MIB}"))?;
    site.start_source()?;
    let before = site.wait_for_points(1, PATIENCE)?.len();
    let file = std::fs::File::options().write(true).open(device.node())?;
    let mut written = 0;
    // 256 KiB each 50 ms are five times as much in a second.
    wait_for("points under load", PATIENCE, || {
        file.write_all_at(&cdp_tests::files::content(written, MIB as usize / 4), written % 256 * (MIB / 4))?;
        file.sync_data()?;
        written += 1;
        std::thread::park_timeout(Duration::from_millis(30));
        let points = if written % 20 == 0 { site.points()?.len() } else { 0 };
        Ok((points >= before + 5).then_some(()))
    })?;
    eprintln!("5 points while {} KiB were written", written * 256);
    newest_point_equals(&site, device.node(), folder.path()).map(drop)
}

/// `kill -9` of the agent under load: its successor goes on from the pinned maps, and nothing is missing.
#[test]
fn a_killed_agents_successor_goes_on() -> Result<()> {
    if !cdp_tests::privileged("a_killed_agents_successor_goes_on") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), VOLUME_BYTES)?;
    let mount = make_ext4(device.node(), &folder.path().join("live"))?;
    let mut site = Site::new(folder.path())?;
    protect(&site, device.node())?;
    site.set_group_option("interval_ms = 100")?;
    site.start_source()?;
    site.wait_for_points(3, PATIENCE)?;
    let load = Load::start(mount.folder())?;
    for _ in 0..10 {
        let before = site.points()?.len();
        site.wait_for_points(before + 3, PATIENCE)?;
        site.kill_source()?;
        site.start_source()?;
        started_over(&mut site, None)?;
    }
    let before = site.points()?.len();
    let points = site.wait_for_points(before + 3, PATIENCE)?;
    let committed = load.stop()?;
    let sample: Vec<Point> = points.iter().rev().step_by(points.len() / 5).rev().cloned().collect();
    check_points(&site, &sample, &committed, folder.path())?;
    mount.unmount()?;
    newest_point_equals(&site, device.node(), folder.path())?;
    Ok(())
}

/// `kill -9` of the target at random moments, 50 times: every acked point is still there and has the same content.
#[test]
fn a_killed_target_keeps_every_acked_point() -> Result<()> {
    if !cdp_tests::privileged("a_killed_target_keeps_every_acked_point") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), 32 * MIB)?;
    let mount = make_ext4(device.node(), &folder.path().join("live"))?;
    let mut site = Site::new(folder.path())?;
    protect(&site, device.node())?;
    site.set_group_option("interval_ms = 100")?;
    site.start_source()?;
    site.wait_for_points(2, PATIENCE)?;
    let churn = Churn::start(&mount.folder().join("churn"))?;
    let image = folder.path().join("kept.img");
    let mut kept: BTreeMap<u64, blake3::Hash> = BTreeMap::new();
    for round in 0..50_u8 {
        // The acked head as the source knows it: from here on the target must have it.
        let acked = wait_for("a new acked point", PATIENCE, || {
            let acked = site.source_status()?["acked_epoch"].as_u64();
            Ok(acked.filter(|acked| kept.keys().next_back().is_none_or(|last| acked > last)))
        })?;
        site.export("data", acked, &image)?;
        kept.insert(acked, blake3::hash(&std::fs::read(&image)?));
        std::fs::remove_file(&image)?;
        let pause = blake3::hash(&[round]).as_bytes()[0];
        std::thread::park_timeout(Duration::from_millis(u64::from(pause)));
        site.kill_target()?;
        site.start_target()?;
    }
    churn.stop()?;
    for (epoch, hash) in &kept {
        site.export("data", *epoch, &image)?;
        ensure!(blake3::hash(&std::fs::read(&image)?) == *hash, "point {epoch} changed");
        std::fs::remove_file(&image)?;
    }
    eprintln!("50 kills, {} acked points exported before and after: the same", kept.len());
    mount.unmount()?;
    newest_point_equals(&site, device.node(), folder.path())?;
    site.verify()
}
