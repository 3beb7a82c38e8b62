//! A target's end of the session: who is let in, and how a source's history stands to the target's.
//!
//! `TargetSession` says what a connection's control messages amount to, in order: `Hello` first and once, then groups. `judge`
//! compares histories and grants generations. Neither touches a store: the receiver does what they say. The generation
//! stays as it is only for a source that was granted exactly this one, stands at the target's head and knows of its parts; in
//! every other case a higher one is granted, which fences whatever the lower one had under way.

use std::collections::BTreeSet;

use super::lineage::{Line, Lineage, Place};
use super::{ACKED_MAX, PARTS_SENT_MAX, SENT_MAX};
use crate::holding::QUESTION_BLOCKS_MAX;
use crate::limits::{VOLUMES_MAX, is_name};
use crate::message::{
    self, MessageError, OpenGroup, PROTOCOL_VERSION, RefusalReason, SourceMessage, TargetMessage, Verdict,
};
use crate::recall::{self, Asked};
use crate::record::PartChain;
use crate::units::{Epoch, Extent, Generation, GroupId, Head, Timestamp, VOLUME_BYTES_MAX, VolumeSlot};

/// Groups a connection may open.
pub const GROUPS_MAX: usize = 64;
/// Bytes a data key's envelope may have.
const ENVELOPE_BYTES_MAX: usize = 1024;
/// Bytes of a machine's name, as Linux has it.
const HOST_BYTES_MAX: usize = 64;

