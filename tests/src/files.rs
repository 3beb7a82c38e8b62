//! File churn: makes, overwrites, renames and deletes files until it is stopped.

use anyhow::Result;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// A thread that churns files in a folder.
pub struct Churn {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
}

impl Churn {
    /// Starts to churn in `folder`, which is made.
    pub fn start(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (folder, asked) = (folder.to_owned(), Arc::clone(&stop));
        let thread = std::thread::spawn(move || churn(&folder, &asked));
        Ok(Self { stop, thread })
    }

    /// Stops; gives the number of operations.
    pub fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the churn panicked"))?
    }
}

/// Content that is told apart from any other by `seed`; half of it compresses.
#[must_use]
pub fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let (head, text) = bytes.split_at_mut(len / 2);
    noise(seed, head);
    text.iter_mut().zip(format!("file {seed} ").bytes().cycle()).for_each(|(byte, letter)| *byte = letter);
    bytes
}

/// Fills `bytes` with what does not compress.
pub fn noise(seed: u64, bytes: &mut [u8]) {
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(bytes);
}

fn churn(folder: &Path, stop: &AtomicBool) -> Result<u64> {
    let name = |number: u64| -> PathBuf { folder.join(format!("file-{number}")) };
    let mut done = 0;
    while !stop.load(Ordering::Relaxed) {
        let number = done % 40;
        let len = 512 << (done % 9);
        fs::write(name(number), content(done, len))?;
        match done % 7 {
            0 => fs::File::open(name(number))?.sync_all()?,
            3 => fs::rename(name(number), name(40 + number))?,
            5 => fs::remove_file(name(number))?,
            _ => {}
        }
        done += 1;
        // A branch server is not saturated: leave the disk to others now and then.
        std::thread::park_timeout(std::time::Duration::from_millis(2));
    }
    Ok(done)
}
