//! Drills: a point is restored for real, looked at and checked, and what came of it is kept.
//!
//! Invariant: of the store's history a drill only reads; it writes its scratch folder, which goes with it, and its report. A drill has passed
//! only if every block of every volume was read and proved, and nothing that was checked is wrong; what was not checked is said.

pub mod boot;
mod check;
mod exports;
pub mod probe;
mod program;
mod qmp;
pub mod report;
mod room;
pub mod schedule;
mod scratch;

use crate::catalog::Group;
use crate::points::{Instant, PointInfo};
use crate::restore::image::{BadRange, BlockSource, Export, ExportError, Exported, content_bytes, one_line};
use crate::restore::keyring::Keyring;
use crate::restore::output::{self, Allowed, Needs, OutputError};
use crate::restore::proof::Stored;
use crate::store::Store;
use boot::{Boot, Booted, DISKS_MAX, Starter};
use cdp_protocol::record::Volume;
use cdp_protocol::units::Timestamp;
use cdp_seams::clock::Clock;
use cdp_seams::random::Random;
use cdp_seams::storage::{Storage, StorageFile};
use check::{Checked, Checker};
use probe::probe;
use program::{Ended, Runner};
use report::{Outcome, Report, ScriptReport, VolumeReport};
use room::Room;
use scratch::Scratch;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Ranges that cannot be read which are named, a volume.
const BAD_NAMED_MAX: usize = 20;

/// Bytes before the partition table, of a disk that a BIOS boots.
const BOOT_CODE_BYTES: usize = 440;

/// A script of the operator's.
#[derive(Clone, Debug)]
pub struct Script {
    /// What is run.
    pub path: PathBuf,
    /// How long it may take.
    pub deadline: Duration,
}

/// A drill of one point.
pub struct Drill<'a> {
    /// The store.
    pub store: &'a Store,
    /// The office's name.
    pub office: &'a str,
    /// The group, held against pruning.
    pub group: &'a Group,
    /// Its keys.
    pub keys: &'a Keyring,
    /// The point.
    pub point: &'a PointInfo,
    /// Where there is room for the images.
    pub scratch: &'a Path,
    /// What the operator checks.
    pub script: Option<&'a Script>,
    /// How the images are booted, where that is wanted.
    pub boot: Option<&'a Boot>,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// For names.
    pub random: &'a dyn Random,
    /// Ends the drill where it turns true, which the drill does itself where room runs out.
    pub stop: &'a AtomicBool,
    /// Told what is being done, and of every piece of a volume.
    pub progress: &'a (dyn Fn(&str, u64) + Sync),
}

/// Why there was no drill.
#[derive(Debug, thiserror::Error)]
pub enum DrillError {
    /// No room, or a file cannot be written.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// An image could not be written, or the operator ended it.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The point cannot be opened at all.
    #[error(transparent)]
    Journal(#[from] crate::journal::JournalError),
}

/// A volume that was restored.
struct Restored {
    report: VolumeReport,
    path: PathBuf,
}

/// A drill that is over.
pub struct Done {
    /// What came of it.
    pub report: Report,
    /// The screen of the machine that was booted, as PNG.
    pub screenshot: Option<Vec<u8>>,
}

/// What was found on the way.
#[derive(Default)]
struct Findings {
    failures: Vec<String>,
    not_checked: Vec<String>,
}

impl Drill<'_> {
    /// Restores, checks, and gives the report; to keep it is the caller's.
    ///
    /// # Errors
    /// Where nothing can be said of the point: no room, an interruption.
    pub fn run(&self) -> Result<Done, DrillError> {
        let scratch = Scratch::new(self.store.storage(), self.scratch, self.random)?;
        let room = Room::new(self.store.storage().as_ref(), &scratch, self.stop);
        let done = self.work(&scratch, &room);
        match room.missing() {
            Some(spare) => Err(no_room(self.scratch, spare).into()),
            None => done,
        }
    }