/// What is to be done about a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetAction {
    /// Answer.
    Reply(TargetMessage),
    /// Open the group, and answer with how that went.
    Open(Box<OpenGroup>),
    /// Take note: nothing was written since the point.
    Unchanged {
        /// The group.
        group: GroupId,
        /// The point.
        epoch: Epoch,
        /// When this was validated, by the source's clock.
        as_of: Timestamp,
    },
    /// Answer with a page of points.
    ListPoints {
        /// Of the request.
        request: u64,
        /// The group.
        group: GroupId,
        /// Only points above this number.
        after: Option<Epoch>,
    },
    /// Answer with the blocks that were sent after the point.
    ListChanges {
        /// The group.
        group: GroupId,
        /// The point.
        since: Head,
    },
    /// Answer with what is held of some blocks, if the point is the newest.
    ListDigests {
        /// The group.
        group: GroupId,
        /// The point.
        head: Head,
        /// The volume.
        volume: VolumeSlot,
        /// The blocks.
        blocks: Extent,
    },
    /// Open a point to be read, and answer with how that went.
    OpenPoint {
        /// The group, which need not be open; whether it is one of the office's is not looked at here.
        group: GroupId,
        /// The point's name.
        at: String,
    },
    /// Answer a question about that point.
    AskPoint(Asked),
}

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub enum TargetRefusal {
    /// The other side speaks another version, and is to be told before the line is closed.
    #[error("the source speaks version {0} of the protocol, this target speaks {PROTOCOL_VERSION}")]
    Version(u32),
    /// The first message was not `Hello`.
    #[error("the first message was no hello")]
    NoHello,
    /// `Hello` came twice.
    #[error("a second hello")]
    SecondHello,
    /// Not a message.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// A message about a group this connection has not opened.
    #[error("group {0} is not open on this connection")]
    NotOpen(GroupId),
    /// More groups than a connection may open.
    #[error("more than {GROUPS_MAX} groups on one connection")]
    TooManyGroups,
    /// A field that no program of ours sends.
    #[error("{0} is not valid")]
    Field(&'static str),
}

impl TargetRefusal {
    /// What the source is told before the line is closed.
    #[must_use]
    pub fn message(&self) -> TargetMessage {
        TargetMessage::Refused { reason: self.to_string(), versions: vec![PROTOCOL_VERSION] }
    }
}

/// The control messages of one connection, as the target follows them.
#[derive(Debug)]
pub struct TargetSession {
    software: String,
    greeted: bool,
    groups: BTreeSet<GroupId>,
    has_point: bool,
}

impl TargetSession {
    /// A connection nobody has spoken on; `software` is what the source is told about this program.
    #[must_use]
    pub fn new(software: impl Into<String>) -> Self {
        Self { software: software.into(), greeted: false, groups: BTreeSet::new(), has_point: false }
    }

    /// Follows one message.
    ///
    /// # Errors
    /// Where the connection has to end; `TargetRefusal::message` is what to say before.
    pub fn receive(&mut self, bytes: &[u8], now: Timestamp) -> Result<TargetAction, TargetRefusal> {
        if !self.greeted {
            return self.hello(bytes, now);
        }
        match message::decode(bytes)? {
            SourceMessage::Hello { .. } => Err(TargetRefusal::SecondHello),
            SourceMessage::Ping => Ok(TargetAction::Reply(TargetMessage::Pong)),
            SourceMessage::OpenGroup(request) => {
                check(&request)?;
                self.groups.insert(request.group);
                let fits = self.groups.len() <= GROUPS_MAX;
                if fits { Ok(TargetAction::Open(Box::new(request))) } else { Err(TargetRefusal::TooManyGroups) }
            }
            SourceMessage::Unchanged { group, epoch, as_of } => {
                self.opened(group)?;
                Ok(TargetAction::Unchanged { group, epoch, as_of })
            }
            SourceMessage::ListPoints { request, group, after } => {
                self.opened(group)?;
                Ok(TargetAction::ListPoints { request, group, after })
            }
            SourceMessage::ListChanges { group, since } => {
                self.opened(group)?;
                Ok(TargetAction::ListChanges { group, since })
            }
            SourceMessage::ListDigests { group, head, volume, start, count } => {
                self.opened(group)?;
                let blocks = Extent::new(start, count).filter(|blocks| blocks.count <= QUESTION_BLOCKS_MAX);
                let blocks = blocks.ok_or(TargetRefusal::Field("blocks whose digests are asked for"))?;
                Ok(TargetAction::ListDigests { group, head, volume, blocks })
            }
            SourceMessage::OpenPoint { group, at } => {
                let is_first = !std::mem::replace(&mut self.has_point, true);
                let fits = is_first && at.len() <= recall::NAME_BYTES_MAX;
                fits.then_some(TargetAction::OpenPoint { group, at }).ok_or(TargetRefusal::Field("point to be read"))
            }
            SourceMessage::AskPoint(asked) => {
                let fits = self.has_point && asked.question.extents().is_some();
                fits.then_some(TargetAction::AskPoint(asked)).ok_or(TargetRefusal::Field("question about a point"))
            }
        }
    }

    fn hello(&mut self, bytes: &[u8], now: Timestamp) -> Result<TargetAction, TargetRefusal> {
        // The version first: the rest of another version's hello may not decode.
        let version = message::hello_version(bytes).ok_or(TargetRefusal::NoHello)?;
        if version != PROTOCOL_VERSION {
            return Err(TargetRefusal::Version(version));
        }
        let _: SourceMessage = message::decode(bytes)?;
        self.greeted = true;
        let software = self.software.clone();
        Ok(TargetAction::Reply(TargetMessage::Welcome { version: PROTOCOL_VERSION, software, time: now }))
    }

    fn opened(&self, group: GroupId) -> Result<(), TargetRefusal> {
        if self.groups.contains(&group) { Ok(()) } else { Err(TargetRefusal::NotOpen(group)) }
    }
}

fn check(request: &OpenGroup) -> Result<(), TargetRefusal> {
    let falling = |heads: &[Head]| heads.is_sorted_by(|newer, older| newer.epoch > older.epoch);
    let volume = |volume: &crate::record::Volume| is_name(&volume.name) && volume.size_bytes <= VOLUME_BYTES_MAX;
    let envelope = &request.envelope;
    let checks = [
        ("group name", is_name(&request.name)),
        ("list of acked points", request.acked.len() <= ACKED_MAX && falling(&request.acked)),
        ("list of sent commits", request.sent.len() <= SENT_MAX && falling(&request.sent)),
        ("number of volumes", request.volumes.len() <= VOLUMES_MAX),
        ("volume", request.volumes.iter().all(volume)),
        ("order of volumes", request.volumes.is_sorted_by(|a, b| a.slot < b.slot)),
        ("generation", request.generation != Some(Generation(0))),
        ("part", request.parts.iter().chain(&request.parts_sent).all(|(_, parts)| parts.count > 0)),
        ("list of sent parts", request.parts_sent.len() <= PARTS_SENT_MAX),
        ("host name", request.instance.host.len() <= HOST_BYTES_MAX),
        ("envelope", envelope.encapsulated.len() + envelope.sealed.len() <= ENVELOPE_BYTES_MAX),
    ];
    checks.iter().find(|(_, holds)| !holds).map_or(Ok(()), |(what, _)| Err(TargetRefusal::Field(what)))
}

/// What the target knows of a group when a source opens it.
#[derive(Clone, Copy, Debug)]
pub struct Standing<'a> {
    /// The newest point; `None` where there is none.
    pub head: Option<Head>,
    /// The acked parts of the epoch after it.
    pub parts: Option<(Epoch, PartChain)>,
    /// The generation granted last; 0 where the group is new.
    pub generation: Generation,
    /// Whether it was this very process that had the group open last.
    pub same_process: bool,
    /// How the generations follow one another.
    pub lineage: &'a Lineage,
    /// What an operator decided.
    pub ruling: &'a Ruling,
}

