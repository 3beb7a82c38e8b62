//! Bad input on real devices: a clear error, and nothing lost.
//!
//! What needs no device stands in each program's own tests (`cdp-source/tests/cli.rs`, `cdp-target/tests/cli.rs`,
//! `cdp-target/tests/hostile.rs`).

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::files::content;
use cdp_tests::image::assert_same;
use cdp_tests::loop_device::{LoopDevice, Mount};
use cdp_tests::process::{program, tool, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// A source that was pushed back comes again every 5 s.
const TWO_TRIES: Duration = Duration::from_secs(12);

/// A command that has to fail as the user's mistake: exit status 1, one `error:` line that holds all of `words`, and a hint.
fn refused(command: &mut Command, words: &[&str]) -> Result<()> {
    let output = command.output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1), "{command:?}: {}: {stderr}", output.status);
    let error =
        stderr.lines().find(|line| line.starts_with("error: ")).with_context(|| format!("an error in {stderr}"))?;
    for word in words {
        ensure!(error.contains(word), "{command:?}: {word:?} is not in {error:?}");
    }
    ensure!(stderr.lines().any(|line| line.starts_with("hint: ")), "{command:?}: no hint in {stderr}");
    Ok(())
}

fn source(site: &Site, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("cdp-source"));
    command.args(arguments).env("CDP_SOURCE_STATE", &site.state);
    command
}

fn target(site: &Site, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("cdp-target"));
    command.args(arguments).env("CDP_TARGET_DATA", &site.data);
    command
}

fn fill(device: &Path, seed: u64, len: usize) -> Result<()> {
    use std::io::Write;
    let mut file = std::fs::File::options().write(true).open(device)?;
    file.write_all(&content(seed, len))?;
    Ok(file.sync_all()?)
}

/// What `protect` and `export` say to devices that are not fit, on a machine with real ones.
#[test]
fn devices_that_are_not_fit_are_refused_by_name() -> Result<()> {
    if !cdp_tests::privileged("devices_that_are_not_fit_are_refused_by_name") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), 16 * MIB)?;
    let node = device.node().display().to_string();
    let mut site = Site::new(folder.path())?;
    let table = [
        ("data=/dev/no-such-device".to_owned(), "/dev/no-such-device"),
        ("data=/dev/null".to_owned(), "/dev/null"),
        (format!("data={}", folder.path().display()), "folder"),
    ];
    for (argument, word) in &table[..2] {
        refused(&mut source(&site, &["protect", argument]), &[word])?;
    }
    refused(&mut source(&site, &["protect", &table[2].0]), &[])?;
    site.source(&["protect", &format!("data={node}")])?;
    refused(&mut source(&site, &["protect", &format!("again={node}")]), &[&node])?;

    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    // Onto a mounted device, not even by force; onto a file that is there, only by force.
    let other = LoopDevice::new(&folder.path().join("other.img"), 16 * MIB)?;
    let other_node = other.node().display().to_string();
    tool("mkfs.ext4", &["-q", &other_node])?;
    let mount = Mount::new(other.node(), &folder.path().join("mounted"), "ro")?;
    let export = ["export", "office/main/data", "--at", "latest", "--output"];
    refused(&mut target(&site, &[&export[..], &[&other_node]].concat()), &[&other_node])?;
    refused(&mut target(&site, &[&export[..], &[&other_node, "--force"]].concat()), &[&other_node, "mounted"])?;
    mount.unmount()?;
    let file = folder.path().join("there.img");
    std::fs::write(&file, "precious")?;
    refused(&mut target(&site, &[&export[..], &[&file.display().to_string()]].concat()), &["there.img"])?;
    ensure!(std::fs::read(&file)? == b"precious", "the file was touched");
    site.target(&[&export[..], &[&other_node, "--force"]].concat())?;
    assert_same(device.node(), other.node())?;
    // Points before the first and after the last: the nearest ones are named.
    refused(
        &mut target(&site, &["export", "office/main/data", "--at", "2001-01-01T00:00:00Z", "--output", "x"]),
        &["2001"],
    )?;
    refused(&mut target(&site, &["export", "office/main/data", "--at", "999999", "--output", "x"]), &["999999"])?;
    // What was pinned in the kernel goes with the last volume, also without an agent.
    site.stop_source()?;
    ensure!(site.pins().is_some_and(|pins| pins.exists()), "tracking goes on without the agent");
    site.source(&["unprotect", "data"])?;
    ensure!(site.pins().is_some_and(|pins| !pins.exists()), "nothing is tracked any more");
    Ok(())
}

