//! The identity of a tracking: what must be the same for its marks to be worth anything.
//!
//! It is in a pinned map and in the state folder. Whatever is missing or different makes whole volumes dirty; this file
//! says what differs, in words for a person. Does not look at the kernel's objects (`instance` does).

use super::device::Device;
use cdp_protocol::units::{GroupId, Sectors, VolumeSlot};
use serde::{Deserialize, Serialize};

/// Version of the layout of the pinned maps (`docs/format/tracker-maps.md`). Maps of another one are not read.
pub const LAYOUT: u32 = 3;

/// What a tracking is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Version of the layout of its maps.
    pub layout: u32,
    /// Its own name: random, in hexadecimal; the name of its folder in bpffs.
    pub tracker: String,
    /// BLAKE3 of the programs it runs, in hexadecimal.
    pub program: String,
    /// The boot it was started in, as the kernel names it.
    pub boot: String,
    /// The group it watches.
    pub group: GroupId,
    /// The volumes it watches, by slot.
    pub volumes: Vec<VolumeIdentity>,
}

/// What a tracked volume is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeIdentity {
    /// Its place in the group.
    pub slot: VolumeSlot,
    /// Number of the whole disk.
    pub disk: String,
    /// The disk's sequence number.
    pub diskseq: u64,
    /// Where its window begins.
    pub start_sectors: Sectors,
    /// How long its window is.
    pub length_sectors: Sectors,
    /// The hidden disks its requests complete on.
    #[serde(default)]
    pub paths: Vec<String>,
    /// Hash of the disk's device-mapper table, where it has one.
    #[serde(default)]
    pub table: Option<String>,
}

/// Why a volume is dirty as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// It was not tracked before: nothing is lost.
    Joined(String),
    /// The marks made before are worth nothing.
    Lost(String),
}

impl VolumeIdentity {
    /// The identity of `device` in `slot`.
    #[must_use]
    pub fn new(slot: VolumeSlot, device: &Device) -> Self {
        Self {
            slot,
            disk: device.disk.to_string(),
            diskseq: device.diskseq,
            start_sectors: device.start,
            length_sectors: device.length,
            paths: device.paths.clone(),
            table: device.table.clone(),
        }
    }

    /// Why marks made for `before` are worth nothing for this volume; `None` where they hold.
    #[must_use]
    pub fn differs_from(&self, before: &Self) -> Option<String> {
        let slot = self.slot;
        if before.disk != self.disk {
            return Some(format!("volume {slot} is on device {}, was on {}", self.disk, before.disk));
        }
        if before.diskseq != self.diskseq {
            return Some(format!(
                "volume {slot} is another device (sequence number {}, was {})",
                self.diskseq, before.diskseq
            ));
        }
        if before.length_sectors != self.length_sectors {
            let (is, was) = (self.length_sectors, before.length_sectors);
            return Some(format!("volume {slot} has {is} sectors, had {was}"));
        }
        if before.paths != self.paths {
            return Some(format!("volume {slot} has the paths {:?}, had {:?}", self.paths, before.paths));
        }
        if before.table != self.table {
            return Some(format!("volume {slot} has another device-mapper table"));
        }
        if before.start_sectors != self.start_sectors {
            let (is, was) = (self.start_sectors, before.start_sectors);
            return Some(format!("volume {slot} begins at sector {is}, was {was}"));
        }
        None
    }
}

impl Identity {
    /// Why nothing of the tracking `self`, as the state folder names it, can be used in boot `boot` for `group`.
    #[must_use]
    pub fn unusable(&self, boot: &str, group: GroupId) -> Option<String> {
        if self.boot != boot {
            return Some("the machine was started anew (another boot id)".to_owned());
        }
        if self.group != group {
            return Some(format!("the tracking belongs to group {}", self.group));
        }
        if self.layout != LAYOUT {
            return Some(format!("the tracking has layout {}, this version has {LAYOUT}", self.layout));
        }
        None
    }

    /// Per volume of `self`: `None` where the marks `before` holds for it go on, else why they do not.
    #[must_use]
    pub fn differences(&self, before: &Self) -> Vec<Option<Difference>> {
        let difference = |volume: &VolumeIdentity| match before.volume(volume.slot) {
            None => Some(Difference::Joined(format!("volume {} was not tracked before", volume.slot))),
            Some(before) => volume.differs_from(before).map(Difference::Lost),
        };
        self.volumes.iter().map(difference).collect()
    }

    fn volume(&self, slot: VolumeSlot) -> Option<&VolumeIdentity> {
        self.volumes.iter().find(|volume| volume.slot == slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        let volume = |slot, diskseq| VolumeIdentity {
            slot: VolumeSlot(slot),
            disk: "7:0".to_owned(),
            diskseq,
            start_sectors: Sectors(63),
            length_sectors: Sectors(1000),
            paths: Vec::new(),
            table: None,
        };
        Identity {
            layout: LAYOUT,
            tracker: "00".to_owned(),
            program: "11".to_owned(),
            boot: "b".to_owned(),
            group: GroupId([1; 16]),
            volumes: vec![volume(0, 5), volume(3, 6)],
        }
    }

    #[test]
    fn only_the_volume_that_differs_starts_over() {
        let before = identity();
        let mut now = identity();
        assert_eq!(now.differences(&before), [None, None]);
        now.volumes[1].diskseq = 7;
        let differences = now.differences(&before);
        assert_eq!(differences[0], None);
        assert!(matches!(&differences[1], Some(Difference::Lost(reason)) if reason.contains("another device")));
        now.volumes[1].slot = VolumeSlot(4);
        let differences = now.differences(&before);
        assert!(matches!(&differences[1], Some(Difference::Joined(reason)) if reason.contains("not tracked")));
    }

    #[test]
    fn a_window_that_moved_or_changed_its_length_starts_over() {
        let before = identity().volumes[0].clone();
        let moved = VolumeIdentity { start_sectors: Sectors(64), ..before.clone() };
        let grown = VolumeIdentity { length_sectors: Sectors(1001), ..before.clone() };
        assert!(moved.differs_from(&before).is_some_and(|reason| reason.contains("begins")));
        assert!(grown.differs_from(&before).is_some_and(|reason| reason.contains("1001")));
        assert_eq!(before.differs_from(&before), None);
    }

    #[test]
    fn another_boot_group_or_layout_makes_all_of_it_unusable() {
        let before = identity();
        assert_eq!(before.unusable("b", GroupId([1; 16])), None);
        assert!(before.unusable("c", GroupId([1; 16])).is_some());
        assert!(before.unusable("b", GroupId([2; 16])).is_some());
        assert!(Identity { layout: LAYOUT + 1, ..before }.unusable("b", GroupId([1; 16])).is_some());
    }
}
