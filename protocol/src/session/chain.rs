//! The chain of a group: what frames may follow which.
//!
//! Owns the rules that make a recovery point whole: frames of one attempt in sequence and of one generation, lists that
//! match what was received, parts and commits that name what stands before them. The receiver walks it before it
//! appends, recovery walks it over what it finds, so both agree on what is a point. It knows nothing of durability:
//! whoever walks it syncs before telling anyone.

use crate::codec::FrameListHasher;
use crate::frame::{Frame, Header, Kind};
use crate::record::{Begin, Commit, FrameList, PartChain, PartEnd, RecordError, Volume};
use crate::units::{AttemptId, Epoch, FrameHash, Generation, Head, Sequence, blocks_in};

/// Where a group stands.
#[derive(Clone, Default)]
pub struct Chain {
    head: Option<(Head, AttemptId)>,
    generation: Generation,
    parts: Option<(Epoch, PartChain)>,
    open: Option<OpenAttempt>,
}

/// The attempt whose frames are coming in.
#[derive(Clone)]
pub struct OpenAttempt {
    /// Its epoch.
    pub epoch: Epoch,
    /// The attempt.
    pub attempt: AttemptId,
    /// The next frame it needs.
    pub next: Sequence,
    /// The group's volumes, as its `Begin` tells.
    pub volumes: Vec<Volume>,
    list: FrameListHasher,
    /// Whether every frame so far was seen; only then can its list be checked, and only then can it be resumed.
    whole: bool,
}

impl OpenAttempt {
    /// An attempt that goes on behind the frames of `list`, all of which were seen.
    #[must_use]
    pub const fn resume(epoch: Epoch, attempt: AttemptId, volumes: Vec<Volume>, list: FrameList) -> Self {
        let next = Sequence(list.count);
        Self { epoch, attempt, next, volumes, list: FrameListHasher::resume(list), whole: true }
    }

    /// The frames seen so far.
    #[must_use]
    pub const fn list(&self) -> FrameList {
        self.list.list()
    }

    /// Whether every frame so far was seen.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.whole
    }
}

/// What a frame amounts to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Belongs to the open attempt.
    Taken,
    /// Was taken before; to be passed over.
    Duplicate,
    /// Ended a part: once durable, it can be acked.
    PartEnded(AttemptId, PartChain),
    /// Ended an epoch: once durable, it is a recovery point.
    Committed(Head, Box<Commit>),
    /// The target's own proof of a sync; says nothing about the chain.
    Synced,
}

/// Why a frame does not follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A record that does not parse.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Fenced off by a higher generation, or not granted yet.
    #[error("frame of generation {frame}, the group is at {group}")]
    Generation {
        /// The frame's.
        frame: Generation,
        /// The group's.
        group: Generation,
    },
    /// The epoch is not above the newest point, or not the one the parts belong to.
    #[error("epoch {0} is out of order")]
    Epoch(Epoch),
    /// Not of the open attempt.
    #[error("attempt {0} is not open")]
    Attempt(AttemptId),
    /// A frame is missing before this one.
    #[error("sequence {frame}, next is {next}")]
    Sequence {
        /// The frame's.
        frame: Sequence,
        /// The one that is needed.
        next: Sequence,
    },
    /// An extent beyond its volume, or of a volume the attempt does not have.
    #[error("extent beyond its volume")]
    Extent,
    /// The record does not vouch for the frames that came.
    #[error("frame list mismatch")]
    FrameList,
    /// The record names other parts than those acked.
    #[error("parts mismatch")]
    Parts,
    /// The commit names another predecessor than the newest point.
    #[error("predecessor mismatch")]
    Predecessor,
    /// Only a target seals content anew, and only in its own files.
    #[error("a frame that a target sealed anew does not come from a source")]
    Resealed,
}

impl Chain {
    /// A chain that goes on from a known place.
    #[must_use]
    pub const fn at(
        head: Option<(Head, AttemptId)>,
        generation: Generation,
        parts: Option<(Epoch, PartChain)>,
    ) -> Self {
        Self { head, generation, parts, open: None }
    }

    /// The newest point and its attempt.
    #[must_use]
    pub const fn head(&self) -> Option<(Head, AttemptId)> {
        self.head
    }

    /// The generation whose frames are taken.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// The parts of the epoch after the newest point.
    #[must_use]
    pub const fn parts(&self) -> Option<(Epoch, PartChain)> {
        self.parts
    }

    /// The attempt that is open.
    #[must_use]
    pub const fn open(&self) -> Option<&OpenAttempt> {
        self.open.as_ref()
    }

