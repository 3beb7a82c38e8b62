//! New hardware takes the office's place: the old one is refused, and the agent on the restored disk goes on without sending all of it again.

use crate::machine::{Office, partitioned, text};
use anyhow::{Context, Result, ensure};
use cdp_tests::file_system::FileSystem;
use cdp_tests::files::noise;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::{tool, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 192 * MIB;
const LARGER_BYTES: u64 = 224 * MIB;
/// Noise in files of the system volume.
const DATA_BYTES: u64 = 64 * MIB;
const LATER_BYTES: u64 = 4 * MIB;

fn content(seed: u64, bytes: u64) -> Vec<u8> {
    let mut content = vec![0; bytes as usize];
    noise(seed, &mut content);
    content
}

fn write_noise(path: &Path, seed: u64, bytes: u64) -> Result<()> {
    let file = std::fs::File::create(path)?;
    file.write_all_at(&content(seed, bytes), 0)?;
    Ok(file.sync_all()?)
}

/// The layouts that points tell, by their epochs.
fn layouts(site: &Site) -> Result<Vec<(u64, Value)>> {
    let told = site.points()?.into_iter().map(|point| (point.epoch, point.document["layouts"].clone()));
    Ok(told.filter(|(_, layouts)| !layouts.is_null()).collect())
}

/// What the newest point has in the file system of the disk's first partition.
fn assert_point_has_data(office: &Office, epoch: u64) -> Result<()> {
    let image = office.folder.path().join("exported.img");
    office.site.export(&office.volume(), epoch, &image)?;
    ensure!(std::fs::metadata(&image)?.len() == LARGER_BYTES, "the volume has its new size");
    let exported = LoopDevice::attach(&image)?;
    let mount = FileSystem::Ext4.mount(&exported.partition(1)?, &office.folder.path().join("exported"))?;
    ensure!(std::fs::read(mount.folder().join("data"))? == content(1, DATA_BYTES), "the data of point {epoch}");
    ensure!(!mount.folder().join("later").exists(), "it was written after the point that was restored");
    mount.unmount()
}

#[test]
fn new_hardware_goes_on_from_the_restored_disk_and_sends_what_differs() -> Result<()> {
    if !cdp_tests::privileged("new_hardware_goes_on_from_the_restored_disk_and_sends_what_differs") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk.img");
    partitioned(&image, DISK_BYTES, "label: gpt\ntype=L, name=\"system\"\n")?;
    let disk = LoopDevice::attach(&image)?;
    FileSystem::Ext4.make(&disk.partition(1)?)?;
    let root = folder.path().join("root");
    let mount = FileSystem::Ext4.mount(&disk.partition(1)?, &root)?;
    // The office's state lies on the volume that is protected, as on any machine with one disk.
    let (site, relay) = Site::new_behind_a_line(&root, &folder.path().join("target"))?;
    let mut office = Office { site, relay, disk, folder };
    // By its name: a loop device that the state folder lies on is refused as a disk of the machine.
    let refused = office.protect().err().context("the file of another disk is a disk")?;
    ensure!(format!("{refused:#}").contains("is a file of another disk"), "{refused:#}");
    let named = format!("{}={}", office.volume(), office.disk.node().display());
    office.site.source(&["protect", &named])?;
    office.site.set_group_option("interval_ms = 200")?;
    office.site.start_source()?;
    office.site.wait_for_points(1, PATIENCE)?;
    write_noise(&root.join("data"), 1, DATA_BYTES)?;
    tool("sync", &[])?;
    let point = office.site.point_now()?;
    write_noise(&root.join("later"), 2, LATER_BYTES)?;
    tool("sync", &[])?;
    office.site.point_now()?;
    let told = layouts(&office.site)?;
    ensure!(told.len() == 1 && told[0].1[0]["table"] == "gpt", "told once, since it never changed: {told:?}");
    ensure!(told[0].1[0]["partitions"][0]["content"] == "ext2/3/4", "{told:?}");
    office.site.kill_source()?;

    let rescue = office.rescue()?;
    let refused = office.site.source(&["points"]).err().context("the old hardware is admitted")?;
    ensure!(format!("{refused:#}").contains("enrolled anew on other hardware"), "{refused:#}");
    mount.unmount()?;
    let new = LoopDevice::new(&office.folder.path().join("new.img"), LARGER_BYTES)?;
    let told = rescue.restore(new.node(), &["--at", &point.to_string()])?;
    ensure!(told.contains("identity/. /mnt/var/lib/cdp-source/identity/"), "the next step is told: {told}");
    let mount = FileSystem::Ext4.mount(&new.partition(1)?, &office.folder.path().join("mnt"))?;
    let (from, to) = (rescue.site.state.join("identity/."), mount.folder().join("source/identity/"));
    tool("cp", &["-a", &text(&from)?, &text(&to)?])?;
    mount.unmount()?;

    // It starts, on a machine whose disk has the old one's name.
    drop(new);
    office.disk.reattach(&office.folder.path().join("new.img"))?;
    let mount = FileSystem::Ext4.mount(&office.disk.partition(1)?, &root)?;
    let before = office.relay.carried();
    // Nothing of the old machine's kernel is here.
    std::fs::remove_dir_all(office.site.pins().context("what the old agent has pinned")?)?;
    office.site.start_source()?;
    wait_for("the agent to say that the disk is another", PATIENCE, || {
        let status = office.site.source_status().ok();
        let reason = status.and_then(|status| status["reason"].as_str().map(str::to_owned));
        Ok(reason.filter(|reason| reason.contains("has grown") && reason.contains("--disk DEVICE")))
    })?;
    let grown = office.site.source(&["protect", &named])?;
    ensure!(grown.contains("it has grown, and goes on with its new size"), "{grown}");
    let newest = wait_for("a point of the new hardware", PATIENCE, || Ok(office.site.point_now().ok()))
        .with_context(|| office.site.source_daemon().log())?;
    let carried = office.relay.carried().since(before).bytes();
    let log = office.site.source_daemon().log();
    eprintln!("{carried} bytes on the line, both ways, for a system volume with {DATA_BYTES} bytes of noise");
    ensure!(log.contains("the target has told what it holds") && log.contains("a new generation"), "{log}");
    ensure!(carried < DATA_BYTES / 4, "{carried} bytes: not all of it is sent again\n{log}");
    assert_point_has_data(&office, newest)?;
    let told = layouts(&office.site)?;
    ensure!(told.last().is_some_and(|(_, layouts)| layouts[0]["size_bytes"] == LARGER_BYTES), "{told:?}");
    office.site.kill_source()?;
    mount.unmount()?;
    office.site.verify()
}
