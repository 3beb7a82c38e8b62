//! A recovery point as readers of a group see it.

use super::Damage;
use super::index::CommitEntry;
use super::manifest::Mark;
use super::view::{GroupView, Reach};
use cdp_protocol::layout::Layout;
use cdp_protocol::message::PointSummary;
use cdp_protocol::record::volume_meters::VolumeMeters;
use cdp_protocol::record::{Commit, Meters, Volume};
use cdp_protocol::units::{Class, Epoch, FrameHash, Generation, Timestamp, VolumeSlot};

/// A recovery point.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Point {
    /// Its number.
    pub epoch: Epoch,
    /// Hash of its commit.
    pub hash: FrameHash,
    /// The instant of the cut, by the source's clock.
    pub cut_time: Timestamp,
    /// When the target received it.
    pub received: Timestamp,
    /// How much applications may rely on it.
    pub class: Class,
    /// Its name.
    pub label: Option<String>,
    /// Whether it is kept from pruning.
    pub pinned: bool,
    /// Bytes its epoch takes in the journal, with the parts it stands on.
    pub bytes: u64,
    /// What the cut and the epoch amounted to.
    pub meters: Meters,
    /// What became of each volume since the point before; empty where its source did not count.
    pub volumes: Vec<PointVolume>,
    /// How disks are laid out from this point on, where its commit tells.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layouts: Vec<PointLayout>,
    /// The source's incarnation.
    pub generation: Generation,
    /// The lowest epoch number merged into it.
    pub first_epoch: Epoch,
    /// The older point the source went on from, where it did.
    pub after_rollback_to: Option<Epoch>,
    /// What is damaged that it needs.
    pub damaged: Option<String>,
}

impl Point {
    /// As its source may list it.
    #[must_use]
    pub fn summary(self) -> PointSummary {
        PointSummary {
            epoch: self.epoch,
            cut_time: self.cut_time,
            class: self.class,
            label: self.label,
            bytes: self.bytes,
            cut_us: self.meters.cut_us,
            cut_rounds: self.meters.cut_rounds,
        }
    }
}

/// What became of a volume since the point before.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PointVolume {
    /// Its name; its slot where the point has no volume of that slot.
    pub name: String,
    /// By its source's count.
    #[serde(flatten)]
    pub meters: VolumeMeters,
}

impl PointVolume {
    /// The volumes of a commit, by the names that they have in its attempt.
    pub(crate) fn of(commit: &Commit, volumes: &[Volume]) -> Vec<Self> {
        let named =
            |(slot, meters): &(VolumeSlot, VolumeMeters)| Self { name: name_of(volumes, *slot), meters: *meters };
        commit.volumes.iter().map(named).collect()
    }
}

/// How a disk is laid out, from the point on whose commit tells it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PointLayout {
    /// The name of its volume; its slot where the point has no volume of that slot.
    pub name: String,
    /// By its source's word.
    #[serde(flatten)]
    pub layout: Layout,
}

impl PointLayout {
    /// The layouts of a commit, by the names that the volumes have in its attempt.
    fn of(commit: &Commit, volumes: &[Volume]) -> Vec<Self> {
        let named =
            |(slot, layout): &(VolumeSlot, Layout)| Self { name: name_of(volumes, *slot), layout: layout.clone() };
        commit.layouts.iter().map(named).collect()
    }
}

fn name_of(volumes: &[Volume], slot: VolumeSlot) -> String {
    let volume = volumes.iter().find(|volume| volume.slot == slot);
    volume.map_or_else(|| slot.to_string(), |volume| volume.name.clone())
}

impl GroupView {
    pub(super) fn to_point(&self, commit: &CommitEntry, reaches: &[(Reach, &Damage)]) -> Point {
        let epoch = commit.head.epoch;
        let mark = self.manifest().marks.get(&epoch).cloned().unwrap_or_default();
        let Mark { label, pinned } = mark;
        let record = commit.record.as_ref();
        let hits = |reach: &Reach| reach.0 <= epoch && reach.1.is_none_or(|last| epoch <= last);
        let hit = reaches.iter().find(|(reach, _)| hits(reach));
        let damaged =
            hit.map(|(_, damage)| format!("{} at offset {}: {}", damage.place(), damage.offset, damage.describe()));
        let lost = || "its commit is damaged".to_owned();
        let meters = record.map(|record| record.meters).unwrap_or_default();
        Point {
            epoch,
            hash: commit.head.hash,
            cut_time: commit.cut_time(),
            received: commit.received,
            class: record.map_or(Class::Crash, |record| record.class),
            label: match label {
                Some(label) => Some(label).filter(|label| !label.is_empty()),
                None => record.and_then(|record| record.label.clone()),
            },
            pinned,
            bytes: meters.frame_bytes + u64::from(commit.frame_len) + self.part_bytes(commit),
            meters,
            volumes: record.map(|record| PointVolume::of(record, &commit.volumes)).unwrap_or_default(),
            layouts: record.map(|record| PointLayout::of(record, &commit.volumes)).unwrap_or_default(),
            generation: commit.generation,
            first_epoch: record.map_or(epoch, |record| record.first_epoch),
            after_rollback_to: record.and_then(|record| record.after_rollback_to),
            damaged: damaged.or_else(|| record.is_none().then(lost)),
        }
    }
}
