//! How the disks of a group are laid out: looked at where a capture has touched what tells it, and told in that capture's commit.
//!
//! What is told is what the disk holds right after the cut; whatever changes it later is of a later capture, which looks again. Nothing is
//! told of a volume without a partition table, and nothing twice, but once by each agent and each generation. A disk that cannot be read is
//! looked at again. Nothing is decided by it.

use crate::capture::Capture;
use crate::layout;
use crate::reader::{self, BlockReader};
use crate::tracker::device::Device;
use cdp_protocol::layout::{Layout, Table};
use cdp_protocol::record::Volume;
use cdp_protocol::record::layouts::{Layouts, fitting};
use cdp_protocol::units::{BLOCK_BYTES, SECTOR_BYTES, VolumeSlot, blocks_in};
use roaring::RoaringBitmap;
use std::path::PathBuf;

/// Blocks at the start of a disk: 1 MiB, where tables and boot areas are.
const FIRST_BLOCKS: u32 = 256;
/// Blocks at its end: the copy of a table.
const LAST_BLOCKS: u32 = 16;
/// Blocks at the start of a partition that tell what stands in it.
const CONTENT_BLOCKS: u32 = 17;

/// The disks of a group.
pub struct DiskLayouts(Vec<Disk>);

struct Disk {
    slot: VolumeSlot,
    size_bytes: u64,
    device: PathBuf,
    /// What was told last.
    told: Option<Layout>,
    is_touched: bool,
}

impl DiskLayouts {
    /// Of the volumes, each with its device.
    #[must_use]
    pub fn new(volumes: &[Volume], devices: impl IntoIterator<Item = PathBuf>) -> Self {
        let disk = |(volume, device): (&Volume, PathBuf)| Disk {
            slot: volume.slot,
            size_bytes: volume.size_bytes,
            device,
            told: None,
            is_touched: true,
        };
        Self(volumes.iter().zip(devices).map(disk).collect())
    }

    /// What was told may not have become a point.
    pub(super) fn tell_again(&mut self) {
        for disk in &mut self.0 {
            (disk.told, disk.is_touched) = (None, true);
        }
    }

    /// Notes what a capture has touched, that of a part, too.
    pub(super) fn captured(&mut self, capture: &Capture) {
        for (disk, volume) in self.0.iter_mut().zip(&capture.volumes) {
            disk.is_touched |= disk.is_told_by(volume.blocks());
        }
    }

    /// The layouts that are not as they were told last, as far as a commit has room for them.
    pub(super) fn take(&mut self, reader: &mut dyn BlockReader) -> Layouts {
        let touched = self.0.iter_mut().enumerate().filter(|(_, disk)| disk.is_touched);
        let changed: Layouts = touched.filter_map(|(volume, disk)| disk.look(volume, reader)).collect();
        let (told, left) = fitting(changed);
        for disk in &mut self.0 {
            if let Some((_, layout)) = told.iter().find(|(slot, _)| *slot == disk.slot) {
                disk.told = Some(layout.clone());
            }
            disk.is_touched |= left.iter().any(|(slot, _)| *slot == disk.slot);
        }
        told
    }
}

impl Disk {
    /// Whether these blocks may tell another layout.
    fn is_told_by(&self, blocks: &RoaringBitmap) -> bool {
        let end = u32::try_from(blocks_in(self.size_bytes)).unwrap_or(u32::MAX);
        let partitions = self.told.iter().flat_map(|layout| &layout.partitions);
        let starts = partitions.map(|partition| (partition.start_bytes / BLOCK_BYTES as u64) as u32);
        let contents = starts.map(|start| start..start.saturating_add(CONTENT_BLOCKS));
        let ranges = [0..FIRST_BLOCKS, end.saturating_sub(LAST_BLOCKS)..end];
        ranges.into_iter().chain(contents).any(|range| blocks.range_cardinality(range) > 0)
    }

