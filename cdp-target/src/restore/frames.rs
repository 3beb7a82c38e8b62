//! Decoded frames that readers of points keep, within a bound in bytes.
//!
//! Invariant: a frame that several want at once is read by one of them, and the others wait for it. What is kept was verified, and is
//! told apart by who owns it: the same place of the same file may hold another frame for a reader that goes by another manifest.

use super::point::Opened;
use crate::journal::file::FileId;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// A frame: of whose files, in which, at which offset.
pub(super) type Place = (u64, FileId, u64);

/// Decoded frames, those unused for long going first.
pub struct FrameCache {
    kept: Mutex<Kept>,
    bytes_max: usize,
}

#[derive(Default)]
struct Kept {
    frames: HashMap<Place, Arc<Frame>>,
    /// All of them, in the order in which they are asked whether they were used since they were asked last.
    order: VecDeque<Place>,
    bytes: usize,
}

#[derive(Default)]
struct Frame {
    opened: OnceLock<Arc<Opened>>,
    /// Held by the one that reads it.
    reading: Mutex<()>,
    is_used: AtomicBool,
}

impl FrameCache {
    /// A cache of at most so many bytes, and one frame more for each that reads.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self { kept: Mutex::default(), bytes_max }
    }

    /// The frame at a place, read where it is not there.
    pub(super) fn find<E>(&self, place: Place, read: impl FnOnce() -> Result<Opened, E>) -> Result<Arc<Opened>, E> {
        let frame = self.frame(place);
        if let Some(opened) = frame.opened.get() {
            return Ok(Arc::clone(opened));
        }
        let _reading = locked(&frame.reading);
        if let Some(opened) = frame.opened.get() {
            return Ok(Arc::clone(opened));
        }
        // Where it fails, the place stays empty, and whoever waited tries for itself.
        let opened = Arc::new(read()?);
        let _ = frame.opened.set(Arc::clone(&opened));
        self.count(place, &frame, opened.bytes());
        Ok(opened)
    }

    fn frame(&self, place: Place) -> Arc<Frame> {
        let mut kept = locked(&self.kept);
        if let Some(frame) = kept.frames.get(&place) {
            frame.is_used.store(true, Ordering::Relaxed);
            return Arc::clone(frame);
        }
        let frame = Arc::new(Frame::default());
        kept.frames.insert(place, Arc::clone(&frame));
        kept.order.push_back(place);
        frame
    }

    /// Counts what was read, and lets go of as much as there is too much.
    fn count(&self, place: Place, frame: &Arc<Frame>, bytes: usize) {
        let mut kept = locked(&self.kept);
        // It may have gone while it was read.
        if kept.frames.get(&place).is_some_and(|known| Arc::ptr_eq(known, frame)) {
            kept.bytes += bytes;
        }
        while kept.bytes > self.bytes_max
            && let Some(place) = kept.order.pop_front()
        {
            kept.pass(place);
        }
    }
}

impl Kept {
    /// Asks a frame, the first in order: one that was used since goes to the end, any other goes.
    fn pass(&mut self, place: Place) {
        let Some(frame) = self.frames.get(&place) else { return };
        if frame.is_used.swap(false, Ordering::Relaxed) {
            self.order.push_back(place);
        } else if let Some(frame) = self.frames.remove(&place) {
            self.bytes -= frame.opened.get().map_or(0, |opened| opened.bytes());
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    fn place(number: u64) -> Place {
        (1, FileId::Segment { number, revision: 0 }, 0)
    }

    fn opened(bytes: usize) -> Opened {
        Opened::of(vec![], vec![0; bytes])
    }

    #[test]
    fn what_is_used_stays_and_the_bound_holds() {
        let cache = FrameCache::new(10_000);
        let reads = AtomicUsize::new(0);
        let find = |number| {
            let read = || {
                reads.fetch_add(1, Ordering::Relaxed);
                Ok::<_, ()>(opened(1000))
            };
            cache.find(place(number), read).expect("read");
        };
        for number in 1..=100 {
            find(0);
            find(number);
            assert!(locked(&cache.kept).bytes <= 10_000);
        }
        assert_eq!(reads.load(Ordering::Relaxed), 101, "the one that is used was read once");
        assert!(locked(&cache.kept).frames.len() < 11);
    }

    #[test]
    fn a_frame_that_cannot_be_read_is_tried_again_and_counts_nothing() {
        let cache = FrameCache::new(10_000);
        assert_eq!(cache.find(place(1), || Err("damaged")).err(), Some("damaged"));
        assert_eq!(locked(&cache.kept).bytes, 0);
        let bytes = cache.find(place(1), || Ok::<_, &str>(opened(500))).expect("read").bytes();
        assert_eq!(locked(&cache.kept).bytes, bytes);
    }

    #[test]
    fn many_that_want_a_frame_read_it_once() {
        let cache = FrameCache::new(10_000);
        let reads = AtomicUsize::new(0);
        std::thread::scope(|threads| {
            for _ in 0..8 {
                threads.spawn(|| {
                    let read = || {
                        reads.fetch_add(1, Ordering::Relaxed);
                        std::thread::yield_now();
                        Ok::<_, ()>(opened(10))
                    };
                    cache.find(place(1), read).expect("read");
                });
            }
        });
        assert_eq!(reads.load(Ordering::Relaxed), 1);
    }
}
