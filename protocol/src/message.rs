//! Control messages between source and target, and the one place that encodes them (serde + bincode, bounded).
//!
//! They travel on the first bidirectional stream of a connection, each behind its length as a little-endian `u32`. Nothing
//! on disk depends on this encoding. There is no verb that deletes, rewrites or shortens anything.

use crate::escrow::Envelope;
use crate::holding::Holding;
use crate::limits::MESSAGE_BYTES_MAX;
use crate::recall::{Answer, Asked, OpenedPoint};
use crate::record::{PartChain, Volume};
use crate::units::{AttemptId, Block, Class, Epoch, Generation, GroupId, Head, Sequence, Timestamp, VolumeSlot};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fmt;

/// Version of the protocol: both sides have to speak the same.
pub const PROTOCOL_VERSION: u32 = 1;
/// The ALPN protocol of the connection.
pub const ALPN: &[u8] = b"cdp/1";

/// What a source says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::large_enum_variant, reason = "messages are few, and the large one comes first on each connection")]
pub enum SourceMessage {
    /// The first message of a connection.
    Hello {
        /// `PROTOCOL_VERSION` of the source. Stays the first field of the first variant for ever.
        version: u32,
        /// The source's program and version, for the log.
        software: String,
        /// The source's clock.
        time: Timestamp,
    },
    /// Opens (or makes) a group on this connection. Its frames then come on a unidirectional stream of its own, which
    /// starts with the group's id.
    OpenGroup(OpenGroup),
    /// No write since the point `head` was cut, validated at `as_of`.
    Unchanged {
        /// The group.
        group: GroupId,
        /// The point that still describes the volumes.
        epoch: Epoch,
        /// When this was validated, by the source's clock.
        as_of: Timestamp,
    },
    /// Asks for recovery points, oldest first.
    ListPoints {
        /// Comes back with the answer.
        request: u64,
        /// The group.
        group: GroupId,
        /// Only points above this number.
        after: Option<Epoch>,
    },
    /// Asks for a `Pong`.
    Ping,
    /// Asks which blocks the target has been sent since a point: what the source's digests do not know.
    ListChanges {
        /// The group.
        group: GroupId,
        /// The point.
        since: Head,
    },
    /// Asks what the target holds of some blocks at its newest point: the audit over the line.
    ListDigests {
        /// The group.
        group: GroupId,
        /// The point that has to be the newest.
        head: Head,
        /// The volume.
        volume: VolumeSlot,
        /// The first block.
        start: Block,
        /// How many, at most `holding::QUESTION_BLOCKS_MAX`.
        count: u32,
    },
    /// Opens a point of one of the office's groups to be read on this connection: one, once. The group need not be open.
    OpenPoint {
        /// The group.
        group: GroupId,
        /// The point, as people name it; at most `recall::NAME_BYTES_MAX` bytes.
        at: String,
    },
    /// Asks something of that point.
    AskPoint(Asked),
}

/// A source's view of a group at hello.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenGroup {
    /// The group.
    pub group: GroupId,
    /// Its name within the office.
    pub name: String,
    /// The generation the source was last granted; `None` before the first time.
    pub generation: Option<Generation>,
    /// Its newest acked points, newest first, at most 16.
    pub acked: Vec<Head>,
    /// Commits that were sent after those and may have been acked unheard, newest first, at most 8.
    pub sent: Vec<Head>,
    /// The newest acked part of the epoch after them, and that epoch's number.
    pub parts: Option<(Epoch, PartChain)>,
    /// Ends of parts that this very process has sent and that may have been acked unheard, newest last, at most 64.
    pub parts_sent: Vec<(Epoch, PartChain)>,
    /// Whether a new generation is asked for: the target's answers contradicted what it was sent.
    pub anew: bool,
    /// Which process asks.
    pub instance: Instance,
    /// The data key, sealed to the target.
    pub envelope: Envelope,
    /// The volumes.
    pub volumes: Vec<Volume>,
}

/// A source's process. A machine's copy has the same state and another process; a line that broke has the same one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Drawn at random when it started.
    pub process: [u8; 16],
    /// Its machine's name, for people; at most 64 bytes.
    pub host: String,
}

