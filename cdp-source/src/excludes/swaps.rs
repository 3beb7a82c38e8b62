//! What the kernel swaps to, as `/proc/swaps` tells (proc(5)).

use crate::mounts::unescape;
use cdp_seams::storage::{Storage, SystemStorage};
use std::path::{Path, PathBuf};

const SWAPS: &str = "/proc/swaps";
const BYTES_MAX: usize = 64 << 10;

/// A swap area that is in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Swap {
    pub(super) path: PathBuf,
    /// A file, not a device.
    pub(super) is_file: bool,
    /// Bytes behind its first page, which is its header.
    pub(super) bytes: u64,
}

/// Every swap area in use; none where the kernel does not tell.
pub(super) fn swaps() -> Vec<Swap> {
    let mut bytes = vec![0; BYTES_MAX];
    let Ok(read) = SystemStorage.open(Path::new(SWAPS)).and_then(|file| file.read_at(&mut bytes, 0)) else {
        return Vec::new();
    };
    parse(&String::from_utf8_lossy(&bytes[..read]))
}

fn parse(text: &str) -> Vec<Swap> {
    let swap = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (path, kind, kib) = (fields.next()?, fields.next()?, fields.next()?);
        let bytes = kib.parse::<u64>().ok()?.checked_mul(1024)?;
        Some(Swap { path: unescape(path).into(), is_file: kind == "file", bytes })
    };
    // The first line is the table's head; a swap file that has no name any more is no file to be found by it.
    text.lines().skip(1).filter(|line| !line.contains("(deleted)")).filter_map(swap).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_devices_are_told_apart_and_odd_names_are_read_back() {
        let text = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
/dev/sda2                               partition\t8388604\t\t0\t\t-2\n\
/srv/swap\\040file                      file\t\t1020\t\t12\t\t-3\n\
/srv/gone\\040(deleted)                 file\t\t1020\t\t12\t\t-3\n\
broken\n";
        let expected = [
            Swap { path: "/dev/sda2".into(), is_file: false, bytes: 8_388_604 << 10 },
            Swap { path: "/srv/swap file".into(), is_file: true, bytes: 1020 << 10 },
        ];
        assert_eq!(parse(text), expected);
        assert!(parse("").is_empty());
    }
}
