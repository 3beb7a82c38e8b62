//! What a protected device is: which disk, which window of it, how large, of what kind.
//!
//! Owns the reading of sysfs. A `Device` is what was found when it was inspected; `watch` tells whether it still is. Does not
//! open the device.

use super::TrackerError;
use super::dm_table::DmTable;
use super::kernel_file::strange;
use crate::reader::ReadTarget;
use cdp_protocol::units::{SECTOR_BYTES, Sectors, VOLUME_BYTES_MAX};
use cdp_seams::storage::{Storage, SystemStorage};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// A block device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceNumber {
    /// The driver's.
    pub major: u32,
    /// The device's.
    pub minor: u32,
}

impl DeviceNumber {
    /// The number as `stat` gives it.
    #[must_use]
    pub fn of_stat(number: u64) -> Self {
        Self { major: rustix::fs::major(number), minor: rustix::fs::minor(number) }
    }

    /// The number as the kernel holds it (`dev_t` within the kernel, not the one of `stat`).
    #[must_use]
    pub const fn to_kernel(self) -> u32 {
        self.major << 20 | self.minor
    }

    pub(crate) fn sysfs(self) -> PathBuf {
        PathBuf::from(format!("/sys/dev/block/{self}"))
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// How a device takes its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// Through requests: SCSI, SATA, NVMe, virtio, loop.
    Request,
    /// Through bios: device-mapper, md, zram.
    Bio,
}

/// A block device as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The path it was found by.
    pub path: PathBuf,
    /// Its own number.
    pub number: DeviceNumber,
    /// The number of the whole disk; its own where it is one.
    pub disk: DeviceNumber,
    /// Node of the whole disk.
    pub disk_node: PathBuf,
    /// Where its window of the disk begins.
    pub start: Sectors,
    /// How long the window is.
    pub length: Sectors,
    /// The disk's sequence number: another one is another disk, or another file under a loop device.
    pub diskseq: u64,
    /// How it takes its work.
    pub kind: DeviceKind,
    /// Nothing can be written to it.
    pub read_only: bool,
    /// It has zones that are written in order.
    pub zoned: bool,
    /// It can be written past the block layer.
    pub dax: bool,
    /// The kernel counts what is done on the whole disk.
    pub iostats: bool,
    /// Names of the hidden disks that its requests complete on, where it is the head of native NVMe multipath.
    pub paths: Vec<String>,
    /// Hash of the device-mapper table of the whole disk, where it has one.
    pub table: Option<String>,
}

impl Device {
    /// What the device behind `path` is.
    ///
    /// # Errors
    /// Where there is none, it is no block device, it has no size, no tracker can know what is written to it (zoned,
    /// DAX, persistent memory), or sysfs does not tell.
    pub fn inspect(path: &Path) -> Result<Self, TrackerError> {
        let refuse = |reason: &str| unsupported(path, reason);
        let stat = match rustix::fs::stat(path) {
            Err(rustix::io::Errno::NOENT) => return Err(refuse("does not exist")),
            other => other.map_err(|error| io_error(path, error.into()))?,
        };
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::BlockDevice {
            return Err(refuse("is not a block device (an image file is tracked by `scan`)"));
        }
        let number = DeviceNumber::of_stat(stat.st_rdev);
        Self::of_number(path, number).map_err(|error| io_error(path, error))?.usable()
    }

    fn of_number(path: &Path, number: DeviceNumber) -> io::Result<Self> {
        let folder = number.sysfs();
        let disk_folder = disk_folder(number);
        let partition = folder.join("partition");
        let start = if rustix::fs::stat(&partition).is_ok() { read_number(&folder.join("start"))? } else { 0 };
        let disk = parse_device(&read_text(&disk_folder.join("dev"))?)?;
        let disk_node = disk_node(&disk_folder, disk)?;
        let paths = multipath_paths(Path::new("/sys/block"), &disk_node);
        let request_based = rustix::fs::stat(disk_folder.join("mq")).is_ok() || !paths.is_empty();
        Ok(Self {
            path: path.to_owned(),
            number,
            disk,
            disk_node,
            start: Sectors(start),
            length: Sectors(read_number(&folder.join("size"))?),
            diskseq: read_number(&disk_folder.join("diskseq"))?,
            kind: if request_based { DeviceKind::Request } else { DeviceKind::Bio },
            read_only: read_number(&folder.join("ro"))? != 0,
            zoned: read_text(&disk_folder.join("queue/zoned")).is_ok_and(|zoned| zoned != "none"),
            dax: read_number(&disk_folder.join("queue/dax")).is_ok_and(|dax| dax != 0),
            iostats: read_number(&disk_folder.join("queue/iostats")).is_ok_and(|iostats| iostats != 0),
            paths,
            table: DmTable::open(disk)?.map(|table| table.hash()).transpose()?,
        })
    }

