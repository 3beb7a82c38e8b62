//! Restored, copied and replaced sources by the programs' own commands, on loop devices: nothing is mixed, nothing is lost.
//!
//! A copy of a machine is an agent with a copied state folder and a BPF file system of its own: it finds no tracking, as after
//! a restart of the copy. Needs root, kernel BTF and loop devices; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::files::noise;
use cdp_tests::image::assert_same;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::{tool, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::Path;

const VOLUME_BYTES: u64 = 32 << 20;

/// Writes noise to a few places of a device, different ones for each seed.
fn scribble(device: &Path, seed: u64) -> Result<()> {
    let file = std::fs::File::options().write(true).open(device)?;
    let mut bytes = vec![0; 64 << 10];
    for at in 0..8 {
        noise(seed * 8 + at, &mut bytes);
        let blocks = VOLUME_BYTES / 4096 - 16;
        file.write_all_at(&bytes, (seed * 977 + at * 1013) % blocks * 4096)?;
    }
    Ok(file.sync_all()?)
}

/// Makes a point and holds it against a device byte for byte; gives its number.
fn point_equals(site: &Site, device: &Path, folder: &Path) -> Result<u64> {
    let epoch = site.point_now()?;
    exported_equals(site, epoch, device, folder)?;
    Ok(epoch)
}

fn exported_equals(site: &Site, epoch: u64, device: &Path, folder: &Path) -> Result<()> {
    let image = folder.join(format!("point-{epoch}.img"));
    let _ = std::fs::remove_file(&image);
    site.export("data", epoch, &image)?;
    assert_same(device, &image).with_context(|| format!("point {epoch}"))
}

/// Starts the agent and waits until it answers.
fn start(site: &mut Site) -> Result<()> {
    site.start_source()?;
    site.source_daemon().wait_for_line("running", PATIENCE).map(drop)
}

/// The same as on another machine.
fn start_apart(site: &mut Site) -> Result<()> {
    site.start_source_apart()?;
    site.source_daemon().wait_for_line("running", PATIENCE).map(drop)
}

/// Waits until the agent says that its group is stalled, for a reason with these words.
fn stalled(site: &Site, words: &str) -> Result<()> {
    wait_for(&format!("stalled: {words}"), PATIENCE, || {
        let status = site.source_status()?;
        let reason = status["reason"].as_str().unwrap_or_default();
        Ok((status["state"] == "stalled" && reason.contains(words)).then_some(()))
    })
    .with_context(|| site.source(&["status", "--json"]).unwrap_or_default())
}

/// The group as the target reports it.
fn group(site: &Site) -> Result<Value> {
    let document: Value = serde_json::from_str(&site.target(&["status", "--json"])?)?;
    let group = document["offices"][0]["groups"].get(0).cloned();
    group.with_context(|| format!("a group in {document}"))
}

fn wait_for_state(site: &Site, state: &str) -> Result<Value> {
    wait_for(&format!("the group to be {state}"), PATIENCE, || Ok(Some(group(site)?).filter(|it| it["state"] == state)))
}

/// The heads that `resolve` may be given: the store's own, and that of the forked source.
fn heads(group: &Value) -> Result<(String, String)> {
    let head = |at: usize| group["histories"][at]["head"].as_str().map(str::to_owned);
    let both = head(0).zip(head(1));
    both.with_context(|| format!("two histories in {group}"))
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    tool("cp", &["-a", from.to_str().context("text")?, to.to_str().context("text")?]).map(drop)
}

#[test]
fn a_state_folder_put_back_goes_on_and_the_original_is_refused() -> Result<()> {
    if !cdp_tests::privileged("a_state_folder_put_back_goes_on_and_the_original_is_refused") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), VOLUME_BYTES)?;
    let node = device.node().to_owned();
    let mut site = Site::new(folder.path())?;
    scribble(&node, 1)?;
    site.source(&["protect", &format!("data={}", node.display())])?;
    start(&mut site)?;
    let base = point_equals(&site, &node, folder.path())?;
    site.stop_source()?;
    let earlier = folder.path().join("earlier");
    copy_folder(&site.state, &earlier)?;

    // An agent that comes back costs nothing: no new generation, also where the target has not noticed that it went.
    start(&mut site)?;
    scribble(&node, 2)?;
    point_equals(&site, &node, folder.path())?;
    site.kill_source()?;
    start(&mut site)?;
    scribble(&node, 3)?;
    let newest = point_equals(&site, &node, folder.path())?;
    ensure!(!site.source_daemon().log().contains("a new generation"), "{}", site.source_daemon().log());

    let mut restored = site.beside(earlier);
    start_apart(&mut restored)?;
    restored.source_daemon().wait_for_line("a new generation", PATIENCE)?;
    stalled(&site, "took the group over")?;
    scribble(&node, 4)?;
    let after = point_equals(&restored, &node, folder.path())?;
    ensure!(base < newest && newest < after, "{base}, {newest}, {after}");
    ensure!(site.source(&["point", "--wait"]).is_err(), "the original makes no points any more");
    let told = site.source_daemon().log().matches("the target refuses the group").count();
    ensure!(told == 1, "told {told} times:\n{}", site.source_daemon().log());
    ensure!(group(&site)?["state"] == "connected", "nothing is frozen by the original's being there");

    // Started anew, the original stands at a point of a line that was left.
    site.stop_source()?;
    start(&mut site)?;
    stalled(&site, "fork")?;
    stalled(&restored, "fork")?;
    let (ours, theirs) = heads(&wait_for_state(&site, "frozen")?)?;
    ensure!(theirs.contains(&format!("/{newest}:")), "{theirs}");
    site.stop_source()?;
    site.target(&["resolve", "office/main", "--continue-from", &ours])?;
    restored.stop_source()?;
    start_apart(&mut restored)?;
    scribble(&node, 5)?;
    point_equals(&restored, &node, folder.path())?;
    site.verify()
}

