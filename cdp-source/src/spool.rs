//! The spool: sealed attempts of a group that the line has not taken, oldest first, in memory and, where that does not suffice, in a
//! file.
//!
//! Owns the attempts from when they are encoded until they are acked, the file's budget, and the merging of points that are too many.
//! Invariants: attempts are handed over in the order they were captured; what is in the file are the oldest of them, without a gap; what
//! comes back from it is proved or called damaged; an attempt of which anything may have been sent is never changed; nothing is
//! sealed twice under one attempt. Does not know the line, the tracker or when to cut (`agent/group/spooling`).
//!
//! Nothing is synced: after a power cut everything is compared anyway. An agent's death leaves the file to its successor
//! (`take_up`).

mod contents;
mod file;
mod index;
mod merge;
mod queue;
mod successor;
mod thin;

pub use contents::{Contents, Keys};
pub use file::{Place, file_path};
pub use index::{Index, IndexEntry};
pub use merge::{Merged, Piece, Reseal};
pub use successor::TakenUp;

use crate::agent::ledger::Blocks;
use bytes::Bytes;
use cdp_protocol::codec::Sealer;
use cdp_protocol::record::FrameList;
use cdp_protocol::session::memo::Memo;
use cdp_protocol::session::source::{End, Outgoing};
use cdp_protocol::units::{AttemptId, Epoch, GroupId, Timestamp};
use cdp_seams::storage::Storage;
use file::{Layout, SpoolFile};
use index::encode_memo;
use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of frames that wait in memory; what is more goes to the file.
const MEMORY_BYTES_MAX: u64 = 8 << 20;
/// Attempts that are handed over and not acked.
const WINDOW_ATTEMPTS: usize = 16;
/// Epochs of them: `session::SENT_MAX` commits may be under way.
const WINDOW_EPOCHS: usize = 8;
/// Bytes of their frames, but for a single one that is larger.
const WINDOW_BYTES: u64 = 32 << 20;

/// Slabs of the file that there have to be for each point that may wait.
const SLABS_FOR_A_POINT: u64 = 4;

/// How much may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpoolLimits {
    /// Bytes that the file may have; 0: there is none, and nothing waits beyond what memory takes.
    pub bytes_max: u64,
    /// Points captured and not acked.
    pub points_max: u64,
    /// Bytes of frames that wait in memory.
    pub memory_bytes_max: u64,
    /// Epochs that are handed over and not acked.
    pub window_epochs: usize,
}

impl SpoolLimits {
    /// Limits of a spool of so many bytes on the disk and so many points; the rest is what an agent has room for.
    #[must_use]
    pub const fn new(bytes_max: u64, points_max: u64) -> Self {
        Self { bytes_max, points_max, memory_bytes_max: MEMORY_BYTES_MAX, window_epochs: WINDOW_EPOCHS }
    }
}

/// What is in the spool is damaged, or cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("epoch {epoch} in the spool: {reason}")]
pub struct SpoolError {
    /// Of which epoch.
    pub epoch: Epoch,
    /// Why.
    pub reason: String,
}

/// What the line has not taken.
pub struct Spool {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    group: GroupId,
    limits: SpoolLimits,
    file: Option<SpoolFile>,
    /// Why nothing is written any more.
    failure: Option<String>,
    entries: VecDeque<Entry>,
    /// How many of them are handed over.
    handed: usize,
    /// The epoch of which something was handed over last, or is at the target as parts.
    begun: Option<Epoch>,
    /// The epoch behind the newest acked point, and how many of its parts are acked.
    parts_acked: Option<(Epoch, u32)>,
    /// The cut of the newest point that is not among the entries any more.
    before: Timestamp,
    /// Number of the index written last.
    index_number: u64,
    /// Whether that names anything.
    is_indexed: bool,
    merges: u64,
    /// What waits in memory does not fit into the file.
    is_full: bool,
    /// Nor would it if more points were merged; until something changes.
    is_stuck: bool,
    /// Points are merged until they are fewer by an eighth.
    is_thinning: bool,
}

/// An attempt.
struct Entry {
    epoch: Epoch,
    attempt: AttemptId,
    list: FrameList,
    bytes: u64,
    end: End,
    sealer: Arc<Sealer>,
    blocks: Arc<Blocks>,
    held: HeldIn,
}

/// Where its frames are.
enum HeldIn {
    Memory(Vec<Bytes>),
    File(Place),
}

