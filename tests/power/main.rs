//! Real power cuts: real file systems over a disk that keeps what was flushed, and a random half of what was not.
//!
//! `journal`: the journal under a workload on ext4, XFS and btrfs, cut at a random write or flush, also during recovery.
//! `programs`: the real server with its store on ext4 and XFS, and a real source that goes on through all of it.
//! Need root, loop devices, FUSE and the file systems' tools; say so and pass over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

mod journal;
mod programs;

use anyhow::{Context, Result, ensure};
use cdp_tests::file_system::FileSystem;
use cdp_tests::loop_device::Mount;
use cdp_tests::power_disk::{Cut, PowerDisk};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system on a disk whose power fails.
pub(crate) struct Machine {
    disk: PowerDisk,
    mount: Option<Mount>,
    kind: FileSystem,
    folder: PathBuf,
}

impl Machine {
    /// Makes the file system below `folder`, and mounts it.
    pub(crate) fn new(folder: &Path, kind: FileSystem, seed: u64) -> Result<Self> {
        let disk = PowerDisk::new(folder, kind.size_bytes(), kind.sector_bytes(), seed)?;
        kind.make(disk.node())?;
        let folder = folder.join("mounted");
        let mount = Some(kind.mount(disk.node(), &folder)?);
        Ok(Self { disk, mount, kind, folder })
    }

    /// Where the file system is mounted.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The disk under it.
    pub(crate) const fn disk(&self) -> &PowerDisk {
        &self.disk
    }

    /// Cuts the power, if it has not failed by itself, and takes away what the kernel still has of the file system. Nobody may
    /// have a file of it open.
    pub(crate) fn down(&mut self) -> Result<Cut> {
        self.disk.cut();
        if let Some(mount) = self.mount.take() {
            mount.unmount()?;
        }
        self.disk.is_cut().context("the power is cut")
    }

    /// The power is back: mounts what was left, which replays the file system's journal.
    ///
    /// ext4 writes its superblock in place, two sectors under one checksum. Where the cut tore that, it is not mounted before
    /// e2fsck has taken a copy of it, as an operator would have it done; the journal is replayed then too.
    pub(crate) fn up(&mut self) -> Result<()> {
        self.disk.power_on()?;
        let mounted = self.kind.mount(self.disk.node(), &self.folder);
        self.mount = Some(match mounted {
            Err(error) if self.kind == FileSystem::Ext4 => {
                self.mend().with_context(|| format!("{error:#}"))?;
                self.kind.mount(self.disk.node(), &self.folder)?
            }
            mounted => mounted?,
        });
        Ok(())
    }

    /// What e2fsck finds wrong, mended, and why that was needed.
    fn mend(&self) -> Result<()> {
        let node = self.disk.node().display().to_string();
        let looked = Command::new("e2fsck").args(["-n", &node]).output()?;
        let said = [looked.stdout, looked.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
        ensure!(said.contains("Superblock checksum does not match"), "another reason than a torn superblock: {said}");
        eprintln!("a cut tore ext4's superblock: e2fsck mends it");
        let status = Command::new("e2fsck").args(["-f", "-y", &node]).output()?.status;
        // 1: it was mended. 2: so it was, were it the root file system.
        ensure!(matches!(status.code(), Some(0..=2)), "e2fsck -f -y {node}: {status}");
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Whoever still has a file open keeps it; the device goes when they have gone.
        drop(self.mount.take());
    }
}

/// Whether these tests can run here.
pub(crate) fn can_run(test: &str) -> bool {
    let lacking = ["mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"].into_iter().find(|tool| !is_tool(tool));
    match lacking.or_else(|| (!Path::new("/dev/fuse").exists()).then_some("/dev/fuse")) {
        Some(lacking) => {
            eprintln!("skipped: {test}: no {lacking} (`./scripts/test` installs what it needs)");
            false
        }
        None => cdp_tests::privileged(test),
    }
}

fn is_tool(name: &str) -> bool {
    ["/usr/sbin", "/sbin", "/usr/bin"].iter().any(|folder| Path::new(folder).join(name).exists())
}

/// A number from the environment.
pub(crate) fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}