    /// Its layout, where that is another than was told.
    fn look(&mut self, volume: usize, reader: &mut dyn BlockReader) -> Option<(VolumeSlot, Layout)> {
        let sector_bytes = Device::inspect(&self.device).ok().and_then(|device| device.sector_bytes().ok());
        let mut read = |offset: u64, buffer: &mut [u8]| reader::read_at(reader, volume, offset, buffer);
        let found = layout::look(&mut read, self.size_bytes, &[sector_bytes.unwrap_or(SECTOR_BYTES as u32)]);
        let found = match found {
            Ok(found) => found.layout,
            Err(error) => {
                tracing::debug!(device = %self.device.display(), %error, "how the disk is laid out cannot be read now");
                return None;
            }
        };
        self.is_touched = false;
        // As a record has it: a name that is too long for one is no change.
        let layout = Layout::decode(&found.encode())?;
        let has_table = |layout: &Layout| layout.table != Table::None;
        let is_news =
            self.told.as_ref() != Some(&layout) && (has_table(&layout) || self.told.as_ref().is_some_and(has_table));
        is_news.then_some((self.slot, layout))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::disk::whole;
    use std::os::unix::fs::FileExt as _;

    const DISK_BYTES: u64 = 8 << 20;

    fn write_table(disk: &std::fs::File, kind: u8) {
        let mut sector = [0; 512];
        sector[446 + 4] = kind;
        sector[446 + 8..446 + 12].copy_from_slice(&2048_u32.to_le_bytes());
        sector[446 + 12..446 + 16].copy_from_slice(&4096_u32.to_le_bytes());
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        disk.write_all_at(&sector, 0).expect("written");
    }

    #[test]
    fn a_layout_is_told_once_and_again_where_something_has_touched_and_changed_it() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(DISK_BYTES).expect("long enough");
        let volumes = [Volume { slot: VolumeSlot(3), size_bytes: DISK_BYTES, name: "vda".into() }];
        let mut disks = DiskLayouts::new(&volumes, [file.path().to_owned()]);
        let mut reader = reader::open(&[whole(file.path(), DISK_BYTES)]).expect("opened");
        let mut told = |disks: &mut DiskLayouts| {
            disks.take(&mut *reader).into_iter().map(|(slot, layout)| (slot.0, layout.partitions)).collect::<Vec<_>>()
        };
        assert_eq!(told(&mut disks), [], "there is no table");
        write_table(file.as_file(), 0x83);
        assert_eq!(told(&mut disks), [], "nothing was captured");
        let capture = |blocks: &[u32]| blocks.iter().copied().collect::<RoaringBitmap>();
        let touch = |disks: &mut DiskLayouts, blocks: &[u32]| {
            let is_told_by = disks.0[0].is_told_by(&capture(blocks));
            disks.0[0].is_touched |= is_told_by;
            is_told_by
        };
        assert!(touch(&mut disks, &[0]));
        let first = told(&mut disks);
        assert!(first.len() == 1 && first[0].0 == 3 && first[0].1[0].number == 1, "{first:?}");
        // The partition begins at block 256.
        assert!(touch(&mut disks, &[256 + 16]) && !touch(&mut disks, &[256 + 17, 1000]));
        assert!(touch(&mut disks, &[2047]) && !touch(&mut disks, &[2047 - 16]));
        assert_eq!(told(&mut disks), [], "nothing has changed");
        write_table(file.as_file(), 0x82);
        assert!(touch(&mut disks, &[17, 900]));
        assert_eq!(told(&mut disks).len(), 1, "another type");
        disks.tell_again();
        assert_eq!(told(&mut disks).len(), 1, "another generation");
        file.as_file().write_all_at(&[0; 512], 0).expect("written");
        assert!(touch(&mut disks, &[0]));
        let gone = told(&mut disks);
        assert!(gone.len() == 1 && gone[0].1.is_empty(), "{gone:?}");
    }
}
