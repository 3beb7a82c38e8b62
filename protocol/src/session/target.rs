//! A target's end of the session: who is let in, and how a source's history stands to the target's.
//!
//! `TargetSession` says what a connection's control messages amount to, in order: `Hello` first and once, then groups. `judge`
//! compares histories and grants generations. Neither touches a store: the receiver does what they say. The generation
//! stays as it is only for a source that was granted exactly this one and stands at the target's head; in every other
//! case a higher one is granted, which fences whatever the lower one had under way.

use std::collections::BTreeSet;

use super::{ACKED_MAX, SENT_MAX};
use crate::limits::{VOLUMES_MAX, is_name};
use crate::message::{
    self, MessageError, OpenGroup, PROTOCOL_VERSION, RefusalReason, SourceMessage, TargetMessage, Verdict,
};
use crate::units::{Epoch, Generation, GroupId, Head, Timestamp, VOLUME_BYTES_MAX};

/// Groups a connection may open.
pub const GROUPS_MAX: usize = 64;
/// Bytes a data key's envelope may have.
const ENVELOPE_BYTES_MAX: usize = 1024;

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
}

impl TargetSession {
    /// A connection nobody has spoken on; `software` is what the source is told about this program.
    #[must_use]
    pub fn new(software: impl Into<String>) -> Self {
        Self { software: software.into(), greeted: false, groups: BTreeSet::new() }
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
        ("envelope", envelope.encapsulated.len() + envelope.sealed.len() <= ENVELOPE_BYTES_MAX),
    ];
    checks.iter().find(|(_, holds)| !holds).map_or(Ok(()), |(what, _)| Err(TargetRefusal::Field(what)))
}

/// What the target knows of a group when a source opens it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// The newest point; `None` where there is none.
    pub head: Option<Head>,
    /// The generation granted last; 0 where the group is new.
    pub generation: Generation,
    /// Whether another connection that was granted this generation is alive.
    pub held: bool,
}

/// How two histories stand to each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// They go together.
    Open {
        /// How.
        verdict: Verdict,
        /// The generation to grant, durably, before the source is told.
        generation: Generation,
        /// Points the source has had acks for and the target has not: lost at the target. Newest first.
        lost: Vec<Epoch>,
    },
    /// They do not. `Fork` is to be kept, durably, until an operator resolves it.
    Refuse(RefusalReason),
}

/// Judges a source's history. `in_chain` says whether a point is one of the target's chain.
///
/// # Errors
/// Only those of `in_chain`.
pub fn judge<E>(
    standing: &Standing,
    request: &OpenGroup,
    in_chain: &mut dyn FnMut(Head) -> Result<bool, E>,
) -> Result<Judgement, E> {
    let claimed = request.generation.unwrap_or_default();
    if standing.held && claimed < standing.generation {
        // Two machines with one history would otherwise fence each other off in turns, each starting over each time.
        return Ok(Judgement::Refuse(RefusalReason::Fenced));
    }
    let Some((verdict, lost)) = compare(standing, request, in_chain)? else {
        let stale = claimed < standing.generation;
        return Ok(Judgement::Refuse(if stale { RefusalReason::Fenced } else { RefusalReason::Fork }));
    };
    let stays = verdict == Verdict::Continue && claimed == standing.generation;
    let generation = if stays { claimed } else { Generation(claimed.max(standing.generation).0.saturating_add(1)) };
    Ok(Judgement::Open { verdict, generation, lost })
}

/// The verdict and the points lost at the target; `None` where the source's history is not in the target's chain.
fn compare<E>(
    standing: &Standing,
    request: &OpenGroup,
    in_chain: &mut dyn FnMut(Head) -> Result<bool, E>,
) -> Result<Option<(Verdict, Vec<Epoch>)>, E> {
    let epochs = |heads: &[Head]| heads.iter().map(|head| head.epoch).collect::<Vec<_>>();
    let Some(head) = standing.head else {
        let verdict = match (standing.generation, request.acked.is_empty()) {
            (Generation(0), _) => Verdict::New,
            (_, true) if request.generation.is_none() => Verdict::New,
            (_, true) => Verdict::Continue,
            (_, false) => Verdict::TargetBehind,
        };
        return Ok(Some((verdict, epochs(&request.acked))));
    };
    if request.sent.contains(&head) {
        return Ok(Some((Verdict::Continue, vec![])));
    }
    match request.acked.iter().position(|acked| *acked == head) {
        Some(0) => return Ok(Some((Verdict::Continue, vec![]))),
        Some(newer) => return Ok(Some((Verdict::TargetBehind, epochs(&request.acked[..newer])))),
        None => {}
    }
    for candidate in request.sent.iter().chain(request.acked.first()) {
        if in_chain(*candidate)? {
            return Ok(Some((Verdict::Rollback { to: Some(candidate.epoch) }, vec![])));
        }
    }
    let knows_nothing = request.acked.is_empty();
    Ok(knows_nothing.then_some((Verdict::Rollback { to: None }, vec![])))
}

#[cfg(test)]
#[path = "target_tests.rs"]
mod tests;
