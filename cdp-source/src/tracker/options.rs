//! What the eBPF tracker is told: which volumes, and where the tracking is kept.

use super::LeftBehind;
use super::pins::BPFFS;
use super::programs::Programs;
#[cfg(feature = "sabotage")]
use super::programs::Sabotage;
use cdp_protocol::units::{GroupId, VolumeSlot};
use cdp_seams::storage::Storage;
use std::path::PathBuf;
use std::sync::Arc;

/// What to track, and where the tracking is kept.
pub struct EbpfOptions {
    /// The group.
    pub group: GroupId,
    /// Its volumes.
    pub volumes: Vec<(VolumeSlot, PathBuf)>,
    /// Where bpffs is mounted; mounted there if it is not.
    pub bpffs: PathBuf,
    /// Where the identity is kept, in `tracker-<group>.json`.
    pub state_folder: PathBuf,
    /// How to get there.
    pub storage: Arc<dyn Storage>,
    /// Where the kernel tells the boot's id.
    pub boot_id_path: PathBuf,
    /// What a stop in another boot left behind.
    pub left_behind: Option<Arc<dyn LeftBehind>>,
    /// What it is to do wrong, for a test that must notice.
    #[cfg(feature = "sabotage")]
    pub sabotage: Option<Sabotage>,
}

impl EbpfOptions {
    /// The usual places of bpffs and of the boot's id.
    #[must_use]
    pub fn new(
        group: GroupId,
        volumes: Vec<(VolumeSlot, PathBuf)>,
        state_folder: PathBuf,
        storage: Arc<dyn Storage>,
    ) -> Self {
        let bpffs = PathBuf::from(BPFFS);
        let boot_id_path = PathBuf::from("/proc/sys/kernel/random/boot_id");
        Self {
            group,
            volumes,
            bpffs,
            state_folder,
            storage,
            boot_id_path,
            left_behind: None,
            #[cfg(feature = "sabotage")]
            sabotage: None,
        }
    }

    #[cfg(feature = "sabotage")]
    pub(super) fn programs(&self) -> Programs {
        self.sabotage.map_or(Programs::PLAIN, Sabotage::programs)
    }

    #[cfg(not(feature = "sabotage"))]
    #[expect(clippy::unused_self, reason = "only tests choose")]
    pub(super) const fn programs(&self) -> Programs {
        Programs::PLAIN
    }

    pub(super) fn record(&self) -> PathBuf {
        self.state_folder.join(format!("tracker-{}.json", self.group))
    }
}
