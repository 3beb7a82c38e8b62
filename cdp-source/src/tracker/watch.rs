//! Whether a device is still what it was: looked at before every flip, by files that are kept open.
//!
//! A file of a device that is gone answers with an error, also when another device has its number by then. Does not find out
//! what a device is (`device` does).

use super::device::{Device, multipath_paths};
use super::dm_table::DmTable;
use super::kernel_file::KernelFile;
use std::io;
use std::path::Path;

/// A device under watch.
pub(super) struct Watch {
    device: Device,
    size: KernelFile,
    diskseq: KernelFile,
    /// Of a partition.
    start: Option<KernelFile>,
    /// Of a device-mapper device.
    table: Option<DmTable>,
}

impl Watch {
    /// Watches `device`, which was inspected just now; compared from here on.
    pub(super) fn begin(device: &Device) -> io::Result<Self> {
        let folder = device.number.sysfs();
        let start = if device.is_partition() { Some(KernelFile::open(&folder.join("start"))?) } else { None };
        let size = KernelFile::open(&folder.join("size"))?;
        let diskseq = KernelFile::open(&device.disk.sysfs().join("diskseq"))?;
        Ok(Self { device: device.clone(), size, diskseq, start, table: DmTable::open(device.disk)? })
    }

    /// What is different, in a line.
    pub(super) fn look(&self) -> Result<(), String> {
        let (device, name) = (&self.device, self.device.path.display());
        let vanished = |error: io::Error| format!("{name} vanished ({error})");
        let (size, diskseq) = (self.size.number().map_err(vanished)?, self.diskseq.number().map_err(vanished)?);
        let start = self.start.as_ref().map_or(Ok(0), KernelFile::number).map_err(vanished)?;
        if diskseq != device.diskseq {
            return Err(format!("{name} is another device now (sequence number {diskseq}, was {})", device.diskseq));
        }
        if size != device.length.0 {
            let verb = if size < device.length.0 { "shrank" } else { "grew" };
            return Err(format!("{name} {verb} from {} to {size} sectors", device.length.0));
        }
        if start != device.start.0 {
            return Err(format!("{name} begins at sector {start}, was {}", device.start.0));
        }
        let table = self.table.as_ref().map(DmTable::hash).transpose().map_err(vanished)?;
        if table != device.table {
            return Err(format!("{name} has another device-mapper table"));
        }
        let paths = multipath_paths(Path::new("/sys/block"), &device.disk_node);
        if paths != device.paths {
            return Err(format!("{name} has the paths {paths:?}, had {:?}", device.paths));
        }
        Ok(())
    }
}
