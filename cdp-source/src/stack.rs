//! What a block device is built of, from the top down to the disks.
//!
//! Reads sysfs and nothing else: `slaves` lists the devices a device-mapper or md device is built upon, the folder above
//! a partition is its disk, a loop device names its file. Does not judge; whether a tracker can serve it is the
//! tracker's to say.

use cdp_seams::storage::{Storage, read_all};
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

const SYSFS_BYTES_MAX: u64 = 64 * 1024;
/// Layers below which nobody looks: a stack this high is a circle.
const LAYERS_MAX: usize = 16;

/// A device, and what it is built upon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// The kernel's name of it.
    pub name: String,
    /// What it is: `LVM vg-root`, `RAID raid1`, `partition 2`, `NVMe`.
    pub what: String,
    /// What lies below.
    pub over: Vec<Layer>,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.what)?;
        match self.over.as_slice() {
            [] => Ok(()),
            [one] => write!(f, " over {one}"),
            several => {
                let several: Vec<String> = several.iter().map(ToString::to_string).collect();
                write!(f, " over [{}]", several.join(", "))
            }
        }
    }
}

/// The stack of the block device with this number (`major:minor`); `None` where sysfs does not know it.
#[must_use]
pub fn stack(storage: &dyn Storage, number: &str) -> Option<Layer> {
    stack_in(storage, Path::new("/sys"), number)
}

fn stack_in(storage: &dyn Storage, sysfs: &Path, number: &str) -> Option<Layer> {
    let folder = std::fs::canonicalize(sysfs.join("dev/block").join(number)).ok()?;
    Some(layer(storage, &folder, LAYERS_MAX))
}

fn layer(storage: &dyn Storage, folder: &Path, layers_max: usize) -> Layer {
    let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let below = if layers_max == 0 { Vec::new() } else { below(storage, folder) };
    let over = below.iter().map(|folder| layer(storage, folder, layers_max.saturating_sub(1))).collect();
    Layer { what: what(storage, folder, &name), name, over }
}

fn below(storage: &dyn Storage, folder: &Path) -> Vec<PathBuf> {
    if folder.join("partition").exists() {
        return folder.parent().map(Path::to_owned).into_iter().collect();
    }
    let mut names = storage.list(&folder.join("slaves")).unwrap_or_default();
    names.sort();
    names.iter().filter_map(|name| std::fs::canonicalize(folder.join("slaves").join(name)).ok()).collect()
}

fn what(storage: &dyn Storage, folder: &Path, name: &str) -> String {
    let text = |file: &str| {
        let bytes = read_all(storage, &folder.join(file), SYSFS_BYTES_MAX).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    };
    if let Some(partition) = text("partition") {
        return format!("partition {partition}");
    }
    if let Some(uuid) = text("dm/uuid") {
        // The part before the first dash says who made it; libdevmapper.h.
        let kind = match uuid.split('-').next().unwrap_or_default() {
            "LVM" => "LVM",
            "CRYPT" => "dm-crypt",
            "mpath" => "multipath",
            _ => "device-mapper",
        };
        return format!("{kind} {}", text("dm/name").unwrap_or_default());
    }
    if let Some(level) = text("md/level") {
        return format!("RAID {level}");
    }
    if let Some(file) = text("loop/backing_file") {
        return format!("loop device of {file}");
    }
    let of_driver = [
        ("nvme", "NVMe"),
        ("vd", "virtio"),
        ("sd", "SCSI or SATA"),
        ("zram", "zram"),
        ("mmcblk", "MMC"),
        ("xvd", "Xen"),
    ];
    of_driver.iter().find(|(prefix, _)| name.starts_with(prefix)).map_or("disk", |(_, what)| what).to_owned()
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a sysfs is made up on a real file system, with its links")]
mod tests {
    use super::*;
    use cdp_seams::storage::SystemStorage;
    use std::os::unix::fs::symlink;

    /// A made-up sysfs: LVM over RAID 1 over a partition and a whole disk.
    fn sysfs() -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a folder");
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("in a folder")).expect("made");
            std::fs::write(path, text).expect("written");
        };
        let link = |path: &str, to: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("in a folder")).expect("made");
            symlink(root.path().join(to), path).expect("linked");
        };
        put("devices/dm-0/dm/uuid", "LVM-abc\n");
        put("devices/dm-0/dm/name", "vg-root\n");
        put("devices/md0/md/level", "raid1\n");
        put("devices/sda/sda2/partition", "2\n");
        put("devices/nvme0n1/size", "8\n");
        link("devices/dm-0/slaves/md0", "devices/md0");
        link("devices/md0/slaves/sda2", "devices/sda/sda2");
        link("devices/md0/slaves/nvme0n1", "devices/nvme0n1");
        link("dev/block/253:0", "devices/dm-0");
        link("dev/block/8:2", "devices/sda/sda2");
        root
    }

    #[test]
    fn every_layer_down_to_the_disks_is_told() {
        let root = sysfs();
        let told = |number| stack_in(&SystemStorage, root.path(), number).map(|layer| layer.to_string());
        let expected = "dm-0 (LVM vg-root) over md0 (RAID raid1) over \
            [nvme0n1 (NVMe), sda2 (partition 2) over sda (SCSI or SATA)]";
        assert_eq!(told("253:0").as_deref(), Some(expected));
        assert_eq!(told("8:2").as_deref(), Some("sda2 (partition 2) over sda (SCSI or SATA)"));
        assert_eq!(told("9:9"), None);
    }

    #[test]
    fn a_circle_ends() {
        let root = tempfile::tempdir().expect("a folder");
        let slaves = root.path().join("dm-0/slaves");
        std::fs::create_dir_all(&slaves).expect("made");
        std::fs::create_dir_all(root.path().join("dev/block")).expect("made");
        symlink(root.path().join("dm-0"), slaves.join("dm-0")).expect("linked");
        symlink(root.path().join("dm-0"), root.path().join("dev/block/253:0")).expect("linked");
        let told = stack_in(&SystemStorage, root.path(), "253:0").expect("a stack").to_string();
        assert_eq!(told.matches("dm-0").count(), LAYERS_MAX + 1);
    }
}
