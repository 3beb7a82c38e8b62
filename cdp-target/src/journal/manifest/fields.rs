//! The bytes of what a manifest is made of: one `put` and one `take` for each.
//!
//! What is taken is checked by itself; how the parts go together is the manifest's to know.

use super::{Checkpoint, Damage, PointRange, SealedSegment};
use crate::journal::bytes::{FieldError, Input, put_long};
use crate::journal::file::SliceId;
use cdp_protocol::escrow::Envelope;
use cdp_protocol::session::lineage::{Line, Place};
use cdp_protocol::session::target::Claim;
use cdp_protocol::units::{Epoch, FrameHash, Generation, Head, KeyId, Timestamp, VolumeSlot};

pub(super) fn put_epoch(out: &mut Vec<u8>, epoch: Option<Epoch>) {
    out.push(u8::from(epoch.is_some()));
    out.extend_from_slice(&epoch.unwrap_or_default().0.to_le_bytes());
}

pub(super) fn take_epoch(input: &mut Input<'_>) -> Result<Option<Epoch>, FieldError> {
    let (there, epoch) = (input.flag()?, Epoch(input.u64()?));
    absent(there, epoch.0 == 0)?;
    Ok(there.then_some(epoch))
}

pub(super) fn put_checkpoint(out: &mut Vec<u8>, checkpoint: &Checkpoint) {
    out.extend_from_slice(&checkpoint.epoch.0.to_le_bytes());
    out.extend_from_slice(&checkpoint.made.0.to_le_bytes());
    out.extend_from_slice(&checkpoint.index_len.to_le_bytes());
    out.extend_from_slice(&checkpoint.index_hash);
    out.extend_from_slice(&checkpoint.held_bytes.to_le_bytes());
    out.extend_from_slice(&checkpoint.needed_bytes.to_le_bytes());
    out.extend_from_slice(&checkpoint.lost_blocks.to_le_bytes());
}

pub(super) fn take_checkpoint(input: &mut Input<'_>) -> Result<Checkpoint, FieldError> {
    let (epoch, made) = (Epoch(input.u64()?), Timestamp(input.i64()?));
    let (index_len, index_hash) = (input.u64()?, input.array()?);
    let (held_bytes, needed_bytes, lost_blocks) = (input.u64()?, input.u64()?, input.u64()?);
    Ok(Checkpoint { epoch, made, index_len, index_hash, held_bytes, needed_bytes, lost_blocks })
}

pub(super) fn put_count(out: &mut Vec<u8>, count: usize) {
    out.extend_from_slice(&(count as u32).to_le_bytes());
}

pub(super) fn put_envelope(out: &mut Vec<u8>, envelope: &Envelope) {
    out.extend_from_slice(&envelope.key.0);
    put_long(out, &envelope.encapsulated);
    put_long(out, &envelope.sealed);
}

pub(super) fn take_envelope(input: &mut Input<'_>) -> Result<Envelope, FieldError> {
    let key = KeyId(input.array()?);
    Ok(Envelope { key, encapsulated: input.long()?.to_vec(), sealed: input.long()?.to_vec() })
}

pub(super) fn put_head(out: &mut Vec<u8>, head: &Head) {
    out.extend_from_slice(&head.epoch.0.to_le_bytes());
    out.extend_from_slice(&head.hash.0);
}

pub(super) fn take_head(input: &mut Input<'_>) -> Result<Head, FieldError> {
    Ok(Head { epoch: Epoch(input.u64()?), hash: FrameHash(input.array()?) })
}

pub(super) fn put_claim(out: &mut Vec<u8>, claim: &Claim) {
    out.extend_from_slice(&claim.generation.0.to_le_bytes());
    put_head(out, &claim.head);
}

pub(super) fn take_claim(input: &mut Input<'_>) -> Result<Claim, FieldError> {
    Ok(Claim { generation: Generation(input.u64()?), head: take_head(input)? })
}

pub(super) fn put_line(out: &mut Vec<u8>, line: &Line) {
    out.extend_from_slice(&line.generation.0.to_le_bytes());
    out.push(u8::from(line.after.is_some()));
    out.extend_from_slice(&line.after.unwrap_or_default().0.to_le_bytes());
    let from = line.from.map_or((0, 0), |from| (from.generation.0, from.epoch.0));
    out.push(u8::from(line.from.is_some()));
    out.extend_from_slice(&from.0.to_le_bytes());
    out.extend_from_slice(&from.1.to_le_bytes());
}

