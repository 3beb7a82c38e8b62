//! Naming a recovery point: by number, `latest`, label, time or age.
//!
//! Invariant: a name means one thing. What could be read as a number, a time, an age or `latest` is never a label, and a
//! time means the newest point at or before it. Where there is none, the error names the nearest before and after.

use crate::journal::{PointLayout, PointVolume};
use cdp_protocol::label::{Reading, age_unit_ms};
use cdp_protocol::limits::is_name;
use cdp_protocol::units::{Class, Epoch, Timestamp};
use std::fmt;

/// A recovery point as the commands know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PointInfo {
    /// Its number.
    pub epoch: Epoch,
    /// The lowest epoch merged into it.
    pub first_epoch: Epoch,
    /// Its time: the cut's, clamped between the point before and the receive time, so that it never goes back.
    pub time: Timestamp,
    /// The instant of its cut, as the source's clock said.
    pub cut_time: Timestamp,
    /// When the target received its commit.
    pub received: Timestamp,
    /// How much applications may rely on it.
    pub class: Class,
    /// Its label.
    pub label: Option<String>,
    /// Whether pruning passes it over.
    pub pinned: bool,
    /// Bytes its frames take.
    pub bytes: u64,
    /// Duration of its cut in microseconds.
    pub cut_us: u64,
    /// Rounds of its cut.
    pub cut_rounds: u32,
    /// What became of each volume since the point before; empty where its source did not count.
    pub volumes: Vec<PointVolume>,
    /// How disks are laid out from this point on, where its commit tells.
    pub layouts: Vec<PointLayout>,
    /// Since when nothing that it needs was found damaged: when the least recently read segment of it was read again. `None`
    /// while a part of it stands in the open segment or was not read again yet.
    pub verified: Option<Timestamp>,
    /// What is damaged that it needs.
    pub damaged: Option<String>,
    /// What a reader has to know about it: damage, unreadable blocks, a rollback, a doubtful time.
    pub warning: Option<String>,
}

/// The instants that a point's time is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PointTimes {
    /// The cut, by the source's clock.
    pub cut: Timestamp,
    /// The arrival of its commit, by the target's clock.
    pub received: Timestamp,
}

/// A point's time: the cut's, not after its arrival and not before the point in front of it.
#[must_use]
pub fn point_time(times: PointTimes, before: Option<Timestamp>) -> Timestamp {
    let clamped = times.cut.min(times.received);
    before.map_or(clamped, |before| clamped.max(before))
}

/// Clocks further apart than this, in milliseconds, are worth telling.
pub const CLOCKS_APART_MS: u64 = 5 * 60 * 1000;

/// What is doubtful about a point's time, where it is far from what the source's clock said: that clock was set back, or one of the
/// two is wrong.
#[must_use]
pub fn time_doubt(times: PointTimes, time: Timestamp) -> Option<String> {
    (times.cut.0.abs_diff(time.0) > CLOCKS_APART_MS)
        .then(|| format!("its time is doubtful: the source's clock said {}", Instant(times.cut)))
}

/// How a person names a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PointName {
    /// By its number.
    Epoch(Epoch),
    /// The newest.
    Latest,
    /// By its label.
    Label(String),
    /// The newest at or before an instant.
    At(Timestamp),
}

/// Why a text names no point.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PointNameError {
    /// Nothing that could be a name.
    #[error("`{0}` is no point: not a number, `latest`, a label, a time or an age")]
    Garbage(String),
    /// A number that no epoch has.
    #[error("`{0}` is no epoch number: they go from 1 to 18446744073709551615")]
    Number(String),
    /// A time that needs a time zone to mean one instant.
    #[error("`{0}` is ambiguous: a time needs its zone, as in 2026-11-22T10:15:00Z")]
    NoZone(String),
    /// Starts like a time and is none.
    #[error("`{0}` is no time as RFC 3339 writes it, as in 2026-11-22T10:15:00Z")]
    Time(String),
    /// A time that has not come.
    #[error("`{0}` is in the future; it is {1} now")]
    Future(String, Instant),
    /// An age beyond all time.
    #[error("`{0}` is no age: it reaches beyond the calendar")]
    Age(String),
}

