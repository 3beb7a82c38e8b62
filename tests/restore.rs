//! Restore in place with the real programs: what differs crosses the line and nothing else, and history stays.
//!
//! Needs root, kernel BTF and loop devices; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_protocol::escrow::EscrowKey;
use cdp_tests::file_system::FileSystem;
use cdp_tests::files::noise;
use cdp_tests::image::assert_same;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::{program, wait_for};
use cdp_tests::relay::Relay;
use cdp_tests::site::{PATIENCE, Site};
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const MIB: u64 = 1 << 20;
const AN_HOUR_MS: u64 = 3_600_000;

/// An office with one volume that has two points: `old` and, after changes all over it, `new`.
struct Scene {
    // Dropped in this order: programs, line, device, folder.
    site: Site,
    relay: Relay,
    device: LoopDevice,
    folder: tempfile::TempDir,
    old: u64,
    new: u64,
}

impl Scene {
    /// A file system of `size_bytes` with a file of `file_bytes` that does not compress, of which blocks were changed here and there, and `more_bytes` more.
    fn new(size_bytes: u64, file_bytes: u64, more_bytes: u64) -> Result<Self> {
        Self::with(size_bytes, file_bytes, more_bytes, 200, |_| Ok(()))
    }

    /// The same with another interval, once something was done to the office that has joined and protects nothing yet.
    fn with(
        size_bytes: u64,
        file_bytes: u64,
        more_bytes: u64,
        interval_ms: u64,
        prepare: impl FnOnce(&Site) -> Result<()>,
    ) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let device = LoopDevice::new(&folder.path().join("disk.img"), size_bytes)?;
        FileSystem::Ext4.make(device.node())?;
        let (mut site, relay) = Site::new_behind_a_line(folder.path(), &folder.path().join("target"))?;
        prepare(&site)?;
        site.source(&["protect", &format!("data={}", device.node().display())])?;
        site.set_group_option(&format!("interval_ms = {interval_ms}"))?;
        site.start_source()?;
        let mount = FileSystem::Ext4.mount(device.node(), &folder.path().join("mounted"))?;
        write_noise(&mount.folder().join("big"), 1, file_bytes)?;
        mount.unmount()?;
        let old = site.point_now()?;
        copy(device.node(), &folder.path().join(format!("point-{old}.img")))?;
        let mount = FileSystem::Ext4.mount(device.node(), &folder.path().join("mounted"))?;
        scatter(&mount.folder().join("big"), file_bytes)?;
        write_noise(&mount.folder().join("more"), 2, more_bytes)?;
        mount.unmount()?;
        let new = site.point_now()?;
        copy(device.node(), &folder.path().join(format!("point-{new}.img")))?;
        Ok(Self { site, relay, device, folder, old, new })
    }

    fn image(&self, epoch: u64) -> PathBuf {
        self.folder.path().join(format!("point-{epoch}.img"))
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("cdp-source"));
        command.args(["restore", "data"]).args(arguments).env("CDP_SOURCE_STATE", &self.site.state);
        command.stdin(Stdio::null());
        command
    }

    fn output(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.command(arguments).output()?)
    }

    /// A restore that goes well; gives what it tells.
    fn restore(&self, arguments: &[&str]) -> Result<Value> {
        let output = self.output(&[arguments, &["--json"]].concat())?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "restore {arguments:?}: {}: {stderr}", output.status);
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// A restore that is refused with exit status 1; gives what it says.
    fn refused(&self, arguments: &[&str]) -> Result<String> {
        let output = self.output(arguments)?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "restore {arguments:?}: {}: {stderr}", output.status);
        Ok(stderr)
    }

    fn assert_is(&self, epoch: u64) -> Result<()> {
        assert_same(self.device.node(), &self.image(epoch)).with_context(|| format!("the device at point {epoch}"))
    }

    /// Exports a point, and holds it against an image.
    fn assert_point_is(&self, epoch: u64, image: &Path) -> Result<()> {
        let exported = self.folder.path().join("exported.img");
        self.site.export("data", epoch, &exported)?;
        let same = cdp_tests::process::tool("cmp", &[&text(&exported)?, &text(image)?]);
        std::fs::remove_file(&exported)?;
        same.map(drop).with_context(|| format!("point {epoch}"))
    }

    /// Waits for a point above `epoch`; its image is what is on the device.
    fn assert_next_point_is_the_device(&self, epoch: u64) -> Result<u64> {
        let newest = wait_for("a point after the restore", PATIENCE, || {
            let newest = self.site.points()?.last().map(|point| point.epoch);
            Ok(newest.filter(|newest| *newest > epoch))
        })?;
        let image = self.folder.path().join("device.img");
        copy(self.device.node(), &image)?;
        self.assert_point_is(newest, &image)?;
        std::fs::remove_file(&image)?;
        Ok(newest)
    }
}

