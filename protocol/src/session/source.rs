//! A source's end of a group's session: what is sent, in which order, and what is sent again.
//!
//! Owns the attempts that were submitted and not acked, every frame of them, and the group's memo. Attempts leave in the
//! order they were submitted, several epochs may be under way. The end of an attempt (part end, commit) is built when its
//! turn comes, so that it names what stands before it; once built it is kept, because it may be acked unheard. After a
//! broken line the target's `GroupOpened` says what it holds; only what is missing goes again, as the bytes it was. A new
//! generation voids all that was submitted. Knows no line and no clock.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use super::memo::Memo;
use super::{PARTS_SENT_MAX, SENT_MAX};
use crate::codec::Sealer;
use crate::escrow::Envelope;
use crate::frame::{self, Kind};
use crate::holding::Holding;
use crate::message::{GroupOpened, Instance, OpenGroup, RefusalReason, TargetMessage, Verdict};
use crate::record::layouts::Layouts;
use crate::record::volume_meters::VolumeMeters;
use crate::record::{Commit, FrameList, Meters, PartChain, PartEnd, Predecessor, Volume};
use crate::units::{
    AttemptId, Block, Class, Epoch, Extent, Generation, GroupId, Head, Sequence, Timestamp, VolumeSlot,
};

/// What a group is, as its source tells the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupFacts {
    /// The group.
    pub group: GroupId,
    /// Its name within the office.
    pub name: String,
    /// The process that asks.
    pub instance: Instance,
    /// The data key, sealed to the target.
    pub envelope: Envelope,
    /// The volumes, by rising slot.
    pub volumes: Vec<Volume>,
}

/// An attempt ready to leave.
pub struct Outgoing {
    /// Its epoch.
    pub epoch: Epoch,
    /// The attempt.
    pub attempt: AttemptId,
    /// `Begin` and the extents, in sequence; not the end.
    pub frames: Vec<Bytes>,
    /// The list of these frames.
    pub list: FrameList,
    /// Their bytes.
    pub bytes: u64,
    /// How it ends.
    pub end: End,
    /// Seals the end.
    pub sealer: Arc<Sealer>,
}

/// How an attempt ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Durable, no recovery point yet.
    Part,
    /// A recovery point.
    Commit(CommitDraft),
}

/// What a commit says besides what the session knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitDraft {
    /// How much applications may rely on it.
    pub class: Class,
    /// The instant of the cut.
    pub cut_time: Timestamp,
    /// What the cut and the epoch amounted to.
    pub meters: Meters,
    /// The lowest epoch number merged into it; its own where nothing was.
    pub first_epoch: Epoch,
    /// Set where the source went on from an older point.
    pub after_rollback_to: Option<Epoch>,
    /// A name for the point.
    pub label: Option<String>,
    /// What became of each volume, by rising slot.
    pub volumes: Vec<(VolumeSlot, VolumeMeters)>,
    /// How disks are laid out, where that is not as it was told last.
    pub layouts: Layouts,
}

/// What the owner of the group has to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// The target took the group up.
    Opened {
        /// How the histories stand to each other.
        verdict: Verdict,
        /// The generation to seal under.
        generation: Generation,
        /// Whether that is another one than before: everything has to be captured again.
        is_new: bool,
        /// The target's newest point.
        head: Option<Head>,
        /// The acked parts of the epoch after it: the next attempts have to be of that epoch.
        parts: Option<(Epoch, PartChain)>,
    },
    /// Store that this commit is under way, then call `proceed` with it.
    Committing(Head),
    /// A point is durable at the target.
    Acked(Head),
    /// A part is durable at the target. Its blocks stay unacked until the epoch's point is: a new generation drops parts.
    PartAcked {
        /// The part's epoch.
        epoch: Epoch,
        /// The part's attempt.
        attempt: AttemptId,
        /// The epoch's parts with it.
        parts: PartChain,
    },
    /// The target takes nothing for now; the sender opens the group again by itself.
    Busy {
        /// Why, in one line.
        reason: String,
        /// When it will be tried again, in milliseconds.
        retry_after_ms: u32,
    },
    /// The target does not take the group. The sender asks again now and then, but not once another process took it over.
    Refused(RefusalReason),
    /// What the target holds of these blocks is damaged: the next capture is to hold them, changed or not. None of them need
    /// be of the volume, and the volume need not be of the group.
    SendAgain {
        /// The volume.
        volume: VolumeSlot,
        /// The blocks.
        extents: Vec<Extent>,
    },
    /// Blocks that were sent after the point that was asked about; none of them need be of the volume.
    Changes {
        /// The point.
        since: Head,
        /// The volume.
        volume: VolumeSlot,
        /// The blocks.
        extents: Vec<Extent>,
        /// Number of the message within the answer.
        page: u32,
        /// Whether more follow.
        more: bool,
    },
    /// What was sent after that point cannot be told.
    ChangesUnknown(Head),
    /// What the target holds of some blocks, from `start` on; none of them need be of the volume.
    Digests {
        /// The point at which it does.
        head: Head,
        /// The volume.
        volume: VolumeSlot,
        /// The first block.
        start: Block,
        /// Without gaps.
        holdings: Vec<Holding>,
    },
    /// Nothing that was submitted will be acked: cut it again. `Opened` with the new generation follows at once; nothing
    /// is to be submitted between the two.
    Voided,
}

