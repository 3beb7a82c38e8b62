//! A large store: 500,000 points over 30 days on a volume of 1 TiB, read, checkpointed and pruned; and many offices at once.
//!
//! What is measured of the store runs in a child, this program over again, so that nothing is warm that would not be and the
//! memory is that of the one piece of work. `CDP_BENCH_POINTS` asks for another number of points in the 30 days.

mod ingest;
mod keep;
mod reads;
mod store;

use anyhow::{Context, Result, bail, ensure};
use cdp_tests::process;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use store::Plan;

const POINTS: u64 = 500_000;
/// What the store takes at most, with old and new side by side while it is pruned, and room to spare.
const FREE_BYTES_MIN: u64 = 16 << 30;
/// Days from one checkpoint to the next.
const CHECKPOINT_DAYS: u64 = 5;
/// Readers of one point at once.
const READERS: [u64; 4] = [1, 2, 4, 8];
/// What a reader of a small and of a large frame reads of the disk.
const DISK_READ_BYTES: [u64; 2] = [4096, 65_536];
/// What zstd packs with in the history of its frames.
const ZSTD_LEVEL: u8 = 3;
/// The first argument of a child.
pub(crate) const CHILD: &str = "scale-child";

pub(crate) fn run(folder: &Path) -> Result<()> {
    let points = std::env::var("CDP_BENCH_POINTS").map_or(Ok(POINTS), |text| text.parse());
    let plan = Plan { points: points.context("CDP_BENCH_POINTS")?, level: None };
    ensure!(plan.points >= 3000, "the ladder is of no use with fewer than 100 points a day");
    let free = cdp_seams::storage::Storage::free_bytes(&cdp_seams::storage::SystemStorage, folder)?;
    ensure!(
        free >= FREE_BYTES_MIN,
        "{} MiB are free in {}, not {}",
        free >> 20,
        folder.display(),
        FREE_BYTES_MIN >> 20
    );
    let scale = Scale { folder: folder.join("scale"), plan };
    scale.make()?;
    let (without, mut rates) = (scale.readings(1)?, scale.disk_rates()?);
    rates.extend(scale.read_rates(1, "without checkpoints", "10000")?);
    println!("\n| checkpoint | seconds | MiB needed | MiB written | peak MiB |\n|---|---|---|---|---|");
    let checkpointed = keep::checkpointed(plan, CHECKPOINT_DAYS);
    for (at, epoch) in checkpointed.iter().enumerate() {
        let made = scale.child("checkpoint", &[epoch])?;
        let day = (at as u64 + 1) * CHECKPOINT_DAYS;
        let which = if at == 0 { "the whole" } else { "what changed" };
        println!(
            "| day {day}: {which} | {:.1} | {} | {} | {} |",
            number(&made, "seconds")?,
            mib(&made, "needed_bytes")?,
            mib(&made, "written_bytes")?,
            mib(&made, "peak_bytes")?
        );
    }
    let with = scale.readings(checkpointed[0])?;
    println!(
        "\n| {points} points, 30 days, 1 TiB | without | with checkpoints | aim |\n|---|---|---|---|",
        points = plan.points
    );
    for ((what, without, aim), (_, with, _)) in without.iter().zip(&with) {
        println!("| {what} | {without} | {with} | {aim} |");
    }
    rates.extend(scale.read_rates(checkpointed[0], "with checkpoints", "10000")?);
    print_rates(rates);
    scale.prune()?;
    std::fs::remove_dir_all(&scale.folder)?;
    zstd(folder, plan)?;
    ingest::run(folder)
}

/// The same history in frames that zstd packed, as far as reading goes.
fn zstd(folder: &Path, plan: Plan) -> Result<()> {
    let scale = Scale { folder: folder.join("scale"), plan: Plan { level: Some(ZSTD_LEVEL), ..plan } };
    scale.make()?;
    let rates = scale.read_rates(1, &format!("in frames of zstd {ZSTD_LEVEL}"), "5000")?;
    print_rates(rates);
    Ok(std::fs::remove_dir_all(&scale.folder)?)
}

