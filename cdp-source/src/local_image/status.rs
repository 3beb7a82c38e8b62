//! How the local images of a group stand: what `status` and the metrics tell, and what of it outlives the agent.

use super::ImageError;
use crate::agent::status::rfc3339;
use crate::state::{StateError, StateFolder};
use cdp_protocol::units::{Epoch, Timestamp};
use cdp_seams::storage;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

const VERSION: u32 = 1;
const BYTES_MAX: u64 = 64 * 1024;

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImagePhase {
    /// The volumes are read.
    Reading,
    /// What was captured meanwhile is taken in, until a point closes it.
    Closing,
    /// What was written is read again.
    Verifying,
}

/// An image that was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastImage {
    /// Its point.
    pub epoch: Epoch,
    /// The instant of that.
    pub time: Timestamp,
    /// When it was finished.
    pub made: Timestamp,
    /// Bytes of its file.
    pub bytes: u64,
    /// How long it took.
    pub seconds: f64,
    /// Its file.
    pub path: PathBuf,
    /// Blocks that the devices could not read.
    #[serde(default)]
    pub unreadable_blocks: u64,
}

/// Why there is no newer one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFailure {
    /// When.
    pub time: Timestamp,
    /// Why, in a line.
    pub reason: String,
    /// The next step.
    pub hint: Option<String>,
}

/// How they stand.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LocalImageStatus {
    /// Where they are kept.
    pub folder: PathBuf,
    /// Since when this agent looks after them.
    pub since: Timestamp,
    /// What is being done, while one is made.
    pub phase: Option<ImagePhase>,
    /// Bytes of the volumes that are done in that phase.
    pub done_bytes: u64,
    /// Bytes of the volumes.
    pub all_bytes: u64,
    /// The newest.
    pub last: Option<LastImage>,
    /// When the next one is due.
    pub next: Option<Timestamp>,
    /// Whether it should have been there by now.
    pub overdue: bool,
    /// Why the last try came to nothing.
    pub failure: Option<ImageFailure>,
    /// Tries since the agent's start that are over.
    pub tries: u64,
}

impl LocalImageStatus {
    /// What a person has to look at, in a line.
    #[must_use]
    pub fn alarm(&self) -> Option<String> {
        let failed = self.failure.as_ref().map(|failure| {
            let hint = failure.hint.as_ref().map_or_else(String::new, |hint| format!(" ({hint})"));
            format!("the last try, at {}, failed: {}{hint}", rfc3339(failure.time), failure.reason)
        });
        let lacking = self
            .last
            .as_ref()
            .filter(|last| last.unreadable_blocks > 0)
            .map(|last| format!("the last lacks {} blocks that the device could not read", last.unreadable_blocks));
        failed.or_else(|| self.overdue.then(|| "it is overdue".to_owned())).or(lacking)
    }
}

/// What is kept of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    version: u32,
    /// The newest image.
    pub last: Option<LastImage>,
    /// Why there is no newer one.
    pub failure: Option<ImageFailure>,
}

impl Kept {
    /// The group's; nothing where there is none, or it cannot be read: it is a help for people.
    #[must_use]
    pub fn load(state: &StateFolder, group: &str) -> Self {
        let bytes = storage::read_all(&**state.storage(), &path(state, group), BYTES_MAX);
        let kept = bytes.ok().and_then(|bytes| serde_json::from_slice::<Self>(&bytes).ok());
        kept.filter(|kept| kept.version == VERSION).unwrap_or_default()
    }

    /// Keeps it.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn store(&mut self, state: &StateFolder, group: &str) -> Result<(), StateError> {
        self.version = VERSION;
        let (path, text) = (path(state, group), serde_json::to_string_pretty(self).expect("it is plain JSON"));
        let stored = storage::replace(&**state.storage(), &path, text.as_bytes());
        stored.map_err(|source| StateError::Io { action: "write", path, source })
    }
}

impl ImageFailure {
    /// Of an error.
    #[must_use]
    pub fn of(error: ImageError, time: Timestamp) -> Self {
        let hint = error.hint();
        Self { time, reason: format!("{:#}", anyhow::Error::new(error)), hint }
    }
}

fn path(state: &StateFolder, group: &str) -> PathBuf {
    state.root().join("groups").join(group).join("local-image.json")
}
