//! Asking a point back: what a source may ask of one of its points, and what the target answers.
//!
//! One point is open on a connection, for as long as that lasts; the target holds it against pruning meanwhile. A question is bounded in
//! blocks and extents, and so is the number of those that wait; its answer is as many messages as it takes, the last of
//! them `Done` or `Failed`. Needs no key at the target: then digests and content are told sealed as they came, whole frames at a time.
//! Where it has the key, only what was asked for is sealed anew, and the frames have the blocks that were asked for and no other; and new
//! hardware of the office, which has no key to open them with, is told it (`docs/decisions/2026-11-27-new-hardware-is-told-the-key.md`).
//! Nothing here changes anything.

use crate::holding::Held;
use crate::limits::VOLUMES_MAX;
use crate::message::PointSummary;
use crate::record::Volume;
use crate::seal::{DIGEST_BYTES, DataKey, Digest};
use crate::units::{Block, Class, Extent, Head, Timestamp, VolumeSlot};
use serde::{Deserialize, Serialize};
use std::fmt;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Bytes of a point's name: a number, a time, an age, a label.
pub const NAME_BYTES_MAX: usize = 128;
/// Blocks that one question may be about: 64 MiB of a volume.
pub const QUESTION_BLOCKS_MAX: u64 = 16 * 1024;
/// Extents that one question may name: 16 KiB of them.
pub const QUESTION_EXTENTS_MAX: usize = 2048;
/// Questions that may wait for their answers.
pub const QUESTIONS_MAX: usize = 16;
/// Bytes of a frame in one message; the rest comes in further ones.
pub const PIECE_BYTES_MAX: usize = 40 * 1024;
/// Bytes of holdings in one message.
pub const HOLDINGS_BYTES_MAX: usize = 40 * 1024;
/// Bytes of a reason, in one line.
pub const REASON_BYTES_MAX: usize = 1024;

/// A point that is open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenedPoint {
    /// The point.
    pub head: Head,
    /// The instant of its cut, by the source's clock.
    pub cut_time: Timestamp,
    /// Its class.
    pub class: Class,
    /// Its label.
    pub label: Option<String>,
    /// Its volumes.
    pub volumes: Vec<Volume>,
    /// Whether the target has the key: content comes sealed anew, block by block.
    pub has_key: bool,
}

impl OpenedPoint {
    /// Whether a target of ours says this.
    #[must_use]
    pub fn is_bounded(&self) -> bool {
        self.volumes.len() <= VOLUMES_MAX
    }
}

/// What is asked, about a volume of the open point where it is about one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// All points of the group.
    Points,
    /// Which blocks were sent after a point, whichever it is.
    Changes {
        /// The point.
        since: Head,
    },
    /// What the open point holds of some blocks: their digests.
    Holdings {
        /// First block and number of blocks.
        extents: Vec<(Block, u32)>,
    },
    /// The content of some blocks.
    Content {
        /// First block and number of blocks.
        extents: Vec<(Block, u32)>,
    },
    /// The group's key, under which content is told: of new hardware, which has none of its own.
    Key,
}

impl Question {
    /// The blocks it names, where they are extents, and not more than may be asked for; `None` else.
    #[must_use]
    pub fn extents(&self) -> Option<Vec<Extent>> {
        let (Self::Holdings { extents } | Self::Content { extents }) = self else { return Some(Vec::new()) };
        let blocks: u64 = extents.iter().map(|(_, count)| u64::from(*count)).sum();
        if extents.is_empty() || extents.len() > QUESTION_EXTENTS_MAX || blocks > QUESTION_BLOCKS_MAX {
            return None;
        }
        to_extents(extents)
    }
}

/// Extents of what a message names; `None` where any of them is none.
#[must_use]
pub fn to_extents(named: &[(Block, u32)]) -> Option<Vec<Extent>> {
    named.iter().map(|(start, count)| Extent::new(*start, *count)).collect()
}

