//! Onto an empty disk that is larger, byte for byte; and what is refused.

use crate::machine::{Office, Rescue, partitioned, text};
use anyhow::{Context, Result, ensure};
use cdp_tests::file_system::FileSystem;
use cdp_tests::files::noise;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::{tool, wait_for};
use cdp_tests::site::PATIENCE;
use std::os::unix::fs::FileExt;
use std::path::Path;

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 192 * MIB;
/// No multiple of a MiB: the end is where the disk ends.
const LARGER_BYTES: u64 = 256 * MIB + 3 * 4096;

const GPT: &str = "label: gpt\n\
    size=1MiB, type=21686148-6449-6E6F-744E-656564454649, name=\"bios\"\n\
    size=128MiB, type=L, name=\"system\"\n\
    type=S, name=\"swap\"\n";

fn write_noise(path: &Path, seed: u64, bytes: u64) -> Result<()> {
    let mut content = vec![0; bytes as usize];
    noise(seed, &mut content);
    let file = std::fs::File::create(path)?;
    file.write_all_at(&content, 0)?;
    Ok(file.sync_all()?)
}

/// An office with a disk of three partitions and boot code, protected as a whole while its file system is in use; the point of it, and
/// an image of the disk at that point.
fn office(script: &str) -> Result<(Office, u64, std::path::PathBuf)> {
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk.img");
    partitioned(&image, DISK_BYTES, script)?;
    std::fs::File::options().write(true).open(&image)?.write_all_at(&[0xeb, 0x63, 0x90], 0)?;
    let mut office = Office::new(folder, &image)?;
    let system = office.disk.partition(2)?;
    FileSystem::Ext4.make(&system)?;
    let mount = FileSystem::Ext4.mount(&system, &office.folder.path().join("mounted"))?;
    write_noise(&mount.folder().join("before"), 1, 8 * MIB)?;
    let told = office.protect()?;
    let name = office.volume();
    for part in [
        format!("main/{name}: "),
        "in sectors of 512 bytes, with boot code".to_owned(),
        "boot area of 1048576 bytes before the first partition".to_owned(),
        format!("ext2/3/4, mounted on {}", mount.folder().display()),
        "one volume: all of this is in every point".to_owned(),
    ] {
        ensure!(told.contains(&part), "{part:?} is told in {told}");
    }
    office.site.set_group_option("interval_ms = 200")?;
    office.site.start_source()?;
    office.site.wait_for_points(1, PATIENCE)?;
    write_noise(&mount.folder().join("after"), 2, 24 * MIB)?;
    mount.unmount()?;
    tool("sync", &[])?;
    let point = office.site.point_now()?;
    let copy = office.folder.path().join("point.img");
    let (from, to) = (format!("if={}", office.disk.node().display()), format!("of={}", copy.display()));
    tool("dd", &[&from, &to, "bs=1M", "iflag=direct", "conv=sparse", "status=none"])?;
    std::fs::File::options().write(true).open(&copy)?.set_len(DISK_BYTES)?;
    Ok((office, point, copy))
}

/// The first bytes of a disk are those of an image, but for these sectors.
fn assert_restored(disk: &Path, image: &Path, but_for: &[u64]) -> Result<()> {
    tool("sync", &[])?;
    let (disk, image) = (std::fs::File::open(disk)?, std::fs::File::open(image)?);
    let (mut is, mut was) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    for at in (0..DISK_BYTES).step_by(MIB as usize) {
        disk.read_exact_at(&mut is, at)?;
        image.read_exact_at(&mut was, at)?;
        let sectors = is.chunks(512).zip(was.chunks(512)).enumerate();
        let differing = sectors.filter(|(_, (is, was))| is != was).map(|(sector, _)| at / 512 + sector as u64);
        for sector in differing {
            ensure!(but_for.contains(&sector), "sector {sector} is not as it was");
        }
    }
    Ok(())
}

