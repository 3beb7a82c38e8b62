//! What a device is that stays the same over boots: numbers and sequence numbers do not.
//!
//! A text for comparing and for people: where it begins on its disk, and the names that its disk, partition, device-mapper device or
//! loop device has. What the kernel does not tell is left out, so that two may look alike that are not: the samples are to tell those apart.

use super::format::shortened;
use crate::tracker::device::{Device, read_text};
use std::path::Path;

/// Bytes of one name in it.
const NAME_BYTES_MAX: usize = 160;
/// What names a disk, below its folder of sysfs.
const DISK_NAMES: [(&str, &str); 6] = [
    ("wwid", "wwid"),
    ("wwid", "device/wwid"),
    ("serial", "serial"),
    ("serial", "device/serial"),
    ("device-mapper", "dm/uuid"),
    ("file", "loop/backing_file"),
];

/// What `device` is.
pub(super) fn of(device: &Device) -> String {
    let (disk, own) = (device.disk.sysfs(), device.number.sysfs());
    let mut facts = vec![format!("from sector {}", device.start)];
    for (what, file) in DISK_NAMES {
        facts.extend(name_in(&disk.join(file)).map(|name| format!("{what} {name}")));
    }
    let partition = read_text(&own.join("uevent")).ok();
    let partition = partition.as_deref().and_then(|text| text.lines().find_map(|line| line.strip_prefix("PARTUUID=")));
    facts.extend(partition.map(|name| format!("partition {}", shortened(name, NAME_BYTES_MAX))));
    facts.join(", ")
}

fn name_in(file: &Path) -> Option<String> {
    read_text(file).ok().map(|text| shortened(text.trim(), NAME_BYTES_MAX).to_owned()).filter(|name| !name.is_empty())
}
