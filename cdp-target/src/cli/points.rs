//! `points`: the recovery points of a group.

use super::arguments::{DataFolder, GroupPath, whole_group};
use super::failure::Failure;
use super::output::{Table, bytes, duration_ms, json};
use super::{context, print};
use crate::catalog::Catalog;
use crate::journal::{PointLayout, PointVolume};
use crate::points::{Instant, PointInfo, parse_instant};
use cdp_protocol::units::{Class, Epoch, Timestamp};
use serde::Serialize;
use std::process::ExitCode;

/// A time without points counts as a gap when it is this many times the usual interval,
const GAP_INTERVALS: i64 = 10;
/// and at least this long, in milliseconds.
const GAP_MS_MIN: i64 = 60_000;

/// Arguments of `points`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The group.
    #[arg(value_name = "OFFICE/GROUP", value_parser = whole_group)]
    group: GroupPath,
    /// Only points at or after this time (RFC 3339, or an age such as 2h).
    #[arg(long, value_name = "T")]
    since: Option<String>,
    /// Only points at or before this time (RFC 3339, or an age such as 2h).
    #[arg(long, value_name = "T")]
    until: Option<String>,
    /// One JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    data: DataFolder,
}

/// A point in the JSON document: the names are a contract with scripts.
#[derive(Serialize)]
struct Line<'a> {
    epoch: Epoch,
    time: Instant,
    class: Class,
    label: Option<&'a str>,
    pinned: bool,
    bytes: u64,
    /// Since when all that it stands on was found whole.
    verified: Option<Instant>,
    cut_ms: f64,
    cut_rounds: u32,
    /// What became of each volume since the point before.
    volumes: &'a [PointVolume],
    /// How disks are laid out from this point on, where that is not as it was before.
    #[serde(skip_serializing_if = "<[PointLayout]>::is_empty")]
    layouts: &'a [PointLayout],
    first_epoch: Epoch,
    cut_time: Instant,
    received: Instant,
    /// The time without points before this one, where it is a gap.
    gap_ms: Option<i64>,
    warning: Option<&'a str>,
}

#[derive(Serialize)]
struct Document<'a> {
    office: &'a str,
    group: &'a str,
    points: Vec<Line<'a>>,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    list(arguments).map_err(|failure| failure.context(format!("list points of {}", arguments.group)))
}

fn list(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let now = context::now();
    let bound = |text: &Option<String>| text.as_deref().map(|text| parse_instant(text, now)).transpose();
    let (since, until) = (bound(&arguments.since)?, bound(&arguments.until)?);
    let store = context::open(&arguments.data)?;
    let catalog = Catalog::new(&store, context::authority(&store)?);
    let group = catalog.group(&arguments.group.office, &arguments.group.group)?;
    // A prune beside us takes nothing away that is still to be read.
    let (group, _lease) = group.held(&store)?;
    let points = group.points()?;
    for (segment, range) in group.view().unlisted() {
        let (first, last) = (range.first, range.last);
        eprintln!("warning: points {first} to {last} cannot all be listed: segment {segment} is missing or damaged");
        eprintln!("hint: cdp-target verify {} names what is hit", arguments.group);
    }
    let gaps = gaps(&points);
    let listed = points.iter().zip(gaps).filter(|(point, _)| {
        since.is_none_or(|since| point.time >= since) && until.is_none_or(|until| point.time <= until)
    });
    if arguments.json {
        let points = listed.map(|(point, gap_ms)| line(point, gap_ms)).collect();
        print(&json(&Document { office: &arguments.group.office, group: &arguments.group.group, points }))?;
    } else {
        print(&table(listed))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn line(point: &PointInfo, gap_ms: Option<i64>) -> Line<'_> {
    Line {
        epoch: point.epoch,
        time: Instant(point.time),
        class: point.class,
        label: point.label.as_deref(),
        pinned: point.pinned,
        bytes: point.bytes,
        verified: point.verified.map(Instant),
        cut_ms: point.cut_us as f64 / 1000.0,
        cut_rounds: point.cut_rounds,
        volumes: &point.volumes,
        layouts: &point.layouts,
        first_epoch: point.first_epoch,
        cut_time: Instant(point.cut_time),
        received: Instant(point.received),
        gap_ms,
        warning: point.warning.as_deref(),
    }
}

fn table<'a>(points: impl Iterator<Item = (&'a PointInfo, Option<i64>)>) -> String {
    let columns = [">epoch", "time", "class", "label", "pinned", ">bytes", "verified", ">cut_ms", ">rounds", "warning"];
    let mut table = Table::new(&columns);
    for (point, gap_ms) in points {
        if let Some(gap_ms) = gap_ms {
            table.note(format!("-- no points for {} --", duration_ms(gap_ms)));
        }
        table.row(vec![
            point.epoch.to_string(),
            Instant(point.time).to_string(),
            class_name(point.class).to_owned(),
            point.label.clone().unwrap_or_else(|| "-".to_owned()),
            if point.pinned { "yes" } else { "-" }.to_owned(),
            bytes(point.bytes),
            point.verified.map_or_else(|| "-".to_owned(), |at| Instant(at).to_string()),
            format!("{:.1}", point.cut_us as f64 / 1000.0),
            point.cut_rounds.to_string(),
            point.warning.clone().unwrap_or_default(),
        ]);
    }
    table.render()
}

