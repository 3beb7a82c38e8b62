//! `export`: a recovery point's volumes as images.
//!
//! What is asked for, and what goes where; the work is `job`'s, what is said of it `document`'s.

mod document;
mod folder;
mod job;

use super::arguments::{DataFolder, GroupPath};
use super::context;
use super::failure::Failure;
use crate::catalog::{Catalog, CatalogError};
use crate::points::PointName;
use crate::restore::image::ExportError;
use crate::restore::output::{self, Kind};
use cdp_protocol::record::Volume;
use document::{Document, Sheet};
use job::{Job, Target};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Arguments of `export`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The group, or one volume of it.
    #[arg(value_name = "OFFICE/GROUP[/VOLUME]")]
    group: GroupPath,
    /// The point: number, `latest`, label, RFC 3339 time, or age (30s, 10m, 2h, 3d).
    #[arg(long, value_name = "POINT")]
    at: String,
    /// A file, a block device or `-` (stdout) for one volume; a folder for a whole group.
    #[arg(long, short, value_name = "PATH")]
    output: PathBuf,
    /// The image's format.
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    format: Format,
    /// Compress the clusters of a qcow2 image (zstd: QEMU 5.1 or newer reads it).
    #[arg(long)]
    compress: bool,
    /// Go on with an export of the same point that was broken off. What is there is read again and proved first.
    #[arg(long)]
    resume: bool,
    /// Where the manifest goes: JSON that says what the image is of, with its hash. By default PATH.json, `manifest.json` in a folder;
    /// none for a device or stdout.
    #[arg(long, value_name = "FILE", conflicts_with = "no_manifest")]
    manifest: Option<PathBuf>,
    /// No manifest.
    #[arg(long)]
    no_manifest: bool,
    /// Replace files that exist, overwrite a device that is not blank. A device in use is refused all the same.
    #[arg(long)]
    force: bool,
    /// Give what can be read; the rest reads as zeros and is listed.
    #[arg(long)]
    allow_damaged: bool,
    /// The result as one JSON document (on stderr where the image goes to stdout).
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    data: DataFolder,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// Byte by byte, sparse where the image has holes.
    Raw,
    /// QEMU's own, version 3; without what is zeros.
    Qcow2,
}

impl Format {
    const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    export(arguments).map_err(|failure| {
        let (group, at, output) = (&arguments.group, &arguments.at, arguments.output.display());
        failure.context(format!("export {group} at {at} to {output}"))
    })
}

fn export(arguments: &Arguments) -> Result<ExitCode, Failure> {
    check(arguments)?;
    let name = PointName::parse(&arguments.at, context::now())?;
    let store = context::open(&arguments.data)?;
    let catalog = Catalog::new(&store, context::authority(&store)?);
    let group = catalog.group(&arguments.group.office, &arguments.group.group)?;
    // A prune beside us takes nothing away that is still to be read.
    let (group, _lease) = group.held(&store)?;
    let points = group.points()?;
    let point = name.find(&points)?;
    if let (Some(what), false) = (&point.damaged, arguments.allow_damaged) {
        return Err(ExportError::Damaged { offset: 0, reason: what.clone() }.into());
    }
    let keys = catalog.keys(&group)?;
    let targets = targets(arguments, group.view().volumes(point.epoch)?)?;
    let sheet = Sheet::prepare(arguments)?;
    let stop = context::stop_on_signal(&arguments.output);
    let head = group.view().image(point.epoch, &keys)?.head();
    let job = Job { arguments, store: &store, group: &group, keys, head, stop };
    let images = job.run(&targets)?;
    let document = Document::new(&arguments.group, point, head.hash, images);
    sheet.write(&document)?;
    document.report(arguments)?;
    Ok(ExitCode::SUCCESS)
}

/// What does not go together.
fn check(arguments: &Arguments) -> Result<(), Failure> {
    let to_stdout = is_stdout(&arguments.output);
    if arguments.compress && arguments.format == Format::Raw {
        return Err(Failure::mistake("--compress is of qcow2 images").hint("say --format qcow2, or pipe `-` into zstd"));
    }
    if arguments.compress && to_stdout {
        return Err(Failure::mistake("a compressed qcow2 image is written last at its beginning: not to stdout")
            .hint("leave out --compress, or give a file"));
    }
    if arguments.resume && arguments.compress {
        return Err(Failure::mistake("a compressed image cannot be gone on with")
            .hint("leave out --resume to begin anew, or --compress"));
    }
    if arguments.resume && to_stdout {
        return Err(Failure::mistake("what went to stdout is not there to be gone on with").hint("give a file"));
    }
    Ok(())
}

/// What goes where.
fn targets(arguments: &Arguments, volumes: Vec<Volume>) -> Result<Vec<Target>, Failure> {
    let output = &arguments.output;
    let Some(name) = &arguments.group.volume else {
        if is_stdout(output) {
            return Err(Failure::mistake("a whole group does not go to stdout")
                .hint("name one volume: OFFICE/GROUP/VOLUME; `--output DIR` takes them all"));
        }
        let ending = arguments.format.name();
        let target = |volume: Volume| {
            let path = output.join(format!("{}.{ending}", volume.name));
            Target { path, kind: Kind::File, volume }
        };
        return Ok(volumes.into_iter().map(target).collect());
    };
    if is_stdout(output) && std::io::stdout().is_terminal() {
        return Err(Failure::mistake("stdout is a terminal").hint("send it into a file or a pipe"));
    }
    let known = volumes.iter().map(|volume| volume.name.clone()).collect();
    let volume = volumes.into_iter().find(|volume| volume.name == *name);
    let volume = volume.ok_or_else(|| CatalogError::NoVolume { name: name.clone(), known })?;
    let kind = if is_stdout(output) { Kind::Stream } else { output::kind_of(output)? };
    if kind == Kind::Stream && arguments.compress {
        return Err(Failure::mistake(format!(
            "{} takes no compressed image: it cannot be gone back in",
            output.display()
        ))
        .hint("leave out --compress, or give a file"));
    }
    Ok(vec![Target { volume, kind, path: output.clone() }])
}

fn is_stdout(path: &Path) -> bool {
    path.as_os_str() == "-"
}