/// What a target says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetMessage {
    /// The connection is accepted.
    Welcome {
        /// `PROTOCOL_VERSION` of the target.
        version: u32,
        /// The target's program and version, for the log.
        software: String,
        /// The target's clock.
        time: Timestamp,
    },
    /// The connection is refused and will be closed.
    Refused {
        /// Why, in one line.
        reason: String,
        /// The versions the target speaks.
        versions: Vec<u32>,
    },
    /// A group is open: frames may come.
    GroupOpened(GroupOpened),
    /// A group cannot be opened, or no longer goes on.
    GroupRefused {
        /// The group.
        group: GroupId,
        /// Why.
        reason: RefusalReason,
    },
    /// An epoch is durable and visible as a recovery point.
    Acked {
        /// The group.
        group: GroupId,
        /// The point.
        head: Head,
    },
    /// A part is durable.
    PartAcked {
        /// The group.
        group: GroupId,
        /// The part's attempt.
        attempt: AttemptId,
        /// The epoch's parts with it.
        parts: PartChain,
    },
    /// The target cannot take frames for now (its disk is full): what is unacked stays at the source, which opens the
    /// group again later.
    Busy {
        /// The group.
        group: GroupId,
        /// Why, in one line.
        reason: String,
        /// When to try again, in milliseconds.
        retry_after_ms: u32,
    },
    /// Recovery points asked for; a page of at most 256.
    Points {
        /// Of the request.
        request: u64,
        /// The points, oldest first.
        points: Vec<PointSummary>,
        /// Whether there are more after the last one.
        more: bool,
    },
    /// Answers a `Ping`.
    Pong,
    /// What the target holds of these blocks is damaged: the next epoch is to carry them, changed or not. Nothing is taken back
    /// by it, and a source that does not have the volume any more passes over it.
    SendAgain {
        /// The group.
        group: GroupId,
        /// The volume.
        volume: VolumeSlot,
        /// First block and number of blocks; at most `MESSAGE_EXTENTS_MAX`, the rest in further messages.
        extents: Vec<(Block, u32)>,
    },
    /// Blocks that were sent after a point, whatever they hold: of epochs, and of parts that no epoch has taken in. None that
    /// was sent is missing; some that were not may be among them.
    Changes {
        /// The group.
        group: GroupId,
        /// The point.
        since: Head,
        /// The volume.
        volume: VolumeSlot,
        /// First block and number of blocks; at most `MESSAGE_EXTENTS_MAX`.
        extents: Vec<(Block, u32)>,
        /// Number of the message within the answer, from 0.
        page: u32,
        /// Whether more follow.
        more: bool,
    },
    /// Which blocks were sent after a point cannot be told: it is not of the history that goes on, or what came after it is damaged
    /// or no longer kept apart.
    ChangesUnknown {
        /// The group.
        group: GroupId,
        /// The point.
        since: Head,
    },
    /// What is held of some blocks at a point.
    Digests {
        /// The group.
        group: GroupId,
        /// The point, the newest when this was said.
        head: Head,
        /// The volume.
        volume: VolumeSlot,
        /// The first block.
        start: Block,
        /// From there on, without gaps; they need not go as far as was asked. None where it cannot be told now: another point is the
        /// newest, or nothing can be read.
        holdings: Vec<Holding>,
    },
    /// A point is open.
    PointOpened(OpenedPoint),
    /// A point is not opened.
    PointRefused {
        /// Why, in one line; where there is no such point it names the nearest.
        reason: String,
    },
    /// A piece of an answer about it.
    Answer {
        /// Of the question.
        request: u64,
        /// The piece.
        answer: Answer,
    },
}

/// How the source's history stands to the target's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// A group the target did not have: everything is dirty.
    New,
    /// The source's newest point is the target's: go on.
    Continue,
    /// The source stands at an older point of the target's chain (it was restored or rolled back): a new generation,
    /// everything is compared, and the next epoch says so.
    Rollback {
        /// Where the source stands; `None` where it knows no point at all.
        to: Option<Epoch>,
    },
    /// The target stands at an older point of the source's chain (the target lost points it had acked, and says so
    /// loudly): a new generation, everything is dirty.
    TargetBehind,
}

/// The answer to `OpenGroup`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupOpened {
    /// The group.
    pub group: GroupId,
    /// The generation of all frames from here on.
    pub generation: Generation,
    /// How the two histories stand to each other.
    pub verdict: Verdict,
    /// The target's newest point, and its attempt.
    pub head: Option<(Head, AttemptId)>,
    /// The acked parts of the epoch after it, and that epoch's number: its commit has to be of the same number.
    pub parts: Option<(Epoch, PartChain)>,
    /// The unfinished attempt that may go on, if the source still has it.
    pub resume: Option<Resume>,
}

