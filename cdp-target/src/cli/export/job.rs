//! The work of an export: what each image needs, what is gone on with, the images one after the other, then their names.
//!
//! Invariant: all images get their names together, once all are whole. What was broken off by the operator or a full disk is kept where
//! it can be gone on with; after any other failure nothing of it stays.

use super::folder::FolderGuard;
use super::{Arguments, Format, is_stdout};
use crate::catalog::Group;
use crate::cli::context;
use crate::cli::failure::Failure;
use crate::cli::output::bytes;
use crate::restore::image::{Begun, BlockSource, Export, ExportError, Exported, SourceError, content_bytes, one_line};
use crate::restore::keyring::Keyring;
use crate::restore::output::{self, Allowed, Kind, Needs, Output, OutputError};
use crate::restore::progress::{self, Form, ImageId, Line, Progress};
use crate::restore::proof::Stored;
use crate::restore::qcow2::packed::{PackedQcow2, front_bytes};
use crate::restore::qcow2::plain::PlainQcow2;
use crate::restore::qcow2::plan::Plan;
use crate::store::Store;
use cdp_protocol::record::Volume;
use cdp_protocol::units::Head;
use indicatif::{ProgressBar, ProgressStyle};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Threads that read, decode, hash and compress, at most.
const THREADS_MAX: usize = 16;

/// A volume and where it goes.
pub(super) struct Target {
    pub(super) volume: Volume,
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
}

/// An image that was made.
pub(super) struct Made {
    pub(super) volume: String,
    pub(super) path: PathBuf,
    pub(super) format: &'static str,
    pub(super) compressed: bool,
    pub(super) bytes: u64,
    pub(super) exported: Exported,
    /// Length and hash of what was written, where that can be told.
    pub(super) file: Option<(u64, blake3::Hash)>,
}

/// How an image is laid out.
enum Shape {
    Raw,
    Qcow2(Plan),
    Packed,
}

/// An image under way.
struct Going {
    output: Box<dyn Output>,
    begun: Begun,
    /// `None` where it cannot be gone on with.
    progress: Option<Progress>,
}

pub(super) struct Job<'a> {
    pub(super) arguments: &'a Arguments,
    pub(super) store: &'a Store,
    pub(super) group: &'a Group,
    pub(super) keys: Keyring,
    pub(super) head: Head,
    pub(super) stop: Arc<AtomicBool>,
}

