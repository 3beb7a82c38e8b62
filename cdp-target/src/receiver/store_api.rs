//! What the receiver needs of a store: groups that are opened or made, and the one writer of each.
//!
//! All of it blocks and is called on a group's own thread. The journal stands behind it in the program, a history in
//! memory in tests.

use crate::journal::change::Change;
use crate::journal::file::FileId;
use crate::journal::{Damage, Fork};
use cdp_protocol::holding::Holding;
use cdp_protocol::message::{OpenGroup, PointSummary};
use cdp_protocol::recall::{Answer, OpenedPoint, Question};
use cdp_protocol::session::chain::{Chain, ChainError, Step};
use cdp_protocol::session::lineage::{Line, Lineage};
use cdp_protocol::session::target::{Claim, Ruling};
use cdp_protocol::units::{Block, Epoch, Extent, Generation, GroupId, Head, Timestamp, VolumeSlot};

/// Blocks of a volume: first block and number of blocks.
pub type Changed = (VolumeSlot, Vec<(Block, u32)>);

/// The groups of a store.
pub trait GroupStore: Send + Sync {
    /// Opens the group that `request` names, or makes it (with its name and envelope).
    ///
    /// # Errors
    /// `NameTaken` where another group of the office has the name; `TooMany` where the office may have no further one;
    /// `Full` where there is no room to make one.
    fn open_or_create(&self, office: &str, request: &OpenGroup) -> Result<Box<dyn GroupWriter>, StoreError>;

    /// Opens a group that is there: after a failure, or for a command.
    ///
    /// # Errors
    /// Where it is not there or cannot be opened.
    fn open(&self, office: &str, group: GroupId) -> Result<Box<dyn GroupWriter>, StoreError>;

    /// Whether the office has the group, as far as can be told: nothing is started for one that it has not.
    fn has(&self, _office: &str, _group: GroupId) -> bool {
        true
    }
}

/// Reads one point for its source. Used on a thread of its own, beside the group's.
pub trait PointReader: Send {
    /// Opens the point that `at` names, by the clock `now`; or says why not, in a line. Once.
    ///
    /// # Errors
    /// Where there is no such point, or it cannot be read.
    fn open(&mut self, at: &str, now: Timestamp) -> Result<OpenedPoint, String>;

    /// Answers a question about a volume of the open point, but for the end of the answer. `tell` gives `false` where nobody listens
    /// any more.
    ///
    /// # Errors
    /// Where the answer is not whole: why, in a line.
    fn answer(
        &mut self,
        slot: VolumeSlot,
        question: &Question,
        tell: &mut dyn FnMut(Answer) -> bool,
    ) -> Result<(), String>;
}

/// The one writer of a group's history.
pub trait GroupWriter: Send {
    /// Where the group stands, with what was appended and not synced.
    fn chain(&self) -> &Chain;

    /// In which generation a durable point was made; `None` for one that is not here.
    ///
    /// # Errors
    /// Where the history cannot be read.
    fn made_in(&self, point: Head) -> Result<Option<Generation>, StoreError>;

    /// How the generations follow one another.
    fn lineage(&self) -> &Lineage;

    /// What an operator said about forks.
    fn ruling(&self) -> &Ruling;

    /// Takes over name and envelope where they changed, durably.
    ///
    /// # Errors
    /// Where they cannot be stored, or the name is another group's.
    fn identify(&mut self, request: &OpenGroup) -> Result<(), StoreError>;

    /// Begins a generation, durably.
    ///
    /// # Errors
    /// Where it cannot be stored.
    fn begin(&mut self, line: Line) -> Result<(), StoreError>;

    /// Appends a frame that follows, or says that it is there already. Not durable.
    ///
    /// # Errors
    /// `Chain`: nothing changed. `Full` and `Failed`: the writer is to be dropped; after `Full` one last sync may yet make
    /// durable what was appended before.
    fn append(&mut self, frame: &cdp_protocol::frame::Frame<'_>, received: Timestamp) -> Result<Step, StoreError>;

    /// Makes all that was appended durable, and its points visible.
    ///
    /// # Errors
    /// Any is final: the writer is to be dropped, nothing appended since the last sync may be acked.
    fn sync(&mut self) -> Result<(), StoreError>;

    /// Why the group is frozen, if it is.
    fn frozen(&self) -> Option<String>;

    /// Freezes the group, durably, until an operator resolves it; one that is frozen takes note of a further fork.
    ///
    /// # Errors
    /// Where it cannot be stored.
    fn freeze(&mut self, reason: &str, fork: Option<Fork>) -> Result<(), StoreError>;

    /// Ends a fork, durably: the history that ends at what `head` names goes on.
    ///
    /// # Errors
    /// Where the group is not forked, no history ends there, or it cannot be stored.
    fn resolve(&mut self, head: &str) -> Result<Claim, StoreError>;

    /// Up to `max` points above `after`, oldest first; only durable ones.
    ///
    /// # Errors
    /// Where the history cannot be read.
    fn points(&self, after: Option<Epoch>, max: usize) -> Result<Vec<PointSummary>, StoreError>;

    /// Blocks that were sent after a point, durable or not, in pieces of at most `MESSAGE_EXTENTS_MAX` extents; `None` where it cannot
    /// be told, or the point is not here.
    ///
    /// # Errors
    /// Where the history cannot be read.
    fn changes_since(&self, since: Head) -> Result<Option<Vec<Changed>>, StoreError>;

    /// What is held of some blocks at a point, from the first on; `None` where that is not the newest one.
    ///
    /// # Errors
    /// Where the history cannot be read.
    fn holdings(&self, _head: Head, _slot: VolumeSlot, _blocks: Extent) -> Result<Option<Vec<Holding>>, StoreError> {
        Ok(None)
    }

    /// Reads one of the durable points, whatever is written meanwhile; `None` where this store reads none.
    fn reader(&self) -> Option<Box<dyn PointReader>> {
        None
    }

    /// Names a point, or takes its name away.
    ///
    /// # Errors
    /// Where there is no such point or it cannot be stored.
    fn label(&mut self, epoch: Epoch, label: Option<&str>) -> Result<(), StoreError>;

    /// Keeps a point from pruning, or no longer.
    ///
    /// # Errors
    /// Where there is no such point or it cannot be stored.
    fn pin(&mut self, epoch: Epoch, pinned: bool) -> Result<(), StoreError>;

    /// Keeps what a reading of a whole sealed segment or pack found, in place of what was known of it, so that the points that need it are
    /// named.
    ///
    /// # Errors
    /// Where it cannot be stored.
    fn note_damages(&mut self, file: FileId, damages: &[Damage]) -> Result<(), StoreError>;

    /// Gives a change that was prepared elsewhere its place, durably.
    ///
    /// # Errors
    /// Where it does not fit any more, or cannot be stored.
    fn adopt(&mut self, change: &Change) -> Result<(), StoreError>;

    /// The oldest change of the manifest that a view here may still go by, where any goes by an older one than the present.
    fn oldest_lease(&self) -> Option<u64>;

    /// Repairs were written: readers are to look anew.
    fn look_again(&mut self) {}
}

/// Why a store did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The frame does not follow: the source's fault.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// No room: push back, try again later.
    #[error("no room: {0}")]
    Full(String),
    /// Another group of the office has the name.
    #[error("the name is another group's")]
    NameTaken,
    /// The office has as many groups as it may.
    #[error("the office has {0} groups, and may have no more")]
    TooMany(usize),
    /// Anything else: the writer can no longer be trusted.
    #[error(transparent)]
    Failed(Box<dyn std::error::Error + Send + Sync>),
}