/// How far an unfinished attempt got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// Its epoch.
    pub epoch: Epoch,
    /// The attempt.
    pub attempt: AttemptId,
    /// The first frame that is missing.
    pub next: Sequence,
}

/// Why a group is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RefusalReason {
    /// The source's history is not of the one that goes on: frozen, both kept, until an operator resolves it.
    Fork,
    /// An operator resolved a fork, and another history than this source's goes on.
    Left,
    /// Another process took the group over: this one makes no points any more, and does not ask again by itself.
    Superseded {
        /// The machine it runs on, as it says.
        by: String,
        /// When, by the target's clock.
        at: Timestamp,
    },
    /// The name is taken by another group of the office.
    NameTaken,
    /// The target cannot serve the group; an operator has to look. The line says why.
    Failed(String),
}

impl fmt::Display for RefusalReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fork => f.write_str("its history is not of the one that goes on"),
            Self::Left => f.write_str("another history was chosen to go on"),
            Self::Superseded { by, .. } => write!(f, "a process on {by} took the group over"),
            Self::NameTaken => f.write_str("the name is another group's"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

/// A recovery point, as a source may list it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointSummary {
    /// Its number.
    pub epoch: Epoch,
    /// The instant of its cut, by the source's clock.
    pub cut_time: Timestamp,
    /// Its class.
    pub class: Class,
    /// Its label.
    pub label: Option<String>,
    /// Bytes its epoch takes in the target's journal, with the parts it stands on.
    pub bytes: u64,
    /// Duration of the cut in microseconds.
    pub cut_us: u64,
    /// Rounds of the cut.
    pub cut_rounds: u32,
}

/// Why bytes are not a control message.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Longer than any message may be.
    #[error("control message of {0} bytes, at most {MESSAGE_BYTES_MAX} are allowed")]
    Oversize(usize),
    /// Not a message, or one with bytes behind it.
    #[error("control message does not decode")]
    Decode(#[source] bincode::error::DecodeError),
    /// A message with bytes left behind it.
    #[error("control message has {0} bytes too many")]
    Trailing(usize),
}

/// A message's bytes, without the length in front.
#[must_use]
pub fn encode<M: Serialize>(message: &M) -> Vec<u8> {
    let bytes = bincode::serde::encode_to_vec(message, config()).expect("messages have no unencodable types");
    assert!(bytes.len() <= MESSAGE_BYTES_MAX, "messages are built within their bound");
    bytes
}

/// Parses a message; every byte has to belong to it.
///
/// # Errors
/// Where the bytes are too many, too few or no message.
pub fn decode<M: DeserializeOwned>(bytes: &[u8]) -> Result<M, MessageError> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(MessageError::Oversize(bytes.len()));
    }
    let (message, used) = bincode::serde::decode_from_slice(bytes, config()).map_err(MessageError::Decode)?;
    if used == bytes.len() { Ok(message) } else { Err(MessageError::Trailing(bytes.len() - used)) }
}

