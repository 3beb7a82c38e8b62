//! What the writers tell each other and the oracle: how far each chain has come, and how hard they may press.

use crate::record::{CHAINS_MAX, Seen};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// By how much all writers rest more at first when a cut did not validate, and at most; in µs.
const PACE_FIRST_US: u64 = 100;
const PACE_MAX_US: u64 = 10_000;

/// Shared by all writers of a volume and by whoever cuts it.
#[derive(Default)]
pub(crate) struct Board {
    issued: [AtomicU64; CHAINS_MAX],
    finished: [AtomicU64; CHAINS_MAX],
    stop: AtomicBool,
    pace_us: AtomicU64,
}

impl Board {
    /// To be said before a record is given to the kernel.
    pub(crate) fn issue(&self, chain: usize, number: u64) {
        self.issued[chain].store(number, Ordering::SeqCst);
    }

    /// To be said when the kernel has said that a record is done.
    pub(crate) fn finish(&self, chain: usize, number: u64) {
        self.finished[chain].store(number, Ordering::SeqCst);
    }

    /// The newest record of each chain that may have been given to the kernel.
    pub(crate) fn issued(&self) -> Seen {
        std::array::from_fn(|chain| self.issued[chain].load(Ordering::SeqCst))
    }

    /// The newest record of each chain that is done for certain.
    pub(crate) fn finished(&self) -> Seen {
        std::array::from_fn(|chain| self.finished[chain].load(Ordering::SeqCst))
    }

    /// Lets the writers press less after a cut that did not validate, and a little more after one that did: how fast a device
    /// is that lies in memory differs from machine to machine, and flat out it may be written faster than it can be read.
    pub(crate) fn press(&self, validated: bool) {
        let pace = self.pace_us.load(Ordering::Relaxed);
        let next = if validated { pace - pace / 16 } else { (pace * 2).clamp(PACE_FIRST_US, PACE_MAX_US) };
        self.pace_us.store(next, Ordering::Relaxed);
    }

    /// How long every writer rests beside what its chain says.
    pub(crate) fn pace(&self) -> Duration {
        Duration::from_micros(self.pace_us.load(Ordering::Relaxed))
    }

    /// Asks the writers to end.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    /// Whether they were asked.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }
}

/// Stops the writers when it goes, so that a panic does not wait for them for ever.
pub(crate) struct StopAtEnd<'a>(pub(crate) &'a Board);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}