fn text(path: &Path) -> Result<String> {
    Ok(path.to_str().context("a path of text")?.to_owned())
}

/// What is on a device now, read past the page cache.
fn copy(device: &Path, image: &Path) -> Result<()> {
    let (from, to) = (format!("if={}", device.display()), format!("of={}", image.display()));
    cdp_tests::process::tool("dd", &[&from, &to, "bs=1M", "iflag=direct", "conv=sparse", "status=none"])?;
    // Zeros at the end are left out.
    let device = std::fs::File::open(device)?;
    let size_bytes = rustix::fs::seek(&device, rustix::fs::SeekFrom::End(0))?;
    Ok(std::fs::File::options().write(true).open(image)?.set_len(size_bytes)?)
}

fn write_noise(path: &Path, seed: u64, bytes: u64) -> Result<()> {
    let file = std::fs::File::create(path)?;
    let mut chunk = vec![0; MIB as usize];
    for at in 0..bytes / MIB {
        noise(seed << 32 | at, &mut chunk);
        file.write_all_at(&chunk, at * MIB)?;
    }
    Ok(file.sync_all()?)
}

/// Overwrites one block in sixteen.
fn scatter(path: &Path, bytes: u64) -> Result<()> {
    let file = std::fs::File::options().write(true).open(path)?;
    let mut block = [0; 4096];
    for at in (0..bytes / 4096).step_by(16) {
        noise(3 << 32 | at, &mut block);
        file.write_all_at(&block, at * 4096)?;
    }
    Ok(file.sync_all()?)
}

fn number(document: &Value, key: &str) -> Result<u64> {
    document[key].as_u64().with_context(|| format!("{key} in {document}"))
}

#[test]
fn a_rollback_moves_only_what_differs_and_history_stays() -> Result<()> {
    if !cdp_tests::privileged("a_rollback_moves_only_what_differs_and_history_stays") {
        return Ok(());
    }
    // Larger by hand, or with the long tests: a gigabyte of file, a hundred megabytes of changes.
    let gib: Option<u64> = std::env::var("CDP_RESTORE_GIB").ok().and_then(|gib| gib.parse().ok());
    let mut scene = match gib {
        Some(gib) => Scene::new(gib << 30, 1024 * MIB, 36 * MIB)?,
        None => Scene::new(1 << 30, 48 * MIB, 8 * MIB)?,
    };
    scene.site.stop_source()?;
    let at = scene.old.to_string();
    let looked = scene.restore(&["--at", &at, "--dry-run"])?;
    scene.assert_is(scene.new).context("a dry run changes nothing")?;
    let before = scene.relay.carried();
    let done = scene.restore(&["--at", &at])?;
    let carried = scene.relay.carried().since(before);
    scene.assert_is(scene.old)?;
    let (differing, zeros) = (number(&done, "differing_bytes")?, number(&done, "zero_bytes")?);
    let content = (differing - zeros) as f64;
    let (messages, all) = (number(&done, "line_bytes")? as f64 / content, carried.bytes() as f64 / content);
    eprintln!(
        "{differing} bytes differed, {zeros} of them zeros; on the line {messages:.4} of the others, {all:.4} both ways with all headers; the dry run said {}",
        looked["estimate"]
    );
    ensure!(differing - zeros >= 3 * MIB && differing == number(&looked, "differing_bytes")?, "{looked} and {done}");
    ensure!(messages <= 1.05 && all <= 1.12, "{messages} and {all}, for single blocks from all over");
    ensure!(scene.restore(&["--at", &at])?["differing_bytes"] == 0, "once more there is nothing to do");
    // The tracker has seen the restore's writes: the next point is what is on the device now. Both others are there still.
    scene.site.start_source()?;
    scene.assert_next_point_is_the_device(scene.new)?;
    scene.assert_point_is(scene.old, &scene.image(scene.old))?;
    scene.assert_point_is(scene.new, &scene.image(scene.new))?;
    scene.site.verify()
}

