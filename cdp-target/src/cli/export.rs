//! `export`: a recovery point's volumes as raw images.

use super::arguments::{DataFolder, GroupPath};
use super::failure::Failure;
use super::output::{bytes, json};
use super::{context, print};
use crate::catalog::{Catalog, CatalogError, Group};
use crate::points::{Instant, PointInfo, PointName};
use crate::restore::image::{BadRange, BlockSource, Export, ExportError, Exported};
use crate::restore::keyring::Keyring;
use crate::restore::output::{self, Count, Needs, Output, OutputError};
use crate::restore::point::PointImage;
use cdp_protocol::record::Volume;
use cdp_protocol::units::Epoch;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Threads that read and decode.
const THREADS: usize = 2;

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

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Format {
    /// Byte by byte, sparse where the image has holes.
    Raw,
}

#[derive(Serialize)]
struct Document<'a> {
    office: &'a str,
    group: &'a str,
    epoch: Epoch,
    time: Instant,
    images: Vec<Image>,
}

#[derive(Serialize)]
struct Image {
    volume: String,
    path: String,
    bytes: u64,
    content_bytes: u64,
    blake3: String,
    bad: Vec<BadRange>,
}

/// A volume and where it goes.
struct Target {
    volume: Volume,
    path: PathBuf,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    export(arguments).map_err(|failure| {
        let (group, at, output) = (&arguments.group, &arguments.at, arguments.output.display());
        failure.context(format!("export {group} at {at} to {output}"))
    })
}

fn export(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let Format::Raw = arguments.format;
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
    let job = Job { arguments, group: &group, keys, point, stop: context::stop_on_signal(&arguments.output) };
    let images = job.run(&targets)?;
    report(arguments, point, images)?;
    Ok(ExitCode::SUCCESS)
}

/// What goes where.
fn targets(arguments: &Arguments, volumes: Vec<Volume>) -> Result<Vec<Target>, Failure> {
    let output = &arguments.output;
    let Some(name) = &arguments.group.volume else {
        if is_stdout(output) {
            return Err(Failure::mistake("a whole group does not go to stdout")
                .hint("name one volume: OFFICE/GROUP/VOLUME; `--output DIR` takes them all"));
        }
        let target = |volume: Volume| Target { path: output.join(format!("{}.raw", volume.name)), volume };
        return Ok(volumes.into_iter().map(target).collect());
    };
    if is_stdout(output) && std::io::stdout().is_terminal() {
        return Err(Failure::mistake("stdout is a terminal").hint("send it into a file or a pipe"));
    }
    let known = volumes.iter().map(|volume| volume.name.clone()).collect();
    let volume = volumes.into_iter().find(|volume| volume.name == *name);
    let volume = volume.ok_or_else(|| CatalogError::NoVolume { name: name.clone(), known })?;
    Ok(vec![Target { volume, path: output.clone() }])
}

fn is_stdout(path: &Path) -> bool {
    path.as_os_str() == "-"
}

struct Job<'a> {
    arguments: &'a Arguments,
    group: &'a Group,
    keys: Keyring,
    point: &'a PointInfo,
    stop: Arc<AtomicBool>,
}

impl Job<'_> {
    /// All images, published together once all are whole.
    fn run(&self, targets: &[Target]) -> Result<Vec<Image>, Failure> {
        let readers = (0..THREADS).map(|_| self.group.view().image(self.point.epoch, &self.keys));
        let readers: Vec<PointImage> = readers.collect::<Result<_, _>>()?;
        let sources: Vec<&dyn BlockSource> = readers.iter().map(|reader| reader as &dyn BlockSource).collect();
        let folder = FolderGuard::prepare(self.arguments)?;
        let needs = self.needs(&sources, targets)?;
        let mut outputs = Vec::new();
        for (target, needs) in targets.iter().zip(needs) {
            outputs.push(self.open(target, needs)?);
        }
        let mut images = Vec::new();
        for (target, output) in targets.iter().zip(&mut outputs) {
            let exported = self.one(&sources, target, output.as_mut())?;
            images.push(image(target, exported));
        }
        for (target, output) in targets.iter().zip(outputs) {
            let path = target.path.clone();
            output.publish().map_err(|source| OutputError::System { verb: "name", path, source })?;
        }
        folder.keep();
        Ok(images)
    }

    fn open(&self, target: &Target, needs: Needs) -> Result<Box<dyn Output>, Failure> {
        if is_stdout(&target.path) {
            return Ok(output::stdout());
        }
        Ok(output::open(&context::storage(), &target.path, needs, self.arguments.force)?)
    }

    /// What the images take. Where the whole of them does not fit, they are read once to see what is in their holes.
    fn needs(&self, sources: &[&dyn BlockSource], targets: &[Target]) -> Result<Vec<Needs>, Failure> {
        let whole = |target: &Target| {
            let size_bytes = target.volume.size_bytes;
            Needs { size_bytes, content_bytes_max: size_bytes }
        };
        let needs: Vec<Needs> = targets.iter().map(whole).collect();
        let Some(folder) = file_folder(targets) else { return Ok(needs) };
        let total = |needs: &[Needs]| needs.iter().map(|needs| needs.content_bytes_max).sum::<u64>();
        let free = context::storage().free_bytes(&folder);
        let room = free.map_err(|source| OutputError::System { verb: "look at", path: folder.clone(), source })?;
        if total(&needs) <= room {
            return Ok(needs);
        }
        let mut counted = Vec::new();
        for target in targets {
            let exported = self.one(sources, target, &mut Count)?;
            counted.push(Needs { content_bytes_max: exported.content_bytes, ..whole(target) });
        }
        let needed = total(&counted);
        if needed > room { Err(OutputError::TooSmall { path: folder, room, needed }.into()) } else { Ok(counted) }
    }

    fn one(&self, sources: &[&dyn BlockSource], target: &Target, output: &mut dyn Output) -> Result<Exported, Failure> {
        let bar = progress(&target.volume);
        let export = Export {
            sources,
            slot: target.volume.slot,
            size_bytes: target.volume.size_bytes,
            allow_damaged: self.arguments.allow_damaged,
            stop: &self.stop,
            progress: &|bytes| bar.inc(bytes),
        };
        let exported = export.run(output);
        bar.finish_and_clear();
        exported.map_err(|error| Failure::from(error).context(format!("volume {}", target.volume.name)))
    }
}

