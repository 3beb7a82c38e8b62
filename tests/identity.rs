//! Devices that are not what they were, and groups of many volumes: never trusted, and the next point equals the device.
//!
//! What a tracking of the same device survives, and what it does not when its pins are touched, stands in `volumes`. Needs root,
//! kernel BTF and loop devices; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::files::content;
use cdp_tests::image::assert_same;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::{program, tool, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use cdp_tests::zram_device::{self, ZramDevice};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 32 * MIB;
/// As many as a group may have.
const VOLUMES: u32 = 64;

/// Writes 1 MiB that only `seed` gives, scattered over the first 16 MiB of a device or a file.
fn scribble(path: &Path, seed: u64) -> Result<()> {
    let file = std::fs::File::options().write(true).open(path)?;
    for piece in 0..64 {
        let place = (piece * 37 + seed * 11) % 1024;
        file.write_all_at(&content(seed * 1000 + piece, 16 << 10), place * (16 << 10))?;
    }
    Ok(file.sync_all()?)
}

/// A point cut now holds what each of `volumes` (name, device) holds.
fn newest_point_equals(site: &Site, volumes: &[(&str, &Path)], scratch: &Path) -> Result<()> {
    wait_for("the agent to answer", PATIENCE, || Ok(site.source_status().ok().map(drop)))?;
    tool("sync", &[])?;
    let epoch = site.point_now()?;
    for (name, device) in volumes {
        let image = scratch.join("newest.img");
        let _ = std::fs::remove_file(&image);
        site.export(name, epoch, &image)?;
        assert_same(device, &image).with_context(|| format!("{name} at point {epoch}"))?;
    }
    Ok(())
}

/// Why the agent's tracking started over, once it says so.
fn started_over(site: &Site) -> Result<String> {
    wait_for("the tracking to start over", PATIENCE, || {
        let status = site.source_status().ok();
        Ok(status.and_then(|status| status["tracker"]["started_over"].as_str().map(str::to_owned)))
    })
}

/// A change made to a device behind a stopped agent's back.
type Change<'a> = (&'a str, &'a dyn Fn(&mut LoopDevice) -> Result<()>);

#[test]
fn a_device_that_changed_while_nobody_looked_is_captured_in_whole() -> Result<()> {
    if !cdp_tests::privileged("a_device_that_changed_while_nobody_looked_is_captured_in_whole") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("disk.img");
    let mut device = LoopDevice::new(&file, DISK_BYTES)?;
    let mut site = Site::new(folder.path())?;
    scribble(device.node(), 1)?;
    site.source(&["protect", &format!("data={}", device.node().display())])?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    let changes: [Change<'_>; 3] = [
        ("written to while it was detached", &|device| {
            device.detach()?;
            scribble(&file, 2)?;
            device.reattach(&file)
        }),
        ("attached with another offset", &|device| {
            device.detach()?;
            std::fs::File::options().write(true).open(&file)?.set_len(DISK_BYTES + MIB)?;
            device.reattach_at(&file, MIB, DISK_BYTES)
        }),
        ("attached as it was", &|device| {
            device.detach()?;
            device.reattach_at(&file, 0, DISK_BYTES)
        }),
    ];
    for (name, change) in changes {
        site.stop_source()?;
        change(&mut device).with_context(|| name.to_owned())?;
        site.start_source()?;
        let reason = started_over(&site).with_context(|| name.to_owned())?;
        eprintln!("{name}: {reason}");
        let volumes = [("data", device.node())];
        newest_point_equals(&site, &volumes, folder.path()).with_context(|| name.to_owned())?;
    }
    Ok(())
}

/// `losetup -c` behind a stopped agent's back: the volume has another size, and so has its next point.
#[test]
fn a_device_that_grew_while_nobody_looked_is_captured_in_whole_or_said_to_differ() -> Result<()> {
    if !cdp_tests::privileged("a_device_that_grew_while_nobody_looked_is_captured_in_whole_or_said_to_differ") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), DISK_BYTES)?;
    let node = device.node().display().to_string();
    let mut site = Site::new(folder.path())?;
    scribble(device.node(), 1)?;
    site.source(&["protect", &format!("data={node}")])?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    site.stop_source()?;
    std::fs::File::options().write(true).open(device.file())?.set_len(2 * DISK_BYTES)?;
    tool("losetup", &["--set-capacity", &node])?;
    scribble(device.node(), 2)?;
    site.start_source()?;
    let reason = wait_for("the agent to say what is different", PATIENCE, || {
        let status = site.source_status().ok();
        let texts = status.map(|status| [status["reason"].clone(), status["tracker"]["started_over"].clone()]);
        Ok(texts.and_then(|texts| texts.iter().find_map(|text| text.as_str().map(str::to_owned))))
    })?;
    eprintln!("grown while nobody looked: {reason}");
    // Back to its size, the same device by its number: what was written meanwhile must not be missing.
    site.stop_source()?;
    std::fs::File::options().write(true).open(device.file())?.set_len(DISK_BYTES)?;
    tool("losetup", &["--set-capacity", &node])?;
    scribble(device.node(), 3)?;
    site.start_source()?;
    newest_point_equals(&site, &[("data", device.node())], folder.path())?;
    // Grown once more, and protected anew, as the agent asked for.
    site.stop_source()?;
    std::fs::File::options().write(true).open(device.file())?.set_len(2 * DISK_BYTES)?;
    tool("losetup", &["--set-capacity", &node])?;
    scribble(device.node(), 4)?;
    site.source(&["unprotect", "data"])?;
    site.source(&["protect", &format!("data={node}")])?;
    site.start_source()?;
    newest_point_equals(&site, &[("data", device.node())], folder.path())
}

