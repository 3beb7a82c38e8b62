//! The ladder once more, by definition: each point looked at anew among all there ever were. Knows nothing of the product's.

use cdp_target::retention::Ladder;

const HOUR_MS: i64 = 3_600_000;
const DAY_MS: i64 = 24 * HOUR_MS;

/// The instants of a point: of its cut by the source's clock, of its arrival by the target's.
#[derive(Clone, Copy)]
pub(crate) struct Times {
    pub(crate) cut: i64,
    pub(crate) received: i64,
}

/// For each of `points`, all that ever were and the oldest first, whether a rung keeps it as of `now`.
pub(crate) fn stays(ladder: &Ladder, points: &[Times], now: i64) -> Vec<bool> {
    // Neither arrives before an older one, nor is cut before it.
    let received = |at: usize| points[..=at].iter().map(|point| point.received).max().expect("itself");
    let cut = |at: usize| points[..=at].iter().map(|point| point.cut.min(point.received)).max().expect("itself");
    let is_first = |at: usize, width: i64, time: &dyn Fn(usize) -> i64| {
        (0..at).all(|before| time(before).div_euclid(width) != time(at).div_euclid(width))
    };
    let stays = |at: usize| {
        let is_within = |span_s: u64| i128::from((now - received(at)).max(0)) < i128::from(span_s) * 1000;
        let is_first = |width: i64| is_first(at, width, &cut) || is_first(at, width, &received);
        is_within(ladder.every_s)
            || is_within(ladder.hourly_s) && is_first(HOUR_MS)
            || is_within(ladder.daily_s) && is_first(DAY_MS)
            || is_within(ladder.weekly_s) && is_first(7 * DAY_MS)
    };
    (0..points.len()).map(stays).collect()
}
