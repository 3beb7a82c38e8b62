//! Work in the background at no more than so many bytes a second, until it is told to end.

use cdp_seams::clock::Clock;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// A wait that is shorter is not worth its call.
const WAIT_MIN: Duration = Duration::from_millis(10);

/// The pace of a piece of work.
pub(crate) struct Pace<'a> {
    clock: &'a dyn Clock,
    ended: &'a Receiver<()>,
    bytes_per_s: u64,
    started: Duration,
    bytes: u64,
}

impl<'a> Pace<'a> {
    /// Work that begins now and ends when the other end of `ended` is dropped.
    pub(crate) fn new(clock: &'a dyn Clock, ended: &'a Receiver<()>, bytes_per_s: u64) -> Self {
        Self { clock, ended, bytes_per_s, started: clock.monotonic(), bytes: 0 }
    }

    /// Waits until `bytes` more are due; `false` where the end has come.
    pub(crate) fn spend(&mut self, bytes: u64) -> bool {
        self.bytes += bytes;
        let due = self.started + Duration::from_secs_f64(self.bytes as f64 / self.bytes_per_s as f64);
        let ahead = due.saturating_sub(self.clock.monotonic());
        let wait = if ahead < WAIT_MIN { Duration::ZERO } else { ahead };
        self.ended.recv_timeout(wait) == Err(RecvTimeoutError::Timeout)
    }
}