/// zram keeps its sequence number over a reset, so that nothing in its identity tells. (It has no partitions: the kernel does not
/// make any on it.)
#[test]
fn a_zram_device_cannot_be_reset_while_it_is_protected_and_is_another_one_afterwards() -> Result<()> {
    let test = "a_zram_device_cannot_be_reset_while_it_is_protected_and_is_another_one_afterwards";
    if !cdp_tests::privileged(test) || !zram_device::is_there(test) {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = ZramDevice::new(DISK_BYTES)?;
    let mut site = Site::new(folder.path())?;
    scribble(device.node(), 1)?;
    site.source(&["protect", &format!("data={}", device.node().display())])?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    let volumes = [("data", device.node())];
    for seed in 2..6 {
        // Nobody else has it open between two of them: the agent has.
        scribble(device.node(), seed)?;
        let refused = format!("{:#}", device.reset().err().context("it is reset under the agent")?);
        ensure!(refused.contains("busy"), "{refused}");
    }
    newest_point_equals(&site, &volumes, folder.path())?;
    ensure!(site.source_status()?["reason"].is_null(), "nothing is wrong with it: {}", site.source_status()?);

    site.stop_source()?;
    device.reset()?;
    device.set_size(DISK_BYTES)?;
    scribble(device.node(), 7)?;
    site.start_source()?;
    let reason = started_over(&site)?;
    ensure!(reason.contains("was reset"), "{reason}");
    newest_point_equals(&site, &volumes, folder.path())
}

/// Nothing was interrupted: the group goes on, and what joins is copied.
#[test]
fn a_volume_that_joins_a_group_with_points_is_a_first_copy_and_no_interruption() -> Result<()> {
    if !cdp_tests::privileged("a_volume_that_joins_a_group_with_points_is_a_first_copy_and_no_interruption") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let first = LoopDevice::new(&folder.path().join("first.img"), DISK_BYTES)?;
    let second = LoopDevice::new(&folder.path().join("second.img"), DISK_BYTES)?;
    let mut site = Site::new(folder.path())?;
    scribble(first.node(), 1)?;
    scribble(second.node(), 2)?;
    site.source(&["protect", &format!("first={}", first.node().display())])?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    site.stop_source()?;
    site.source(&["protect", &format!("second={}", second.node().display())])?;
    site.start_source()?;
    newest_point_equals(&site, &[("first", first.node()), ("second", second.node())], folder.path())?;
    let tracker = site.source_status()?["tracker"].clone();
    ensure!(tracker["started_over"].is_null(), "{tracker}");
    ensure!(tracker["first_copy"].as_str().is_some_and(|text| text.contains("not tracked before")), "{tracker}");
    let log = site.source_daemon().log();
    ensure!(log.contains("first copy") && !log.contains("interrupted"), "{log}");
    Ok(())
}

/// A disk and a partition of it: whichever comes second is refused, in any group, and the first goes on. (That the tracker itself
/// marks both is shown beside it.)
#[test]
fn a_volume_that_is_part_of_another_one_is_refused() -> Result<()> {
    if !cdp_tests::privileged("a_volume_that_is_part_of_another_one_is_refused") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), DISK_BYTES)?;
    let partition = device.add_partition(1, 63, 24 * MIB / 512 + 3)?;
    let mut site = Site::new(folder.path())?;
    let (disk, part) = (format!("disk={}", device.node().display()), format!("part={}", partition.display()));
    for (first, second) in [(&disk, &part), (&part, &disk)] {
        site.source(&["protect", first])?;
        for arguments in [&["protect", second][..], &["protect", "--group", "other", second]] {
            let refused = site.source(arguments).err().context("both are taken")?.to_string();
            ensure!(refused.contains("is already protected as") && refused.contains("hint: "), "{refused}");
        }
        if first == &disk {
            site.source(&["unprotect", "disk"])?;
        }
    }
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    scribble(device.node(), 1)?;
    newest_point_equals(&site, &[("part", partition.as_path())], folder.path())
}

