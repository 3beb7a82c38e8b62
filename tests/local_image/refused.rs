//! What is not an image that can be used, and where none can be made: told, and nothing is harmed by it.

use crate::epoch;
use crate::office::{MIB, Office, SIZE_BYTES, said, succeeded, text, write_noise};
use anyhow::{Context, Result, ensure};
use cdp_protocol::units::{AttemptId, Generation, GroupId};
use cdp_source::local_image::format::Header;
use cdp_tests::file_system::FileSystem;
use cdp_tests::loop_device::LoopDevice;
use std::os::unix::fs::FileExt;
use std::path::Path;

fn flip(path: &Path, at: u64) -> Result<()> {
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    Ok(file.write_all_at(&[!byte[0]], at)?)
}

#[test]
fn damaged_foreign_and_newer_images_are_told_and_the_others_are_used() -> Result<()> {
    if !cdp_tests::privileged("damaged_foreign_and_newer_images_are_told_and_the_others_are_used") {
        return Ok(());
    }
    let mut office = Office::new(1 << 30, 0)?;
    office.init()?;
    let first = epoch(&office.image_now()?)?;
    let other = LoopDevice::new(&office.folder.path().join("other.img"), SIZE_BYTES)?;
    write_noise(office.raw.node(), 40 * MIB, 5, 2 * MIB)?;
    let second = epoch(&office.image_now()?)?;
    let newest = office.files()?.pop().context("an image")?;
    office.site.stop_source()?;
    let (from, to) = (text(&office.folder.path().join("images"))?, text(other.node())?);
    let restore = ["restore", "raw", "--from", &from, "--to", &to, "--discard-current", "--json", "--at"];
    let at = |name| [&restore[..], &[name]].concat();

    // Another key, and no key.
    let key = office.site.state.join("groups/main/data.key");
    let kept = std::fs::read(&key)?;
    std::fs::write(&key, [9; 32])?;
    let refused = office.refused(&at("latest"))?;
    ensure!(refused.contains("was not sealed under this key") && refused.contains("there is none at all"), "{refused}");
    std::fs::write(&key, &kept)?;

    // No such volume, no such point, no such folder.
    let refused = office.refused(&["restore", "nix", "--from", &from, "--to", &to, "--at", "latest"])?;
    ensure!(
        refused.contains("the image has no volume named \"nix\"") && refused.contains("it has data, raw"),
        "{refused}"
    );
    let refused = office.refused(&at("1000000"))?;
    ensure!(
        refused.contains(&format!("there is {second} (")) && refused.contains(&format!(", {first} (")),
        "{refused}"
    );
    ensure!(office.refused(&at("30d"))?.contains("the nearest after is of point"), "an age before all of them");
    let refused = office.refused(&["image", "ls", "--from", &text(office.folder.path())?])?;
    ensure!(refused.contains("is not there") && refused.contains("hint: mount it"), "{refused}");

    // A flipped byte in the middle of what it holds.
    let whole = std::fs::read(&newest)?;
    flip(&newest, whole.len() as u64 / 2)?;
    let output = office.command(None, &["image", "verify"]).output()?;
    let (told, stderr) = (String::from_utf8_lossy(&output.stdout).into_owned(), said(&output, &["image", "verify"])?);
    ensure!(told.contains("DAMAGED") && told.contains("the frame at") && told.contains("whole"), "{told}");
    ensure!(stderr.contains("1 of 2 images are damaged"), "{stderr}");
    ensure!(office.site.source(&["image", "ls"])?.contains("DAMAGED"), "it is kept in mind");
    // Where there is an old volume, that has them; a machine that has the key alone does without.
    let rescue = office.key_alone()?;
    let output = office.command(Some(rescue.path()), &at("latest")).output()?;
    let stderr = said(&output, &restore)?;
    ensure!(
        stderr.contains("was found damaged") && stderr.contains("cannot be had, and are left as they were"),
        "{stderr}"
    );

    // Cut short, and of a newer program: passed over, the older one is used.
    std::fs::write(&newest, &whole[..whole.len() - 100])?;
    let output = office.command(None, &at("latest")).output()?;
    ensure!(succeeded(&output, &restore)?["point"]["epoch"] == first, "the older one");
    ensure!(String::from_utf8_lossy(&output.stderr).contains("it is cut short"), "{output:?}");
    std::fs::write(&newest, &whole)?;
    std::fs::File::options().write(true).open(&newest)?.write_all_at(&[2], 8)?;
    let listed = office.command(None, &["image", "ls"]).output()?;
    ensure!(String::from_utf8_lossy(&listed.stderr).contains("a newer program made it"), "{listed:?}");

    // Another group's, under a name of ours.
    let header = Header { group: GroupId([7; 16]), attempt: AttemptId([1; 16]), generation: Generation(1) };
    std::fs::write(&newest, [&header.encode()[..], &whole[64..]].concat())?;
    let refused = office.refused(&["restore", "raw", "--from", &text(&newest)?, "--to", &to, "--at", "latest"])?;
    ensure!(refused.contains("is of another group (0707"), "{refused}");

    std::fs::write(&newest, &whole)?;
    let output = office.command(None, &at("latest")).output()?;
    ensure!(succeeded(&output, &restore)?["point"]["epoch"] == second, "as it was");
    cdp_tests::image::assert_same(other.node(), &office.raw_now()?)
}

