//! One damaged frame: what of it is still needed, what has come again since, and whether that is what was lost.
//!
//! A frame's digests are sealed apart from its content. Where header and digests are intact, a block of a later epoch that has
//! the digest of a lost one is that block: keyed BLAKE3 of 16 bytes. Invariant: nothing is put in a damaged frame's place
//! that its own seals do not prove, block by block. Where only some blocks are proved, nothing is written.

use crate::journal::index::{Entry, EntryKind, Run};
use crate::journal::repairs::FramePlace;
use crate::journal::{Damage, GroupView, JournalError};
use crate::restore::keyring::Keyring;
use crate::restore::point::{LoadError, read_frame};
use cdp_protocol::codec::{Sealer, open_content, open_digests};
use cdp_protocol::frame::{self, FRAME_BYTES_MAX, Frame};
use cdp_protocol::seal::{DataKey, Digest};
use cdp_protocol::units::{AttemptId, BLOCK_BYTES, Block, Extent, VolumeSlot};
use cdp_seams::random::{self, Random};
use roaring::RoaringBitmap;
use std::collections::{BTreeMap, HashSet};

/// What became of a try to heal a damage.
#[derive(Debug)]
pub enum Outcome {
    /// A repair stands in its place.
    Healed {
        /// Blocks in it.
        blocks: u64,
    },
    /// These blocks of it have not come again: they are to be asked for.
    Waiting {
        /// The volume.
        volume: VolumeSlot,
        /// The blocks.
        blocks: RoaringBitmap,
    },
    /// It cannot be healed by anything that may still come, and why.
    Lost(String),
}

/// A damaged frame of content, by the index.
struct Lost {
    run: Run,
    slot: VolumeSlot,
    kind: EntryKind,
    /// Blocks that some point reads from it.
    needed: RoaringBitmap,
    /// Those of them that no later epoch has.
    waiting: RoaringBitmap,
    /// Extents of later epochs over the others, by segment, in the order they were written.
    since: Vec<(u64, Entry)>,
}

/// Tries to heal a damage with what is durable.
///
/// # Errors
/// Where the storage fails: it is to be tried again.
pub fn heal(view: &GroupView, damage: &Damage, keys: &Keyring, random: &dyn Random) -> Result<Outcome, JournalError> {
    let Some(lost) = survey(view, damage)? else {
        return Ok(Outcome::Lost("it is no content of a point, or nothing tells of which blocks".to_owned()));
    };
    if lost.needed.is_empty() {
        return Ok(Outcome::Lost("no point reads a block of it".to_owned()));
    }
    let mut bytes = vec![0; FRAME_BYTES_MAX];
    let path = || format!("segment {}", damage.segment);
    let read = view.file(view.file_id(damage.segment))?.read_at(&mut bytes, damage.offset);
    bytes.truncate(read.map_err(JournalError::io("read", path().as_ref()))?);
    let frame = frame::decode_damaged(&view.identity().group, &bytes).ok().filter(|frame| lost.is(frame));
    let place = FramePlace { segment: damage.segment, offset: damage.offset, attempt: lost.run.attempt };
    if let Some(frame) = &frame
        && let Some((key, content)) = lost.own_content(frame, keys)
    {
        let extents = frame.header.extents.clone();
        return put(view, (&place, &lost.run), frame, &Proved { key, extents, content }, keys, random);
    }
    if !lost.waiting.is_empty() {
        return Ok(Outcome::Waiting { volume: lost.slot, blocks: lost.waiting });
    }
    if lost.kind != EntryKind::Content {
        return Ok(Outcome::Lost("it has no content, and so no digests that would prove any".to_owned()));
    }
    let Some(frame) = frame else {
        return Ok(Outcome::Lost("its header is damaged, and so nothing tells its digests".to_owned()));
    };
    let attempt = frame.header.attempt;
    let digests = keys.find(|key| Some((key.clone(), open_digests(&frame, &key.attempt_key(&attempt)).ok()?)));
    let Some((key, digests)) = digests else {
        return Ok(Outcome::Lost("its digests are damaged too".to_owned()));
    };
    let wanted = wanted(&frame, &lost.needed, digests);
    if wanted.len() as u64 != lost.needed.len() {
        return Ok(Outcome::Lost("the index does not fit the frame".to_owned()));
    }
    let found = lost.search(view, &key, &wanted, keys)?;
    if found.len() < wanted.len() {
        let (found, wanted) = (found.len(), wanted.len());
        return Ok(Outcome::Lost(format!("{found} of {wanted} blocks came as they were: the others had been changed")));
    }
    let extents = to_extents(&lost.needed);
    let content: Vec<u8> = found.into_values().flatten().collect();
    put(view, (&place, &lost.run), &frame, &Proved { key, extents, content }, keys, random)
}

/// Blocks that were proved, and the key of the frame they were lost from.
struct Proved {
    key: DataKey,
    extents: Vec<Extent>,
    content: Vec<u8>,
}

/// Seals what was proved under a fresh attempt, writes it, and reads it again.
fn put(
    view: &GroupView,
    (place, run): (&FramePlace, &Run),
    frame: &Frame<'_>,
    proved: &Proved,
    keys: &Keyring,
    random: &dyn Random,
) -> Result<Outcome, JournalError> {
    let header = &frame.header;
    let attempt = AttemptId(random::array(random));
    let sealer = Sealer::new(view.identity().group, header.epoch, header.generation, attempt, &proved.key).resealing();
    let bytes = sealer.content(header.volume, header.sequence, proved.extents.clone(), &proved.content);
    view.write_repair(place, &bytes)?;
    let blocks = proved.extents.iter().map(|extent| u64::from(extent.count)).sum();
    let reread = view.repair(place.segment, place.offset, run);
    let is_whole = reread.is_some_and(|repair| keys.open(&repair.frame()).is_ok_and(|read| read == proved.content));
    let broken = || JournalError::Damaged("the repair is not what was written".to_owned());
    is_whole.then_some(Outcome::Healed { blocks }).ok_or_else(broken)
}

