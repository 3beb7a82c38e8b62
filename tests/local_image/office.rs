//! An office with two volumes, and a disk of its own for their images.

use anyhow::{Context, Result, ensure};
use cdp_tests::file_system::FileSystem;
use cdp_tests::files::noise;
use cdp_tests::loop_device::{LoopDevice, Mount};
use cdp_tests::process::{program, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use serde_json::Value;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const SIZE_BYTES: u64 = 96 * MIB;

pub(crate) struct Office {
    // Dropped in this order: programs, mount, devices, folder.
    pub(crate) site: Site,
    pub(crate) mount: Option<Mount>,
    _disk: LoopDevice,
    pub(crate) data: LoopDevice,
    pub(crate) raw: LoopDevice,
    pub(crate) folder: tempfile::TempDir,
}

impl Office {
    /// A volume with ext4 on it, and one without; images on a disk of so many bytes, read at so many bytes a second. The agent runs and has made a point.
    pub(crate) fn new(disk_bytes: u64, bytes_per_s: u64) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let device = |name: &str, size_bytes| LoopDevice::new(&folder.path().join(name), size_bytes);
        let (disk, data, raw) =
            (device("disk.img", disk_bytes)?, device("data.img", SIZE_BYTES)?, device("raw.img", SIZE_BYTES)?);
        FileSystem::Ext4.make(disk.node())?;
        FileSystem::Ext4.make(data.node())?;
        let mount = FileSystem::Ext4.mount(disk.node(), &folder.path().join("images"))?;
        let mut site = Site::new(folder.path())?;
        site.source(&[
            "protect",
            &format!("data={}", data.node().display()),
            &format!("raw={}", raw.node().display()),
        ])?;
        site.set_group_option("interval_ms = 200")?;
        for line in [
            format!("local_image.folder = \"{}\"", mount.folder().display()),
            format!("local_image.bytes_per_s = {bytes_per_s}"),
            "local_image.keep = 2".to_owned(),
            // So far away that none is made but those that are asked for.
            "local_image.every_s = 31536000".to_owned(),
            "local_image.at = \"00:00\"".to_owned(),
        ] {
            site.set_group_option(&line)?;
        }
        write_noise(data.node(), 50 * MIB, 1, 8 * MIB)?;
        write_noise(raw.node(), 3 * MIB, 2, 24 * MIB)?;
        site.start_source()?;
        site.wait_for_points(1, PATIENCE)?;
        Ok(Self { site, mount: Some(mount), _disk: disk, data, raw, folder })
    }

    /// Starts the agent, and waits until it can be asked.
    pub(crate) fn start_agent(&mut self) -> Result<()> {
        self.site.start_source()?;
        wait_for("an agent that answers", PATIENCE, || Ok(self.site.source_status().ok()))?;
        Ok(())
    }

    /// Where the images are.
    pub(crate) fn images(&self) -> PathBuf {
        self.folder.path().join("images/main")
    }

    pub(crate) fn init(&self) -> Result<()> {
        self.site.source(&["image", "init"]).map(drop)
    }

    /// An image now; gives what is told of it.
    pub(crate) fn image_now(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.site.source(&["image", "now", "--json"])?)?)
    }

    /// Runs the source's program, on another state folder where one is given.
    pub(crate) fn command(&self, state: Option<&Path>, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("cdp-source"));
        command.args(arguments).env("CDP_SOURCE_STATE", state.unwrap_or(&self.site.state)).stdin(Stdio::null());
        command
    }

    /// A command that has to be refused with exit status 1; gives what it says.
    pub(crate) fn refused(&self, arguments: &[&str]) -> Result<String> {
        said(&self.command(None, arguments).output()?, arguments)
    }

    /// Files with an image's name, in order.
    pub(crate) fn files(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(self.images())? {
            let path = entry?.path();
            files.extend(path.extension().is_some_and(|suffix| suffix == "cdpimage").then_some(path));
        }
        files.sort();
        Ok(files)
    }

    /// A point exported from the target; gives the folder with `data.raw` and `raw.raw`, and the manifest.
    pub(crate) fn export(&self, epoch: u64) -> Result<(PathBuf, Value)> {
        let output = self.folder.path().join(format!("export-{epoch}"));
        let at = epoch.to_string();
        let document =
            self.site.target(&["export", "office/main", "--at", &at, "--output", &text(&output)?, "--json"])?;
        Ok((output, serde_json::from_str(&document)?))
    }

    /// The image of this point is, byte for byte, what the target holds of it: by the hash of each volume, and restored to other devices
    /// from a state folder that has the key and nothing else.
    pub(crate) fn assert_is_the_targets(&self, epoch: u64) -> Result<()> {
        // The point is on its way to the target, perhaps.
        self.site.point_now()?;
        let (folder, exported) = self.export(epoch)?;
        let listed: Value = serde_json::from_str(&self.site.source(&["image", "ls", "--json"])?)?;
        let images = listed["images"].as_array().context("images")?;
        let image =
            images.iter().find(|image| image["epoch"] == epoch).with_context(|| format!("an image in {listed}"))?;
        for name in ["data", "raw"] {
            let of = |list: &Value, key: &str| {
                list.as_array()
                    .and_then(|list| list.iter().find(|entry| entry[key] == name))
                    .map(|entry| entry["blake3"].clone())
            };
            let (here, there) = (of(&image["volumes"], "name"), of(&exported["images"], "volume"));
            ensure!(here.is_some() && here == there, "{name} of point {epoch}: {here:?} here, {there:?} at the target");
            let file = self.folder.path().join(format!("restored-{name}.img"));
            let other = LoopDevice::new(&file, SIZE_BYTES)?;
            self.restore_with_the_key_alone(name, epoch, other.node())?;
            let exported = folder.join(format!("{name}.raw"));
            cdp_tests::image::assert_same(other.node(), &exported)
                .with_context(|| format!("{name} of point {epoch}"))?;
            drop(other);
            std::fs::remove_file(&file)?;
        }
        Ok(std::fs::remove_dir_all(&folder)?)
    }

    /// A copy of the volume without a file system, as it is now.
    pub(crate) fn raw_now(&self) -> Result<PathBuf> {
        let copy = self.folder.path().join("raw-now.img");
        let (from, to) = (format!("if={}", self.raw.node().display()), format!("of={}", copy.display()));
        cdp_tests::process::tool("dd", &[&from, &to, "bs=1M", "iflag=direct", "status=none"])?;
        Ok(copy)
    }

    /// The state folder of a machine that has nothing but the group's key.
    pub(crate) fn key_alone(&self) -> Result<tempfile::TempDir> {
        let state = tempfile::tempdir_in(self.folder.path())?;
        std::fs::create_dir_all(state.path().join("groups/main"))?;
        std::fs::copy(self.site.state.join("groups/main/data.key"), state.path().join("groups/main/data.key"))?;
        Ok(state)
    }

    /// Restores to another device on a machine that has nothing but the group's key.
    pub(crate) fn restore_with_the_key_alone(&self, volume: &str, epoch: u64, to: &Path) -> Result<()> {
        let state = self.key_alone()?;
        let (at, to, from) = (epoch.to_string(), text(to)?, text(&self.folder.path().join("images"))?);
        let arguments = ["restore", volume, "--at", &at, "--to", &to, "--from", &from, "--discard-current", "--json"];
        let output = self.command(Some(state.path()), &arguments).output()?;
        let document: Value = succeeded(&output, &arguments)?;
        ensure!(document["line_bytes"] == 0, "{document}");
        Ok(())
    }

    /// What the agent's status tells of the images.
    pub(crate) fn standing(&self) -> Result<Value> {
        Ok(self.site.source_status()?["local_image"].clone())
    }

    /// Waits until an image is made, and is that far.
    pub(crate) fn wait_for_phase(&self, phase: &str) -> Result<()> {
        wait_for(&format!("an image in phase {phase}"), PATIENCE, || {
            Ok((self.standing()?["phase"] == phase).then_some(()))
        })
    }
}