impl Job<'_> {
    /// All images, published together once all are whole.
    pub(super) fn run(&self, targets: &[Target]) -> Result<Vec<Made>, Failure> {
        // One for all threads: what one has decoded the next may need.
        let reader = self.group.view().image(self.head.epoch, &self.keys)?;
        let sources = vec![&reader as &dyn BlockSource; threads()];
        let folder = FolderGuard::prepare(self.arguments)?;
        let shapes = targets.iter().map(|target| self.shape(sources[0], target)).collect::<Result<Vec<_>, _>>()?;
        let needs = needs(sources[0], targets, &shapes)?;
        let mut going = Vec::new();
        for ((target, shape), needs) in targets.iter().zip(&shapes).zip(needs) {
            match self.open(target, shape, needs) {
                Ok(opened) => going.push(opened),
                Err(failure) => {
                    keep(&mut going);
                    return Err(failure);
                }
            }
        }
        let mut images = Vec::new();
        for (at, (target, shape)) in targets.iter().zip(&shapes).enumerate() {
            let exported = self.one(&sources, target, &mut going[at]);
            match exported.and_then(|exported| self.made(target, shape, going[at].output.as_ref(), exported)) {
                Ok(image) => images.push(image),
                Err(error) => return Err(broken_off(error, &target.volume.name, &mut going)),
            }
        }
        for (target, going) in targets.iter().zip(going) {
            let path = target.path.clone();
            going.output.publish().map_err(|source| OutputError::System { verb: "name", path, source })?;
        }
        folder.keep();
        Ok(images)
    }

    fn shape(&self, source: &dyn BlockSource, target: &Target) -> Result<Shape, Failure> {
        let Volume { slot, size_bytes, .. } = target.volume;
        Ok(match (self.arguments.format, self.arguments.compress) {
            (Format::Raw, _) => Shape::Raw,
            (Format::Qcow2, true) => Shape::Packed,
            (Format::Qcow2, false) => Shape::Qcow2(Plan::of(source, slot, size_bytes).map_err(index_failure)?),
        })
    }

    /// Opens an output, with what of it is there already.
    fn open(&self, target: &Target, shape: &Shape, needs: Needs) -> Result<Going, Failure> {
        let storage = context::storage();
        let record = self.record(target, shape)?;
        let lines = self.left(target, record.as_ref())?;
        let allowed = Allowed { force: self.arguments.force, going_on: !lines.is_empty() };
        let mut output = shaped(output_of(target, needs, allowed)?, shape, target);
        let mut begun = Begun::default();
        if allowed.going_on {
            begun = self.prove(target, output.as_ref(), &lines);
            if self.stop.load(Ordering::Relaxed) {
                output.keep();
                return Err(ExportError::Interrupted.into());
            }
            if begun.strides() == 0 {
                // Nothing of it is ours: what holds for any output holds for this one.
                drop(output);
                output = shaped(output_of(target, needs, Allowed { going_on: false, ..allowed })?, shape, target);
            }
        }
        if begun.strides() > 0 {
            let there = bytes(begun.bytes().min(target.volume.size_bytes));
            eprintln!("{}: going on behind {there} that are there and proved", target.volume.name);
        }
        let start = |(path, id): &(PathBuf, ImageId)| {
            let progress = Progress::begin(&storage, path, id, &lines[..begun.strides()]);
            let say = |error: &io::Error| {
                tracing::warn!(path = %path.display(), error = one_line(error), "no record: broken off, this export has to begin anew");
            };
            progress.inspect_err(say).ok()
        };
        let progress = record.as_ref().and_then(start);
        Ok(Going { output, begun, progress })
    }

    /// The lines of what was broken off of the same image.
    fn left(&self, target: &Target, record: Option<&(PathBuf, ImageId)>) -> Result<Vec<Line>, OutputError> {
        let Some((path, id)) = record.filter(|_| self.arguments.resume) else { return Ok(Vec::new()) };
        match progress::read(context::storage().as_ref(), path) {
            None => Ok(Vec::new()),
            Some((left, lines)) if left == *id => Ok(lines),
            Some((left, _)) => Err(OutputError::OtherImage { path: target.path.clone(), left: left.to_string() }),
        }
    }

    /// Where the record of an image is, and what it is of; `None` where it cannot be gone on with.
    fn record(&self, target: &Target, shape: &Shape) -> Result<Option<(PathBuf, ImageId)>, Failure> {
        let form = match shape {
            Shape::Raw => Form::Raw,
            Shape::Qcow2(_) => Form::Qcow2,
            Shape::Packed => return Ok(None),
        };
        let path = match target.kind {
            Kind::Stream => return Ok(None),
            Kind::File => {
                let mut path = output::partial_of(&target.path)?.into_os_string();
                path.push(".record");
                PathBuf::from(path)
            }
            // There is no room beside a device.
            Kind::Device(_) => {
                let folder = self.store.folder().join("exports");
                if let Err(error) = context::storage().create_dir_all(&folder) {
                    tracing::warn!(path = %folder.display(), error = one_line(&error), "no record: broken off, this export has to begin anew");
                    return Ok(None);
                }
                folder.join(device_record(&target.path))
            }
        };
        let Volume { slot, size_bytes, .. } = target.volume;
        let Head { epoch, hash: commit } = self.head;
        Ok(Some((path, ImageId { form, group: self.group.place().group, epoch, commit, slot, size_bytes })))
    }

    /// How much of what stands there already is what the record says.
    fn prove(&self, target: &Target, output: &dyn Output, lines: &[Line]) -> Begun {
        let bar = progress_bar(target, "what is there");
        let stored = Stored {
            read_at: &|offset, buffer| output.read_at(offset, buffer),
            size_bytes: target.volume.size_bytes,
            threads: threads() as u64,
            stop: &self.stop,
        };
        let begun = stored.prove(lines, &|bytes| bar.inc(bytes));
        bar.finish_and_clear();
        begun
    }

    fn one(&self, sources: &[&dyn BlockSource], target: &Target, going: &mut Going) -> Result<Exported, ExportError> {
        let bar = progress_bar(target, "");
        let begun = std::mem::take(&mut going.begun);
        bar.set_position(begun.bytes().min(target.volume.size_bytes));
        bar.reset_eta();
        let export = Export {
            sources,
            slot: target.volume.slot,
            size_bytes: target.volume.size_bytes,
            allow_damaged: self.arguments.allow_damaged,
            stop: &self.stop,
            progress: &|bytes| bar.inc(bytes),
        };
        let progress = &mut going.progress;
        let exported = export.go_on(going.output.as_mut(), begun, &mut |line| {
            if let Some(progress) = progress {
                progress.add(line);
            }
        });
        bar.finish_and_clear();
        exported
    }

    /// What is told of an image; a file that is more than the image is read again for its own hash.
    fn made(
        &self,
        target: &Target,
        shape: &Shape,
        output: &dyn Output,
        exported: Exported,
    ) -> Result<Made, ExportError> {
        let file = match (shape, target.kind) {
            (Shape::Raw, _) => Some((target.volume.size_bytes, exported.hash)),
            (_, Kind::Stream) => None,
            _ => Some((output.file_bytes(), self.file_hash(target, output)?)),
        };
        Ok(Made {
            volume: target.volume.name.clone(),
            path: target.path.clone(),
            format: self.arguments.format.name(),
            compressed: self.arguments.compress,
            bytes: target.volume.size_bytes,
            exported,
            file,
        })
    }

    fn file_hash(&self, target: &Target, output: &dyn Output) -> Result<blake3::Hash, ExportError> {
        let bar = progress_bar(target, "hash of the file");
        bar.set_length(output.file_bytes());
        let stored = Stored {
            read_at: &|offset, buffer| output.read_file_at(offset, buffer),
            size_bytes: output.file_bytes(),
            threads: threads() as u64,
            stop: &self.stop,
        };
        let hash = stored.hash(&|bytes| bar.inc(bytes));
        bar.finish_and_clear();
        hash.map_err(|error| match error.kind() {
            io::ErrorKind::Interrupted => ExportError::Interrupted,
            _ => ExportError::ReadAgain(error),
        })
    }
}

