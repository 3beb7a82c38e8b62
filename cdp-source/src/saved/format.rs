//! The bytes of a saved change record (`docs/format/saved.md`).
//!
//! A hash over everything stands at the end, so that no damage goes unnoticed: a dirty block that reads as clean would be lost.

use super::{Found, Saved, SavedVolume};
use cdp_protocol::limits::VOLUMES_MAX;
use cdp_protocol::seal::DIGEST_BYTES;
use cdp_protocol::session::memo::MEMO_BYTES_MAX;
use cdp_protocol::units::{Block, GroupId, Timestamp, VOLUME_BYTES_MAX, VolumeSlot, blocks_in};
use roaring::RoaringBitmap;

const MAGIC: [u8; 4] = *b"CDPR";
const VERSION: u8 = 1;
const HASH_BYTES: usize = 32;
/// Bytes of a text in it: a name, a reason, what a volume is.
pub(super) const TEXT_BYTES_MAX: usize = 1024;
/// Samples of a volume.
pub(super) const SAMPLES_MAX: usize = 1024;
const SAMPLE_BYTES: usize = 4 + DIGEST_BYTES;

pub(super) fn encode(saved: &Saved) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&[VERSION, 0]);
    out.extend_from_slice(&(saved.volumes.len() as u16).to_le_bytes());
    out.extend_from_slice(&saved.group.0);
    out.extend_from_slice(&saved.saved_at.0.to_le_bytes());
    put_text(&mut out, &saved.tracker);
    put_text(&mut out, &saved.boot);
    put_bytes(&mut out, &saved.memo);
    for SavedVolume { slot, found } in &saved.volumes {
        out.extend_from_slice(&slot.0.to_le_bytes());
        match found {
            Ok(found) => {
                out.push(1);
                put_found(&mut out, found);
            }
            Err(reason) => {
                out.push(0);
                put_text(&mut out, reason);
            }
        }
    }
    let hash = blake3::hash(&out);
    out.extend_from_slice(hash.as_bytes());
    out
}

fn put_found(out: &mut Vec<u8>, found: &Found) {
    out.extend_from_slice(&found.size_bytes.to_le_bytes());
    put_text(out, &found.nature);
    out.extend_from_slice(&(found.dirty.serialized_size() as u64).to_le_bytes());
    found.dirty.serialize_into(&mut *out).expect("memory takes what is written to it");
    assert!(found.samples.len() <= SAMPLES_MAX, "as many are chosen as are read back");
    out.extend_from_slice(&(found.samples.len() as u16).to_le_bytes());
    for (block, digest) in &found.samples {
        out.extend_from_slice(&block.0.to_le_bytes());
        out.extend_from_slice(digest);
    }
}

/// A text is cut off where it is longer than a text may be: all of them are for people, or compared with what is cut off alike.
fn put_text(out: &mut Vec<u8>, text: &str) {
    put_bytes(out, shortened(text, TEXT_BYTES_MAX).as_bytes());
}

/// As much of a text as fits into so many bytes.
pub(super) fn shortened(text: &str, bytes_max: usize) -> &str {
    let fits = |end: &usize| *end <= bytes_max && text.is_char_boundary(*end);
    &text[..(0..=text.len().min(bytes_max)).rev().find(fits).unwrap_or(0)]
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
    out.extend_from_slice(bytes);
}

pub(super) fn decode(bytes: &[u8]) -> Option<Saved> {
    let (hashed, hash) = bytes.split_at(bytes.len().checked_sub(HASH_BYTES)?);
    if blake3::hash(hashed).as_bytes() != hash {
        return None;
    }
    let mut input = hashed;
    let [magic @ .., version, zero] = take::<6>(&mut input)?;
    if magic != MAGIC || version != VERSION || zero != 0 {
        return None;
    }
    let volumes = usize::from(u16::from_le_bytes(take(&mut input)?));
    if volumes > VOLUMES_MAX {
        return None;
    }
    let group = GroupId(take(&mut input)?);
    let saved_at = Timestamp(i64::from_le_bytes(take(&mut input)?));
    let (tracker, boot) = (take_text(&mut input)?, take_text(&mut input)?);
    let memo = take_bytes(&mut input, MEMO_BYTES_MAX)?.to_vec();
    let mut saved = Saved { group, tracker, boot, saved_at, memo, volumes: Vec::with_capacity(volumes) };
    for _ in 0..volumes {
        saved.volumes.push(take_volume(&mut input)?);
    }
    input.is_empty().then_some(saved)
}

fn take_volume(input: &mut &[u8]) -> Option<SavedVolume> {
    let slot = VolumeSlot(u16::from_le_bytes(take(input)?));
    let found = match take::<1>(input)? {
        [0] => Err(take_text(input)?),
        [1] => Ok(take_found(input)?),
        _ => return None,
    };
    Some(SavedVolume { slot, found })
}

fn take_found(input: &mut &[u8]) -> Option<Found> {
    let size_bytes = u64::from_le_bytes(take(input)?);
    if size_bytes > VOLUME_BYTES_MAX {
        return None;
    }
    let is_within = |block: u32| u64::from(block) < blocks_in(size_bytes);
    let nature = take_text(input)?;
    let len = usize::try_from(u64::from_le_bytes(take(input)?)).ok()?;
    let mut bitmap = take_slice(input, len)?;
    let dirty = RoaringBitmap::deserialize_from(&mut bitmap).ok()?;
    if dirty.max().is_some_and(|last| !is_within(last)) || !bitmap.is_empty() {
        return None;
    }
    let count = usize::from(u16::from_le_bytes(take(input)?));
    if count > SAMPLES_MAX {
        return None;
    }
    let sample = |bytes: &[u8; SAMPLE_BYTES]| {
        let (block, digest) = bytes.split_first_chunk::<4>()?;
        Some((Block(u32::from_le_bytes(*block)), *digest.first_chunk()?))
    };
    let samples: Vec<_> =
        take_slice(input, count * SAMPLE_BYTES)?.as_chunks().0.iter().map(sample).collect::<Option<_>>()?;
    let is_in_order = samples.is_sorted_by(|(before, _), (after, _)| before < after);
    let are_within = samples.last().is_none_or(|(last, _)| is_within(last.0));
    (is_in_order && are_within).then_some(Found { size_bytes, nature, dirty, samples })
}

fn take_text(input: &mut &[u8]) -> Option<String> {
    String::from_utf8(take_bytes(input, TEXT_BYTES_MAX)?.to_vec()).ok()
}

fn take_bytes<'a>(input: &mut &'a [u8], bytes_max: usize) -> Option<&'a [u8]> {
    let len = usize::from(u16::from_le_bytes(take(input)?));
    take_slice(input, len).filter(|_| len <= bytes_max)
}

fn take_slice<'a>(input: &mut &'a [u8], len: usize) -> Option<&'a [u8]> {
    let (bytes, rest) = input.split_at_checked(len)?;
    *input = rest;
    Some(bytes)
}

fn take<const N: usize>(input: &mut &[u8]) -> Option<[u8; N]> {
    let (bytes, rest) = input.split_first_chunk::<N>()?;
    *input = rest;
    Some(*bytes)
}