/// The next thing to put on the line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// These bytes.
    Frame(Bytes),
    /// Tell the owner (`SourceEvent::Committing`), once; `proceed` lets the commit go.
    Committing(Head),
    /// Nothing for now.
    Nothing,
}

/// The target says what cannot be: it acked, or holds, something else than it was sent. The line is to be closed; at the
/// next one the session asks for a new generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the target's {0} contradicts what it was sent")]
pub struct Contradiction(&'static str);

/// A source's end of one group's session.
pub struct SourceSession {
    facts: GroupFacts,
    memo: Memo,
    /// The newest acked point as the target told it; `None` until the group was opened once.
    stand: Option<Stand>,
    queue: VecDeque<Queued>,
    /// The attempt and the frame to go next.
    cursor: (usize, usize),
    open: bool,
    /// The target contradicted itself: nothing but a new generation is gone on with.
    anew: bool,
}

/// What the next attempt follows.
#[derive(Clone, Copy, Default)]
struct Stand {
    head: Option<(Head, AttemptId)>,
    parts: Option<(Epoch, PartChain)>,
}

struct Queued {
    outgoing: Outgoing,
    end: Option<BuiltEnd>,
}

struct BuiltEnd {
    bytes: Bytes,
    /// What it makes of the stand before it.
    stand: Stand,
    gate: Gate,
}

/// Whether a commit may leave.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gate {
    Untold,
    Told,
    Passed,
}

impl SourceSession {
    /// A session of a group; `memo` is what is remembered of it.
    #[must_use]
    pub fn new(facts: GroupFacts, memo: Memo) -> Self {
        Self { facts, memo, stand: None, queue: VecDeque::new(), cursor: (0, 0), open: false, anew: false }
    }

    /// The group.
    #[must_use]
    pub const fn group(&self) -> GroupId {
        self.facts.group
    }

    /// What would have to be remembered now.
    #[must_use]
    pub const fn memo(&self) -> &Memo {
        &self.memo
    }

    /// Attempts submitted and not acked.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// Bytes of their frames, without their ends.
    #[must_use]
    pub fn queued_bytes(&self) -> u64 {
        self.queue.iter().map(|queued| queued.outgoing.bytes).sum()
    }

    /// The request that opens the group on a new line.
    #[must_use]
    pub fn open_group(&self) -> OpenGroup {
        let GroupFacts { group, name, instance, envelope, volumes } = self.facts.clone();
        let Memo { generation, acked, sent, parts } = self.memo.clone();
        let ends = self.queue.iter().filter_map(|queued| queued.end.as_ref());
        let mut parts_sent: Vec<_> = ends.filter_map(|end| end.stand.parts).collect();
        parts_sent.drain(..parts_sent.len().saturating_sub(PARTS_SENT_MAX));
        let anew = self.anew;
        OpenGroup { group, name, generation, acked, sent, parts, parts_sent, anew, instance, envelope, volumes }
    }

    /// The line broke, or the target put the group off: nothing leaves until `line_up`.
    pub const fn line_down(&mut self) {
        self.open = false;
    }

