//! The ladder against one that is obviously right, and against what pruning again and again must not lose.

use super::{Candidate, Decision, Held, Ladder, Reason, Removal, Rung, Tally, Verdict, decide, keeps_only_newest};
use crate::points::{PointTimes, point_time};
use cdp_protocol::units::{Epoch, Timestamp};
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop, prop_assert, prop_assert_eq, prop_oneof, proptest};
use std::collections::{BTreeMap, BTreeSet};

const MINUTE_MS: i64 = 60 * 1000;
const HOUR_MS: i64 = 60 * MINUTE_MS;
const DAY_MS: i64 = 24 * HOUR_MS;
/// A Thursday midnight: weeks since the epoch begin on one.
const START_MS: i64 = 2900 * 7 * DAY_MS;

/// A point as it was received: what its source said, and what the target's clock did.
#[derive(Clone, Copy, Debug)]
struct Raw {
    epoch: u64,
    cut_ms: i64,
    received_ms: i64,
    held: Option<Held>,
}

/// The points as a catalog reads them that has only these.
fn candidates(raw: &[Raw]) -> Vec<Candidate> {
    let mut before = None;
    let candidate = |raw: &Raw| {
        let received = Timestamp(raw.received_ms);
        let time = point_time(PointTimes { cut: Timestamp(raw.cut_ms), received }, before);
        before = Some(time);
        Candidate { epoch: Epoch(raw.epoch), time, received, held: raw.held }
    };
    raw.iter().map(candidate).collect()
}

/// What a point's age counts from.
#[derive(Clone, Copy, Debug, PartialEq)]
enum AgeFrom {
    LatestArrival,
    OwnArrival,
}

/// For every point the reason why it is kept, by definition: quadratic, and with every point looked at anew.
fn oracle(ladder: &Ladder, points: &[Candidate], now: Timestamp, age_from: AgeFrom) -> Vec<Option<Reason>> {
    let received = |at: usize| points[..=at].iter().map(|point| point.received.0).max().expect("itself");
    let is_first = |at: usize, width_ms: i64, time: &dyn Fn(usize) -> i64| {
        (0..at).all(|before| time(before).div_euclid(width_ms) != time(at).div_euclid(width_ms))
    };
    let reason = |at: usize| {
        let from_ms = if age_from == AgeFrom::OwnArrival { points[at].received.0 } else { received(at) };
        let age_ms = i128::from((now.0 - from_ms).max(0));
        let younger = |span_s: u64| age_ms < i128::from(span_s) * 1000;
        let first = |width_ms| {
            is_first(at, width_ms, &|index| points[index].time.0) || is_first(at, width_ms, &|index| received(index))
        };
        if let Some(held) = points[at].held {
            Some(Reason::Held(held))
        } else if at + 1 == points.len() {
            Some(Reason::Newest)
        } else if younger(ladder.every_s) {
            Some(Reason::Rung(Rung::Every))
        } else if younger(ladder.hourly_s) && first(HOUR_MS) {
            Some(Reason::Rung(Rung::Hourly))
        } else if younger(ladder.daily_s) && first(DAY_MS) {
            Some(Reason::Rung(Rung::Daily))
        } else if younger(ladder.weekly_s) && first(7 * DAY_MS) {
            Some(Reason::Rung(Rung::Weekly))
        } else {
            None
        }
    };
    (0..points.len()).map(reason).collect()
}

fn kept(decisions: impl IntoIterator<Item = Decision>) -> BTreeSet<u64> {
    let kept = |decision: Decision| match decision.verdict {
        Verdict::Kept(_) => Some(decision.epoch.0),
        Verdict::Removed(_) => None,
    };
    decisions.into_iter().filter_map(kept).collect()
}

/// What is kept of `points` by `ladder` when their newest is `age_ms` old.
fn kept_at(ladder: &Ladder, points: &[Candidate], age_ms: i64) -> BTreeSet<u64> {
    let newest = points.iter().map(|point| point.received.0).max().expect("points");
    kept(decide(ladder, points.iter().copied(), Timestamp(newest + age_ms)))
}