/// What is in the file system of partition 2: checked, mounted, compared.
fn assert_files(disk: &LoopDevice, folder: &Path) -> Result<()> {
    let system = disk.partition(2)?;
    tool("e2fsck", &["-f", "-n", &text(&system)?])?;
    let mount = FileSystem::Ext4.mount(&system, &folder.join("restored"))?;
    for (name, seed, bytes) in [("before", 1, 8 * MIB), ("after", 2, 24 * MIB)] {
        let mut expected = vec![0; bytes as usize];
        noise(seed, &mut expected);
        ensure!(std::fs::read(mount.folder().join(name))? == expected, "{name}");
    }
    mount.unmount()
}

/// The lines of `sfdisk --dump` that tell partitions, without the device's name.
fn partitions(disk: &Path) -> Result<Vec<String>> {
    let dump = tool("sfdisk", &["--dump", &text(disk)?])?;
    let lines =
        dump.lines().filter(|line| line.contains("start=")).map(|line| line.split_once(" : ").unwrap_or_default().1);
    Ok(lines.map(str::to_owned).collect())
}

#[test]
fn a_disk_with_a_gpt_comes_back_on_a_larger_one_and_its_table_is_whole() -> Result<()> {
    if !cdp_tests::privileged("a_disk_with_a_gpt_comes_back_on_a_larger_one_and_its_table_is_whole") {
        return Ok(());
    }
    let (mut office, point, image) = office(GPT)?;
    office.site.kill_source()?;
    let rescue = office.rescue()?;
    let new = LoopDevice::new(&office.folder.path().join("new.img"), LARGER_BYTES)?;
    let told = rescue.restore(new.node(), &["--at", "latest", "--dry-run"])?;
    ensure!(told.contains("partition 2 \"system\"") && told.contains("nothing was changed"), "{told}");
    ensure!(std::fs::metadata(new.file()).map(|file| std::os::unix::fs::MetadataExt::blocks(&file))? == 0, "{told}");
    cut_off(&office, &rescue, &new, point)?;
    let document = rescue.document(new.node(), &["--at", "latest"])?;
    ensure!(document["point"]["epoch"] == point && document["disk"]["table_moved"] == true, "{document}");
    ensure!(document["disk"]["unused_bytes"].as_u64() > Some(60 * MIB), "{document}");
    // The first table names the copy's new place, the protective one covers the disk, and no copy stands where the end was.
    assert_restored(new.node(), &image, &[0, 1, DISK_BYTES / 512 - 1])?;
    let verified = tool("sfdisk", &["--verify", &text(new.node())?])?;
    ensure!(verified.contains("No errors detected"), "{verified}");
    ensure!(partitions(new.node())? == partitions(office.disk.node())?);
    let dump = tool("sfdisk", &["--dump", &text(new.node())?])?;
    let last_usable = LARGER_BYTES / 512 - 34;
    ensure!(dump.contains(&format!("last-lba: {last_usable}")), "{dump}");
    assert_files(&new, office.folder.path())?;
    ensure!(!rescue.marker().exists(), "it is over");
    refusals(&office, &rescue)?;
    office.site.verify()
}

/// Kills a restore while it writes: it is told, and the same command goes on.
fn cut_off(office: &Office, rescue: &Rescue, new: &LoopDevice, point: u64) -> Result<()> {
    office.relay.set_rate(Some(40_000_000));
    let mut child = rescue.command(new.node(), &["--at", "latest"]).stderr(std::process::Stdio::piped()).spawn()?;
    let begun = wait_for("the restore to write", PATIENCE, || {
        let written = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(new.file())?);
        Ok((written * 512 > 4 * MIB).then_some(()))
    });
    child.kill()?;
    let output = child.wait_with_output()?;
    begun.with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    office.relay.set_rate(None);
    ensure!(rescue.marker().exists(), "it was killed while it wrote");
    let other = LoopDevice::new(&office.folder.path().join("other.img"), LARGER_BYTES)?;
    let refused = rescue.refused(other.node(), &["--at", "latest"])?;
    let command = format!("--at {point} --disk {}", new.node().display());
    ensure!(refused.contains("another restore is not over") && refused.contains(&command), "{refused}");
    Ok(())
}