#[test]
fn a_running_agent_keeps_what_is_overwritten_and_holds_its_points() -> Result<()> {
    if !cdp_tests::privileged("a_running_agent_keeps_what_is_overwritten_and_holds_its_points") {
        return Ok(());
    }
    let scene = Scene::new(256 * MIB, 16 * MIB, 4 * MIB)?;
    // What no point has yet, and that takes longer than the restore waits on this line.
    scene.relay.set_rate(Some(8_000_000));
    let file = std::fs::File::options().write(true).open(scene.device.node())?;
    let mut bytes = vec![0; 6 << 20];
    noise(9, &mut bytes);
    file.write_all_at(&bytes, 200 * MIB)?;
    file.sync_all()?;
    drop(file);
    let current = scene.folder.path().join("current.img");
    copy(scene.device.node(), &current)?;
    let done = scene.restore(&["--at", &scene.old.to_string()])?;
    scene.assert_is(scene.old)?;
    let kept = number(&done, "kept")?;
    scene.relay.set_rate(None);
    scene.assert_next_point_is_the_device(kept)?;
    scene.assert_point_is(kept, &current).context("what was overwritten")?;
    let points = scene.site.points()?;
    let label = points.iter().find(|point| point.epoch == kept).map(|point| point.document["label"].clone());
    ensure!(label == Some(format!("before-restore-to-{}", scene.old).into()), "{label:?}");
    // The rollback is taken back by another.
    scene.restore(&["--at", &format!("before-restore-to-{}", scene.old)])?;
    assert_same(scene.device.node(), &current)?;
    scene.site.verify()
}

/// Kills restores at moments that are drawn, and lets the next go on, with an agent or without.
fn killed(with_agent: bool, rounds: u64) -> Result<()> {
    let mut scene = Scene::new(256 * MIB, 24 * MIB, 12 * MIB)?;
    if !with_agent {
        scene.site.stop_source()?;
    }
    scene.relay.set_rate(Some(64_000_000));
    let (mut wanted, mut cut_off) = (scene.old, 0);
    for round in 0..rounds {
        let mut child = scene
            .command(&["--at", &wanted.to_string(), "--discard-current"])
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let mut drawn = [0; 2];
        noise(round, &mut drawn);
        std::thread::park_timeout(std::time::Duration::from_millis(u64::from(u16::from_le_bytes(drawn)) % 2500));
        let ended = child.try_wait()?;
        child.kill()?;
        child.wait()?;
        if let Some(status) = ended {
            ensure!(status.success(), "round {round}: {status}");
            scene.assert_is(wanted).with_context(|| format!("round {round}"))?;
            wanted = scene.old + scene.new - wanted;
        } else if scene.site.state.join("groups/main/restoring.json").exists() {
            cut_off += 1;
            let told = scene.site.source(&["status"])?;
            ensure!(told.contains("is being restored in place") && told.contains("to go on: "), "{told}");
            if with_agent {
                let refused = scene.site.source(&["point"]).map_err(|error| format!("{error:#}"));
                ensure!(refused.is_err_and(|error| error.contains("is being restored")), "no point is made of it");
            }
        }
    }
    eprintln!("{cut_off} of {rounds} restores were killed while they wrote");
    ensure!(cut_off > 0, "none was killed while it wrote");
    scene.relay.set_rate(None);
    // To whichever point the last one was on its way: another may be chosen.
    scene.restore(&["--at", &scene.old.to_string(), "--discard-current"])?;
    scene.assert_is(scene.old)?;
    ensure!(!scene.site.source(&["status"])?.contains("being restored"), "it is over");
    if !with_agent {
        scene.site.start_source()?;
    }
    scene.assert_next_point_is_the_device(scene.new)?;
    scene.site.verify()
}

