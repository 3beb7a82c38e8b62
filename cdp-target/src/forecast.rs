//! When the store will be full, and what the retention ladder needs once it is filled.
//!
//! Arithmetic over figures that a caller has measured: it reads no clock and no disk. A forecast is rough, and errs towards a
//! store that is full too early: it counts what comes in and not what a prune will give back.

use crate::retention::{Ladder, Rung};
use cdp_protocol::units::Timestamp;
use std::fmt;

/// What the points of a rung cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RungCost {
    /// How far apart the kept points are, in seconds; 0: there are none.
    pub step_s: u64,
    /// Bytes that a kept point takes in the mean.
    pub bytes_per_point: u64,
}

/// What is measured at a store.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Usage {
    /// Bytes received per second lately.
    pub incoming_bytes_per_s: f64,
    /// Bytes that the store has.
    pub store_bytes: u64,
    /// Bytes that are free on its file system.
    pub free_bytes: u64,
}

/// What is to be expected of a store. Prints as one sentence, with days in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// When it was made.
    pub now: Timestamp,
    /// When the store is full at the present rate; `None` where it never is.
    pub full_at: Option<Timestamp>,
    /// Bytes that the ladder as configured needs once every rung is filled.
    pub ladder_bytes: u64,
    /// Whether there is room for them.
    pub fits: bool,
}

/// How many points `rung` holds once it is filled: over the part of its span that no finer rung covers.
#[must_use]
pub fn points_held(ladder: &Ladder, rung: Rung, cost: RungCost) -> u64 {
    let finer = Rung::ALL.into_iter().take_while(|other| *other != rung);
    let covered_s = finer.map(|finer| ladder.span_s(finer)).max().unwrap_or(0);
    let span_s = ladder.span_s(rung).saturating_sub(covered_s);
    if cost.step_s == 0 { 0 } else { span_s.div_ceil(cost.step_s) }
}

/// Bytes that a group needs once every rung is filled: its image, and the points that each rung holds. `costs` are in the order
/// of [`Rung::ALL`].
#[must_use]
pub fn ladder_bytes(ladder: &Ladder, image_bytes: u64, costs: &[RungCost; 4]) -> u64 {
    let of_rung =
        |(rung, cost): (Rung, &RungCost)| points_held(ladder, rung, *cost).saturating_mul(cost.bytes_per_point);
    Rung::ALL.into_iter().zip(costs).map(of_rung).fold(image_bytes, u64::saturating_add)
}

/// What is to be expected as of `now` of a store whose groups need `ladder_bytes` together.
#[must_use]
pub fn forecast(now: Timestamp, usage: &Usage, ladder_bytes: u64) -> Forecast {
    let fits = ladder_bytes <= usage.store_bytes.saturating_add(usage.free_bytes);
    let full_at = if fits { None } else { full_at(now, usage) };
    Forecast { now, full_at, ladder_bytes, fits }
}

/// When what is free is used up: `None` where nothing comes in, or not within the calendar.
fn full_at(now: Timestamp, usage: &Usage) -> Option<Timestamp> {
    let comes_in = usage.incoming_bytes_per_s > 0.0;
    let left_ms = comes_in.then(|| usage.free_bytes as f64 / usage.incoming_bytes_per_s * 1000.0)?;
    let at_ms = now.0.checked_add(left_ms as i64)?;
    jiff::Timestamp::from_millisecond(at_ms).ok().map(|_| Timestamp(at_ms))
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let needs = bytes(self.ladder_bytes);
        match self.full_at {
            Some(full_at) => {
                let day = day(full_at, self.now);
                write!(f, "at this rate the store is full on {day}; the ladder as configured needs {needs}")
            }
            None if self.fits => write!(f, "the store has room for the ladder as configured, which needs {needs}"),
            None => write!(
                f,
                "at this rate the store never fills; the ladder as configured needs {needs}: more than it has"
            ),
        }
    }
}

/// The day of `time`, with its year unless that is the one of `now`.
fn day(time: Timestamp, now: Timestamp) -> String {
    let zoned = |time: Timestamp| {
        let time = jiff::Timestamp::from_millisecond(time.0).ok()?;
        Some(time.to_zoned(jiff::tz::TimeZone::UTC))
    };
    let Some(day) = zoned(time) else { return format!("{time} ms") };
    let this_year = zoned(now).is_some_and(|now| now.year() == day.year());
    day.strftime(if this_year { "%-d %B" } else { "%-d %B %Y" }).to_string()
}