fn print_rates(rates: Vec<Rates>) {
    println!("\n| reads a second by | 1 reader | 2 | 4 | 8 | aim |\n|---|---|---|---|---|---|");
    for (what, rates, aim) in rates {
        println!("| {what} | {} | {aim} |", rates.map(|rate| format!("{rate:.0}")).join(" | "));
    }
}

/// A row of readings: what, how much, and what it should be.
type Reading = (&'static str, String, &'static str);

/// A row of rates: of what, a second by so many readers, and what it should be.
type Rates = (String, [f64; READERS.len()], &'static str);

struct Scale {
    folder: PathBuf,
    plan: Plan,
}

impl Scale {
    fn make(&self) -> Result<()> {
        let start = Instant::now();
        let made = self.child("make", &[])?;
        println!(
            "\nThe history: {} MiB in {} sealed segments, made in {:.0} s, a sync every 1000 points.",
            folder_bytes(&self.folder)? >> 20,
            made["segments"],
            start.elapsed().as_secs_f64()
        );
        Ok(())
    }

    fn readings(&self, oldest: u64) -> Result<Vec<Reading>> {
        let open = self.child("open", &[&oldest, &self.plan.points])?;
        let list = self.child("list", &[])?;
        ensure!(list["points"].as_u64() == Some(self.plan.points), "{list} are not all points");
        let (one, many) = (self.blocks(oldest, true, 1)?, self.blocks(oldest, false, READERS[READERS.len() - 1])?);
        let peaks = [&open, &one, &many].map(|figures| mib(figures, "peak_bytes"));
        let peak = peaks.into_iter().collect::<Result<Vec<_>>>()?.into_iter().max().unwrap_or_default();
        let opened = format!("{:.0}, {:.0}", number(&open, "median_ms")?, number(&open, "max_ms")?);
        let kept_rate = format!("{:.0}", number(&one, "kept_rate")?);
        Ok(vec![
            ("any point opened from cold files, a block read: median, longest, ms", opened, "1000"),
            ("all points listed from cold files, s", format!("{:.1}", number(&list, "seconds")?), ""),
            ("reads a second, decoded frames, 1 thread", kept_rate, "20000"),
            ("most memory while reading, MiB", peak.to_string(), "256"),
            ("most memory while listing, MiB", mib(&list, "peak_bytes")?.to_string(), "256"),
        ])
    }

    fn blocks(&self, oldest: u64, of_database: bool, readers: u64) -> Result<Value> {
        self.child("blocks", &[&oldest, &self.plan.points, &u64::from(of_database), &readers])
    }

    /// What there is to be had of the disk.
    fn disk_rates(&self) -> Result<Vec<Rates>> {
        let rates = DISK_READ_BYTES.map(|bytes| {
            let mut rates = [0.0; READERS.len()];
            for (rate, readers) in rates.iter_mut().zip(&READERS) {
                *rate = number(&self.child("disk", &[&bytes, readers])?, "rate")?;
            }
            Ok((format!("`fio`, {} KiB each, past the page cache", bytes >> 10), rates, ""))
        });
        rates.into_iter().collect()
    }

    /// Of the database and of other files: from cold files, and from files in the page cache, of which no frame is kept.
    fn read_rates(&self, oldest: u64, how: &str, aim: &'static str) -> Result<Vec<Rates>> {
        let mut rows = Vec::new();
        for (of_database, what) in [(true, "the database"), (false, "other files")] {
            let (mut cold, mut warm) = ([0.0; READERS.len()], [0.0; READERS.len()]);
            for (at, readers) in READERS.iter().enumerate() {
                let figures = self.blocks(oldest, of_database, *readers)?;
                (cold[at], warm[at]) = (number(&figures, "cold_rate")?, number(&figures, "warm_rate")?);
            }
            rows.push((format!("{what} {how}, cold files"), cold, aim));
            rows.push(("the same, files in the page cache".to_owned(), warm, ""));
        }
        Ok(rows)
    }

    /// The first prune rewrites all but a day; the second follows when a day more was received.
    fn prune(&self) -> Result<()> {
        println!(
            "\n| prune by the default ladder | points removed, kept | MiB before | after | written | seconds | peak MiB |"
        );
        println!("|---|---|---|---|---|---|---|");
        let first = self.prune_once("day 30")?;
        self.child("go-on", &[&1])?;
        let second = self.prune_once("a day later")?;
        // A full rewrite is of everything that stays, as fast as the first prune rewrote its part.
        let all_bytes = number(&second, "bytes_after")?;
        let all_seconds = number(&first, "seconds")? * all_bytes / number(&first, "written_bytes")?;
        println!(
            "| a day is {:.3} of the days: of a full rewrite ({} MiB, {all_seconds:.0} s at the first prune's pace) its prune took | | | | {:.3} | {:.3} | |",
            1.0 / store::DAYS as f64,
            all_bytes as u64 >> 20,
            number(&second, "written_bytes")? / all_bytes,
            number(&second, "seconds")? / all_seconds
        );
        Ok(())
    }

    fn prune_once(&self, when: &str) -> Result<Value> {
        let pruned = self.child("prune", &[])?;
        println!(
            "| {when} | {}, {} | {} | {} | {} | {:.1} | {} |",
            pruned["points"],
            pruned["kept"],
            mib(&pruned, "bytes_before")?,
            mib(&pruned, "bytes_after")?,
            mib(&pruned, "written_bytes")?,
            number(&pruned, "seconds")?,
            mib(&pruned, "peak_bytes")?
        );
        Ok(pruned)
    }

    fn child(&self, what: &str, arguments: &[&u64]) -> Result<Value> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args([CHILD, what]).arg(&self.folder).arg(self.plan.points.to_string());
        command.arg(self.plan.level.unwrap_or_default().to_string());
        command.args(arguments.iter().map(ToString::to_string));
        Ok(serde_json::from_str(&process::run(&mut command)?)?)
    }
}

