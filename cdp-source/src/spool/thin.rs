//! Which of the points that wait is given up: it is merged into the one behind it.
//!
//! Arithmetic only. The point goes whose going leaves the smallest gap for the age that it has, so that points get coarser the
//! older they are. One that somebody asked for goes only where no other may.

/// A point that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    /// Its cut's time, in milliseconds.
    pub(super) time: i64,
    /// Whether it may be merged into the one behind it at all.
    pub(super) may_go: bool,
    /// Whether somebody asked for it.
    pub(super) is_wanted: bool,
}

/// The place of the one that goes. `before`: the time of what stands before the first; `now`: in the same milliseconds.
pub(super) fn choose(points: &[Candidate], before: i64, now: i64) -> Option<usize> {
    let gap = |at: usize| {
        let from = at.checked_sub(1).map_or(before, |before| points[before].time);
        points[at + 1].time.saturating_sub(from).max(0)
    };
    let age = |at: usize| now.saturating_sub(points[at + 1].time).max(0).saturating_add(1);
    let mut best: Option<usize> = None;
    for at in (0..points.len().saturating_sub(1)).filter(|at| points[*at].may_go) {
        // Fractions are compared across; equal ones leave the older.
        let is_better = best.is_none_or(|best| match (points[best].is_wanted, points[at].is_wanted) {
            (true, false) => true,
            (false, true) => false,
            _ => i128::from(gap(at)) * i128::from(age(best)) < i128::from(gap(best)) * i128::from(age(at)),
        });
        if is_better {
            best = Some(at);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{Strategy, any, proptest};

    fn candidate() -> impl Strategy<Value = Candidate> {
        (0..100_i64, any::<bool>(), any::<bool>()).prop_map(|(time, may_go, is_wanted)| Candidate {
            time,
            may_go,
            is_wanted,
        })
    }

    proptest! {
        /// The oracle goes through all of them with floating numbers.
        #[test]
        fn the_smallest_gap_for_its_age_goes(mut points in proptest::collection::vec(candidate(), 0..12), now in 100..200_i64) {
            points.sort_by_key(|point| point.time);
            let rank = |at: usize| {
                let from = if at == 0 { 0 } else { points[at - 1].time };
                let (gap, age) = ((points[at + 1].time - from) as f64, (now - points[at + 1].time + 1) as f64);
                (points[at].is_wanted, gap / age)
            };
            let may_go = (0..points.len().saturating_sub(1)).filter(|at| points[*at].may_go);
            let expected = may_go.min_by(|a, b| rank(*a).partial_cmp(&rank(*b)).expect("numbers"));
            let chosen = choose(&points, 0, now);
            assert_eq!(chosen.map(rank), expected.map(rank));
        }

        #[test]
        fn clocks_that_are_set_back_and_forth_do_no_harm(times in proptest::collection::vec(any::<i64>(), 0..12), now in any::<i64>(), before in any::<i64>()) {
            let points: Vec<_> = times.iter().map(|time| Candidate { time: *time, may_go: true, is_wanted: false }).collect();
            assert_eq!(choose(&points, before, now).is_some(), points.len() > 1);
        }
    }

    /// A point a minute for 30 days, 200 kept: the gap before each is no more than a share of its age.
    #[test]
    fn points_get_coarser_the_older_they_are() {
        const POINTS_MAX: usize = 200;
        let mut points: Vec<Candidate> = Vec::new();
        let end = 30 * 24 * 60;
        for minute in 1..=end {
            points.push(Candidate { time: minute, may_go: true, is_wanted: false });
            if points.len() > POINTS_MAX {
                let gone = choose(&points, 0, minute).expect("one goes");
                points.remove(gone);
            }
        }
        assert_eq!(points.len(), POINTS_MAX);
        for pair in points.windows(2) {
            let (gap, age) = (pair[1].time - pair[0].time, end - pair[1].time);
            assert!(gap <= 2 + age / 4, "a gap of {gap} minutes at an age of {age}");
        }
        assert!(points[POINTS_MAX - 1].time - points[POINTS_MAX - 2].time <= 2, "the newest are as they were made");
    }
}
