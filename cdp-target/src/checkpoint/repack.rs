//! Content of a point sealed anew: in block order, under a fresh attempt, as what it was at that point.
//!
//! What cannot be read is said to be lost, never left out: older content is not to show through.

use super::builder::Step;
use crate::journal::{GroupView, JournalError};
use crate::restore::keyring::Keyring;
use crate::restore::point::{Content, PointImage, ReadError};
use cdp_protocol::codec::{Draft, Sealer};
use cdp_protocol::frame::Encoding;
use cdp_protocol::limits::{CONTENT_BLOCKS_MAX, EXTENTS_MAX};
use cdp_protocol::packer::{Packer, Packing};
use cdp_protocol::units::{AttemptId, BLOCK_BYTES, Block, Epoch, Extent, Generation, Sequence, VolumeSlot};
use cdp_seams::random::{Random, array};

/// Blocks read at once.
const READ_BLOCKS: u32 = 1024;
/// Blocks sealed before they are written: bounds what is held in memory.
const PART_BLOCKS: u32 = 2048;

/// Seals content anew, frame by frame. Holds one frame, and frames that no pack has taken yet.
pub(crate) struct Repack {
    sealer: Sealer,
    packer: Packer,
    next: u64,
    slot: VolumeSlot,
    draft: Draft,
    extents: Vec<Extent>,
    holes: Vec<Extent>,
    unreadable: Vec<Extent>,
    lost: Vec<Extent>,
    /// Sealed, in order.
    frames: Vec<Vec<u8>>,
    /// Whether there was anything but zeros.
    not_zero: bool,
    lost_blocks: u64,
}

impl Repack {
    pub(crate) fn new(
        view: &GroupView,
        keys: &Keyring,
        random: &dyn Random,
        epoch: Epoch,
        generation: Generation,
    ) -> Self {
        let attempt = AttemptId(array(random));
        let sealer = Sealer::new(view.identity().group, epoch, generation, attempt, keys.present()).resealing();
        Self {
            sealer,
            // What came packed with zstd is not to grow for being sealed anew.
            packer: Packer::new(Packing::zstd(3)),
            next: 0,
            slot: VolumeSlot(0),
            draft: Draft::default(),
            extents: Vec::new(),
            holes: Vec::new(),
            unreadable: Vec::new(),
            lost: Vec::new(),
            frames: Vec::new(),
            not_zero: false,
            lost_blocks: 0,
        }
    }

    /// Reads blocks of a volume of the point and seals them.
    pub(crate) fn read(
        &mut self,
        image: &PointImage,
        slot: VolumeSlot,
        extent: Extent,
        step: &mut Step<'_>,
    ) -> Result<(), JournalError> {
        if slot != self.slot {
            self.flush();
            self.slot = slot;
        }
        let mut at = u64::from(extent.start.0);
        while at < extent.end() {
            let from = at;
            let count = (extent.end() - at).min(u64::from(READ_BLOCKS)) as u32;
            if let Some(error) = self.try_read(image, at, count, &mut at)? {
                self.pass(image, extent, &error, &mut at)?;
            }
            if !step((at - from) * BLOCK_BYTES as u64) {
                return Err(JournalError::Interrupted);
            }
        }
        Ok(())
    }

    /// Goes on behind what could not be read at `at`.
    fn pass(
        &mut self,
        image: &PointImage,
        extent: Extent,
        error: &ReadError,
        at: &mut u64,
    ) -> Result<(), JournalError> {
        let end = match error {
            ReadError::Damaged { extent, .. } | ReadError::NotCovered { extent, .. } => extent.end(),
            _ => 0,
        };
        let end = end.clamp(*at + 1, extent.end());
        // One frame's blocks are tried one by one: what stands for it may have some of them.
        let is_frame = end - *at <= CONTENT_BLOCKS_MAX as u64 && !matches!(error, ReadError::NotCovered { .. });
        if !is_frame {
            self.lose(*at, end, error);
            *at = end;
        }
        while *at < end {
            if let Some(error) = self.try_read(image, *at, 1, at)? {
                self.lose(*at, *at + 1, &error);
                *at += 1;
            }
        }
        Ok(())
    }

    fn lose(&mut self, from: u64, end: u64, error: &ReadError) {
        let blocks = Extent::new(Block(from as u32), (end - from) as u32).expect("blocks of the volume");
        // What was never sent is no zero either.
        self.not_zero = true;
        if !matches!(error, ReadError::NotCovered { .. }) {
            self.lost_blocks += end - from;
            add(&mut self.lost, blocks);
            if self.lost.len() >= EXTENTS_MAX {
                self.flush_bare(Encoding::Lost);
            }
        }
    }

