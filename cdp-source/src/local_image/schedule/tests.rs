//! What is due when, by a clock that tests set.

use super::*;
use proptest::prelude::{any, prop_assert, proptest};

const HOUR_MS: i64 = 3_600_000;
const WEEK_S: u64 = 7 * 24 * 3600;

fn at(text: &str) -> Option<TimeOfDay> {
    TimeOfDay::parse(text)
}

fn ms(text: &str) -> Timestamp {
    Timestamp(text.parse::<jiff::Timestamp>().expect("a time").as_millisecond())
}

#[test]
fn the_first_is_due_at_the_next_time_of_day_or_at_once() {
    let since = ms("2026-11-27T17:00:00Z");
    assert_eq!(due(None, since, WEEK_S, None), since);
    assert_eq!(due(None, since, WEEK_S, at("02:00")), ms("2026-11-28T02:00:00Z"));
    assert_eq!(due(None, since, WEEK_S, at("18:30")), ms("2026-11-27T18:30:00Z"));
    assert_eq!(due(None, since, WEEK_S, at("17:00")), since);
}

#[test]
fn a_weekly_one_stays_at_its_hour_however_long_each_takes() {
    let mut last = ms("2026-11-29T02:00:00Z");
    for week in 1..20_i64 {
        let next = due(Some(last), Timestamp(0), WEEK_S, at("02:00"));
        assert_eq!(next.0, ms("2026-11-29T02:00:00Z").0 + week * 7 * DAY_MS);
        // Its point comes when all is read, hours later.
        last = Timestamp(next.0 + week % 9 * HOUR_MS);
    }
    // One that was made by hand shifts the next to a week later.
    let by_hand = ms("2026-12-02T15:00:00Z");
    assert_eq!(due(Some(by_hand), Timestamp(0), WEEK_S, at("02:00")), ms("2026-12-10T02:00:00Z"));
    assert_eq!(due(Some(by_hand), Timestamp(0), WEEK_S, None), ms("2026-12-09T15:00:00Z"));
}

#[test]
fn one_that_was_missed_is_due_at_once_and_overdue_after_half_an_interval() {
    let last = ms("2026-11-01T02:00:00Z");
    let next = due(Some(last), Timestamp(0), WEEK_S, at("02:00"));
    assert_eq!(next, ms("2026-11-08T02:00:00Z"));
    assert!(!is_overdue(next, next, WEEK_S));
    assert!(!is_overdue(ms("2026-11-11T13:00:00Z"), next, WEEK_S));
    assert!(is_overdue(ms("2026-11-11T14:01:00Z"), next, WEEK_S));
}

proptest! {
    /// However clocks and intervals are: the next lies behind the last, within an interval and a day, at the hour that was asked for.
    #[test]
    fn the_next_is_never_far_from_an_interval_away(last in any::<u32>(), every_s in 60..31_536_000_u64, minutes in 0..1440_u32) {
        let last = Timestamp(i64::from(last) * 1000);
        let hour = at(&format!("{:02}:{:02}", minutes / 60, minutes % 60));
        let (next, every_ms) = (due(Some(last), Timestamp(0), every_s, hour), every_s as i64 * 1000);
        prop_assert!(next.0 - last.0 >= every_ms / 2, "{} ms after {every_ms}", next.0 - last.0);
        prop_assert!(next.0 - last.0 <= every_ms + DAY_MS);
        prop_assert!(next.0.rem_euclid(DAY_MS) == i64::from(minutes) * 60_000);
        prop_assert!(due(Some(last), Timestamp(0), every_s, None).0 == last.0 + every_ms);
    }
}
