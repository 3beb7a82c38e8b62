//! `nbd`: a group's volumes as of a point, as disks.

use super::arguments::{DataFolder, GroupPath, whole_group};
use super::failure::Failure;
use super::output::{bytes, json};
use super::{context, pin, print};
use crate::authority::Authority;
use crate::nbd::exports::{ExportError, Exports};
use crate::nbd::overlay::Overlay;
use crate::nbd::overlay::format::Base;
use crate::nbd::points::{OpenPoint, Points};
use crate::nbd::server::Server;
use crate::nbd::socket::{Address, Listener, escaped};
use crate::nbd::tls::Tls;
use crate::points::{Instant, PointName};
use crate::store::Store;
use cdp_protocol::units::{Epoch, Head};
use cdp_seams::clock::{Clock, SystemClock};
use serde::Serialize;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// Arguments of `nbd`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The group.
    #[arg(value_name = "OFFICE/GROUP", value_parser = whole_group)]
    group: GroupPath,
    /// The point: number, `latest`, label, RFC 3339 time, or age (30s, 10m, 2h, 3d). VOLUME@POINT serves any other.
    #[arg(long, value_name = "POINT")]
    at: String,
    /// Where to listen: a unix socket, which only its owner can reach, or TCP, which asks for TLS and a client certificate. By
    /// default a socket in the store's folder.
    #[arg(long, value_name = "unix:PATH|ADDR:PORT")]
    listen: Option<Address>,
    /// Lets clients write, into this file; it is made where it is not there, and goes on where it is. The point is pinned: without it the file
    /// is worth nothing.
    #[arg(long, value_name = "OVERLAY")]
    writable: Option<PathBuf>,
    /// Folder with the certificates of a client that may connect over TCP, for its `tls-certificates`; made where it is not there. The
    /// office itself may connect with its own certificate in any case.
    #[arg(long, value_name = "DIR", requires = "listen")]
    credentials: Option<PathBuf>,
    /// Serves TCP without TLS, on a loopback address only: every user of this machine can read the point then.
    #[arg(long, requires = "listen", conflicts_with = "credentials")]
    plain: bool,
    /// What is served, as one JSON document.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    data: DataFolder,
}

#[derive(Serialize)]
struct Document<'a> {
    office: &'a str,
    group: &'a str,
    epoch: Epoch,
    time: Instant,
    listen: String,
    overlay: Option<String>,
    warning: Option<&'a str>,
    exports: Vec<Export<'a>>,
}

#[derive(Serialize)]
struct Export<'a> {
    name: &'a str,
    bytes: u64,
    writable: bool,
    uri: String,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    serve(arguments).map_err(|failure| failure.context(format!("serve {} at {}", arguments.group, arguments.at)))
}

fn serve(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let store = context::open(&arguments.data)?;
    let authority = context::authority(&store)?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let GroupPath { office, group, .. } = &arguments.group;
    let address = arguments.listen.clone().unwrap_or_else(|| default_address(&store, office, group));
    let tls = tls(arguments, &address, &store, &authority, &clock)?;
    let points = Points::new(&store, authority, office, group, Arc::clone(&clock));
    let point = points.open(&arguments.at).map_err(refused)?;
    let overlay = arguments.writable.as_deref().map(|path| overlay(path, &point)).transpose()?;
    if let Some(overlay) = &arguments.writable {
        keep(&store, arguments, &point, overlay)?;
    }
    // Before there is a socket that would be left behind.
    let stop = context::stop_on_signal(Path::new(""));
    let listener = Listener::bind(&address)?;
    let exports = Exports::new(points, Arc::clone(&point), overlay);
    eprintln!("listening on {}", listener.address());
    if let Some(what) = &point.damaged {
        eprintln!("warning: point {} is damaged, and what is missing cannot be read: {what}", point.epoch());
    }
    report(arguments, &point, listener.address())?;
    Server::new(listener, exports, tls, clock, stop).run()?;
    Ok(ExitCode::SUCCESS)
}

/// A socket that is there for nobody but whoever may read the store.
fn default_address(store: &Store, office: &str, group: &str) -> Address {
    Address::Unix(store.folder().join(format!("nbd.{office}.{group}.sock")))
}