    fn usable(self) -> Result<Self, TrackerError> {
        let refuse = |reason: &str| Err(unsupported(&self.path, reason));
        if self.length.0 == 0 {
            return refuse("has no size: nothing is attached to it");
        }
        if self.length.0 > VOLUME_BYTES_MAX / SECTOR_BYTES {
            return refuse("is larger than 16 TiB");
        }
        if self.zoned {
            return refuse("is a zoned device; those are not supported");
        }
        // Persistent memory may be mapped into programs, whose stores no tracker sees.
        if self.dax || self.disk_node.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"pmem")) {
            return refuse("can be written past the block layer (DAX, persistent memory); those are not supported");
        }
        Ok(self)
    }

    /// Size in bytes.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.length.to_bytes()
    }

    /// Bytes of a sector, as the disk counts them.
    ///
    /// # Errors
    /// Where sysfs does not tell.
    pub fn sector_bytes(&self) -> io::Result<u32> {
        read_number(&self.disk.sysfs().join("queue/logical_block_size")).map(|bytes| bytes as u32)
    }

    /// Where to read it.
    #[must_use]
    pub fn read_target(&self) -> ReadTarget {
        ReadTarget {
            node: self.disk_node.clone(),
            offset_bytes: self.start.to_bytes(),
            size_bytes: self.length.to_bytes(),
        }
    }

    /// Whether it is a window of its disk.
    pub(super) fn is_partition(&self) -> bool {
        self.number != self.disk
    }
}

/// Where the block device with this number lies: the whole disk it is of, where in it it begins and how long it is.
///
/// # Errors
/// Where there is no such device, or sysfs does not tell.
pub fn place_of(number: DeviceNumber) -> io::Result<(DeviceNumber, Sectors, Sectors)> {
    let folder = number.sysfs();
    let length = Sectors(read_number(&folder.join("size"))?);
    if rustix::fs::stat(folder.join("partition")).is_err() {
        return Ok((number, Sectors(0), length));
    }
    let disk = parse_device(&read_text(&folder.join("../dev"))?)?;
    Ok((disk, Sectors(read_number(&folder.join("start"))?), length))
}

/// The partitions of a whole disk that the kernel knows.
///
/// # Errors
/// Where sysfs does not tell.
pub(crate) fn partitions_of(disk: DeviceNumber) -> io::Result<Vec<DeviceNumber>> {
    let entries = SystemStorage.list(&disk.sysfs())?;
    let folders = entries.iter().map(|entry| disk.sysfs().join(entry.file_name().unwrap_or_default()));
    let partitions = folders.filter(|folder| rustix::fs::stat(folder.join("partition")).is_ok());
    partitions.map(|folder| parse_device(&read_text(&folder.join("dev"))?)).collect()
}

/// The same of a whole disk's number, `major:minor`.
///
/// # Errors
/// Where sysfs does not tell.
pub fn partitions_of_number(number: &str) -> io::Result<Vec<DeviceNumber>> {
    partitions_of(parse_device(number)?)
}

/// Whether the block device with this number is built of others by the kernel: device-mapper, md.
#[must_use]
pub fn is_stacked(number: DeviceNumber) -> bool {
    ["dm", "md"].iter().any(|name| rustix::fs::stat(number.sysfs().join(name)).is_ok())
}

/// The node of the block device with this number, `major:minor`, as the kernel names it.
///
/// # Errors
/// Where there is no such device, or no node of it.
pub fn node_of(number: &str) -> io::Result<PathBuf> {
    let number = parse_device(number)?;
    disk_node(&number.sysfs(), number)
}

fn disk_folder(number: DeviceNumber) -> PathBuf {
    let folder = number.sysfs();
    if rustix::fs::stat(folder.join("partition")).is_ok() { folder.join("..") } else { folder }
}

fn disk_node(disk_folder: &Path, disk: DeviceNumber) -> io::Result<PathBuf> {
    let uevent = read_text(&disk_folder.join("uevent"))?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME=")).ok_or_else(strange)?;
    let node = Path::new("/dev").join(name);
    let stat = rustix::fs::stat(&node)?;
    if (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) != (disk.major, disk.minor) {
        return Err(io::Error::other(format!("{} is not the node of {disk}", node.display())));
    }
    Ok(node)
}