fn spans() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), 1..50 * 3600_u64, 0..70 * 24 * 3600_u64, Just(u64::MAX)]
}

fn ladders() -> impl Strategy<Value = Ladder> {
    let ladder = |(every_s, hourly_s, daily_s, weekly_s)| Ladder { every_s, hourly_s, daily_s, weekly_s };
    prop_oneof![Just(Ladder::default()), (spans(), spans(), spans(), spans()).prop_map(ladder)]
}

/// How the next point comes to be: how much later, what its source says of its cut, and where the target's clock is off.
fn raw_points(count: usize) -> impl Strategy<Value = Vec<Raw>> {
    let gap_ms = prop_oneof![0..MINUTE_MS, 0..3 * HOUR_MS, 0..4 * DAY_MS];
    // Behind its arrival: honest, a backlog, a clock ahead.
    let lag_ms = prop_oneof![Just(0), 0..5 * DAY_MS, -DAY_MS..0];
    let lie_ms = prop_oneof![4 => Just(None), 1 => (-40 * DAY_MS..40 * DAY_MS).prop_map(Some)];
    let off_ms = prop_oneof![3 => Just(0), 1 => -5 * DAY_MS..5 * DAY_MS];
    let held = prop_oneof![12 => Just(None), 1 => Just(Some(Held::Pinned)), 1 => Just(Some(Held::Labelled))];
    let one = (gap_ms, lag_ms, lie_ms, off_ms, held);
    prop::collection::vec(one, 1..count).prop_map(|steps| {
        let (mut true_ms, mut points) = (START_MS, Vec::new());
        for (epoch, (gap_ms, lag_ms, lie_ms, off_ms, held)) in (1..).zip(steps) {
            true_ms += gap_ms;
            let cut_ms = lie_ms.map_or(true_ms - lag_ms, |lie_ms| START_MS + lie_ms);
            points.push(Raw { epoch, cut_ms, received_ms: true_ms + off_ms, held });
        }
        points
    })
}

/// A store that is pruned again and again, beside the history that it has had.
struct Pruned {
    ladder: Ladder,
    /// All points ever received.
    history: Vec<Raw>,
    /// What is left, where the caller carries along what [`decide`] counted with.
    carried: Vec<Candidate>,
    /// What is left, where the catalog reads what is left anew.
    read_anew: Vec<Raw>,
    now: Timestamp,
}

impl Pruned {
    fn new(ladder: Ladder) -> Self {
        Self { ladder, history: vec![], carried: vec![], read_anew: vec![], now: Timestamp(i64::MIN) }
    }

    /// Receives `raw`, then prunes as of `now`.
    fn round(&mut self, raw: &[Raw], now: Timestamp) {
        self.now = self.now.max(now);
        self.history.extend_from_slice(raw);
        let all = candidates(&self.history);
        self.carried.extend_from_slice(&all[all.len() - raw.len()..]);
        let decisions: Vec<Decision> = decide(&self.ladder, self.carried.iter().copied(), self.now).collect();
        self.carried = std::iter::zip(&self.carried, &decisions)
            .filter(|(_, decision)| matches!(decision.verdict, Verdict::Kept(_)))
            .map(|(point, decision)| Candidate { received: decision.received, ..*point })
            .collect();
        self.read_anew.extend_from_slice(raw);
        let left = kept(decide(&self.ladder, candidates(&self.read_anew), self.now));
        self.read_anew.retain(|raw| left.contains(&raw.epoch));
    }

    fn carried(&self) -> BTreeSet<u64> {
        self.carried.iter().map(|point| point.epoch.0).collect()
    }