/// The folder that new files go to; `None` where the output is something else.
fn file_folder(targets: &[Target]) -> Option<PathBuf> {
    let path = &targets.first()?.path;
    let other = is_stdout(path) || rustix::fs::stat(path).is_ok_and(|stat| !is_regular(stat.st_mode));
    (!other).then(|| output::folder_of(path).to_owned())
}

fn is_regular(mode: u32) -> bool {
    rustix::fs::FileType::from_raw_mode(mode) == rustix::fs::FileType::RegularFile
}

/// Shows rate and time left, where stderr is a terminal.
fn progress(volume: &Volume) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left")
        .expect("the template is constant");
    ProgressBar::new(volume.size_bytes).with_style(style).with_message(volume.name.clone())
}

/// The folder of a whole group's images: goes again where it was made for an export that failed.
struct FolderGuard(Option<PathBuf>);

impl FolderGuard {
    fn prepare(arguments: &Arguments) -> Result<Self, Failure> {
        let folder = &arguments.output;
        if arguments.group.volume.is_some() {
            return Ok(Self(None));
        }
        match rustix::fs::stat(folder) {
            Ok(stat) if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() => return Ok(Self(None)),
            Ok(_) => {
                return Err(Failure::mistake(format!("{} is no folder", folder.display()))
                    .hint("a whole group goes into a folder; OFFICE/GROUP/VOLUME names one volume"));
            }
            Err(_) => {}
        }
        let made = context::storage().create_dir_all(folder);
        made.map_err(|source| OutputError::System { verb: "make folder", path: folder.clone(), source })?;
        Ok(Self(Some(folder.clone())))
    }

    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for FolderGuard {
    fn drop(&mut self) {
        if let Some(folder) = &self.0 {
            // Refused where something is in it, which is right.
            let _ = rustix::fs::rmdir(folder);
        }
    }
}

fn image(target: &Target, exported: Exported) -> Image {
    Image {
        volume: target.volume.name.clone(),
        path: target.path.display().to_string(),
        bytes: target.volume.size_bytes,
        content_bytes: exported.content_bytes,
        blake3: exported.hash.to_hex().to_string(),
        bad: exported.bad,
    }
}

fn report(arguments: &Arguments, point: &PointInfo, images: Vec<Image>) -> Result<(), Failure> {
    let GroupPath { office, group, .. } = &arguments.group;
    for image in &images {
        for bad in &image.bad {
            eprintln!("bad: {} offset={} len={}: {}", image.volume, bad.offset, bad.len, bad.reason);
        }
    }
    let text = if arguments.json {
        json(&Document { office, group, epoch: point.epoch, time: Instant(point.time), images })
    } else {
        let line = |image: &Image| {
            let (size, content) = (bytes(image.bytes), bytes(image.content_bytes));
            format!("{}: {size}, {content} of it content, blake3 {}\n", image.path, image.blake3)
        };
        let point = format!("point {} of {office}/{group}, {}\n", point.epoch, Instant(point.time));
        point + &images.iter().map(line).collect::<String>()
    };
    if is_stdout(&arguments.output) {
        std::io::stderr().write_all(text.as_bytes())?;
        return Ok(());
    }
    print(&text)
}