/// A device that grows while it is protected, or is gone when the agent starts: no point is made of it, the agent says
/// so, and goes on when the device is what it was.
#[test]
fn a_device_that_changes_under_protection_stops_its_group_and_no_other() -> Result<()> {
    if !cdp_tests::privileged("a_device_that_changes_under_protection_stops_its_group_and_no_other") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let mut device = LoopDevice::new(&folder.path().join("disk.img"), 16 * MIB)?;
    let steady = LoopDevice::new(&folder.path().join("steady.img"), 16 * MIB)?;
    let mut site = Site::new(folder.path())?;
    site.source(&["protect", &format!("data={}", device.node().display())])?;
    site.source(&["protect", "--group", "steady", &format!("data={}", steady.node().display())])?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    let stopped = |site: &Site| -> Result<serde_json::Value> {
        wait_for("the group to say that it stopped", PATIENCE, || {
            // None while the agent starts.
            let status = group_status(site, "main").ok();
            Ok(status.filter(|status| status["state"] == "stalled" && status["reason"].is_string()))
        })
    };

    // Grows.
    std::fs::File::options().write(true).open(device.file())?.set_len(32 * MIB)?;
    tool("losetup", &["--set-capacity", &device.node().display().to_string()])?;
    fill(device.node(), 1, 1 << 20)?;
    let grown = stopped(&site)?["reason"].to_string();
    ensure!(grown.contains("grew from"), "{grown}");
    // Shrinks back to what it was: the group goes on by itself.
    std::fs::File::options().write(true).open(device.file())?.set_len(16 * MIB)?;
    tool("losetup", &["--set-capacity", &device.node().display().to_string()])?;
    wait_for("the group to go on", PATIENCE, || {
        Ok((group_status(&site, "main")?["state"] == "continuous").then_some(()))
    })?;
    // Is gone when the agent starts, while the other group goes on; and comes back as another file. (While an agent holds
    // it open, the kernel puts a detach off.)
    site.stop_source()?;
    let before = steady_points(&site)?;
    device.detach()?;
    fill(steady.node(), 2, 1 << 20)?;
    site.start_source()?;
    let gone = stopped(&site)?["reason"].to_string();
    ensure!(gone.contains(&device.node().display().to_string()), "{gone}");
    wait_for("the other group to go on", PATIENCE, || Ok((steady_points(&site)? > before).then_some(())))?;
    ensure!(group_status(&site, "main")?["state"] == "stalled", "the group without its device goes on");
    let other = folder.path().join("other.img");
    std::fs::write(&other, content(7, 16 << 20))?;
    device.reattach(&other)?;
    wait_for("the group to go on", PATIENCE, || {
        Ok((group_status(&site, "main")?["state"] == "continuous").then_some(()))
    })?;
    let status = group_status(&site, "main")?;
    ensure!(status["tracker"]["started_over"].is_string(), "all of another file is dirty: {status}");
    let epoch = site.point_now()?;
    let image = folder.path().join("newest.img");
    site.export("data", epoch, &image)?;
    assert_same(device.node(), &image)
}

fn group_status(site: &Site, name: &str) -> Result<serde_json::Value> {
    let document: serde_json::Value = serde_json::from_str(&site.source(&["status", "--json"])?)?;
    let groups = document["groups"].as_array().context("groups")?;
    groups.iter().find(|group| group["group"] == name).cloned().with_context(|| format!("group {name} in {document}"))
}

fn steady_points(site: &Site) -> Result<usize> {
    let document: serde_json::Value = serde_json::from_str(&site.target(&["points", "office/steady", "--json"])?)?;
    Ok(document.as_array().or_else(|| document["points"].as_array()).context("points")?.len())
}

/// The state folder on the protected volume itself: a warning, and an idle volume stays idle.
#[test]
fn an_idle_volume_stays_idle_even_with_the_state_folder_on_it() -> Result<()> {
    if !cdp_tests::privileged("an_idle_volume_stays_idle_even_with_the_state_folder_on_it") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), 64 * MIB)?;
    tool("mkfs.ext4", &["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", &device.node().display().to_string()])?;
    let mount = Mount::new(device.node(), &folder.path().join("live"), "noatime")?;
    let mut site = Site::new(folder.path())?;
    let moved = mount.folder().join("state");
    tool("cp", &["-a", &site.state.display().to_string(), &moved.display().to_string()])?;
    site.state = moved;
    let output = source(&site, &["protect", &format!("data={}", device.node().display())]).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{stderr}");
    ensure!(stderr.contains("warning: ") && stderr.contains("state folder"), "no warning in {stderr}");
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;
    tool("sync", &[])?;
    site.point_now()?;
    // From here on nobody writes. Five cuts in a row must find nothing, and say so to the target.
    let quiet = wait_for("the volume to come to rest", PATIENCE, || {
        let (first, unchanged) = (newest(&site)?, unchanged_count(&site)?);
        wait_for("five unchanged cuts", PATIENCE, || Ok((unchanged_count(&site)? >= unchanged + 5).then_some(())))?;
        Ok((newest(&site)? == first).then_some(first))
    })?;
    eprintln!("idle at point {quiet}");
    site.stop_source()?;
    mount.unmount()
}

fn newest(site: &Site) -> Result<u64> {
    Ok(site.points()?.last().context("a point")?.epoch)
}

