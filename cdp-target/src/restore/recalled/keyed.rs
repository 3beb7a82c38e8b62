//! Content of a point sealed anew for its source: the blocks that were asked for, and no other.
//!
//! Under an attempt of its own that stands nowhere: what is sealed here goes over the line and is kept by nobody. What cannot be read is
//! said to be lost.

use super::{Tell, lost, tell_frame};
use crate::journal::index::CommitEntry;
use crate::journal::{GroupView, JournalError};
use crate::restore::image::one_line;
use crate::restore::keyring::Keyring;
use crate::restore::point::{Content, PointImage};
use cdp_protocol::codec::{Draft, Sealer};
use cdp_protocol::frame::Encoding;
use cdp_protocol::limits::{CONTENT_BLOCKS_MAX, CONTENT_BYTES_MAX};
use cdp_protocol::packer::{Packer, Packing};
use cdp_protocol::units::{AttemptId, BLOCK_BYTES, Block, Extent, Sequence, VolumeSlot};
use cdp_seams::random::{Random, array};
use std::sync::Arc;

/// With the data key.
pub(super) struct Keyed {
    pub(super) keys: Keyring,
    image: PointImage,
    sealer: Sealer,
    packer: Packer,
    next: u64,
}

impl Keyed {
    pub(super) fn new(
        view: &Arc<GroupView>,
        commit: &CommitEntry,
        keys: Keyring,
        random: &dyn Random,
    ) -> Result<Self, JournalError> {
        let attempt = AttemptId(array(random));
        let (group, epoch, generation) = (view.identity().group, commit.head.epoch, commit.generation);
        let sealer = Sealer::new(group, epoch, generation, attempt, keys.present()).resealing();
        let image = view.image_of(commit.clone(), &keys)?;
        // What came packed with zstd is not to grow for being sealed anew.
        Ok(Self { keys, image, sealer, packer: Packer::new(Packing::zstd(3)), next: 0 })
    }

    fn seal(&mut self, slot: VolumeSlot, gathered: &mut Gathered, tell: &mut Tell<'_>) -> bool {
        let Gathered { extents, draft } = std::mem::take(gathered);
        if extents.is_empty() {
            return true;
        }
        let (sequence, blocks) = (Sequence(self.next), extents.clone());
        self.next += 1;
        let frame = self.sealer.content_of(&mut self.packer, slot, sequence, extents, draft);
        tell_frame(&blocks, &frame, tell)
    }

    /// Seals the content of these blocks anew, a frame at a time.
    pub(super) fn content(&mut self, slot: VolumeSlot, extents: &[Extent], tell: &mut Tell<'_>) -> bool {
        let mut gathered = Gathered::default();
        for extent in extents {
            let mut at = u64::from(extent.start.0);
            while at < extent.end() {
                let room = CONTENT_BLOCKS_MAX - gathered.draft.content().len() / BLOCK_BYTES;
                let count = (extent.end() - at).min(room as u64) as u32;
                let wanted = Extent { start: Block(at as u32), count };
                let mut bare = Vec::new();
                let read = self.image.read_blocks(slot, wanted, &mut |run, content| {
                    at = run.end();
                    match content {
                        Content::Bytes(bytes) => gathered.push(run, bytes),
                        Content::Zero => bare.push((run, Encoding::Hole)),
                        Content::Unreadable => bare.push((run, Encoding::Unreadable)),
                    }
                });
                let lost = read.err().map(|error| {
                    at += 1;
                    lost(Block((at - 1) as u32), &one_line(&error))
                });
                let mut goes_on = lost.is_none_or(&mut *tell);
                for (run, encoding) in bare {
                    self.next += 1;
                    let frame = self.sealer.bare(encoding, slot, Sequence(self.next - 1), vec![run]);
                    goes_on = goes_on && tell_frame(&[run], &frame, tell);
                }
                if gathered.is_full() {
                    goes_on = goes_on && self.seal(slot, &mut gathered, tell);
                }
                if !goes_on {
                    return false;
                }
            }
        }
        self.seal(slot, &mut gathered, tell)
    }
}

/// Content of a frame to be.
#[derive(Default)]
struct Gathered {
    extents: Vec<Extent>,
    draft: Draft,
}

impl Gathered {
    fn push(&mut self, run: Extent, bytes: &[u8]) {
        self.draft.push(bytes);
        match self.extents.last_mut() {
            Some(last) if last.end() == u64::from(run.start.0) => last.count += run.count,
            _ => self.extents.push(run),
        }
    }

    fn is_full(&self) -> bool {
        self.draft.content().len() >= CONTENT_BYTES_MAX
    }
}
