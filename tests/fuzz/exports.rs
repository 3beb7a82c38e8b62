//! The record of an export that was broken off.

use crate::{Check, Format};
use cdp_protocol::units::{Epoch, FrameHash, GroupId, VolumeSlot};
use cdp_target::restore::progress::{Form, ImageId, Line, decode, encode};

const HEADER_BYTES: usize = 96;
const LINE_BYTES: usize = 44;

/// A record, with all of its lines: one that ends early counts as refused here.
pub(crate) struct ExportRecord;

fn id(form: Form) -> ImageId {
    ImageId {
        form,
        group: GroupId([7; 16]),
        epoch: Epoch(9),
        commit: FrameHash([3; 32]),
        slot: VolumeSlot(1),
        size_bytes: 1 << 30,
    }
}

impl Format for ExportRecord {
    const CHECK: Check = Check::Crc;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let lines: Vec<Line> = (1..4).map(|at| Line { value: [at; 32], content_bytes: u64::from(at) << 20 }).collect();
        vec![
            encode(&id(Form::Raw), &lines),
            encode(&id(Form::Qcow2), &[]),
            include_bytes!("../testdata/progress/1/qcow2.record").to_vec(),
        ]
    }

    fn mend(bytes: &mut [u8]) {
        if bytes.len() < HEADER_BYTES {
            return;
        }
        let (header, lines) = bytes.split_at_mut(HEADER_BYTES);
        let sum = crc32fast::hash(&header[..HEADER_BYTES - 4]);
        header[HEADER_BYTES - 4..].copy_from_slice(&sum.to_le_bytes());
        for (at, line) in (0_u64..).zip(lines.chunks_exact_mut(LINE_BYTES)) {
            let mut hasher = crc32fast::Hasher::new_with_initial(sum);
            hasher.update(&at.to_le_bytes());
            hasher.update(&line[..LINE_BYTES - 4]);
            line[LINE_BYTES - 4..].copy_from_slice(&hasher.finalize().to_le_bytes());
        }
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let (id, lines) = decode(bytes)?;
        let again = encode(&id, &lines);
        (again.len() == bytes.len()).then_some(again)
    }
}
