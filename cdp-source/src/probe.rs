//! What a path given as a volume is: a block device or an image file, its size, what is on it.
//!
//! Only looks; never writes, and reads no more than the first 68 KiB. Whether the tracker can watch the device is the
//! tracker's to say.

use crate::mounts::mounts;
use crate::stack::{Layer, stack};
use cdp_protocol::units::{SECTOR_BYTES, VOLUME_BYTES_MAX};
use cdp_seams::storage::{Storage, read_all};
use serde::Serialize;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

const LOOK_BYTES: usize = 68 * 1024;
const SYSFS_BYTES_MAX: u64 = 1 << 20;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Probe {
    /// The path with every link followed.
    pub device: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// Size in bytes.
    pub size_bytes: u64,
    /// What is on it: a file system, a volume manager, a partition table.
    pub content: Option<&'static str>,
    /// What it is built of, where it is a block device.
    pub stack: Option<Layer>,
    /// Where it is mounted.
    pub mounted_on: Vec<String>,
    /// Devices that are built upon it.
    pub holders: Vec<String>,
}

/// Block device or file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "type")]
pub enum Kind {
    /// A block device.
    Block {
        /// Its number, `major:minor`.
        number: String,
        /// Name of the whole disk.
        disk: String,
        /// Which partition of it, `None` for the whole disk.
        partition: Option<u32>,
    },
    /// A regular file.
    File {
        /// Number of the file system's device.
        file_system: u64,
        /// The file's inode.
        inode: u64,
    },
}

/// Why a path cannot be a volume.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Nothing there.
    #[error("device {} does not exist", .0.display())]
    Missing(PathBuf),
    /// A folder, a character device, a pipe.
    #[error("{} is {found}, not a block device or an image file", path.display())]
    NotAVolume {
        /// The path.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// No bytes.
    #[error("device {} has a size of 0 bytes", .0.display())]
    Empty(PathBuf),
    /// More than can be tracked.
    #[error("device {} has {size_bytes} bytes, at most {VOLUME_BYTES_MAX} (16 TiB) can be protected", path.display())]
    TooLarge {
        /// The path.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// It cannot be looked at.
    #[error("look at device {}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What came back.
        #[source]
        source: io::Error,
    },
}

impl ProbeError {
    /// The next step, where there is one.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Missing(_) => Some("lsblk lists the block devices of this machine"),
            Self::NotAVolume { .. } => Some("give a disk, a partition, a logical volume or an image file"),
            Self::Empty(_) => Some("an empty card reader or loop device cannot be protected"),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => Some("run it as root"),
            _ => None,
        }
    }
}

/// Looks at `path`.
///
/// # Errors
/// Where it cannot be a volume.
pub fn probe(storage: &dyn Storage, path: &Path) -> Result<Probe, ProbeError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => ProbeError::Missing(path.to_owned()),
        _ => ProbeError::Io { path: path.to_owned(), source },
    };
    let device = std::fs::canonicalize(path).map_err(failed)?;
    let metadata = std::fs::metadata(&device).map_err(failed)?;
    let file_type = metadata.file_type();
    let (kind, size_bytes) = if file_type.is_block_device() {
        let sys = sysfs(metadata.rdev());
        let sectors: u64 = number_in(storage, &sys.join("size")).unwrap_or(0);
        (block_kind(storage, metadata.rdev(), &sys), sectors * SECTOR_BYTES)
    } else if file_type.is_file() {
        (Kind::File { file_system: metadata.dev(), inode: metadata.ino() }, metadata.len())
    } else {
        return Err(ProbeError::NotAVolume { path: path.to_owned(), found: name_of(file_type) });
    };
    check_size(path, size_bytes)?;
    let mut head = vec![0; LOOK_BYTES];
    let read = storage.open(&device).and_then(|file| file.read_at(&mut head, 0)).map_err(failed)?;
    head.truncate(read);
    let mut probe = Probe {
        device,
        kind,
        size_bytes,
        content: signature(&head),
        stack: None,
        mounted_on: Vec::new(),
        holders: Vec::new(),
    };
    if let Kind::Block { number, .. } = &probe.kind {
        probe.stack = stack(storage, number);
        let here = mounts(storage).into_iter().filter(|mount| mount.number == *number);
        probe.mounted_on = here.map(|mount| mount.mounted_on).collect();
        probe.holders = names_in(storage, &sysfs(metadata.rdev()).join("holders"));
    }
    Ok(probe)
}

