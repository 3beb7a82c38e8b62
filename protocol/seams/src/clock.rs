//! Time: a monotonic clock for intervals and deadlines, wall-clock time for labels.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Where time comes from.
pub trait Clock: Send + Sync {
    /// Time since some fixed moment; never goes back.
    fn monotonic(&self) -> Duration;
    /// Milliseconds since the Unix epoch; may jump either way. A label, never an order.
    fn wall_ms(&self) -> i64;
}

/// The machine's clocks.
#[derive(Clone, Copy, Debug)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// A clock whose monotonic time starts now.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this is the seam")]
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }

    #[expect(clippy::disallowed_methods, reason = "this is the seam")]
    fn wall_ms(&self) -> i64 {
        match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(after) => after.as_millis() as i64,
            Err(before) => -(before.duration().as_millis() as i64),
        }
    }
}

/// A clock that moves when it is told to.
#[cfg(feature = "sim")]
#[derive(Debug, Default)]
pub struct SimClock {
    monotonic_ns: std::sync::atomic::AtomicU64,
    wall_ms: std::sync::atomic::AtomicI64,
}

#[cfg(feature = "sim")]
impl SimClock {
    /// A clock at zero and at `wall_ms`.
    #[must_use]
    pub fn new(wall_ms: i64) -> Self {
        Self { monotonic_ns: 0.into(), wall_ms: wall_ms.into() }
    }

    /// Lets both clocks go on.
    pub fn advance(&self, by: Duration) {
        self.monotonic_ns.fetch_add(by.as_nanos() as u64, std::sync::atomic::Ordering::SeqCst);
        self.wall_ms.fetch_add(by.as_millis() as i64, std::sync::atomic::Ordering::SeqCst);
    }

    /// Sets the wall clock, as an operator or NTP may.
    pub fn set_wall_ms(&self, wall_ms: i64) {
        self.wall_ms.store(wall_ms, std::sync::atomic::Ordering::SeqCst);
    }
}

#[cfg(feature = "sim")]
impl Clock for SimClock {
    fn monotonic(&self) -> Duration {
        Duration::from_nanos(self.monotonic_ns.load(std::sync::atomic::Ordering::SeqCst))
    }

    fn wall_ms(&self) -> i64 {
        self.wall_ms.load(std::sync::atomic::Ordering::SeqCst)
    }
}
