//! The loads: real programs where there are real programs, and threads that do what others would.

use super::office::{Figures, Office};
use crate::log_file::LogFile;
use anyhow::{Context, Result};
use cdp_tests::files::{content, noise as fill};
use cdp_tests::postgres::{self, Postgres};
use cdp_tests::process::{Daemon, tool};
use cdp_tests::sqlite::Writer;
use std::collections::VecDeque;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::thread::park_timeout;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// Bytes of the files that are copied over themselves.
pub(super) const COPIED_BYTES: u64 = 64 * MIB;
const COPIED_FILE_BYTES: u64 = 4 * MIB;
/// Copies the files of a volume over their copies, as most do.
const COPY: &str = "cp -r \"$0\"/files/. \"$0\"/copy/ && sync";
/// Until what the line carries is known and the load is steady.
const WARM_UP: Duration = Duration::from_secs(20);
const MEASURED: Duration = Duration::from_secs(30);
/// Between checkpoints: short, so that the short time has data files in it and not only their log.
const SETTINGS: &str = "checkpoint_timeout = '30s'\nmax_wal_size = '256MB'\n";

/// The user of a database has to get there.
fn open_to_all(volume: &Path) -> Result<()> {
    for folder in volume.ancestors().take(3) {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

pub(super) fn pgbench(folder: &Path) -> Result<Figures> {
    let programs = postgres::programs("the load of pgbench").context("PostgreSQL")?;
    let (office, postgres) = Office::new(folder, 1 << 30, 5000, |volume| {
        open_to_all(volume)?;
        Postgres::init(&programs, &volume.join("data"), SETTINGS)?;
        let postgres = Postgres::start(&programs, &volume.join("data"), &volume.join("sockets"))?;
        postgres.tool("pgbench", &["-i", "-q", "-s", "10"])?;
        postgres.sql("checkpoint")?;
        Ok(postgres)
    })?;
    let load = Daemon::start(&mut postgres.command("pgbench", &["-n", "-R", "200", "-c", "8", "-T", "3600"]))?;
    pass(WARM_UP, WARM_UP, |_| Ok(()))?;
    let figures = office.measure(|| pass(MEASURED, MEASURED, |_| Ok(())))?;
    load.kill()?;
    postgres.stop()?;
    office.end(figures)
}

pub(super) fn sqlite(folder: &Path) -> Result<Figures> {
    let (office, writer) =
        Office::new(folder, 128 * MIB, 5000, |volume| Writer::start(&volume.join("orders.db"), "wal"))?;
    pass(WARM_UP, WARM_UP, |_| Ok(()))?;
    let figures = office.measure(|| pass(MEASURED, MEASURED, |_| Ok(())))?;
    writer.stop()?;
    office.end(figures)
}

/// Messages as a mail server keeps them: written beside, synced, renamed into place, and deleted some time later.
pub(super) fn mail(folder: &Path) -> Result<Figures> {
    const KEPT: usize = 300;
    let (office, ()) = Office::new(folder, 256 * MIB, 5000, |volume| {
        fs::create_dir(volume.join("tmp"))?;
        Ok(fs::create_dir(volume.join("new"))?)
    })?;
    let mut kept = VecDeque::new();
    let mut deliver = |number: u64| -> Result<()> {
        let name = format!("{number}.office");
        let (beside, place) = (office.volume().join("tmp").join(&name), office.volume().join("new").join(&name));
        let file = File::create_new(&beside)?;
        file.write_all_at(&content(number, 1024 * (2 + number * 7 % 40) as usize), 0)?;
        file.sync_all()?;
        fs::rename(beside, &place)?;
        kept.push_back(place);
        if kept.len() > KEPT {
            fs::remove_file(kept.pop_front().context("there are some")?)?;
        }
        Ok(())
    };
    let often = Duration::from_millis(100);
    pass(WARM_UP, often, &mut deliver)?;
    let figures = office.measure(|| pass(MEASURED, often, |number| deliver(1_000_000 + number)))?;
    office.end(figures)
}

pub(super) fn log(folder: &Path) -> Result<Figures> {
    let (office, mut log) = Office::new(folder, 64 * MIB, 1000, |volume| LogFile::new(&volume.join("messages"), true))?;
    let second = Duration::from_secs(1);
    pass(Duration::from_secs(5), second, |_| log.line())?;
    let figures = office.measure(|| pass(MEASURED, second, |_| log.line()))?;
    drop(log);
    office.end(figures)
}

pub(super) fn noise(folder: &Path) -> Result<Figures> {
    const PIECE: u64 = 256 << 10;
    let (office, file) = Office::new(folder, 128 * MIB, 5000, |volume| written(&volume.join("file"), 64 * MIB))?;
    let mut piece = vec![0; PIECE as usize];
    let mut write = |number: u64| -> Result<()> {
        fill(u64::MAX - number, &mut piece);
        file.write_all_at(&piece, number * 7 % (64 * MIB / PIECE) * PIECE)?;
        Ok(file.sync_data()?)
    };
    let figures = office.measure(|| pass(MEASURED, Duration::from_secs(1), &mut write))?;
    drop(file);
    office.end(figures)
}

pub(super) fn fstrim(folder: &Path) -> Result<Figures> {
    let (office, file) = Office::new(folder, 256 * MIB, 5000, |volume| written(&volume.join("file"), 128 * MIB))?;
    drop(file);
    let figures = office.measure(|| {
        fs::remove_file(office.volume().join("file"))?;
        tool("sync", &[])?;
        tool("fstrim", &[&office.volume().display().to_string()]).map(drop)
    })?;
    office.end(figures)
}

pub(super) fn copy(folder: &Path) -> Result<Figures> {
    copied(folder, 1, COPY)
}

pub(super) fn copy_again(folder: &Path) -> Result<Figures> {
    copied(folder, 2, COPY)
}

pub(super) fn copy_in_place(folder: &Path) -> Result<Figures> {
    const IN_PLACE: &str = "cd \"$0\"/files && for file in *; do dd if=$file of=../copy/$file bs=1M conv=notrunc status=none; done && sync";
    copied(folder, 1, IN_PLACE)
}

/// Files that have been copied `times` times are copied once more over their copies, by a shell's `command`.
fn copied(folder: &Path, times: usize, command: &str) -> Result<Figures> {
    let shell = |command: &str, volume: &Path| tool("sh", &["-c", command, &volume.display().to_string()]).map(drop);
    let (office, ()) = Office::new(folder, 320 * MIB, 5000, |volume| {
        fs::create_dir(volume.join("files"))?;
        fs::create_dir(volume.join("copy"))?;
        for number in 0..COPIED_BYTES / COPIED_FILE_BYTES {
            fs::write(volume.join(format!("files/{number}")), content(number, COPIED_FILE_BYTES as usize))?;
        }
        (0..times).try_for_each(|_| shell(COPY, volume))
    })?;
    let figures = office.measure(|| shell(command, office.volume()))?;
    office.end(figures)
}

/// A file of noise, on the disk.
fn written(path: &Path, len: u64) -> Result<File> {
    let file = File::create_new(path)?;
    let mut piece = vec![0; MIB as usize];
    for number in 0..len / MIB {
        fill(number, &mut piece);
        file.write_all_at(&piece, number * MIB)?;
    }
    file.sync_all()?;
    Ok(file)
}

/// Lets `time` pass, and calls `tick` with a number whenever so much of it has passed, at once for the first time.
fn pass(time: Duration, every: Duration, mut tick: impl FnMut(u64) -> Result<()>) -> Result<()> {
    let start = Instant::now();
    let times = (time.as_secs_f64() / every.as_secs_f64()).round() as u32;
    for number in 0..times {
        tick(number.into())?;
        let due = every * (number + 1);
        while start.elapsed() < due {
            park_timeout(due.saturating_sub(start.elapsed()));
        }
    }
    Ok(())
}