const fn class_name(class: Class) -> &'static str {
    match class {
        Class::Crash => "crash",
        Class::Filesystem => "filesystem",
        Class::Application => "application",
    }
}

/// For each point the time without points before it, where that is a gap: far above the usual interval of the group.
fn gaps(points: &[PointInfo]) -> Vec<Option<i64>> {
    let after = |(before, point): (&PointInfo, &PointInfo)| since(before.time, point.time);
    let mut intervals: Vec<i64> = points.iter().zip(points.iter().skip(1)).map(after).collect();
    let between = intervals.clone();
    let middle = intervals.len() / 2;
    let usual = if intervals.is_empty() { 0 } else { *intervals.select_nth_unstable(middle).1 };
    let least = usual.saturating_mul(GAP_INTERVALS).max(GAP_MS_MIN);
    let first = points.first().map(|_| None);
    first.into_iter().chain(between.into_iter().map(|interval| (interval >= least).then_some(interval))).collect()
}

const fn since(before: Timestamp, after: Timestamp) -> i64 {
    after.0.saturating_sub(before.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(times: &[i64]) -> Vec<PointInfo> {
        let point = |(index, time): (usize, &i64)| PointInfo {
            epoch: Epoch(index as u64 + 1),
            first_epoch: Epoch(index as u64 + 1),
            time: Timestamp(*time),
            cut_time: Timestamp(*time),
            received: Timestamp(*time),
            class: Class::Crash,
            label: None,
            pinned: false,
            bytes: 4096,
            cut_us: 1500,
            cut_rounds: 1,
            volumes: vec![],
            layouts: vec![],
            verified: None,
            damaged: None,
            warning: None,
        };
        times.iter().enumerate().map(point).collect()
    }

    #[test]
    fn a_gap_is_far_above_the_usual_interval_and_never_short() {
        assert_eq!(gaps(&points(&[])), []);
        assert_eq!(gaps(&points(&[0])), [None]);
        assert_eq!(gaps(&points(&[0, 1000, 2000, 50_000])), [None; 4], "48 s are no gap");
        assert_eq!(gaps(&points(&[0, 1000, 2000, 90_000, 91_000])), [None, None, None, Some(88_000), None]);
        let hourly: Vec<i64> = (0..5).map(|hour| hour * 3_600_000).collect();
        assert_eq!(gaps(&points(&hourly)), [None; 5], "the usual interval is no gap");
    }

    #[test]
    fn the_document_has_the_names_scripts_rely_on() {
        let points = points(&[0]);
        let value = serde_json::to_value(line(&points[0], None)).expect("json");
        for name in
            ["epoch", "time", "class", "label", "pinned", "bytes", "verified", "cut_ms", "cut_rounds", "volumes"]
        {
            assert!(value.get(name).is_some(), "{name}");
        }
        assert_eq!(value["time"], "1970-01-01T00:00:00.000Z");
        assert_eq!(value["class"], "crash");
        assert!((value["cut_ms"].as_f64().expect("a number") - 1.5).abs() < 1e-9);
    }

    #[test]
    fn the_table_shows_gaps_between_points() {
        let points = points(&[0, 1000, 2000, 90_000]);
        let gaps = gaps(&points);
        let text = table(points.iter().zip(gaps));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 6, "{text}");
        assert_eq!(lines[4], "-- no points for 1 min 28 s --");
        assert!(lines[5].contains("1970-01-01T00:01:30.000Z"), "{text}");
    }
}