    /// What is to be there if nothing had ever been removed before.
    fn of_all(&self, age_from: AgeFrom) -> BTreeSet<u64> {
        let reasons = oracle(&self.ladder, &candidates(&self.history), self.now, age_from);
        std::iter::zip(&self.history, reasons)
            .filter(|(_, reason)| reason.is_some())
            .map(|(raw, _)| raw.epoch)
            .collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn decisions_are_those_of_the_oracle(ladder in ladders(), raw in raw_points(120), age_ms in -DAY_MS..80 * DAY_MS) {
        let points = candidates(&raw);
        let now = Timestamp(raw.last().expect("at least one").received_ms + age_ms);
        let decisions: Vec<Decision> = decide(&ladder, points.iter().copied(), now).collect();
        let expected = oracle(&ladder, &points, now, AgeFrom::LatestArrival);
        prop_assert_eq!(decisions.len(), points.len());
        let left = kept(decisions.iter().copied());
        for ((decision, point), reason) in decisions.iter().zip(&points).zip(expected) {
            prop_assert_eq!(decision.epoch, point.epoch);
            match decision.verdict {
                Verdict::Kept(why) => prop_assert_eq!(Some(why), reason),
                Verdict::Removed(Removal::TooOld) => prop_assert_eq!(reason, None),
                Verdict::Removed(Removal::Replaced { by, .. }) => {
                    prop_assert_eq!(reason, None);
                    prop_assert!(by < point.epoch && left.contains(&by.0), "{:?} is gone itself", by);
                }
            }
        }
    }

    /// A superset, not always the same. What is the first of its hour, day or week among all points is so among any of them,
    /// and ages are the same, so nothing goes early. But where the first of a week has left the last rung, a point behind it
    /// that is still there for another reason (it was the newest, or a finer rung reaches as far) is the first of what is left.
    #[test]
    fn pruning_again_and_again_removes_nothing_early(
        ladder in ladders(),
        rounds in prop::collection::vec((1..20_usize, 0..6 * DAY_MS), 1..12),
        raw in raw_points(120),
    ) {
        let mut store = Pruned::new(ladder);
        let mut raw = raw.as_slice();
        for (count, wait_ms) in rounds {
            let (arrived, later) = raw.split_at(count.min(raw.len()));
            raw = later;
            let latest_ms = arrived.iter().map(|raw| raw.received_ms).max().unwrap_or(store.now.0);
            store.round(arrived, Timestamp(latest_ms + wait_ms));
            prop_assert!(store.carried().is_superset(&store.of_all(AgeFrom::LatestArrival)));
            let read_anew: BTreeSet<u64> = store.read_anew.iter().map(|raw| raw.epoch).collect();
            prop_assert!(read_anew.is_superset(&store.of_all(AgeFrom::OwnArrival)));
        }
    }

    /// With clocks that are right, a source that does not fall silent for as long as the finest rung reaches, and rungs that
    /// end at least a week apart, the survivors are those of the whole history exactly.
    #[test]
    fn pruning_again_and_again_keeps_no_more_either(
        rounds in prop::collection::vec((prop::collection::vec(1..20 * HOUR_MS, 1..30), 0..3 * HOUR_MS), 1..15),
    ) {
        let ladder = Ladder { every_s: 24 * 3600, hourly_s: 4 * 24 * 3600, daily_s: 12 * 24 * 3600, weekly_s: 33 * 24 * 3600 };
        let (mut store, mut clock_ms, mut epoch) = (Pruned::new(ladder), START_MS, 0);
        for (gaps_ms, wait_ms) in rounds {
            let honest = |gap_ms: i64| {
                clock_ms += gap_ms;
                epoch += 1;
                Raw { epoch, cut_ms: clock_ms, received_ms: clock_ms, held: None }
            };
            let raw: Vec<Raw> = gaps_ms.into_iter().map(honest).collect();
            store.round(&raw, Timestamp(clock_ms + wait_ms));
            prop_assert_eq!(store.carried(), store.of_all(AgeFrom::LatestArrival));
        }
    }

    #[test]
    fn a_source_that_lies_about_time_loses_nothing_but_its_labels(
        ladder in ladders(),
        raw in raw_points(120),
        lies_ms in prop::collection::vec(prop_oneof![any::<i64>(), START_MS - 90 * DAY_MS..START_MS + 90 * DAY_MS], 120),
        stands_still in any::<bool>(),
        age_ms in 0..80 * DAY_MS,
    ) {
        let lying: Vec<Raw> = std::iter::zip(&raw, &lies_ms)
            .map(|(raw, lie_ms)| Raw { cut_ms: if stands_still { lies_ms[0] } else { *lie_ms }, ..*raw })
            .collect();
        let honest: Vec<Raw> = raw.iter().map(|raw| Raw { cut_ms: raw.received_ms, ..*raw }).collect();
        let (of_liar, of_honest) =
            (kept_at(&ladder, &candidates(&lying), age_ms), kept_at(&ladder, &candidates(&honest), age_ms));
        prop_assert!(of_liar.is_superset(&of_honest));
        for width_ms in [HOUR_MS, DAY_MS, 7 * DAY_MS] {
            let arrivals = |kept: &BTreeSet<u64>| {
                let mut arrivals = BTreeMap::<i64, usize>::new();
                for point in candidates(&raw).iter().filter(|point| kept.contains(&point.epoch.0)) {
                    *arrivals.entry(point.received.0.div_euclid(width_ms)).or_default() += 1;
                }
                arrivals
            };
            let by_liar = arrivals(&of_liar);
            for (bucket, count) in arrivals(&of_honest) {
                prop_assert!(by_liar.get(&bucket).is_some_and(|by_liar| *by_liar >= count));
            }
        }
    }

    #[test]
    fn the_newest_pinned_and_labelled_always_stay(raw in raw_points(60), age_ms in 0..9000 * DAY_MS, ladder in ladders()) {
        for ladder in [Ladder { every_s: 0, hourly_s: 0, daily_s: 0, weekly_s: 0 }, ladder] {
            let left = kept_at(&ladder, &candidates(&raw), age_ms);
            prop_assert!(left.contains(&raw.last().expect("at least one").epoch));
            prop_assert!(raw.iter().filter(|raw| raw.held.is_some()).all(|raw| left.contains(&raw.epoch)));
        }
    }
}

/// A point every minute for `days`, each given when by the source's clock, arriving as `received_ms` says.
fn every_minute(days: i64, received_ms: impl Fn(i64) -> i64) -> Vec<Candidate> {
    let minutes = 0..days * 24 * 60;
    let raw = |minute: i64| Raw {
        epoch: 1 + minute as u64,
        cut_ms: START_MS + minute * MINUTE_MS,
        received_ms: received_ms(minute),
        held: None,
    };
    candidates(&minutes.map(raw).collect::<Vec<_>>())
}

#[test]
fn a_three_day_backlog_received_in_ten_minutes_keeps_its_history() {
    // Days 0, 1 and 2 of a week, received within ten minutes at 12:00 of day 3.
    let arrival_ms = START_MS + 3 * DAY_MS + 12 * HOUR_MS;
    let points = every_minute(3, |minute| arrival_ms + minute * 10 * MINUTE_MS / (3 * 24 * 60));
    let ladder = Ladder::default();
    let hours: BTreeSet<u64> = (0..72).map(|hour| 1 + hour * 60).collect();
    let and_newest = |mut epochs: BTreeSet<u64>| {
        epochs.insert(3 * 24 * 60);
        epochs
    };
    assert_eq!(kept_at(&ladder, &points, 23 * HOUR_MS).len(), points.len());
    assert_eq!(kept_at(&ladder, &points, 2 * DAY_MS), and_newest(hours));
    assert_eq!(kept_at(&ladder, &points, 8 * DAY_MS), and_newest([1, 1441, 2881].into()));
    assert_eq!(kept_at(&ladder, &points, 40 * DAY_MS), and_newest([1].into()));
    assert_eq!(kept_at(&ladder, &points, 400 * DAY_MS), and_newest([].into()));
}

#[test]
fn each_rung_keeps_the_first_of_each_of_its_steps() {
    let points = every_minute(50, |minute| START_MS + minute * MINUTE_MS);
    let now = Timestamp(START_MS + 50 * DAY_MS);
    let mut counts = BTreeMap::new();
    for decision in decide(&Ladder::default(), points.iter().copied(), now) {
        if let Verdict::Kept(reason) = decision.verdict {
            *counts.entry(reason.to_string()).or_insert(0) += 1;
        }
    }
    // A point exactly a day, 7 days or 31 days old is on the rung no more. Weeks begin on days 0, 7, 14; 21 is still daily.
    let expected = [("daily", 31 - 7), ("every", 24 * 60 - 2), ("hourly", 6 * 24), ("newest", 1), ("weekly", 3)];
    assert_eq!(counts, expected.map(|(rung, count)| (rung.to_owned(), count)).into());
}

#[test]
fn a_target_clock_that_went_back_makes_no_point_older_than_its_elders() {
    let raw = |epoch, received_ms| Raw { epoch, cut_ms: received_ms, received_ms, held: None };
    let points = candidates(&[
        raw(1, START_MS + 10 * DAY_MS),
        raw(2, START_MS),
        raw(3, START_MS + MINUTE_MS),
        raw(4, START_MS + 10 * DAY_MS + MINUTE_MS),
    ]);
    let decisions = decide(&Ladder::default(), points, Timestamp(START_MS + 10 * DAY_MS + HOUR_MS)).collect::<Vec<_>>();
    assert_eq!(decisions[1].received, Timestamp(START_MS + 10 * DAY_MS));
    assert_eq!(kept(decisions).len(), 4);
}

#[test]
fn a_removed_point_says_what_took_its_place() {
    let points = every_minute(14, |minute| START_MS + minute * MINUTE_MS);
    let verdict = |epoch: usize, ladder: Ladder, day: i64| {
        let now = Timestamp(START_MS + day * DAY_MS);
        decide(&ladder, points.iter().copied(), now).nth(epoch - 1).expect("there").verdict.to_string()
    };
    assert_eq!(verdict(62, Ladder::default(), 2), "61 stands for its hour");
    assert_eq!(verdict(62, Ladder::default(), 9), "1 stands for its day");
    assert_eq!(verdict(62, Ladder::default(), 40), "1 stands for its week");
    assert_eq!(verdict(62, Ladder::default(), 400), "too old");
    assert_eq!(verdict(61, Ladder::default(), 5), "hourly");
    let none = Ladder { every_s: 0, hourly_s: 0, daily_s: 0, weekly_s: 0 };
    assert_eq!(verdict(62, none, 0), "too old");
}

#[test]
fn to_keep_only_the_newest_takes_two_others() {
    let none = Ladder { every_s: 0, hourly_s: 0, daily_s: 0, weekly_s: 0 };
    let points = every_minute(1, |minute| START_MS + minute * MINUTE_MS);
    let now = Timestamp(START_MS + DAY_MS);
    let of = |ladder: &Ladder, points: &[Candidate]| decide(ladder, points.iter().copied(), now).collect::<Vec<_>>();
    assert!(!keeps_only_newest(of(&none, &[])));
    assert!(!keeps_only_newest(of(&none, &points[..2])));
    assert!(keeps_only_newest(of(&none, &points[..3])));
    assert!(!keeps_only_newest(of(&Ladder::default(), &points)));
    let mut held = points[..3].to_vec();
    held[1].held = Some(Held::Pinned);
    assert!(!keeps_only_newest(of(&none, &held)), "one other");
    assert!(
        !keeps_only_newest(of(&Ladder { daily_s: 10 * 24 * 3600, ..none }, &points)),
        "the first of the day is left"
    );
    let tally: Tally = of(&none, &held).into_iter().collect();
    assert_eq!(tally, Tally { on_a_rung: 0, held: 1, newest: 1, removed: 1 });
}

#[test]
fn times_at_the_ends_of_the_calendar_are_no_trouble() {
    let ends = [i64::MIN, 0, i64::MAX];
    for (cut_ms, received_ms) in ends.into_iter().flat_map(|cut| ends.map(|received| (cut, received))) {
        let points = candidates(&[1, 2, 3].map(|epoch| Raw { epoch, cut_ms, received_ms, held: None }));
        for now in ends {
            assert!(decide(&Ladder::default(), points.iter().copied(), Timestamp(now)).count() == 3);
        }
    }
}
