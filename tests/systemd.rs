//! The packaged units under a real systemd, which boots, mounts what is protected, and goes down.
//!
//! It is process 1 of namespaces of its own (`systemd/boot.sh`); kernel and devices are this machine's. The boot is another one to the agent
//! (boot id, pins), and to the device (made anew). Needs root, overlayfs, systemd, kernel BTF and loop devices.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::{Daemon, program, tool, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

const DISK_BYTES: u64 = 64 << 20;

/// A machine that systemd has started.
struct Booted {
    unshare: Daemon,
    /// Of systemd, as it is seen from outside.
    pid: String,
}

impl Booted {
    fn start(site: &Site, device: &LoopDevice, folder: &Path, number: u32) -> Result<Self> {
        let root = folder.join(format!("root-{number}"));
        std::fs::create_dir(&root)?;
        let boot_id = folder.join(format!("boot-{number}"));
        std::fs::write(&boot_id, format!("{number:08}-0000-4000-8000-000000000000\n"))?;
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--cgroup"]);
        command.arg(here.join("systemd/boot.sh")).env("ROOT", root).env("BOOT_ID", boot_id);
        command.env("STATE", &site.state).env("DATA", &site.data).env("DISK", device.node());
        command.env("UNITS", here.join("../packaging/systemd"));
        command.env("BIN", program("cdp-source").parent().context("a folder of programs")?);
        let mut unshare = Daemon::start(&mut command)?;
        let parent = unshare.id().to_string();
        let pid = wait_for("systemd to be process 1", PATIENCE, || {
            ensure!(unshare.is_running()?, "{}", unshare.log());
            let child = tool("pgrep", &["--parent", &parent, "--exact", "systemd"]).unwrap_or_default();
            Ok(Some(child.trim().to_owned()).filter(|child| !child.is_empty()))
        });
        let pid = pid.with_context(|| unshare.log())?;
        Ok(Self { unshare, pid })
    }

    /// Runs a tool in it.
    fn run(&self, arguments: &[&str]) -> Result<String> {
        let enter = ["--target", &self.pid, "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--root"];
        tool("nsenter", &[&enter[..], arguments].concat())
    }

    fn wait_for_active(&self, unit: &str) -> Result<()> {
        let active = wait_for(unit, PATIENCE, || Ok(self.run(&["systemctl", "is-active", "--quiet", unit]).ok()));
        active.map(drop).with_context(|| {
            let status = self.run(&["journalctl", "--no-pager", "--unit", unit]);
            format!("{unit} is not active: {status:?}")
        })
    }

    /// Shuts it down as an operator does.
    fn power_off(mut self) -> Result<()> {
        self.run(&["systemctl", "poweroff", "--no-block"])?;
        wait_for("the machine to be down", PATIENCE, || Ok((!self.unshare.is_running()?).then_some(())))
    }
}

#[test]
fn a_machine_that_is_shut_down_and_started_again_needs_no_comparison() -> Result<()> {
    if !cdp_tests::privileged("a_machine_that_is_shut_down_and_started_again_needs_no_comparison") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("disk.img");
    std::fs::File::create_new(&file)?.set_len(DISK_BYTES)?;
    let mut device = LoopDevice::attach_numbered(&file, 2100)?;
    let node = device.node().display().to_string();
    tool("mkfs.ext4", &["-q", "-F", &node])?;
    let mut site = Site::new(folder.path())?;
    site.source(&["protect", &format!("data={node}")])?;
    site.stop_target()?;

    let machine = Booted::start(&site, &device, folder.path(), 1)?;
    for unit in ["cdp-source.service", "srv-data.mount", "cdp-target.service"] {
        machine.wait_for_active(unit)?;
    }
    site.point_now()?;
    // The line is down when the last of it is written, and the machine is shut down with all of it mounted.
    machine.run(&["systemctl", "stop", "cdp-target.service"])?;
    machine.run(&["dd", "if=/dev/urandom", "of=/srv/data/new", "bs=1M", "count=2", "conv=fsync", "status=none"])?;
    machine.power_off()?;
    let record = site.state.join("groups/main/tracking/saved");
    ensure!(record.exists(), "the agent did not stop behind the unmounting of what it protects");

    device.start_anew()?;
    let machine = Booted::start(&site, &device, folder.path(), 2)?;
    for unit in ["cdp-source.service", "srv-data.mount", "cdp-target.service"] {
        machine.wait_for_active(unit)?;
    }
    site.point_now()?;
    let status: Value = site.source_status()?;
    ensure!(status["tracker"]["kind"] == "ebpf", "{status}");
    ensure!(status["tracker"]["taken_up"].is_string(), "the agent started before the mount: {status}");
    ensure!(status["tracker"]["started_over"].is_null() && !record.exists(), "{status}");
    let sent = status["acked_bytes"].as_u64().context("acked_bytes")?;
    eprintln!(
        "shut down with 2 MiB dirty and started again: {} taken up, {sent} bytes sent",
        status["tracker"]["taken_up"]
    );
    ensure!((2 << 20..DISK_BYTES / 8).contains(&sent), "{sent} bytes were sent");
    machine.power_off()
}
