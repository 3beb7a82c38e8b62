//! What becomes of each volume's blocks: since the point before, for the next commit, and since the agent's start.
//!
//! Invariant: of the blocks counted as dirty each is counted once more, as unchanged, as sent with content or as a hole, or as
//! unreadable. Counts only; nothing is decided by it. What an earlier agent captured is not in it.

use crate::agent::encoding::Encoded;
use crate::capture::Capture;
use crate::encoder::FrameMeters;
use cdp_protocol::record::volume_meters::VolumeMeters;
use cdp_protocol::session::source::End;
use cdp_protocol::units::VolumeSlot;
use roaring::RoaringBitmap;

/// The meters of a group's volumes, in the group's order.
pub(super) struct Metering {
    slots: Vec<VolumeSlot>,
    /// Since the commit before, but for what its frames come to.
    counted: Vec<VolumeMeters>,
    /// Frames of parts that no commit has come behind yet.
    of_parts: Vec<FrameMeters>,
    since_start: Vec<VolumeMeters>,
    /// What the cut before found dirty.
    found_before: Vec<RoaringBitmap>,
    /// The tracker's counts of written bytes when it was asked last.
    written: Vec<Option<u64>>,
}

impl Metering {
    pub(super) fn new(slots: Vec<VolumeSlot>) -> Self {
        let none = vec![VolumeMeters::default(); slots.len()];
        Self {
            counted: none.clone(),
            of_parts: vec![FrameMeters::default(); slots.len()],
            since_start: none,
            found_before: vec![RoaringBitmap::new(); slots.len()],
            written: vec![None; slots.len()],
            slots,
        }
    }

    /// A tracker was taken up whose counts are these: what is written from here on counts.
    pub(super) fn begin(&mut self, written: Vec<Option<u64>>) {
        self.written = written;
    }

    /// The tracker's counts of written bytes are these now.
    pub(super) fn written(&mut self, written: Vec<Option<u64>>) {
        for (volume, now) in written.iter().enumerate() {
            let before = self.written[volume].unwrap_or_default();
            // Counts that began anew began from 0.
            let more = now.map(|now| now.checked_sub(before).unwrap_or(now));
            self.count(volume, &VolumeMeters { written_bytes: more, ..VolumeMeters::default() });
        }
        self.written = written;
    }

    /// A cut validated, and found these blocks dirty.
    pub(super) fn found(&mut self, found: Vec<RoaringBitmap>) {
        for (volume, found) in found.iter().enumerate() {
            let rewritten_blocks = found.intersection_len(&self.found_before[volume]);
            self.count(volume, &VolumeMeters { rewritten_blocks, ..VolumeMeters::default() });
        }
        self.found_before = found;
    }

    /// Blocks were captured: `unchanged` is what was taken out of the capture since the target has it already.
    pub(super) fn captured(&mut self, unchanged: &[RoaringBitmap], capture: &Capture) {
        for (volume, (unchanged, captured)) in unchanged.iter().zip(&capture.volumes).enumerate() {
            let (counts, unchanged_blocks) = (captured.counts(), unchanged.len());
            let more = VolumeMeters {
                dirty_blocks: unchanged_blocks + captured.blocks().len(),
                unchanged_blocks,
                content_blocks: counts.content,
                hole_blocks: counts.holes,
                unreadable_blocks: counts.unreadable,
                ..VolumeMeters::default()
            };
            self.count(volume, &more);
        }
    }

    /// What was counted since this was asked last, for the commit that is being made.
    pub(super) fn take(&mut self) -> Vec<(VolumeSlot, VolumeMeters)> {
        let none = vec![VolumeMeters::default(); self.slots.len()];
        self.slots.iter().copied().zip(std::mem::replace(&mut self.counted, none)).collect()
    }

    /// An attempt is encoded: what its frames come to is told in the commit, together with the frames of the parts before it.
    pub(super) fn encoded(&mut self, encoded: &mut Encoded) {
        for (volume, frames) in encoded.frames.iter().enumerate() {
            self.of_parts[volume].bytes += frames.bytes;
            self.of_parts[volume].incompressible_blocks += frames.incompressible_blocks;
            self.since_start[volume].add(&meters(frames));
        }
        if let End::Commit(draft) = &mut encoded.outgoing.end {
            for ((_, volume), frames) in draft.volumes.iter_mut().zip(&mut self.of_parts) {
                volume.add(&meters(&std::mem::take(frames)));
            }
        }
    }

    /// Since the agent's start, volume by volume.
    pub(super) fn since_start(&self) -> &[VolumeMeters] {
        &self.since_start
    }

    fn count(&mut self, volume: usize, more: &VolumeMeters) {
        self.counted[volume].add(more);
        self.since_start[volume].add(more);
    }
}

fn meters(frames: &FrameMeters) -> VolumeMeters {
    VolumeMeters {
        frame_bytes: frames.bytes,
        incompressible_blocks: frames.incompressible_blocks,
        ..VolumeMeters::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_protocol::units::{BLOCK_BYTES, Block};

    fn blocks(blocks: impl IntoIterator<Item = u32>) -> RoaringBitmap {
        blocks.into_iter().collect()
    }

    #[test]
    fn what_is_found_dirty_is_told_once_and_by_its_kinds() {
        let mut metering = Metering::new(vec![VolumeSlot(3), VolumeSlot(5)]);
        let mut capture = Capture::new(2);
        for block in 0..4 {
            capture.volumes[0].put(Block(block), &[7; BLOCK_BYTES]);
        }
        capture.volumes[0].put_zero(Block(4));
        capture.volumes[1].put_unreadable(Block(1));
        let unchanged = [blocks([8, 9]), blocks([])];
        metering.found(vec![blocks([0, 1, 2, 3, 4, 8, 9]), blocks([1])]);
        metering.captured(&unchanged, &capture);
        let told = metering.take();
        let expected =
            VolumeMeters { dirty_blocks: 7, unchanged_blocks: 2, content_blocks: 4, hole_blocks: 1, ..told[0].1 };
        assert_eq!(told[0], (VolumeSlot(3), expected));
        assert_eq!((told[1].1.dirty_blocks, told[1].1.unreadable_blocks), (1, 1));

        metering.found(vec![blocks([3, 9, 10]), blocks([])]);
        metering.found(vec![blocks([3, 10]), blocks([1])]);
        let told = metering.take();
        assert_eq!((told[0].1.rewritten_blocks, told[0].1.dirty_blocks), (4, 0), "3 and 9, then 3 and 10");
        assert_eq!(told[1].1.rewritten_blocks, 0, "the cut in between did not find it");
        assert_eq!((metering.since_start()[0].rewritten_blocks, metering.since_start()[0].dirty_blocks), (4, 7));
    }

    #[test]
    fn written_bytes_count_from_where_a_tracker_is_taken_up() {
        let mut metering = Metering::new(vec![VolumeSlot(0), VolumeSlot(1)]);
        metering.begin(vec![Some(1000), None]);
        metering.written(vec![Some(1512), None]);
        metering.written(vec![Some(1512), None]);
        assert_eq!(
            metering.take().iter().map(|(_, meters)| meters.written_bytes).collect::<Vec<_>>(),
            [Some(512), None]
        );
        metering.written(vec![Some(100), None]);
        assert_eq!(metering.take()[0].1.written_bytes, Some(100), "a tracking that began anew");
        assert_eq!(metering.since_start()[0].written_bytes, Some(612));
    }
}