fn tls(
    arguments: &Arguments,
    address: &Address,
    store: &Store,
    authority: &Authority,
    clock: &Arc<dyn Clock>,
) -> Result<Option<Tls>, Failure> {
    let hint = "leave --plain out: a client shows a certificate then, see --credentials";
    match address {
        Address::Unix(_) if arguments.plain || arguments.credentials.is_some() => {
            Err(Failure::mistake("--plain and --credentials are for TCP").hint("a unix socket is its owner's alone"))
        }
        Address::Unix(_) => Ok(None),
        Address::Tcp(tcp) if arguments.plain && tcp.ip().is_loopback() => Ok(None),
        Address::Tcp(tcp) if arguments.plain => {
            Err(Failure::mistake(format!("--plain serves on a loopback address only, not on {tcp}")).hint(hint))
        }
        Address::Tcp(_) => {
            let known = authority.offices().iter().find(|office| office.name == arguments.group.office);
            let known = known.ok_or_else(|| crate::catalog::CatalogError::NoOffice {
                name: arguments.group.office.clone(),
                known: authority.offices().iter().map(|office| office.name.clone()).collect(),
            })?;
            Ok(Some(Tls::new(store, authority, Arc::clone(clock), known.id, arguments.credentials.as_deref())?))
        }
    }
}

fn overlay(path: &Path, point: &OpenPoint) -> Result<Arc<Overlay>, Failure> {
    let head = Head { epoch: point.epoch(), hash: point.hash };
    let base = Base { group: point.group(), head, volumes: point.image.volumes().to_vec() };
    Ok(Arc::new(Overlay::open(context::storage().as_ref(), path, base)?))
}

/// Pins the point that an overlay lies over, before anything is written: the lease goes with us, and holds the files only.
fn keep(store: &Store, arguments: &Arguments, point: &OpenPoint, overlay: &Path) -> Result<(), Failure> {
    let (epoch, group) = (point.epoch(), &arguments.group);
    pin::set(store, group, &PointName::Epoch(epoch), true).map_err(|failure| failure.context("pin the point"))?;
    let overlay = overlay.display();
    eprintln!(
        "pinned: point {epoch} of {group}, over which {overlay} lies; `cdp-target unpin {group} {epoch}` lets it go"
    );
    Ok(())
}

/// The error of what is behind it, for which there are hints.
pub(super) fn refused(error: ExportError) -> Failure {
    match error {
        ExportError::Catalog(error) => error.into(),
        ExportError::PointName(error) => error.into(),
        ExportError::NoSuchPoint(error) => error.into(),
        ExportError::Journal(error) => error.into(),
        error @ ExportError::TooMany => error.into(),
    }
}

fn report(arguments: &Arguments, point: &OpenPoint, address: &Address) -> Result<(), Failure> {
    let GroupPath { office, group, .. } = &arguments.group;
    let export = |volume: &'_ cdp_protocol::record::Volume| {
        (volume.name.clone(), volume.size_bytes, uri(arguments, address, &volume.name))
    };
    let exports: Vec<_> = point.image.volumes().iter().map(export).collect();
    let writable = arguments.writable.is_some();
    if arguments.json {
        let export = |(name, bytes, uri): &'_ (String, u64, String)| (name.clone(), *bytes, uri.clone());
        let owned: Vec<_> = exports.iter().map(export).collect();
        let exports = owned.iter().map(|(name, bytes, uri)| Export { name, bytes: *bytes, writable, uri: uri.clone() });
        return print(&json(&Document {
            office,
            group,
            epoch: point.epoch(),
            time: Instant(point.time),
            listen: address.to_string(),
            overlay: arguments.writable.as_ref().map(|path| path.display().to_string()),
            warning: point.damaged.as_deref(),
            exports: exports.collect(),
        }));
    }
    let mut text = format!("point {} of {office}/{group}, {}\n", point.epoch(), Instant(point.time));
    for (name, size, uri) in exports {
        writeln!(text, "{name}: {}, {uri}", bytes(size))?;
    }
    print(&text)
}

/// The export as clients of libnbd, QEMU and nbdkit name it.
fn uri(arguments: &Arguments, address: &Address, name: &str) -> String {
    match address {
        Address::Unix(path) => format!("nbd+unix:///{name}?socket={}", escaped(path)),
        Address::Tcp(address) if arguments.plain => format!("nbd://{address}/{name}"),
        Address::Tcp(address) => {
            let certificates = arguments.credentials.as_deref();
            let certificates = certificates.map(|folder| format!("?tls-certificates={}", escaped(folder)));
            format!("nbds://{address}/{name}{}", certificates.unwrap_or_default())
        }
    }
}
