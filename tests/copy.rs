//! A copy at the disk's full speed that the line could never keep up with: points come all the same, out of the spool.
//!
//! One thread writes past the page cache as fast as the disk takes it, far more than a cut may hold and memory is allowed; the line carries
//! next to nothing meanwhile. Then the line is given back, and points are looked into: each is a file system with whole pieces of the copy and the
//! beginning of one, never less than in the point before. `CDP_COPY_GB` says how much is copied, in pieces of 4 GiB of which two are kept; the default
//! is one, which is one piece. Needs root, kernel BTF and loop devices; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::files::noise;
use cdp_tests::image::{assert_same, check_ext4};
use cdp_tests::loop_device::{LoopDevice, Mount};
use cdp_tests::process::{tool, wait_for};
use cdp_tests::site::{PATIENCE, Point, Site};
use serde_json::Value;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread::park_timeout;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const PIECE_BYTES: u64 = 4 * GIB;
/// Written at a time.
const CHUNK: usize = 4 << 20;
/// Written through to the disk, file system and all, so often.
const SYNCED: u64 = 64 * MIB;
/// What a copy is made of: an eighth of it does not compress.
const STRIPE: usize = 64 << 10;
/// Bits a second of the line while the copy goes on: a minute of it is less than a cut may hold.
const THIN: u64 = 2_000_000;
/// Points that are looked into.
const LOOKED_INTO: usize = 12;

/// Fills a piece of memory with what stands at this place of the copy.
fn fill(offset: u64, chunk: &mut [u8]) {
    for (number, stripe) in chunk.chunks_mut(STRIPE).enumerate() {
        let seed = offset / STRIPE as u64 + number as u64;
        let (head, text) = stripe.split_at_mut(stripe.len() / 8);
        noise(seed, head);
        text.fill(b'a' + (seed % 26) as u8);
    }
}

fn piece_path(root: &Path, number: u64) -> PathBuf {
    root.join(format!("piece-{number}"))
}

/// Writes `len` bytes in pieces, past the page cache; keeps the last two.
fn copy(root: &Path, len: u64) -> Result<()> {
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    let mut buffer = vec![0_u8; CHUNK + 4096];
    let start = buffer.as_ptr().align_offset(4096);
    for number in 0..len.div_ceil(PIECE_BYTES) {
        let path = piece_path(root, number);
        let file = File::options().write(true).create_new(true).custom_flags(direct).open(path)?;
        let piece_len = PIECE_BYTES.min(len - number * PIECE_BYTES);
        for offset in (0..piece_len).step_by(CHUNK) {
            fill(number * PIECE_BYTES + offset, &mut buffer[start..start + CHUNK]);
            file.write_all_at(&buffer[start..start + CHUNK], offset)?;
            if (offset + CHUNK as u64).is_multiple_of(SYNCED) {
                file.sync_data()?;
            }
        }
        file.sync_all()?;
        if let Some(old) = number.checked_sub(1) {
            std::fs::remove_file(piece_path(root, old))?;
        }
    }
    Ok(())
}

/// How far the copy had got: every byte that is there is the copy's, and all pieces but the last are whole.
fn copied(root: &Path, len: u64) -> Result<u64> {
    let pieces = (0..len.div_ceil(PIECE_BYTES)).filter(|number| piece_path(root, *number).exists());
    let (mut reached, mut chunk, mut expected) = (0, vec![0; CHUNK], vec![0; CHUNK]);
    for number in pieces {
        let mut file = File::open(piece_path(root, number))?;
        let piece_len = file.metadata()?.len();
        ensure!(reached % PIECE_BYTES == 0, "piece {number} was begun, and the one before has {reached} bytes");
        for offset in (0..piece_len).step_by(CHUNK) {
            let part = CHUNK.min((piece_len - offset) as usize);
            file.read_exact(&mut chunk[..part])?;
            fill(number * PIECE_BYTES + offset, &mut expected);
            ensure!(
                chunk[..part] == expected[..part],
                "piece {number} of {piece_len} bytes differs behind byte {offset}"
            );
        }
        reached = number * PIECE_BYTES + piece_len;
    }
    Ok(reached)
}

/// What was seen of the agent while the copy went on.
#[derive(Default)]
struct Seen {
    captured: u64,
    spooled_bytes: u64,
    dirty_bytes: u64,
}

impl Seen {
    fn look(&mut self, status: &Value) {
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        self.captured = self.captured.max(number(&status["captured_epoch"]));
        self.spooled_bytes = self.spooled_bytes.max(number(&status["spool"]["spooled_bytes"]));
        self.dirty_bytes = self.dirty_bytes.max(number(&status["dirty_bytes"]));
    }
}

