//! A protected ext4 behind a thin line, and what one stretch of time on it came to.

use anyhow::{Context, Result, ensure};
use cdp_protocol::units::BLOCK_BYTES;
use cdp_tests::file_system::FileSystem;
use cdp_tests::loop_device::{LoopDevice, Mount};
use cdp_tests::process::wait_for;
use cdp_tests::relay::Relay;
use cdp_tests::site::{PATIENCE, Site};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What the line carries once the first copy is made.
pub(super) const LINE_BITS_PER_S: u64 = 10_000_000;
const CHUNK: usize = 1 << 20;
/// What the journal may hold more or less than what the source counts: points that are under way at either end.
const UNDER_WAY: u64 = 64 << 10;

/// What a stretch of time came to, in bytes.
pub(crate) struct Figures {
    pub(super) points: usize,
    /// Blocks that differ from one point to the next.
    pub(super) changed: u64,
    /// Blocks that the tracker found: those, and those that were written and are what they were.
    pub(super) dirtied: u64,
    /// Frames, by the source's count.
    pub(super) sent: u64,
    /// Datagrams both ways, with their headers.
    pub(super) line: u64,
    /// How it was packed in the end, as the agent says it.
    pub(super) packing: String,
}

/// An office whose one volume is mounted. Fields go in this order.
pub(super) struct Office {
    site: Site,
    relay: Relay,
    mount: Option<Mount>,
    device: LoopDevice,
    folder: PathBuf,
}

impl Office {
    /// A volume that `prepare` fills, protected, its first copy made.
    pub(super) fn new<T>(
        folder: &Path,
        size_bytes: u64,
        interval_ms: u64,
        prepare: impl FnOnce(&Path) -> Result<T>,
    ) -> Result<(Self, T)> {
        let folder = tempfile::tempdir_in(folder)?.keep();
        let device = LoopDevice::new(&folder.join("volume.img"), size_bytes)?;
        FileSystem::Ext4.make(device.node())?;
        let mount = FileSystem::Ext4.mount(device.node(), &folder.join("live"))?;
        let prepared = prepare(mount.folder())?;
        let (mut site, relay) = Site::new_behind_a_line(&folder, &folder.join("target"))?;
        site.source(&["protect", &format!("data={}", device.node().display())])?;
        site.set_group_option(&format!("interval_ms = {interval_ms}"))?;
        site.start_source_logging("info,cdp_source::packing=debug")?;
        site.wait_for_points(1, Duration::from_secs(300))?;
        site.point_now()?;
        relay.set_rate(Some(LINE_BITS_PER_S));
        Ok((Self { site, relay, mount: Some(mount), device, folder }, prepared))
    }

    pub(super) fn volume(&self) -> &Path {
        self.mount.as_ref().expect("it is mounted until the end").folder()
    }

    /// Takes a point before and behind `work`, and says what became of all points between.
    pub(super) fn measure(&self, work: impl FnOnce() -> Result<()>) -> Result<Figures> {
        let first = self.site.point_now()?;
        let (before, carried) = (self.counts(first)?, self.relay.carried());
        work()?;
        let last = self.site.point_now()?;
        let (after, carried) = (self.counts(last)?, self.relay.carried().since(carried));
        let points = self.site.points()?;
        let points: Vec<_> = points.iter().filter(|point| (first..=last).contains(&point.epoch)).collect();
        let changed = self.changed(&points.iter().map(|point| point.epoch).collect::<Vec<_>>())?;
        let sent = after.sent - before.sent;
        let journaled: u64 = points[1..].iter().filter_map(|point| point.document["bytes"].as_u64()).sum();
        ensure!(journaled.abs_diff(sent) < UNDER_WAY, "{sent} bytes were sent, {journaled} are in the journal");
        let dirtied = changed + after.unchanged - before.unchanged;
        Ok(Figures { points: points.len() - 1, changed, dirtied, sent, line: carried.bytes(), packing: String::new() })
    }

    /// What the source has counted once it says that a point is acked: whoever asked for that is told a moment before.
    fn counts(&self, epoch: u64) -> Result<Counts> {
        let status = wait_for("the point in the status", PATIENCE, || {
            let status = self.site.source_status()?;
            Ok(status["acked_epoch"].as_u64().is_some_and(|acked| acked >= epoch).then_some(status))
        })?;
        let count = |key: &str| status[key].as_u64().with_context(|| format!("{key} in {status}"));
        Ok(Counts { sent: count("acked_bytes")?, unchanged: count("unchanged_bytes")? })
    }

    /// Bytes of blocks that differ from each point to the one behind it.
    fn changed(&self, epochs: &[u64]) -> Result<u64> {
        let image = |epoch: &u64| self.folder.join(format!("point-{epoch}.img"));
        let mut changed = 0;
        for pair in epochs.windows(2) {
            let (old, new) = (image(&pair[0]), image(&pair[1]));
            if !old.exists() {
                self.site.export("data", pair[0], &old)?;
            }
            self.site.export("data", pair[1], &new)?;
            changed += differing_bytes(&old, &new)?;
            fs::remove_file(old)?;
        }
        Ok(changed)
    }

    /// Ends it, and says in the figures how it packed.
    pub(super) fn end(mut self, mut figures: Figures) -> Result<Figures> {
        figures.packing = packing(&self.site.source_daemon().log());
        self.site.stop_source()?;
        self.site.stop_target()?;
        self.mount.take().context("it is mounted")?.unmount()?;
        self.device.detach()?;
        fs::remove_dir_all(&self.folder)?;
        Ok(figures)
    }
}

struct Counts {
    sent: u64,
    unchanged: u64,
}

/// The way to pack that an agent changed to last, by its log; it starts with zstd 3.
fn packing(log: &str) -> String {
    let last = log.lines().rev().find_map(|line| line.split("packing=").nth(1));
    match last.and_then(|way| way.split(' ').next()) {
        None => "zstd 3".to_owned(),
        Some(way) if way.starts_with("Lz4") => "lz4".to_owned(),
        Some(way) => format!("zstd {}", way.chars().filter(char::is_ascii_digit).collect::<String>()),
    }
}

fn differing_bytes(old: &Path, new: &Path) -> Result<u64> {
    let (mut old, mut new) = (File::open(old)?, File::open(new)?);
    let (mut before, mut after) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut left = new.metadata()?.len() as usize;
    let mut blocks = 0;
    while left > 0 {
        let len = left.min(CHUNK);
        old.read_exact(&mut before[..len])?;
        new.read_exact(&mut after[..len])?;
        if before != after {
            let pairs = before[..len].chunks(BLOCK_BYTES).zip(after[..len].chunks(BLOCK_BYTES));
            blocks += pairs.filter(|(old, new)| old != new).count();
        }
        left -= len;
    }
    Ok((blocks * BLOCK_BYTES) as u64)
}
