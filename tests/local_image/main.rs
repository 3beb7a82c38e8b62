//! Local images with the real programs: exact under writers, restored from without a line, and never half made.
//!
//! Needs root, kernel BTF and loop devices; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

mod office;
mod refused;

use anyhow::{Context, Result, ensure};
use cdp_tests::file_system::FileSystem;
use cdp_tests::files::{Churn, noise};
use cdp_tests::image::assert_same;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::wait_for;
use cdp_tests::site::PATIENCE;
use office::{MIB, Office, SIZE_BYTES, Writer, succeeded, text, write_noise};
use serde_json::Value;
use std::process::Stdio;
use std::time::Duration;

fn epoch(document: &Value) -> Result<u64> {
    document["epoch"].as_u64().with_context(|| format!("an epoch in {document}"))
}

#[test]
fn an_image_under_writers_is_byte_for_byte_the_targets_point() -> Result<()> {
    if !cdp_tests::privileged("an_image_under_writers_is_byte_for_byte_the_targets_point") {
        return Ok(());
    }
    let office = Office::new(1 << 30, 60_000_000)?;
    office.init()?;
    let mount = FileSystem::Ext4.mount(office.data.node(), &office.folder.path().join("mounted"))?;
    let churn = Churn::start(&mount.folder().join("files"))?;
    let writer = Writer::start(office.raw.node().to_owned());
    let before = office.site.points()?.len();
    let rounds: u64 = std::env::var("CDP_IMAGE_ROUNDS").ok().and_then(|count| count.parse().ok()).unwrap_or(3);
    let mut newest = 0;
    for _ in 0..rounds {
        newest = epoch(&office.image_now()?)?;
        office.assert_is_the_targets(newest)?;
    }
    let points = office.site.points()?.len() - before;
    churn.stop()?;
    let written = writer.stop()?;
    eprintln!("{rounds} images while {written} blocks were written, and {points} points were made");
    ensure!(points as u64 > 2 * rounds, "points go on while images are made: {points}");
    ensure!(office.files()?.len() == 2, "as many are kept as are wanted: {:?}", office.files()?);
    office.assert_is_the_targets(newest)?;
    let told = office.site.source(&["image", "verify"])?;
    ensure!(told.lines().count() == 2 && told.lines().all(|line| line.starts_with("whole")), "{told}");
    let status = office.site.source(&["status"])?;
    ensure!(status.contains(&format!("the last of point {newest} of")) && !status.contains("ALARM"), "{status}");
    mount.unmount()
}

/// More is written while an image is made than one cut holds, and than waits for it: what does not fit is read again.
#[test]
fn an_image_is_exact_where_a_copy_is_faster_than_it() -> Result<()> {
    if !cdp_tests::privileged("an_image_is_exact_where_a_copy_is_faster_than_it") {
        return Ok(());
    }
    let office = Office::new(1 << 30, 30_000_000)?;
    office.init()?;
    for round in 0..2 {
        let mut child = office.command(None, &["image", "now", "--json"]).stdout(Stdio::piped()).spawn()?;
        office.wait_for_phase("reading")?;
        write_noise(office.raw.node(), 10 * MIB, 100 + round, 80 * MIB)?;
        write_noise(office.raw.node(), 20 * MIB, 200 + round, 40 * MIB)?;
        let mut told = String::new();
        std::io::Read::read_to_string(&mut child.stdout.take().context("piped")?, &mut told)?;
        ensure!(child.wait()?.success(), "an image: {told}");
        office.assert_is_the_targets(epoch(&serde_json::from_str(&told)?)?)?;
    }
    Ok(())
}