/// Some of the points, the newest among them.
fn some(points: &[Point]) -> impl Iterator<Item = &Point> {
    let step = points.len().div_ceil(LOOKED_INTO).max(1);
    points.iter().rev().step_by(step).collect::<Vec<_>>().into_iter().rev()
}

fn time_of(point: &Point) -> Result<jiff::Timestamp> {
    Ok(point.time.parse()?)
}

#[test]
fn a_copy_that_outruns_the_line_has_points() -> Result<()> {
    const TEST: &str = "a_copy_that_outruns_the_line_has_points";
    if !cdp_tests::privileged(TEST) {
        return Ok(());
    }
    let gib: Option<u64> = std::env::var("CDP_COPY_GB").ok().map(|number| number.parse()).transpose()?;
    let len = gib.map_or(GIB, |gib| gib * GIB);
    let patience = PATIENCE * (2 + (len / GIB) as u32);
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), len.min(3 * PIECE_BYTES) + GIB)?;
    let node = device.node().to_str().context("text")?.to_owned();
    tool("mkfs.ext4", &["-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0", &node])?;
    let mount = Mount::new(device.node(), &folder.path().join("live"), "rw,noatime,discard")?;
    let (mut site, line) = Site::new_behind_a_line(folder.path(), &folder.path().join("target"))?;
    site.source(&["protect", &format!("data={node}")])?;
    site.set_group_option("spool_bytes_max = 68719476736")?;
    site.set_group_option("interval_ms = 200")?;
    if let Ok(filter) = std::env::var("CDP_COPY_LOG") {
        site.start_source_logging(&filter)?;
    } else {
        site.start_source()?;
    }
    let before = site.wait_for_points(1, PATIENCE)?;
    line.set_rate(Some(THIN));

    let (started, root) = (Instant::now(), mount.folder().to_owned());
    let begun = jiff::Timestamp::now();
    let writer = std::thread::spawn(move || copy(&root, len));
    let mut seen = Seen::default();
    while !writer.is_finished() {
        seen.look(&site.source_status()?);
        park_timeout(Duration::from_millis(200));
    }
    writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    let (took, ended) = (started.elapsed(), jiff::Timestamp::now());
    mount.unmount()?;
    wait_for("the rest to be captured", patience, || {
        let status = site.source_status()?;
        seen.look(&status);
        Ok((status["dirty_bytes"] == 0).then_some(()))
    })
    .with_context(|| site.source_daemon().log())?;
    if std::env::var_os("CDP_COPY_LOG").is_some() {
        eprintln!("{}", site.source_daemon().log());
    }
    line.set_rate(None);
    let last = site.point_now()?;
    let points = site.points()?;
    ensure!(points.last().is_some_and(|point| point.epoch == last), "the newest point is the one that was asked for");

    let points = &points[before.len()..];
    let mut within = Vec::new();
    for point in points {
        if (begun..ended).contains(&time_of(point)?) {
            within.push(time_of(point)?);
        }
    }
    let gaps =
        within.windows(2).map(|pair| (pair[1] - pair[0]).total(jiff::Unit::Second)).collect::<Result<Vec<_>, _>>()?;
    let report = format!(
        "{} MiB copied in {:.1} s: {} points meanwhile, {} in all; seconds between them {gaps:.1?}; {} MiB dirty and {} MiB spooled at most",
        len / MIB,
        took.as_secs_f64(),
        within.len(),
        points.len(),
        seen.dirty_bytes / MIB,
        seen.spooled_bytes / MIB,
    );
    eprintln!("{report}");
    let image = folder.path().join("point.img");
    let mut reached = Vec::new();
    for point in some(points) {
        site.export("data", point.epoch, &image)?;
        if point.epoch == last {
            assert_same(device.node(), &image)?;
        }
        let here = check_ext4(&image, folder.path(), |root| copied(root, len));
        reached.push(here.with_context(|| format!("point {} of {}", point.epoch, point.time))?);
        std::fs::remove_file(&image)?;
    }
    eprintln!("MiB copied in the points: {:?}", reached.iter().map(|bytes| bytes / MIB).collect::<Vec<_>>());
    ensure!(reached.is_sorted() && reached.last() == Some(&len), "{reached:?}");
    ensure!(reached.iter().any(|bytes| (1..len).contains(bytes)), "a point holds a part of the copy: {reached:?}");
    ensure!(within.len() >= 2, "{report}");
    site.kill_source()
}