fn survey(view: &GroupView, damage: &Damage) -> Result<Option<Lost>, JournalError> {
    let Some((entries, run)) = view.damaged_frame(damage)? else { return Ok(None) };
    let Some(first) = entries.first() else { return Ok(None) };
    let mut needed = RoaringBitmap::new();
    for entry in &entries {
        needed.insert_range(blocks(entry.extent));
    }
    let mut lost = Lost { run, slot: first.slot, kind: first.kind, waiting: needed.clone(), needed, since: Vec::new() };
    // What came again and was damaged in its turn has not come.
    let unhealed = view.damages().iter().filter(|damage| !view.is_healed(damage));
    let damaged: HashSet<(u64, u64)> = unhealed.map(|damage| (damage.segment, damage.offset)).collect();
    for segment in view.segments_from(damage.segment) {
        // Where a later segment cannot be read, nothing is known to have come again.
        let Ok(entries) = view.included(segment) else { continue };
        let later = entries.into_iter().filter(|(_, entry)| {
            entry.slot == lost.slot
                && (segment > damage.segment || entry.frame_offset > damage.offset)
                && !damaged.contains(&(segment, entry.frame_offset))
        });
        for (epoch, entry) in later.collect::<Vec<_>>() {
            lost.waiting.remove_range(blocks(entry.extent));
            if epoch <= run.epoch {
                lost.needed.remove_range(blocks(entry.extent));
            } else if lost.needed.range_cardinality(blocks(entry.extent)) > 0 {
                lost.since.push((segment, entry));
            }
        }
    }
    Ok(Some(lost))
}

impl Lost {
    /// Whether the frame whose header stands there is the one of the index.
    fn is(&self, frame: &Frame<'_>) -> bool {
        let header = &frame.header;
        (header.epoch, header.generation, header.attempt) == (self.run.epoch, self.run.generation, self.run.attempt)
            && header.volume == self.slot
    }

    /// Its content, where that is intact and only what stands behind it is not: its own seal says so.
    fn own_content(&self, frame: &Frame<'_>, keys: &Keyring) -> Option<(DataKey, Vec<u8>)> {
        let attempt = frame.header.attempt;
        let open = |key: &DataKey| Some((key.clone(), open_content(frame, &key.attempt_key(&attempt)).ok()?));
        if self.kind == EntryKind::Content { keys.find(open) } else { None }
    }

    /// Blocks of later epochs that have a wanted digest.
    fn search(
        &self,
        view: &GroupView,
        key: &DataKey,
        wanted: &BTreeMap<u32, Digest>,
        keys: &Keyring,
    ) -> Result<BTreeMap<u32, Vec<u8>>, JournalError> {
        let digest_key = key.digest_key();
        let (mut found, mut failed) = (BTreeMap::new(), None);
        for (segment, entry) in self.since.iter().filter(|(_, entry)| entry.kind == EntryKind::Content) {
            let is_open = |block: &Block| wanted.contains_key(&block.0) && !found.contains_key(&block.0);
            if !entry.extent.blocks().any(|block| is_open(&block)) {
                continue;
            }
            let run = view.run_of(*segment, entry)?;
            let opened = match read_frame(view, keys, view.file_id(*segment), entry, &run) {
                Ok(opened) => opened,
                Err(LoadError::Damaged(what)) => {
                    failed = Some(format!("segment {segment} at offset {}: {what}", entry.frame_offset));
                    continue;
                }
                Err(LoadError::Journal(error)) => return Err(error),
            };
            let Some(content) = opened.blocks(entry.extent) else { continue };
            for (block, bytes) in entry.extent.blocks().zip(content.chunks_exact(BLOCK_BYTES)) {
                if wanted.get(&block.0).is_some_and(|digest| digest_key.digests(bytes).first() == Some(digest)) {
                    found.entry(block.0).or_insert_with(|| bytes.to_vec());
                }
            }
        }
        // What cannot be read is not known to be something else: once that is found to be damaged, it is asked for again.
        failed.filter(|_| found.len() < wanted.len()).map_or(Ok(found), |what| Err(JournalError::Damaged(what)))
    }
}

/// The digests of the needed blocks of a frame.
fn wanted(frame: &Frame<'_>, needed: &RoaringBitmap, digests: Vec<Digest>) -> BTreeMap<u32, Digest> {
    let all = frame.header.extents.iter().flat_map(|extent| extent.blocks()).map(|block| block.0);
    all.zip(digests).filter(|(block, _)| needed.contains(*block)).collect()
}

fn blocks(extent: Extent) -> std::ops::RangeInclusive<u32> {
    extent.start.0..=(extent.end() - 1) as u32
}

/// A set of blocks as extents, in ascending order.
pub(super) fn to_extents(blocks: &RoaringBitmap) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for block in blocks {
        match extents.last_mut() {
            Some(last) if last.end() == u64::from(block) => last.count += 1,
            _ => extents.push(Extent { start: Block(block), count: 1 }),
        }
    }
    extents
}
