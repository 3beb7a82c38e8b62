//! Blocks that programs really change: a volume is looked at whenever a point is due, and what differs is kept.

use crate::log_file::LogFile;
use anyhow::{Context, Result};
use cdp_protocol::units::BLOCK_BYTES;
use cdp_tests::file_system::FileSystem;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::postgres::{self, Postgres};
use cdp_tests::process::{Daemon, tool};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Points of each workload; half of them are measured.
const POINTS: usize = 12;
/// Bytes of the database's volume.
const DATABASE_BYTES: u64 = 1 << 30;
/// Bytes of the log's volume.
const LOG_BYTES: u64 = 64 << 20;
/// Transactions a second.
const TRANSACTIONS: &str = "200";
/// Times 100,000 accounts.
const SCALE: &str = "10";
const CHUNK: usize = 1 << 20;

/// A block that changed.
pub(crate) struct Change {
    pub(crate) block: u32,
    pub(crate) old: Box<[u8]>,
    pub(crate) new: Box<[u8]>,
}

/// The blocks that changed from one point to the next, in block order.
pub(crate) type Point = Vec<Change>;

pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) points: Vec<Point>,
}

/// PostgreSQL under `pgbench`. Checkpoints follow each other closely, so that the short time has data files in it
/// and not only their log.
pub(crate) fn pgbench(folder: &Path) -> Result<Workload> {
    let device = LoopDevice::new(&folder.join("database.img"), DATABASE_BYTES)?;
    FileSystem::Ext4.make(device.node())?;
    let mount = FileSystem::Ext4.mount(device.node(), &folder.join("database"))?;
    // The database's user has to get there.
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))?;
    let programs = postgres::programs("packing").context("PostgreSQL")?;
    let data = mount.folder().join("data");
    Postgres::init(&programs, &data, "checkpoint_timeout = '30s'\nmax_wal_size = '256MB'\n")?;
    let database = Postgres::start(&programs, &data, &data.join("sockets"))?;
    database.tool("pgbench", &["-i", "-q", "-s", SCALE])?;
    let seconds = (5 * (POINTS + 3)).to_string();
    let load = Daemon::start(&mut database.command("pgbench", &["-n", "-R", TRANSACTIONS, "-c", "8", "-T", &seconds]))?;
    let points = points(device.file(), Duration::from_secs(5), &mut || Ok(()))?;
    load.kill()?;
    drop(database);
    mount.unmount()?;
    Ok(Workload { name: "pgbench, 200 transactions/s, 5 s", points })
}

/// A line a second into a log, synced at once and looked at each second; or left to the system and looked at each 5 s.
pub(crate) fn log(folder: &Path, synced: bool) -> Result<Workload> {
    let name = if synced { "log-synced" } else { "log" };
    let device = LoopDevice::new(&folder.join(format!("{name}.img")), LOG_BYTES)?;
    FileSystem::Ext4.make(device.node())?;
    let mount = FileSystem::Ext4.mount(device.node(), &folder.join(name))?;
    let mut log = LogFile::new(&mount.folder().join("messages"), synced)?;
    tool("sync", &[])?;
    let interval = Duration::from_secs(if synced { 1 } else { 5 });
    let points = points(device.file(), interval, &mut || log.line())?;
    drop(log);
    mount.unmount()?;
    let name = if synced { "a log line a second, synced, 1 s" } else { "a log line a second, 5 s" };
    Ok(Workload { name, points })
}

/// Blocks that nothing compresses.
pub(crate) fn noise() -> Workload {
    let block = |number: u64| {
        let mut bytes = vec![0; BLOCK_BYTES];
        cdp_tests::files::noise(number, &mut bytes);
        bytes.into_boxed_slice()
    };
    let change = |point: u64, block_number: u32| {
        let number = u64::from(block_number);
        Change { block: block_number, old: block(number), new: block((point << 32) | number) }
    };
    let points = (1..=POINTS as u64).map(|point| (0..1000).map(|number| change(point, number)).collect()).collect();
    Workload { name: "noise", points }
}

/// Looks at the volume behind `file` when a point is due, and calls `tick` each second between.
fn points(file: &Path, interval: Duration, tick: &mut dyn FnMut() -> Result<()>) -> Result<Vec<Point>> {
    let mut known = Vec::new();
    File::open(file)?.read_to_end(&mut known)?;
    let start = Instant::now();
    let mut seconds = 0;
    let mut points = Vec::new();
    while points.len() < POINTS {
        tick()?;
        seconds += 1;
        let due = Duration::from_secs(seconds);
        while start.elapsed() < due {
            std::thread::park_timeout(due.saturating_sub(start.elapsed()));
        }
        if seconds % interval.as_secs() == 0 {
            points.push(changes(file, &mut known)?);
        }
    }
    Ok(points)
}

/// What differs from `known`, which is brought up to date.
fn changes(file: &Path, known: &mut [u8]) -> Result<Point> {
    let mut file = File::open(file)?;
    let mut chunk = vec![0; CHUNK];
    let mut point = Point::new();
    for (at, known) in known.chunks_exact_mut(CHUNK).enumerate() {
        file.read_exact(&mut chunk)?;
        if known == chunk {
            continue;
        }
        let blocks = known.chunks_exact_mut(BLOCK_BYTES).zip(chunk.chunks_exact(BLOCK_BYTES));
        for (within, (old, new)) in blocks.enumerate().filter(|(_, (old, new))| old != new) {
            let block = (at * (CHUNK / BLOCK_BYTES) + within) as u32;
            point.push(Change { block, old: (&*old).into(), new: new.into() });
            old.copy_from_slice(new);
        }
    }
    // A block of zeros is a hole, and none of what is measured here.
    point.retain(|change| !cdp_protocol::codec::is_zero(&change.new));
    Ok(point)
}
