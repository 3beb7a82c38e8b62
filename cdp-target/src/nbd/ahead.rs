//! Reading ahead: what a sequential reader is likely to ask for next, or a client said it will, is decoded before it is asked.
//!
//! Owns the threads that do it and their queue. What does not fit into the queue is not read ahead, and nobody waits for it. Finds
//! nothing out for anybody: what cannot be read is told to whoever asks for it.

use super::disk::Disk;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Threads that read ahead.
const THREADS: usize = 2;
/// Parts that wait.
const QUEUE_MAX: usize = 64;
/// Bytes of a part: content of some frames.
const PART_BYTES: u64 = 512 << 10;
/// Bytes that are read ahead of a sequential reader.
const WINDOW_BYTES: u64 = 4 << 20;
/// A reader is sequential that has read so many bytes without a gap.
const SEQUENTIAL_BYTES: u64 = 128 << 10;

/// A part of a disk. One that nobody has any more is not read.
struct Part {
    disk: Weak<Disk>,
    offset: u64,
    len: u64,
}

/// The threads that read ahead; they end when it is dropped.
pub(super) struct Ahead {
    queue: SyncSender<Part>,
}

impl Ahead {
    /// Starts them; those that cannot be started are done without.
    pub(super) fn start() -> Self {
        let (queue, parts) = sync_channel(QUEUE_MAX);
        let parts = Arc::new(Mutex::new(parts));
        for _ in 0..THREADS {
            let parts = Arc::clone(&parts);
            let started = std::thread::Builder::new().name("nbd-ahead".into()).spawn(move || work(&parts));
            if let Err(error) = started {
                tracing::warn!(%error, "a thread that reads ahead cannot be started");
            }
        }
        Self { queue }
    }

    /// Has some bytes of a disk read, as far as there is room in the queue.
    pub(super) fn read(&self, disk: &Arc<Disk>, offset: u64, len: u64) {
        let end = (offset + len).min(disk.size_bytes());
        let mut at = offset;
        while at < end {
            let part = Part { disk: Arc::downgrade(disk), offset: at, len: PART_BYTES.min(end - at) };
            at += part.len;
            if self.queue.try_send(part).is_err() {
                return;
            }
        }
    }
}

fn work(parts: &Mutex<Receiver<Part>>) {
    loop {
        let part = parts.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(part) = part else { return };
        if let Some(disk) = part.disk.upgrade() {
            disk.warm(part.offset, part.len);
        }
    }
}

/// Follows one connection's reads.
#[derive(Default)]
pub(super) struct Sequence {
    /// Where the last read ended, and how many bytes were read up to there without a gap.
    end: u64,
    bytes: u64,
    /// Up to where it was read ahead.
    ahead: u64,
}

impl Sequence {
    /// A read; gives what to read ahead: from where on and how many bytes.
    pub(super) fn read(&mut self, offset: u64, len: u64) -> Option<(u64, u64)> {
        // Several requests may be under way, and come a little out of order.
        let is_next = offset <= self.end + SEQUENTIAL_BYTES && offset + SEQUENTIAL_BYTES >= self.end;
        if !is_next {
            *self = Self::default();
        }
        self.bytes += len;
        self.end = self.end.max(offset + len);
        if self.bytes < SEQUENTIAL_BYTES {
            return None;
        }
        let (from, to) = (self.ahead.max(self.end), self.end + WINDOW_BYTES);
        // In large steps: a part is asked for once.
        if to < from + WINDOW_BYTES / 2 {
            return None;
        }
        self.ahead = to;
        Some((from, to - from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequential_reader_is_read_ahead_of_once() {
        let mut sequence = Sequence::default();
        let mut covered = 0;
        for at in 0..1000 {
            if let Some((from, len)) = sequence.read(at * 65_536, 65_536) {
                assert!(covered == 0 || from == covered, "{from} follows {covered}");
                covered = from + len;
            }
            let end = (at + 1) * 65_536;
            assert!(at == 0 || covered >= end + WINDOW_BYTES / 2, "{covered} at {end}");
        }
    }

    #[test]
    fn a_random_reader_is_not() {
        let mut sequence = Sequence::default();
        let asked = (0..1000_u64).filter_map(|at| sequence.read(at * 7_919 % 1000 * (1 << 20), 4096));
        assert_eq!(asked.count(), 0);
    }
}
