//! The hunt for lost writes on the agent's whole path: digests, frames, line, journal and export, with the agent killed meanwhile.
//!
//! The same writers as elsewhere, and the same oracle; what it looks at are exported points. One that was asked for lies between two
//! looks at the board, any other only has to be an instant. When the writers rest, the newest point equals the volume. Each
//! round begins with a volume of zeros, which the target learns of like anything else. `CDP_HUNT_S` is for how long.

#![allow(clippy::disallowed_methods, reason = "tests use real files and the real clock")]

use crate::board::{Board, StopAtEnd};
use crate::check::{Around, Oracle};
use crate::layout::{Layout, VOLUME_BYTES};
use crate::raw::RawDisk;
use crate::record::SECTOR_BYTES;
use crate::{alone, in_memory, writers};
use anyhow::{Context, Result, ensure};
use cdp_tests::image::assert_same;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::{tool, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use cdp_tests::zram_device::{self, ZramDevice};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// For how long both devices are hunted on together, where nothing else is said.
const HUNT: Duration = Duration::from_secs(30);
/// Points that are asked for in a round; behind all but the last the agent is killed.
const ASKED: usize = 4;
/// Points of a round beside them that are looked at.
const BETWEEN: usize = 3;
/// A point that takes longer under load lets the writers press less.
const SLOW: Duration = Duration::from_millis(1500);
/// Where the partition begins: at a page, since writers through the page caches of both nodes are to be neighbours.
const PARTITION_SECTOR: u64 = 2048;
const ANY: Around = Around { finished: [0; crate::record::CHAINS_MAX], issued: [u64::MAX; crate::record::CHAINS_MAX] };

/// A protected volume and who writes to it.
struct Hunt {
    site: Site,
    volume: PathBuf,
    /// All writers, as the volume sees them.
    layout: Layout,
    /// The nodes they write through, and where they write there.
    through: Vec<(PathBuf, Layout)>,
    scratch: tempfile::TempDir,
    points: usize,
    kills: usize,
    records: u64,
}

impl Hunt {
    fn new(volume: &Path, layout: Layout, through: Vec<(PathBuf, Layout)>) -> Result<Self> {
        let scratch = in_memory()?;
        let mut site = Site::new(scratch.path())?;
        site.source(&["protect", &format!("data={}", volume.display())])?;
        site.set_group_option("interval_ms = 100")?;
        site.start_source()?;
        site.wait_for_points(1, PATIENCE)?;
        Ok(Self { site, volume: volume.to_owned(), layout, through, scratch, points: 0, kills: 0, records: 0 })
    }

    /// Exports a point and holds it against what the writers knew around it.
    fn check(&mut self, epoch: u64, around: &Around) -> Result<()> {
        let image = self.scratch.path().join("point.img");
        self.site.export("data", epoch, &image)?;
        let content = std::fs::read(&image)?;
        std::fs::remove_file(image)?;
        let mut oracle = Oracle::new(self.layout.chains(), (content.len() / SECTOR_BYTES) as u64);
        oracle.put(0, &content);
        let checked = oracle.check(around).map_err(|violation| anyhow::anyhow!("{violation}"));
        checked.with_context(|| format!("point {epoch} is none the volume ever held"))?;
        self.records = oracle.newest().iter().sum();
        self.points += 1;
        Ok(())
    }

    /// A point under load, and everything that was finished before it was asked for.
    fn ask(&mut self, board: &Board) -> Result<u64> {
        let (finished, start) = (board.finished(), Instant::now());
        let epoch = self.site.point_now()?;
        let around = Around { finished, issued: board.issued() };
        board.press(start.elapsed() < SLOW);
        self.check(epoch, &around)?;
        Ok(epoch)
    }

    fn kill(&mut self) -> Result<()> {
        let differing = self.site.source_status()?["audit"]["differing_blocks"].as_u64();
        ensure!(differing == Some(0), "the audit found {differing:?} blocks that nobody is known to have written");
        self.site.kill_source()?;
        self.site.start_source()?;
        self.kills += 1;
        wait_for("the agent to answer", PATIENCE, || Ok(self.site.source_status().ok().map(drop)))
    }

    fn round(&mut self) -> Result<()> {
        RawDisk::open(&self.volume)?.zero_out(0, VOLUME_BYTES)?;
        let board = Board::default();
        let through = self.through.clone();
        let asked = std::thread::scope(|scope| -> Result<Vec<u64>> {
            let stop = StopAtEnd(&board);
            let handles: Vec<_> =
                through.iter().map(|(node, layout)| writers::start(scope, node, layout, &board)).collect();
            let mut asked = Vec::new();
            for number in 1..=ASKED {
                asked.push(self.ask(&board)?);
                if number < ASKED {
                    self.kill()?;
                }
            }
            drop(stop);
            handles.into_iter().try_for_each(writers::join)?;
            Ok(asked)
        })?;
        tool("sync", &[])?;
        let newest = self.ask(&board)?;
        self.equals(newest)?;
        let between: Vec<u64> = self.site.points()?.iter().map(|point| point.epoch).collect();
        let between: Vec<u64> =
            between.into_iter().filter(|epoch| (asked[0]..newest).contains(epoch) && !asked.contains(epoch)).collect();
        between.iter().step_by(between.len().div_ceil(BETWEEN).max(1)).try_for_each(|epoch| self.check(*epoch, &ANY))
    }

    /// The newest point, when nobody writes.
    fn equals(&self, epoch: u64) -> Result<()> {
        let image = self.scratch.path().join("newest.img");
        self.site.export("data", epoch, &image)?;
        assert_same(&self.volume, &image).with_context(|| format!("point {epoch}"))?;
        Ok(std::fs::remove_file(image)?)
    }

    fn run(mut self, name: &str) -> Result<()> {
        let seconds = std::env::var("CDP_HUNT_S").map_or(Ok(HUNT.as_secs()), |seconds| seconds.parse())?;
        let (start, mut rounds) = (Instant::now(), 0);
        while rounds == 0 || start.elapsed() < Duration::from_secs(seconds) / 2 {
            rounds += 1;
            let log = |site: &mut Site| site.source_daemon().log();
            self.round().with_context(|| format!("{name}, round {rounds}: {}", log(&mut self.site)))?;
        }
        let (points, kills, records) = (self.points, self.kills, self.records);
        eprintln!(
            "{name}: {rounds} rounds, {points} points checked, {kills} kills, {records} records in the last point"
        );
        ensure!(records > 0, "nothing was written");
        self.site.verify()
    }
}

/// Some of the writers write through the partition that is protected, and the others through its disk.
#[test]
fn no_write_through_a_partition_or_its_disk_is_lost_on_the_way() -> Result<()> {
    if !cdp_tests::privileged("no_write_through_a_partition_or_its_disk_is_lost_on_the_way") {
        return Ok(());
    }
    let _alone = alone();
    let folder = in_memory()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), VOLUME_BYTES + PARTITION_SECTOR * 512 + (1 << 20))?;
    let partition = device.add_partition(1, PARTITION_SECTOR, VOLUME_BYTES / 512)?;
    let layout = Layout::new(512);
    let (of_partition, of_disk) = layout.halves();
    let through = vec![(partition.clone(), of_partition), (device.node().to_owned(), of_disk.behind(PARTITION_SECTOR))];
    Hunt::new(&partition, layout, through)?.run("a partition and its disk")
}

#[test]
fn no_write_to_a_zram_device_is_lost_on_the_way() -> Result<()> {
    let test = "no_write_to_a_zram_device_is_lost_on_the_way";
    if !cdp_tests::privileged(test) || !zram_device::is_there(test) {
        return Ok(());
    }
    let _alone = alone();
    let device = ZramDevice::new(VOLUME_BYTES)?;
    let layout = Layout::new(4096);
    let through = vec![(device.node().to_owned(), layout.clone())];
    Hunt::new(device.node(), layout, through)?.run("zram")
}