/// The same the other way.
#[must_use]
pub fn named(extents: &[Extent]) -> Vec<(Block, u32)> {
    extents.iter().map(|extent| (extent.start, extent.count)).collect()
}

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// To `Points`: the next of them, oldest first.
    Points {
        /// The points.
        points: Vec<PointSummary>,
    },
    /// To `Changes`: blocks that were sent after the point. None that was sent is missing.
    Changed {
        /// First block and number of blocks; at most `MESSAGE_EXTENTS_MAX`.
        extents: Vec<(Block, u32)>,
    },
    /// To `Changes`: that cannot be told.
    ChangesUnknown,
    /// To `Holdings`: the next of the blocks that were asked for, in their order.
    Holdings {
        /// How each run of them is held.
        runs: Vec<Told>,
    },
    /// To `Content`: a frame, or a piece of one that goes on in the next message.
    Frame {
        /// The blocks to be taken from it, in the first piece; some of those that were asked for.
        blocks: Vec<(Block, u32)>,
        /// Its bytes, at most `PIECE_BYTES_MAX`.
        bytes: Vec<u8>,
        /// Whether it goes on.
        more: bool,
    },
    /// To `Content`: blocks that cannot be had.
    Lost {
        /// The first one.
        start: Block,
        /// How many.
        count: u32,
        /// Why, in one line.
        reason: String,
    },
    /// The end of an answer that is whole.
    Done,
    /// The end of an answer that is not.
    Failed {
        /// Why, in one line.
        reason: String,
    },
    /// To `Key`: the key; no piece where the target does not have it.
    Key {
        /// The key.
        key: ToldKey,
    },
}

/// A data key on the line: to the office whose it is, and to nobody else. Never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(transparent)]
pub struct ToldKey([u8; 32]);

impl ToldKey {
    /// The key, taken out.
    #[must_use]
    pub const fn to_key(&self) -> DataKey {
        DataKey::new(self.0)
    }
}

impl From<&DataKey> for ToldKey {
    fn from(key: &DataKey) -> Self {
        Self(*key.expose())
    }
}

impl fmt::Debug for ToldKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ToldKey(…)")
    }
}

/// Blocks one after the other that the point holds alike.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Told {
    /// The digests of their content, one a block: of a target that has the key.
    Digests(Vec<Digest>),
    /// So many of them, held so.
    Run(u32, Held),
}

impl Told {
    /// How many blocks.
    #[must_use]
    pub const fn count(&self) -> usize {
        match self {
            Self::Digests(digests) => digests.len(),
            Self::Run(count, _) => *count as usize,
        }
    }

    /// About the bytes it takes on the line.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        match self {
            Self::Digests(digests) => 12 + digests.len() * DIGEST_BYTES,
            Self::Run(_, held) => 8 + held.bytes(),
        }
    }
}

/// A reason as it goes on the line: one line, and bounded.
#[must_use]
pub fn reason(text: &str) -> String {
    let mut line = text.replace(['\n', '\r'], " ");
    let end = (0..=REASON_BYTES_MAX.min(line.len())).rev().find(|end| line.is_char_boundary(*end)).unwrap_or(0);
    line.truncate(end);
    line
}

