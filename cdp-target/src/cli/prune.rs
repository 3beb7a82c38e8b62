//! `prune`: applies the retention ladder now, or says what it would do.

use super::arguments::{DataFolder, GroupPath, whole_group};
use super::failure::Failure;
use super::output::{Table, bytes, json};
use super::owner::{CommandOwner, hold_group, keys};
use super::{context, print};
use crate::catalog::{Catalog, Group, open_group};
use crate::forecast::Forecast;
use crate::journal::JournalError;
use crate::maintenance::{keep_clock, retention_clock, settings};
use crate::points::Instant;
use crate::prune::measure::forecast_of;
use crate::prune::{Plan, Prune, Pruned, Removed};
use crate::store::Store;
use cdp_seams::random::SystemRandom;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Points named before they are only counted.
const POINTS_NAMED: usize = 40;

/// Arguments of `prune`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The group.
    #[arg(value_name = "OFFICE/GROUP", value_parser = whole_group)]
    group: GroupPath,
    /// Change nothing: say which points would go, why, and what would come back.
    #[arg(long)]
    dry_run: bool,
    /// Also where the settings leave nothing but the newest point and those that are pinned or labelled.
    #[arg(long)]
    keep_only_newest: bool,
    /// The machine's clock is right, however far it moved on since the last prune.
    #[arg(long)]
    accept_clock: bool,
    /// One JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    data: DataFolder,
}

/// What a dry run says.
#[derive(Serialize)]
struct Preview<'a> {
    removed: &'a [Removed],
    kept: u64,
    bytes_back: u64,
    full_at: Option<Instant>,
    ladder_bytes: u64,
    fits: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    prune(arguments).map_err(|failure| failure.context(format!("prune {}", arguments.group)))
}

fn prune(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let wall = context::now();
    let store = context::open(&arguments.data)?;
    let catalog = Catalog::new(&store, context::authority(&store)?);
    let group = catalog.group(&arguments.group.office, &arguments.group.group)?;
    let hold = if arguments.dry_run { None } else { Some(hold_group(&store, &group)?) };
    // As it is now that nobody else builds or prunes.
    let group = if hold.is_some() { open_group(&store, group.place())? } else { group };
    let keys = keys(&catalog, &group);
    let clock = retention_clock(group.view(), wall, arguments.accept_clock)?;
    let mut prune = settings(store.config(), clock.now, wall, keys.as_ref(), &SystemRandom);
    prune.keep_only_newest = arguments.keep_only_newest;
    if arguments.dry_run {
        // A prune beside us takes nothing away that is still to be read.
        let (group, _lease) = group.held(&store)?;
        return preview(arguments, &store, &group, &prune);
    }
    keep_clock(group.view(), clock)?;
    let stop = context::stop_on_signal(Path::new("prune"));
    let style = ProgressStyle::with_template("prune {spinner} {msg}{prefix}").expect("the template is constant");
    let bar = ProgressBar::new_spinner().with_style(style);
    let mut owner = CommandOwner::new(&store, &arguments.group, group.place());
    let (mut worked, view) = (0, Arc::clone(group.view()));
    drop(group);
    let mut spend = |spent: u64| {
        worked += spent;
        bar.set_message(format!("{} read and written", bytes(worked)));
        bar.tick();
        !stop.load(Ordering::Relaxed)
    };
    let mut progress = |done: u64, slices: u64| {
        let left = slices - done;
        bar.set_prefix(if left > 0 { format!(", {left} slices to the checkpoint") } else { String::new() });
    };
    let done = prune.run(view, &mut owner, &mut spend, &mut progress);
    bar.finish_and_clear();
    let done = done?;
    print(&if arguments.json { json(&done) } else { text(arguments, &done) })?;
    Ok(ExitCode::SUCCESS)
}

fn preview(arguments: &Arguments, store: &Store, group: &Group, prune: &Prune<'_>) -> Result<ExitCode, Failure> {
    let plan = prune.plan(group.view())?;
    prune.check(&plan)?;
    let bytes_back = prune.estimate(group.view(), &plan)?;
    let folder = store.group_folder(group.place());
    let free_bytes = store.storage().free_bytes(&folder).map_err(JournalError::io("look at", &folder))?;
    let forecast = forecast_of(group.view(), prune.ladder, prune.now, free_bytes)?;
    let Forecast { full_at, ladder_bytes, fits, .. } = forecast;
    let full_at = full_at.map(Instant);
    let kept = plan.kept();
    print(&if arguments.json {
        json(&Preview { removed: &plan.removed, kept, bytes_back, full_at, ladder_bytes, fits })
    } else {
        preview_text(arguments, &plan, kept, bytes_back, &forecast)
    })?;
    Ok(ExitCode::SUCCESS)
}

fn preview_text(arguments: &Arguments, plan: &Plan, kept: u64, bytes_back: u64, forecast: &Forecast) -> String {
    let mut table = Table::new(&[">epoch", "time", "received", "why it goes"]);
    for point in plan.removed.iter().take(POINTS_NAMED) {
        let Removed { epoch, time, received, reason } = point;
        table.row(vec![epoch.to_string(), time.to_string(), received.to_string(), reason.to_string()]);
    }
    if let Some(more) = plan.removed.len().checked_sub(POINTS_NAMED).filter(|more| *more > 0) {
        table.note(format!("and {more} more"));
    }
    let listed = if plan.removed.is_empty() { String::new() } else { table.render() };
    let (goes, back) = (plan.removed.len(), bytes(bytes_back));
    let group = &arguments.group;
    format!("{listed}{goes} points of {group} would go, {kept} stay; about {back} would come back\n{forecast}\n")
}

fn text(arguments: &Arguments, done: &Pruned) -> String {
    let Pruned { points, kept, base, rewritten_segments, bytes_before, bytes_after, leased } = done;
    let group = &arguments.group;
    let base = base.map_or_else(String::new, |base| format!("; checkpoint made at point {base}"));
    let leased = if *leased { "; what somebody still reads comes back with the next prune" } else { "" };
    let (before, after) = (bytes(*bytes_before), bytes(*bytes_after));
    format!(
        "{points} points of {group} removed, {kept} stay{base}; {rewritten_segments} segments rewritten, {before} before, {after} now{leased}\n"
    )
}