/// How much waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Points that were not handed over to be sent.
    pub points: u64,
    /// Bytes of the frames of what was not.
    pub bytes: u64,
    /// Bytes of them that are in the file.
    pub file_bytes: u64,
    /// When the oldest of these points was cut.
    pub oldest: Option<Timestamp>,
}

impl Spool {
    /// A spool with nothing in it; what is in `folder` is not looked at.
    #[must_use]
    pub fn new(storage: Arc<dyn Storage>, folder: &Path, group: GroupId, mut limits: SpoolLimits) -> Self {
        // Each takes a slab or two, however small it is, and merging takes some.
        let slabs = u64::from(Layout::of(limits.bytes_max).slabs_max);
        limits.points_max = limits.points_max.min(slabs / SLABS_FOR_A_POINT);
        Self {
            storage,
            folder: folder.to_owned(),
            group,
            limits,
            file: None,
            failure: None,
            entries: VecDeque::new(),
            handed: 0,
            begun: None,
            parts_acked: None,
            before: Timestamp(0),
            index_number: 0,
            is_indexed: false,
            merges: 0,
            is_full: false,
            is_stuck: false,
            is_thinning: false,
        }
    }

    /// Whether more may wait than memory takes.
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.limits.bytes_max > 0 && self.failure.is_none()
    }

    /// How much may wait.
    #[must_use]
    pub const fn limits(&self) -> SpoolLimits {
        self.limits
    }

    /// Why nothing is written any more, where that is so.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Points that were merged into others.
    #[must_use]
    pub const fn merges(&self) -> u64 {
        self.merges
    }

    /// Whether one more capture may be made, whatever memory says, of a group with so many points that are not acked.
    #[must_use]
    pub fn has_room(&self, unacked_points: u64) -> bool {
        self.is_on() && unacked_points < self.limits.points_max && self.memory_bytes() <= self.limits.memory_bytes_max
    }

    /// Bytes that may still come to wait, as far as is known.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        let limit = if self.is_on() { self.limits.bytes_max } else { 0 };
        self.file.as_ref().map_or(limit, SpoolFile::free_bytes).min(limit)
    }

    /// Bytes of the file that are in use.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.file.as_ref().map_or(0, SpoolFile::used_bytes)
    }

    /// Whether there was no room in the file for what is in memory alone; until something changes.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.is_full
    }

    /// The attempts whose frames are in the file.
    pub fn spilled(&self) -> impl Iterator<Item = AttemptId> {
        self.entries.iter().filter(|entry| matches!(entry.held, HeldIn::File(_))).map(|entry| entry.attempt)
    }

    /// Bytes of frames that wait in memory and nowhere else.
    fn memory_bytes(&self) -> u64 {
        let waiting = self.entries.range(self.handed..);
        waiting.filter(|entry| matches!(entry.held, HeldIn::Memory(_))).map(|entry| entry.bytes).sum()
    }

    /// Writes to the file what memory should not hold, the oldest first, and gives the attempts that wait and
    /// whose frames are nowhere else now.
    ///
    /// An agent's death before the index leaves the one before it: what it names is still in its place.
    ///
    /// # Errors
    /// Where the file cannot be written: it is not tried again, and what waits in memory stays there.
    pub fn spill(&mut self, memo: &Memo) -> io::Result<Vec<AttemptId>> {
        if self.memory_bytes() <= self.limits.memory_bytes_max {
            return Ok(Vec::new());
        }
        self.spill_all(memo)
    }

    /// Writes to the file what is in memory alone, whatever memory may hold and whether or not it is handed over: it outlives this
    /// agent. Gives what `spill` gives.
    ///
    /// # Errors
    /// As `spill`.
    pub fn spill_all(&mut self, memo: &Memo) -> io::Result<Vec<AttemptId>> {
        let is_any = self.entries.iter().any(|entry| matches!(entry.held, HeldIn::Memory(_)));
        if !self.is_on() || self.is_full || !is_any {
            return Ok(Vec::new());
        }
        let spilled = self.try_spill(memo);
        if let Err(error) = &spilled {
            self.failure = Some(error.to_string());
        }
        spilled
    }

    fn try_spill(&mut self, memo: &Memo) -> io::Result<Vec<AttemptId>> {
        self.open_file()?;
        let mut places = Vec::new();
        for at in 0..self.entries.len() {
            let HeldIn::Memory(frames) = &self.entries[at].held else { continue };
            let frames = frames.clone();
            let Some(place) = self.write(&frames, false, memo)? else { break };
            places.push((at, place));
        }
        let waiting = places.iter().filter(|(at, _)| *at >= self.handed);
        let spilled: Vec<AttemptId> = waiting.map(|(at, _)| self.entries[*at].attempt).collect();
        let is_any = !places.is_empty();
        let mut held = Vec::with_capacity(places.len());
        for (at, place) in places {
            held.push((at, std::mem::replace(&mut self.entries[at].held, HeldIn::File(place))));
        }
        match self.write_index(memo) {
            Ok(true) if is_any => Ok(spilled),
            written => {
                // What was written is named by no index: it stays in memory.
                for (at, before) in held {
                    if let HeldIn::File(place) = std::mem::replace(&mut self.entries[at].held, before)
                        && let Some(file) = &mut self.file
                    {
                        file.give_back_unnamed(&place);
                    }
                }
                self.is_full = true;
                written.map(|_| Vec::new())
            }
        }
    }

    fn open_file(&mut self) -> io::Result<&mut SpoolFile> {
        if self.file.is_none() {
            let layout = Layout::of(self.limits.bytes_max);
            let mut file = SpoolFile::open(Arc::clone(&self.storage), &self.folder, layout)?;
            // What an agent before left was not taken up. With the memo that is written next it could be.
            file.wipe()?;
            self.file = Some(file);
        }
        Ok(self.file.as_mut().expect("just opened"))
    }

    /// Writes frames to slabs that no index names; `None` where there is no room for them.
    fn write(&mut self, frames: &[Bytes], for_merging: bool, memo: &Memo) -> io::Result<Option<Place>> {
        let file = self.file.as_mut().expect("it is open");
        let written = file.write(frames, for_merging)?;
        if written.is_some() || !file.has_given_back() {
            return Ok(written);
        }
        // What was acked meanwhile is named by the index still.
        if !self.write_index(memo)? {
            return Ok(None);
        }
        self.file.as_mut().expect("it is open").write(frames, for_merging)
    }

    /// Writes the index of what is in the file; `false` where it has become too long for its place.
    ///
    /// The page of the memo comes first: an agent's death between the two leaves the index before, which that memo vouches for or not.
    fn write_index(&mut self, memo: &Memo) -> io::Result<bool> {
        let Some(file) = &self.file else { return Ok(true) };
        let layout = file.layout();
        let index = Index {
            number: self.index_number + 1,
            group: self.group,
            generation: self.entries.front().map(|entry| entry.sealer.generation()).unwrap_or_default(),
            slab_bytes: layout.slab_bytes,
            entries: self.index_entries(),
        };
        let bytes = index.encode();
        if bytes.len() as u64 > layout.index_bytes {
            return Ok(false);
        }
        file.write_memo(&encode_memo(memo))?;
        file.write_index(index.number, &bytes)?;
        self.index_number = index.number;
        self.is_indexed = !index.entries.is_empty();
        if let Some(file) = &mut self.file {
            file.settle();
        }
        Ok(true)
    }

    fn index_entries(&self) -> Vec<IndexEntry> {
        let mut parts = self.parts_acked;
        let mut entries = Vec::new();
        for entry in &self.entries {
            let parts_before = parts.filter(|(epoch, _)| *epoch == entry.epoch).map_or(0, |(_, parts)| parts);
            parts = Some((entry.epoch, parts_before + u32::from(entry.is_part())));
            if let HeldIn::File(place) = &entry.held {
                let Entry { epoch, attempt, list, end, .. } = entry;
                let (end, place) = (end.clone(), place.clone());
                entries.push(IndexEntry { epoch: *epoch, attempt: *attempt, parts_before, list: *list, end, place });
            }
        }
        entries
    }

    /// The memo has changed: what is in the file is of it from now on. Once nothing is, that is written last.
    pub fn remember(&mut self, memo: &Memo) {
        let Some(file) = self.file.as_ref().filter(|_| self.is_indexed && self.failure.is_none()) else { return };
        let is_any = self.entries.iter().any(|entry| matches!(entry.held, HeldIn::File(_)));
        let written = if is_any { file.write_memo(&encode_memo(memo)) } else { self.write_index(memo).map(|_| ()) };
        if let Err(error) = written {
            self.failure = Some(error.to_string());
        }
    }

    /// The agent ends: what is not acked is left to its successor.
    pub fn leave(&mut self, memo: &Memo) {
        if self.is_on()
            && !self.entries.is_empty()
            && let Err(error) = self.try_spill(memo)
        {
            let folder = self.folder.display();
            tracing::warn!(%folder, %error, "what waits for the line cannot be left to the next agent: it is captured again");
        }
    }

    /// Nothing in it will be sent.
    pub fn void(&mut self, memo: &Memo) {
        self.truncate(0, memo);
        (self.begun, self.parts_acked) = (None, None);
    }

    /// What was not handed over will not be sent; gives its attempts.
    pub fn abandon(&mut self, memo: &Memo) -> Vec<AttemptId> {
        let gone = self.entries.range(self.handed..).map(|entry| entry.attempt).collect();
        self.truncate(self.handed, memo);
        gone
    }

    /// The epoch of which parts were handed over, or are at the target, and no commit was handed over.
    #[must_use]
    pub fn open_epoch(&self) -> Option<Epoch> {
        match self.handed.checked_sub(1).map(|at| &self.entries[at]) {
            Some(last) => last.is_part().then_some(last.epoch),
            None => self.parts_acked.map(|(epoch, _)| epoch),
        }
    }

    fn truncate(&mut self, len: usize, memo: &Memo) {
        for entry in self.entries.drain(len..) {
            if let (HeldIn::File(place), Some(file)) = (&entry.held, &mut self.file) {
                file.give_back(place);
            }
        }
        self.handed = self.handed.min(len);
        self.is_thinning = false;
        self.changed();
        // An index that names what is gone would be a history that did not go on.
        if self.is_indexed
            && self.failure.is_none()
            && let Err(error) = self.write_index(memo)
        {
            self.failure = Some(error.to_string());
        }
    }

    /// There may be room again.
    const fn changed(&mut self) {
        (self.is_full, self.is_stuck) = (false, false);
    }

    fn error(entry: &Entry, reason: impl Into<String>) -> SpoolError {
        SpoolError { epoch: entry.epoch, reason: reason.into() }
    }

    /// An attempt's frames, as they were written.
    fn load(&self, entry: &Entry) -> Result<Vec<Bytes>, SpoolError> {
        match &entry.held {
            HeldIn::Memory(frames) => Ok(frames.clone()),
            HeldIn::File(place) => {
                let file = self.file.as_ref().ok_or_else(|| Self::error(entry, "its file is gone"))?;
                file.read(place).map_err(|error| Self::error(entry, error.to_string()))
            }
        }
    }
}

