//! `init`: a new store.

use super::arguments::DataFolder;
use super::failure::Failure;
use super::{context, print};
use crate::authority::Authority;
use crate::config::{Config, LISTEN_DEFAULT, is_host};
use crate::store;
use cdp_seams::clock::SystemClock;
use cdp_seams::random::SystemRandom;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

/// Arguments of `init`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    data: DataFolder,
    /// Address and UDP port to listen on.
    #[arg(long, value_name = "ADDR:PORT", default_value_t = LISTEN_DEFAULT)]
    listen: SocketAddr,
    /// Name or address by which offices reach this server; may be given more than once. Without it, the
    /// address of `--listen`, or this machine's name where that is every address.
    #[arg(long = "name", value_name = "HOST", value_parser = host)]
    names: Vec<String>,
}

fn host(text: &str) -> Result<String, String> {
    if is_host(text) {
        Ok(text.to_owned())
    } else {
        Err("it is a host name or an IP address, without a port".to_owned())
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let names = if arguments.names.is_empty() { own_names(arguments.listen) } else { arguments.names.clone() };
    let config = Config::new(arguments.listen, names);
    let folder = &arguments.data.folder;
    let storage = context::storage();
    store::init(&storage, folder, &config, context::now(), |authority| {
        let (clock, random) = (Arc::new(SystemClock::new()), Arc::new(SystemRandom));
        let made = Authority::create(Arc::clone(&storage), clock, random, authority, &config.names)?;
        Ok::<_, anyhow::Error>(made.store().to_string())
    })
    .map_err(|error| Failure::from(error).context(format!("make store {}", folder.display())))?;
    print(&format!(
        "made store {}, listening on {}, reached as {}\n",
        folder.display(),
        config.listen,
        if config.names.is_empty() { "localhost".to_owned() } else { config.names.join(", ") }
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// The address it listens on; for a server that listens on all of them the machine's own name, where it has one.
fn own_names(listen: SocketAddr) -> Vec<String> {
    if !listen.ip().is_unspecified() {
        return vec![listen.ip().to_string()];
    }
    let system = rustix::system::uname();
    let name = system.nodename().to_string_lossy().into_owned();
    if is_host(&name) { vec![name] } else { Vec::new() }
}
