//! What is held of some blocks at the newest point, told by the sealed digests of the frames that hold them: for the audit over the line.
//!
//! Needs no key. Invariant: nothing is told of a frame that was not read again, whole, and found to be as it was written, or that a
//! repair does not stand for. Checkpoints' packs are no different: their frames have digests of their own, whether they were sealed
//! anew or taken over.

use super::JournalError;
use super::pieces::{Piece, PiecePlace};
use super::view::GroupView;
use crate::restore::point::{LoadError, with_frame};
use cdp_protocol::holding::{ANSWER_BYTES_MAX, Held, Holding};
use cdp_protocol::units::{Extent, Head, VolumeSlot};

impl GroupView {
    /// What is held of `blocks` of a volume, from the first on, as far as it fits an answer; `None` where `head` is not the newest point.
    /// Reads the frames: a few MiB at most.
    ///
    /// # Errors
    /// Where the history cannot be read.
    pub fn holdings(&self, head: Head, slot: VolumeSlot, blocks: Extent) -> Result<Option<Vec<Holding>>, JournalError> {
        let is_newest = self.newest()?.is_some_and(|point| (point.epoch, point.hash) == (head.epoch, head.hash));
        let commit = if is_newest { self.commit(head.epoch)? } else { None };
        let Some(commit) = commit else { return Ok(None) };
        let (mut told, mut bytes) = (Vec::new(), 0);
        for piece in self.resolve(&commit, slot, blocks)? {
            let holding = Holding { count: piece.extent.count, held: self.held(&piece)? };
            bytes += holding.held.bytes();
            if bytes > ANSWER_BYTES_MAX {
                break;
            }
            told.push(holding);
        }
        Ok(Some(told))
    }

    fn held(&self, piece: &Piece) -> Result<Held, JournalError> {
        Ok(match &piece.place {
            PiecePlace::Zero => Held::Hole,
            PiecePlace::NotCovered => Held::Nothing,
            PiecePlace::Damaged(_) => Held::Damaged,
            PiecePlace::Frame { file, entry, run } => {
                match with_frame(self, *file, entry, run, |frame| Ok(Held::of(&frame))) {
                    Ok(held) => held,
                    Err(LoadError::Damaged(_)) => Held::Damaged,
                    Err(LoadError::Journal(error)) => return Err(error),
                }
            }
        })
    }
}
