//! What an export amounted to: told to the operator, and kept beside the image as its manifest. docs/json.md says what the fields mean.
//!
//! Invariant: a manifest stands only beside an image that is whole; it comes last. One that exists is not replaced without `--force`.

use super::job::Made;
use super::{Arguments, is_stdout};
use crate::cli::arguments::GroupPath;
use crate::cli::failure::Failure;
use crate::cli::output::{bytes, json};
use crate::cli::{context, print};
use crate::points::{Instant, PointInfo};
use crate::restore::image::BadRange;
use crate::restore::output::{self, Allowed, Kind, Needs, OutputError};
use cdp_protocol::units::{Class, Epoch, FrameHash};
use serde::Serialize;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The document of an export.
#[derive(Clone, Serialize)]
pub(super) struct Document {
    tool: &'static str,
    office: String,
    group: String,
    epoch: Epoch,
    time: Instant,
    class: Class,
    commit: FrameHash,
    images: Vec<Image>,
}

#[derive(Clone, Serialize)]
struct Image {
    volume: String,
    path: String,
    format: &'static str,
    compressed: bool,
    bytes: u64,
    content_bytes: u64,
    blake3: String,
    file_bytes: Option<u64>,
    file_blake3: Option<String>,
    bad: Vec<BadRange>,
}

impl Document {
    pub(super) fn new(group: &GroupPath, point: &PointInfo, commit: FrameHash, images: Vec<Made>) -> Self {
        Self {
            tool: concat!("cdp-target ", env!("CARGO_PKG_VERSION")),
            office: group.office.clone(),
            group: group.group.clone(),
            epoch: point.epoch,
            time: Instant(point.time),
            class: point.class,
            commit,
            images: images.into_iter().map(image).collect(),
        }
    }

    /// With the images' names alone: they and the manifest move together.
    fn without_folders(&self) -> Self {
        let mut document = self.clone();
        for image in &mut document.images {
            if let Some(name) = Path::new(&image.path).file_name() {
                image.path = name.to_string_lossy().into_owned();
            }
        }
        document
    }

    /// Tells the operator.
    pub(super) fn report(&self, arguments: &Arguments) -> Result<(), Failure> {
        for image in &self.images {
            for bad in &image.bad {
                eprintln!("bad: {} offset={} len={}: {}", image.volume, bad.offset, bad.len, bad.reason);
            }
        }
        let text = if arguments.json { json(self) } else { self.text() };
        if is_stdout(&arguments.output) {
            std::io::stderr().write_all(text.as_bytes())?;
            return Ok(());
        }
        print(&text)
    }

    fn text(&self) -> String {
        let line = |image: &Image| {
            let (size, content) = (bytes(image.bytes), bytes(image.content_bytes));
            format!("{}: {size}, {content} of it content, blake3 {}\n", image.path, image.blake3)
        };
        let point = format!("point {} of {}/{}, {}\n", self.epoch, self.office, self.group, self.time);
        point + &self.images.iter().map(line).collect::<String>()
    }
}

fn image(made: Made) -> Image {
    Image {
        volume: made.volume,
        path: made.path.display().to_string(),
        format: made.format,
        compressed: made.compressed,
        bytes: made.bytes,
        content_bytes: made.exported.content_bytes,
        blake3: made.exported.hash.to_hex().to_string(),
        file_bytes: made.file.map(|(len, _)| len),
        file_blake3: made.file.map(|(_, hash)| hash.to_hex().to_string()),
        bad: made.exported.bad,
    }
}

/// Where the manifest goes.
pub(super) struct Sheet {
    path: Option<PathBuf>,
    force: bool,
}

impl Sheet {
    /// Refuses one that exists before anything is written.
    pub(super) fn prepare(arguments: &Arguments) -> Result<Self, Failure> {
        let (path, force) = (sheet_path(arguments)?, arguments.force);
        if let Some(path) = path.as_ref().filter(|path| !force && rustix::fs::stat(*path).is_ok()) {
            return Err(OutputError::Exists(path.clone()).into());
        }
        Ok(Self { path, force })
    }

    /// Writes it, durable.
    pub(super) fn write(&self, document: &Document) -> Result<(), Failure> {
        let Some(path) = &self.path else { return Ok(()) };
        let text = json(&document.without_folders());
        let needs = Needs { size_bytes: text.len() as u64, content_bytes_max: text.len() as u64 };
        let allowed = Allowed { force: self.force, going_on: false };
        let mut output = output::open(&context::storage(), path, needs, allowed)?;
        let written = output.write(0, text.as_bytes()).and_then(|()| output.sync()).and_then(|()| output.publish());
        let written = written.map_err(OutputError::system("write", path));
        written.map_err(|error| Failure::from(error).hint("the image itself is whole; --no-manifest leaves it out"))
    }
}

fn sheet_path(arguments: &Arguments) -> Result<Option<PathBuf>, Failure> {
    let output = &arguments.output;
    if arguments.no_manifest || arguments.manifest.is_some() {
        return Ok(arguments.manifest.clone());
    }
    if arguments.group.volume.is_none() {
        return Ok(Some(output.join("manifest.json")));
    }
    if is_stdout(output) || output::kind_of(output)? != Kind::File {
        return Ok(None);
    }
    let mut path = output.clone().into_os_string();
    path.push(".json");
    Ok(Some(path.into()))
}