/// No such point; names the nearest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct NoSuchPoint {
    /// What was asked for.
    pub name: PointName,
    /// The nearest point before it, where order says anything.
    pub before: Option<(Epoch, Timestamp)>,
    /// The nearest after it.
    pub after: Option<(Epoch, Timestamp)>,
}

/// An instant, printed as RFC 3339 in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instant(pub Timestamp);

impl fmt::Display for Instant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0.0) {
            Ok(time) => write!(f, "{time:.3}"),
            Err(_) => write!(f, "{} ms", self.0),
        }
    }
}

impl serde::Serialize for Instant {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for PointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Epoch(epoch) => write!(f, "{epoch}"),
            Self::Latest => f.write_str("latest"),
            Self::Label(label) => write!(f, "`{label}`"),
            Self::At(time) => write!(f, "at or before {}", Instant(*time)),
        }
    }
}

impl fmt::Display for NoSuchPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "there is no point {}", self.name)?;
        match (self.before, self.after) {
            (None, None) => Ok(()),
            (Some(before), None) => write!(f, "; the nearest before is {}, there is none after", named(before)),
            (None, Some(after)) => write!(f, "; there is none before, the nearest after is {}", named(after)),
            (Some(before), Some(after)) => {
                write!(f, "; the nearest before is {}, after {}", named(before), named(after))
            }
        }
    }
}

fn named((epoch, time): (Epoch, Timestamp)) -> String {
    format!("{epoch} ({})", Instant(time))
}

impl PointName {
    /// Reads a name; `now` is what ages count from.
    ///
    /// # Errors
    /// Where it is none, or means more than one thing.
    pub fn parse(text: &str, now: Timestamp) -> Result<Self, PointNameError> {
        let owned = || text.to_owned();
        match Reading::of(text) {
            Reading::Latest => Ok(Self::Latest),
            Reading::Number => match text.parse() {
                Ok(number) if number > 0 => Ok(Self::Epoch(Epoch(number))),
                _ => Err(PointNameError::Number(owned())),
            },
            Reading::Age => age_ms(text)
                .and_then(|age| now.0.checked_sub(age))
                .filter(|at| jiff::Timestamp::from_millisecond(*at).is_ok())
                .map(|at| Self::At(Timestamp(at)))
                .ok_or_else(|| PointNameError::Age(owned())),
            Reading::Time => parse_time(text, now).map(Self::At),
            Reading::Other if is_name(text) => Ok(Self::Label(owned())),
            Reading::Other => Err(PointNameError::Garbage(owned())),
        }
    }

    /// Finds the point among `points`, which come oldest first.
    ///
    /// # Errors
    /// Where there is none; names the nearest.
    pub fn find<'a>(&self, points: impl IntoIterator<Item = &'a PointInfo>) -> Result<&'a PointInfo, NoSuchPoint> {
        let (mut before, mut after) = (None::<&PointInfo>, None::<&PointInfo>);
        for point in points {
            if matches!(self, Self::Epoch(epoch) if point.epoch == *epoch) {
                return Ok(point);
            }
            // Of two points that a source gave one name the newer has it.
            if matches!(self, Self::Label(label) if point.label.as_ref() == Some(label)) {
                before = Some(point);
            }
            let at_or_before = match self {
                Self::Epoch(epoch) => point.epoch < *epoch,
                Self::At(time) => point.time <= *time,
                Self::Latest => true,
                Self::Label(_) => continue,
            };
            match (at_or_before, after) {
                (true, _) => before = Some(point),
                (false, None) => after = Some(point),
                (false, Some(_)) => {}
            }
        }
        if let (Self::Latest | Self::At(_) | Self::Label(_), Some(point)) = (self, before) {
            return Ok(point);
        }
        let place = |point: &PointInfo| (point.epoch, point.time);
        Err(NoSuchPoint { name: self.clone(), before: before.map(place), after: after.map(place) })
    }
}