#[test]
fn an_idle_group_has_an_image_too_and_is_restored_in_place_without_a_target() -> Result<()> {
    if !cdp_tests::privileged("an_idle_group_has_an_image_too_and_is_restored_in_place_without_a_target") {
        return Ok(());
    }
    let mut office = Office::new(1 << 30, 0)?;
    let metrics = cdp_tests::metrics::serve(&office.site.state.join("source.toml"))?;
    office.site.stop_source()?;
    office.start_agent()?;
    office.init()?;
    let made = epoch(&office.image_now()?)?;
    office.assert_is_the_targets(made)?;
    wait_for("the metrics", PATIENCE, || {
        let page = cdp_tests::metrics::scrape(&metrics)?;
        let is_told = |what: &&str| page.contains(&format!("\ncdp_source_local_image_{what}{{group=\"main\"}} "));
        Ok(["timestamp_seconds", "bytes", "overdue", "failed"].iter().all(is_told).then_some(()))
    })?;
    let (wanted, _) = office.export(made)?;
    write_noise(office.raw.node(), 20 * MIB, 7, 6 * MIB)?;
    office.site.point_now()?;
    office.site.stop_target()?;
    // Points go on, and wait: one of them closes an image as well.
    let newest = epoch(&office.image_now()?)?;
    let (from, at) = (text(&office.folder.path().join("images"))?, made.to_string());
    let arguments = |more: &[&'static str]| -> Vec<String> {
        let all = ["restore", "raw", "--at", &at, "--from", &from, "--json"];
        all.into_iter().chain(more.iter().copied()).map(str::to_owned).collect()
    };
    let run = |office: &Office, more: &[&'static str]| -> Result<Value> {
        let arguments = arguments(more);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        succeeded(&office.command(None, &arguments).output()?, &arguments)
    };
    // With an agent that has no line: what is there is a point first.
    let looked = run(&office, &["--dry-run"])?;
    let done = run(&office, &[])?;
    assert_same(office.raw.node(), &wanted.join("raw.raw"))?;
    ensure!(
        looked["differing_bytes"] == done["differing_bytes"] && done["differing_bytes"] != 0,
        "{looked} and {done}"
    );
    ensure!(done["line_bytes"] == 0 && done["image_bytes"] != 0 && done["kept"].as_u64() > Some(newest), "{done}");
    // Without an agent, and nobody knows what is there: it has to be said that it may be lost.
    office.site.stop_source()?;
    write_noise(office.raw.node(), 60 * MIB, 8, MIB)?;
    let refused = office.refused(&["restore", "raw", "--at", &at, "--from", &from])?;
    ensure!(refused.contains("--discard-current") && refused.contains("no agent runs"), "{refused}");
    run(&office, &["--discard-current"])?;
    assert_same(office.raw.node(), &wanted.join("raw.raw"))?;
    // History goes on: the restore is a point behind the others.
    office.site.start_target()?;
    office.start_agent()?;
    let after = office.site.point_now()?;
    ensure!(after > newest, "{after}");
    office.assert_is_the_targets(newest).context("the image that was made without a target")?;
    let (there, _) = office.export(after)?;
    assert_same(office.raw.node(), &there.join("raw.raw"))?;
    office.site.verify()
}

#[test]
fn a_restore_from_an_image_that_is_killed_goes_on_with_the_same_command() -> Result<()> {
    if !cdp_tests::privileged("a_restore_from_an_image_that_is_killed_goes_on_with_the_same_command") {
        return Ok(());
    }
    let mut office = Office::new(1 << 30, 0)?;
    office.init()?;
    let made = epoch(&office.image_now()?)?;
    office.site.stop_source()?;
    let file = office.folder.path().join("other.img");
    let other = LoopDevice::new(&file, SIZE_BYTES)?;
    let (from, to) = (text(&office.folder.path().join("images"))?, text(other.node())?);
    let at = made.to_string();
    let arguments = ["restore", "raw", "--at", &at, "--from", &from, "--to", &to, "--discard-current", "--json"];
    let mut cut_off = 0;
    for round in 0..12 {
        let mut child = office.command(None, &arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let marker = office.site.state.join("groups/main/restoring.json");
        wait_for("a restore that writes, or is over", PATIENCE, || {
            Ok((marker.exists() || child.try_wait()?.is_some()).then_some(()))
        })?;
        let mut drawn = [0; 2];
        noise(round, &mut drawn);
        // Later and later: a busy machine takes its time to begin.
        std::thread::park_timeout(Duration::from_millis(u64::from(u16::from_le_bytes(drawn)) % (1 + 150 * round)));
        let is_over = child.try_wait()?.is_some();
        child.kill()?;
        child.wait()?;
        cut_off += u32::from(!is_over && office.site.state.join("groups/main/restoring.json").exists());
        if is_over {
            write_noise(other.node(), 0, round, 40 * MIB)?;
        }
    }
    eprintln!("{cut_off} of 12 restores were killed while they wrote");
    ensure!(cut_off > 0, "none was killed while it wrote");
    succeeded(&office.command(None, &arguments).output()?, &arguments)?;
    assert_same(other.node(), &office.raw_now()?)
}

#[test]
fn an_agent_that_is_killed_while_it_makes_an_image_leaves_the_others_and_nothing_half_made() -> Result<()> {
    if !cdp_tests::privileged("an_agent_that_is_killed_while_it_makes_an_image_leaves_the_others_and_nothing_half_made")
    {
        return Ok(());
    }
    // Slow enough to be caught in the middle.
    let mut office = Office::new(1 << 30, 40_000_000)?;
    office.init()?;
    let first = epoch(&office.image_now()?)?;
    let files = office.files()?;
    for _ in 0..2 {
        let mut child = office.command(None, &["image", "now"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        office.wait_for_phase("reading")?;
        office.site.kill_source()?;
        child.wait()?;
        ensure!(office.files()? == files && office.images().join("making.partial").exists(), "{:?}", office.files()?);
        office.start_agent()?;
        office.assert_is_the_targets(first).context("the image before")?;
    }
    let second = epoch(&office.image_now()?)?;
    office.assert_is_the_targets(second)?;
    // One at the most was left, and is gone.
    for left in ["making.partial", "making.table"] {
        ensure!(!office.images().join(left).exists(), "{left} is left");
    }
    ensure!(office.files()?.len() == 2, "{:?}", office.files()?);
    // One that ends while it makes one takes away what is half made, or the next does.
    let mut child = office.command(None, &["image", "now"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    office.wait_for_phase("reading")?;
    office.site.stop_source()?;
    child.wait()?;
    ensure!(office.files()?.len() == 2, "{:?}", office.files()?);
    Ok(())
}