#[test]
fn a_full_disk_and_a_share_that_is_gone_are_alarms_and_points_go_on() -> Result<()> {
    if !cdp_tests::privileged("a_full_disk_and_a_share_that_is_gone_are_alarms_and_points_go_on") {
        return Ok(());
    }
    let mut office = Office::new(24 * MIB, 0)?;
    let metrics = cdp_tests::metrics::serve(&office.site.state.join("source.toml"))?;
    office.site.stop_source()?;
    office.start_agent()?;
    office.site.point_now()?;
    let refused = office.refused(&["image", "now"])?;
    ensure!(refused.contains("is not there") && refused.contains("cdp-source image init"), "not made ready: {refused}");

    // On a volume that it would be an image of.
    let mount = FileSystem::Ext4.mount(office.data.node(), &office.folder.path().join("mounted"))?;
    let refused = office.refused(&["image", "init", "--from", &text(mount.folder())?])?;
    ensure!(refused.contains("lies on /dev/loop") && refused.contains("which is protected"), "{refused}");
    ensure!(std::fs::read_dir(mount.folder())?.count() == 1, "nothing was put there but lost+found by mkfs");
    mount.unmount()?;

    office.init()?;
    let refused = office.refused(&["image", "now"])?;
    ensure!(refused.contains("No space left on device") && refused.contains("hint: the disk is full"), "{refused}");
    ensure!(office.files()?.is_empty() && !office.images().join("making.partial").exists(), "nothing is left");
    let status = office.site.source(&["status"])?;
    ensure!(status.contains("ALARM: local image: the last try") && status.contains("No space left"), "{status}");
    let metric = "cdp_source_local_image_failed{group=\"main\"} 1";
    cdp_tests::process::wait_for("the metric", cdp_tests::site::PATIENCE, || {
        Ok(cdp_tests::metrics::scrape(&metrics)?.contains(metric).then_some(()))
    })?;
    office.site.point_now().context("points go on")?;

    // The disk is taken away: what is below its mount point is an empty folder.
    office.mount.take().context("mounted")?.unmount()?;
    let below = office.folder.path().join("images");
    let refused = office.refused(&["image", "now"])?;
    ensure!(refused.contains("is not there") && refused.contains("hint: mount it"), "{refused}");
    ensure!(std::fs::read_dir(&below)?.count() == 0, "nothing is written below the mount point");
    office.site.point_now().context("points go on")?;

    // A larger one, in its place.
    let larger = LoopDevice::new(&office.folder.path().join("larger.img"), 1 << 30)?;
    FileSystem::Ext4.make(larger.node())?;
    let mount = FileSystem::Ext4.mount(larger.node(), &below)?;
    office.init()?;
    let made = epoch(&office.image_now()?)?;
    office.assert_is_the_targets(made)?;
    let status = office.site.source(&["status"])?;
    ensure!(!status.contains("ALARM"), "{status}");
    office.site.stop_source()?;
    mount.unmount()
}
