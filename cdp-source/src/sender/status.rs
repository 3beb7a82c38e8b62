//! The connection as `status` and metrics show it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cdp_protocol::units::Timestamp;
use cdp_seams::clock::Clock;

use super::meter::LineMeter;

/// The connection, shared by whoever shows it.
pub struct LinkStatus {
    link: Mutex<LinkSnapshot>,
    sent_bytes: AtomicU64,
    clock: Arc<dyn Clock>,
    meter: Mutex<LineMeter>,
}

/// The connection at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct LinkSnapshot {
    /// Since when it stands; `None` while there is none.
    pub connected_since: Option<Timestamp>,
    /// Why the last one ended, or was not made: for people.
    pub last_error: Option<String>,
    /// The round trip, where the transport measures it.
    pub round_trip: Option<Duration>,
    /// Bytes of frames put on the line since the start.
    pub sent_bytes: u64,
}

impl LinkStatus {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { link: Mutex::default(), sent_bytes: AtomicU64::new(0), clock, meter: Mutex::default() }
    }

    /// Bytes a second that the line carries, once enough has been acked to tell.
    #[must_use]
    pub fn bytes_per_s(&self) -> Option<f64> {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner).bytes_per_s()
    }

    /// Tells the meter what happened now.
    pub(super) fn meter(&self, tell: impl FnOnce(&mut LineMeter, Duration)) {
        tell(&mut self.meter.lock().unwrap_or_else(PoisonError::into_inner), self.clock.monotonic());
    }

    /// The connection now.
    #[must_use]
    pub fn snapshot(&self) -> LinkSnapshot {
        LinkSnapshot { sent_bytes: self.sent_bytes.load(Ordering::Relaxed), ..self.lock().clone() }
    }

    pub(super) fn up(&self, now: Timestamp) {
        self.lock().connected_since = Some(now);
    }

    pub(super) fn down(&self, reason: String) {
        let mut link = self.lock();
        link.connected_since = None;
        link.last_error = Some(reason);
    }

    pub(super) fn round_trip(&self, round_trip: Option<Duration>) {
        self.lock().round_trip = round_trip;
    }

    pub(super) fn sent(&self, bytes: usize) {
        self.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, LinkSnapshot> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
