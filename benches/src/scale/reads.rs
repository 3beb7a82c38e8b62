//! Reading a large history from its files alone: opening a point, listing all of them, reading blocks. Each figure is a child's.
//! What the disk itself gives, to be held beside, is measured on the same files.

use super::store::{SLOT, database_block, file_block, key, last_writes, skewed, stamp};
use super::{drop_page_cache, peak_bytes};
use crate::median;
use anyhow::{Context, Result, ensure};
use cdp_protocol::units::{Block, Epoch, Extent};
use cdp_seams::random::SimRandom;
use cdp_seams::storage::SystemStorage;
use cdp_target::journal::GroupView;
use cdp_target::restore::point::{Content, PointImage};
use cdp_tests::process;
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

const OPENED: usize = 20;
const READ_POINTS: usize = 20;
/// 12,000 in all.
const READS_A_POINT: usize = 600;
/// Few enough frames for the decoded cache.
const KEPT_BLOCKS: usize = 32;
const KEPT_READS: usize = 100_000;
const DISK_SECONDS: u32 = 3;

/// Opens points from the files, the page cache dropped before each; a block of each is read.
pub(super) fn open(folder: &Path, oldest: u64, newest: u64) -> Result<Value> {
    let random = SimRandom::new(oldest + newest);
    let mut times = Vec::new();
    for _ in 0..OPENED {
        let epoch = oldest + random.below(newest - oldest + 1);
        let (number, last) = (skewed(&random), last_writes(epoch));
        drop_page_cache()?;
        let start = Instant::now();
        let image = view(folder)?.image(Epoch(epoch), &key())?;
        read(&image, database_block(number), u64::from(last[number as usize]))?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let max = times.iter().copied().fold(0.0, f64::max);
    Ok(json!({ "median_ms": median(&times), "max_ms": max, "peak_bytes": peak_bytes()? }))
}

/// Lists all points.
pub(super) fn list(folder: &Path) -> Result<Value> {
    drop_page_cache()?;
    let start = Instant::now();
    let view = view(folder)?;
    let mut points = 0_u64;
    for point in view.points() {
        ensure!(point?.damaged.is_none(), "a point is damaged");
        points += 1;
    }
    Ok(json!({ "points": points, "seconds": start.elapsed().as_secs_f64(), "peak_bytes": peak_bytes()? }))
}

/// Reads single blocks at random points, one after the other, each by so many threads at once: of the database, or of what only
/// the first copy wrote.
pub(super) fn blocks(folder: &Path, oldest: u64, newest: u64, of_database: bool, threads: usize) -> Result<Value> {
    let random = SimRandom::new(17);
    let epochs: Vec<u64> = (0..READ_POINTS).map(|_| oldest + random.below(newest - oldest + 1)).collect();
    let wanted: Vec<_> = epochs.iter().map(|epoch| wanted(*epoch, of_database, &random)).collect();
    let view = view(folder)?;
    let cold_rate = {
        let images = images(&view, &epochs)?;
        drop_page_cache()?;
        rate(images, &wanted, threads)?
    };
    let warm_rate = rate(images(&view, &epochs)?, &wanted, threads)?;
    let kept_rate = kept(&view.image(Epoch(epochs[0]), &key())?, &wanted[0][..KEPT_BLOCKS])?;
    Ok(json!({ "cold_rate": cold_rate, "warm_rate": warm_rate, "kept_rate": kept_rate, "peak_bytes": peak_bytes()? }))
}

/// Random reads past the page cache of the journal's own files, by so many readers at once.
pub(super) fn disk(folder: &Path, read_bytes: u64, readers: u64) -> Result<Value> {
    let files = std::fs::read_dir(folder.join("journal"))?.map(|entry| Ok(entry?.path()));
    let files: Vec<_> = files.collect::<Result<_>>()?;
    let files = files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "seg"));
    let files: Vec<String> = files.map(|file| file.display().to_string()).collect();
    let mut command = Command::new("fio");
    command.args(["--name=reads", "--readonly", "--rw=randread", "--ioengine=psync", "--direct=1"]);
    command.args(["--file_service_type=random", "--time_based", "--group_reporting", "--output-format=json"]);
    command.arg(format!("--filename={}", files.join(":")));
    command.args([format!("--bs={read_bytes}"), format!("--numjobs={readers}"), format!("--runtime={DISK_SECONDS}")]);
    let output = process::run(&mut command)?;
    let report: Value = serde_json::from_str(output.get(output.find('{').unwrap_or(0)..).unwrap_or(""))?;
    let rate = report["jobs"][0]["read"]["iops"].as_f64().context("iops in fio's report")?;
    Ok(json!({ "rate": rate }))
}

/// Blocks to be read at point `epoch`, with the point that wrote each.
fn wanted(epoch: u64, of_database: bool, random: &SimRandom) -> Vec<(u32, u64)> {
    if !of_database {
        return (0..READS_A_POINT).map(|_| (file_block(random), 1)).collect();
    }
    let last = last_writes(epoch);
    let numbers = (0..READS_A_POINT).map(|_| skewed(random));
    numbers.map(|number| (database_block(number), u64::from(last[number as usize]))).collect()
}

fn images(view: &Arc<GroupView>, epochs: &[u64]) -> Result<Vec<PointImage>> {
    epochs.iter().map(|epoch| Ok(view.image(Epoch(*epoch), &key())?)).collect()
}

/// Reads what is wanted of each point, one point after the other, each block by the next thread that is free; reads a second.
fn rate(images: Vec<PointImage>, wanted: &[Vec<(u32, u64)>], threads: usize) -> Result<f64> {
    let start = Instant::now();
    for (image, wanted) in images.into_iter().zip(wanted) {
        let next = AtomicUsize::new(0);
        let work = || -> Result<()> {
            while let Some((block, epoch)) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                read(&image, *block, *epoch)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            workers.into_iter().try_for_each(|worker| worker.join().expect("a reader does not panic"))
        })?;
    }
    Ok((READ_POINTS * READS_A_POINT) as f64 / start.elapsed().as_secs_f64())
}

/// Reads the same few blocks again and again.
fn kept(image: &PointImage, wanted: &[(u32, u64)]) -> Result<f64> {
    wanted.iter().try_for_each(|(block, epoch)| read(image, *block, *epoch))?;
    let start = Instant::now();
    for at in 0..KEPT_READS {
        let (block, epoch) = wanted[at % wanted.len()];
        read(image, block, epoch)?;
    }
    Ok(KEPT_READS as f64 / start.elapsed().as_secs_f64())
}

fn view(folder: &Path) -> Result<Arc<GroupView>> {
    Ok(Arc::new(GroupView::open(Arc::new(SystemStorage), folder)?))
}

/// Reads a block, which has to be what point `epoch` wrote.
fn read(image: &PointImage, block: u32, epoch: u64) -> Result<()> {
    let mut is_right = false;
    let extent = Extent { start: Block(block), count: 1 };
    image.read_blocks(SLOT, extent, &mut |_, content| {
        is_right = matches!(content, Content::Bytes(bytes) if bytes.starts_with(&stamp(block, epoch)));
    })?;
    ensure!(is_right, "block {block} at point {} is not what point {epoch} wrote", image.epoch());
    Ok(())
}