    /// The same place with `open` as the attempt whose frames are coming in.
    #[must_use]
    pub fn with_open(mut self, open: Option<OpenAttempt>) -> Self {
        self.open = open;
        self
    }

    /// Raises the generation: the open attempt and the parts of the lower one are fenced off.
    pub fn grant(&mut self, generation: Generation) {
        assert!(generation >= self.generation, "generations only rise");
        if generation > self.generation {
            *self = Self { head: self.head, generation, parts: None, open: None };
        }
    }

    /// Follows one verified frame, whose hash is `hash`. On an error nothing changed.
    ///
    /// # Errors
    /// Where the frame does not follow.
    pub fn step(&mut self, frame: &Frame<'_>, hash: FrameHash) -> Result<Step, ChainError> {
        if frame.header.resealed {
            return Err(ChainError::Resealed);
        }
        match frame.header.kind {
            Kind::Synced => Ok(Step::Synced),
            Kind::Begin => self.begin(frame, hash),
            Kind::Extents => self.extents(frame, hash),
            Kind::PartEnd => self.part_end(frame, hash),
            Kind::Commit => self.commit(frame, hash),
        }
    }

    /// Follows a verified frame over a gap of damage: it was accepted when it was written, so its word is taken for what
    /// is missing before it. `volumes` stand in where the attempt's `Begin` is missing. For recovery alone.
    ///
    /// # Errors
    /// Where the frame is of a fenced generation or its record does not parse.
    pub fn step_over_gap(
        &mut self,
        frame: &Frame<'_>,
        hash: FrameHash,
        volumes: &[Volume],
    ) -> Result<Step, ChainError> {
        let header = &frame.header;
        if header.kind != Kind::Synced && header.generation < self.generation {
            return Err(ChainError::Generation { frame: header.generation, group: self.generation });
        }
        match header.kind {
            Kind::Synced => Ok(Step::Synced),
            Kind::Begin => {
                self.parts = self.parts.filter(|(epoch, _)| *epoch == header.epoch);
                self.begin(frame, hash)
            }
            Kind::Extents => {
                self.lose(&frame.header, volumes);
                Ok(Step::Taken)
            }
            Kind::PartEnd => {
                let (end, _) = PartEnd::decode(frame.payload)?;
                let count = end.predecessor.map_or(1, |before| before.count.saturating_add(1));
                self.presume_part(header.epoch, PartChain { count, hash });
                Ok(Step::PartEnded(header.attempt, PartChain { count, hash }))
            }
            Kind::Commit => {
                let (commit, _) = Commit::decode(frame.payload)?;
                let head = Head { epoch: header.epoch, hash };
                self.presume_commit(head, header.attempt);
                Ok(Step::Committed(head, Box::new(commit)))
            }
        }
    }

    /// Takes note that the frame of `header`, of an attempt without an end yet, is lost or stands behind lost ones.
    pub fn lose(&mut self, header: &Header, volumes: &[Volume]) {
        let of_this = self.open.take().filter(|open| open.attempt == header.attempt && open.epoch == header.epoch);
        let mut open = of_this.unwrap_or_else(|| {
            let list = FrameListHasher::default().list();
            OpenAttempt::resume(header.epoch, header.attempt, volumes.to_vec(), list)
        });
        open.next = Sequence(header.sequence.0.saturating_add(1));
        open.whole = false;
        self.open = Some(open);
    }

    /// Takes a part as ended whose end is damaged, by the word of others.
    pub fn presume_part(&mut self, epoch: Epoch, parts: PartChain) {
        self.parts = Some((epoch, parts));
        self.open = None;
    }

    /// Takes a point as committed whose commit is damaged, by the word of others.
    pub fn presume_commit(&mut self, head: Head, attempt: AttemptId) {
        self.head = Some((head, attempt));
        self.parts = None;
        self.open = None;
    }

    /// Gives up the open attempt if frames of it are lost: it cannot be resumed.
    pub fn forget_broken(&mut self) {
        self.open = self.open.take().filter(OpenAttempt::is_whole);
    }

    fn begin(&mut self, frame: &Frame<'_>, hash: FrameHash) -> Result<Step, ChainError> {
        let header = &frame.header;
        if header.generation != self.generation {
            return Err(ChainError::Generation { frame: header.generation, group: self.generation });
        }
        if self.open.as_ref().is_some_and(|open| open.attempt == header.attempt) {
            return Ok(Step::Duplicate);
        }
        if header.sequence != Sequence(0) {
            return Err(ChainError::Attempt(header.attempt));
        }
        let above_head = self.head.is_none_or(|(head, _)| header.epoch > head.epoch);
        let of_the_parts = self.parts.is_none_or(|(epoch, _)| header.epoch == epoch);
        if !above_head || !of_the_parts {
            return Err(ChainError::Epoch(header.epoch));
        }
        let (begin, _) = Begin::decode(frame.payload)?;
        let mut list = FrameListHasher::default();
        list.push(&hash);
        self.open = Some(OpenAttempt {
            epoch: header.epoch,
            attempt: header.attempt,
            next: Sequence(1),
            volumes: begin.volumes,
            list,
            whole: true,
        });
        Ok(Step::Taken)
    }