    fn work(&self, scratch: &Scratch, room: &Room<'_>) -> Result<Done, DrillError> {
        let (begun, started) = (self.clock.monotonic(), Timestamp(self.clock.wall_ms()));
        let mut findings = Findings::default();
        let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get).min(16);
        let reader = self.group.view().image(self.point.epoch, self.keys)?;
        let sources = vec![&reader as &dyn BlockSource; threads];
        let (head, volumes) = (reader.head(), reader.volumes().to_vec());
        let opened_ms = self.since(begun);
        scratch.has_room(room_for(sources[0], &volumes)?)?;
        let mut restored = Vec::new();
        for volume in &volumes {
            restored.push(self.restore(&sources, volume, (scratch.path(), room), &mut findings)?);
        }
        let restored_ms = self.since(begun);
        for volume in &mut restored {
            self.check(volume, (scratch.path(), room), &mut findings);
            self.may_go_on()?;
        }
        // Before the script, which may change them.
        let booted = self.boot.map(|boot| self.boot(boot, &restored, scratch.path(), &mut findings));
        self.may_go_on()?;
        let (boot, screenshot) = booted.map_or((None, None), |booted| (Some(booted.report), booted.screenshot));
        let script = self.script.map(|script| self.run_script(script, &volumes, scratch.path(), &mut findings));
        self.may_go_on()?;
        let finished = Timestamp(self.clock.wall_ms());
        let report = Report {
            version: 1,
            tool: concat!("cdp-target ", env!("CARGO_PKG_VERSION")).to_owned(),
            office: self.office.to_owned(),
            group: self.group.name().to_owned(),
            epoch: self.point.epoch,
            time: Instant(self.point.time).to_string(),
            class: self.point.class,
            commit: head.hash,
            started: Instant(started).to_string(),
            finished: Instant(finished).to_string(),
            finished_ms: finished.0,
            passed: findings.failures.is_empty(),
            failures: findings.failures,
            not_checked: findings.not_checked,
            opened_ms,
            restored_ms,
            total_ms: self.since(begun),
            volumes: restored.into_iter().map(|volume| volume.report).collect(),
            script,
            boot,
        };
        Ok(Done { report, screenshot })
    }

    /// Starts a machine from the images: from the first that is a disk.
    fn boot(&self, boot: &Boot, restored: &[Restored], folder: &Path, findings: &mut Findings) -> Booted {
        (self.progress)("boot", 0);
        let of_disks = |is_disk: bool| restored.iter().filter(move |volume| volume.report.table.is_some() == is_disk);
        let images: Vec<String> =
            of_disks(true).chain(of_disks(false)).map(|volume| format!("{}.raw", volume.report.name)).collect();
        let booted = match of_disks(true).next() {
            None => Booted::not_done("no volume is a disk with a partition table".to_owned()),
            Some(_) if images.len() > DISKS_MAX => {
                Booted::not_done(format!("a machine of more than {DISKS_MAX} disks is not started"))
            }
            Some(first) => {
                let storage = self.store.storage().as_ref();
                let starter = Starter { storage, clock: &*self.clock, stop: self.stop, folder };
                starter.boot(boot, &images, has_boot_code(storage, &first.path))
            }
        };
        let line = booted.reason.as_ref().map(|reason| format!("boot: {reason}"));
        match booted.report.result {
            Outcome::Failed => findings.failures.extend(line),
            Outcome::NotChecked => findings.not_checked.extend(line),
            Outcome::Passed => {}
        }
        booted
    }

    fn since(&self, begun: Duration) -> u64 {
        self.clock.monotonic().saturating_sub(begun).as_millis() as u64
    }

    fn may_go_on(&self) -> Result<(), DrillError> {
        if self.stop.load(Ordering::Relaxed) { Err(ExportError::Interrupted.into()) } else { Ok(()) }
    }

    /// Brings a volume to an image of its own, and proves that that holds what was read.
    fn restore(
        &self,
        sources: &[&dyn BlockSource],
        volume: &Volume,
        (folder, room): (&Path, &Room<'_>),
        findings: &mut Findings,
    ) -> Result<Restored, DrillError> {
        let begun = self.clock.monotonic();
        let path = folder.join(format!("{}.raw", volume.name));
        let needs = Needs { size_bytes: volume.size_bytes, content_bytes_max: 0 };
        let mut output = output::open(self.store.storage(), &path, needs, Allowed::default())?;
        let export = Export {
            sources,
            slot: volume.slot,
            size_bytes: volume.size_bytes,
            // All that is bad is to be named, not the first of it.
            allow_damaged: true,
            stop: self.stop,
            progress: &|bytes| {
                room.written(bytes);
                (self.progress)(&volume.name, bytes);
            },
        };
        let Exported { content_bytes, hash, bad } = export.run(output.as_mut())?;
        let stored = Stored {
            read_at: &|offset, buffer| output.read_at(offset, buffer),
            size_bytes: volume.size_bytes,
            threads: sources.len() as u64,
            stop: self.stop,
        };
        let again = stored.hash(&|_| ());
        self.may_go_on()?;
        if again.as_ref().ok() != Some(&hash) {
            let why = again.err().map_or_else(|| "it differs".to_owned(), |error| one_line(&error));
            findings
                .failures
                .push(format!("volume {}: its image cannot be read as it was written: {why}", volume.name));
        }
        output.publish().map_err(OutputError::system("name", &path))?;
        findings.note_bad(volume, &bad);
        let report = VolumeReport {
            name: volume.name.clone(),
            bytes: volume.size_bytes,
            content_bytes,
            blake3: bad.is_empty().then(|| hash.to_hex().to_string()),
            restore_ms: self.since(begun),
            table: None,
            places: Vec::new(),
        };
        Ok(Restored { report, path })
    }

    /// Looks at what a volume is, and checks what is known of it.
    fn check(&self, volume: &mut Restored, place: (&Path, &Room<'_>), findings: &mut Findings) {
        let Restored { report, path } = volume;
        if report.blake3.is_none() {
            findings.not_checked.push(format!("volume {}: what is in it: it is damaged", report.name));
            return;
        }
        (self.progress)(&format!("check {}", report.name), 0);
        let looked =
            self.store.storage().open(path).and_then(|image| self.look(report, image.as_ref(), place, findings));
        if let Err(error) = looked {
            findings.not_checked.push(format!("volume {}: what is in it: {}", report.name, one_line(&error)));
        }
    }

    fn look(
        &self,
        report: &mut VolumeReport,
        image: &dyn StorageFile,
        (folder, room): (&Path, &Room<'_>),
        findings: &mut Findings,
    ) -> std::io::Result<()> {
        let read = |offset: u64, buffer: &mut [u8]| match image.read_at(buffer, offset)? {
            read if read == buffer.len() => Ok(()),
            _ => Err(std::io::ErrorKind::UnexpectedEof.into()),
        };
        let layout = probe(&read, report.bytes)?;
        report.table = layout.table.map(str::to_owned);
        let name = report.name.clone();
        findings.failures.extend(layout.broken.iter().map(|what| format!("volume {name}: {what}")));
        let runner = Runner { clock: &*self.clock, stop: self.stop };
        let checker = Checker { storage: self.store.storage().as_ref(), runner: &runner, folder, room };
        for place in &layout.places {
            let Checked { report: found, reason } = checker.check(image, place)?;
            let what = place.partition.map_or_else(String::new, |number| format!(", partition {number}"));
            let line = reason.map(|reason| format!("volume {name}{what}: {reason}"));
            match found.result {
                Outcome::Failed => findings.failures.extend(line),
                Outcome::NotChecked => findings.not_checked.extend(line),
                Outcome::Passed => {}
            }
            report.places.push(found);
        }
        Ok(())
    }

    /// Runs the operator's script over the images, which are its own to change, and beside NBD exports of the same.
    fn run_script(&self, script: &Script, volumes: &[Volume], folder: &Path, findings: &mut Findings) -> ScriptReport {
        (self.progress)("script", 0);
        let names: Vec<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
        let mut command = Command::new(&script.path);
        command
            .current_dir(folder)
            .env("CDP_DRILL_OFFICE", self.office)
            .env("CDP_DRILL_GROUP", self.group.name())
            .env("CDP_DRILL_EPOCH", self.point.epoch.to_string())
            .env("CDP_DRILL_TIME", Instant(self.point.time).to_string())
            .env("CDP_DRILL_FOLDER", folder)
            .env("CDP_DRILL_VOLUMES", names.join(" "));
        let begun = self.clock.monotonic();
        let runner = Runner { clock: &*self.clock, stop: self.stop };
        let run = self.with_exports(folder, |socket| {
            match socket {
                Ok(socket) => drop(command.env("CDP_DRILL_SOCKET", socket)),
                Err(error) => findings.not_checked.push(format!("the NBD exports for the script: {error:#}")),
            }
            runner.run(command, script.deadline)
        });
        let (result, exit, why) = match &run.ended {
            Ended::Exit(0) => (Outcome::Passed, Some(0), None),
            Ended::Exit(status) => (Outcome::Failed, Some(*status), Some(format!("it ended with {status}"))),
            Ended::Killed(signal) => (Outcome::Failed, None, Some(format!("it was killed by signal {signal}"))),
            Ended::Late => (Outcome::Failed, None, Some(format!("it was not over in {} s", script.deadline.as_secs()))),
            Ended::Interrupted => (Outcome::NotChecked, None, None),
            Ended::Missing => (Outcome::Failed, None, Some("it is not there".to_owned())),
            Ended::Failed(error) => (Outcome::Failed, None, Some(error.clone())),
        };
        let path = script.path.display().to_string();
        findings.failures.extend(why.map(|why| format!("script {path}: {why}")));
        ScriptReport { path, result, exit, ms: self.since(begun), output: run.output }
    }
}

impl Findings {
    fn note_bad(&mut self, volume: &Volume, bad: &[BadRange]) {
        for BadRange { offset, len, reason } in bad.iter().take(BAD_NAMED_MAX) {
            let (name, end) = (&volume.name, offset + len);
            self.failures.push(format!("volume {name}: bytes {offset} to {end} cannot be read: {reason}"));
        }
        if let Some(more @ 1..) = bad.len().checked_sub(BAD_NAMED_MAX) {
            self.failures.push(format!("volume {}: {more} more ranges cannot be read", volume.name));
        }
    }
}

/// Whether a disk begins with code that a BIOS would run.
fn has_boot_code(storage: &dyn Storage, image: &Path) -> bool {
    let mut sector = [0; 512];
    let read = storage.open(image).and_then(|file| file.read_at(&mut sector, 0));
    read.is_ok() && sector[..BOOT_CODE_BYTES].iter().any(|byte| *byte != 0)
}

/// Room ran out while it wrote.
fn no_room(path: &Path, spare: u64) -> OutputError {
    let line = format!("less than {spare} bytes are left, which are not the drill's to take");
    OutputError::system("no room in", path)(std::io::Error::new(std::io::ErrorKind::StorageFull, line))
}

/// Room for all images, and for a copy of what is checked.
fn room_for(source: &dyn BlockSource, volumes: &[Volume]) -> Result<u64, DrillError> {
    let mut content = Vec::new();
    for volume in volumes {
        let bytes = content_bytes(source, volume.slot, volume.size_bytes);
        content.push(bytes.map_err(|error| ExportError::Damaged { offset: 0, reason: one_line(error.as_ref()) })?);
    }
    Ok(content.iter().sum::<u64>() + content.iter().max().copied().unwrap_or(0))
}
