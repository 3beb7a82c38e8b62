//! `label`: a name for a recovery point.

use super::arguments::{DataFolder, GroupPath, whole_group};
use super::context::Done;
use super::failure::Failure;
use super::{context, print};
use crate::catalog::{Catalog, write_label};
use crate::control::Request;
use crate::points::PointName;
use cdp_protocol::label::check_label;
use std::process::ExitCode;

/// Arguments of `label`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The group.
    #[arg(value_name = "OFFICE/GROUP", value_parser = whole_group)]
    group: GroupPath,
    /// The point: number, `latest`, label, time or age.
    #[arg(value_name = "POINT")]
    point: String,
    /// The label: 1 to 64 of a-z A-Z 0-9 . _ -, and nothing that reads as a number, a time, an age or `latest`.
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    data: DataFolder,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    label(arguments)
        .map_err(|failure| failure.context(format!("label point {} of {}", arguments.point, arguments.group)))
}

fn label(arguments: &Arguments) -> Result<ExitCode, Failure> {
    check_label(&arguments.name)?;
    let name = PointName::parse(&arguments.point, context::now())?;
    let store = context::open(&arguments.data)?;
    let catalog = Catalog::new(&store, context::authority(&store)?);
    let group = catalog.group(&arguments.group.office, &arguments.group.group)?;
    // A prune beside us takes nothing away that is still to be read.
    let (group, _lease) = group.held(&store)?;
    let points = group.points()?;
    let point = name.find(&points)?;
    if let Some(other) = points.iter().find(|other| other.label.as_ref() == Some(&arguments.name)) {
        if other.epoch == point.epoch {
            return Ok(ExitCode::SUCCESS);
        }
        return Err(Failure::mistake(format!("the label `{}` is point {}'s", arguments.name, other.epoch))
            .hint("a label names one point of a group; choose another"));
    }
    let request = Request::Label {
        office: arguments.group.office.clone(),
        group: arguments.group.group.clone(),
        epoch: point.epoch.0,
        label: arguments.name.clone(),
    };
    if let Done::Locked(_lock) = context::serve_or_lock(&store, &request)? {
        write_label(&store, group.place(), point.epoch, &arguments.name)?;
    }
    print(&format!("point {} of {} is `{}`\n", point.epoch, arguments.group, arguments.name))?;
    Ok(ExitCode::SUCCESS)
}
