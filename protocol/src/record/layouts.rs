//! How disks are laid out, in the commit of the first point at which they are so: the part of a commit that most do not have.
//!
//! Owns its bytes: nothing at all where no layout is told. Describes and decides nothing.

use super::{Input, RecordError};
use crate::layout::{LAYOUT_BYTES_MAX, Layout};
use crate::limits::VOLUMES_MAX;
use crate::units::VolumeSlot;

/// Bytes of all layouts of a commit: what is more waits for another.
pub const LAYOUTS_BYTES_MAX: usize = 32 * 1024;

/// The layouts of a commit, by rising slot.
pub type Layouts = Vec<(VolumeSlot, Layout)>;

/// As many of the layouts as a commit has room for, the first ones; gives the others back.
#[must_use]
pub fn fitting(layouts: Layouts) -> (Layouts, Layouts) {
    let mut left = LAYOUTS_BYTES_MAX;
    layouts.into_iter().take(VOLUMES_MAX).partition(|(_, layout)| {
        let room = left.checked_sub(layout.encode().len());
        left = room.unwrap_or(left);
        room.is_some()
    })
}

/// Appends the layouts, which come by rising slot and fit.
pub(super) fn put(out: &mut Vec<u8>, layouts: &[(VolumeSlot, Layout)]) {
    if layouts.is_empty() {
        return;
    }
    assert!(layouts.len() <= VOLUMES_MAX, "a group has no more volumes");
    out.extend_from_slice(&(layouts.len() as u16).to_le_bytes());
    for (slot, layout) in layouts {
        let bytes = layout.encode();
        out.extend_from_slice(&slot.0.to_le_bytes());
        out.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
        out.extend_from_slice(&bytes);
    }
}

/// Takes the layouts; none where the record ends here.
pub(super) fn take(input: &mut Input<'_>) -> Result<Layouts, RecordError> {
    if input.is_at_end() {
        return Ok(Vec::new());
    }
    let count = usize::from(input.u16()?);
    if !(1..=VOLUMES_MAX).contains(&count) {
        return Err(RecordError::Field("layouts' count"));
    }
    let (mut layouts, mut left): (Layouts, usize) = (Vec::new(), LAYOUTS_BYTES_MAX);
    for _ in 0..count {
        let slot = VolumeSlot(input.u16()?);
        if layouts.last().is_some_and(|(last, _)| *last >= slot) {
            return Err(RecordError::Field("layouts' slot order"));
        }
        let len = usize::from(input.u16()?);
        let room = left.checked_sub(len).filter(|_| len <= LAYOUT_BYTES_MAX);
        left = room.ok_or(RecordError::Field("layouts' length"))?;
        layouts.push((slot, Layout::decode(input.take(len)?).ok_or(RecordError::Field("layout"))?));
    }
    Ok(layouts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Content, Partition, Table};

    fn layout(partitions: u32) -> Layout {
        let partition = |number| Partition {
            number,
            start_bytes: 1 << 20,
            size_bytes: 1 << 20,
            kind: [7; 16],
            id: [8; 16],
            is_active: false,
            content: Content::Ext,
            name: "n".repeat(108),
        };
        let partitions = (1..=partitions).map(partition).collect();
        Layout { sector_bytes: 512, size_bytes: 4 << 20, table: Table::Gpt([1; 16]), has_boot_code: false, partitions }
    }

    fn taken(bytes: &[u8]) -> Result<Layouts, RecordError> {
        let mut input = Input { bytes, at: 0 };
        let layouts = take(&mut input)?;
        input.finish().map(|_| layouts)
    }

    #[test]
    fn layouts_decode_to_what_was_encoded_and_no_other_length_is_taken() {
        let layouts = vec![(VolumeSlot(2), layout(1)), (VolumeSlot(7), layout(0))];
        let mut bytes = Vec::new();
        put(&mut bytes, &layouts);
        assert_eq!(bytes[..7], [2, 0, 2, 0, 33 + 55 + 108, 0, 1]);
        assert_eq!(taken(&bytes), Ok(layouts));
        for len in 1..bytes.len() {
            assert!(taken(&bytes[..len]).is_err(), "cut to {len}");
        }
        assert_eq!(taken(&[]), Ok(Vec::new()));
        bytes.push(0);
        assert_eq!(taken(&bytes), Err(RecordError::Length));
    }

    #[test]
    fn what_no_program_of_ours_writes_is_refused() {
        let mut one = Vec::new();
        put(&mut one, &[(VolumeSlot(2), layout(0))]);
        let with = |at: usize, byte: u8| {
            let mut bytes = one.clone();
            bytes[at] = byte;
            taken(&bytes)
        };
        assert_eq!(with(0, 0), Err(RecordError::Field("layouts' count")));
        assert_eq!(with(0, 65), Err(RecordError::Field("layouts' count")));
        assert_eq!(with(5, 0xff), Err(RecordError::Field("layouts' length")));
        assert_eq!(with(6, 9), Err(RecordError::Field("layout")));
        let twice = [&[2, 0][..], &one[2..], &one[2..]].concat();
        assert_eq!(taken(&twice), Err(RecordError::Field("layouts' slot order")));
    }

    #[test]
    fn what_does_not_fit_waits() {
        let many: Layouts = (0..4).map(|slot| (VolumeSlot(slot), layout(if slot == 1 { 1 } else { 128 }))).collect();
        let (told, left) = fitting(many);
        let slots = |layouts: &Layouts| layouts.iter().map(|(slot, _)| slot.0).collect::<Vec<u16>>();
        assert_eq!((slots(&told), slots(&left)), (vec![0, 1], vec![2, 3]));
        let mut bytes = Vec::new();
        put(&mut bytes, &told);
        assert_eq!(taken(&bytes), Ok(told));
    }
}