    /// Reads as far as it goes; `at` is where it got to, and what stopped it is given back.
    fn try_read(
        &mut self,
        image: &PointImage,
        from: u64,
        count: u32,
        at: &mut u64,
    ) -> Result<Option<ReadError>, JournalError> {
        let extent = Extent::new(Block(from as u32), count).expect("a part of the volume");
        let slot = self.slot;
        let read = image.read_blocks(slot, extent, &mut |run, content| {
            self.take(run, content);
            *at = run.end();
        });
        match read {
            Ok(()) => Ok(None),
            Err(ReadError::Journal(error)) => Err(error),
            Err(error) => Ok(Some(error)),
        }
    }

    fn take(&mut self, run: Extent, content: Content<'_>) {
        match content {
            Content::Zero => add(&mut self.holes, run),
            Content::Unreadable => {
                self.not_zero = true;
                add(&mut self.unreadable, run);
            }
            Content::Bytes(bytes) => {
                self.not_zero = true;
                for (at, block) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
                    let extent = Extent::new(Block(run.start.0 + at as u32), 1).expect("a block of the run");
                    add(&mut self.extents, extent);
                    self.draft.push(block);
                    if self.draft.content().len() == CONTENT_BLOCKS_MAX * BLOCK_BYTES {
                        self.flush_content();
                    }
                }
            }
        }
        for encoding in [Encoding::Hole, Encoding::Unreadable, Encoding::Lost] {
            if self.bare(encoding).len() >= EXTENTS_MAX {
                self.flush_bare(encoding);
            }
        }
    }

    const fn bare(&mut self, encoding: Encoding) -> &mut Vec<Extent> {
        match encoding {
            Encoding::Unreadable => &mut self.unreadable,
            Encoding::Lost => &mut self.lost,
            _ => &mut self.holes,
        }
    }

    fn sequence(&mut self) -> Sequence {
        self.next += 1;
        Sequence(self.next - 1)
    }

    fn flush_content(&mut self) {
        if self.extents.is_empty() {
            return;
        }
        let (extents, draft) = (std::mem::take(&mut self.extents), std::mem::take(&mut self.draft));
        let sequence = self.sequence();
        let frame = self.sealer.content_of(&mut self.packer, self.slot, sequence, extents, draft);
        self.frames.push(frame.to_vec());
    }

    fn flush_bare(&mut self, encoding: Encoding) {
        let extents = std::mem::take(self.bare(encoding));
        if !extents.is_empty() {
            let sequence = self.sequence();
            self.frames.push(self.sealer.bare(encoding, self.slot, sequence, extents));
        }
    }

    /// Seals what is left.
    pub(crate) fn flush(&mut self) {
        self.flush_content();
        for encoding in [Encoding::Hole, Encoding::Unreadable, Encoding::Lost] {
            self.flush_bare(encoding);
        }
    }

    /// Gives the frames that are ready.
    pub(crate) fn drain(&mut self) -> std::vec::Drain<'_, Vec<u8>> {
        self.frames.drain(..)
    }

    /// Whether there was nothing but zeros so far.
    pub(crate) const fn is_zero(&self) -> bool {
        !self.not_zero
    }

    /// Blocks that were lost so far.
    pub(crate) const fn lost_blocks(&self) -> u64 {
        self.lost_blocks
    }
}

/// An extent in parts that are written before the next is sealed: a first copy is one extent, however large the volume.
pub(crate) fn parts(extent: Extent) -> impl Iterator<Item = Extent> {
    let starts = (u64::from(extent.start.0)..extent.end()).step_by(PART_BLOCKS as usize);
    starts.map(move |start| {
        let count = (extent.end() - start).min(u64::from(PART_BLOCKS)) as u32;
        Extent { start: Block(start as u32), count }
    })
}

/// Adds a run of blocks behind the others, joined with the last where they touch and may be one.
fn add(extents: &mut Vec<Extent>, run: Extent) {
    let run_max = cdp_protocol::limits::HOLE_BLOCKS_MAX;
    if let Some(last) = extents.last_mut()
        && last.end() == u64::from(run.start.0)
        && u64::from(last.count) + u64::from(run.count) <= u64::from(run_max)
    {
        last.count += run.count;
        return;
    }
    // A hole may be longer than a frame's extent can be.
    let mut start = run.start.0;
    let mut left = run.count;
    while left > 0 {
        let count = left.min(run_max);
        extents.extend(Extent::new(Block(start), count));
        start = start.saturating_add(count);
        left -= count;
    }
}
