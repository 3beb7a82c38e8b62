//! A disk that takes its time for writes, and none for reads: a loop device over a file that is answered late.
//!
//! A write (and a hole punched) is answered a fixed time after it came in; a read is answered at once from what has landed.
//! Where writes land when they are answered, what was issued last is read as it was before, for milliseconds; where they
//! land when they come in, it is read long before it completes. What a busy disk does rarely, this one does with every write.

use crate::fuse_file::{Answer, Backing, Change, FuseFile};
use crate::loop_device::LoopDevice;
use anyhow::Result;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, RwLock};
use std::thread::{JoinHandle, park_timeout};
use std::time::{Duration, Instant};

/// When a write lands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landing {
    /// When it is answered: reads overtake it.
    WithAnswer,
    /// When it comes in: it is read before it has completed.
    AtOnce,
}

/// The loop device, the file below it, and the line that delays writes.
pub struct SlowDisk {
    device: Option<LoopDevice>,
    file: Option<FuseFile>,
    line: Option<JoinHandle<()>>,
}

impl SlowDisk {
    /// A disk of `size_bytes` zeros whose writes take `latency` and land when `landing` says, below `folder`.
    pub fn new(folder: &Path, size_bytes: u64, latency: Duration, landing: Landing) -> Result<Self> {
        let content = Arc::new(RwLock::new(vec![0; size_bytes as usize]));
        let (sender, receiver) = channel();
        let landed = Arc::clone(&content);
        let line = std::thread::spawn(move || answer_late(&receiver, &landed, latency));
        let file = FuseFile::mount(&folder.join("slow"), size_bytes, SlowFile { content, landing, line: sender })?;
        let mut disk = Self { device: None, file: Some(file), line: Some(line) };
        disk.device = disk.file.as_ref().map(|file| LoopDevice::attach(file.path())).transpose()?;
        Ok(disk)
    }

    /// The loop device's node.
    #[must_use]
    pub fn node(&self) -> &Path {
        self.device.as_ref().expect("it goes when the disk goes").node()
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        if let Some(device) = self.device.take() {
            // The file system cannot be unmounted while the kernel holds the file.
            let _ = device.detach();
        }
        drop(self.file.take());
        if let Some(line) = self.line.take() {
            let _ = line.join();
        }
    }
}

/// A change on its way.
struct Late {
    since: Instant,
    change: Change,
    has_landed: bool,
    answer: Answer,
}

fn land(change: &Change, content: &RwLock<Vec<u8>>) {
    let mut content = content.write().expect("no holder panics");
    let Some(place) = content.get_mut(change.offset..change.offset + change.len) else { return };
    match &change.bytes {
        Some(bytes) => place.copy_from_slice(bytes),
        None => place.fill(0),
    }
}

/// Lets changes land that have not, and answers them, in the order they came, each when its time is over.
fn answer_late(line: &Receiver<Late>, content: &RwLock<Vec<u8>>, latency: Duration) {
    for late in line {
        let due = late.since + latency;
        while let Some(left) = due.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            park_timeout(left);
        }
        if !late.has_landed {
            land(&late.change, content);
        }
        late.answer.done();
    }
}

struct SlowFile {
    content: Arc<RwLock<Vec<u8>>>,
    landing: Landing,
    line: Sender<Late>,
}

impl Backing for SlowFile {
    fn read(&self, offset: usize, len: usize, out: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        out(&self.content.read().expect("no holder panics")[offset..offset + len]);
        Ok(())
    }

    fn change(&self, change: Change, answer: Answer) {
        let has_landed = self.landing == Landing::AtOnce;
        if has_landed {
            land(&change, &self.content);
        }
        // The line ends after the file system that feeds it.
        let _ = self.line.send(Late { since: Instant::now(), change, has_landed, answer });
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