/// What is no empty disk of at least the size is not touched.
fn refusals(office: &Office, rescue: &Rescue) -> Result<()> {
    let folder = office.folder.path();
    let small = LoopDevice::new(&folder.join("small.img"), DISK_BYTES - 512)?;
    let refused = rescue.refused(small.node(), &["--at", "latest"])?;
    ensure!(refused.contains(&format!("{DISK_BYTES} are needed")), "{refused}");
    let full = LoopDevice::new(&folder.join("full.img"), DISK_BYTES)?;
    FileSystem::Ext4.make(full.node())?;
    let refused = rescue.refused(full.node(), &["--at", "latest"])?;
    ensure!(refused.contains("holds ext2/3/4") && refused.contains("--discard-current"), "{refused}");
    let mount = FileSystem::Ext4.mount(full.node(), &folder.join("full"))?;
    let refused = rescue.refused(full.node(), &["--at", "latest", "--discard-current"])?;
    ensure!(refused.contains("is mounted on"), "{refused}");
    mount.unmount()?;
    let unknown = LoopDevice::new(&folder.join("unknown.img"), DISK_BYTES)?;
    std::fs::File::options().write(true).open(unknown.node())?.write_all_at(b"who knows", 700_000)?;
    tool("sync", &[])?;
    let refused = rescue.refused(unknown.node(), &["--at", "latest"])?;
    ensure!(refused.contains("is not empty") && refused.contains("--discard-current"), "{refused}");
    let refused = rescue.refused(&office.disk.partition(2)?, &["--at", "latest"])?;
    ensure!(refused.contains("is partition 2 of"), "{refused}");
    let system = FileSystem::Ext4.mount(&office.disk.partition(2)?, &folder.join("system"))?;
    let refused = rescue.refused(office.disk.node(), &["--at", "latest", "--discard-current"])?;
    ensure!(refused.contains("in use") && refused.contains("is mounted on"), "a partition of it: {refused}");
    system.unmount()?;
    let refused = rescue.refused(unknown.node(), &["--at", "latest", "--group", "other"])?;
    ensure!(refused.contains("no group named \"other\"") && refused.contains("it had main"), "{refused}");
    let refused = rescue.refused(unknown.node(), &["--at", "latest", "data"])?;
    ensure!(refused.contains(&format!("it has {}", office.volume())), "{refused}");
    for path in [small.node(), full.node(), unknown.node()] {
        ensure!(!rescue.marker().exists(), "nothing was begun on {}", path.display());
    }
    Ok(())
}

#[test]
fn a_disk_with_an_mbr_comes_back_and_what_is_no_disk_is_not_protected_as_one() -> Result<()> {
    if !cdp_tests::privileged("a_disk_with_an_mbr_comes_back_and_what_is_no_disk_is_not_protected_as_one") {
        return Ok(());
    }
    let script = "label: dos\nsize=1MiB, type=da\nsize=128MiB, type=83, bootable\ntype=5\nsize=16MiB, type=82\n";
    let (mut office, point, image) = office(script)?;
    let refused = |device: &Path| -> Result<String> {
        let refused = office.site.source(&["protect", "--group", "other", "--disk", &text(device)?]);
        Ok(format!("{:#}", refused.err().context("refused")?))
    };
    let again = refused(office.disk.node())?;
    ensure!(again.contains(&format!("is already protected as main/{}", office.volume())), "{again}");
    let partition = refused(&office.disk.partition(2)?)?;
    ensure!(partition.contains("is partition 2 of") && partition.contains("hint: "), "{partition}");
    let file = refused(office.disk.file())?;
    ensure!(file.contains("is an image file"), "{file}");
    office.site.kill_source()?;
    let rescue = office.rescue()?;
    let new = LoopDevice::new(&office.folder.path().join("new.img"), LARGER_BYTES)?;
    let told = rescue.restore(new.node(), &["--at", &point.to_string()])?;
    ensure!(told.contains("MBR partition table") && told.contains("Linux file system, active"), "{told}");
    ensure!(told.contains("bytes behind the last partition are in none") && !told.contains("moved"), "{told}");
    assert_restored(new.node(), &image, &[])?;
    ensure!(partitions(new.node())? == partitions(office.disk.node())?);
    assert_files(&new, office.folder.path())
}
