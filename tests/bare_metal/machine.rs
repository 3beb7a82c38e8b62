//! An office whose one volume is a partitioned disk, and the rescue system of its new hardware.

use anyhow::{Context, Result, ensure};
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::{program, tool};
use cdp_tests::relay::Relay;
use cdp_tests::site::Site;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// What takes the right to BPF away, and to anything else that an agent does with the kernel: as on one that has none of it.
const WITHOUT_BPF: [&str; 4] = ["setpriv", "--bounding-set", "-bpf,-perfmon,-sys_admin", "--"];
/// The same in a mount namespace without the BPF file system.
const WITHOUT_BPFFS: &str = "umount --lazy /sys/fs/bpf 2>/dev/null; exec \"$0\" \"$@\"";

/// An office, its disk, and the line to its target.
pub(crate) struct Office {
    // Dropped in this order: programs, line, device, folder.
    pub(crate) site: Site,
    pub(crate) relay: Relay,
    pub(crate) disk: LoopDevice,
    pub(crate) folder: tempfile::TempDir,
}

impl Office {
    /// An office that has joined, with the disk that is in `image`.
    pub(crate) fn new(folder: tempfile::TempDir, image: &Path) -> Result<Self> {
        let disk = LoopDevice::attach(image)?;
        let (site, relay) = Site::new_behind_a_line(folder.path(), &folder.path().join("target"))?;
        Ok(Self { site, relay, disk, folder })
    }

    /// Protects the disk; gives what the command prints.
    pub(crate) fn protect(&self) -> Result<String> {
        self.site.source(&["protect", "--disk", &text(self.disk.node())?])
    }

    /// The name of the disk's volume.
    pub(crate) fn volume(&self) -> String {
        self.disk.node().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// New hardware of the office: it has joined with a bundle of `--replace`, and knows nothing else.
    pub(crate) fn rescue(&self) -> Result<Rescue> {
        let bundle = text(&self.folder.path().join("replace.bundle"))?;
        self.site.target(&["enroll", "office", "--replace", "--output", &bundle])?;
        let site = self.site.beside(self.folder.path().join("rescue"));
        site.source(&["join", &bundle, "--target", self.relay.address()])?;
        Ok(Rescue { site })
    }
}

/// A rescue system.
pub(crate) struct Rescue {
    pub(crate) site: Site,
}

impl Rescue {
    pub(crate) fn command(&self, disk: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(WITHOUT_BPF[0]);
        command.args(&WITHOUT_BPF[1..]).arg(program("cdp-source"));
        command.args(["restore", "--disk"]).arg(disk).args(arguments);
        command.env("CDP_SOURCE_STATE", &self.site.state).stdin(Stdio::null());
        command
    }

    pub(crate) fn output(&self, disk: &Path, arguments: &[&str]) -> Result<Output> {
        Ok(self.command(disk, arguments).output()?)
    }

    /// A restore that goes well; gives what it prints on either stream.
    pub(crate) fn restore(&self, disk: &Path, arguments: &[&str]) -> Result<String> {
        let output = self.output(disk, arguments)?;
        let told = [output.stdout, output.stderr].concat();
        let told = String::from_utf8_lossy(&told).into_owned();
        ensure!(output.status.success(), "restore {arguments:?}: {}: {told}", output.status);
        Ok(told)
    }

    /// One that is refused with exit status 1; gives what it says.
    pub(crate) fn refused(&self, disk: &Path, arguments: &[&str]) -> Result<String> {
        let output = self.output(disk, arguments)?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(1), "restore {arguments:?}: {}: {stderr}", output.status);
        Ok(stderr)
    }

    /// One that goes well and tells a document, where the BPF file system is not even mounted.
    pub(crate) fn document(&self, disk: &Path, arguments: &[&str]) -> Result<Value> {
        let bare = self.command(disk, &[arguments, &["--json"]].concat());
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", WITHOUT_BPFFS]).arg(bare.get_program()).args(bare.get_args());
        command.env("CDP_SOURCE_STATE", &self.site.state).stdin(Stdio::null());
        let output = command.output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "restore {arguments:?}: {}: {stderr}", output.status);
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// The file that tells that a restore is not over.
    pub(crate) fn marker(&self) -> PathBuf {
        self.site.state.join("groups/main/restoring.json")
    }
}

/// Makes a disk image of so many bytes with the table that `sfdisk` makes of a script.
pub(crate) fn partitioned(image: &Path, size_bytes: u64, script: &str) -> Result<()> {
    std::fs::File::create_new(image)?.set_len(size_bytes)?;
    let path = image.with_extension("sfdisk");
    std::fs::write(&path, script)?;
    tool("sh", &["-c", "sfdisk --quiet \"$0\" <\"$1\"", &text(image)?, &text(&path)?]).map(drop)
}

pub(crate) fn text(path: &Path) -> Result<String> {
    Ok(path.to_str().context("a path of text")?.to_owned())
}