    /// The target took the group up: finds what was acked unheard and where to go on.
    ///
    /// # Errors
    /// Where the answer contradicts what the target was sent; the next `open_group` asks for a new generation.
    pub fn line_up(&mut self, opened: &GroupOpened) -> Result<Vec<SourceEvent>, Contradiction> {
        self.open = false;
        let mut events = Vec::new();
        let is_new = self.anew || self.memo.generation != Some(opened.generation);
        if is_new {
            // What became a point before the new generation is one, heard of or not.
            if let Some((head, _)) = opened.head {
                let _ = self.acked_through(Queued::head, &head, &mut events);
            }
            if self.stand.is_some() || !self.queue.is_empty() {
                events.push(SourceEvent::Voided);
            }
            self.queue.clear();
            self.stand = Some(Stand { head: opened.head, parts: opened.parts });
            self.anew = false;
        } else {
            self.catch_up(opened, &mut events).inspect_err(|_| self.anew = true)?;
        }
        let head = opened.head.map(|(head, _)| head);
        self.memo.opened(opened.generation, head, opened.parts);
        self.cursor = (0, self.resume_at(opened));
        self.open = true;
        events.push(SourceEvent::Opened {
            verdict: opened.verdict,
            generation: opened.generation,
            is_new,
            head,
            parts: opened.parts,
        });
        Ok(events)
    }

    /// Takes an attempt; one of another generation than granted is passed over, as `Voided` said.
    ///
    /// # Panics
    /// Where the epoch is not above those before it, or not the one the parts belong to: the owner's numbering is wrong.
    pub fn submit(&mut self, outgoing: Outgoing) {
        if Some(outgoing.sealer.generation()) != self.memo.generation {
            return;
        }
        if let Some(last) = self.queue.back() {
            let after_part = last.outgoing.end == End::Part;
            let (epoch, before) = (outgoing.epoch, last.outgoing.epoch);
            assert!(if after_part { epoch == before } else { epoch > before }, "epochs are submitted in order");
        } else if let Some(stand) = self.stand {
            assert!(stand.parts.is_none_or(|(epoch, _)| epoch == outgoing.epoch), "parts and commit are of one epoch");
            assert!(stand.head.is_none_or(|(head, _)| head.epoch < outgoing.epoch), "epochs rise");
        }
        self.queue.push_back(Queued { outgoing, end: None });
    }

    /// The commit that `Next::Committing` named may leave. Another one's name means nothing.
    pub fn proceed(&mut self, head: Head) {
        let told = self.queue.iter_mut().filter_map(|queued| queued.end.as_mut());
        for end in told.filter(|end| end.gate == Gate::Told && end.stand.commits() == Some(head)) {
            end.gate = Gate::Passed;
        }
    }

    /// The next frame to put on the line.
    pub fn next_frame(&mut self) -> Next {
        let (index, sequence) = self.cursor;
        if !self.open || index == self.queue.len() {
            return Next::Nothing;
        }
        if let Some(frame) = self.queue[index].outgoing.frames.get(sequence) {
            self.cursor.1 += 1;
            return Next::Frame(frame.clone());
        }
        self.build_end(index);
        let commits_before = self.queue.range(..index).filter(|queued| queued.head().is_some()).count();
        let end = self.queue[index].end.as_mut().expect("just built");
        match (end.gate, end.stand.commits()) {
            (Gate::Told, Some(_)) => Next::Nothing,
            (Gate::Untold, Some(_)) if commits_before >= SENT_MAX => Next::Nothing,
            (Gate::Untold, Some(head)) => {
                end.gate = Gate::Told;
                self.memo.committing(head);
                Next::Committing(head)
            }
            (Gate::Passed, _) | (_, None) => {
                self.cursor = (index + 1, 0);
                Next::Frame(end.bytes.clone())
            }
        }
    }

