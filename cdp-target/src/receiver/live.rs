//! What is known of a group while the server runs: the line it is on, and how far its frames have got.
//!
//! In memory only, for `status` and metrics; nothing is decided by it.

use cdp_protocol::units::{Epoch, Generation, Sequence, Timestamp};
use serde::Serialize;

/// A group as it is now. Times are the target's clock unless they say otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LiveGroup {
    /// Since when its source has it open; `None` while no source has.
    pub connected_since: Option<Timestamp>,
    /// The generation granted last.
    pub generation: Generation,
    /// The newest frame that was taken: its epoch and sequence.
    pub received: Option<(Epoch, Sequence)>,
    /// When that was.
    pub received_at: Option<Timestamp>,
    /// The newest epoch whose commit was appended.
    pub journaled: Option<Epoch>,
    /// The newest epoch that is durable and acked.
    pub acked: Option<Epoch>,
    /// When that was.
    pub acked_at: Option<Timestamp>,
    /// Bytes of frames taken since the server started.
    pub received_bytes: u64,
    /// The newest word of the source that nothing was written.
    pub unchanged: Option<Unchanged>,
    /// Why the source is put off or refused, in a line; `None` while all is well.
    pub trouble: Option<String>,
}

/// A source's word that a point still describes its volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Unchanged {
    /// The point.
    pub epoch: Epoch,
    /// When this was validated, by the source's clock.
    pub as_of: Timestamp,
    /// When the word came.
    pub received_at: Timestamp,
}

impl LiveGroup {
    /// How many epochs are appended and not acked.
    #[must_use]
    pub fn lag_epochs(&self) -> u64 {
        let number = |epoch: Option<Epoch>| epoch.unwrap_or_default().0;
        number(self.journaled).saturating_sub(number(self.acked))
    }
}
