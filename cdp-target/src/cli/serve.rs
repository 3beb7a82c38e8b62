//! `serve`: the server in the foreground.

use super::arguments::DataFolder;
use super::context;
use super::failure::Failure;
use crate::serve::Server;
use std::process::ExitCode;

/// Arguments of `serve`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    data: DataFolder,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let store = context::open(&arguments.data)?;
    let lock = context::lock_to_serve(&store)?;
    let authority = context::authority(&store)?;
    store.mend()?;
    authority.mend()?;
    let what = format!("serve {}", arguments.data.folder.display());
    Server::new(store, lock, authority).run().map_err(|error| Failure::from(error).context(what))?;
    Ok(ExitCode::SUCCESS)
}