pub(super) fn take_line(input: &mut Input<'_>) -> Result<Line, FieldError> {
    let generation = Generation(input.u64()?);
    let (has_after, after) = (input.flag()?, Epoch(input.u64()?));
    let has_from = input.flag()?;
    let from = Place { generation: Generation(input.u64()?), epoch: Epoch(input.u64()?) };
    absent(has_after, after.0 == 0)?;
    absent(has_from, (from.generation.0, from.epoch.0) == (0, 0))?;
    Ok(Line { generation, after: has_after.then_some(after), from: has_from.then_some(from) })
}

pub(super) fn put_option(out: &mut Vec<u8>, text: Option<&str>) {
    out.push(u8::from(text.is_some()));
    put_long(out, text.unwrap_or_default().as_bytes());
}

pub(super) fn take_option(input: &mut Input<'_>) -> Result<Option<String>, FieldError> {
    let there = input.flag()?;
    let text = input.text()?;
    absent(there, text.is_empty())?;
    Ok(there.then_some(text))
}

/// What is not there has nothing in its place: a manifest has one form only.
pub(super) const fn absent(there: bool, is_nothing: bool) -> Result<(), FieldError> {
    if there || is_nothing { Ok(()) } else { Err(FieldError("value of what is absent")) }
}

pub(super) fn put_sealed(out: &mut Vec<u8>, segment: &SealedSegment) {
    out.extend_from_slice(&segment.number.to_le_bytes());
    out.extend_from_slice(&segment.len.to_le_bytes());
    out.extend_from_slice(&segment.frames_end.to_le_bytes());
    out.extend_from_slice(&segment.footer_hash);
    out.push(u8::from(segment.points.is_some()));
    if let Some(points) = &segment.points {
        out.extend_from_slice(&points.first.0.to_le_bytes());
        out.extend_from_slice(&points.last.0.to_le_bytes());
        out.extend_from_slice(&points.earliest.0.to_le_bytes());
        out.extend_from_slice(&points.latest.0.to_le_bytes());
    }
    out.extend_from_slice(&segment.revision.to_le_bytes());
    out.extend_from_slice(&segment.newest_run.0.to_le_bytes());
}

pub(super) fn take_sealed(input: &mut Input<'_>, version: u16) -> Result<SealedSegment, FieldError> {
    let (number, len, frames_end) = (input.u64()?, input.u64()?, input.u64()?);
    let footer_hash = input.array()?;
    let points = if input.flag()? {
        let (first, last) = (Epoch(input.u64()?), Epoch(input.u64()?));
        Some(PointRange { first, last, earliest: Timestamp(input.i64()?), latest: Timestamp(input.i64()?) })
    } else {
        None
    };
    let (revision, newest_run) = if version > 2 { (input.u64()?, Epoch(input.u64()?)) } else { (0, Epoch(u64::MAX)) };
    Ok(SealedSegment { number, revision, len, frames_end, footer_hash, points, newest_run })
}

pub(super) fn put_damage(out: &mut Vec<u8>, damage: &Damage) {
    out.extend_from_slice(&damage.segment.to_le_bytes());
    out.extend_from_slice(&damage.offset.to_le_bytes());
    out.extend_from_slice(&damage.len.to_le_bytes());
    out.push(u8::from(damage.first_epoch.is_some()));
    out.extend_from_slice(&damage.first_epoch.unwrap_or_default().0.to_le_bytes());
    out.push(u8::from(damage.any_block));
    put_long(out, damage.what.as_bytes());
    out.push(u8::from(damage.slice.is_some()));
    if let Some(SliceId { slot, slice, epoch }) = damage.slice {
        out.extend_from_slice(&slot.0.to_le_bytes());
        out.extend_from_slice(&slice.to_le_bytes());
        out.extend_from_slice(&epoch.0.to_le_bytes());
    }
}

pub(super) fn take_damage(input: &mut Input<'_>, version: u16) -> Result<Damage, FieldError> {
    let (segment, offset, len) = (input.u64()?, input.u64()?, input.u64()?);
    let (there, epoch) = (input.flag()?, Epoch(input.u64()?));
    absent(there, epoch.0 == 0)?;
    let first_epoch = there.then_some(epoch);
    let (any_block, what) = (input.flag()?, input.text()?);
    let slice = if version > 2 && input.flag()? {
        Some(SliceId { slot: VolumeSlot(input.u16()?), slice: input.u32()?, epoch: Epoch(input.u64()?) })
    } else {
        None
    };
    Ok(Damage { segment, slice, offset, len, first_epoch, any_block, what })
}