fn check_size(path: &Path, size_bytes: u64) -> Result<(), ProbeError> {
    match size_bytes {
        0 => Err(ProbeError::Empty(path.to_owned())),
        1..=VOLUME_BYTES_MAX => Ok(()),
        _ => Err(ProbeError::TooLarge { path: path.to_owned(), size_bytes }),
    }
}

impl Probe {
    /// Whether a write to one can be a write to the other: the same device or file, or a disk and its partition.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        match (&self.kind, &other.kind) {
            (Kind::Block { disk: a, partition: p, .. }, Kind::Block { disk: b, partition: q, .. }) => {
                a == b && (p == q || p.is_none() || q.is_none())
            }
            (a, b) => a == b,
        }
    }

    /// Whether the folder lies on this volume.
    #[must_use]
    pub fn holds(&self, storage: &dyn Storage, folder: &Path) -> bool {
        let existing = folder.ancestors().find_map(|folder| std::fs::metadata(folder).ok());
        let (Some(metadata), Kind::Block { disk, partition, .. }) = (existing, &self.kind) else { return false };
        match block_kind(storage, metadata.dev(), &sysfs(metadata.dev())) {
            Kind::Block { disk: of_folder, partition: part, .. } => {
                &of_folder == disk && (partition.is_none() || &part == partition)
            }
            Kind::File { .. } => false,
        }
    }

    /// Whether it is a block device.
    #[must_use]
    pub const fn is_block(&self) -> bool {
        matches!(self.kind, Kind::Block { .. })
    }

    /// What it is, in a line for people.
    #[must_use]
    pub fn describe(&self) -> String {
        let what = match (&self.stack, &self.kind) {
            (Some(stack), _) => stack.to_string(),
            (None, Kind::Block { disk, .. }) => format!("disk {disk}"),
            (None, Kind::File { .. }) => "image file".to_owned(),
        };
        let content = self.content.unwrap_or("no known content").to_owned();
        let mut facts = vec![what, format!("{} bytes", self.size_bytes), content];
        if !self.mounted_on.is_empty() {
            facts.push(format!("mounted on {}", self.mounted_on.join(", ")));
        }
        if !self.holders.is_empty() {
            facts.push(format!("under {}", self.holders.join(", ")));
        }
        facts.join(", ")
    }
}

fn block_kind(storage: &dyn Storage, device: u64, sys: &Path) -> Kind {
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let real = std::fs::canonicalize(sys).unwrap_or_else(|_| sys.to_owned());
    let name =
        |path: &Path| path.file_name().map_or_else(|| number.clone(), |name| name.to_string_lossy().into_owned());
    let partition = number_in(storage, &real.join("partition")).map(|number| number as u32);
    let disk = if partition.is_some() { real.parent().map_or_else(|| number.clone(), name) } else { name(&real) };
    Kind::Block { number, disk, partition }
}

fn sysfs(device: u64) -> PathBuf {
    format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device)).into()
}

fn number_in(storage: &dyn Storage, path: &Path) -> Option<u64> {
    let bytes = read_all(storage, path, SYSFS_BYTES_MAX).ok()?;
    std::str::from_utf8(&bytes).ok()?.trim().parse().ok()
}

fn names_in(storage: &dyn Storage, folder: &Path) -> Vec<String> {
    storage.list(folder).unwrap_or_default().iter().map(|name| name.to_string_lossy().into_owned()).collect()
}

fn name_of(file_type: std::fs::FileType) -> &'static str {
    if file_type.is_dir() {
        "a folder"
    } else if file_type.is_char_device() {
        "a character device"
    } else if file_type.is_fifo() {
        "a pipe"
    } else {
        "a socket"
    }
}