/// What a command says that is refused with exit status 1.
pub(crate) fn said(output: &Output, arguments: &[&str]) -> Result<String> {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1), "{arguments:?}: {}: {stderr}", output.status);
    Ok(stderr)
}

/// What a command tells that goes well.
pub(crate) fn succeeded(output: &Output, arguments: &[&str]) -> Result<Value> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{arguments:?}: {}: {stderr}", output.status);
    Ok(serde_json::from_slice(&output.stdout)?)
}

pub(crate) fn text(path: &Path) -> Result<String> {
    Ok(path.to_str().context("a path of text")?.to_owned())
}

/// Writes what does not compress.
pub(crate) fn write_noise(device: &Path, at: u64, seed: u64, bytes: u64) -> Result<()> {
    let file = std::fs::File::options().write(true).open(device)?;
    let mut chunk = vec![0; MIB as usize];
    for number in 0..bytes / MIB {
        noise(seed << 32 | number, &mut chunk);
        file.write_all_at(&chunk, at + number * MIB)?;
    }
    Ok(file.sync_all()?)
}

/// Somebody who writes to a device all the time, past the page cache: a few blocks over and over, with one of two contents (so that they are
/// often what they were), and one here and there.
pub(crate) struct Writer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
}

impl Writer {
    pub(crate) fn start(device: PathBuf) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        Self { stop, thread: std::thread::spawn(move || write(&device, &stopped)) }
    }

    pub(crate) fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the writer does not panic")
    }
}

fn write(device: &Path, stopped: &AtomicBool) -> Result<u64> {
    let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
    let file = std::fs::File::options().write(true).custom_flags(direct).open(device)?;
    let mut room = vec![0; 3 * 4096];
    let start = room.as_ptr().align_offset(4096);
    let mut writes = 0;
    while !stopped.load(Ordering::Relaxed) {
        let mut drawn = [0; 8];
        noise(writes, &mut drawn);
        let drawn = u64::from_le_bytes(drawn);
        let block = &mut room[start..start + 4096];
        let at = match drawn % 8 {
            0..=2 => (drawn >> 8) % (SIZE_BYTES / 4096),
            _ => (drawn >> 8) % 32 * 700,
        };
        match drawn % 8 {
            // Zeros, too.
            0 => block.fill(0),
            1 | 2 => noise(writes, block),
            _ => noise(at * 2 + (drawn >> 32) % 2, block),
        }
        file.write_all_at(block, at * 4096)?;
        writes += 1;
        // As fast as an application, not as fast as the disk.
        std::thread::park_timeout(Duration::from_micros(500));
    }
    Ok(writes)
}
