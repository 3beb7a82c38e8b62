//! Checks of what was found in a volume, by the tools that its file systems come with.
//!
//! Invariant: a tool sees a throw-away copy, never the image itself. What no mount would take, a superblock or group descriptors that are only
//! whole in their backups, is wrong before anything is done to the copy. What a mount would do by itself, replaying a journal and letting go of
//! files that were deleted while open, is done to the copy first; what is wrong after that is wrong. A check that was not done is
//! never told as passed.

use super::probe::{Kind, Place};
use super::program::{Ended, Run, Runner};
use super::report::{Outcome, PlaceReport};
use super::room::Room;
use cdp_seams::storage::{Storage, StorageFile};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How long a checker may take. A drill at night may be long; one that hangs is not to hold the next.
const DEADLINE: Duration = Duration::from_secs(6 * 3600);
/// Bytes that are copied at once.
const COPY_BYTES: u64 = 1 << 20;
/// Zeros are left out of a copy in pieces of this size.
const HOLE_BYTES: usize = 4096;
/// What `xfs_repair -n` says where the log holds changes that it does not apply.
const XFS_DIRTY_LOG: &str = "ignored because the -n option was used";

/// What checks need.
pub(super) struct Checker<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) runner: &'a Runner<'a>,
    /// The drill's own folder.
    pub(super) folder: &'a Path,
    pub(super) room: &'a Room<'a>,
}

/// A check, and why it failed or was not done.
pub(super) struct Checked {
    pub(super) report: PlaceReport,
    pub(super) reason: Option<String>,
}

impl Checker<'_> {
    /// Checks what stands at a place of an image.
    ///
    /// # Errors
    /// Where the copy cannot be made.
    pub(super) fn check(&self, image: &dyn StorageFile, place: &Place) -> io::Result<Checked> {
        let copied = || Copy::of(self, image, place);
        match place.kind {
            Kind::Ext => Ok(self.ext(place, &copied()?)),
            Kind::Xfs => Ok(self.xfs(place, &copied()?)),
            Kind::Btrfs => Ok(self.btrfs(place, &copied()?)),
            Kind::Blank if self.has_content(image, place)? => {
                Ok(not_checked(place, Some("it begins with zeros, though it has content: nobody knows what")))
            }
            Kind::Swap | Kind::Blank => Ok(not_checked(place, None)),
            Kind::Ntfs | Kind::Fat => Ok(not_checked(place, Some("no checker for it is run"))),
            Kind::Luks => Ok(not_checked(place, Some("it is encrypted: what is in it cannot be seen"))),
            Kind::Lvm => Ok(not_checked(place, Some("what LVM has in it is not looked at"))),
            Kind::Unknown => Ok(not_checked(place, Some("no file system that is known"))),
        }
    }

    /// Whether anything stands at a place but zeros.
    fn has_content(&self, image: &dyn StorageFile, place: &Place) -> io::Result<bool> {
        let mut buffer = vec![0; COPY_BYTES as usize];
        let mut done = 0;
        while done < place.bytes {
            self.room.check()?;
            let part = read_part(image, place, done, &mut buffer)?;
            if part.iter().any(|byte| *byte != 0) {
                return Ok(true);
            }
            done += part.len() as u64;
        }
        Ok(false)
    }

    fn ext(&self, place: &Place, copy: &Copy<'_>) -> Checked {
        // Of the primary superblock and its descriptors: e2fsck would take a backup instead, which no mount does.
        let opened = self.run("dumpe2fs", &["-h"], copy);
        if opened.ended != Ended::Exit(0) {
            return concluded(place, "dumpe2fs -h", opened, "its superblock or group descriptors cannot be used");
        }
        // Replays the journal and lets go of deleted files, as a mount does, and checks nothing. What a person would have to be asked ends it.
        let replayed = self.run("e2fsck", &["-p", "-E", "journal_only"], copy);
        if !matches!(replayed.ended, Ended::Exit(0 | 1)) {
            return concluded(place, "e2fsck -E journal_only", replayed, "its journal cannot be replayed");
        }
        let checked = self.run("e2fsck", &["-f", "-n"], copy);
        concluded(place, "e2fsck -fn", checked, "its file system has errors")
    }

    fn xfs(&self, place: &Place, copy: &Copy<'_>) -> Checked {
        let checked = self.run("xfs_repair", &["-n", "-f"], copy);
        if checked.output.contains(XFS_DIRTY_LOG) {
            let reason = "its log is to be replayed by a mount before `xfs_repair -n` can tell";
            return Checked {
                report: report(place, Outcome::NotChecked, "xfs_repair -n", checked),
                reason: Some(reason.to_owned()),
            };
        }
        concluded(place, "xfs_repair -n", checked, "its file system has errors")
    }

    fn btrfs(&self, place: &Place, copy: &Copy<'_>) -> Checked {
        let checked = self.run("btrfs", &["check", "--readonly"], copy);
        concluded(place, "btrfs check --readonly", checked, "its file system has errors")
    }

    fn run(&self, program: &str, arguments: &[&str], copy: &Copy<'_>) -> Run {
        let mut command = Command::new(program);
        command.args(arguments).arg(&copy.path).env("LC_ALL", "C");
        // Where checkers are, also for a service that is told of no such folders.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin:/usr/bin:/bin"));
        self.runner.run(command, DEADLINE)
    }
}

