//! How much the line carries: bytes acked of the time in which something waited for an ack.
//!
//! Arithmetic only; the time is said. An ack comes after the target's sync, so short loads on a far line read lower than the
//! line is: the more bytes are acked, the more a figure counts. What was withdrawn, or lost with the line, counts nothing.

use std::time::Duration;

/// Acked bytes from which there is a figure to be had.
const FIGURE_BYTES_MIN: u64 = 64 << 10;
/// Acked bytes at which a new figure counts as much as all before it.
const HALF_BYTES: f64 = (1_u64 << 20) as f64;

/// Counts for all groups on the line together.
#[derive(Debug, Default)]
pub(super) struct LineMeter {
    /// Bytes on the line that are not acked.
    waiting: u64,
    /// From when on something waited, as far as it is not in `busy` yet.
    since: Duration,
    /// Acked since the last figure, and the time in which something waited.
    acked: u64,
    busy: Duration,
    bytes_per_s: Option<f64>,
}

impl LineMeter {
    /// Bytes went to the line.
    pub(super) fn submitted(&mut self, now: Duration, bytes: u64) {
        self.pass(now);
        self.waiting += bytes;
    }

    /// Bytes are durable at the target.
    pub(super) fn acked(&mut self, now: Duration, bytes: u64) {
        self.pass(now);
        self.waiting = self.waiting.saturating_sub(bytes);
        self.acked += bytes;
        if self.acked < FIGURE_BYTES_MIN || self.busy.is_zero() {
            return;
        }
        let (acked, figure) = (self.acked as f64, self.acked as f64 / self.busy.as_secs_f64());
        let share = acked / (acked + HALF_BYTES);
        self.bytes_per_s =
            Some(self.bytes_per_s.map_or(figure, |before| before.powf(1.0 - share) * figure.powf(share)));
        (self.acked, self.busy) = (0, Duration::ZERO);
    }

    /// Bytes are not on the line any more, and not acked either.
    pub(super) fn withdrawn(&mut self, now: Duration, bytes: u64) {
        self.pass(now);
        self.waiting = self.waiting.saturating_sub(bytes);
        if self.waiting == 0 {
            (self.acked, self.busy) = (0, Duration::ZERO);
        }
    }

    /// The figure, once there is one.
    pub(super) const fn bytes_per_s(&self) -> Option<f64> {
        self.bytes_per_s
    }

    fn pass(&mut self, now: Duration) {
        if self.waiting > 0 {
            self.busy += now.saturating_sub(self.since);
        }
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn is_about(meter: &LineMeter, bytes_per_s: f64) -> bool {
        meter.bytes_per_s().is_some_and(|figure| (figure / bytes_per_s - 1.0).abs() < 0.01)
    }

    #[test]
    fn only_time_in_which_something_waits_counts() {
        let mut meter = LineMeter::default();
        for point in 0..10 {
            let at = f64::from(point) * 5.0;
            meter.submitted(seconds(at), MIB);
            meter.acked(seconds(at + 0.5), MIB);
        }
        assert!(is_about(&meter, 2.0 * MIB as f64), "{meter:?}");
    }

    #[test]
    fn what_is_under_way_at_once_is_one_time() {
        let mut meter = LineMeter::default();
        meter.submitted(seconds(0.0), MIB);
        for part in 1..10 {
            meter.submitted(seconds(f64::from(part) - 0.5), MIB);
            meter.acked(seconds(part.into()), MIB);
        }
        assert!(is_about(&meter, MIB as f64), "{meter:?}");
    }

    #[test]
    fn a_few_bytes_say_nothing_and_many_say_it_soon() {
        let mut meter = LineMeter::default();
        meter.submitted(seconds(0.0), 1000);
        meter.acked(seconds(0.1), 1000);
        assert_eq!(meter.bytes_per_s(), None);
        meter.submitted(seconds(1.0), 100 << 10);
        meter.acked(seconds(2.0), 100 << 10);
        let slow = meter.bytes_per_s().expect("a figure");
        meter.submitted(seconds(3.0), 64 * MIB);
        meter.acked(seconds(4.0), 64 * MIB);
        let fast = meter.bytes_per_s().expect("a figure");
        assert!(slow < 100e3 && fast > 50.0 * MIB as f64, "{slow} {fast}");
    }

    #[test]
    fn a_line_that_broke_is_no_slow_one() {
        let mut meter = LineMeter::default();
        meter.submitted(seconds(0.0), MIB);
        meter.acked(seconds(1.0), MIB);
        meter.submitted(seconds(2.0), MIB);
        meter.withdrawn(seconds(1000.0), MIB);
        meter.submitted(seconds(2000.0), MIB);
        meter.acked(seconds(2001.0), MIB);
        assert!(is_about(&meter, MIB as f64), "{meter:?}");
    }
}
