//! What became of one volume since the point before: the part of a commit that older commits do not have.
//!
//! Owns its bytes: nothing at all where no volume is counted, so that a commit of before is encoded as it was. The figures are the
//! source's word; nothing is decided by them.

use super::{Input, RecordError};
use crate::limits::VOLUMES_MAX;
use crate::units::VolumeSlot;

/// What became of a volume. Of blocks that were found dirty, `unchanged`, `content`, `hole` and `unreadable` are the four kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VolumeMeters {
    /// Bytes that were issued to the volume's disk to be written, discarded or zeroed: by everybody, to all of the disk. `None` where
    /// nobody counts them.
    pub written_bytes: Option<u64>,
    /// Blocks found dirty, each as often as it was.
    pub dirty_blocks: u64,
    /// Those of them that the target held already, and that were not sent.
    pub unchanged_blocks: u64,
    /// Those that were sent with content.
    pub content_blocks: u64,
    /// Those that were sent as holes.
    pub hole_blocks: u64,
    /// Those that the device could not read.
    pub unreadable_blocks: u64,
    /// Blocks found dirty by a cut that the cut before it had found dirty too.
    pub rewritten_blocks: u64,
    /// Blocks with content in frames that packing did not make shorter.
    pub incompressible_blocks: u64,
    /// Bytes of the frames, those of parts among them: as they are sent, and stored.
    pub frame_bytes: u64,
}

impl VolumeMeters {
    /// Adds what `more` counts. Where that does not count what was written, nothing is added to it.
    pub const fn add(&mut self, more: &Self) {
        self.written_bytes = match (self.written_bytes, more.written_bytes) {
            (Some(before), Some(more)) => Some(before.saturating_add(more)),
            (Some(one), None) | (None, Some(one)) => Some(one),
            (None, None) => None,
        };
        self.dirty_blocks = self.dirty_blocks.saturating_add(more.dirty_blocks);
        self.unchanged_blocks = self.unchanged_blocks.saturating_add(more.unchanged_blocks);
        self.content_blocks = self.content_blocks.saturating_add(more.content_blocks);
        self.hole_blocks = self.hole_blocks.saturating_add(more.hole_blocks);
        self.unreadable_blocks = self.unreadable_blocks.saturating_add(more.unreadable_blocks);
        self.rewritten_blocks = self.rewritten_blocks.saturating_add(more.rewritten_blocks);
        self.incompressible_blocks = self.incompressible_blocks.saturating_add(more.incompressible_blocks);
        self.frame_bytes = self.frame_bytes.saturating_add(more.frame_bytes);
    }
}

/// Appends the volumes, which come by rising slot; that there are none is told where something follows.
pub(super) fn put(out: &mut Vec<u8>, volumes: &[(VolumeSlot, VolumeMeters)], is_followed: bool) {
    if volumes.is_empty() && !is_followed {
        return;
    }
    assert!(volumes.len() <= VOLUMES_MAX, "a group has no more volumes");
    out.extend_from_slice(&(volumes.len() as u16).to_le_bytes());
    for (slot, meters) in volumes {
        out.extend_from_slice(&slot.0.to_le_bytes());
        out.push(u8::from(meters.written_bytes.is_some()));
        for number in [
            meters.written_bytes.unwrap_or_default(),
            meters.dirty_blocks,
            meters.unchanged_blocks,
            meters.content_blocks,
            meters.hole_blocks,
            meters.unreadable_blocks,
            meters.rewritten_blocks,
            meters.incompressible_blocks,
            meters.frame_bytes,
        ] {
            out.extend_from_slice(&number.to_le_bytes());
        }
    }
}

/// Takes the volumes; none where the record ends here, as it did in the commits of before.
pub(super) fn take(input: &mut Input<'_>) -> Result<Vec<(VolumeSlot, VolumeMeters)>, RecordError> {
    if input.is_at_end() {
        return Ok(Vec::new());
    }
    let count = usize::from(input.u16()?);
    if count > VOLUMES_MAX || count == 0 && input.is_at_end() {
        return Err(RecordError::Field("volume meters' count"));
    }
    let mut volumes: Vec<(VolumeSlot, VolumeMeters)> = Vec::with_capacity(count);
    for _ in 0..count {
        let slot = VolumeSlot(input.u16()?);
        if volumes.last().is_some_and(|(last, _)| *last >= slot) {
            return Err(RecordError::Field("volume meters' slot order"));
        }
        volumes.push((slot, take_meters(input)?));
    }
    Ok(volumes)
}

