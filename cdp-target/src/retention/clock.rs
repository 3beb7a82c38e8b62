//! The clock of retention: what time it is for the purpose of removing points.
//!
//! Invariant: it never goes back, and it goes no further at once than a store is plausibly left alone. A machine whose clock
//! jumps ahead by years would otherwise make every point too old. While a process runs it goes on no faster than time itself, which a
//! `Watch` tells. The caller keeps it between prunes and reads the machine's.

use cdp_protocol::units::Timestamp;
use serde::{Deserialize, Serialize};
use std::time::Duration;

const DAY_MS: i64 = 24 * 3600 * 1000;
/// How far the machine's clock may have moved on since the last prune, in milliseconds: 31 days.
pub const STEP_MAX_MS: i64 = 31 * DAY_MS;

/// How far ahead of time itself the machine's clock may get while a process runs, in milliseconds: one hour, for clocks that are set right.
pub const SLACK_MS: i64 = 3600 * 1000;

/// What a running process knows of how time goes on: from an instant that was believed, by the clock that nobody sets. It does not
/// outlive the process: after a start only the bound of [`STEP_MAX_MS`] is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch {
    from: Timestamp,
    at: Duration,
}

impl Watch {
    /// Begins at a believed time; `monotonic` is the clock that nobody sets.
    #[must_use]
    pub const fn new(clock: RetentionClock, monotonic: Duration) -> Self {
        Self { from: clock.now, at: monotonic }
    }

    /// The latest that it can be now.
    #[must_use]
    pub fn limit(&self, monotonic: Duration) -> Timestamp {
        let elapsed_ms = i64::try_from(monotonic.saturating_sub(self.at).as_millis()).unwrap_or(i64::MAX);
        Timestamp(self.from.0.saturating_add(elapsed_ms).saturating_add(SLACK_MS))
    }
}

/// The latest instant that points were removed as of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetentionClock {
    /// What points' ages count to.
    pub now: Timestamp,
}

/// The machine's clock has moved on further than is believed without an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the machine's clock moved on by {} days since the last prune: nothing is removed until an operator confirms that it is \
     right (`cdp-target prune --accept-clock`)",
    self.days()
)]
pub struct ClockJump {
    /// The clock of retention.
    pub from: Timestamp,
    /// The machine's.
    pub to: Timestamp,
}

impl RetentionClock {
    /// The clock with the machine's at `wall`: moved on to it, or where it was if that is behind.
    ///
    /// # Errors
    /// Where the machine's clock is more than [`STEP_MAX_MS`] ahead.
    pub fn advance(&self, wall: Timestamp) -> Result<Self, ClockJump> {
        if wall.0.saturating_sub(self.now.0) > STEP_MAX_MS {
            return Err(ClockJump { from: self.now, to: wall });
        }
        Ok(self.accept(wall))
    }

    /// The clock moved on to `wall` however far that is, on an operator's word. It goes back for nobody.
    #[must_use]
    pub fn accept(&self, wall: Timestamp) -> Self {
        Self { now: self.now.max(wall) }
    }
}

impl ClockJump {
    /// Whole days that the clock has moved on by.
    #[must_use]
    pub const fn days(&self) -> i64 {
        self.to.0.saturating_sub(self.from.0) / DAY_MS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOCK: RetentionClock = RetentionClock { now: Timestamp(1_800_000_000_000) };

    fn after(ms: i64) -> Timestamp {
        Timestamp(CLOCK.now.0 + ms)
    }

    #[test]
    fn it_follows_the_machine_but_never_back() {
        assert_eq!(CLOCK.advance(after(0)), Ok(CLOCK));
        assert_eq!(CLOCK.advance(after(-1)), Ok(CLOCK));
        assert_eq!(CLOCK.advance(Timestamp(i64::MIN)), Ok(CLOCK));
        assert_eq!(CLOCK.advance(after(3_600_000)), Ok(RetentionClock { now: after(3_600_000) }));
        assert_eq!(CLOCK.accept(after(-1)), CLOCK);
    }

    #[test]
    fn while_a_process_runs_it_is_no_later_than_time_allows() {
        let watch = Watch::new(CLOCK, Duration::from_secs(7));
        assert_eq!(watch.limit(Duration::from_secs(7)), after(SLACK_MS));
        assert_eq!(watch.limit(Duration::from_secs(3607)), after(SLACK_MS + 3_600_000));
        assert_eq!(watch.limit(Duration::ZERO), after(SLACK_MS), "that clock does not go back");
        assert_eq!(watch.limit(Duration::MAX), Timestamp(i64::MAX));
    }

    #[test]
    fn a_jump_is_refused_until_it_is_accepted() {
        assert_eq!(CLOCK.advance(after(STEP_MAX_MS)), Ok(RetentionClock { now: after(STEP_MAX_MS) }));
        let jump = CLOCK.advance(after(STEP_MAX_MS + 1)).expect_err("too far");
        assert_eq!(jump, ClockJump { from: CLOCK.now, to: after(STEP_MAX_MS + 1) });
        assert_eq!(CLOCK.accept(jump.to), RetentionClock { now: jump.to });
        let far = CLOCK.advance(Timestamp(i64::MAX)).expect_err("too far");
        assert!(far.days() > 1_000_000);
    }

    #[test]
    fn a_jump_says_how_far_and_what_to_do() {
        let jump = CLOCK.advance(after(400 * DAY_MS + 5)).expect_err("too far").to_string();
        assert!(jump.contains("moved on by 400 days since the last prune"), "{jump}");
        assert!(jump.contains("nothing is removed"), "{jump}");
        assert!(jump.contains("`cdp-target prune --accept-clock`"), "{jump}");
    }
}