/// What a volume's first bytes say is on it. File systems come first: some leave an old partition table in place.
pub(crate) fn signature(head: &[u8]) -> Option<&'static str> {
    const SIGNATURES: &[(usize, &[u8], &str)] = &[
        (0, b"XFSB", "xfs"),
        (65_600, b"_BHRfS_M", "btrfs"),
        (1080, &[0x53, 0xef], "ext2/3/4"),
        (4086, b"SWAPSPACE2", "swap"),
        (0, b"LUKS\xba\xbe", "LUKS"),
        (512, b"LABELONE", "LVM physical volume"),
        (0, b"LABELONE", "LVM physical volume"),
        (4096, &[0xfc, 0x4e, 0x2b, 0xa9], "md RAID member"),
        (3, b"NTFS    ", "ntfs"),
        (82, b"FAT32   ", "vfat"),
        (54, b"FAT16   ", "vfat"),
        (512, b"EFI PART", "GPT partition table"),
        (510, &[0x55, 0xaa], "MBR partition table"),
    ];
    let found = SIGNATURES.iter().find(|(at, magic, _)| head.get(*at..at + magic.len()) == Some(*magic));
    found.map(|(_, _, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_seams::storage::SystemStorage;

    fn file_with(at: usize, bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut content = vec![0; 128 * 1024];
        content[at..at + bytes.len()].copy_from_slice(bytes);
        let file = tempfile::NamedTempFile::new().expect("a file");
        let path = file.path().to_owned();
        SystemStorage.open_write(&path).expect("opened").write_at(&content, 0).expect("written");
        file
    }

    #[test]
    fn known_content_is_named_and_unknown_is_not_guessed() {
        for (at, magic, name) in [
            (1080, [0x53, 0xef].as_slice(), Some("ext2/3/4")),
            (65_600, b"_BHRfS_M", Some("btrfs")),
            (4086, b"SWAPSPACE2", Some("swap")),
            (512, b"EFI PART", Some("GPT partition table")),
            (7, b"nothing", None),
        ] {
            let file = file_with(at, magic);
            let probe = probe(&SystemStorage, file.path()).expect("an image");
            assert_eq!((probe.content, probe.size_bytes), (name, 128 * 1024));
        }
    }

    #[test]
    fn the_same_file_by_a_link_overlaps_and_another_does_not() {
        let (one, other) = (file_with(0, b"a"), file_with(0, b"a"));
        let folder = tempfile::tempdir().expect("a folder");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(one.path(), &link).expect("linked");
        let look = |path: &Path| probe(&SystemStorage, path).expect("an image");
        assert!(look(one.path()).overlaps(&look(&link)));
        assert!(!look(one.path()).overlaps(&look(other.path())));
    }

    #[test]
    fn a_disk_overlaps_its_partitions_but_they_do_not_overlap_each_other() {
        let block = |partition: Option<u32>| Probe {
            device: "/dev/x".into(),
            kind: Kind::Block { number: "8:0".into(), disk: "sda".into(), partition },
            size_bytes: 1,
            content: None,
            stack: None,
            mounted_on: Vec::new(),
            holders: Vec::new(),
        };
        assert!(block(None).overlaps(&block(Some(1))));
        assert!(block(Some(1)).overlaps(&block(None)));
        assert!(!block(Some(1)).overlaps(&block(Some(2))));
    }

    #[test]
    fn what_cannot_be_a_volume_is_refused_by_what_it_is() {
        let refused = |path: &str| probe(&SystemStorage, Path::new(path)).expect_err("refused").to_string();
        assert!(refused("/nonexistent").contains("does not exist"));
        assert!(refused("/dev/null").contains("a character device"));
        assert!(refused("/tmp").contains("a folder"));
        let empty = tempfile::NamedTempFile::new().expect("a file");
        assert!(matches!(probe(&SystemStorage, empty.path()), Err(ProbeError::Empty(_))));
        assert!(check_size(empty.path(), 16 << 40).is_ok());
        assert!(matches!(check_size(empty.path(), (16 << 40) + 1), Err(ProbeError::TooLarge { .. })));
    }
}