/// The hidden disks of native NVMe multipath, `nvme<subsystem>c<controller>n<head>` beside their head
/// `nvme<subsystem>n<head>` (drivers/nvme/host/core.c, `nvme_alloc_ns`). A head has no queue of its own: requests, and so
/// their completions, are its paths' (multipath.c, `nvme_ns_head_submit_bio`).
pub(super) fn multipath_paths(sysfs_block: &Path, disk_node: &Path) -> Vec<String> {
    let name = disk_node.file_name().unwrap_or_default().to_string_lossy();
    let Some((subsystem, head)) = name.strip_prefix("nvme").and_then(|rest| rest.split_once('n')) else {
        return Vec::new();
    };
    let is_path = |name: &str| {
        let rest = name.strip_prefix("nvme").and_then(|rest| rest.strip_prefix(subsystem)?.strip_prefix('c'));
        let controller = rest.and_then(|rest| rest.strip_suffix(head)?.strip_suffix('n'));
        controller.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let names = SystemStorage.list(sysfs_block).unwrap_or_default();
    let names = names.iter().filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    let mut paths: Vec<String> = names.filter(|name| is_path(name)).collect();
    paths.sort();
    paths
}

/// Text of a small file of sysfs or procfs, which may say that it is empty and is not.
pub(crate) fn read_text(path: &Path) -> io::Result<String> {
    let mut buffer = vec![0; 8192];
    let read = SystemStorage.open(path)?.read_at(&mut buffer, 0)?;
    buffer.truncate(read);
    let text = String::from_utf8(buffer).map_err(|_| strange())?;
    Ok(text.trim_end().to_owned())
}

fn read_number(path: &Path) -> io::Result<u64> {
    read_text(path)?.parse().map_err(|_| strange())
}

fn parse_device(text: &str) -> io::Result<DeviceNumber> {
    let (major, minor) = text.split_once(':').ok_or_else(strange)?;
    let number = |text: &str| text.parse().map_err(|_| strange());
    Ok(DeviceNumber { major: number(major)?, minor: number(minor)? })
}

fn unsupported(path: &Path, reason: &str) -> TrackerError {
    TrackerError::Unsupported { step: format!("open volume {}", path.display()), reason: reason.to_owned() }
}

fn io_error(path: &Path, source: io::Error) -> TrackerError {
    TrackerError::Io { step: format!("inspect volume {}", path.display()), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_block_device_is_refused_with_the_reason() {
        let refused = |path: &str| Device::inspect(Path::new(path)).expect_err("refused").to_string();
        assert_eq!(refused("/dev/cdp-none"), "open volume /dev/cdp-none: does not exist");
        assert!(refused("/dev/null").contains("is not a block device"));
        assert!(refused("/").contains("is not a block device"));
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a sysfs is made up on a real file system")]
    fn the_paths_of_a_multipath_head_are_found_by_name() {
        let sysfs = tempfile::tempdir().expect("a folder");
        for name in ["nvme0n1", "nvme0c0n1", "nvme0c11n1", "nvme0c0n11", "nvme1c0n1", "nvme0cxn1", "sda"] {
            std::fs::create_dir(sysfs.path().join(name)).expect("made");
        }
        let paths = |node: &str| multipath_paths(sysfs.path(), Path::new(node));
        assert_eq!(paths("/dev/nvme0n1"), ["nvme0c0n1", "nvme0c11n1"]);
        assert_eq!(paths("/dev/nvme1n1"), ["nvme1c0n1"]);
        assert!(paths("/dev/nvme2n1").is_empty() && paths("/dev/sda").is_empty());
    }

    #[test]
    fn no_disk_of_this_machine_has_paths_unless_it_is_a_head_without_a_queue() {
        for disk in SystemStorage.list(Path::new("/sys/block")).expect("listed") {
            let name = disk.file_name().expect("a name").to_owned();
            let paths = multipath_paths(Path::new("/sys/block"), &Path::new("/dev").join(&name));
            let has_queue = Path::new("/sys/block").join(&name).join("mq").exists();
            assert!(paths.is_empty() || !has_queue, "{name:?} {paths:?}");
        }
    }

    #[test]
    fn devices_whose_writes_nobody_sees_are_refused() {
        let device = Device {
            path: "/dev/x".into(),
            number: DeviceNumber { major: 8, minor: 0 },
            disk: DeviceNumber { major: 8, minor: 0 },
            disk_node: "/dev/x".into(),
            start: Sectors(0),
            length: Sectors(8),
            diskseq: 1,
            kind: DeviceKind::Request,
            read_only: false,
            zoned: false,
            dax: false,
            iostats: true,
            paths: Vec::new(),
            table: None,
        };
        assert!(device.clone().usable().is_ok());
        let refused = |device: Device| device.usable().expect_err("refused").to_string();
        assert!(refused(Device { zoned: true, ..device.clone() }).contains("zoned"));
        assert!(refused(Device { dax: true, ..device.clone() }).contains("DAX"));
        assert!(refused(Device { disk_node: "/dev/pmem0".into(), ..device.clone() }).contains("persistent memory"));
        assert!(refused(Device { length: Sectors(0), ..device }).contains("no size"));
    }

    #[test]
    fn device_numbers_are_read_and_packed_as_the_kernel_does() {
        let number = parse_device("259:65537").expect("parsed");
        assert_eq!(number, DeviceNumber { major: 259, minor: 65537 });
        assert_eq!(number.to_kernel(), (259 << 20) + 0x1_0001);
        assert_eq!(number.to_string(), "259:65537");
        assert!(parse_device("259").is_err());
    }
}
