//! The retention ladder: which recovery points are kept as they age.
//!
//! *When* a point may go is decided by its age by the target's clock; *which* points stay on a rung, by the point's own time
//! and by its arrival alike: the first of its hour, day or week by either one stays. A backlog of days that arrives within
//! minutes so keeps its history by point time; and a source whose clock stands still or lies loses nothing but its labels,
//! because the arrivals are spread as they are.
//!
//! Invariants:
//! * A point that is the first of its week is the first of its day, and of its hour: a finer rung never removes what a
//!   coarser one is to keep.
//! * Deciding again over what is left removes no point before it would go if all points had stayed. What is first among all is
//!   first among any of them, so that the rungs can only keep more; and a point's age comes from its arrival, which is never
//!   taken to be before that of an older point. See [`Decision::received`] for what a caller has to carry along for that.
//! * The newest point, pinned ones and labelled ones stay.
//!
//! It is arithmetic over an iterator: it holds one point at a time, reads no clock and removes nothing.

pub mod clock;

use cdp_protocol::units::{Epoch, Timestamp};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::iter::Peekable;

const HOUR_S: u64 = 3600;
const DAY_S: u64 = 24 * HOUR_S;
const WEEK_S: u64 = 7 * DAY_S;

/// Up to which age points are kept, in seconds. A rung of 0 keeps nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ladder {
    /// Every point.
    pub every_s: u64,
    /// The first of an hour.
    pub hourly_s: u64,
    /// The first of a day.
    pub daily_s: u64,
    /// The first of a week.
    pub weekly_s: u64,
}

impl Default for Ladder {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Ladder {
    /// Every point for a day, hourly for a week, daily for a month, weekly for a year.
    pub const DEFAULT: Self = Self { every_s: DAY_S, hourly_s: 7 * DAY_S, daily_s: 31 * DAY_S, weekly_s: 366 * DAY_S };

    /// Up to which age `rung` keeps points, in seconds.
    #[must_use]
    pub const fn span_s(&self, rung: Rung) -> u64 {
        match rung {
            Rung::Every => self.every_s,
            Rung::Hourly => self.hourly_s,
            Rung::Daily => self.daily_s,
            Rung::Weekly => self.weekly_s,
        }
    }

    const fn keeps(&self, rung: Rung, age_ms: u64) -> bool {
        age_ms < self.span_s(rung).saturating_mul(1000)
    }
}

/// A step of the ladder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rung {
    /// Every point.
    Every,
    /// The first of an hour.
    Hourly,
    /// The first of a day.
    Daily,
    /// The first of a week.
    Weekly,
}

impl Rung {
    /// All rungs, the finest first.
    pub const ALL: [Self; 4] = [Self::Every, Self::Hourly, Self::Daily, Self::Weekly];

    /// How far apart the points are that the rung keeps, in seconds; 0 where it keeps all. Each divides the next: nesting
    /// depends on it.
    #[must_use]
    pub const fn step_s(self) -> u64 {
        match self {
            Self::Every => 0,
            Self::Hourly => HOUR_S,
            Self::Daily => DAY_S,
            Self::Weekly => WEEK_S,
        }
    }

    /// Which hour, day or week `time` lies in, counted from the Unix epoch in UTC.
    const fn bucket(self, time: Timestamp) -> i64 {
        match self {
            Self::Every => time.0,
            _ => time.0.div_euclid(self.step_s() as i64 * 1000),
        }
    }

    const fn noun(self) -> &'static str {
        match self {
            Self::Every => "instant",
            Self::Hourly => "hour",
            Self::Daily => "day",
            Self::Weekly => "week",
        }
    }
}

/// Why a point is kept whatever its age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Held {
    /// An operator pinned it.
    Pinned,
    /// It has a label.
    Labelled,
}

