//! From bytes of a device to blocks of the group's volumes.
//!
//! A volume is a window of a disk, and so is the device of a file system or of a swap area: they overlap where the disk is the
//! same. What lies between (device-mapper, md) is another disk: nothing of it is known here.

use crate::tracker::device::{Device, DeviceNumber, place_of};
use cdp_protocol::units::{BLOCK_BYTES, Sectors};
use roaring::RoaringBitmap;
use std::io;

/// A window of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    disk: DeviceNumber,
    start: Sectors,
    length: Sectors,
}

impl Window {
    /// That of a device.
    #[must_use]
    pub const fn of(device: &Device) -> Self {
        Self { disk: device.disk, start: device.start, length: device.length }
    }

    /// That of the block device with this number.
    pub(super) fn of_number(number: DeviceNumber) -> io::Result<Self> {
        let (disk, start, length) = place_of(number)?;
        Ok(Self { disk, start, length })
    }

    /// Its bytes.
    pub(super) const fn bytes(&self) -> u64 {
        self.length.to_bytes()
    }

    /// Whether any of it is part of `other`.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        let end = |window: &Self| window.start.0 + window.length.0;
        self.disk == other.disk && self.start.0 < end(other) && other.start.0 < end(self)
    }

    /// Adds the blocks of `volume` that lie wholly within `length` bytes at `offset` of this window.
    pub(super) fn add_blocks(&self, volume: &Self, offset: u64, length: u64, blocks: &mut RoaringBitmap) {
        if self.disk != volume.disk {
            return;
        }
        // In bytes of the disk, and within both windows.
        let (own, other) = (self.start.to_bytes(), volume.start.to_bytes());
        let from = own.saturating_add(offset).max(other);
        let end = own.saturating_add(offset.saturating_add(length).min(self.bytes())).min(other + volume.bytes());
        let block = BLOCK_BYTES as u64;
        let (from, end) = (from.saturating_sub(other).div_ceil(block), end.saturating_sub(other) / block);
        if from < end
            && let (Ok(from), Ok(last)) = (u32::try_from(from), u32::try_from(end - 1))
        {
            blocks.insert_range(from..=last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::proptest;

    const DISK: DeviceNumber = DeviceNumber { major: 8, minor: 0 };

    const fn window(start: u64, length: u64) -> Window {
        Window { disk: DISK, start: Sectors(start), length: Sectors(length) }
    }

    proptest! {
        /// The oracle looks at every sector of every block.
        #[test]
        fn a_block_counts_if_all_of_it_lies_in_both(
            own in (0..40u64, 1..80u64), volume in (0..40u64, 1..80u64), offset in 0..60_000u64, length in 0..60_000u64
        ) {
            let (own, volume) = (window(own.0, own.1), window(volume.0, volume.1));
            let mut blocks = RoaringBitmap::new();
            own.add_blocks(&volume, offset, length, &mut blocks);
            let in_file = |byte: u64| {
                let own_byte = byte.checked_sub(own.start.to_bytes());
                own_byte.is_some_and(|byte| byte < own.bytes() && (offset..offset + length).contains(&byte))
            };
            let is_whole = |block: &u32| {
                let from = u64::from(*block) * 4096;
                let mut bytes = (from..from + 4096).map(|byte| volume.start.to_bytes() + byte);
                from + 4096 <= volume.bytes() && bytes.all(in_file)
            };
            assert_eq!(blocks.iter().collect::<Vec<_>>(), (0..20).filter(is_whole).collect::<Vec<_>>());
        }
    }

    #[test]
    fn another_disk_is_elsewhere_and_the_ends_of_numbers_do_no_harm() {
        let other = Window { disk: DeviceNumber { major: 8, minor: 16 }, ..window(0, 80) };
        let mut blocks = RoaringBitmap::new();
        other.add_blocks(&window(0, 80), 0, 40960, &mut blocks);
        window(0, 80).add_blocks(&window(0, 80), u64::MAX - 5, u64::MAX, &mut blocks);
        assert!(blocks.is_empty() && !other.overlaps(&window(0, 80)));
        assert!(window(10, 10).overlaps(&window(19, 1)) && !window(10, 10).overlaps(&window(20, 1)));
    }
}
