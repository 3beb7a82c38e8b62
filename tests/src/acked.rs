//! Points that a source was told are committed, and what the volume was at each: what a target may never lose.

use crate::files::noise;
use crate::process::{program, wait_for};
use crate::site::{PATIENCE, Site};
use anyhow::{Context, Result, ensure};
use cdp_seams::random::SimRandom;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Bytes of the volume, a file.
pub const VOLUME_BYTES: usize = 2 << 20;

/// A point that the source was told of, and the hash of the volume at it.
pub type Acked = (u64, blake3::Hash);

/// Writes to the volume and asks for a point of it, over and over: nothing writes while a point is made.
pub struct Writer {
    acked: Arc<Mutex<Vec<Acked>>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Writer {
    /// Starts to write to the file `volume`, whose agent's state is in `state`: a few pieces before each point.
    #[must_use]
    pub fn start(volume: PathBuf, state: PathBuf, seed: u64, piece_bytes_max: usize) -> Self {
        let (acked, stop) = (Arc::<Mutex<Vec<Acked>>>::default(), Arc::<AtomicBool>::default());
        let (told, flag) = (Arc::clone(&acked), Arc::clone(&stop));
        let thread = std::thread::spawn(move || write_and_ask(&volume, &state, (seed, piece_bytes_max), &told, &flag));
        Self { acked, stop, thread }
    }

    /// What was acked so far, oldest first.
    #[must_use]
    pub fn acked(&self) -> Vec<Acked> {
        self.acked.lock().expect("no holder panics").clone()
    }

    /// Waits until more points than `count` were acked. A source comes back after a minute at most, and then it has yet to make one.
    pub fn wait_beyond(&self, count: usize) -> Result<()> {
        wait_for("a point to be acked", 3 * PATIENCE, || {
            ensure!(!self.thread.is_finished(), "the writer failed");
            Ok((self.acked().len() > count).then_some(()))
        })
    }

    /// Ends it, once the point it waits for is made.
    pub fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?
    }
}

fn write_and_ask(
    volume: &Path,
    state: &Path,
    (seed, piece_bytes_max): (u64, usize),
    told: &Mutex<Vec<Acked>>,
    stop: &AtomicBool,
) -> Result<()> {
    let file = std::fs::File::options().read(true).write(true).open(volume)?;
    let random = SimRandom::new(seed);
    let mut piece = vec![0; piece_bytes_max];
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..=random.below(4) {
            let len = 512 * (1 + random.below(piece_bytes_max as u64 / 512) as usize);
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
pub fn check(site: &Site, (epoch, hash): Acked, scratch: &Path) -> Result<()> {
    let image = scratch.join("point.img");
    // A server that has just started is still recovering.
    wait_for("an acked point", PATIENCE, || Ok(site.points()?.iter().any(|point| point.epoch == epoch).then_some(())))
        .with_context(|| format!("point {epoch} was acked"))?;
    site.export("data", epoch, &image)?;
    ensure!(blake3::hash(&std::fs::read(&image)?) == hash, "point {epoch} is not what the volume was");
    Ok(std::fs::remove_file(&image)?)
}