fn rounds() -> u64 {
    std::env::var("CDP_RESTORE_KILLS").ok().and_then(|count| count.parse().ok()).unwrap_or(8)
}

#[test]
fn a_restore_that_is_killed_goes_on_with_the_same_command() -> Result<()> {
    if !cdp_tests::privileged("a_restore_that_is_killed_goes_on_with_the_same_command") {
        return Ok(());
    }
    killed(false, rounds())
}

#[test]
fn a_restore_that_is_killed_beside_an_agent_goes_on_too() -> Result<()> {
    if !cdp_tests::privileged("a_restore_that_is_killed_beside_an_agent_goes_on_too") {
        return Ok(());
    }
    killed(true, rounds() / 2)
}

#[test]
fn a_target_without_the_key_gives_back_what_it_cannot_read() -> Result<()> {
    if !cdp_tests::privileged("a_target_without_the_key_gives_back_what_it_cannot_read") {
        return Ok(());
    }
    // No point but the two: blocks of one that another has again would lie in its frames for nothing.
    let mut scene = Scene::with(256 * MIB, 16 * MIB, 4 * MIB, AN_HOUR_MS, |site| {
        // The envelope is sealed to another than this target: it opens nothing.
        let (_, public) = EscrowKey::generate()?;
        let path = site.state.join("identity/target.json");
        let mut joined: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
        joined["escrow_public"] = cdp_protocol::hex::encode(&public).into();
        Ok(std::fs::write(&path, joined.to_string())?)
    })?;
    scene.site.stop_source()?;
    let exported =
        scene.site.target(&["export", "office/main/data", "--at", "latest", "--output", "/dev/null", "--force"]);
    ensure!(exported.is_err(), "the target has no key");
    let before = scene.relay.carried();
    let done = scene.restore(&["--at", &scene.old.to_string()])?;
    let (differing, carried) = (number(&done, "differing_bytes")?, scene.relay.carried().since(before).bytes());
    scene.assert_is(scene.old)?;
    // Frames come whole: one block in sixteen was changed, so a frame of 32 blocks comes for two of them.
    eprintln!(
        "without the key {carried} bytes on the line for {differing} that differed: {:.2}",
        carried as f64 / differing as f64
    );
    ensure!(carried <= 17 * MIB + differing, "no frame comes twice: {carried} for {differing}");
    let before = scene.relay.carried();
    let done = scene.restore(&["--at", &scene.new.to_string(), "--discard-current"])?;
    scene.assert_is(scene.new)?;
    let (differing, carried) =
        (number(&done, "differing_bytes")? as f64, scene.relay.carried().since(before).bytes() as f64);
    let (messages, all) = (number(&done, "line_bytes")? as f64 / differing, carried / differing);
    eprintln!(
        "the other way, where what differs lies in frames of its own: {messages:.4}, {all:.4} both ways with all headers"
    );
    // A piece of it is fetched once more: whether any of it opens is to be known before anything is overwritten.
    ensure!(messages <= 1.08 && all <= 1.13, "{messages} and {all}");
    Ok(())
}

