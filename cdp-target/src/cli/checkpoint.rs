//! `checkpoint`: makes a full image of a recovery point, readable without the journal before it.

use super::arguments::{DataFolder, GroupPath, whole_group};
use super::failure::Failure;
use super::output::{bytes, json};
use super::owner::{CommandOwner, hold_group, keys};
use super::{context, print};
use crate::catalog::Catalog;
use crate::checkpoint::builder::{self, Builder};
use crate::journal::change::Change;
use crate::points::{Instant, PointName};
use crate::prune::Owner as _;
use cdp_protocol::units::Epoch;
use cdp_seams::random::SystemRandom;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

/// Arguments of `checkpoint`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The group.
    #[arg(value_name = "OFFICE/GROUP", value_parser = whole_group)]
    group: GroupPath,
    /// The point: number, `latest`, label, time or age.
    #[arg(long, value_name = "POINT", default_value = "latest")]
    at: String,
    /// One JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    data: DataFolder,
}

/// A checkpoint that was made.
#[derive(Serialize)]
struct Made {
    epoch: Epoch,
    time: Instant,
    held_bytes: u64,
    needed_bytes: u64,
    lost_blocks: u64,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    checkpoint(arguments)
        .map_err(|failure| failure.context(format!("checkpoint {} at {}", arguments.group, arguments.at)))
}

fn checkpoint(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let now = context::now();
    let name = PointName::parse(&arguments.at, now)?;
    let store = context::open(&arguments.data)?;
    let catalog = Catalog::new(&store, context::authority(&store)?);
    let group = catalog.group(&arguments.group.office, &arguments.group.group)?;
    let _hold = hold_group(&store, &group)?;
    // As it is now that nobody else builds or prunes.
    let (group, _lease) = group.held(&store)?;
    let points = group.points()?;
    let point = name.find(&points)?;
    let keys = keys(&catalog, &group);
    let stop = context::stop_on_signal(Path::new("checkpoint"));
    let style = ProgressStyle::with_template("checkpoint {wide_bar} {pos}/{len} slices, {eta} left")
        .expect("the template is constant");
    let bar = ProgressBar::new(0).with_style(style);
    let builder = Builder { view: group.view(), keys: keys.as_ref(), random: &SystemRandom, now };
    let made = builder.build(point.epoch, &mut |_| !stop.load(Ordering::Relaxed), &mut |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let made = made?;
    CommandOwner::new(&store, &arguments.group, group.place()).adopt(&Change::Checkpoint(made))?;
    builder::end(store.storage().as_ref(), &store.group_folder(group.place()))?;
    let (held_bytes, needed_bytes, lost_blocks) = (made.held_bytes, made.needed_bytes, made.lost_blocks);
    let made = Made { epoch: made.epoch, time: Instant(point.time), held_bytes, needed_bytes, lost_blocks };
    print(&if arguments.json { json(&made) } else { text(arguments, &made) })?;
    Ok(ExitCode::SUCCESS)
}

fn text(arguments: &Arguments, made: &Made) -> String {
    let Made { epoch, time, held_bytes, needed_bytes, lost_blocks } = made;
    let lost = if *lost_blocks > 0 { format!("; {lost_blocks} blocks were lost before") } else { String::new() };
    let (held, needed) = (bytes(*held_bytes), bytes(*needed_bytes));
    format!("checkpoint of {} at point {epoch} ({time}): {held} held, {needed} needed{lost}\n", arguments.group)
}
