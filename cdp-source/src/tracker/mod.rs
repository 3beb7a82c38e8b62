//! Which blocks were written: the trait all trackers share.
//!
//! A tracker watches every volume of one group. It forgets a block only when it is told that the block's content is
//! durable at the target (`retain_unacked`); whatever it cannot vouch for is dirty. It is owned by the one thread
//! that cuts.

mod barrier;
pub mod bitmap;
pub mod device;
mod dm_table;
mod doubt;
pub mod ebpf;
pub mod identity;
mod instance;
mod kernel_counts;
mod kernel_file;
mod loading;
pub mod memory;
mod options;
mod pins;
mod programs;
pub mod scan;
mod suspects;
mod takeover;
mod trust;
mod watch;

pub use kernel_counts::DiskCounts;
pub use trust::{DiskReport, TrustReport};

use cdp_protocol::units::{Block, VolumeSlot};
use device::Device;
use identity::Identity;
use roaring::RoaringBitmap;

/// A volume as the tracker found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrackedVolume {
    /// Its place in the group.
    pub slot: VolumeSlot,
    /// Its size in bytes when it was opened.
    pub size_bytes: u64,
}

/// Watches the volumes of a group. Volumes are named by their index in `volumes`; a set of blocks is a bitmap each.
pub trait Tracker: Send {
    /// The volumes, in the order they were given.
    fn volumes(&self) -> &[TrackedVolume];

    /// What was dirty and not acked when the tracker was opened: everything, where its identity did not match.
    /// Gives it once; it stays in `unacked` until `retain_unacked` leaves it out.
    fn take_recovered(&mut self) -> Vec<RoaringBitmap>;

    /// One instant τ for all volumes: from here marks go elsewhere, and what was marked before is given back. Every
    /// block given back is in `unacked` first.
    ///
    /// # Errors
    /// Where the instant cannot be vouched for (stragglers past their deadline, a device that changed). What had been
    /// drained is kept and comes with the next flip.
    fn flip(&mut self) -> Result<Vec<RoaringBitmap>, TrackerError>;

    /// A flip that begins no instant: gives what was marked since the last one, and asks the kernel's own counters, which a flip alone does.
    ///
    /// # Errors
    /// As `flip`.
    fn flip_again(&mut self) -> Result<Vec<RoaringBitmap>, TrackerError> {
        self.flip()
    }

    /// Whether a write to the block may have been issued after the last flip. To be asked when its read has returned.
    fn is_conflicted(&self, volume: usize, block: Block) -> bool;

    /// Whether `is_conflicted` knows of writes. Where not, `settle` alone says whether an instant stands, and a flip may cost a pass over the
    /// volumes.
    fn sees_conflicts(&self) -> bool {
        true
    }

    /// Which of `blocks` are known to be zeros without being read: wholly discarded or zeroed, and not written since. To
    /// be asked instead of reading them; after it, `is_conflicted` is asked as after a read.
    fn holes(&self, _volume: usize, _blocks: &RoaringBitmap) -> RoaringBitmap {
        RoaringBitmap::new()
    }

    /// Whether nothing was in flight at the last flip, so that a block that no flip since has given is what it was then. `false` where that
    /// is not known.
    fn was_quiet(&self) -> bool {
        false
    }

    /// Ends a round: whether what was read since the last flip and is not conflicted stands. (A tracker that has no
    /// marks of issued writes compares the volume once more here.)
    ///
    /// # Errors
    /// Where the volume cannot be looked at.
    fn settle(&mut self) -> Result<bool, TrackerError>;

    /// Makes `unacked` exactly this: all that is captured and not acked, and what the next cut has to carry.
    ///
    /// # Errors
    /// Where the pinned bitmap cannot be written.
    fn retain_unacked(&mut self, union: &[RoaringBitmap]) -> Result<(), TrackerError>;

    /// A few bytes (at most 1 KiB) that live exactly as long as the tracking: the head of the chain. Empty at first.
    ///
    /// # Errors
    /// Where they cannot be read.
    fn memo(&self) -> Result<Vec<u8>, TrackerError>;

    /// Keeps `memo`, surviving the death of this process wherever the tracking itself does.
    ///
    /// # Errors
    /// Where it cannot be written.
    fn set_memo(&mut self, memo: &[u8]) -> Result<(), TrackerError>;

    /// Bytes that were issued to each volume's disk to be written, discarded or zeroed, since the tracking began: all of the disk's,
    /// whichever of its volumes they went to. `None` where the tracker does not count.
    fn written_bytes(&self) -> Vec<Option<u64>> {
        vec![None; self.volumes().len()]
    }

    /// What another boot needs to go on from here; `None` where none could.
    fn parting(&self) -> Option<Parting<'_>> {
        None
    }

    /// Name and counters, for `status` and metrics.
    fn report(&self) -> TrackerReport;
}

/// What a tracking comes to when it is left.
pub struct Parting<'a> {
    /// Which tracking it is.
    pub identity: &'a Identity,
    /// Its volumes' devices, in their order.
    pub devices: &'a [Device],
    /// All that is marked or not acked, of each volume.
    pub dirty: Vec<RoaringBitmap>,
    /// Whether all writes have a range, or were answered for by a comparison.
    pub is_answered: bool,
}

/// What the tracking of an earlier boot left behind, for one that begins anew.
pub trait LeftBehind: Send + Sync {
    /// What was dirty when `before` was left, if that is all there is to each of the devices now. Asked once every write is marked; before it returns, what
    /// follows from its answer is durable.
    ///
    /// # Errors
    /// Why nothing is known of any, in a line.
    fn left(&self, before: &Identity, devices: &[(VolumeSlot, &Device)]) -> Result<Left, String>;
}

/// The answer.
pub struct Left {
    /// When it was left, for people.
    pub stopped: String,
    /// What was dirty then, of each device; or why that is not known.
    pub volumes: Vec<Result<RoaringBitmap, String>>,
}

/// What a tracker says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct TrackerReport {
    /// `ebpf` or `scan`.
    pub kind: &'static str,
    /// Why everything was dirty at open; `None` where the tracking went on.
    pub started_over: Option<String>,
    /// Which volumes are dirty because they joined and were not tracked before; `None` where none did.
    pub first_copy: Option<String>,
    /// Which volumes go on from the record of a clean stop in another boot; `None` where none do.
    pub taken_up: Option<String>,
    /// Writes issued, as the tracker counted them.
    pub issued: u64,
    /// Writes completed, as the tracker counted them.
    pub completed: u64,
    /// Runs the kernel passed over.
    pub misses: u64,
    /// How far it is to be trusted.
    pub trust: TrustReport,
}

/// Why a tracker cannot vouch.
#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    /// A volume is not what it was: vanished, grown, shrunk, another device. Stop; an operator or a reopen decides.
    #[error("volume {slot}: {reason}")]
    VolumeChanged {
        /// The volume.
        slot: VolumeSlot,
        /// What is different, in a line.
        reason: String,
    },
    /// This cut cannot be had; another may.
    #[error("straggling tracker runs: {0}")]
    Stragglers(String),
    /// No cut can be had until the tracking is trusted again, by itself.
    #[error("the tracking is in doubt: {0}")]
    InDoubt(String),
    /// The tracker cannot work here: which step, and why. The hint says what would help.
    #[error("{step}: {reason}")]
    Unsupported {
        /// What was tried.
        step: String,
        /// What came back.
        reason: String,
    },
    /// A system call failed.
    #[error("{step}")]
    Io {
        /// What was tried, on what.
        step: String,
        /// What came back.
        #[source]
        source: std::io::Error,
    },
}