    /// Follows a message about the group.
    ///
    /// # Errors
    /// Where it acks what was not sent.
    pub fn message(&mut self, message: &TargetMessage) -> Result<Vec<SourceEvent>, Contradiction> {
        let mut events = Vec::new();
        match message {
            TargetMessage::GroupOpened(opened) => return self.line_up(opened),
            TargetMessage::Acked { head, .. } => {
                if !self.memo.acked.contains(head) {
                    self.acked_through(Queued::head, head, &mut events).ok_or(Contradiction("ack"))?;
                }
            }
            TargetMessage::PartAcked { parts, .. } => {
                let known = self.stand.and_then(|stand| stand.parts).map(|(_, parts)| parts);
                if known != Some(*parts) {
                    self.parts_acked(parts, &mut events).ok_or(Contradiction("part ack"))?;
                }
            }
            TargetMessage::Busy { reason, retry_after_ms, .. } => {
                self.line_down();
                events.push(SourceEvent::Busy { reason: reason.clone(), retry_after_ms: *retry_after_ms });
            }
            TargetMessage::GroupRefused { reason, .. } => {
                self.line_down();
                events.push(SourceEvent::Refused(reason.clone()));
            }
            TargetMessage::SendAgain { volume, extents, .. } => {
                events.push(SourceEvent::SendAgain { volume: *volume, extents: to_extents(extents) });
            }
            TargetMessage::Changes { since, volume, extents, page, more, .. } => {
                let (since, volume, extents) = (*since, *volume, to_extents(extents));
                events.push(SourceEvent::Changes { since, volume, extents, page: *page, more: *more });
            }
            TargetMessage::ChangesUnknown { since, .. } => events.push(SourceEvent::ChangesUnknown(*since)),
            TargetMessage::Digests { head, volume, start, holdings, .. } => {
                let (head, volume, start, holdings) = (*head, *volume, *start, holdings.clone());
                events.push(SourceEvent::Digests { head, volume, start, holdings });
            }
            TargetMessage::Welcome { .. }
            | TargetMessage::Refused { .. }
            | TargetMessage::Points { .. }
            | TargetMessage::PointOpened(_)
            | TargetMessage::PointRefused { .. }
            | TargetMessage::Answer { .. }
            | TargetMessage::Pong => {}
        }
        Ok(events)
    }

    /// Within one generation: what the target holds is what this session sent, or stood at before.
    fn catch_up(&mut self, opened: &GroupOpened, events: &mut Vec<SourceEvent>) -> Result<(), Contradiction> {
        let Some(stand) = self.stand else {
            // The blocks of acked parts are forgotten: a target that has fewer of them has lost some.
            let taken_in = |epoch: Epoch| opened.head.is_some_and(|(head, _)| head.epoch >= epoch);
            if let Some((epoch, known)) = self.memo.parts.filter(|(epoch, _)| !taken_in(*epoch)) {
                let held = opened.parts.filter(|(of, _)| *of == epoch).map(|(_, held)| held);
                let goes_on = held.is_some_and(|held| held.count > known.count || held == known);
                goes_on.then_some(()).ok_or(Contradiction("list of parts"))?;
            }
            self.stand = Some(Stand { head: opened.head, parts: opened.parts });
            return Ok(());
        };
        if opened.head != stand.head {
            let (head, _) = opened.head.ok_or(Contradiction("newest point"))?;
            self.acked_through(Queued::head, &head, events).ok_or(Contradiction("newest point"))?;
        }
        let now = self.stand.unwrap_or_default();
        if opened.parts != now.parts {
            let (_, parts) = opened.parts.ok_or(Contradiction("list of parts"))?;
            self.parts_acked(&parts, events).ok_or(Contradiction("list of parts"))?;
        }
        Ok(())
    }

    /// Takes out all parts up to the one that gives `wanted`. A point is acked by its own ack alone: parts do not name what
    /// stands before them, so one that is acked past a point says that the point's commit was lost on the way.
    fn parts_acked(&mut self, wanted: &PartChain, events: &mut Vec<SourceEvent>) -> Option<()> {
        let mut before = self.queue.iter().take_while(|queued| queued.parts() != Some(*wanted));
        if before.any(|queued| queued.head().is_some()) {
            return None;
        }
        self.acked_through(Queued::parts, wanted, events)
    }