/// A throw-away copy of a file system.
struct Copy<'a> {
    storage: &'a dyn Storage,
    path: PathBuf,
}

impl<'a> Copy<'a> {
    fn of(checker: &Checker<'a>, image: &dyn StorageFile, place: &Place) -> io::Result<Self> {
        let copy = Self { storage: checker.storage, path: checker.folder.join("checked") };
        let file = checker.storage.create_new(&copy.path)?;
        file.set_len(place.bytes)?;
        let mut buffer = vec![0; COPY_BYTES as usize];
        let mut done = 0;
        while done < place.bytes {
            checker.room.check()?;
            let part = read_part(image, place, done, &mut buffer)?;
            let is_hole = |piece: &[u8]| piece.iter().all(|byte| *byte == 0);
            let mut at = done;
            let pieces: Vec<&[u8]> = part.chunks(HOLE_BYTES).collect();
            for run in pieces.chunk_by(|one, next| is_hole(one) == is_hole(next)) {
                if !is_hole(run[0]) {
                    file.write_at(&run.concat(), at)?;
                }
                at += run.iter().map(|piece| piece.len() as u64).sum::<u64>();
            }
            done += part.len() as u64;
            checker.room.written(part.len() as u64);
        }
        Ok(copy)
    }
}

impl Drop for Copy<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.storage.remove(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a copy goes later, with the drill's folder");
        }
    }
}

/// The next bytes of a place, as many as there are and `buffer` takes.
fn read_part<'b>(image: &dyn StorageFile, place: &Place, done: u64, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
    let len = (buffer.len() as u64).min(place.bytes - done) as usize;
    let part = &mut buffer[..len];
    if image.read_at(part, place.offset + done)? != part.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(part)
}

fn report(place: &Place, result: Outcome, tool: &str, run: Run) -> PlaceReport {
    let Place { partition, offset, bytes, kind } = *place;
    PlaceReport { partition, offset, bytes, kind, result, tool: Some(tool.to_owned()), output: Some(run.output) }
}

fn not_checked(place: &Place, reason: Option<&str>) -> Checked {
    let Place { partition, offset, bytes, kind } = *place;
    let report = PlaceReport { partition, offset, bytes, kind, result: Outcome::NotChecked, tool: None, output: None };
    Checked { report, reason: reason.map(str::to_owned) }
}

/// By the status that a checker ended with: 0 is clean.
fn concluded(place: &Place, tool: &str, run: Run, wrong: &str) -> Checked {
    let (result, reason) = match &run.ended {
        Ended::Exit(0) => (Outcome::Passed, None),
        Ended::Exit(status) => (Outcome::Failed, Some(format!("{wrong} ({tool} ended with {status})"))),
        Ended::Killed(signal) => (Outcome::NotChecked, Some(format!("{tool} was killed by signal {signal}"))),
        Ended::Late => (Outcome::NotChecked, Some(format!("{tool} was not over in {} h", DEADLINE.as_secs() / 3600))),
        Ended::Interrupted => (Outcome::NotChecked, Some("interrupted".to_owned())),
        Ended::Missing => (Outcome::NotChecked, Some(format!("{tool} is not installed"))),
        Ended::Failed(error) => (Outcome::NotChecked, Some(format!("{tool}: {error}"))),
    };
    Checked { report: report(place, result, tool, run), reason }
}
