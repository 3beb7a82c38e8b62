//! What the kernel counts on a disk: the witness against the tracker's own counts.
//!
//! Owns `stat`, `inflight` and `queue/iostats` of a disk in sysfs. A `DiskCounter` keeps them open for as long as the tracking
//! looks at the disk. Does not judge (`trust` does).

use super::device::DeviceNumber;
use super::kernel_file::KernelFile;
use std::io;

/// What the kernel counted on a disk, from `stat` and `inflight`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskCounts {
    /// Sectors of completed writes.
    pub written: u64,
    /// Sectors of completed discards.
    pub discarded: u64,
    /// Completed write requests.
    pub write_requests: u64,
    /// Completed discard requests.
    pub discard_requests: u64,
    /// Writes and discards in flight.
    pub in_flight: u64,
    /// Nothing is counted: `queue/iostats` is 0.
    pub is_off: bool,
}

impl DiskCounts {
    /// The counts of a whole disk now, for whoever asks once.
    ///
    /// # Errors
    /// Where sysfs does not tell.
    pub fn read(disk: DeviceNumber) -> io::Result<Self> {
        DiskCounter::open(disk)?.read()
    }
}

/// The counts of a disk, to be asked for again and again.
pub(super) struct DiskCounter {
    stat: KernelFile,
    in_flight: KernelFile,
    /// Kernels without it count always.
    iostats: Option<KernelFile>,
}

impl DiskCounter {
    pub(super) fn open(disk: DeviceNumber) -> io::Result<Self> {
        let folder = disk.sysfs();
        Ok(Self {
            stat: KernelFile::open(&folder.join("stat"))?,
            in_flight: KernelFile::open(&folder.join("inflight"))?,
            iostats: KernelFile::open(&folder.join("queue/iostats")).ok(),
        })
    }

    /// All of it; what is in flight is asked last, so that what it says holds for the others too.
    pub(super) fn read(&self) -> io::Result<DiskCounts> {
        let counts = self.completed()?;
        let in_flight = self.in_flight.read(|text| numbers(text).nth(1)?)?;
        let is_off = self.iostats.as_ref().is_some_and(|iostats| iostats.number().is_ok_and(|iostats| iostats == 0));
        Ok(DiskCounts { in_flight, is_off, ..counts })
    }

    /// Only what has completed.
    pub(super) fn completed(&self) -> io::Result<DiskCounts> {
        self.stat.read(|text| {
            let mut fields = numbers(text);
            // Kernels without discard counts have fewer fields, but none of those is supported.
            let (write_requests, written) = (fields.nth(4)??, fields.nth(1)??);
            let (discard_requests, discarded) = (fields.nth(4)??, fields.nth(1)??);
            Some(DiskCounts { written, discarded, write_requests, discard_requests, ..DiskCounts::default() })
        })
    }
}

fn numbers(text: &str) -> impl Iterator<Item = Option<u64>> + '_ {
    text.split_ascii_whitespace().map(|field| field.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tracker::device::read_text;
    use cdp_seams::storage::{Storage, SystemStorage};
    use std::path::Path;

    /// A disk of this machine, if it has any.
    fn a_disk() -> Option<DeviceNumber> {
        let disks = SystemStorage.list(Path::new("/sys/block")).ok()?;
        let number = read_text(&disks.first()?.join("dev")).ok()?;
        let (major, minor) = number.split_once(':')?;
        Some(DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }

    #[test]
    fn the_fields_are_those_of_the_kernels_documentation() {
        let Some(disk) = a_disk() else { return eprintln!("skipped: no disk") };
        let counter = DiskCounter::open(disk).expect("open");
        // Documentation/block/stat.rst; asked until no other program's writes come in between.
        let same = (0..1000).any(|_| {
            let text = read_text(&disk.sysfs().join("stat")).expect("stat");
            let field = |index: usize| text.split_ascii_whitespace().nth(index).and_then(|field| field.parse().ok());
            let counts = counter.read().expect("counts");
            [field(4), field(6), field(11), field(13)]
                == [counts.write_requests, counts.written, counts.discard_requests, counts.discarded].map(Some)
        });
        assert!(same);
    }
}
