//! `enroll`: a one-time bundle for an office.

use super::arguments::{DataFolder, duration};
use super::context::Done;
use super::failure::Failure;
use super::{context, print};
use crate::control::Request;
use crate::enroll::Invite;
use crate::store::Store;
use cdp_protocol::bundle::Bundle;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Arguments of `enroll`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Name of the office.
    #[arg(value_name = "OFFICE")]
    office: String,
    /// File to write the bundle to; it is a secret until the office has joined.
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// How long the bundle may be used.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = duration)]
    expires: Duration,
    /// New hardware of a known office: its groups and history are kept, its old certificate is revoked once the new
    /// hardware has joined.
    #[arg(long)]
    replace: bool,
    #[command(flatten)]
    data: DataFolder,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let store = context::open(&arguments.data)?;
    // Before anything is granted: a bundle that cannot be written would void the one before.
    let file = store.storage().create_new(&arguments.output).map_err(|error| refused(&arguments.output, error))?;
    let text = match bundle(&store, arguments) {
        Ok(text) => text,
        Err(failure) => {
            drop(file);
            // Ours, empty, and made a moment ago.
            let _ = store.storage().remove(&arguments.output);
            return Err(failure.context(format!("enroll office {}", arguments.office)));
        }
    };
    let written = file.write_at(text.as_bytes(), 0).and_then(|()| file.sync());
    written.map_err(|error| refused(&arguments.output, error))?;
    print(&format!(
        "wrote {}: a one-time bundle for office {}, to be used within {}\n",
        arguments.output.display(),
        arguments.office,
        super::output::duration_ms(arguments.expires.as_millis() as i64)
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn bundle(store: &Store, arguments: &Arguments) -> Result<String, Failure> {
    let request = Request::Enroll {
        office: arguments.office.clone(),
        valid_for_ms: arguments.expires.as_millis() as u64,
        replace: arguments.replace,
    };
    let _lock = match context::serve_or_lock(store, &request)? {
        Done::Served(text) => return Ok(serde_json::from_value(text)?),
        Done::Locked(lock) => lock,
    };
    let port = store.config().listen.port();
    if port == 0 {
        let failure = Failure::mistake("target.toml has port 0: which one it will be is known while the server runs");
        return Err(failure.hint("start `cdp-target serve` first, or set a port"));
    }
    let mut authority = context::authority(store)?;
    let bundle: Bundle = authority.invite(&Invite {
        office: &arguments.office,
        targets: &store.config().targets(port),
        valid_for: arguments.expires,
        replace: arguments.replace,
    })?;
    Ok(bundle.to_text())
}

fn refused(path: &Path, error: io::Error) -> Failure {
    let exists = error.kind() == io::ErrorKind::AlreadyExists;
    let failure = Failure::user(error).context(format!("write bundle {}", path.display()));
    if exists { failure.hint("give another name: a bundle is never overwritten") } else { failure }
}
