//! Mounted file systems that no group's volume holds: data that nobody copies, unless somebody said that this is meant.
//!
//! A file system is held where its device, or one that it is built upon, is a volume: a partition of a protected disk, LVM over one, a
//! loop device over a file that lies on one. Only looks, at `/proc` and `/sys`; what is an image that cannot be written to is no data.

use crate::config::Config;
use crate::mounts::{Mount, device_below, mounts, number_of};
use crate::stack::stack;
use crate::tracker::device::node_of;
use cdp_seams::storage::{Storage, read_all};
use rustix::fs::{major, minor, stat};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// File systems that are images: nothing is ever written to them.
const IMAGES: [&str; 5] = ["squashfs", "erofs", "cramfs", "iso9660", "udf"];
/// Loop devices over files on loop devices, and so on: below that nobody looks.
const FILES_MAX: usize = 8;
const PATH_BYTES_MAX: u64 = 64 * 1024;

/// A mounted file system in no group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unprotected {
    /// Its device.
    pub device: PathBuf,
    /// Where it is mounted.
    pub mounted_on: Vec<String>,
    /// Its type, as the kernel names it.
    pub file_system: String,
    /// The device's number, `major:minor`.
    #[serde(skip)]
    pub number: String,
    /// The configuration says to leave it.
    #[serde(skip)]
    pub is_left: bool,
}

/// What the configuration says of what is to be protected.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    volumes: Vec<PathBuf>,
    left: Vec<PathBuf>,
}

impl From<&Config> for Wanted {
    fn from(config: &Config) -> Self {
        let volumes = config.groups.values().flat_map(|group| group.volumes.iter().map(|volume| volume.device.clone()));
        // A disk of images is there for just that; where they lie beside other data, that is data.
        let images = config.groups.values().filter_map(|group| Some(group.local_image.as_ref()?.folder.clone()));
        Self { volumes: volumes.collect(), left: config.leave_unprotected.iter().cloned().chain(images).collect() }
    }
}

/// Every mounted file system that no volume holds, those that are to be left among them.
#[must_use]
pub fn unprotected(storage: &dyn Storage, wanted: &Wanted) -> Vec<Unprotected> {
    let volumes: Vec<Volume> = wanted.volumes.iter().filter_map(|path| Volume::of(storage, path)).collect();
    let mut found = by_device(mounts(storage));
    found.retain(|entry| {
        let below = Below::of(storage, &entry.number);
        !volumes.iter().any(|volume| below.has(volume))
    });
    for entry in &mut found {
        entry.is_left = wanted.left.iter().any(|path| is_named(entry, path));
        entry.device = node_of(&entry.number).unwrap_or_else(|_| PathBuf::from(&entry.number));
    }
    found
}

/// The one of these volumes that a folder lies on, by whatever is built upon it; `None` also where its file system is on no device here (a share).
#[must_use]
pub fn lies_on<'a>(storage: &dyn Storage, folder: &Path, volumes: &'a [PathBuf]) -> Option<&'a PathBuf> {
    let below = Below::of(storage, &device_below(storage, folder)?);
    volumes.iter().find(|path| Volume::of(storage, path).is_some_and(|volume| below.has(&volume)))
}

/// One entry a device, in the order of the mounts.
fn by_device(mounts: Vec<Mount>) -> Vec<Unprotected> {
    let mut found: Vec<Unprotected> = Vec::new();
    for mount in mounts.into_iter().filter(|mount| !IMAGES.contains(&mount.file_system.as_str())) {
        match found.iter_mut().find(|entry| entry.number == mount.number) {
            Some(entry) => entry.mounted_on.push(mount.mounted_on),
            None => found.push(Unprotected {
                device: PathBuf::new(),
                mounted_on: vec![mount.mounted_on],
                file_system: mount.file_system,
                number: mount.number,
                is_left: false,
            }),
        }
    }
    found
}