#[test]
fn another_device_takes_from_the_old_volume_what_that_has() -> Result<()> {
    if !cdp_tests::privileged("another_device_takes_from_the_old_volume_what_that_has") {
        return Ok(());
    }
    let scene = Scene::new(256 * MIB, 16 * MIB, 4 * MIB)?;
    let other = LoopDevice::new(&scene.folder.path().join("other.img"), 256 * MIB)?;
    let (at, to) = (scene.old.to_string(), text(other.node())?);
    let small = LoopDevice::new(&scene.folder.path().join("small.img"), 255 * MIB)?;
    let refused = scene.refused(&["--at", &at, "--to", &text(small.node())?])?;
    ensure!(refused.contains("has 267386880 bytes, 268435456 are needed"), "{refused}");
    let refused = scene.refused(&["--at", &at, "--to", &text(scene.device.node())?])?;
    ensure!(refused.contains("is protected as main/data") && refused.contains("hint: without --to"), "{refused}");
    let done = scene.restore(&["--at", &at, "--to", &to])?;
    assert_same(other.node(), &scene.image(scene.old))?;
    scene.assert_is(scene.new).context("the old volume is only read")?;
    let (copied, differing) = (number(&done, "copied_bytes")?, number(&done, "differing_bytes")?);
    eprintln!("{copied} of {differing} bytes came from the old volume, {} over the line", done["line_bytes"]);
    ensure!(copied >= 14 * MIB && number(&done, "line_bytes")? <= 4 * MIB, "{done}");
    // It holds something now, and is not overwritten unasked.
    let refused = scene.refused(&["--at", &scene.new.to_string(), "--to", &to])?;
    ensure!(refused.contains("holds ext2/3/4") && refused.contains("--discard-current"), "{refused}");
    scene.restore(&["--at", &scene.new.to_string(), "--to", &to, "--discard-current"])?;
    assert_same(other.node(), &scene.image(scene.new))
}

#[test]
fn what_cannot_be_restored_is_refused_and_nothing_is_changed() -> Result<()> {
    if !cdp_tests::privileged("what_cannot_be_restored_is_refused_and_nothing_is_changed") {
        return Ok(());
    }
    let mut scene = Scene::new(128 * MIB, 8 * MIB, 2 * MIB)?;
    let at = scene.old.to_string();
    let none = scene.refused(&["--at", "9999"])?;
    ensure!(none.contains("there is no point 9999") && none.contains("the nearest before is"), "{none}");
    for (name, what) in
        [("soon", "there is no point"), ("10:15", "no time"), ("", "no point"), ("0", "no epoch number")]
    {
        let none = scene.refused(&["--at", name])?;
        ensure!(none.contains(what) && none.contains("hint: "), "{name:?}: {none}");
    }
    let early = scene.refused(&["--at", "30d"])?;
    ensure!(early.contains("there is none before, the nearest after is"), "{early}");
    let unknown = Command::new(program("cdp-source"))
        .args(["restore", "dta", "--at", "latest"])
        .env("CDP_SOURCE_STATE", &scene.site.state)
        .output()?;
    let unknown = String::from_utf8_lossy(&unknown.stderr).into_owned();
    ensure!(unknown.contains("no volume named \"dta\"") && unknown.contains("it has data"), "{unknown}");
    let mount = FileSystem::Ext4.mount(scene.device.node(), &scene.folder.path().join("mounted"))?;
    let mounted = scene.refused(&["--at", &at])?;
    ensure!(
        mounted.contains("is in use: it is mounted on") && mounted.contains("hint: stop what uses it"),
        "{mounted}"
    );
    ensure!(scene.output(&["--at", &at, "--dry-run"])?.status.success(), "to look is no matter");
    mount.unmount()?;
    // Somebody who has it for himself.
    // Not handed on: the programs of the tests beside this one would have it then.
    let exclusive = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::EXCL | rustix::fs::OFlags::CLOEXEC;
    let held = rustix::fs::open(scene.device.node(), exclusive, rustix::fs::Mode::empty())?;
    let busy = scene.refused(&["--at", &at])?;
    ensure!(busy.contains("is in use: the kernel says that it is busy"), "{busy}");
    drop(held);
    // The agent's file system traffic of the mount is a point of its own.
    let newest = scene.site.point_now()?;
    scene.site.stop_source()?;
    let file = std::fs::File::options().write(true).open(scene.device.node())?;
    file.write_all_at(&[7; 4096], 100 * MIB)?;
    file.sync_all()?;
    drop(file);
    let unkept = scene.refused(&["--at", &at])?;
    ensure!(unkept.contains("4096 bytes that would be overwritten are not known to be in any point"), "{unkept}");
    ensure!(unkept.contains("hint: start the agent") && unkept.contains("--discard-current"), "{unkept}");
    ensure!(!scene.site.state.join("groups/main/restoring.json").exists(), "nothing was begun");
    scene.restore(&["--at", &at, "--discard-current"])?;
    scene.assert_is(scene.old)?;
    // A restore that was begun is finished before another is.
    let marker = scene.site.state.join("groups/main/restoring.json");
    let begun = format!(
        r#"{{"version":1,"volume":"data","slot":0,"to":"/dev/sdz","epoch":{newest},"at":"1h","begun":0,"kept":null}}"#
    );
    std::fs::write(&marker, begun)?;
    let other = scene.refused(&["--at", &at])?;
    ensure!(other.contains("another restore is not over") && other.contains("--to /dev/sdz"), "{other}");
    std::fs::remove_file(&marker)?;
    scene.site.start_source()?;
    scene.assert_next_point_is_the_device(newest).map(drop)
}