#[test]
fn a_clone_is_a_fork_both_are_kept_and_resolve_ends_it() -> Result<()> {
    if !cdp_tests::privileged("a_clone_is_a_fork_both_are_kept_and_resolve_ends_it") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), VOLUME_BYTES)?;
    let node = device.node().to_owned();
    let mut site = Site::new(folder.path())?;
    scribble(&node, 1)?;
    site.source(&["protect", &format!("data={}", node.display())])?;
    start(&mut site)?;
    point_equals(&site, &node, folder.path())?;
    let refused =
        site.target(&["resolve", "office/main", "--continue-from", "1"]).err().context("nothing to resolve")?;
    ensure!(refused.to_string().contains("exit status: 1") && refused.to_string().contains("not frozen"), "{refused}");

    // Cloned while it runs, the disk with it.
    let clone_state = folder.path().join("clone");
    copy_folder(&site.state, &clone_state)?;
    let clone_file = folder.path().join("clone.img");
    copy_folder(device.file(), &clone_file)?;
    let clone_device = LoopDevice::attach(&clone_file)?;
    let config = clone_state.join("source.toml");
    let text = std::fs::read_to_string(&config)?;
    let clone_node = clone_device.node().to_owned();
    std::fs::write(&config, text.replace(&node.display().to_string(), &clone_node.display().to_string()))?;
    scribble(&node, 2)?;
    let left = point_equals(&site, &node, folder.path())?;

    let mut clone = site.beside(clone_state);
    start_apart(&mut clone)?;
    stalled(&site, "took the group over")?;
    scribble(&clone_node, 3)?;
    let of_clone = point_equals(&clone, &clone_node, folder.path())?;
    scribble(&node, 4)?;
    site.stop_source()?;
    start(&mut site)?;
    let frozen = wait_for_state(&site, "frozen")?;
    stalled(&site, "fork")?;
    stalled(&clone, "fork")?;
    let (ours, theirs) = heads(&frozen)?;
    ensure!(ours.contains(&format!("/{of_clone}:")) && theirs.contains(&format!("/{left}:")), "{frozen}");

    // Frozen, both are readable; and stay so when one goes on.
    exported_equals(&site, of_clone, &clone_node, folder.path())?;
    let unknown = site.target(&["resolve", "office/main", "--continue-from", "77"]).err().context("no such history")?;
    ensure!(unknown.to_string().contains(&ours) && unknown.to_string().contains(&theirs), "{unknown}");
    let points = site.points()?.len();
    site.target(&["resolve", "office/main", "--continue-from", &theirs])?;
    clone.stop_source()?;
    start_apart(&mut clone)?;
    stalled(&clone, "another history")?;
    site.stop_source()?;
    start(&mut site)?;
    let after = point_equals(&site, &node, folder.path())?;
    ensure!(site.points()?.len() > points && after > of_clone, "nothing of either is gone");
    exported_equals(&site, of_clone, &clone_node, folder.path())?;
    let first = site.points()?.into_iter().find(|point| point.epoch > of_clone).context("a point")?;
    let warning = first.document["warning"].as_str().unwrap_or_default();
    ensure!(warning == format!("after rollback to {left}"), "{}", first.document);
    site.verify()
}

#[test]
fn new_hardware_takes_the_groups_over_and_old_points_stay_readable() -> Result<()> {
    if !cdp_tests::privileged("new_hardware_takes_the_groups_over_and_old_points_stay_readable") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let old = LoopDevice::new(&folder.path().join("old.img"), VOLUME_BYTES)?;
    let new = LoopDevice::new(&folder.path().join("new.img"), VOLUME_BYTES + (1 << 20))?;
    let mut site = Site::new(folder.path())?;
    scribble(old.node(), 1)?;
    site.source(&["protect", &format!("data={}", old.node().display())])?;
    start(&mut site)?;
    point_equals(&site, old.node(), folder.path())?;

    let bundle = folder.path().join("new.bundle");
    let bundle = bundle.to_str().context("a path of text")?;
    site.target(&["enroll", "office", "--replace", "--output", bundle])?;
    scribble(old.node(), 2)?;
    let of_old =
        point_equals(&site, old.node(), folder.path()).context("until the new one joins the old one goes on")?;

    let mut replaced = site.beside(folder.path().join("replaced"));
    replaced.source(&["join", bundle])?;
    wait_for("the old hardware to be refused", PATIENCE, || {
        let status: Value = serde_json::from_str(&site.source(&["status", "--json"])?)?;
        Ok(status["last_error"].as_str().filter(|error| error.contains("enrolled anew on other hardware")).map(drop))
    })
    .with_context(|| site.source(&["status", "--json"]).unwrap_or_default())?;
    scribble(new.node(), 3)?;
    replaced.source(&["protect", &format!("data={}", new.node().display())])?;
    start_apart(&mut replaced)?;
    let of_new = point_equals(&replaced, new.node(), folder.path())?;
    ensure!(of_new > of_old, "the group goes on: {of_new} after {of_old}");
    exported_equals(&site, of_old, old.node(), folder.path()).context("under the key before")?;
    let document: Value = serde_json::from_str(&site.target(&["status", "--json"])?)?;
    ensure!(document["offices"][0]["groups"].as_array().is_some_and(|groups| groups.len() == 1), "{document}");
    site.verify()
}