fn unchanged_count(site: &Site) -> Result<u64> {
    let status = site.source_status()?;
    status["cuts_unchanged"].as_u64().with_context(|| format!("cuts_unchanged in {status}"))
}

/// The target's disk fills up: the source is pushed back and keeps running, no acked point is lost, and it goes on when
/// there is room again.
#[test]
fn a_full_disk_at_the_target_pushes_back_and_loses_nothing() -> Result<()> {
    if !cdp_tests::privileged("a_full_disk_at_the_target_pushes_back_and_loses_nothing") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let store = LoopDevice::new(&folder.path().join("store.img"), 64 * MIB)?;
    tool("mkfs.ext4", &["-q", "-m", "0", &store.node().display().to_string()])?;
    let place = folder.path().join("place");
    let mount = Mount::new(store.node(), &place, "rw")?;
    std::fs::remove_dir(place.join("lost+found"))?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), 64 * MIB)?;
    let mut site = Site::new(&place)?;
    let outside = folder.path().join("state");
    tool("cp", &["-a", &site.state.display().to_string(), &outside.display().to_string()])?;
    site.state = outside;
    site.source(&["protect", &format!("data={}", device.node().display())])?;
    site.start_source()?;
    fill(device.node(), 1, 8 << 20)?;
    let kept = site.point_now()?;
    // Ballast takes what is left but 8 MiB; then more is written than fits.
    let free = rustix::fs::statvfs(&place)?;
    let ballast = place.join("ballast");
    let ballast_bytes = free.f_bavail * free.f_frsize - 8 * MIB;
    tool("fallocate", &["--length", &ballast_bytes.to_string(), &ballast.display().to_string()])?;
    fill(device.node(), 2, 48 << 20)?;
    let status = wait_for("the push back", PATIENCE, || {
        let status = site.source_status()?;
        Ok(status["reason"].as_str().is_some_and(|problem| problem.contains("full")).then_some(status))
    })?;
    eprintln!("pushed back: {}", status["reason"]);
    // For as long as that is so, however often the target is asked.
    let start = Instant::now();
    wait_for("two more tries", PATIENCE, || {
        let status = site.source_status()?;
        let says_so = status["reason"].as_str().is_some_and(|problem| problem.contains("full"));
        ensure!(says_so, "the disk is full, and the source says {status}");
        Ok((start.elapsed() > TWO_TRIES).then_some(()))
    })?;
    ensure!(site.source_daemon().is_running()? && site.target_daemon().is_running()?, "both keep running");
    ensure!(site.points()?.iter().any(|point| point.epoch == kept), "point {kept} is still there");
    std::fs::remove_file(&ballast)?;
    let epoch = wait_for("a point after there is room again", Duration::from_secs(120), || {
        Ok(site.points()?.last().filter(|point| point.epoch > kept).map(|point| point.epoch))
    })?;
    eprintln!("point {kept} before, point {epoch} after the disk was full");
    let epoch = site.point_now()?;
    let image = folder.path().join("newest.img");
    site.export("data", epoch, &image)?;
    assert_same(device.node(), &image)?;
    site.stop_source()?;
    site.stop_target()?;
    mount.unmount()
}

/// `doctor` tells of each mounted file system what it is built of, what would track it, and what that takes.
#[test]
fn doctor_tells_what_lies_under_each_file_system() -> Result<()> {
    if !cdp_tests::privileged("doctor_tells_what_lies_under_each_file_system") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let lower = LoopDevice::new(&folder.path().join("lower.img"), 64 * MIB)?;
    tool("mkfs.ext4", &["-q", &lower.node().display().to_string()])?;
    let mount = Mount::new(lower.node(), &folder.path().join("mounted"), "")?;
    let findings = || -> Result<Vec<serde_json::Value>> {
        let output = Command::new(program("cdp-source"))
            .args(["doctor", "--json"])
            .env("CDP_SOURCE_STATE", folder.path().join("state"))
            .output()?;
        let document: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        Ok(document["findings"].as_array().context("findings")?.clone())
    };
    let found = |findings: &[serde_json::Value], subject: &str| -> Result<String> {
        let finding = findings.iter().find(|finding| finding["subject"] == subject).context(subject.to_owned())?;
        Ok(finding["found"].as_str().context("found")?.to_owned())
    };
    let findings = findings()?;
    for subject in ["kernel", "btf", "lockdown", "bpffs", "rights", "io_uring", "memory", "volumes"] {
        ensure!(!found(&findings, subject)?.is_empty(), "{subject}");
    }
    let told = found(&findings, &format!("file system {}", mount.folder().display()))?;
    let image = folder.path().join("lower.img").display().to_string();
    for word in ["not protected", "ext4", "loop device of", &image, "tracker ebpf", "bytes of kernel memory"] {
        ensure!(told.contains(word), "{word:?} is not in {told:?}");
    }
    Ok(())
}
