//! The group's end of an image that is being made: what its points capture is handed over, too.
//!
//! Bounded in bytes, and never waits: what does not fit is only named, and read again by whoever makes the image. Every capture is handed over
//! or named before anything is left out of it, so for each block the last of what was handed over, or of what is read after it was
//! named, is what it holds at the next point that closes the image. All goes through one channel, in order; so whoever takes a set of named blocks has taken before
//! it all that was captured earlier.

use crate::agent::ledger::Blocks;
use crate::capture::{Capture, CapturedVolume};
use cdp_protocol::record::Volume;
use cdp_protocol::units::{BLOCK_BYTES, Class, Epoch, Generation, Timestamp};
use roaring::RoaringBitmap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

/// Bytes of content that wait to be taken. One capture more may wait beyond it.
const QUEUED_BYTES_MAX: u64 = 16 << 20;

/// What is asked of the group.
pub enum ImageRequest {
    /// Hand over what is captured from here on.
    Begin {
        /// Where to.
        tee: Tee,
        /// Answered with what the image is of, or why it cannot be begun now.
        reply: Sender<Result<Begun, NotBegun>>,
    },
    /// Tell which blocks did not fit: `ImageEvent::Named`.
    Name,
}

/// Why an image is not begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotBegun {
    /// It cannot be now; later it can.
    Later(String),
    /// It cannot be of this group.
    Never(String),
}

/// What an image is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Begun {
    /// The generation that is sealed under.
    pub generation: Generation,
    /// The newest point.
    pub epoch: Epoch,
    /// The volumes.
    pub volumes: Vec<Volume>,
}

/// What happens to it.
pub enum ImageEvent {
    /// This was captured, by volume.
    Captured(Vec<CapturedVolume>, u64),
    /// These did not fit: they are to be read again.
    Named(Blocks),
    /// A point has closed it.
    Closed(Closing),
    /// The point came, but blocks are left that did not fit.
    NotClosed,
}

/// The point that closes an image.
#[derive(Clone, Debug, PartialEq)]
pub struct Closing {
    /// Its number.
    pub epoch: Epoch,
    /// Its instant.
    pub cut_time: Timestamp,
    /// Its class.
    pub class: Class,
    /// Its label.
    pub label: Option<String>,
    /// What stands as zeros in it because it is excluded.
    pub skipped: Blocks,
}

/// The sending end.
pub struct Tee {
    events: Sender<ImageEvent>,
    queued_bytes: Arc<AtomicU64>,
    named: Blocks,
}

/// The receiving end.
pub struct Taken {
    /// What happens.
    pub events: Receiver<ImageEvent>,
    queued_bytes: Arc<AtomicU64>,
}

/// The two ends, for a group of so many volumes.
#[must_use]
pub fn pair(volumes: usize) -> (Tee, Taken) {
    let (sender, events) = channel();
    let queued_bytes = Arc::new(AtomicU64::new(0));
    let named = vec![RoaringBitmap::new(); volumes];
    (Tee { events: sender, queued_bytes: Arc::clone(&queued_bytes), named }, Taken { events, queued_bytes })
}

impl Taken {
    /// So many bytes of what was captured are written.
    pub fn done(&self, bytes: u64) {
        self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Tee {
    /// Hands over a capture, or names its blocks; `false` where nobody wants it any more.
    pub fn push(&mut self, capture: &Capture) -> bool {
        let bytes = bytes_of(capture);
        if self.queued_bytes.load(Ordering::Relaxed) >= QUEUED_BYTES_MAX {
            for (named, volume) in self.named.iter_mut().zip(&capture.volumes) {
                *named |= volume.blocks();
            }
            return true;
        }
        for (named, volume) in self.named.iter_mut().zip(&capture.volumes) {
            *named -= volume.blocks();
        }
        self.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.events.send(ImageEvent::Captured(capture.volumes.clone(), bytes)).is_ok()
    }

    /// Hands over which blocks did not fit since this was asked last.
    pub fn name(&mut self) -> bool {
        let none = vec![RoaringBitmap::new(); self.named.len()];
        self.events.send(ImageEvent::Named(std::mem::replace(&mut self.named, none))).is_ok()
    }

    /// A point is made that is to close it; gives itself back where it does not.
    #[must_use]
    pub fn close(self, closing: Closing) -> Option<Self> {
        let is_whole = self.named.iter().all(RoaringBitmap::is_empty);
        let event = if is_whole { ImageEvent::Closed(closing) } else { ImageEvent::NotClosed };
        let is_wanted = self.events.send(event).is_ok();
        (is_wanted && !is_whole).then_some(self)
    }
}

/// About the memory that a capture takes; never nothing, so that few wait where nobody takes them.
fn bytes_of(capture: &Capture) -> u64 {
    let of = |volume: &CapturedVolume| {
        volume.counts().content * BLOCK_BYTES as u64 + volume.blocks().serialized_size() as u64
    };
    BLOCK_BYTES as u64 + capture.volumes.iter().map(of).sum::<u64>()
}

#[cfg(test)]
mod tests;
