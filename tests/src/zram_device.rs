//! Compressed memory as a block device: the bio-based device that every machine can have. It goes away when it is dropped.

use crate::process::{tool, wait_for};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::time::Duration;

const CONTROL: &str = "/sys/class/zram-control";

/// Whether the kernel makes zram devices; says on stderr that a test is skipped where it does not.
#[must_use]
pub fn is_there(test: &str) -> bool {
    let there = Path::new(CONTROL).join("hot_add").exists();
    if !there {
        eprintln!("skipped: {test}: no zram (`modprobe zram`)");
    }
    there
}

/// A zram device of its own.
pub struct ZramDevice {
    number: u32,
    node: PathBuf,
}

impl ZramDevice {
    /// Adds one of `size_bytes`, all zeros.
    pub fn new(size_bytes: u64) -> Result<Self> {
        // Reading this file adds a device.
        let number: u32 = std::fs::read_to_string(Path::new(CONTROL).join("hot_add"))?.trim().parse()?;
        let device = Self { number, node: PathBuf::from(format!("/dev/zram{number}")) };
        wait_for("the device's node", Duration::from_secs(10), || Ok(device.node.exists().then_some(())))?;
        device.set_size(size_bytes)?;
        Ok(device)
    }

    /// The device node.
    #[must_use]
    pub fn node(&self) -> &Path {
        &self.node
    }

    /// Gives it a size, after it was made or reset.
    pub fn set_size(&self, size_bytes: u64) -> Result<()> {
        self.put("disksize", size_bytes)
    }

    /// Drops its content and its size. The kernel refuses that while anybody has it open.
    pub fn reset(&self) -> Result<()> {
        self.put("reset", 1)
    }

    fn put(&self, name: &str, value: u64) -> Result<()> {
        let path = format!("/sys/block/zram{}/{name}", self.number);
        std::fs::write(&path, value.to_string()).with_context(|| format!("write {value} to {path}"))
    }
}

impl Drop for ZramDevice {
    fn drop(&mut self) {
        let _ = tool("blockdev", &["--flushbufs", &self.node.display().to_string()]);
        let _ = self.reset();
        let _ = std::fs::write(Path::new(CONTROL).join("hot_remove"), self.number.to_string());
    }
}
