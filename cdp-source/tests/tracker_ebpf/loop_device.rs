//! Loop devices for tests, detached when the test ends, however it ends; and writes past the page cache.

use memmap2::MmapMut;
use rustix::fs::{Mode, OFlags};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

/// An attached loop device.
pub(crate) struct LoopDevice {
    node: PathBuf,
    file: PathBuf,
}

impl LoopDevice {
    /// Attaches a free device to `file`.
    pub(crate) fn attach(file: &Path) -> Self {
        let node = run("losetup", &["--find", "--show", "--partscan", &file.to_string_lossy()]);
        let device = Self { node: node.trim().into(), file: file.to_owned() };
        // A device keeps what was set, whoever had it before.
        device.set_count(true);
        device
    }

    /// Its node.
    pub(crate) fn node(&self) -> &Path {
        &self.node
    }

    /// Detaches it, and attaches the same device to another file.
    pub(crate) fn attach_again(&mut self, file: &Path) {
        self.detach();
        run("losetup", &[&self.node.to_string_lossy(), &file.to_string_lossy()]);
        file.clone_into(&mut self.file);
    }

    /// Changes its size with its file's.
    pub(crate) fn resize(&self, bytes: u64) {
        let file = std::fs::OpenOptions::new().write(true).open(&self.file).expect("opened");
        file.set_len(bytes).expect("resized");
        run("losetup", &["--set-capacity", &self.node.to_string_lossy()]);
    }

    /// Lets the kernel count what it completes, or not.
    pub(crate) fn set_count(&self, counts: bool) {
        let name = self.node.file_name().expect("a name").to_string_lossy();
        std::fs::write(format!("/sys/block/{name}/queue/iostats"), if counts { "1" } else { "0" }).expect("set");
    }

    /// Detaches it.
    pub(crate) fn detach(&self) {
        run("losetup", &["--detach", &self.node.to_string_lossy()]);
    }

    /// Makes one partition, by the same call a partitioning tool makes: kernels without a parser for the table on the
    /// disk have partitions too. Gives its node.
    pub(crate) fn partition(&self, start_sectors: u64, len_sectors: u64) -> PathBuf {
        run("addpart", &[&self.node.to_string_lossy(), "1", &start_sectors.to_string(), &len_sectors.to_string()]);
        let node = PathBuf::from(format!("{}p1", self.node.display()));
        if !node.exists() {
            make_node(&node);
        }
        node
    }
}

/// Makes a partition's node where nothing else does.
fn make_node(node: &Path) {
    let name = node.file_name().expect("a name").to_string_lossy();
    let number = std::fs::read_to_string(format!("/sys/class/block/{name}/dev")).expect("read");
    let (major, minor) = number.trim().split_once(':').expect("two numbers");
    run("mknod", &[&node.to_string_lossy(), "b", major, minor]);
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // What is not there cannot be removed; nothing else may stop the rest.
        drop(Command::new("delpart").arg(&self.node).arg("1").output());
        drop(Command::new("losetup").arg("--detach").arg(&self.node).output());
    }
}

/// A zram device: bio-based.
pub(crate) struct ZramDevice {
    number: u32,
    node: PathBuf,
}

impl ZramDevice {
    /// Makes a device of its own.
    pub(crate) fn new(bytes: u64) -> Self {
        let number = std::fs::read_to_string("/sys/class/zram-control/hot_add").expect("added").trim().to_owned();
        let node = PathBuf::from(format!("/dev/zram{number}"));
        std::fs::write(format!("/sys/block/zram{number}/disksize"), bytes.to_string()).expect("sized");
        if !node.exists() {
            make_node(&node);
        }
        Self { number: number.parse().expect("a number"), node }
    }

    /// Whether there can be any here.
    pub(crate) fn is_supported() -> bool {
        Path::new("/sys/class/zram-control/hot_add").exists()
    }

    /// Its node.
    pub(crate) fn node(&self) -> &Path {
        &self.node
    }

    /// Drops its content, and gives it a size again. Nobody may have it open.
    pub(crate) fn reset(&self, bytes: u64) {
        let put = |name: &str, value: u64| {
            std::fs::write(format!("/sys/block/zram{}/{name}", self.number), value.to_string()).expect("put");
        };
        put("reset", 1);
        put("disksize", bytes);
    }
}

impl Drop for ZramDevice {
    fn drop(&mut self) {
        drop(std::fs::write(format!("/sys/block/zram{}/reset", self.number), "1"));
        drop(std::fs::write("/sys/class/zram-control/hot_remove", self.number.to_string()));
    }
}

/// A device opened to write past the page cache.
pub(crate) struct RawDisk(OwnedFd);

impl RawDisk {
    /// Opens `node`.
    pub(crate) fn open(node: &Path) -> Self {
        Self(rustix::fs::open(node, OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()).expect("opened"))
    }

    /// Fills a range; returns when the device has completed it.
    pub(crate) fn write(&self, offset: u64, len: u64, fill: u8) {
        // A mapping is aligned, as the kernel wants it.
        let mut buffer = MmapMut::map_anon(len as usize).expect("memory");
        buffer.fill(fill);
        let written = rustix::io::pwrite(&self.0, &buffer, offset).expect("written");
        assert_eq!(written as u64, len);
    }
}

/// Bytes of kernel memory of a pinned map; `None` where it is no map.
pub(crate) fn map_bytes(pin: &Path) -> Option<u64> {
    let map = aya::maps::MapData::from_pin(pin).ok()?;
    let path = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
    let text = std::fs::read_to_string(path).expect("read");
    text.lines().find_map(|line| line.strip_prefix("memlock:"))?.trim().parse().ok()
}

/// Runs a command that has to succeed, and gives what it prints.
pub(crate) fn run(command: &str, arguments: &[&str]) -> String {
    let output = Command::new(command).args(arguments).output().expect("started");
    assert!(output.status.success(), "{command} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}
