//! The line of the simulation: whole messages that wait, are lost, come twice, or never come because it broke.
//!
//! One `Wire` is one connection: control messages both ways, and the stream of frames. Each keeps its order, there is none
//! between them. A wire that broke may be gone at one end and still deliver at the other, beside the next one. (How bytes
//! make messages, and what a line does that breaks within one, is what `tests/session` drives, over the line in `cdp-seams`.)

use std::collections::VecDeque;

use bytes::Bytes;
use cdp_seams::random::SimRandom;

/// What a stream of frames carries.
#[derive(Clone)]
pub(crate) enum OnStream {
    /// A new stream begins.
    Opened,
    /// A frame.
    Frame(Bytes),
}

/// A connection.
pub(crate) struct Wire {
    pub(crate) number: u64,
    pub(crate) to_target: VecDeque<Vec<u8>>,
    pub(crate) frames: VecDeque<OnStream>,
    pub(crate) to_source: VecDeque<Vec<u8>>,
    /// The source has closed it, or is gone.
    pub(crate) source_gone: bool,
    /// The target has closed it, or is gone.
    pub(crate) target_gone: bool,
}

/// How often whole messages are lost or come twice, of 1000.
#[derive(Clone, Copy, Default)]
pub(crate) struct LineFaults {
    pub(crate) lost_permille: u64,
    pub(crate) twice_permille: u64,
}

impl Wire {
    pub(crate) fn new(number: u64) -> Self {
        Self {
            number,
            to_target: VecDeque::new(),
            frames: VecDeque::new(),
            to_source: VecDeque::new(),
            source_gone: false,
            target_gone: false,
        }
    }

    /// The line breaks: of what is under way, any first part of each stream may still be delivered.
    pub(crate) fn breaks(&mut self, random: &SimRandom) {
        self.source_gone = true;
        keep_some(&mut self.to_target, random);
        keep_some(&mut self.frames, random);
        self.to_source.clear();
    }

    /// Whether nothing can come of it any more.
    pub(crate) fn is_over(&self) -> bool {
        self.target_gone && self.source_gone
    }
}

fn keep_some<T>(queue: &mut VecDeque<T>, random: &SimRandom) {
    let kept = random.below(queue.len() as u64 + 1) as usize;
    queue.truncate(kept);
}

/// The next message of a stream, unless it is lost just now.
pub(crate) fn next<T: Clone>(queue: &mut VecDeque<T>, faults: LineFaults, random: &SimRandom) -> Option<T> {
    let drawn = random.below(1000);
    if drawn < faults.lost_permille {
        queue.pop_front();
        return None;
    }
    if drawn < faults.lost_permille + faults.twice_permille {
        return queue.front().cloned();
    }
    queue.pop_front()
}