/// The version a `Hello` names, whatever comes after it in a version this program does not know; `None` where the bytes
/// are no `Hello`.
#[must_use]
pub fn hello_version(bytes: &[u8]) -> Option<u32> {
    let (variant, rest) = bytes.split_first_chunk::<4>()?;
    let (version, _) = rest.split_first_chunk::<4>()?;
    (*variant == [0; 4]).then_some(u32::from_le_bytes(*version))
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_little_endian().with_fixed_int_encoding().with_limit::<MESSAGE_BYTES_MAX>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::holding::{ANSWER_BYTES_MAX, Held};
    use crate::limits::MESSAGE_EXTENTS_MAX;

    #[test]
    fn hello_is_these_bytes_for_ever() {
        let hello = SourceMessage::Hello { version: 1, software: "x".into(), time: Timestamp(2) };
        let bytes = [0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, b'x', 2, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(encode(&hello), bytes);
        assert_eq!(decode::<SourceMessage>(&bytes).expect("hello"), hello);
        assert_eq!(hello_version(&bytes), Some(1));
    }

    #[test]
    fn send_again_is_these_bytes_and_fits_a_message_when_it_is_full() {
        let ask = |extents| TargetMessage::SendAgain { group: GroupId([0xab; 16]), volume: VolumeSlot(3), extents };
        let mut bytes = vec![9, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend_from_slice("ab".repeat(16).as_bytes());
        bytes.extend_from_slice(&[
            3, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0,
        ]);
        let two = ask(vec![(Block(7), 1), (Block(u32::MAX), 2)]);
        assert_eq!(encode(&two), bytes);
        assert_eq!(decode::<TargetMessage>(&bytes).expect("a message"), two);
        let full = ask(vec![(Block(u32::MAX), u32::MAX); MESSAGE_EXTENTS_MAX]);
        assert_eq!(decode::<TargetMessage>(&encode(&full)).expect("a message"), full);
    }

    #[test]
    fn changes_are_asked_for_and_told_in_these_bytes() {
        let (group, since) = (GroupId([0xab; 16]), Head { epoch: Epoch(5), hash: crate::units::FrameHash([0xcd; 32]) });
        let ask = SourceMessage::ListChanges { group, since };
        let named = [&[32, 0, 0, 0, 0, 0, 0, 0][..], &b"ab".repeat(16)].concat();
        let bytes = encode(&ask);
        assert_eq!(bytes[..44], [&[5, 0, 0, 0][..], &named].concat());
        assert_eq!(decode::<SourceMessage>(&bytes).expect("a message"), ask);
        let extents = vec![(Block(u32::MAX), u32::MAX); MESSAGE_EXTENTS_MAX];
        let full = TargetMessage::Changes { group, since, volume: VolumeSlot(3), extents, page: 2, more: true };
        let unknown = TargetMessage::ChangesUnknown { group, since };
        for (message, variant) in [(full, 10), (unknown, 11)] {
            let bytes = encode(&message);
            assert_eq!(bytes[..44], [&[variant, 0, 0, 0][..], &named].concat());
            assert_eq!(decode::<TargetMessage>(&bytes).expect("a message"), message);
        }
    }

    #[test]
    fn digests_are_asked_for_and_told_in_these_bytes() {
        let (group, head) = (GroupId([0xab; 16]), Head { epoch: Epoch(5), hash: crate::units::FrameHash([0xcd; 32]) });
        let ask = SourceMessage::ListDigests { group, head, volume: VolumeSlot(3), start: Block(7), count: 2 };
        let named = [&[32, 0, 0, 0, 0, 0, 0, 0][..], &b"ab".repeat(16)].concat();
        let bytes = encode(&ask);
        assert_eq!(bytes[..44], [&[6, 0, 0, 0][..], &named].concat());
        assert_eq!(bytes[bytes.len() - 10..], [3, 0, 7, 0, 0, 0, 2, 0, 0, 0]);
        assert_eq!(decode::<SourceMessage>(&bytes).expect("a message"), ask);
        let frame = || Held::Frame { header: vec![1; 332], digests: vec![2; 528] };
        let count = ANSWER_BYTES_MAX / frame().bytes() + 1;
        let holdings = vec![Holding { count: 1, held: frame() }; count];
        let full = TargetMessage::Digests { group, head, volume: VolumeSlot(3), start: Block(7), holdings };
        let bytes = encode(&full);
        assert_eq!(bytes[..44], [&[12, 0, 0, 0][..], &named].concat());
        assert_eq!(decode::<TargetMessage>(&bytes).expect("a message"), full);
        let told = [Held::Nothing, Held::Hole, Held::Unreadable, Held::Damaged]
            .map(|held| encode(&Holding { count: 9, held }));
        assert_eq!(told, [0, 1, 2, 3].map(|held| vec![9, 0, 0, 0, held, 0, 0, 0]));
    }

    #[test]
    fn the_version_of_an_unknown_hello_can_be_read() {
        assert_eq!(hello_version(&[0, 0, 0, 0, 9, 0, 0, 0, 0xff, 0xff]), Some(9));
        assert_eq!(hello_version(&[0, 0, 0, 0, 9, 0, 0]), None);
        assert_eq!(hello_version(&encode(&SourceMessage::Ping)), None);
    }

    #[test]
    fn garbage_truncation_and_trailing_bytes_are_refused() {
        let bytes = encode(&SourceMessage::Hello { version: 1, software: "x".into(), time: Timestamp(2) });
        for len in 0..bytes.len() {
            assert!(decode::<SourceMessage>(&bytes[..len]).is_err(), "cut to {len}");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(matches!(decode::<SourceMessage>(&longer), Err(MessageError::Trailing(1))));
        assert!(matches!(decode::<SourceMessage>(&[0xff; MESSAGE_BYTES_MAX + 1]), Err(MessageError::Oversize(_))));
        let mut huge_text = bytes;
        huge_text[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(decode::<SourceMessage>(&huge_text).is_err());
    }
}
