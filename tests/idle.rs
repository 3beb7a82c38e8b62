//! An office in which nobody writes costs nothing: no epochs, no writes to any disk, next to nothing on the line.
//!
//! `CDP_IDLE_S` is how long it is looked at. Needs root, kernel BTF and loop devices; says so and passes over where they are
//! missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::loop_device::{LoopDevice, Mount};
use cdp_tests::process::{tool, wait_for};
use cdp_tests::relay::{Carried, Relay};
use cdp_tests::site::{PATIENCE, Site};
use std::path::Path;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// How long it is looked at, where nothing else is said.
const IDLE: Duration = Duration::from_secs(30);
/// What part of that time nothing has happened for: it has come to rest. The long run sees that few digests are written a minute
/// after the first copy; that is the last thing that happens.
const AT_REST_PART: u32 = 3;
const LINE_BYTES_A_MINUTE: u64 = 2000;

/// A disk with an ext4 that has nothing left to do for itself.
fn disk(folder: &Path, name: &str, size_bytes: u64) -> Result<(Mount, LoopDevice)> {
    let device = LoopDevice::new(&folder.join(format!("{name}.img")), size_bytes)?;
    let whole = "lazy_itable_init=0,lazy_journal_init=0";
    tool("mkfs.ext4", &["-q", "-F", "-E", whole, device.node().to_str().context("a path of text")?])?;
    Ok((Mount::new(device.node(), &folder.join(name), "rw,noatime")?, device))
}

/// Everything that an idle office is not to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Done {
    epochs: u64,
    /// By the kernel's account of the agent.
    agent_bytes: u64,
    /// Sectors written on the disk of its state, and on the volume. Requests are no measure: whoever syncs makes some without any.
    disks: [u64; 2],
}

fn done(site: &Site, disks: [&LoopDevice; 2]) -> Result<Done> {
    let document: serde_json::Value = serde_json::from_str(&site.source(&["status", "--json"])?)?;
    let io = std::fs::read_to_string(format!("/proc/{}/io", document["pid"]))?;
    let agent_bytes = io.lines().find_map(|line| line.strip_prefix("write_bytes: ")).context("write_bytes")?.parse()?;
    let epochs = document["groups"][0]["captured_epoch"].as_u64().context("an epoch")?;
    let sectors = |disk: &LoopDevice| -> Result<u64> {
        let name = disk.node().file_name().context("a name")?.to_string_lossy().into_owned();
        let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat"))?;
        Ok(stat.split_whitespace().nth(6).context("sectors written")?.parse()?)
    };
    Ok(Done { epochs, agent_bytes, disks: [sectors(disks[0])?, sectors(disks[1])?] })
}

/// Looks for `time`, and gives what was done meanwhile and what the line carried.
fn look(site: &Site, relay: &Relay, disks: [&LoopDevice; 2], time: Duration) -> Result<(Done, Done, Carried)> {
    let (before, carried, start) = (done(site, disks)?, relay.carried(), Instant::now());
    wait_for("the time to pass", time + PATIENCE, || Ok((start.elapsed() >= time).then_some(())))?;
    Ok((before, done(site, disks)?, relay.carried().since(carried)))
}

#[test]
fn an_idle_office_writes_nothing_and_says_next_to_nothing() -> Result<()> {
    if !cdp_tests::privileged("an_idle_office_writes_nothing_and_says_next_to_nothing") {
        return Ok(());
    }
    let idle = std::env::var("CDP_IDLE_S").map_or(Ok(IDLE), |seconds| seconds.parse().map(Duration::from_secs))?;
    let folder = tempfile::tempdir()?;
    let (state, state_disk) = disk(folder.path(), "state", 32 * MIB)?;
    let (volume, volume_disk) = disk(folder.path(), "volume", 64 * MIB)?;
    std::fs::write(volume.folder().join("file"), cdp_tests::files::content(1, 16 << 20))?;
    tool("sync", &[])?;
    let (mut site, relay) = Site::new_behind_a_line(state.folder(), &folder.path().join("store"))?;
    site.source(&["protect", &format!("data={}", volume_disk.node().display())])?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    let disks = [&state_disk, &volume_disk];
    wait_for("rest", 3 * PATIENCE + 2 * idle, || {
        // What others left in the page cache would be written some time later.
        tool("sync", &[])?;
        let (before, after, _) = look(&site, &relay, disks, idle / AT_REST_PART)?;
        Ok((before == after).then_some(()))
    })?;

    let cuts = |site: &Site| site.source_status()?["cuts_unchanged"].as_u64().context("cuts_unchanged");
    let cuts_before = cuts(&site)?;
    let (before, after, carried) = look(&site, &relay, disks, idle)?;
    eprintln!("{idle:?}: {} bytes up and {} down with their headers; {after:?}", carried.up, carried.down);
    ensure!(before == after, "an idle office did something: {before:?}, then {after:?}");
    let bound = LINE_BYTES_A_MINUTE * idle.as_secs().div_ceil(60);
    ensure!(carried.bytes() <= bound, "{carried:?} in {idle:?}, {bound} allowed");
    ensure!(carried.bytes() > 0, "nothing keeps the line up");
    ensure!(cuts(&site)? - cuts_before >= idle.as_secs() / 2, "it has looked whether anything changed");
    site.stop_source()?;
    site.stop_target()?;
    drop(site);
    volume.unmount()?;
    state.unmount()
}
