//! `resolve`: ends a fork.

use super::arguments::{DataFolder, GroupPath, whole_group};
use super::context::Done;
use super::failure::Failure;
use super::{context, print};
use crate::catalog::{Catalog, write_resolution};
use crate::control::Request;
use std::process::ExitCode;

/// Arguments of `resolve`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The group.
    #[arg(value_name = "OFFICE/GROUP", value_parser = whole_group)]
    group: GroupPath,
    /// Where the history ends that is to go on, as `status` names it: GENERATION/EPOCH:HASH. EPOCH or EPOCH:HASH (the start of it)
    /// is enough where it names one.
    #[arg(long, value_name = "HEAD")]
    continue_from: String,
    #[command(flatten)]
    data: DataFolder,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    resolve(arguments).map_err(|failure| failure.context(format!("resolve {}", arguments.group)))
}

fn resolve(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let store = context::open(&arguments.data)?;
    let catalog = Catalog::new(&store, context::authority(&store)?);
    let group = catalog.group(&arguments.group.office, &arguments.group.group)?;
    let request = Request::Resolve {
        office: arguments.group.office.clone(),
        group: arguments.group.group.clone(),
        continue_from: arguments.continue_from.clone(),
    };
    let head: String = match context::serve_or_lock(&store, &request)? {
        Done::Served(head) => serde_json::from_value(head)?,
        Done::Locked(_lock) => write_resolution(&store, group.place(), &arguments.continue_from)?,
    };
    print(&format!(
        "{} goes on from {head} with the next source that may, which compares everything; the other points stay\n",
        arguments.group
    ))?;
    Ok(ExitCode::SUCCESS)
}
