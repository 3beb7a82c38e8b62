//! The real server with its store on a real file system, and a real source: the power fails at random moments.
//!
//! Every point of which the source was told that it is committed is there after the cut, with the content that the volume had
//! when it was cut.

use crate::{Machine, can_run, env};
use anyhow::{Context, Result, ensure};
use cdp_seams::random::SimRandom;
use cdp_tests::file_system::FileSystem;
use cdp_tests::files::noise;
use cdp_tests::process::{program, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

const VOLUME_BYTES: usize = 2 << 20;
/// Writes and flushes of the disk after which the power fails, at most: those of a few points.
const REQUESTS_MAX: u64 = 60;
/// Of what the source was told, so many of the newest are exported after each cut, and one older one.
const CHECKED: usize = 2;

/// A point that the source was told of, and the hash of the volume at it.
type Acked = (u64, blake3::Hash);

/// Writes to the volume and asks for a point of it, over and over: nothing writes while a point is made.
struct Writer {
    acked: Arc<Mutex<Vec<Acked>>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Writer {
    fn start(volume: PathBuf, state: PathBuf, seed: u64) -> Self {
        let (acked, stop) = (Arc::<Mutex<Vec<Acked>>>::default(), Arc::<AtomicBool>::default());
        let (told, flag) = (Arc::clone(&acked), Arc::clone(&stop));
        let thread = std::thread::spawn(move || write_and_ask(&volume, &state, seed, &told, &flag));
        Self { acked, stop, thread }
    }

    fn acked(&self) -> Vec<Acked> {
        self.acked.lock().expect("no holder panics").clone()
    }

    /// Waits until more points than `count` were acked.
    fn wait_beyond(&self, count: usize) -> Result<()> {
        wait_for("a point to be acked", PATIENCE, || {
            ensure!(!self.thread.is_finished(), "the writer failed");
            Ok((self.acked().len() > count).then_some(()))
        })
    }

    fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?
    }
}

fn write_and_ask(volume: &Path, state: &Path, seed: u64, told: &Mutex<Vec<Acked>>, stop: &AtomicBool) -> Result<()> {
    let file = std::fs::File::options().read(true).write(true).open(volume)?;
    let random = SimRandom::new(seed);
    let mut piece = vec![0; 64 << 10];
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..=random.below(4) {
            let len = 512 * (1 + random.below(127) as usize);
            noise(random.next(), &mut piece[..len]);
            file.write_all_at(&piece[..len], random.below((VOLUME_BYTES - len) as u64))?;
        }
        file.sync_all()?;
        let asked = Command::new(program("cdp-source"))
            .args(["point", "--wait", "--json"])
            .env("CDP_SOURCE_STATE", state)
            .output()?;
        // Not committed in time is no ack; anything else would be one.
        if asked.status.success() {
            let document: serde_json::Value = serde_json::from_slice(&asked.stdout)?;
            let epoch = document["epoch"].as_u64().with_context(|| format!("an epoch in {document}"))?;
            let mut content = vec![0; VOLUME_BYTES];
            file.read_exact_at(&mut content, 0)?;
            told.lock().expect("no holder panics").push((epoch, blake3::hash(&content)));
        }
    }
    Ok(())
}

/// Exports a point and holds it against the volume's hash.
fn check(site: &Site, (epoch, hash): Acked, scratch: &Path) -> Result<()> {
    let image = scratch.join("point.img");
    // A server that has just started is still recovering.
    wait_for("an acked point", PATIENCE, || Ok(site.points()?.iter().any(|point| point.epoch == epoch).then_some(())))
        .with_context(|| format!("point {epoch} was acked"))?;
    site.export("data", epoch, &image)?;
    ensure!(blake3::hash(&std::fs::read(&image)?) == hash, "point {epoch} is not what the volume was");
    Ok(std::fs::remove_file(&image)?)
}

fn lives(kind: FileSystem, cuts: u64, seed: u64) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let mut machine = Machine::new(scratch.path(), kind, seed)?;
    let random = SimRandom::new(seed ^ 0x0ff);
    let mut site = Site::new_with_store(scratch.path(), &machine.folder().join("store"))?;
    let volume = scratch.path().join("volume.img");
    std::fs::write(&volume, vec![0; VOLUME_BYTES])?;
    site.source(&["protect", &format!("data={}", volume.display())])?;
    site.start_source()?;
    let writer = Writer::start(volume, site.state.clone(), seed);
    let (mut lost, mut checked, start) = (0, 0, Instant::now());
    for cut in 0..cuts {
        writer.wait_beyond(writer.acked().len())?;
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
            check(&site, *point, scratch.path()).with_context(|| format!("cut {cut}"))?;
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
