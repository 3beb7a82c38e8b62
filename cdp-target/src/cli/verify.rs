//! `verify`: re-reads and proves what the points stand on.

use super::arguments::{DataFolder, GroupPath, whole_group};
use super::failure::Failure;
use super::output::{bytes, json};
use super::{context, print};
use crate::catalog::Catalog;
use crate::points::PointName;
use crate::verify::{Damage, Healed, VerifyReport, verify};
use cdp_protocol::units::Epoch;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::process::ExitCode;

/// Epochs named on a line of damage before it only counts them.
const EPOCHS_NAMED: usize = 20;
/// The same for runs of blocks.
const EXTENTS_NAMED: usize = 4;

/// Arguments of `verify`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The group.
    #[arg(value_name = "OFFICE/GROUP", value_parser = whole_group)]
    group: GroupPath,
    /// Report only what this point needs: number, `latest`, label, time or age.
    #[arg(long, value_name = "POINT")]
    at: Option<String>,
    /// One JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    data: DataFolder,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    check(arguments).map_err(|failure| failure.context(format!("verify {}", arguments.group)))
}

fn check(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let now = context::now();
    let name = arguments.at.as_deref().map(|at| PointName::parse(at, now)).transpose()?;
    let store = context::open(&arguments.data)?;
    let catalog = Catalog::new(&store, context::authority(&store)?);
    let group = catalog.group(&arguments.group.office, &arguments.group.group)?;
    // A prune beside us takes nothing away that is still to be read.
    let (group, _lease) = group.held(&store)?;
    let at: Option<Epoch> = match name {
        Some(name) => Some(name.find(&group.points()?)?.epoch),
        None => None,
    };
    let keys = catalog.keys(&group)?;
    let style = ProgressStyle::with_template("verify {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left")
        .expect("the template is constant");
    let bar = ProgressBar::new(group.view().bytes()).with_style(style);
    let report = verify(group.view(), Some(&keys), at, &mut |progress| {
        bar.set_length(progress.bytes_total);
        bar.set_position(progress.bytes);
    })?;
    bar.finish_and_clear();
    print(&if arguments.json { json(&report) } else { text(&report) })?;
    if report.is_clean() {
        return Ok(ExitCode::SUCCESS);
    }
    let points: BTreeSet<Epoch> = report.damages.iter().flat_map(|damage| damage.points.iter().copied()).collect();
    let places = report.damages.len();
    let line = format!("{places} damaged place{}, {} points need what is damaged", plural(places), points.len());
    Err(Failure::mistake(line).hint("export another point, or what is left of one with --allow-damaged"))
}

const fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// "; blocks 8..16 of volume 0 …", where they are known.
fn blocks(damage: &Damage) -> String {
    let named = damage.blocks.iter().take(EXTENTS_NAMED);
    let named: Vec<String> =
        named.map(|at| format!("{}..{} of volume {}", at.start, at.start + at.count, at.volume)).collect();
    let more = damage.blocks.len().saturating_sub(EXTENTS_NAMED);
    match (named.is_empty(), more) {
        (true, _) => String::new(),
        (false, 0) => format!("; blocks {}", named.join(", ")),
        (false, more) => format!("; blocks {} and {more} more extents", named.join(", ")),
    }
}

fn text(report: &VerifyReport) -> String {
    let VerifyReport { segments, packs, frames, points, .. } = report;
    let read = bytes(report.bytes);
    let mut text = format!("read {read}: {segments} segments, {packs} packs, {frames} frames, {points} points\n");
    for damage in &report.damages {
        let named: Vec<String> = damage.points.iter().take(EPOCHS_NAMED).map(Epoch::to_string).collect();
        let more = damage.points.len().saturating_sub(EPOCHS_NAMED);
        let points = match (named.is_empty(), more) {
            (true, _) => "no point needs it".to_owned(),
            (false, 0) => format!("points {}", named.join(" ")),
            (false, more) => format!("points {} and {more} more", named.join(" ")),
        };
        let (file, offset, what) = (&damage.file, damage.offset, &damage.what);
        writeln!(text, "damaged: {file} offset {offset}: {what}{}; {points}", blocks(damage))
            .expect("text takes anything");
    }
    for Healed { segment, offset } in &report.healed {
        writeln!(text, "healed: segment {segment} offset {offset}").expect("text takes anything");
    }
    if report.is_clean() {
        text.push_str("nothing is wrong\n");
    }
    text
}