/// Which volume a question is about, and its number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// Comes back with each piece of the answer.
    pub request: u64,
    /// The volume.
    pub volume: VolumeSlot,
    /// What is asked.
    pub question: Question,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{EXTENTS_MAX, MESSAGE_BYTES_MAX, MESSAGE_EXTENTS_MAX};
    use crate::message::{SourceMessage, TargetMessage, decode, encode};
    use crate::units::{Epoch, FrameHash, GroupId};

    fn head() -> Head {
        Head { epoch: Epoch(5), hash: FrameHash([0xcd; 32]) }
    }

    fn asked(question: Question) -> SourceMessage {
        SourceMessage::AskPoint(Asked { request: 7, volume: VolumeSlot(3), question })
    }

    #[test]
    fn a_point_is_opened_and_asked_in_these_bytes() {
        let open = SourceMessage::OpenPoint { group: GroupId([0xab; 16]), at: "2h".into() };
        let named_group = [&[32, 0, 0, 0, 0, 0, 0, 0][..], &b"ab".repeat(16)].concat();
        let bytes = [&[7, 0, 0, 0][..], &named_group, &[2, 0, 0, 0, 0, 0, 0, 0], b"2h"].concat();
        assert_eq!(encode(&open), bytes);
        let ask = asked(Question::Content { extents: vec![(Block(9), 2)] });
        let bytes =
            [8, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 3, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 2, 0, 0, 0];
        assert_eq!(encode(&ask), bytes);
        assert_eq!(decode::<SourceMessage>(&bytes).expect("a message"), ask);
        for (question, variant) in [
            (Question::Points, 0),
            (Question::Changes { since: head() }, 1),
            (Question::Holdings { extents: vec![] }, 2),
            (Question::Key, 4),
        ] {
            assert_eq!(encode(&asked(question))[14], variant);
        }
    }

    #[test]
    fn answers_are_these_bytes_and_full_ones_fit_a_message() {
        let answer = |answer| TargetMessage::Answer { request: 7, answer };
        let done = encode(&answer(Answer::Done));
        assert_eq!(done, [15, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0]);
        let extents = vec![(Block(u32::MAX), u32::MAX); MESSAGE_EXTENTS_MAX];
        let blocks = vec![(Block(1), 1); QUESTION_EXTENTS_MAX];
        let point = PointSummary {
            epoch: Epoch(u64::MAX),
            cut_time: Timestamp(i64::MAX),
            class: Class::Application,
            label: Some("l".repeat(64)),
            bytes: u64::MAX,
            cut_us: u64::MAX,
            cut_rounds: u32::MAX,
        };
        let full = [
            Answer::Points { points: vec![point; 200] },
            Answer::Changed { extents },
            Answer::ChangesUnknown,
            Answer::Holdings { runs: vec![Told::Digests(vec![[1; 16]; HOLDINGS_BYTES_MAX / 16])] },
            Answer::Frame { blocks, bytes: vec![1; PIECE_BYTES_MAX], more: true },
            Answer::Lost { start: Block(1), count: 2, reason: reason(&"x".repeat(9999)) },
            Answer::Failed { reason: reason("no\nway") },
        ];
        for (variant, answer) in [0, 1, 2, 3, 4, 5, 7].into_iter().zip(full.map(answer)) {
            let bytes = encode(&answer);
            assert!(bytes.len() <= MESSAGE_BYTES_MAX);
            assert_eq!(bytes[12], variant);
            assert_eq!(decode::<TargetMessage>(&bytes).expect("a message"), answer);
        }
        // The longest holding on top of a message that is all but full.
        let header = crate::frame::header_len(EXTENTS_MAX);
        assert!(HOLDINGS_BYTES_MAX + header + 1024 <= MESSAGE_BYTES_MAX);
    }

    #[test]
    fn a_key_is_told_as_it_is_and_never_printed() {
        let told = TargetMessage::Answer { request: 7, answer: Answer::Key { key: (&DataKey::new([9; 32])).into() } };
        let bytes = encode(&told);
        assert_eq!(bytes, [&[15, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0][..], &[9; 32]].concat());
        assert!(!format!("{told:?}").contains('9'));
        let Ok(TargetMessage::Answer { answer: Answer::Key { key }, .. }) = decode(&bytes) else { panic!("a key") };
        assert_eq!(key.to_key().expose(), &[9; 32]);
    }

    #[test]
    fn a_question_is_bounded_in_extents_and_blocks() {
        let extents = |extents| Question::Holdings { extents }.extents();
        assert_eq!(extents(vec![(Block(1), 2)]), Some(vec![Extent { start: Block(1), count: 2 }]));
        assert!(extents(vec![(Block(1), QUESTION_BLOCKS_MAX as u32)]).is_some());
        assert!(extents(vec![(Block(1), 1); QUESTION_EXTENTS_MAX]).is_some());
        for beyond in [
            vec![],
            vec![(Block(1), 0)],
            vec![(Block(u32::MAX), 2)],
            vec![(Block(1), QUESTION_BLOCKS_MAX as u32 + 1)],
            vec![(Block(1), u32::MAX); 2],
            vec![(Block(1), 1); QUESTION_EXTENTS_MAX + 1],
        ] {
            assert_eq!(extents(beyond), None);
        }
    }

    #[test]
    fn a_reason_is_one_bounded_line() {
        assert_eq!(reason("two\nlines"), "two lines");
        let long = reason(&"ä".repeat(REASON_BYTES_MAX));
        assert!(long.len() <= REASON_BYTES_MAX && long.chars().all(|letter| letter == 'ä'));
    }
}