#[test]
fn blocks_that_the_target_has_damaged_are_named_before_anything_is_overwritten() -> Result<()> {
    if !cdp_tests::privileged("blocks_that_the_target_has_damaged_are_named_before_anything_is_overwritten") {
        return Ok(());
    }
    let mut scene = Scene::new(128 * MIB, 16 * MIB, 2 * MIB)?;
    scene.site.stop_source()?;
    let segment = largest_below(&scene.site.data.join("offices"))?.context("a segment")?;
    let segment = std::fs::File::options().read(true).write(true).open(segment.1)?;
    let mut byte = [0];
    segment.read_exact_at(&mut byte, 8 * MIB)?;
    segment.write_all_at(&[!byte[0]], 8 * MIB)?;
    let at = scene.old.to_string();
    let refused = scene.refused(&["--at", &at])?;
    ensure!(refused.contains("cannot be had") && refused.contains("nothing was changed"), "{refused}");
    ensure!(!scene.site.state.join("groups/main/restoring.json").exists(), "nothing was begun");
    scene.assert_is(scene.new)?;
    let output = scene.output(&["--at", &at, "--accept-lost", "--json"])?;
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1) && stderr.contains("cannot be had, and are left as they were"), "{stderr}");
    let done: Value = serde_json::from_slice(&output.stdout)?;
    let lost = done["lost"].as_array().context("a list")?;
    ensure!(!lost.is_empty(), "{done}");
    let mut left = 0;
    let (device, old, new) =
        (std::fs::File::open(scene.device.node())?, scene.image(scene.old), scene.image(scene.new));
    let (old, new) = (std::fs::File::open(old)?, std::fs::File::open(new)?);
    for run in lost {
        for block in number(run, "start")?..number(run, "start")? + number(run, "count")? {
            let (mut is, mut was, mut wanted) = ([0; 4096], [0; 4096], [0; 4096]);
            device.read_exact_at(&mut is, block * 4096)?;
            new.read_exact_at(&mut was, block * 4096)?;
            old.read_exact_at(&mut wanted, block * 4096)?;
            ensure!(is == was && was != wanted, "block {block} is left as it was");
            left += 1;
        }
    }
    ensure!((1..=32).contains(&left), "{left} blocks of one frame");
    let image = scene.folder.path().join("device.img");
    copy(scene.device.node(), &image)?;
    let differing = differing_blocks(&image, &scene.image(scene.old))?;
    ensure!(differing == left, "all other blocks are restored: {differing} differ, {left} were told");
    Ok(())
}

/// Where most of a store's bytes are: its one segment.
fn largest_below(folder: &Path) -> Result<Option<(u64, PathBuf)>> {
    let mut largest = None;
    for entry in std::fs::read_dir(folder)? {
        let (path, metadata) = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?)))?;
        let found = if metadata.is_dir() { largest_below(&path)? } else { Some((metadata.len(), path)) };
        largest = largest.max(found);
    }
    Ok(largest)
}

fn differing_blocks(one: &Path, other: &Path) -> Result<u64> {
    let (one, other) = (std::fs::File::open(one)?, std::fs::File::open(other)?);
    let (mut a, mut b, mut count) = ([0; 4096], [0; 4096], 0);
    for block in 0..one.metadata()?.len() / 4096 {
        one.read_exact_at(&mut a, block * 4096)?;
        other.read_exact_at(&mut b, block * 4096)?;
        count += u64::from(a != b);
    }
    Ok(count)
}