/// As many as there are cores.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, std::num::NonZero::get).min(THREADS_MAX)
}

fn output_of(target: &Target, needs: Needs, allowed: Allowed) -> Result<Box<dyn Output>, OutputError> {
    if is_stdout(&target.path) {
        output::stdout()
    } else {
        output::open(&context::storage(), &target.path, needs, allowed)
    }
}

fn shaped(output: Box<dyn Output>, shape: &Shape, target: &Target) -> Box<dyn Output> {
    match shape {
        Shape::Raw => output,
        Shape::Qcow2(plan) => Box::new(PlainQcow2::new(output, plan.clone())),
        Shape::Packed => Box::new(PackedQcow2::new(output, target.volume.size_bytes)),
    }
}

/// A device's record is named after its path.
fn device_record(path: &Path) -> String {
    let name = path.to_string_lossy().replace(|letter: char| !letter.is_ascii_alphanumeric(), "-");
    format!("{}.record", name.trim_start_matches('-'))
}

fn index_failure(error: SourceError) -> Failure {
    Failure::from(anyhow::anyhow!(error))
}

/// What the images take. Where the whole of them does not fit, by what their index says that is in them.
fn needs(source: &dyn BlockSource, targets: &[Target], shapes: &[Shape]) -> Result<Vec<Needs>, Failure> {
    let at_most = |(target, shape): (&Target, &Shape)| {
        let size_bytes = match shape {
            Shape::Raw => target.volume.size_bytes,
            Shape::Qcow2(plan) => plan.file_bytes(),
            // How small it becomes nobody knows beforehand.
            Shape::Packed => front_bytes(target.volume.size_bytes),
        };
        Needs { size_bytes, content_bytes_max: size_bytes }
    };
    let mut needs: Vec<Needs> = targets.iter().zip(shapes).map(at_most).collect();
    let Some(first) = targets.first().filter(|target| target.kind == Kind::File) else { return Ok(needs) };
    let folder = output::folder_of(&first.path);
    let free = context::storage().free_bytes(folder).map_err(OutputError::system("look at", folder))?;
    let room = targets.iter().fold(free, |room, target| room.saturating_add(output::left_bytes(&target.path)));
    let total = |needs: &[Needs]| needs.iter().map(|needs| needs.content_bytes_max).sum::<u64>();
    if total(&needs) <= room {
        return Ok(needs);
    }
    for ((target, shape), needs) in targets.iter().zip(shapes).zip(&mut needs) {
        if matches!(shape, Shape::Raw) {
            needs.content_bytes_max =
                content_bytes(source, target.volume.slot, target.volume.size_bytes).map_err(index_failure)?;
        }
    }
    let needed = total(&needs);
    if needed > room {
        return Err(OutputError::TooSmall { path: folder.to_owned(), room, needed }.into());
    }
    Ok(needs)
}

/// Leaves what can be gone on with.
fn keep(going: &mut [Going]) -> bool {
    let mut is_kept = false;
    for Going { output, progress, .. } in going {
        if let Some(progress) = progress.as_mut().filter(|progress| progress.is_worth_keeping()) {
            output.keep();
            progress.keep();
            is_kept = true;
        }
    }
    is_kept
}

/// What was broken off from outside is kept; what failed otherwise would fail again.
fn broken_off(error: ExportError, volume: &str, going: &mut [Going]) -> Failure {
    let is_outside = match &error {
        ExportError::Interrupted => true,
        ExportError::Write { source, .. } => source.kind() == io::ErrorKind::StorageFull,
        _ => false,
    };
    let is_kept = is_outside && keep(going);
    let failure = Failure::from(error).context(format!("volume {volume}"));
    let hint = "what was written is kept: the same command with --resume, and the point's number, goes on";
    if is_kept { failure.hint(hint) } else { failure }
}

/// Shows rate and time left, where stderr is a terminal.
fn progress_bar(target: &Target, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left")
        .expect("the template is constant");
    let message = format!("{} {what}", target.volume.name);
    ProgressBar::new(target.volume.size_bytes).with_style(style).with_message(message.trim_end().to_owned())
}
