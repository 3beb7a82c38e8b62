//! The spool as a queue: what comes in, what is handed over to be sent, what is acked.
//!
//! Invariant: an attempt leaves only once it is acked, or once nothing of it will ever be.

use super::{Contents, Entry, HeldIn, Keys, Spool, SpoolError, WINDOW_ATTEMPTS, WINDOW_BYTES, Waiting};
use crate::agent::ledger::Blocks;
use bytes::Bytes;
use cdp_protocol::record::PartChain;
use cdp_protocol::session::source::Outgoing;
use cdp_protocol::units::{AttemptId, Epoch};
use std::sync::Arc;

impl Spool {
    /// Takes an attempt with these blocks, behind all there are.
    pub fn push(&mut self, outgoing: Outgoing, blocks: Arc<Blocks>) {
        self.entries.push_back(Entry::new(outgoing, blocks));
        self.changed();
    }

    /// The next attempt to be handed over, while those that are and are not acked leave room for it; what it holds, where it comes from
    /// the file.
    ///
    /// # Errors
    /// Where it is damaged or cannot be read. It stays: nothing behind it can be sent without it.
    pub fn hand_over(&mut self, keys: Keys<'_>) -> Result<Option<(Outgoing, Option<Contents>)>, SpoolError> {
        let Some(entry) = self.entries.get(self.handed).filter(|entry| self.has_window(entry)) else { return Ok(None) };
        let frames = self.load(entry)?;
        let contents = match entry.held {
            HeldIn::Memory(_) => None,
            HeldIn::File(_) => Some(Self::prove(entry, keys, &frames)?),
        };
        let outgoing = entry.outgoing(frames);
        self.begun = self.begun.max(Some(entry.epoch));
        self.handed += 1;
        Ok(Some((outgoing, contents)))
    }

    /// What frames that were read hold, where they are those that were written.
    pub(super) fn prove(entry: &Entry, keys: Keys<'_>, frames: &[Bytes]) -> Result<Contents, SpoolError> {
        let decoded = keys.frames(entry.attempt, entry.list, frames);
        let contents = decoded.and_then(|frames| keys.contents(entry.attempt, &frames));
        contents.ok_or_else(|| Self::error(entry, "its frames are not what was written"))
    }

    fn has_window(&self, next: &Entry) -> bool {
        let handed = || self.entries.range(..self.handed);
        let bytes: u64 = handed().map(|entry| entry.bytes).sum();
        self.handed < WINDOW_ATTEMPTS
            && handed().filter(|entry| !entry.is_part()).count() < self.limits.window_epochs
            && (bytes == 0 || bytes + next.bytes <= WINDOW_BYTES)
    }

    /// A point is acked, with all before it.
    pub fn acked(&mut self, epoch: Epoch) {
        while self.entries.front().is_some_and(|entry| entry.epoch <= epoch) {
            self.pop();
        }
        // Its parts are part of a point now.
        self.parts_acked = self.parts_acked.filter(|(of, _)| *of > epoch);
    }

    /// A part is acked; `parts`: its epoch's with it.
    pub fn part_acked(&mut self, attempt: AttemptId, epoch: Epoch, parts: PartChain) {
        if self.entries.front().is_some_and(|entry| entry.attempt == attempt) {
            self.pop();
        }
        self.parts_held(epoch, parts);
    }

    /// The target holds these parts of an epoch.
    pub fn parts_held(&mut self, epoch: Epoch, parts: PartChain) {
        self.begun = self.begun.max(Some(epoch));
        self.parts_acked = Some((epoch, parts.count));
    }

    fn pop(&mut self) {
        let Some(entry) = self.entries.pop_front() else { return };
        self.handed = self.handed.saturating_sub(1);
        self.changed();
        self.before = entry.cut_time().unwrap_or(self.before);
        if let (HeldIn::File(place), Some(file)) = (&entry.held, &mut self.file) {
            file.give_back(place);
        }
    }

    /// How much was not handed over.
    #[must_use]
    pub fn waiting(&self) -> Waiting {
        let mut waiting = Waiting::default();
        for entry in self.entries.range(self.handed..) {
            waiting.bytes += entry.bytes;
            waiting.file_bytes += if matches!(entry.held, HeldIn::File(_)) { entry.bytes } else { 0 };
            if let Some(time) = entry.cut_time() {
                waiting.points += 1;
                waiting.oldest.get_or_insert(time);
            }
        }
        waiting
    }

    /// All attempts that are in it, oldest first.
    pub fn attempts(&self) -> impl Iterator<Item = AttemptId> {
        self.entries.iter().map(|entry| entry.attempt)
    }

    /// The newest epoch that is in it.
    #[must_use]
    pub fn newest(&self) -> Option<Epoch> {
        self.entries.back().map(|entry| entry.epoch)
    }
}
