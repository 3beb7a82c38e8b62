//! A slice without the key: the frames that have any block of it, taken over whole, in the order in which they stand.
//!
//! What else they hold is of no use here: `needed_bytes` says how much is, and the next checkpoint made with the key packs it anew.

use super::builder::{Step, record_of};
use super::index::SliceRecord;
use crate::journal::file::{FileId, SliceId};
use crate::journal::index::CommitEntry;
use crate::journal::pack::PackWriter;
use crate::journal::pieces::PiecePlace;
use crate::journal::{GroupView, JournalError};
use cdp_protocol::frame::{self, Encoding, FRAME_BYTES_MAX, Header, Kind};
use cdp_protocol::units::{AttemptId, Epoch, Extent, Sequence};
use std::collections::BTreeMap;

/// Frames by precedence: a pack has all up to its point, so that it comes behind the journal's frames up to there. Both are met
/// where a part of a pack could not be read.
type Place = (Epoch, bool, FileId, u64);

pub(super) fn copy_frames(
    view: &GroupView,
    commit: &CommitEntry,
    id: SliceId,
    extent: Extent,
    step: &mut Step<'_>,
) -> Result<SliceRecord, JournalError> {
    let mut frames: BTreeMap<Place, (u32, u64)> = BTreeMap::new();
    let (mut zeros, mut lost) = (Vec::new(), Vec::new());
    for piece in view.resolve(commit, id.slot, extent)? {
        match piece.place {
            PiecePlace::Frame { file, entry, run } => {
                let (epoch, is_pack) = match file {
                    FileId::Segment { .. } => (run.epoch, false),
                    FileId::Slice(slice) => (slice.epoch, true),
                };
                let place = (epoch, is_pack, file, entry.frame_offset);
                frames.entry(place).or_insert((entry.frame_len, 0)).1 += u64::from(piece.extent.count);
            }
            PiecePlace::Zero => zeros.push(piece.extent),
            PiecePlace::Damaged(_) => lost.push(piece.extent),
            PiecePlace::NotCovered => {}
        }
    }
    let (storage, folder) = view.place();
    let group = view.identity().group;
    let mut writer = PackWriter::create(storage.as_ref(), folder, group, FileId::Slice(id))?;
    let mut needed_bytes = 0;
    for ((_, _, file, offset), (len, blocks)) in frames {
        let mut bytes = vec![0; (len as usize).min(FRAME_BYTES_MAX)];
        let read =
            view.file(file)?.read_at(&mut bytes, offset).map_err(JournalError::io("read", &file.path(folder)))?;
        match frame::decode(&group, &bytes[..read]) {
            Ok(frame) => {
                writer.push(frame.bytes)?;
                needed_bytes += u64::from(len) * blocks / frame.header.blocks().max(1);
            }
            Err(error) => {
                tracing::warn!(%file, offset, %error, "a frame that is damaged is taken over as lost");
                let pieces = view.resolve(commit, id.slot, extent)?.into_iter();
                lost.extend(pieces.filter_map(|piece| match piece.place {
                    PiecePlace::Frame { file: of, entry, .. } if of == file && entry.frame_offset == offset => {
                        Some(piece.extent)
                    }
                    _ => None,
                }));
            }
        }
        if !step(u64::from(len)) {
            return Err(JournalError::Interrupted);
        }
    }
    lost.sort_unstable();
    for (extents, encoding) in [(zeros, Encoding::Hole), (lost, Encoding::Lost)] {
        for (at, extents) in extents.chunks(cdp_protocol::limits::EXTENTS_MAX).enumerate() {
            let header = Header {
                kind: Kind::Extents,
                encoding,
                volume: id.slot,
                epoch: id.epoch,
                generation: commit.generation,
                attempt: AttemptId::default(),
                sequence: Sequence(at as u64),
                resealed: true,
                payload_len: 0,
                content_len: 0,
                digests_len: 0,
                extents: extents.to_vec(),
            };
            writer.push(&frame::encode(&group, &header, &[]))?;
        }
    }
    Ok(record_of(&writer.finish(false)?, false, needed_bytes))
}