/// Whether a path names it: its device, by any link, or where it is mounted.
fn is_named(entry: &Unprotected, path: &Path) -> bool {
    let text = path.to_string_lossy();
    entry.mounted_on.iter().any(|place| *place == text) || number_of(&text).is_some_and(|number| number == entry.number)
}

/// A protected volume, as what is built upon it shows it.
enum Volume {
    /// A device, by the kernel's name.
    Device(String),
    /// A file, by its file system and inode.
    File(u64, u64),
}

impl Volume {
    fn of(storage: &dyn Storage, path: &Path) -> Option<Self> {
        if let Some(number) = number_of(path.to_str()?) {
            return Some(Self::Device(stack(storage, &number)?.name));
        }
        let file = stat(path).ok()?;
        Some(Self::File(file.st_dev, file.st_ino))
    }
}

/// Everything that a device is built upon, itself included.
#[derive(Default)]
struct Below {
    devices: BTreeSet<String>,
    files: Vec<(u64, u64)>,
}

impl Below {
    fn of(storage: &dyn Storage, number: &str) -> Self {
        let mut below = Self::default();
        below.look(storage, number);
        below
    }

    fn look(&mut self, storage: &dyn Storage, number: &str) {
        let Some(top) = stack(storage, number) else { return };
        let mut layers = vec![top];
        while let Some(layer) = layers.pop() {
            if let Some(file) = backing_file(storage, &layer.name).and_then(|path| stat(path).ok())
                && self.files.len() < FILES_MAX
            {
                self.files.push((file.st_dev, file.st_ino));
                self.look(storage, &format!("{}:{}", major(file.st_dev), minor(file.st_dev)));
            }
            self.devices.insert(layer.name);
            layers.extend(layer.over);
        }
    }

    fn has(&self, volume: &Volume) -> bool {
        match volume {
            Volume::Device(name) => self.devices.contains(name),
            Volume::File(file_system, inode) => self.files.contains(&(*file_system, *inode)),
        }
    }
}

/// The file behind a loop device.
fn backing_file(storage: &dyn Storage, name: &str) -> Option<String> {
    let path = Path::new("/sys/block").join(name).join("loop/backing_file");
    let bytes = read_all(storage, &path, PATH_BYTES_MAX).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim_end_matches('\n').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(number: &str, mounted_on: &str, file_system: &str) -> Mount {
        Mount { number: number.into(), mounted_on: mounted_on.into(), file_system: file_system.into() }
    }

    #[test]
    fn a_device_is_told_of_once_and_images_are_not() {
        let mounts = vec![
            mount("8:1", "/", "ext4"),
            mount("7:0", "/snap/core", "squashfs"),
            mount("8:17", "/home", "btrfs"),
            mount("8:17", "/srv", "btrfs"),
        ];
        let found = by_device(mounts);
        let told: Vec<_> = found.iter().map(|entry| (entry.number.as_str(), entry.mounted_on.join(" "))).collect();
        assert_eq!(told, [("8:1", "/".to_owned()), ("8:17", "/home /srv".to_owned())]);
    }

    #[test]
    fn a_mount_point_names_it_and_another_path_does_not() {
        let entry = &by_device(vec![mount("8:17", "/home", "xfs"), mount("8:17", "/srv", "xfs")])[0];
        assert!(is_named(entry, Path::new("/srv")));
        assert!(!is_named(entry, Path::new("/srv/data")) && !is_named(entry, Path::new("/dev/null")));
    }

    #[test]
    fn what_lies_on_a_volume_is_held_by_it() {
        let below = Below { devices: ["dm-0", "sda2", "sda"].map(String::from).into(), files: vec![(2049, 12)] };
        assert!(below.has(&Volume::Device("sda".into())) && below.has(&Volume::File(2049, 12)));
        assert!(!below.has(&Volume::Device("sdb".into())) && !below.has(&Volume::File(2049, 13)));
    }
}