/// A recovery point as far as retention looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its number.
    pub epoch: Epoch,
    /// Its time: never before that of the point in front of it, nor after its arrival.
    pub time: Timestamp,
    /// When it arrived, by the target's clock, which may have gone back.
    pub received: Timestamp,
    /// What holds it, if anything does.
    pub held: Option<Held>,
}

/// What becomes of a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The point's number.
    pub epoch: Epoch,
    /// When the point counts as received: the latest arrival up to it. A caller that removes points hands this in as
    /// [`Candidate::received`] from then on. Where it does not, a point that arrived while the target's clock had gone back
    /// counts from its own, earlier arrival once the points before it are gone.
    pub received: Timestamp,
    /// Whether it stays, and why.
    pub verdict: Verdict,
}

/// Whether a point stays, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It stays.
    Kept(Reason),
    /// It goes.
    Removed(Removal),
}

/// Why a point stays; where there are several reasons, the first of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It is pinned or labelled.
    Held(Held),
    /// It is the newest.
    Newest,
    /// The finest rung that keeps it.
    Rung(Rung),
}

/// Why a point goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// Older than every rung reaches that it stands on.
    TooOld,
    /// Another point of the same hour, day or week stays in its place.
    Replaced {
        /// The finest rung that has a point in its place.
        rung: Rung,
        /// That point.
        by: Epoch,
    },
}

/// Decides over `points`, oldest first, as of `now`: one decision a point, in the same order, made as they are asked for.
///
/// `now` is a [`clock::RetentionClock`]'s, not the machine's. Points that arrived after it have no age.
pub fn decide<P: IntoIterator<Item = Candidate>>(ladder: &Ladder, points: P, now: Timestamp) -> Decisions<P::IntoIter> {
    Decisions {
        ladder: *ladder,
        now,
        points: points.into_iter().peekable(),
        received: Timestamp(i64::MIN),
        firsts: [None; 3],
    }
}

/// The decisions of one pass, made one by one. See [`decide`].
#[derive(Clone, Debug)]
pub struct Decisions<I: Iterator<Item = Candidate>> {
    ladder: Ladder,
    now: Timestamp,
    points: Peekable<I>,
    /// The latest arrival so far.
    received: Timestamp,
    /// The first points of the hour, day and week that the pass has got to.
    firsts: [Option<Firsts>; 3],
}

/// The first points of one hour, day or week: by point time, and by arrival.
#[derive(Clone, Copy, Debug)]
struct Firsts {
    by_time: First,
    by_arrival: First,
}

#[derive(Clone, Copy, Debug)]
struct First {
    bucket: i64,
    epoch: Epoch,
    received: Timestamp,
}

const COARSE: [Rung; 3] = [Rung::Hourly, Rung::Daily, Rung::Weekly];

impl<I: Iterator<Item = Candidate>> Iterator for Decisions<I> {
    type Item = Decision;

    fn next(&mut self) -> Option<Decision> {
        let point = self.points.next()?;
        self.received = self.received.max(point.received);
        self.step(&point);
        let verdict = match point.held {
            Some(held) => Verdict::Kept(Reason::Held(held)),
            None if self.points.peek().is_none() => Verdict::Kept(Reason::Newest),
            None => self.judge(&point),
        };
        Some(Decision { epoch: point.epoch, received: self.received, verdict })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.points.size_hint()
    }
}

impl<I: Iterator<Item = Candidate>> Decisions<I> {
    /// Makes `point` the first of what it is the first of.
    fn step(&mut self, point: &Candidate) {
        for (rung, firsts) in COARSE.into_iter().zip(&mut self.firsts) {
            let first = |time| First { bucket: rung.bucket(time), epoch: point.epoch, received: self.received };
            let (by_time, by_arrival) = (first(point.time), first(self.received));
            match firsts {
                None => *firsts = Some(Firsts { by_time, by_arrival }),
                Some(firsts) => {
                    firsts.by_time.replace_if_past(by_time);
                    firsts.by_arrival.replace_if_past(by_arrival);
                }
            }
        }
    }