/// An instant given as a time or an age, for `--since` and `--until`.
///
/// # Errors
/// Where it is neither.
pub fn parse_instant(text: &str, now: Timestamp) -> Result<Timestamp, PointNameError> {
    match PointName::parse(text, now)? {
        PointName::At(time) => Ok(time),
        PointName::Latest | PointName::Epoch(_) | PointName::Label(_) => Err(PointNameError::Time(text.to_owned())),
    }
}

fn age_ms(text: &str) -> Option<i64> {
    let (number, unit) = text.split_at(text.len() - 1);
    number.parse::<i64>().ok()?.checked_mul(age_unit_ms(unit)?)
}

fn parse_time(text: &str, now: Timestamp) -> Result<Timestamp, PointNameError> {
    let time: jiff::Timestamp = text.parse().map_err(|_| {
        let without_zone = text.parse::<jiff::civil::DateTime>().is_ok() || text.parse::<jiff::civil::Date>().is_ok();
        if without_zone { PointNameError::NoZone(text.to_owned()) } else { PointNameError::Time(text.to_owned()) }
    })?;
    let time = Timestamp(time.as_millisecond());
    if time > now {
        return Err(PointNameError::Future(text.to_owned(), Instant(now)));
    }
    Ok(time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_protocol::label::{LabelError, check_label};

    const NOW: Timestamp = Timestamp(1_795_000_000_000);

    fn point(epoch: u64, time: i64, label: Option<&str>) -> PointInfo {
        PointInfo {
            epoch: Epoch(epoch),
            first_epoch: Epoch(epoch),
            time: Timestamp(time),
            cut_time: Timestamp(time),
            received: Timestamp(time),
            class: Class::Crash,
            label: label.map(str::to_owned),
            pinned: false,
            bytes: 0,
            cut_us: 0,
            cut_rounds: 1,
            volumes: vec![],
            layouts: vec![],
            verified: None,
            damaged: None,
            warning: None,
        }
    }

    #[test]
    fn a_name_is_read_as_one_thing() {
        let at = |ms| Ok(PointName::At(Timestamp(ms)));
        let owned = str::to_owned;
        for (text, expected) in [
            ("1234", Ok(PointName::Epoch(Epoch(1234)))),
            ("0", Err(PointNameError::Number(owned("0")))),
            ("18446744073709551616", Err(PointNameError::Number(owned("18446744073709551616")))),
            ("latest", Ok(PointName::Latest)),
            ("30s", at(NOW.0 - 30_000)),
            ("10m", at(NOW.0 - 600_000)),
            ("2h", at(NOW.0 - 7_200_000)),
            ("3d", at(NOW.0 - 259_200_000)),
            ("99999999999999d", Err(PointNameError::Age(owned("99999999999999d")))),
            ("99999999d", Err(PointNameError::Age(owned("99999999d")))),
            ("2026-11-10T00:00:00Z", at(1_794_268_800_000)),
            ("2026-11-10T01:00:00.25+01:00", at(1_794_268_800_250)),
            ("2026-11-10", Err(PointNameError::NoZone(owned("2026-11-10")))),
            ("2026-11-10T10:00", Err(PointNameError::NoZone(owned("2026-11-10T10:00")))),
            ("2026-11-10 10:00:00", Err(PointNameError::NoZone(owned("2026-11-10 10:00:00")))),
            ("2026-13-10T00:00:00Z", Err(PointNameError::Time(owned("2026-13-10T00:00:00Z")))),
            ("10:00", Err(PointNameError::Time(owned("10:00")))),
            ("2036-11-10T00:00:00Z", Err(PointNameError::Future(owned("2036-11-10T00:00:00Z"), Instant(NOW)))),
            ("before-upgrade", Ok(PointName::Label(owned("before-upgrade")))),
            ("", Err(PointNameError::Garbage(String::new()))),
            ("-1", Err(PointNameError::Garbage(owned("-1")))),
            ("a b", Err(PointNameError::Garbage(owned("a b")))),
            ("10 minutes", Err(PointNameError::Garbage(owned("10 minutes")))),
        ] {
            assert_eq!(PointName::parse(text, NOW), expected, "{text:?}");
        }
    }

    #[test]
    fn a_label_never_reads_as_anything_else() {
        for label in ["before-upgrade", "v1.2", "2nd", "1.5", "x10m", "10min", "2026q3"] {
            assert_eq!(check_label(label), Ok(()), "{label:?}");
            assert_eq!(PointName::parse(label, NOW), Ok(PointName::Label(label.to_owned())));
        }
        for label in ["1", "007", "latest", "LATEST", "10m", "3d", "2026-11-22", "2026-1", "20261122T101500Z", "10:15"]
        {
            assert!(matches!(check_label(label), Err(LabelError::ReadsAs(..))), "{label:?}");
        }
        for label in ["", "-x", ".x", "a b", "ü", &"x".repeat(65)] {
            assert!(matches!(check_label(label), Err(LabelError::Characters(_))), "{label:?}");
        }
    }

    #[test]
    fn a_time_is_the_newest_point_at_or_before_it() {
        let points = [point(2, 100, None), point(3, 200, Some("x")), point(7, 300, None)];
        for (name, expected) in [
            (PointName::Latest, Ok(7)),
            (PointName::Epoch(Epoch(3)), Ok(3)),
            (PointName::Label("x".into()), Ok(3)),
            (PointName::At(Timestamp(100)), Ok(2)),
            (PointName::At(Timestamp(299)), Ok(3)),
            (PointName::At(Timestamp(5000)), Ok(7)),
            (PointName::At(Timestamp(99)), Err((None, Some(2)))),
            (PointName::Epoch(Epoch(5)), Err((Some(3), Some(7)))),
            (PointName::Epoch(Epoch(1)), Err((None, Some(2)))),
            (PointName::Epoch(Epoch(8)), Err((Some(7), None))),
            (PointName::Label("y".into()), Err((None, None))),
        ] {
            let epoch = |place: Option<(Epoch, Timestamp)>| place.map(|(epoch, _)| epoch.0);
            let found = name.find(&points).map(|point| point.epoch.0);
            assert_eq!(found.map_err(|none| (epoch(none.before), epoch(none.after))), expected, "{name}");
        }
        assert!(PointName::Latest.find(&[]).is_err());
    }

    #[test]
    fn a_points_time_neither_goes_back_nor_passes_its_arrival() {
        let times = |cut, received| PointTimes { cut: Timestamp(cut), received: Timestamp(received) };
        assert_eq!(point_time(times(10, 20), None), Timestamp(10));
        assert_eq!(point_time(times(30, 20), None), Timestamp(20), "a source ahead of us");
        assert_eq!(point_time(times(5, 40), Some(Timestamp(10))), Timestamp(10), "a source that went back");
        assert_eq!(point_time(times(30, 20), Some(Timestamp(25))), Timestamp(25), "our own clock went back");
    }

    #[test]
    fn a_clock_that_was_set_back_makes_times_doubtful_and_keeps_them_in_order() {
        const SECOND: i64 = 1000;
        const DAY: i64 = 24 * 3600 * SECOND;
        // A point a second; the source's clock is set back by a day after the third, and right again after the sixth.
        let clock = |at: i64| if (4..=6).contains(&at) { at * SECOND - DAY } else { at * SECOND };
        let mut before = None;
        for at in 1..=9 {
            let times = PointTimes { cut: Timestamp(clock(at)), received: Timestamp(at * SECOND + 10) };
            let time = point_time(times, before);
            assert!(before.is_none_or(|before| before <= time), "point {at} stays behind the one before it");
            let doubt = time_doubt(times, time);
            assert_eq!(doubt.is_some(), (4..=6).contains(&at), "point {at}: {doubt:?}");
            assert!(doubt.is_none_or(|text| text.contains("1969-12-31T00:00:0")), "it says what the clock said");
            before = Some(time);
        }
    }

    #[test]
    fn the_error_names_the_neighbours() {
        let points = [point(2, 0, None), point(7, 60_000, None)];
        let error = PointName::Epoch(Epoch(5)).find(&points).expect_err("no 5").to_string();
        assert_eq!(
            error,
            "there is no point 5; the nearest before is 2 (1970-01-01T00:00:00.000Z), after 7 (1970-01-01T00:01:00.000Z)"
        );
    }
}
