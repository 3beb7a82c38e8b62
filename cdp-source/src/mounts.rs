//! Which file systems are mounted, and on which device each lies.
//!
//! Reads `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`). A file system that shows a device number of its own (btrfs) is
//! found by the device it was mounted from. Only file systems on a block device are told of.

use cdp_seams::storage::Storage;
use rustix::fs::{major, minor, stat};
use std::path::Path;

const MOUNTINFO: &str = "/proc/self/mountinfo";
const BYTES_MAX: usize = 1 << 20;

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Number of the device it lies on, `major:minor`.
    pub number: String,
    /// Where it is mounted.
    pub mounted_on: String,
    /// Its type, as the kernel names it.
    pub file_system: String,
}

/// Every mounted file system that lies on a block device; none where the kernel does not tell.
#[must_use]
pub fn mounts(storage: &dyn Storage) -> Vec<Mount> {
    parse(&mountinfo(storage), number_of)
}

fn mountinfo(storage: &dyn Storage) -> String {
    // Its length reads as 0, so it is read until nothing more comes.
    let mut bytes = vec![0; BYTES_MAX];
    let read = storage.open(Path::new(MOUNTINFO)).and_then(|file| file.read_at(&mut bytes, 0)).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..read]).into_owned()
}

/// Number of the block device that a path's file system lies on; `None` where it lies on none (a share), or that cannot be told.
#[must_use]
pub fn device_below(storage: &dyn Storage, path: &Path) -> Option<String> {
    let path = std::fs::canonicalize(path).ok()?;
    let found = stat(&path).ok()?;
    if major(found.st_dev) != 0 {
        return Some(format!("{}:{}", major(found.st_dev), minor(found.st_dev)));
    }
    number_of(&mounted_from(&mountinfo(storage), &path)?)
}

/// What the file system was mounted from that a path lies on: that of the longest mount point above it, the last where there are several.
fn mounted_from(text: &str, path: &Path) -> Option<String> {
    let mount = |line: &str| {
        let (place, origin) = line.split_once(" - ")?;
        let mounted_on = unescape(place.split(' ').nth(4)?);
        let device = unescape(origin.split(' ').nth(1)?);
        path.starts_with(&mounted_on).then_some((mounted_on.len(), device))
    };
    text.lines().filter_map(mount).max_by_key(|(len, _)| *len).map(|(_, device)| device)
}

fn parse(text: &str, number_of: impl Fn(&str) -> Option<String>) -> Vec<Mount> {
    let mount = |line: &str| {
        let (place, origin) = line.split_once(" - ")?;
        let place: Vec<&str> = place.split(' ').collect();
        let (file_system, device) = origin.split_once(' ')?;
        let device = device.split(' ').next()?;
        let number = match *place.get(2)? {
            own if own.starts_with("0:") => number_of(&unescape(device))?,
            number => number.to_owned(),
        };
        Some(Mount { number, mounted_on: unescape(place.get(4)?), file_system: file_system.to_owned() })
    };
    text.lines().filter_map(mount).collect()
}

/// Number of the block device behind a path; `None` for what is no path, or no block device.
pub(crate) fn number_of(device: &str) -> Option<String> {
    let found = stat(Path::new(device).has_root().then_some(device)?).ok()?;
    let is_block = rustix::fs::FileType::from_raw_mode(found.st_mode) == rustix::fs::FileType::BlockDevice;
    is_block.then(|| format!("{}:{}", major(found.st_rdev), minor(found.st_rdev)))
}

/// The kernel writes blanks and backslashes as three octal digits.
pub(crate) fn unescape(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        if let Some(byte) = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            text.push(char::from(byte));
            text.push_str(&part[3..]);
        } else {
            text.push('\\');
            text.push_str(part);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_on_a_device_is_a_mount_and_odd_names_are_read_back() {
        let text = "\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
22 27 0:21 / /proc rw,relatime - proc proc rw\n\
40 27 7:1 / /srv/two\\040words\\134 rw shared:1 - xfs /dev/loop1 rw\n\
41 27 0:50 /@ /home rw - btrfs /dev/sdb1 rw,subvolid=5\n\
broken line\n";
        let mount = |number: &str, mounted_on: &str, file_system: &str| Mount {
            number: number.into(),
            mounted_on: mounted_on.into(),
            file_system: file_system.into(),
        };
        let found = parse(text, |device| (device == "/dev/sdb1").then(|| "8:17".to_owned()));
        let expected =
            [mount("254:0", "/", "ext4"), mount("7:1", "/srv/two words\\", "xfs"), mount("8:17", "/home", "btrfs")];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_path_lies_on_the_longest_mount_above_it() {
        let text = "\
27 1 254:0 / / rw - ext4 /dev/vda rw\n\
41 27 0:50 /@ /srv/images rw - btrfs /dev/sdb1 rw\n\
42 27 0:51 / /srv/share rw - nfs4 nas:/backup rw\n";
        for (path, device) in [
            ("/srv/images/main", "/dev/sdb1"),
            ("/srv/imagesx", "/dev/vda"),
            ("/srv/share", "nas:/backup"),
            ("/", "/dev/vda"),
        ] {
            assert_eq!(mounted_from(text, Path::new(path)).as_deref(), Some(device), "{path}");
        }
    }

    #[test]
    fn what_is_no_device_has_no_number() {
        assert_eq!(number_of("proc"), None);
        assert_eq!(number_of("/tmp"), None);
        assert_eq!(number_of("/dev/null"), None);
    }
}
