//! A disk that dies and comes back: a loop device over a file that answers every request with EIO while it is dead.
//!
//! What it held when it died it holds when it is back; what was written meanwhile has failed.

use crate::fuse_file::{Answer, Backing, Change, FuseFile};
use crate::loop_device::LoopDevice;
use anyhow::Result;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};

/// The loop device and the file below it.
pub struct MortalDisk {
    device: Option<LoopDevice>,
    file: Option<FuseFile>,
    is_dead: Arc<AtomicBool>,
}

impl MortalDisk {
    /// A disk of `size_bytes` zeros, below `folder`.
    pub fn new(folder: &Path, size_bytes: u64) -> Result<Self> {
        let is_dead = Arc::new(AtomicBool::new(false));
        let content = RwLock::new(vec![0; size_bytes as usize]);
        let backing = MortalFile { content, is_dead: Arc::clone(&is_dead) };
        let file = FuseFile::mount(&folder.join("mortal"), size_bytes, backing)?;
        let mut disk = Self { device: None, file: Some(file), is_dead };
        disk.device = disk.file.as_ref().map(|file| LoopDevice::attach(file.path())).transpose()?;
        Ok(disk)
    }

    /// The loop device's node.
    #[must_use]
    pub fn node(&self) -> &Path {
        self.device.as_ref().expect("it goes when the disk goes").node()
    }

    /// From here on it answers nothing but errors, or does as it should again.
    pub fn set_dead(&self, is_dead: bool) {
        self.is_dead.store(is_dead, Ordering::SeqCst);
    }
}

impl Drop for MortalDisk {
    fn drop(&mut self) {
        self.set_dead(false);
        if let Some(device) = self.device.take() {
            // The file system cannot be unmounted while the kernel holds the file.
            let _ = device.detach();
        }
        drop(self.file.take());
    }
}

struct MortalFile {
    content: RwLock<Vec<u8>>,
    is_dead: Arc<AtomicBool>,
}

impl MortalFile {
    fn check(&self) -> io::Result<()> {
        let is_dead = self.is_dead.load(Ordering::SeqCst);
        if is_dead { Err(rustix::io::Errno::IO.into()) } else { Ok(()) }
    }
}

impl Backing for MortalFile {
    fn read(&self, offset: usize, len: usize, out: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        self.check()?;
        out(&self.content.read().expect("no holder panics")[offset..offset + len]);
        Ok(())
    }

    fn change(&self, change: Change, answer: Answer) {
        if self.check().is_err() {
            return answer.failed();
        }
        let mut content = self.content.write().expect("no holder panics");
        let place = &mut content[change.offset..change.offset + change.len];
        match &change.bytes {
            Some(bytes) => place.copy_from_slice(bytes),
            None => place.fill(0),
        }
        drop(content);
        answer.done();
    }

    fn sync(&self) -> io::Result<()> {
        self.check()
    }
}
