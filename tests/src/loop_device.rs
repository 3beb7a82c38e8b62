//! Loop devices and mounts that go away when they are dropped.

use crate::process::{tool, wait_for};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A loop device over a file of its own.
pub struct LoopDevice {
    node: PathBuf,
    file: PathBuf,
    /// It was made for the test, and goes with it.
    is_numbered: bool,
}

impl LoopDevice {
    /// Makes a sparse file of `size_bytes` at `file` and attaches it.
    pub fn new(file: &Path, size_bytes: u64) -> Result<Self> {
        std::fs::File::create_new(file)?.set_len(size_bytes)?;
        Self::attach(file)
    }

    /// Attaches an existing file, its partitions included.
    pub fn attach(file: &Path) -> Result<Self> {
        Self::attach_with(file, "--partscan")
    }

    /// Attaches an existing file with an option of `losetup`'s.
    pub fn attach_with(file: &Path, option: &str) -> Result<Self> {
        let file_text = file.to_str().context("a path of text")?;
        let node = tool("losetup", &["--find", "--show", "--direct-io=on", option, file_text])?;
        Ok(Self { node: PathBuf::from(node.trim()), file: file.to_owned(), is_numbered: false })
    }

    /// The device node.
    #[must_use]
    pub fn node(&self) -> &Path {
        &self.node
    }

    /// The file behind it.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The node of partition `number`, once devtmpfs has it. Tells the kernel of the partitions: not every kernel reads
    /// the tables itself.
    pub fn partition(&self, number: u32) -> Result<PathBuf> {
        tool("partx", &["--update", &self.node.display().to_string()])?;
        let node = PathBuf::from(format!("{}p{number}", self.node.display()));
        wait_for("the partition's node", Duration::from_secs(10), || Ok(node.exists().then_some(())))?;
        Ok(node)
    }

    /// Makes partition `number` of `sectors` from sector `start` on without any table, by the call a partitioning tool makes.
    pub fn add_partition(&self, number: u32, start: u64, sectors: u64) -> Result<PathBuf> {
        let (number_text, start, sectors) = (number.to_string(), start.to_string(), sectors.to_string());
        tool("addpart", &[&self.node.display().to_string(), &number_text, &start, &sectors])?;
        let node = PathBuf::from(format!("{}p{number}", self.node.display()));
        wait_for("the partition's node", Duration::from_secs(10), || Ok(node.exists().then_some(())))?;
        Ok(node)
    }

    /// Attaches an existing file to device `number`, which nobody finds free: it can be made anew (`start_anew`).
    pub fn attach_numbered(file: &Path, number: u32) -> Result<Self> {
        let node = PathBuf::from(format!("/dev/loop{number}"));
        let mut device = Self { node, file: file.to_owned(), is_numbered: true };
        // What a test that was killed has left.
        let _ = loop_control(REMOVE, number);
        loop_control(ADD, number)?;
        device.reattach(file)?;
        Ok(device)
    }

    /// Removes the device and makes it anew over the same file, as a boot does: it has another sequence number, and its counts begin at zero.
    pub fn start_anew(&mut self) -> Result<()> {
        let number = self.number()?;
        self.detach()?;
        wait_for("the device to be removed", Duration::from_secs(10), || Ok(loop_control(REMOVE, number).ok()))?;
        loop_control(ADD, number)?;
        let file = self.file.clone();
        self.reattach(&file)
    }

    fn number(&self) -> Result<u32> {
        let name = self.node.file_name().unwrap_or_default().to_string_lossy();
        Ok(name.trim_start_matches("loop").parse()?)
    }

    /// Takes the file away, and waits until it is gone: nobody may hold the device open.
    pub fn detach(&self) -> Result<()> {
        let node = self.node.to_str().context("a path of text")?;
        tool("losetup", &["--detach", node])?;
        wait_for("the device to be free", Duration::from_secs(10), || {
            Ok(tool("losetup", &[node]).is_err().then_some(()))
        })
    }

    /// Puts another file behind the same device node.
    pub fn reattach(&mut self, file: &Path) -> Result<()> {
        self.reattach_with(file, &[])
    }

    /// Puts a window of a file behind the same device node.
    pub fn reattach_at(&mut self, file: &Path, offset_bytes: u64, size_bytes: u64) -> Result<()> {
        let (offset, size) = (offset_bytes.to_string(), size_bytes.to_string());
        self.reattach_with(file, &["--offset", &offset, "--sizelimit", &size])
    }

    fn reattach_with(&mut self, file: &Path, options: &[&str]) -> Result<()> {
        let node = self.node.to_str().context("a path of text")?;
        if tool("losetup", &[node]).is_ok() {
            self.detach()?;
        }
        let file_text = file.to_str().context("a path of text")?;
        let arguments = [options, &["--partscan", "--direct-io=on", node, file_text]].concat();
        wait_for("the device to be free", Duration::from_secs(10), || Ok(tool("losetup", &arguments).ok()))?;
        file.clone_into(&mut self.file);
        Ok(())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let name = self.node.file_name().unwrap_or_default();
        let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
        // Once detached, the number may have become another test's.
        let is_ours = std::fs::read_to_string(backing).is_ok_and(|file| Path::new(file.trim_end()) == self.file);
        if !is_ours {
            return;
        }
        let _ = tool("partx", &["--delete", &self.node.display().to_string()]);
        if self.is_numbered {
            // Others are left to whoever finds them free.
            let removed = self.detach().and_then(|()| self.number()).and_then(|number| loop_control(REMOVE, number));
            drop(removed);
        } else {
            let _ = tool("losetup", &["--detach", &self.node.display().to_string()]);
        }
    }
}

/// Calls of `/dev/loop-control` (linux/loop.h).
const ADD: u32 = 0x4c80;
const REMOVE: u32 = 0x4c81;

fn loop_control(call: u32, number: u32) -> Result<()> {
    let script = format!("open(F, '+<', '/dev/loop-control') && defined ioctl(F, {call}, {number}) or die $!");
    tool("perl", &["-e", &script]).map(drop)
}

/// A mounted file system.
pub struct Mount {
    folder: PathBuf,
}

impl Mount {
    /// Mounts `device` on `folder`, which is made.
    pub fn new(device: &Path, folder: &Path, options: &str) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let (device, folder_text) = (device.display().to_string(), folder.display().to_string());
        tool("mount", &["-o", options, &device, &folder_text])?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Unmounts. A program that another thread is just starting holds copies of all open files until it runs: the folder may be
    /// busy for a moment.
    pub fn unmount(self) -> Result<()> {
        let folder = self.folder.display().to_string();
        let mut busy = None;
        let unmounted = wait_for("the folder to be free", Duration::from_secs(10), || {
            busy = tool("umount", &[&folder]).err();
            Ok(busy.is_none().then_some(()))
        });
        if unmounted.is_ok() {
            std::mem::forget(self);
        }
        unmounted.with_context(|| busy.map_or_else(String::new, |error| format!("{error:#}")))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = tool("umount", &["--lazy", &self.folder.display().to_string()]);
    }
}