/// As many volumes as a group may have, one more than that, and an agent too many.
#[test]
fn sixty_four_volumes_are_one_group_and_a_second_agent_is_refused() -> Result<()> {
    if !cdp_tests::privileged("sixty_four_volumes_are_one_group_and_a_second_agent_is_refused") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), 66 * MIB)?;
    let place = |number: u32| u64::from(number) * MIB / 512 - 3;
    let nodes: Vec<_> =
        (1..=VOLUMES + 1).map(|number| device.add_partition(number, place(number), 1024)).collect::<Result<_>>()?;
    let mut site = Site::new(folder.path())?;
    let named: Vec<String> =
        nodes.iter().zip(1..).map(|(node, number)| format!("v{number}={}", node.display())).collect();
    let arguments: Vec<&str> = ["protect"].into_iter().chain(named.iter().map(String::as_str)).collect();
    site.source(&arguments[..=VOLUMES as usize])?;
    let refused = site.source(&["protect", arguments[VOLUMES as usize + 1]]).err().context("a 65th is taken")?;
    ensure!(refused.to_string().contains("64"), "{refused:#}");
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    for (node, number) in nodes.iter().zip(0..) {
        std::fs::write(node, content(number, 64 << 10))?;
    }
    let chosen: Vec<(String, &Path)> =
        [1, 2, 33, VOLUMES].map(|number| (format!("v{number}"), nodes[number as usize - 1].as_path())).into();
    let chosen: Vec<(&str, &Path)> = chosen.iter().map(|(name, node)| (name.as_str(), *node)).collect();
    newest_point_equals(&site, &chosen, folder.path())?;

    let second = Command::new(program("cdp-source")).arg("run").env("CDP_SOURCE_STATE", &site.state).output()?;
    let stderr = String::from_utf8_lossy(&second.stderr);
    ensure!(!second.status.success() && stderr.contains("error: "), "a second agent: {}: {stderr}", second.status);
    eprintln!("a second agent: {}", stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_default());
    ensure!(site.source_daemon().is_running()?, "the first agent goes on");
    for (node, number) in nodes.iter().zip(100..) {
        std::fs::write(node, content(number, 64 << 10))?;
    }
    newest_point_equals(&site, &chosen, folder.path())
}
