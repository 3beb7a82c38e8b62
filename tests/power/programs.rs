//! The real server with its store on a real file system, and a real source: the power fails at random moments.
//!
//! Every point of which the source was told that it is committed is there after the cut, with the content that the volume had
//! when it was cut.

use crate::{Machine, can_run, env};
use anyhow::{Context, Result, ensure};
use cdp_seams::random::SimRandom;
use cdp_tests::acked::{VOLUME_BYTES, Writer, check};
use cdp_tests::file_system::FileSystem;
use cdp_tests::process::wait_for;
use cdp_tests::site::{PATIENCE, Site};
use std::time::Instant;

/// Small: some thousand points have to fit the store.
const PIECE_BYTES_MAX: usize = 8 << 10;
/// Writes and flushes of the disk after which the power fails, at most: those of a few points.
const REQUESTS_MAX: u64 = 60;
/// Of what the source was told, so many of the newest are exported after each cut, and one older one.
const CHECKED: usize = 2;
/// Cuts after which it is said how far it is.
const TOLD_EVERY: u64 = 50;

fn lives(kind: FileSystem, cuts: u64, seed: u64) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let mut machine = Machine::new(scratch.path(), kind, seed)?;
    let random = SimRandom::new(seed ^ 0x0ff);
    let mut site = Site::new_with_store(scratch.path(), &machine.folder().join("store"))?;
    let volume = scratch.path().join("volume.img");
    std::fs::write(&volume, vec![0; VOLUME_BYTES])?;
    site.source(&["protect", &format!("data={}", volume.display())])?;
    site.start_source()?;
    let writer = Writer::start(volume, site.state.clone(), seed, PIECE_BYTES_MAX);
    let (mut lost, mut checked, start) = (0, 0, Instant::now());
    for cut in 0..cuts {
        if cut > 0 && cut % TOLD_EVERY == 0 {
            eprintln!("{kind:?}: {cut} power cuts, {lost} sectors lost, {} points acked", writer.acked().len());
        }
        let waited = writer.wait_beyond(writer.acked().len());
        waited.with_context(|| format!("before cut {cut}\n{}", state_of(&mut site)))?;
        machine.disk().cut_in(1 + random.below(REQUESTS_MAX));
        wait_for("the power to fail", PATIENCE, || Ok(machine.disk().is_cut().map(drop)))?;
        site.kill_target()?;
        lost += machine.down()?.lost;
        machine.up()?;
        // All that it was told so far: nobody has told it anything since the power failed.
        let acked = writer.acked();
        site.start_target().with_context(|| format!("cut {cut}"))?;
        let older = acked[random.below(acked.len() as u64) as usize];
        for point in acked.iter().rev().take(CHECKED).chain([&older]) {
            check(&site, *point, scratch.path()).with_context(|| format!("cut {cut}\n{}", state_of(&mut site)))?;
            checked += 1;
        }
    }
    writer.wait_beyond(writer.acked().len())?;
    let acked = writer.acked();
    writer.stop()?;
    site.verify()?;
    for point in acked.iter().step_by(acked.len().div_ceil(20)) {
        check(&site, *point, scratch.path())?;
    }
    let (points, seconds) = (acked.len(), start.elapsed().as_secs());
    eprintln!(
        "{kind:?}: {cuts} power cuts in {seconds} s, {lost} sectors lost, {points} points acked, {checked} exported"
    );
    ensure!(lost > 0, "a cut that loses nothing shows nothing");
    site.stop_source()?;
    site.kill_target()?;
    machine.down().map(drop)
}

/// What both sides say, for whoever has to find out.
fn state_of(site: &mut Site) -> String {
    let status = site.target(&["status", "--json"]).unwrap_or_else(|error| format!("{error:#}"));
    let points = site.target(&["points", "office/main"]).unwrap_or_else(|error| format!("{error:#}"));
    let newest: Vec<&str> = points.lines().rev().take(5).collect();
    let source = site.source_status().map_or_else(|error| format!("{error:#}"), |status| status.to_string());
    format!(
        "{status}\n{}\n{source}\ntarget:\n{}\nsource:\n{}",
        newest.join("\n"),
        site.target_daemon().log(),
        site.source_daemon().log()
    )
}

fn power_cuts(kind: FileSystem, test: &str) -> Result<()> {
    if !can_run(test) {
        return Ok(());
    }
    let (cuts, seed) = (env("CDP_REAL_POWER_CUTS", 20), env("CDP_SEED", 1));
    lives(kind, cuts, seed).with_context(|| format!("CDP_SEED={seed}"))
}

#[test]
fn every_acked_point_survives_power_cuts_on_ext4() -> Result<()> {
    power_cuts(FileSystem::Ext4, "every_acked_point_survives_power_cuts_on_ext4")
}

#[test]
fn every_acked_point_survives_power_cuts_on_xfs() -> Result<()> {
    power_cuts(FileSystem::Xfs, "every_acked_point_survives_power_cuts_on_xfs")
}
