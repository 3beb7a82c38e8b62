//! What a drill found: its report, as a document and as a page, kept in the group's folder.
//!
//! Invariant: a report is one file in `drills`, written whole; beside it the same as text. `REPORTS_MAX` of a group are kept, the oldest go first;
//! nothing else touches them. docs/json.md says what the fields mean.

use super::probe::Kind;
use crate::store::{GroupPlace, Store};
use cdp_protocol::units::{Class, Epoch, FrameHash, Timestamp};
use cdp_seams::storage::{Storage, read_all, replace};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

/// Reports of a group that are kept.
pub const REPORTS_MAX: usize = 32;
/// Bytes that a report may have.
const REPORT_BYTES_MAX: u64 = 8 << 20;

/// A drill's result.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// 1.
    pub version: u32,
    /// The program.
    pub tool: String,
    /// The office's name.
    pub office: String,
    /// The group's name.
    pub group: String,
    /// The point.
    pub epoch: Epoch,
    /// The point's time.
    pub time: String,
    /// How much applications may rely on it.
    pub class: Class,
    /// Hash of its commit.
    pub commit: FrameHash,
    /// When the drill began.
    pub started: String,
    /// When it was over.
    pub finished: String,
    /// The same, for programs: milliseconds since the Unix epoch.
    pub finished_ms: i64,
    /// Whether everything that was checked is well.
    pub passed: bool,
    /// What is wrong, each in a line.
    pub failures: Vec<String>,
    /// What was not checked, and why.
    pub not_checked: Vec<String>,
    /// Until the point was open, and could have been read.
    pub opened_ms: u64,
    /// Until all of its volumes were there as images, proved: how long until it could have been in use.
    pub restored_ms: u64,
    /// All of it.
    pub total_ms: u64,
    /// The volumes.
    pub volumes: Vec<VolumeReport>,
    /// The operator's script.
    pub script: Option<ScriptReport>,
    /// The machine that was booted.
    #[serde(default)]
    pub boot: Option<BootReport>,
}

/// A volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VolumeReport {
    /// Its name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Bytes of it that are no zeros.
    pub content_bytes: u64,
    /// Hash of its image, where all of it could be read.
    pub blake3: Option<String>,
    /// How long that took.
    pub restore_ms: u64,
    /// `gpt` or `mbr`.
    pub table: Option<String>,
    /// What it consists of.
    pub places: Vec<PlaceReport>,
}

/// A partition, or a whole volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlaceReport {
    /// The partition's number.
    pub partition: Option<u32>,
    /// Its first byte.
    pub offset: u64,
    /// Its size.
    pub bytes: u64,
    /// What it is.
    pub kind: Kind,
    /// How its check came out.
    pub result: Outcome,
    /// What was run.
    pub tool: Option<String>,
    /// The beginning and the end of what that printed.
    pub output: Option<String>,
}

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Nothing is wrong.
    Passed,
    /// Something is.
    Failed,
    /// It was not done.
    NotChecked,
}

/// The operator's script.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ScriptReport {
    /// What was run.
    pub path: String,
    /// How it came out.
    pub result: Outcome,
    /// Its exit status.
    pub exit: Option<i32>,
    /// How long it ran.
    pub ms: u64,
    /// The beginning and the end of what it printed.
    pub output: String,
}

/// A machine that was booted from the images.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BootReport {
    /// How it came out.
    pub result: Outcome,
    /// What was to stand on its serial console.
    pub expected: Option<String>,
    /// How long it ran.
    pub ms: u64,
    /// The end of what it said there.
    pub console: String,
    /// What QEMU said.
    pub output: String,
    /// Whether there is a picture of its screen beside the report.
    pub screenshot: bool,
}

/// The folder of a group's reports.
#[must_use]
pub fn folder(store: &Store, place: GroupPlace) -> PathBuf {
    store.group_folder(place).join("drills")
}

/// Keeps a report, and the picture of a machine's screen; gives the report's path. A crash leaves the report without its page or its picture,
/// or with one of these too many.
///
/// # Errors
/// As the file system says.
pub fn keep(store: &Store, place: GroupPlace, report: &Report, screenshot: Option<&[u8]>) -> io::Result<PathBuf> {
    let (storage, folder) = (store.storage().as_ref(), folder(store, place));
    storage.create_dir_all(&folder)?;
    let stem = format!("{:016x}-{:016x}", report.finished_ms.max(0), report.epoch.0);
    let path = folder.join(format!("{stem}.json"));
    let mut document = serde_json::to_vec_pretty(report).map_err(io::Error::other)?;
    document.push(b'\n');
    replace(storage, &path, &document)?;
    replace(storage, &folder.join(format!("{stem}.txt")), page(report).as_bytes())?;
    if let Some(screenshot) = screenshot {
        replace(storage, &folder.join(format!("{stem}.png")), screenshot)?;
    }
    let documents = documents(storage, &folder)?;
    for old in documents.iter().rev().skip(REPORTS_MAX) {
        storage.remove(&folder.join(old))?;
        // It may never have had these.
        let _ = storage.remove(&folder.join(old).with_extension("txt"));
        let _ = storage.remove(&folder.join(old).with_extension("png"));
    }
    Ok(path)
}