    /// What the ladder says about `point`, the last one stepped to.
    fn judge(&self, point: &Candidate) -> Verdict {
        let age_ms = |received: Timestamp| self.now.0.saturating_sub(received.0).max(0) as u64;
        if self.ladder.keeps(Rung::Every, age_ms(self.received)) {
            return Verdict::Kept(Reason::Rung(Rung::Every));
        }
        let mut removal = Removal::TooOld;
        for (rung, firsts) in COARSE.into_iter().zip(&self.firsts) {
            let Some(Firsts { by_time, by_arrival }) = firsts else { continue };
            if !self.ladder.keeps(rung, age_ms(self.received)) {
                continue;
            }
            if [by_time, by_arrival].iter().any(|first| first.epoch == point.epoch) {
                return Verdict::Kept(Reason::Rung(rung));
            }
            // At the far end of a rung the first point of its last hour, day or week is already gone.
            let stays = [by_time, by_arrival].into_iter().find(|first| self.ladder.keeps(rung, age_ms(first.received)));
            if let (Removal::TooOld, Some(first)) = (removal, stays) {
                removal = Removal::Replaced { rung, by: first.epoch };
            }
        }
        Verdict::Removed(removal)
    }
}

impl First {
    /// Neither clock goes back here, so a point in another bucket is the first of a later one.
    fn replace_if_past(&mut self, other: Self) {
        if other.bucket > self.bucket {
            *self = other;
        }
    }
}

/// What a pass comes to, in points.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Kept by a rung.
    pub on_a_rung: u64,
    /// Kept because pinned or labelled.
    pub held: u64,
    /// Kept because the newest: 1 at most.
    pub newest: u64,
    /// To be removed.
    pub removed: u64,
}

impl Tally {
    /// Counts one decision.
    pub const fn add(&mut self, decision: &Decision) {
        let count = match decision.verdict {
            Verdict::Kept(Reason::Rung(_)) => &mut self.on_a_rung,
            Verdict::Kept(Reason::Held(_)) => &mut self.held,
            Verdict::Kept(Reason::Newest) => &mut self.newest,
            Verdict::Removed(_) => &mut self.removed,
        };
        *count += 1;
    }

    /// Whether nothing would be left but the newest, pinned and labelled points, although there are at least two others. A
    /// caller refuses that unless told otherwise: it is what a mistyped ladder or a wrong clock looks like.
    #[must_use]
    pub const fn keeps_only_newest(&self) -> bool {
        self.on_a_rung == 0 && self.removed >= 2
    }
}

impl Extend<Decision> for Tally {
    fn extend<T: IntoIterator<Item = Decision>>(&mut self, decisions: T) {
        decisions.into_iter().for_each(|decision| self.add(&decision));
    }
}

impl FromIterator<Decision> for Tally {
    fn from_iter<T: IntoIterator<Item = Decision>>(decisions: T) -> Self {
        let mut tally = Self::default();
        tally.extend(decisions);
        tally
    }
}

/// Whether `decisions` leave nothing but the newest, pinned and labelled points. See [`Tally::keeps_only_newest`].
pub fn keeps_only_newest(decisions: impl IntoIterator<Item = Decision>) -> bool {
    decisions.into_iter().collect::<Tally>().keeps_only_newest()
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Every => "every",
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
        })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Held(Held::Pinned) => f.write_str("pinned"),
            Self::Held(Held::Labelled) => f.write_str("labelled"),
            Self::Newest => f.write_str("newest"),
            Self::Rung(rung) => rung.fmt(f),
        }
    }
}

impl fmt::Display for Removal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooOld => f.write_str("too old"),
            Self::Replaced { rung, by } => write!(f, "{by} stands for its {}", rung.noun()),
        }
    }
}

impl Serialize for Removal {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kept(reason) => reason.fmt(f),
            Self::Removed(removal) => removal.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests;