impl Entry {
    fn new(outgoing: Outgoing, blocks: Arc<Blocks>) -> Self {
        let Outgoing { epoch, attempt, frames, list, bytes, end, sealer } = outgoing;
        Self { epoch, attempt, list, bytes, end, sealer, blocks, held: HeldIn::Memory(frames) }
    }

    fn is_part(&self) -> bool {
        self.end == End::Part
    }

    fn cut_time(&self) -> Option<Timestamp> {
        match &self.end {
            End::Part => None,
            End::Commit(draft) => Some(draft.cut_time),
        }
    }

    fn outgoing(&self, frames: Vec<Bytes>) -> Outgoing {
        Outgoing {
            epoch: self.epoch,
            attempt: self.attempt,
            frames,
            list: self.list,
            bytes: self.bytes,
            end: self.end.clone(),
            sealer: Arc::clone(&self.sealer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_protocol::units::Generation;
    use cdp_seams::storage::sim::SimStorage;

    #[test]
    fn no_index_is_left_of_a_file_that_was_not_taken_up() {
        let (storage, folder, group) = (SimStorage::new(1), Path::new("/spool"), GroupId([7; 16]));
        let limits = SpoolLimits::new(64 << 20, 100);
        let layout = Layout::of(limits.bytes_max);
        let index = |number| {
            let (generation, slab_bytes) = (Generation(1), layout.slab_bytes);
            Index { number, group, generation, slab_bytes, entries: Vec::new() }
        };
        let file = SpoolFile::open(Arc::new(storage.clone()), folder, layout).expect("made");
        for number in [56, 57] {
            file.write_index(number, &index(number).encode()).expect("written");
        }
        assert!((0..2).all(|copy| Index::decode(&file.read_index(copy).expect("read")).is_some()));
        let mut spool = Spool::new(Arc::new(storage), folder, group, limits);
        let file = spool.open_file().expect("opened");
        assert!((0..2).all(|copy| Index::decode(&file.read_index(copy).expect("read")).is_none()));
    }
}