/// The names of the reports, oldest first.
fn documents(storage: &dyn Storage, folder: &Path) -> io::Result<Vec<PathBuf>> {
    let names = match storage.list(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed?,
    };
    Ok(names.into_iter().filter(|name| name.extension().is_some_and(|ending| ending == "json")).collect())
}

/// What the last drill said; `None` where there was none, or its report cannot be read.
#[must_use]
pub fn newest(store: &Store, place: GroupPlace) -> Option<Report> {
    let (storage, folder) = (store.storage().as_ref(), folder(store, place));
    let name = documents(storage, &folder).ok()?.pop()?;
    serde_json::from_slice(&read_all(storage, &folder.join(name), REPORT_BYTES_MAX).ok()?).ok()
}

/// When the last drill was over, by the names alone.
#[must_use]
pub fn last_finished(store: &Store, place: GroupPlace) -> Option<Timestamp> {
    let names = documents(store.storage().as_ref(), &folder(store, place)).ok()?;
    let ms = i64::from_str_radix(names.last()?.to_str()?.split('-').next()?, 16).ok()?;
    Some(Timestamp(ms))
}

/// The report for a reader.
#[must_use]
pub fn page(report: &Report) -> String {
    let mut page = String::new();
    let mut line = |text: String| writeln!(page, "{text}").expect("text takes anything");
    let Report { office, group, epoch, time, .. } = report;
    line(format!(
        "Drill of {office}/{group}, point {epoch} of {time}: {}",
        if report.passed { "passed" } else { "FAILED" }
    ));
    line(format!("begun {}, over {}", report.started, report.finished));
    let seconds = |ms: u64| format!("{}.{} s", ms / 1000, ms % 1000 / 100);
    let (opened, restored) = (seconds(report.opened_ms), seconds(report.restored_ms));
    line(format!("It could have been read after {opened}; all of it stood as proved images after {restored}."));
    for failure in &report.failures {
        line(format!("FAILED: {failure}"));
    }
    for what in &report.not_checked {
        line(format!("not checked: {what}"));
    }
    for volume in &report.volumes {
        let VolumeReport { name, bytes, content_bytes, .. } = volume;
        line(format!(
            "\nvolume {name}: {bytes} bytes, {content_bytes} of them content, in {}",
            seconds(volume.restore_ms)
        ));
        line(volume.blake3.as_ref().map_or("  could not be read whole".to_owned(), |hash| format!("  blake3 {hash}")));
        for place in &volume.places {
            line(place_line(place));
            let output = place.output.iter().filter(|_| place.result != Outcome::Passed);
            output.flat_map(|output| output.lines()).for_each(|text| line(format!("    | {text}")));
        }
    }
    if let Some(script) = &report.script {
        let exit = script.exit.map_or_else(String::new, |exit| format!(", exit status {exit}"));
        line(format!("\nscript {}: {}{exit}, {}", script.path, outcome(script.result), seconds(script.ms)));
        script.output.lines().for_each(|text| line(format!("    | {text}")));
    }
    if let Some(boot) = &report.boot {
        let picture = if boot.screenshot { ", its screen in the .png beside this" } else { "" };
        line(format!("\nboot: {}, {}{picture}", outcome(boot.result), seconds(boot.ms)));
        boot.output.lines().chain(boot.console.lines()).for_each(|text| line(format!("    | {}", plain(text))));
    }
    page
}

/// Without what a terminal would take for commands.
fn plain(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).collect()
}

fn place_line(place: &PlaceReport) -> String {
    let what = place.partition.map_or_else(|| "whole".to_owned(), |number| format!("partition {number}"));
    let kind = serde_json::to_value(place.kind).ok();
    let kind = kind.as_ref().and_then(serde_json::Value::as_str).unwrap_or("unknown").to_owned();
    let tool = place.tool.as_ref().map_or_else(String::new, |tool| format!(" by {tool}"));
    format!("  {what} (offset {}, {} bytes): {kind}, {}{tool}", place.offset, place.bytes, outcome(place.result))
}

const fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Passed => "passed",
        Outcome::Failed => "FAILED",
        Outcome::NotChecked => "not checked",
    }
}