/// A number of bytes for a person: three digits and a binary unit.
#[must_use]
pub fn bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = usize::from(unit > 0 && value < 99.95);
    format!("{value:.decimals$} {}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    const DAY_S: u64 = 24 * 3600;
    /// 2026-11-27T00:00:00Z.
    const NOW: Timestamp = Timestamp(1_795_737_600_000);

    fn costs(every: (u64, u64), hourly: u64, daily: u64, weekly: u64) -> [RungCost; 4] {
        [every, (3600, hourly), (DAY_S, daily), (7 * DAY_S, weekly)]
            .map(|(step_s, bytes_per_point)| RungCost { step_s, bytes_per_point })
    }

    #[test]
    fn a_rung_holds_what_the_finer_ones_do_not_cover() {
        let held = |ladder: &Ladder| {
            let costs = costs((5, 0), 0, 0, 0);
            std::array::from_fn::<_, 4, _>(|at| points_held(ladder, Rung::ALL[at], costs[at]))
        };
        // One day of points every 5 s; 6 days of hours; 24 days; 335 days of weeks, the last one in part.
        assert_eq!(held(&Ladder::DEFAULT), [17_280, 144, 24, 48]);
        assert_eq!(held(&Ladder { hourly_s: 0, ..Ladder::DEFAULT }), [17_280, 0, 30, 48]);
        assert_eq!(held(&Ladder { every_s: 31 * DAY_S, ..Ladder::DEFAULT }), [535_680, 0, 0, 48]);
        assert_eq!(points_held(&Ladder::DEFAULT, Rung::Every, RungCost::default()), 0);
    }

    #[test]
    fn the_ladder_needs_the_image_and_its_points() {
        // 100 GiB + 17,280 x 1 MiB + 144 x 50 MiB + 24 x 500 MiB + 48 x 1 GiB = 102,400 + 17,280 + 7,200 + 12,000 + 49,152 MiB.
        let costs = costs((5, MIB), 50 * MIB, 500 * MIB, GIB);
        assert_eq!(ladder_bytes(&Ladder::DEFAULT, 100 * GIB, &costs), 188_032 * MIB);
        let none = Ladder { every_s: 0, hourly_s: 0, daily_s: 0, weekly_s: 0 };
        assert_eq!(ladder_bytes(&none, 100 * GIB, &costs), 100 * GIB);
        let without_end = Ladder { every_s: u64::MAX, ..none };
        assert_eq!(ladder_bytes(&without_end, GIB, &costs), u64::MAX);
    }

    #[test]
    fn a_store_is_full_when_what_is_free_is_used_up() {
        // 100 GiB at 1 MiB/s: 102,400 s, which is 1 day 4 h 26 min 40 s.
        let usage = Usage { incoming_bytes_per_s: MIB as f64, store_bytes: 50 * GIB, free_bytes: 100 * GIB };
        let too_much = forecast(NOW, &usage, 412 * GIB);
        assert_eq!(too_much.full_at, Some(Timestamp(NOW.0 + 102_400_000)));
        assert!(!too_much.fits);
        let said = "at this rate the store is full on 28 November; the ladder as configured needs 412 GiB";
        assert_eq!(too_much.to_string(), said);
        // 107 days: 3 days of November, 31, 31 and 28 days; then the 14th of March.
        let slow = Usage { incoming_bytes_per_s: (100 * GIB) as f64 / (107 * DAY_S) as f64, ..usage };
        let said = "at this rate the store is full on 14 March 2027; the ladder as configured needs 1.0 TiB";
        assert_eq!(forecast(NOW, &slow, 1024 * GIB).to_string(), said);
        let full = Usage { free_bytes: 0, ..usage };
        assert_eq!(forecast(NOW, &full, 412 * GIB).full_at, Some(NOW));
    }

    #[test]
    fn a_store_with_room_for_its_ladder_is_never_full() {
        let usage = Usage { incoming_bytes_per_s: 1e9, store_bytes: 50 * GIB, free_bytes: 100 * GIB };
        let just = forecast(NOW, &usage, 150 * GIB);
        assert_eq!((just.full_at, just.fits), (None, true));
        assert_eq!(just.to_string(), "the store has room for the ladder as configured, which needs 150 GiB");
        assert!(!forecast(NOW, &usage, 150 * GIB + 1).fits);
    }

    #[test]
    fn a_rate_that_fills_nothing_gives_no_day() {
        for incoming_bytes_per_s in [0.0, -1.0, f64::NAN, f64::MIN_POSITIVE, 1e-3] {
            let usage = Usage { incoming_bytes_per_s, store_bytes: 0, free_bytes: GIB };
            let forecast = forecast(NOW, &usage, 2 * GIB);
            assert_eq!((forecast.full_at, forecast.fits), (None, false), "{incoming_bytes_per_s}");
            let said = "at this rate the store never fills; the ladder as configured needs 2.0 GiB: more than it has";
            assert_eq!(forecast.to_string(), said);
        }
    }
}