    /// Takes out all attempts up to the one whose end gives `wanted`; `None`, and nothing changed, where none that left does.
    fn acked_through<T: PartialEq>(
        &mut self,
        of: impl Fn(&Queued) -> Option<T>,
        wanted: &T,
        events: &mut Vec<SourceEvent>,
    ) -> Option<()> {
        let sent = |queued: &Queued| queued.end.as_ref().is_some_and(|end| end.gate == Gate::Passed);
        let index = self
            .queue
            .iter()
            .take_while(|queued| sent(queued))
            .position(|queued| of(queued).as_ref() == Some(wanted))?;
        for queued in self.queue.drain(..=index) {
            let end = queued.end.expect("only ends that left are looked at");
            match (end.stand.commits(), end.stand.parts) {
                (Some(head), _) => {
                    self.memo.acked(head);
                    events.push(SourceEvent::Acked(head));
                }
                (None, Some((epoch, parts))) => {
                    self.memo.part_acked(epoch, parts);
                    events.push(SourceEvent::PartAcked { epoch, attempt: queued.outgoing.attempt, parts });
                }
                (None, None) => unreachable!("an end makes a point or a part"),
            }
            self.stand = Some(end.stand);
        }
        let taken = index + 1;
        self.cursor = if self.cursor.0 < taken { (0, 0) } else { (self.cursor.0 - taken, self.cursor.1) };
        Some(())
    }

    /// The first frame of the first attempt that the target lacks.
    fn resume_at(&self, opened: &GroupOpened) -> usize {
        let first = self.queue.front().map(|queued| &queued.outgoing);
        let same = opened.resume.zip(first).filter(|(resume, first)| resume.attempt == first.attempt);
        // Beyond its end is no place to go on from: from its begin, then; the target passes over what it has.
        same.map(|(resume, first)| (resume.next.0 as usize, first.frames.len()))
            .filter(|(next, frames)| next <= frames)
            .map_or(0, |(next, _)| next)
    }

    fn build_end(&mut self, index: usize) {
        if self.queue[index].end.is_some() {
            return;
        }
        let before = match index.checked_sub(1) {
            Some(before) => self.queue[before].end.as_ref().expect("the attempt before has left").stand,
            None => self.stand.expect("the group is open"),
        };
        self.queue[index].build(before);
    }
}

/// What is no extent is no block of any volume.
fn to_extents(extents: &[(Block, u32)]) -> Vec<Extent> {
    extents.iter().filter_map(|(start, count)| Extent::new(*start, *count)).collect()
}

impl Stand {
    /// The point an attempt's end makes; `None` where it only ends a part.
    fn commits(&self) -> Option<Head> {
        if self.parts.is_none() { self.head.map(|(head, _)| head) } else { None }
    }
}

impl Queued {
    fn head(&self) -> Option<Head> {
        self.end.as_ref().and_then(|end| end.stand.commits())
    }

    fn parts(&self) -> Option<PartChain> {
        self.end.as_ref().and_then(|end| end.stand.parts).map(|(_, parts)| parts)
    }

    fn build(&mut self, before: Stand) {
        let Outgoing { epoch, attempt, frames, list, end, sealer, .. } = &self.outgoing;
        let sequence = Sequence(frames.len() as u64);
        let parts = before.parts.map(|(_, parts)| parts);
        self.end = Some(match end {
            End::Part => {
                let record = PartEnd { predecessor: parts, frames: *list };
                let bytes = Bytes::from(sealer.record(Kind::PartEnd, sequence, record.encode()));
                let count = parts.map_or(1, |parts| parts.count.saturating_add(1));
                let ended = PartChain { count, hash: frame::hash(&bytes) };
                BuiltEnd { bytes, stand: Stand { parts: Some((*epoch, ended)), ..before }, gate: Gate::Passed }
            }
            End::Commit(draft) => {
                let record = draft.record(before.head, parts, *list);
                let bytes = Bytes::from(sealer.record(Kind::Commit, sequence, record.encode()));
                let head = Head { epoch: *epoch, hash: frame::hash(&bytes) };
                BuiltEnd { bytes, stand: Stand { head: Some((head, *attempt)), parts: None }, gate: Gate::Untold }
            }
        });
    }
}

impl CommitDraft {
    fn record(&self, before: Option<(Head, AttemptId)>, parts: Option<PartChain>, frames: FrameList) -> Commit {
        Commit {
            predecessor: before.map(|(head, attempt)| Predecessor { head, attempt }),
            frames,
            parts,
            first_epoch: self.first_epoch,
            after_rollback_to: self.after_rollback_to,
            class: self.class,
            cut_time: self.cut_time,
            meters: self.meters,
            label: self.label.clone(),
            volumes: self.volumes.clone(),
            layouts: self.layouts.clone(),
        }
    }
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
