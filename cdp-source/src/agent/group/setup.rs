//! What a group is made of, what happens to it, and what it needs of the world: the seams between its thread and the rest.

use super::DiskLayouts;
use crate::agent::encoding::Encoded;
use crate::agent::status::GroupStatus;
use crate::config::HooksConfig;
use crate::control::Reply;
use crate::cut::CutLimits;
use crate::digests::Digests;
use crate::encoder::Encoder;
use crate::exclusion::Exclusion;
use crate::freeze::Freezer;
use crate::hooks::HookEvent;
use crate::reader::BlockReader;
use crate::restore::learn::LearnError;
use crate::saved::proofs::Proofs;
use crate::saved::saving::Saver;
use crate::spool::Spool;
use crate::tracker::Tracker;
use cdp_protocol::record::Begin;
use cdp_protocol::seal::DataKey;
use cdp_protocol::session::memo::Memo;
use cdp_protocol::session::source::{GroupFacts, Outgoing, SourceEvent};
use cdp_protocol::units::{Epoch, Extent, Head, Timestamp, VolumeSlot};
use cdp_seams::clock::Clock;
use cdp_seams::random::Random;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::oneshot;

/// The way to the target.
pub trait Link: Send {
    /// Takes an attempt; of a generation that is over it is passed over.
    fn submit(&self, outgoing: Outgoing);
    /// The memo names this commit: it may leave.
    fn proceed(&self, head: Head);
    /// The volumes are as they were at `epoch`.
    fn unchanged(&self, epoch: Epoch, as_of: Timestamp);
    /// Asks which blocks the target was sent after a point.
    fn list_changes(&self, since: Head);
    /// Asks what the target holds of some blocks at its newest point, if that is this one.
    fn list_digests(&self, _head: Head, _volume: VolumeSlot, _blocks: Extent) {}
    /// What the line carries, in bytes a second, once that is known.
    fn bytes_per_s(&self) -> Option<f64> {
        None
    }
    /// Whether there is a line now.
    fn is_connected(&self) -> bool;
}

/// What happens to a group.
pub enum Input {
    /// The line or the target says something.
    Link(SourceEvent),
    /// An attempt is encoded.
    Encoded(Encoded),
    /// A point is wanted now.
    Point(PointRequest),
    /// Whether a volume is being restored has changed; answered with why no points are made, if so.
    Restoring(oneshot::Sender<Option<String>>),
    /// The hooks around a point have got further.
    Hook(HookEvent),
    /// The end. The tracking goes on in the kernel.
    Stop(Ending),
}

/// What comes after a group's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It is started again at once.
    Reload,
    /// The agent ends, and with it perhaps the boot.
    Agent,
}

/// A point that is wanted now.
pub struct PointRequest {
    /// Its name.
    pub label: Option<String>,
    /// Whether to answer only once it is acked.
    pub wait: bool,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Reply>,
}

/// What a group's volumes are watched and read with.
pub struct Devices {
    /// Watches them.
    pub tracker: Box<dyn Tracker>,
    /// Reads them.
    pub reader: Box<dyn BlockReader>,
    /// Says what of them is left out.
    pub exclusion: Box<dyn Exclusion>,
}

/// Opens a group's volumes; tells in a line why not.
pub type Opener = Box<dyn FnMut() -> Result<Devices, String> + Send>;
/// Makes the way to the target, for a group that remembers this.
pub type Connect = Box<dyn FnOnce(Memo) -> Box<dyn Link> + Send>;
/// Tells in a line which volume of the group is being restored, if one is: it is neither old nor new, and no point is made of it.
pub type IsRestoring = Box<dyn Fn() -> Option<String> + Send>;

/// Asks the target what its newest point holds of every block, and gives digests that are of it. Is told how many blocks of how many are
/// done, and answers whether to go on.
pub type Learner = Box<dyn FnMut(&mut dyn FnMut(u64, u64) -> bool) -> Result<Digests, LearnError> + Send>;

/// The memo beside the tracker's own, for when that is gone with a reboot: told on a new generation and at a clean end, never
/// for an epoch. Without it a source that lost its tracking would not even know that it had points.
pub trait KeptMemo: Send {
    /// What was kept last; nothing where nothing was, or where it is damaged.
    ///
    /// # Errors
    /// Where it cannot be read now, told in a line. A source that said that it knows nothing, and knew it again after its next
    /// start, would be taken for two.
    fn load(&self) -> Result<Memo, String>;
    /// Keeps it, or logs why not: it is a help, not a promise.
    fn keep(&self, memo: &Memo);
}

/// What a group is made of.
pub struct GroupSetup {
    /// What the target is told of it.
    pub facts: GroupFacts,
    /// Names the key, in each attempt.
    pub begin: Begin,
    /// The key.
    pub data_key: DataKey,
    /// From cut to cut.
    pub interval: Duration,
    /// In so long every block that nobody writes to is read once.
    pub audit_interval: Duration,
    /// How far a cut goes.
    pub limits: CutLimits,
    /// What is run around the cut of a point that is asked for.
    pub hooks: Option<HooksConfig>,
    /// Freezes its file systems where cuts do not validate.
    pub freezer: Option<Freezer>,
    /// Opens its volumes.
    pub opener: Opener,
    /// Makes its way to the target.
    pub connect: Connect,
    /// Its memo, kept beside the tracker's.
    pub kept_memo: Box<dyn KeptMemo>,
    /// Saves what is dirty when the agent ends, for another boot.
    pub saver: Option<Saver>,
    /// Which volumes are to be gone through soon.
    pub proofs: Option<Proofs>,
    /// Which volume of it is being restored.
    pub restoring: IsRestoring,
    /// Told when the volumes were opened for the first time.
    pub opened: Option<oneshot::Sender<()>>,
    /// Encodes.
    pub encoder: Arc<Encoder>,
    /// What the target holds.
    pub digests: Digests,
    /// Has digests that are lost come back from the target; none where nothing is sent to one.
    pub learner: Option<Learner>,
    /// How its disks are laid out; none where that is told nobody.
    pub layouts: Option<DiskLayouts>,
    /// What the line has not taken.
    pub spool: Spool,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Ids of attempts.
    pub random: Arc<dyn Random>,
    /// Where others see how it stands.
    pub status: Arc<Mutex<GroupStatus>>,
}