/// Where a source says it stands: the generation it was granted last (0 for none) and its newest commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Claim {
    /// The generation.
    pub generation: Generation,
    /// The commit.
    pub head: Head,
}

impl Claim {
    /// The claim of a request; `None` where its source knows no point.
    #[must_use]
    pub fn of(request: &OpenGroup) -> Option<Self> {
        let generation = request.generation.unwrap_or_default();
        claimed_heads(request).next().map(|head| Self { generation, head })
    }
}

/// What an operator decided about forks.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Ruling {
    /// The end of the history that is to go on, until a source has come that may go on with it: one that stands there, at an
    /// ancestor of it, or that knows nothing.
    pub chosen: Option<Claim>,
    /// Histories that do not go on: their sources are refused, and freeze nothing any more.
    pub left: Vec<Claim>,
}

/// How two histories stand to each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// They go together.
    Open {
        /// How.
        verdict: Verdict,
        /// The generation of the frames to come.
        generation: Generation,
        /// Set where that generation is a new one: to be granted, durably, before the source is told.
        begins: Option<Line>,
        /// Points the source has had acks for and the target has not: lost at the target. Newest first.
        lost: Vec<Epoch>,
    },
    /// They do not. `Fork` is to be kept, durably, until an operator resolves it.
    Refuse(RefusalReason),
}

/// How a source's history was found to stand.
struct Found {
    verdict: Verdict,
    lost: Vec<Epoch>,
    from: Option<Place>,
}

/// Judges a source's history. `made_in` says in which generation a point of the journal was made; `None` for one it has not.
///
/// Whoever comes last takes the group over, if its history is of the one that goes on: of a machine and its copy the one
/// that was started later is the one an operator wants, and the target cannot tell which of two is alive behind a silent
/// line. The one before is told by the receiver, and stops. Taking over in the *same* generation is safe between different
/// processes too, where generation, newest point and parts all agree: then the journal has nothing of either that the other
/// has not, so nothing of the two can mix, and an agent that crashed and comes back pays nothing. From the first part or
/// point on they differ, and the next of them to come gets a new generation (it stands at an ancestor) or is a fork.
///
/// # Errors
/// Only those of `made_in`.
pub fn judge<E>(
    standing: &Standing<'_>,
    request: &OpenGroup,
    made_in: &mut dyn FnMut(Head) -> Result<Option<Generation>, E>,
) -> Result<Judgement, E> {
    let claimed = request.generation.unwrap_or_default();
    let is_left = |left: &Claim| left.generation == claimed && stands_at(request, left.head);
    if standing.ruling.left.iter().any(is_left) {
        return Ok(Judgement::Refuse(RefusalReason::Left));
    }
    let chosen = standing.ruling.chosen;
    let found = match chosen {
        Some(chosen) => of_the_chosen(standing, chosen, request, made_in)?.ok_or(RefusalReason::Left),
        None => compare(standing, request, made_in)?.ok_or(RefusalReason::Fork),
    };
    let Found { verdict, lost, from } = match found {
        Ok(found) => found,
        Err(reason) => return Ok(Judgement::Refuse(reason)),
    };
    let same_parts = standing.same_process || knows_the_parts(standing, request);
    let asks_anew = request.anew || chosen.is_some();
    let stays = verdict == Verdict::Continue && claimed == standing.generation && same_parts && !asks_anew;
    if stays {
        return Ok(Judgement::Open { verdict, generation: claimed, begins: None, lost });
    }
    let generation = Generation(claimed.max(standing.generation).0.saturating_add(1));
    let line = Line { generation, after: standing.head.map(|head| head.epoch), from };
    Ok(Judgement::Open { verdict, generation, begins: Some(line), lost })
}

/// The points a source may stand at, newest first: commits that left, acked or not, and the newest acked one.
fn claimed_heads(request: &OpenGroup) -> impl Iterator<Item = Head> + '_ {
    request.sent.iter().chain(request.acked.first()).copied()
}

/// Whether the parts that are here are exactly those the source knows of: else another's could end up in its next point.
///
/// Acks may have been lost with the target's process. Parts that the journal's newest point took in are parts no more; and
/// those whose ends the source has sent are its own, since nobody else can name their hashes.
fn knows_the_parts(standing: &Standing<'_>, request: &OpenGroup) -> bool {
    let above = |(epoch, _): &(Epoch, PartChain)| standing.head.is_none_or(|head| *epoch > head.epoch);
    let known = request.parts.filter(above);
    known == standing.parts || standing.parts.is_some_and(|parts| request.parts_sent.contains(&parts))
}

fn stands_at(request: &OpenGroup, head: Head) -> bool {
    claimed_heads(request).any(|claimed| claimed == head)
}