fn take_meters(input: &mut Input<'_>) -> Result<VolumeMeters, RecordError> {
    let (is_counted, written) = (input.flag()?, input.u64()?);
    if !is_counted && written != 0 {
        return Err(RecordError::Field("written bytes"));
    }
    Ok(VolumeMeters {
        written_bytes: is_counted.then_some(written),
        dirty_blocks: input.u64()?,
        unchanged_blocks: input.u64()?,
        content_blocks: input.u64()?,
        hole_blocks: input.u64()?,
        unreadable_blocks: input.u64()?,
        rewritten_blocks: input.u64()?,
        incompressible_blocks: input.u64()?,
        frame_bytes: input.u64()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meters(number: u64, written_bytes: Option<u64>) -> VolumeMeters {
        VolumeMeters {
            written_bytes,
            dirty_blocks: number + 2,
            unchanged_blocks: number + 3,
            content_blocks: number + 4,
            hole_blocks: number + 5,
            unreadable_blocks: number + 6,
            rewritten_blocks: number + 7,
            incompressible_blocks: number + 8,
            frame_bytes: number + 9,
        }
    }

    fn taken(bytes: &[u8]) -> Result<Vec<(VolumeSlot, VolumeMeters)>, RecordError> {
        let mut input = Input { bytes, at: 0 };
        let volumes = take(&mut input)?;
        input.finish().map(|_| volumes)
    }

    #[test]
    fn volumes_decode_to_what_was_encoded_and_no_other_length_is_taken() {
        let volumes = [(VolumeSlot(2), meters(0x0102, Some(1))), (VolumeSlot(7), meters(u64::MAX - 9, None))].to_vec();
        let mut bytes = Vec::new();
        put(&mut bytes, &volumes, false);
        assert_eq!(bytes.len(), 2 + 2 * 75, "as docs/format/records.md says");
        assert_eq!(bytes[..15], [2, 0, 2, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 4, 1]);
        assert_eq!(taken(&bytes), Ok(volumes));
        for len in 1..bytes.len() {
            assert!(taken(&bytes[..len]).is_err(), "cut to {len}");
        }
        bytes.push(0);
        assert_eq!(taken(&bytes), Err(RecordError::Length));
    }

    #[test]
    fn a_commit_of_before_has_none_and_gets_none() {
        let mut bytes = Vec::new();
        put(&mut bytes, &[], false);
        assert_eq!((bytes.as_slice(), taken(&[])), (&[][..], Ok(Vec::new())));
        put(&mut bytes, &[], true);
        assert_eq!(bytes, [0, 0], "something follows");
        assert_eq!(taken(&bytes), Err(RecordError::Field("volume meters' count")), "nothing does");
    }

    #[test]
    fn what_no_program_of_ours_writes_is_refused() {
        let mut one = Vec::new();
        put(&mut one, &[(VolumeSlot(2), meters(0, None))], false);
        let with = |at: usize, byte: u8| {
            let mut bytes = one.clone();
            bytes[at] = byte;
            taken(&bytes)
        };
        assert_eq!(with(0, 0), Err(RecordError::Length), "what follows is none of it");
        assert_eq!(with(0, 65), Err(RecordError::Field("volume meters' count")));
        assert_eq!(with(4, 2), Err(RecordError::Field("flag")));
        assert_eq!(with(5, 1), Err(RecordError::Field("written bytes")), "it is not counted");
        let twice = [&[2, 0][..], &one[2..], &one[2..]].concat();
        assert_eq!(taken(&twice), Err(RecordError::Field("volume meters' slot order")));
    }

    #[test]
    fn sums_do_not_overflow_and_keep_what_was_counted() {
        let mut sum = meters(1, None);
        sum.add(&meters(u64::MAX - 9, Some(5)));
        assert_eq!((sum.written_bytes, sum.dirty_blocks, sum.frame_bytes), (Some(5), u64::MAX - 4, u64::MAX));
        sum.add(&VolumeMeters::default());
        assert_eq!((sum.written_bytes, sum.dirty_blocks), (Some(5), u64::MAX - 4));
    }
}
