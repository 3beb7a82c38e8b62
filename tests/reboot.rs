//! A clean reboot: what was dirty at the stop is taken up where nothing was written in between, and everything else is compared.
//!
//! The boot is another one to the agent (boot id, no pins), and to the device (made anew, its counts at zero). Needs root, kernel BTF and
//! loop devices; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_source::saved::{Found, Saved};
use cdp_tests::files::content;
use cdp_tests::image::assert_same;
use cdp_tests::loop_device::{LoopDevice, Mount};
use cdp_tests::process::{tool, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const DISK_BYTES: u64 = 256 * MIB;
/// Where it is not measured what a reboot costs.
const SMALL_BYTES: u64 = 32 * MIB;

/// One test at a time: an agent in a mount namespace of its own holds what another test has mounted.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A machine with one disk, and the target it has.
struct Machine {
    // First of all: it holds the device.
    site: Site,
    device: LoopDevice,
    folder: tempfile::TempDir,
    boots: u32,
    _alone: MutexGuard<'static, ()>,
}

impl Machine {
    /// `number` of the loop device: one a test.
    fn new(number: u32, size_bytes: u64) -> Result<Self> {
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("disk.img");
        std::fs::File::create_new(&file)?.set_len(size_bytes)?;
        let device = LoopDevice::attach_numbered(&file, 2000 + number)?;
        let site = Site::new(folder.path())?;
        Ok(Self { site, device, folder, boots: 0, _alone: alone })
    }

    fn protect(&mut self, device: &Path, options: &[&str]) -> Result<()> {
        self.site.source(&["protect", &format!("data={}", device.display())])?;
        options.iter().try_for_each(|option| self.site.set_group_option(option))?;
        self.site.start_source()?;
        self.site.wait_for_points(1, PATIENCE).map(drop)
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    fn record(&self) -> PathBuf {
        self.site.state.join("groups/main/tracking/saved")
    }

    fn is_unproved(&self) -> bool {
        self.site.state.join("groups/main/tracking/unproved-0").exists()
    }

    /// The machine is started anew, all but the agent.
    fn reboot(&mut self) -> Result<()> {
        let pins = self.site.pins().context("the group is pinned")?;
        tool("rm", &["-r", &pins.display().to_string()])?;
        self.device.start_anew()
    }

    /// The agent is started, in a boot of its own each time; gives the group's status once it has opened its volumes.
    fn start(&mut self) -> Result<Value> {
        self.boots += 1;
        let boot_id = self.folder.path().join(format!("boot-{}", self.boots));
        std::fs::write(&boot_id, format!("{:08}-0000-4000-8000-000000000000\n", self.boots))?;
        self.site.start_source_booted(&boot_id)?;
        let mut last = None;
        let in_step = wait_for("the agent to be in step", PATIENCE, || {
            last = self.site.source_status().ok();
            Ok(last.clone().filter(|status| status["state"] == "continuous"))
        });
        in_step.with_context(|| format!("{last:?}\n{}", self.site.source_daemon().log()))
    }

    /// The agent is started once more in the same boot.
    fn start_again(&mut self) -> Result<()> {
        let boot_id = self.folder.path().join(format!("boot-{}", self.boots));
        self.site.start_source_booted(&boot_id)?;
        wait_for("the agent to answer", PATIENCE, || Ok(self.site.source_status().ok())).map(drop)
    }

    /// The record was not taken up, for a reason with this text, and the next point is what the disk holds.
    fn is_compared(&mut self, because: &str) -> Result<()> {
        let status = self.start()?;
        let reason = status["tracker"]["started_over"].as_str().with_context(|| format!("{because}: {status}"))?;
        eprintln!("{reason}");
        ensure!(reason.contains(because), "{reason}, not {because}");
        ensure!(status["tracker"]["taken_up"].is_null(), "{status}");
        ensure!(!self.record().exists(), "the record is gone");
        ensure!(!self.is_unproved(), "all of it was read");
        self.newest_point_equals(self.device.node())
    }

    fn newest_point_equals(&self, device: &Path) -> Result<()> {
        tool("sync", &[])?;
        let epoch = self.site.point_now()?;
        let image = self.folder.path().join("newest.img");
        let _ = std::fs::remove_file(&image);
        self.site.export("data", epoch, &image)?;
        assert_same(device, &image).with_context(|| format!("point {epoch}"))
    }

    /// Bytes read from the disk since it was made.
    fn read_bytes(&self) -> Result<u64> {
        let name = self.device.node().file_name().context("a name")?.to_string_lossy().into_owned();
        let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat"))?;
        let sectors: u64 = stat.split_ascii_whitespace().nth(2).context("sectors read")?.parse()?;
        Ok(sectors * 512)
    }
}

fn count(status: &Value, key: &str) -> Result<u64> {
    status[key].as_u64().with_context(|| format!("{key} in {status}"))
}

/// Writes `len` bytes that only `seed` gives.
fn write(path: &Path, at: u64, len: usize, seed: u64) -> Result<()> {
    let file = std::fs::File::options().write(true).open(path)?;
    file.write_all_at(&content(seed, len), at)?;
    Ok(file.sync_all()?)
}

fn found_in(record: &[u8]) -> Result<Found> {
    let saved = Saved::decode(record).context("a record")?;
    saved.volumes[0].found.clone().map_err(|reason| anyhow::anyhow!("{reason}"))
}

/// A block that the record does not sample.
fn unsampled(record: &[u8]) -> Result<u64> {
    let found = found_in(record)?;
    let is_sampled = |block: &u64| found.samples.iter().any(|(sampled, _)| u64::from(sampled.0) == *block);
    (1000..SMALL_BYTES / BLOCK).find(|block| !is_sampled(block)).context("one of so many")
}

#[test]
fn after_a_clean_reboot_only_samples_are_read_and_only_what_was_dirty_is_sent() -> Result<()> {
    if !cdp_tests::privileged("after_a_clean_reboot_only_samples_are_read_and_only_what_was_dirty_is_sent") {
        return Ok(());
    }
    let mut machine = Machine::new(0, DISK_BYTES)?;
    let node = machine.device.node().to_owned();
    // All at once: else the kernel goes on writing its tables for as long as it is mounted.
    let options = "lazy_itable_init=0,lazy_journal_init=0";
    tool("mkfs.ext4", &["-q", "-F", "-E", options, &node.display().to_string()])?;
    let mount = Mount::new(&node, &machine.folder.path().join("live"), "rw")?;
    std::fs::write(mount.folder().join("old"), content(1, 100 << 20))?;
    machine.protect(&node, &[])?;
    tool("sync", &[])?;
    machine.site.point_now()?;
    // The line is down when the last of it is written.
    machine.site.stop_target()?;
    std::fs::write(mount.folder().join("new"), content(2, 2 << 20))?;
    mount.unmount()?;
    machine.site.stop_source()?;
    let record = std::fs::read(machine.record())?;
    let (record_bytes, dirty) = (record.len(), found_in(&record)?.dirty.len() * BLOCK);
    machine.site.start_target()?;
    machine.reboot()?;
    let status = machine.start()?;
    ensure!(status["tracker"]["started_over"].is_null(), "{status}");
    let taken_up = status["tracker"]["taken_up"].as_str().with_context(|| format!("{status}"))?;
    ensure!(!machine.record().exists() && machine.is_unproved(), "it is taken up once, and to be audited");
    ensure!(count(&status["audit"], "hurried_bytes")? > DISK_BYTES - 8 * MIB, "{status}");
    let epoch = machine.site.point_now()?;
    let status = machine.site.source_status()?;
    let (read, sent) = (machine.read_bytes()?, count(&status, "acked_bytes")?);
    let compared = count(&status, "unchanged_bytes")?;
    eprintln!(
        "went on from {taken_up}: a volume of {DISK_BYTES} bytes with 102 MiB in it, {dirty} bytes dirty; record {record_bytes} bytes, read {read} bytes, sent {sent} bytes, {compared} bytes compared and not sent, point {epoch}"
    );
    ensure!(sent > 0 && sent < dirty, "{sent} bytes were sent where {dirty} were dirty");
    ensure!(dirty < 8 * MIB && read < dirty + 4 * MIB, "{read} bytes were read where {dirty} were dirty");
    machine.newest_point_equals(&node)?;
    // An agent that is started again goes on with the maps, and the volume is to be audited still.
    machine.site.kill_source()?;
    machine.start_again()?;
    let status = wait_for("the audit to be due", PATIENCE, || {
        let status = machine.site.source_status()?;
        Ok((count(&status["audit"], "hurried_bytes")? > DISK_BYTES / 2).then_some(status))
    })?;
    ensure!(status["tracker"]["started_over"].is_null() && status["tracker"]["taken_up"].is_null(), "{status}");
    // And what is written from here on is tracked.
    let mount = Mount::new(&node, &machine.folder.path().join("live"), "rw")?;
    std::fs::write(mount.folder().join("newer"), content(3, 1 << 20))?;
    mount.unmount()?;
    machine.newest_point_equals(&node)
}

#[test]
fn whatever_may_have_changed_is_compared_in_whole() -> Result<()> {
    if !cdp_tests::privileged("whatever_may_have_changed_is_compared_in_whole") {
        return Ok(());
    }
    let mut machine = Machine::new(1, SMALL_BYTES)?;
    let (node, file) = (machine.device.node().to_owned(), machine.file());
    let live = machine.folder.path().join("live");
    tool("mkfs.ext4", &["-q", "-F", &node.display().to_string()])?;
    machine.protect(&node, &[])?;

    let mount = Mount::new(&node, &live, "rw")?;
    machine.site.stop_source()?;
    mount.unmount()?;
    machine.reboot()?;
    machine.is_compared("mounted, or in use")?;

    machine.site.stop_source()?;
    machine.reboot()?;
    Mount::new(&node, &live, "rw")?.unmount()?;
    machine.is_compared("sectors were written to it since the machine was started")?;

    // Mounted in a boot that had no agent: the counts of this one do not tell.
    machine.site.stop_source()?;
    machine.reboot()?;
    Mount::new(&node, &live, "rw")?.unmount()?;
    machine.device.start_anew()?;
    machine.is_compared("it was written to since the stop: block 0")?;

    machine.site.stop_source()?;
    machine.reboot()?;
    write(&file, 7 * BLOCK, 4096, 7)?;
    machine.is_compared("it was written to since the stop: block 7")?;

    machine.site.stop_source()?;
    let other = machine.folder.path().join("other.img");
    std::fs::copy(&file, &other)?;
    machine.reboot()?;
    machine.device.reattach(&other)?;
    machine.is_compared("it is another device")?;
    Ok(())
}

#[test]
fn a_record_that_is_damaged_or_not_the_last_one_is_not_believed() -> Result<()> {
    if !cdp_tests::privileged("a_record_that_is_damaged_or_not_the_last_one_is_not_believed") {
        return Ok(());
    }
    let mut machine = Machine::new(2, SMALL_BYTES)?;
    let node = machine.device.node().to_owned();
    write(&node, 0, 1 << 20, 1)?;
    machine.protect(&node, &[])?;

    // The agent was killed: there is none.
    machine.site.kill_source()?;
    machine.reboot()?;
    machine.is_compared("had no time to save")?;

    machine.site.stop_source()?;
    let mut bytes = std::fs::read(machine.record())?;
    let first_stop = bytes.clone();
    bytes[70] ^= 1;
    std::fs::write(machine.record(), &bytes)?;
    machine.reboot()?;
    machine.is_compared("is damaged")?;

    // Of an earlier boot, put back; where it is not sampled the disk is another since.
    write(&node, unsampled(&first_stop)? * BLOCK, 4096, 3)?;
    machine.newest_point_equals(&node)?;
    machine.site.stop_source()?;
    std::fs::write(machine.record(), &first_stop)?;
    machine.reboot()?;
    machine.is_compared("of another tracking")?;

    // Of an earlier stop in the same boot.
    machine.site.stop_source()?;
    let before = std::fs::read(machine.record())?;
    machine.start_again()?;
    ensure!(!machine.record().exists(), "the maps are better");
    write(&node, unsampled(&before)? * BLOCK, 4096, 4)?;
    machine.newest_point_equals(&node)?;
    let status = machine.site.source_status()?;
    ensure!(status["tracker"]["started_over"].is_null() && status["tracker"]["taken_up"].is_null(), "{status}");
    machine.site.stop_source()?;
    std::fs::write(machine.record(), &before)?;
    machine.reboot()?;
    machine.is_compared("does not fit what is remembered")
}

#[test]
fn what_the_cheap_check_misses_the_audit_finds() -> Result<()> {
    if !cdp_tests::privileged("what_the_cheap_check_misses_the_audit_finds") {
        return Ok(());
    }
    let mut machine = Machine::new(3, SMALL_BYTES)?;
    let node = machine.device.node().to_owned();
    write(&node, 0, 8 << 20, 1)?;
    machine.protect(&node, &["interval_ms = 50", "audit_interval_s = 20"])?;
    machine.newest_point_equals(&node)?;
    machine.site.stop_source()?;
    let missed = unsampled(&std::fs::read(machine.record())?)?;
    machine.reboot()?;
    write(&machine.file(), missed * BLOCK, 4096, 9)?;
    let status = machine.start()?;
    ensure!(status["tracker"]["taken_up"].is_string(), "it looks as it did: {status}");
    let status = wait_for("the audit to have gone through it", PATIENCE, || {
        let status = machine.site.source_status()?;
        Ok((count(&status["audit"], "hurried_bytes")? == 0 && !machine.is_unproved()).then_some(status))
    })?;
    eprintln!("block {missed}: {}", status["audit"]);
    ensure!(count(&status["audit"], "differing_blocks")? == 1, "{status}");
    machine.newest_point_equals(&node)
}

/// Two partitions: one is written to all the time from the start of the machine, as a root is; the other one is protected.
#[test]
fn a_partition_is_taken_up_beside_one_that_is_written_to() -> Result<()> {
    if !cdp_tests::privileged("a_partition_is_taken_up_beside_one_that_is_written_to") {
        return Ok(());
    }
    let mut machine = Machine::new(4, SMALL_BYTES)?;
    let (first, second) = ((63, 12 * MIB / 512), (12 * MIB / 512 + 63, 16 * MIB / 512));
    let make = |machine: &Machine| {
        machine.device.add_partition(1, first.0, first.1)?;
        machine.device.add_partition(2, second.0, second.1)
    };
    let node = make(&machine)?;
    write(&node, 0, 8 << 20, 1)?;
    machine.protect(&node, &[])?;
    machine.newest_point_equals(&node)?;
    let root = PathBuf::from(format!("{}p1", machine.device.node().display()));
    let unmake = |machine: &Machine| tool("partx", &["--delete", &machine.device.node().display().to_string()]);
    for (through, is_taken_up) in [(root.clone(), true), (machine.device.node().to_owned(), false)] {
        machine.site.stop_source()?;
        unmake(&machine)?;
        machine.reboot()?;
        make(&machine)?;
        write(&through, 5 * MIB, 1 << 20, 5)?;
        let status = machine.start()?;
        eprintln!("written through {}: {}", through.display(), status["tracker"]["started_over"]);
        ensure!(status["tracker"]["taken_up"].is_string() == is_taken_up, "{status}");
        let reason = status["tracker"]["started_over"].as_str().unwrap_or_default();
        ensure!(is_taken_up || reason.contains("past its partitions"), "{status}");
        machine.newest_point_equals(&node)?;
    }
    machine.site.stop_source()?;
    unmake(&machine).map(drop)
}