    fn extents(&mut self, frame: &Frame<'_>, hash: FrameHash) -> Result<Step, ChainError> {
        let header = &frame.header;
        let Some(open) = self.next_of_open(frame)? else { return Ok(Step::Duplicate) };
        let volume = open.volumes.iter().find(|volume| volume.slot == header.volume).ok_or(ChainError::Extent)?;
        let blocks = blocks_in(volume.size_bytes);
        if header.extents.last().is_some_and(|extent| extent.end() > blocks) {
            return Err(ChainError::Extent);
        }
        open.list.push(&hash);
        open.next.0 += 1;
        Ok(Step::Taken)
    }

    fn part_end(&mut self, frame: &Frame<'_>, hash: FrameHash) -> Result<Step, ChainError> {
        let parts = self.parts;
        let Some(open) = self.next_of_open(frame)? else { return Ok(Step::Duplicate) };
        let (end, _) = PartEnd::decode(frame.payload)?;
        if open.whole && end.frames != open.list.list() && !is_unchecked() {
            return Err(ChainError::FrameList);
        }
        if end.predecessor != parts.map(|(_, parts)| parts) {
            return Err(ChainError::Parts);
        }
        let ended = PartChain { count: end.predecessor.map_or(1, |before| before.count.saturating_add(1)), hash };
        let (epoch, attempt) = (open.epoch, open.attempt);
        self.parts = Some((epoch, ended));
        self.open = None;
        Ok(Step::PartEnded(attempt, ended))
    }

    fn commit(&mut self, frame: &Frame<'_>, hash: FrameHash) -> Result<Step, ChainError> {
        let (parts, head) = (self.parts, self.head);
        let Some(open) = self.next_of_open(frame)? else { return Ok(Step::Duplicate) };
        let (commit, _) = Commit::decode(frame.payload)?;
        if open.whole && commit.frames != open.list.list() && !is_unchecked() {
            return Err(ChainError::FrameList);
        }
        if commit.parts != parts.map(|(_, parts)| parts) {
            return Err(ChainError::Parts);
        }
        if commit.predecessor.map(|before| (before.head, before.attempt)) != head {
            return Err(ChainError::Predecessor);
        }
        let committed = Head { epoch: open.epoch, hash };
        self.head = Some((committed, open.attempt));
        self.parts = None;
        self.open = None;
        Ok(Step::Committed(committed, Box::new(commit)))
    }

    /// The open attempt if the frame is its next one; `None` if it has it already.
    fn next_of_open(&mut self, frame: &Frame<'_>) -> Result<Option<&mut OpenAttempt>, ChainError> {
        let header = &frame.header;
        if header.generation != self.generation {
            return Err(ChainError::Generation { frame: header.generation, group: self.generation });
        }
        let open = self
            .open
            .as_mut()
            .filter(|open| open.attempt == header.attempt && open.epoch == header.epoch)
            .ok_or(ChainError::Attempt(header.attempt))?;
        match header.sequence.cmp(&open.next) {
            std::cmp::Ordering::Less => Ok(None),
            std::cmp::Ordering::Equal => Ok(Some(open)),
            std::cmp::Ordering::Greater if is_unchecked() => {
                open.next = header.sequence;
                Ok(Some(open))
            }
            std::cmp::Ordering::Greater => Err(ChainError::Sequence { frame: header.sequence, next: open.next }),
        }
    }
}

#[cfg(not(feature = "sabotage"))]
const fn is_unchecked() -> bool {
    false
}

#[cfg(feature = "sabotage")]
use sabotage::is_unchecked;

/// What is left out on purpose, to see whether tests notice.
#[cfg(feature = "sabotage")]
pub mod sabotage {
    use std::cell::Cell;

    thread_local! {
        static UNCHECKED: Cell<bool> = const { Cell::new(false) };
    }

    /// On this thread, frames need not follow one another and lists of frames need not match, or have to again.
    pub fn set_unchecked(unchecked: bool) {
        UNCHECKED.set(unchecked);
    }

    pub(super) fn is_unchecked() -> bool {
        UNCHECKED.get()
    }
}
