//! `pin` and `unpin`: whether a recovery point is kept from pruning. `nbd --writable` pins as well.

use super::arguments::{DataFolder, GroupPath, whole_group};
use super::context::Done;
use super::failure::Failure;
use super::{context, print};
use crate::catalog::{Catalog, write_pin};
use crate::control::Request;
use crate::points::PointName;
use crate::store::Store;
use cdp_protocol::units::Epoch;
use std::process::ExitCode;

/// Arguments of `pin` and `unpin`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The group.
    #[arg(value_name = "OFFICE/GROUP", value_parser = whole_group)]
    group: GroupPath,
    /// The point: number, `latest`, label, time or age.
    #[arg(value_name = "POINT")]
    point: String,
    #[command(flatten)]
    data: DataFolder,
}

pub(super) fn run(arguments: &Arguments, pinned: bool) -> Result<ExitCode, Failure> {
    let verb = if pinned { "pin" } else { "unpin" };
    pin(arguments, pinned)
        .map_err(|failure| failure.context(format!("{verb} point {} of {}", arguments.point, arguments.group)))
}

fn pin(arguments: &Arguments, pinned: bool) -> Result<ExitCode, Failure> {
    let name = PointName::parse(&arguments.point, context::now())?;
    let store = context::open(&arguments.data)?;
    let epoch = set(&store, &arguments.group, &name, pinned)?;
    let state = if pinned { "is pinned: it is never pruned" } else { "is not pinned" };
    print(&format!("point {epoch} of {} {state}\n", arguments.group))?;
    Ok(ExitCode::SUCCESS)
}

/// Has a point kept from pruning, or no longer, by the running server where there is one; gives its number.
pub(super) fn set(store: &Store, path: &GroupPath, name: &PointName, pinned: bool) -> Result<Epoch, Failure> {
    let catalog = Catalog::new(store, context::authority(store)?);
    let group = catalog.group(&path.office, &path.group)?;
    // A prune beside us takes nothing away that is still to be read.
    let (group, _lease) = group.held(store)?;
    let points = group.points()?;
    let point = name.find(&points)?;
    if point.pinned != pinned {
        let (office, name) = (path.office.clone(), path.group.clone());
        let request = Request::Pin { office, group: name, epoch: point.epoch.0, pinned };
        if let Done::Locked(_lock) = context::serve_or_lock(store, &request)? {
            write_pin(store, group.place(), point.epoch, pinned)?;
        }
    }
    Ok(point.epoch)
}