/// What a child does: prints a document.
pub(crate) fn child(arguments: &[String]) -> Result<()> {
    let [what, folder, numbers @ ..] = arguments else { bail!("what, a folder and numbers") };
    let numbers: Vec<u64> = numbers.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    let [points, level, numbers @ ..] = numbers.as_slice() else { bail!("the points, and zstd's level") };
    let plan = Plan { points: *points, level: u8::try_from(*level).ok().filter(|level| *level > 0) };
    let folder = Path::new(folder);
    cdp_target::open_files::allow();
    let document = match (what.as_str(), numbers) {
        ("make", []) => keep::make(folder, plan)?,
        ("open", [oldest, newest]) => reads::open(folder, *oldest, *newest)?,
        ("list", []) => reads::list(folder)?,
        ("blocks", [oldest, newest, of_database, threads]) => {
            reads::blocks(folder, *oldest, *newest, *of_database != 0, *threads as usize)?
        }
        ("disk", [read_bytes, readers]) => reads::disk(folder, *read_bytes, *readers)?,
        ("checkpoint", [epoch]) => keep::checkpoint(folder, plan, *epoch)?,
        ("go-on", [days]) => keep::go_on(folder, plan, *days)?,
        ("prune", []) => keep::prune(folder, plan)?,
        _ => bail!("no work {what} with {numbers:?}"),
    };
    println!("{document}");
    Ok(())
}

fn number(document: &Value, key: &str) -> Result<f64> {
    document[key].as_f64().with_context(|| format!("{key} in {document}"))
}

fn mib(document: &Value, key: &str) -> Result<u64> {
    Ok(number(document, key)? as u64 >> 20)
}

fn drop_page_cache() -> Result<()> {
    rustix::fs::sync();
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("drop the page cache")
}

/// The most memory that this process had at once.
fn peak_bytes() -> Result<u64> {
    process::peak_memory(std::process::id())
}

/// Bytes that this process gave the kernel to write.
fn written_bytes() -> Result<u64> {
    let counters = std::fs::read_to_string("/proc/self/io")?;
    let line = counters.lines().find_map(|line| line.strip_prefix("wchar: "));
    Ok(line.context("wchar")?.parse()?)
}

/// Bytes of the files in a folder and those below it.
pub(crate) fn folder_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { folder_bytes(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
}