/// The history an operator chose goes on, with a source that stands at its end, at an ancestor of that, or nowhere; `None`
/// for any other.
///
/// The machine that stood at the end may never return as it was: put back from a backup it stands before, and new hardware
/// knows nothing. Were both refused, nothing could be protected any more. Neither can mix histories: all get a new
/// generation and compare everything, and what they go on from is of the chosen history, or is nothing.
fn of_the_chosen<E>(
    standing: &Standing<'_>,
    chosen: Claim,
    request: &OpenGroup,
    made_in: &mut dyn FnMut(Head) -> Result<Option<Generation>, E>,
) -> Result<Option<Found>, E> {
    let claimed = request.generation.unwrap_or_default();
    // The generation counts: of two that stand at one point, one may have been granted it after another line.
    if chosen.generation == claimed && stands_at(request, chosen.head) {
        return chosen_history(standing, request, made_in).map(Some);
    }
    if Claim::of(request).is_none() {
        return Ok(Some(Found { verdict: Verdict::Rollback { to: None }, lost: vec![], from: None }));
    }
    // Of an end that the journal never had nobody knows the ancestors.
    let Some(generation) = made_in(chosen.head)? else { return Ok(None) };
    let end = standing.lineage.place(chosen.generation, chosen.head.epoch, generation);
    for head in claimed_heads(request).filter(|head| head.epoch <= end.epoch) {
        let place = made_in(head)?.map(|made| standing.lineage.place(claimed, head.epoch, made));
        if let Some(place) = place.filter(|place| standing.lineage.holds(end.generation, *place)) {
            return Ok(Some(Found { verdict: rollback(standing, place), lost: vec![], from: Some(place) }));
        }
    }
    Ok(None)
}

/// The chosen history's own source, whatever the lineage says: from the newest of its points that the journal has.
fn chosen_history<E>(
    standing: &Standing<'_>,
    request: &OpenGroup,
    made_in: &mut dyn FnMut(Head) -> Result<Option<Generation>, E>,
) -> Result<Found, E> {
    let claimed = request.generation.unwrap_or_default();
    for head in request.sent.iter().chain(&request.acked) {
        if let Some(generation) = made_in(*head)? {
            let place = standing.lineage.place(claimed, head.epoch, generation);
            let goes_on = standing.head == Some(*head);
            let verdict = if goes_on { Verdict::Continue } else { rollback(standing, place) };
            return Ok(Found { verdict, lost: vec![], from: Some(place) });
        }
    }
    Ok(Found { verdict: Verdict::Rollback { to: None }, lost: vec![], from: None })
}

fn rollback(standing: &Standing<'_>, place: Place) -> Verdict {
    Verdict::Rollback { to: standing.lineage.origin(place) }
}

/// The verdict, the points lost at the target, and where the source goes on from; `None` where its history is not of the one
/// that goes on.
fn compare<E>(
    standing: &Standing<'_>,
    request: &OpenGroup,
    made_in: &mut dyn FnMut(Head) -> Result<Option<Generation>, E>,
) -> Result<Option<Found>, E> {
    let epochs = |heads: &[Head]| heads.iter().map(|head| head.epoch).collect::<Vec<_>>();
    let Some(newest) = standing.head else {
        let verdict = match (standing.generation, request.acked.is_empty()) {
            (Generation(0), _) => Verdict::New,
            (_, true) if request.generation.is_none() => Verdict::New,
            (_, true) => Verdict::Continue,
            (_, false) => Verdict::TargetBehind,
        };
        return Ok(Some(Found { verdict, lost: epochs(&request.acked), from: None }));
    };
    let claimed = request.generation.unwrap_or_default();
    let mut held = |head: Head| {
        let place = made_in(head)?.map(|generation| standing.lineage.place(claimed, head.epoch, generation));
        Ok(place.filter(|place| standing.lineage.holds(standing.generation, *place)))
    };
    let behind = request.acked.iter().skip(1).position(|acked| *acked == newest);
    let (verdict, lost) = match behind {
        _ if claimed_heads(request).any(|head| head == newest) => (Verdict::Continue, vec![]),
        Some(newer) => (Verdict::TargetBehind, epochs(&request.acked[..=newer])),
        None => {
            for candidate in claimed_heads(request) {
                if let Some(place) = held(candidate)? {
                    return Ok(Some(Found { verdict: rollback(standing, place), lost: vec![], from: Some(place) }));
                }
            }
            let knows_nothing = request.acked.is_empty();
            let verdict = Verdict::Rollback { to: None };
            return Ok(knows_nothing.then_some(Found { verdict, lost: vec![], from: None }));
        }
    };
    Ok(held(newest)?.map(|place| Found { verdict, lost, from: Some(place) }))
}

#[cfg(test)]
#[path = "target_tests.rs"]
mod tests;
