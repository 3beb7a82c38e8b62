//! Which file systems a volume has, as an operator is told of them, and which one is meant.
//!
//! What partitions there are, and what begins in them, is found by the drill's own look at a volume (`drill::probe`).

use super::error::TreeError;
use crate::drill::probe::{Kind, Layout, Place, probe};
use crate::nbd::Disk;
use crate::nbd::disk::Run;
use std::io;

/// A partition, or the whole volume where it has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Partition {
    /// Where it is, and what begins there.
    pub(crate) place: Place,
    /// What it is, for people: `ext4`, `xfs`, `swap`.
    pub(crate) file_system: &'static str,
    /// The label that its file system has.
    pub(crate) label: Option<String>,
}

/// Looks at a volume; gives what is wrong with its partition table, too.
///
/// # Errors
/// Where it cannot be read.
pub(crate) fn partitions(disk: &Disk) -> Result<(Vec<Partition>, Vec<String>), TreeError> {
    let read = |offset: u64, buffer: &mut [u8]| read_disk(disk, offset, buffer).map_err(io::Error::other);
    let Layout { places, broken, .. } = probe(&read, disk.size_bytes()).map_err(lost)?;
    let look = |place: Place| {
        let mut start = vec![0; place.bytes.min(68 << 10) as usize];
        // A label is worth no failure: whoever reads the file system hears of it.
        let _ = read_disk(disk, place.offset, &mut start);
        Partition { place, file_system: file_system(place.kind, &start), label: label(place.kind, &start) }
    };
    Ok((places.into_iter().map(look).collect(), broken))
}

/// Reads bytes of a disk.
fn read_disk(disk: &Disk, offset: u64, buffer: &mut [u8]) -> Result<(), TreeError> {
    let mut at = 0;
    let read = disk.read(offset, buffer.len() as u64, &mut |run| match run {
        Run::Bytes(bytes) => {
            buffer[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        }
        Run::Zeros(len) => {
            buffer[at..at + len as usize].fill(0);
            at += len as usize;
        }
    });
    read.map_err(|error| TreeError::Lost { offset: error.offset, reason: error.reason })
}

/// The error of the disk that a look at it gave.
fn lost(error: io::Error) -> TreeError {
    match error.downcast::<TreeError>() {
        Ok(error) => error,
        Err(error) => TreeError::System { what: "look at the volume".into(), source: error },
    }
}

impl Partition {
    /// Whether there may be files in it.
    pub(crate) const fn has_files(&self) -> bool {
        !matches!(self.place.kind, Kind::Blank | Kind::Swap | Kind::Luks | Kind::Lvm)
    }
}

fn bit(start: &[u8], at: usize, mask: u8) -> bool {
    start.get(at).is_some_and(|byte| byte & mask != 0)
}

fn file_system(kind: Kind, start: &[u8]) -> &'static str {
    match kind {
        // Of the superblock's features: extents, and a journal.
        Kind::Ext => match (bit(start, 1024 + 0x60, 0x40), bit(start, 1024 + 0x5c, 4)) {
            (true, _) => "ext4",
            (false, true) => "ext3",
            (false, false) => "ext2",
        },
        Kind::Xfs => "xfs",
        Kind::Btrfs => "btrfs",
        Kind::Ntfs => "ntfs",
        Kind::Fat => "fat",
        Kind::Swap => "swap",
        Kind::Luks => "luks",
        Kind::Lvm => "lvm",
        Kind::Blank => "blank",
        Kind::Unknown if start.get(3..11) == Some(b"EXFAT   ") => "exfat",
        Kind::Unknown => "unknown",
    }
}

/// The label, where it stands at the beginning: that of NTFS is in a file.
fn label(kind: Kind, start: &[u8]) -> Option<String> {
    let text = |at: usize, len: usize| start.get(at..at + len);
    let bytes = match kind {
        Kind::Ext => text(1024 + 0x78, 16),
        Kind::Xfs => text(108, 12),
        Kind::Btrfs => text(0x1_0000 + 0x12b, 256),
        Kind::Fat if text(82, 5) == Some(b"FAT32") => text(71, 11),
        Kind::Fat => text(43, 11),
        _ => None,
    }?;
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let label = super::name::shown(bytes[..end].trim_ascii_end());
    Some(label).filter(|label| !label.is_empty() && label != "NO NAME")
}
