//! What the commits count of each volume, on real devices: under a workload whose every block is known.
//!
//! Needs root, kernel BTF and loop devices; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::files::noise;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::metrics::{scrape, serve};
use cdp_tests::process::wait_for;
use cdp_tests::site::{PATIENCE, Site};
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::Path;

const BLOCK: usize = 4096;
const VOLUME_BYTES: u64 = 8 << 20;
/// Of its kind each: content that does not pack, content that does, zeros, and what stands there already.
const NOISE: u64 = 100;
const TEXT: u64 = 50;
const ZEROS: u64 = 20;
const SAME: u64 = 30;

/// The meters that add up to what was dirty.
const KINDS: [&str; 4] = ["unchanged_blocks", "content_blocks", "hole_blocks", "unreadable_blocks"];

/// What is summed over all points.
const SUMMED: [&str; 4] = ["dirty_blocks", "frame_bytes", "content_blocks", "written_bytes"];

/// Writes the workload's blocks; `round` makes other noise and text each time.
fn write_round(device: &Path, round: u64) -> Result<()> {
    let file = std::fs::File::options().write(true).open(device)?;
    let text = format!("the same line of round {round:08} again\n").repeat(6 << 10);
    let (mut new, mut same) = (vec![0; NOISE as usize * BLOCK], vec![0; SAME as usize * BLOCK]);
    noise(round, &mut new);
    noise(7777, &mut same);
    file.write_all_at(&new, 0)?;
    file.write_all_at(&text.as_bytes()[..TEXT as usize * BLOCK], 200 * BLOCK as u64)?;
    file.write_all_at(&vec![0; ZEROS as usize * BLOCK], 400 * BLOCK as u64)?;
    file.write_all_at(&same, 600 * BLOCK as u64)?;
    file.sync_all()?;
    Ok(())
}

fn number(of: &Value, key: &str) -> Result<u64> {
    of[key].as_u64().with_context(|| format!("{key} in {of}"))
}

fn volume<'a>(of: &'a Value, name: &str) -> Result<&'a Value> {
    let volumes = of["volumes"].as_array().with_context(|| format!("volumes in {of}"))?;
    volumes.iter().find(|volume| volume["name"] == name).with_context(|| format!("{name} in {of}"))
}

/// Whether a volume's meters are these: dirty, unchanged, content, holes, rewritten and incompressible blocks.
fn ensure_blocks(meters: &Value, expected: [u64; 6]) -> Result<()> {
    let keys = ["dirty", "unchanged", "content", "hole", "rewritten", "incompressible"];
    for (key, expected) in keys.iter().zip(expected) {
        let found = number(meters, &format!("{key}_blocks"))?;
        ensure!(found == expected, "{key}: {found}, expected {expected}: {meters}");
    }
    Ok(())
}

#[test]
fn the_commits_count_what_was_written_and_what_became_of_it() -> Result<()> {
    if !cdp_tests::privileged("the_commits_count_what_was_written_and_what_became_of_it") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let devices = ["busy", "idle"].map(|name| LoopDevice::new(&folder.path().join(name), VOLUME_BYTES));
    let [busy, idle] = devices;
    let (busy, idle) = (busy?, idle?);
    let mut site = Site::new(folder.path())?;
    let named = |name: &str, device: &LoopDevice| format!("{name}={}", device.node().display());
    site.source(&["protect", &named("busy", &busy), &named("idle", &idle)])?;
    // No cut but those asked for, so that what one finds was found by the one before, too.
    site.set_group_option("interval_ms = 240000")?;
    let source_metrics = serve(&site.state.join("source.toml"))?;
    let target_metrics = serve(&site.data.join("target.toml"))?;
    site.stop_target()?;
    site.start_target()?;
    write_round(busy.node(), 0)?;
    site.start_source()?;
    site.wait_for_points(1, PATIENCE)?;

    let (all, written) = (NOISE + TEXT + ZEROS + SAME, (NOISE + TEXT + ZEROS + SAME) * BLOCK as u64);
    for round in 1..=3 {
        write_round(busy.node(), round)?;
        site.point_now()?;
        let point = site.points()?.pop().context("a point")?.document;
        let (of_busy, of_idle) = (volume(&point, "busy")?, volume(&point, "idle")?);
        // The zeros stand at the target as the holes they were.
        let rewritten = if round == 1 { number(of_busy, "rewritten_blocks")? } else { all };
        ensure_blocks(of_busy, [all, ZEROS + SAME, NOISE + TEXT, 0, rewritten, NOISE / 32 * 32])?;
        ensure_blocks(of_idle, [0; 6])?;
        ensure!(number(of_busy, "written_bytes")? == written && number(of_idle, "written_bytes")? == 0, "{point}");
        let (frames, bytes) = (number(of_busy, "frame_bytes")?, number(&point, "bytes")?);
        ensure!(frames > NOISE * BLOCK as u64 && frames < bytes, "{frames} bytes of frames: {point}");
    }
    sums_agree(&site, &source_metrics, &target_metrics)
}

/// Point by point what was dirty is what became of it, and all points together are what the programs say in their status and metrics.
fn sums_agree(site: &Site, source_metrics: &str, target_metrics: &str) -> Result<()> {
    let (points, status) = (site.points()?, site.source_status()?);
    for name in ["busy", "idle"] {
        let of_status = &volume(&status, name)?["meters"];
        let mut sums = [0; SUMMED.len()];
        for point in &points {
            let meters = volume(&point.document, name)?;
            let kinds = KINDS.iter().map(|kind| number(meters, kind)).sum::<Result<u64>>()?;
            ensure!(number(meters, "dirty_blocks")? == kinds, "point {}: {meters}", point.epoch);
            for (sum, key) in sums.iter_mut().zip(SUMMED) {
                *sum += number(meters, key)?;
            }
        }
        let [dirty, frames, content, written] = sums;
        eprintln!("{name}: {written} bytes written, {dirty} blocks dirty, {content} sent in {frames} bytes of frames");
        for (key, sum) in SUMMED.iter().zip(sums) {
            let told = number(of_status, key)?;
            ensure!(told == sum, "{name}: {key} {told} in the status, {sum} in the points");
            let ending = format!("volume=\"{name}\"}} {sum}");
            let at_source = format!("cdp_source_volume_{key}_total{{group=\"main\",{ending}");
            let at_target = format!("cdp_target_volume_{key}_total{{office=\"office\",group=\"main\",{ending}");
            for (address, line) in [(source_metrics, at_source), (target_metrics, at_target)] {
                let is_served = || Ok(scrape(address)?.lines().any(|served| served == line).then_some(()));
                wait_for(&line, PATIENCE, is_served)?;
            }
        }
    }
    Ok(())
}
