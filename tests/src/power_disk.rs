//! A disk whose power can fail: a loop device over a file that keeps what was flushed, and a random half of what was not.
//!
//! Sectors written since the last flush stand apart from what is durable. A cut decides for each of them whether it had
//! reached the medium, which also tears pages; from then on every request fails, so that nobody takes for durable what is
//! not. What is left is the disk's content when the power comes back. Knows nothing of file systems.

use crate::fuse_file::{Answer, Backing, Change, FuseFile};
use crate::loop_device::LoopDevice;
use anyhow::{Result, ensure};
use cdp_seams::random::SimRandom;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The file, its power, and the loop device over it while that is on.
pub struct PowerDisk {
    state: Arc<Mutex<State>>,
    device: Option<LoopDevice>,
    file: FuseFile,
    sector_bytes: usize,
}

/// What a cut did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cut {
    /// Sectors that had not been flushed.
    pub unflushed: usize,
    /// Those of them that were lost.
    pub lost: usize,
}

struct State {
    durable: Vec<u8>,
    /// Written and not flushed, by number of the sector.
    unflushed: BTreeMap<usize, Vec<u8>>,
    sector_bytes: usize,
    random: SimRandom,
    /// Writes and flushes until the power fails.
    cut_in: Option<u64>,
    cut: Option<Cut>,
}

impl PowerDisk {
    /// A disk of `size_bytes` zeros below `folder`, its power on. It tears at `sector_bytes`; `seed` decides what is lost.
    pub fn new(folder: &Path, size_bytes: u64, sector_bytes: usize, seed: u64) -> Result<Self> {
        let state = Arc::new(Mutex::new(State {
            durable: vec![0; size_bytes as usize],
            unflushed: BTreeMap::new(),
            sector_bytes,
            random: SimRandom::new(seed),
            cut_in: None,
            cut: None,
        }));
        let file = FuseFile::mount(&folder.join("powered"), size_bytes, PowerFile(Arc::clone(&state)))?;
        let mut disk = Self { state, device: None, file, sector_bytes };
        disk.power_on()?;
        Ok(disk)
    }

    /// The loop device's node. The power has to be on.
    #[must_use]
    pub fn node(&self) -> &Path {
        self.device.as_ref().expect("the power is on").node()
    }

    /// The power fails now, if it has not.
    pub fn cut(&self) {
        self.lock().cut();
    }

    /// The power fails at the `requests`-th write or flush from now on.
    pub fn cut_in(&self, requests: u64) {
        self.lock().cut_in = Some(requests);
    }

    /// Nothing is to fail any more.
    pub fn cut_never(&self) {
        self.lock().cut_in = None;
    }

    /// What the last cut did; `None` while the power is on.
    #[must_use]
    pub fn is_cut(&self) -> Option<Cut> {
        self.lock().cut
    }

    /// Takes the device away, whose file system is no longer mounted, and gives it back with what the cut left.
    pub fn power_on(&mut self) -> Result<()> {
        if let Some(device) = self.device.take() {
            // With it goes all that the kernel remembers of the content.
            device.detach()?;
        }
        let mut state = self.lock();
        ensure!(state.unflushed.is_empty() || state.cut.is_none(), "a cut leaves nothing open");
        state.cut = None;
        state.cut_in = None;
        drop(state);
        self.device = Some(LoopDevice::attach_with(self.file.path(), &format!("--sector-size={}", self.sector_bytes))?);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for PowerDisk {
    fn drop(&mut self) {
        if let Some(device) = self.device.take() {
            // The file cannot be unmounted while the kernel holds it.
            let _ = device.detach();
        }
    }
}

impl State {
    fn cut(&mut self) {
        if self.cut.is_some() {
            return;
        }
        let mut cut = Cut { unflushed: self.unflushed.len(), lost: 0 };
        for (sector, bytes) in std::mem::take(&mut self.unflushed) {
            if self.random.below(2) == 0 {
                self.keep(sector, &bytes);
            } else {
                cut.lost += 1;
            }
        }
        self.cut = Some(cut);
    }

    fn keep(&mut self, sector: usize, bytes: &[u8]) {
        let at = sector * self.sector_bytes;
        self.durable[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Counts a request; fails where there is no power.
    fn request(&mut self) -> io::Result<()> {
        self.cut_in = self.cut_in.map(|left| left.saturating_sub(1));
        if self.cut_in == Some(0) {
            self.cut();
        }
        if self.cut.is_some() { Err(io::Error::other("the power is cut")) } else { Ok(()) }
    }

    fn write(&mut self, change: &Change) -> io::Result<()> {
        // A write that the cut meets is half there like any other.
        let fails_now = self.cut.is_none() && self.cut_in == Some(1);
        if !fails_now {
            self.request()?;
        }
        let size = self.sector_bytes;
        for at in (0..change.len).step_by(size) {
            let bytes = change.bytes.as_ref().map_or_else(|| vec![0; size], |bytes| bytes[at..at + size].to_vec());
            self.unflushed.insert((change.offset + at) / size, bytes);
        }
        if fails_now { self.request() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.request()?;
        for (sector, bytes) in std::mem::take(&mut self.unflushed) {
            self.keep(sector, &bytes);
        }
        Ok(())
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = self.durable[offset..offset + len].to_vec();
        let size = self.sector_bytes;
        for (sector, written) in self.unflushed.range(offset / size..(offset + len).div_ceil(size)) {
            let at = sector * size - offset;
            bytes[at..at + size].copy_from_slice(written);
        }
        bytes
    }
}

struct PowerFile(Arc<Mutex<State>>);

impl PowerFile {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backing for PowerFile {
    fn read(&self, offset: usize, len: usize, out: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        let state = self.lock();
        let is_whole = offset.is_multiple_of(state.sector_bytes) && len.is_multiple_of(state.sector_bytes);
        if state.cut.is_some() || !is_whole {
            return Err(io::Error::other("no power, or no whole sectors"));
        }
        let bytes = state.read(offset, len);
        drop(state);
        out(&bytes);
        Ok(())
    }

    fn change(&self, change: Change, answer: Answer) {
        let mut state = self.lock();
        let is_whole =
            change.offset.is_multiple_of(state.sector_bytes) && change.len.is_multiple_of(state.sector_bytes);
        let written = if is_whole { state.write(&change) } else { Err(io::ErrorKind::InvalidInput.into()) };
        drop(state);
        match written {
            Ok(()) => answer.done(),
            Err(_) => answer.failed(),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.lock().flush()
    }
}
