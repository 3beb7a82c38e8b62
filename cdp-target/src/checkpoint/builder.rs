//! Makes a checkpoint, slice by slice.
//!
//! A slice nobody wrote to since the checkpoint before is shared with it. Any other gets a pack of its own: with the key its
//! blocks are sealed anew in LBA order under a fresh attempt, without it the frames that have any of them are taken over
//! whole. A build that was interrupted is gone on with: packs are named after what they hold, and one that has its name is
//! whole. Changes nothing but new files; that the manifest names them is the caller's to see to.

use super::index::{self, SliceContent, SliceRecord, places, slices_of};
use super::repack::{Repack, parts};
use super::whole::copy_frames;
use crate::journal::file::{FileId, SLICE_BLOCKS, Sealed, SliceId, checkpoints, packs};
use crate::journal::index::{CommitEntry, EntryKind};
use crate::journal::manifest::Checkpoint;
use crate::journal::pack::{HEADER_BYTES, Header, PackWriter, Written};
use crate::journal::segment::{FOOTER_BYTES, Footer};
use crate::journal::walk::Blind;
use crate::journal::{GroupView, JournalError, is_no_file};
use crate::restore::keyring::Keyring;
use cdp_protocol::record::Volume;
use cdp_protocol::units::{Block, Epoch, Extent, Head, Timestamp, VolumeSlot, blocks_in};
use cdp_seams::random::Random;
use cdp_seams::storage::{Storage, replace};
use roaring::RoaringBitmap;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const BUILDING_BYTES_MAX: u64 = 128;

/// Told of bytes read and written; `false` ends the work.
pub type Step<'a> = dyn FnMut(u64) -> bool + 'a;

/// Told of slices done and of how many there are.
pub type Progress<'a> = dyn FnMut(u64, u64) + 'a;

/// A checkpoint to be made.
pub struct Builder<'a> {
    /// The group.
    pub view: &'a Arc<GroupView>,
    /// Its keys, where they can be had.
    pub keys: Option<&'a Keyring>,
    /// For attempts.
    pub random: &'a dyn Random,
    /// The target's clock.
    pub now: Timestamp,
}

/// What is shared with the checkpoint before.
struct Before {
    image: Arc<index::ImageIndex>,
    /// Slices written to since, by volume; `None` where that cannot be told.
    touched: Option<BTreeMap<u16, RoaringBitmap>>,
}

/// A pack that a checkpoint has.
struct Named {
    record: SliceRecord,
    /// Whether it is the one below which there is nothing.
    is_floor: bool,
}

impl Builder<'_> {
    /// Builds the checkpoint of point `epoch`: all its files are durable when it returns.
    ///
    /// # Errors
    /// Where there is no such point, the storage fails, or `step` ends it (what was done is gone on with by the next build at
    /// the same point).
    pub fn build(
        &self,
        epoch: Epoch,
        step: &mut Step<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<Checkpoint, JournalError> {
        let commit = self.view.listed(epoch)?.ok_or(JournalError::NoPoint(epoch))?;
        if commit.volumes.is_empty() {
            return Err(JournalError::Damaged(format!("the volumes of point {epoch} cannot be told")));
        }
        let (storage, folder) = self.view.place();
        for folder in [packs(folder), checkpoints(folder)] {
            storage.create_dir_all(&folder).map_err(JournalError::io("create folder", &folder))?;
        }
        let resumes = begin(storage.as_ref(), folder, commit.head)?;
        let named = self.named(epoch)?;
        let failed_before = self.view.shelf().caches.failed_reads();
        let before = self.before(epoch)?;
        let slices: u64 = commit.volumes.iter().map(|volume| u64::from(slices_of(volume))).sum();
        let mut records = Vec::new();
        for volume in &commit.volumes {
            for slice in 0..slices_of(volume) {
                let kept = named.get(&(volume.slot, slice)).map(|named| self.kept(named)).transpose()?.flatten();
                let shared = || self.shared(before.as_ref()?, volume, slice);
                let record = if let Some(record) = kept.or_else(shared) {
                    record
                } else {
                    let record = self.slice(&commit, volume, slice, resumes, step)?;
                    self.is_believed(&record, failed_before)?;
                    record
                };
                records.push(record);
                progress(records.len() as u64, slices);
            }
        }
        self.finish(&commit, &records)
    }

    /// Refuses to call lost what the storage only failed to read: another time it may not.
    fn is_believed(&self, record: &SliceRecord, failed_before: u64) -> Result<(), JournalError> {
        let SliceContent::Pack { sealed, .. } = record.content else { return Ok(()) };
        if !record.lost || self.view.shelf().caches.failed_reads() == failed_before {
            return Ok(());
        }
        Err(JournalError::NotRead(format!("blocks that {} is made of", sealed.id)))
    }

    /// Makes the packs' names and the image index durable.
    fn finish(&self, commit: &CommitEntry, records: &[SliceRecord]) -> Result<Checkpoint, JournalError> {
        let (storage, folder) = self.view.place();
        let packs = packs(folder);
        storage.sync_dir(&packs).map_err(JournalError::io("sync folder", &packs))?;
        let copy = index::encode(self.view.identity().group, commit, records);
        let index_hash = *blake3::hash(&copy).as_bytes();
        let path = index::path(folder, commit.head.epoch, &index_hash);
        // A crash leaves the packs without an index, or with it: nothing names either.
        replace(storage.as_ref(), &path, &[copy.as_slice(), &copy].concat())
            .map_err(JournalError::io("write", &path))?;
        let lost = records.iter().zip(places(&commit.volumes)).filter(|(record, _)| record.lost);
        let lost_blocks = lost.map(|(record, _)| self.lost_blocks(record)).sum::<Result<u64, _>>()?;
        Ok(Checkpoint {
            epoch: commit.head.epoch,
            made: self.now,
            index_len: copy.len() as u64,
            index_hash,
            held_bytes: records.iter().map(SliceRecord::held_bytes).sum(),
            needed_bytes: records.iter().map(|record| record.needed_bytes).sum(),
            lost_blocks,
        })
    }

    fn lost_blocks(&self, record: &SliceRecord) -> Result<u64, JournalError> {
        let SliceContent::Pack { sealed, .. } = record.content else { return Ok(0) };
        let extents = self.view.shelf().extents(&sealed)?;
        let lost = extents.tables.iter().filter(|entry| entry.kind == EntryKind::Lost);
        Ok(lost.map(|entry| u64::from(entry.extent.count)).sum())
    }

    /// The packs of this very point that checkpoints have, this one's or those that share them: they are not to be written over.
    fn named(&self, epoch: Epoch) -> Result<BTreeMap<(VolumeSlot, u32), Named>, JournalError> {
        let manifest = self.view.manifest();
        let mut named = BTreeMap::new();
        for base in &manifest.checkpoints {
            let Some(image) = self.view.image_index(base)? else { continue };
            for record in image.records() {
                let (slot, slice, record) =
                    record.map_err(JournalError::io("read", &base.path(self.view.place().1)))?;
                let Some(record) = record else { continue };
                let SliceContent::Pack { sealed, .. } = record.content else { continue };
                if sealed.id == FileId::Slice(SliceId { slot, slice, epoch }) {
                    let known = named.entry((slot, slice)).or_insert(Named { record, is_floor: false });
                    known.is_floor |= manifest.floor == Some(base.epoch);
                }
            }
        }
        Ok(named)
    }

    /// A pack that a checkpoint has, where it is sound. What the floor has stays as it is: there is nothing to make it of anew.
    fn kept(&self, named: &Named) -> Result<Option<SliceRecord>, JournalError> {
        let SliceContent::Pack { sealed, .. } = named.record.content else { return Ok(None) };
        let is_sound = named.is_floor || (!named.record.lost && self.is_sound(&sealed) && self.is_read(&sealed)?);
        Ok(is_sound.then_some(named.record))
    }

    fn before(&self, epoch: Epoch) -> Result<Option<Before>, JournalError> {
        let bases = self.view.manifest().checkpoints.iter().rev();
        for base in bases.filter(|base| base.epoch <= epoch) {
            if let Some(image) = self.view.image_index(base)? {
                let touched = self.view.slices_touched(base.epoch).ok();
                return Ok(Some(Before { image, touched }));
            }
        }
        Ok(None)
    }

    /// The record of a slice that nobody wrote to since the checkpoint before, where it can be shared.
    fn shared(&self, before: &Before, volume: &Volume, slice: u32) -> Option<SliceRecord> {
        let touched = before.touched.as_ref()?;
        if touched.get(&volume.slot.0).is_some_and(|slices| slices.contains(slice)) {
            return None;
        }
        let record = before.image.record(volume.slot, slice).ok().flatten()?;
        // What was lost may have been healed, and what was taken over whole can be sealed anew once there is a key.
        let reusable = !record.lost
            && match record.content {
                SliceContent::Zero => true,
                SliceContent::Pack { sealed, repacked } => self.is_sound(&sealed) && (repacked || self.keys.is_none()),
            };
        reusable.then_some(record)
    }

    /// Whether a pack is what was written, by reading it.
    fn is_read(&self, sealed: &Sealed) -> Result<bool, JournalError> {
        let files = self.view.shelf();
        Ok(files.walk(sealed, &mut Blind)?.damages.is_empty() && files.index_is_whole(sealed)?)
    }

    fn is_sound(&self, sealed: &Sealed) -> bool {
        let FileId::Slice(slice) = sealed.id else { return false };
        let known = self.view.damages().iter().any(|damage| damage.is_in(sealed.id));
        !known && !self.view.shelf().caches.is_bad(slice) && !self.view.shelf().is_missing(sealed.id)
    }

    fn slice(
        &self,
        commit: &CommitEntry,
        volume: &Volume,
        slice: u32,
        resumes: bool,
        step: &mut Step<'_>,
    ) -> Result<SliceRecord, JournalError> {
        let id = SliceId { slot: volume.slot, slice, epoch: commit.head.epoch };
        // What was lost may have been healed, or only not been read then.
        if resumes && let Some(record) = self.made_before(id)?.filter(|record| !record.lost) {
            return Ok(record);
        }
        self.view.shelf().caches.forget(FileId::Slice(id));
        let extent = extent_of(volume, slice);
        let Some(keys) = self.keys else { return copy_frames(self.view, commit, id, extent, step) };
        let image = self.view.image_of(commit.clone(), keys)?;
        let mut repack = Repack::new(self.view, keys, self.random, commit.head.epoch, commit.generation);
        let (storage, folder) = self.view.place();
        let mut writer: Option<PackWriter<'_>> = None;
        for part in parts(extent) {
            repack.read(&image, volume.slot, part, step)?;
            let is_last = part.end() == extent.end();
            if is_last {
                repack.flush();
            }
            if repack.is_zero() {
                continue;
            }
            let pack = match &mut writer {
                Some(pack) => pack,
                none => none.insert(PackWriter::create(
                    storage.as_ref(),
                    folder,
                    self.view.identity().group,
                    FileId::Slice(id),
                )?),
            };
            repack.drain().try_for_each(|frame| pack.push(&frame))?;
        }
        let Some(writer) = writer else {
            return Ok(SliceRecord { content: SliceContent::Zero, unreadable: false, lost: false, needed_bytes: 0 });
        };
        let written = writer.finish(true)?;
        Ok(record_of(&written, true, written.sealed.len))
    }

    /// A pack that an interrupted build has left; those with frames taken over whole are made again.
    fn made_before(&self, id: SliceId) -> Result<Option<SliceRecord>, JournalError> {
        let (storage, folder) = self.view.place();
        let (file_id, path) = (FileId::Slice(id), FileId::Slice(id).path(folder));
        let file = match storage.open(&path) {
            Err(error) if is_no_file(&error) => return Ok(None),
            opened => opened.map_err(JournalError::io("open", &path))?,
        };
        let (mut head, mut tail) = (vec![0; HEADER_BYTES], vec![0; FOOTER_BYTES]);
        let len = file.len().map_err(JournalError::io("read", &path))?;
        let read =
            file.read_at(&mut head, 0).and_then(|_| file.read_at(&mut tail, len.saturating_sub(FOOTER_BYTES as u64)));
        read.map_err(JournalError::io("read", &path))?;
        let (Ok(header), Ok(footer)) = (Header::decode(&head), Footer::decode(&tail, len)) else { return Ok(None) };
        if header.group != self.view.identity().group || header.file != file_id || !header.repacked {
            return Ok(None);
        }
        let (frames_end, footer_hash) = (footer.frames_end, footer.hash());
        let sealed = Sealed { id: file_id, len, frames_end, footer_hash, points: None };
        // What was read of a file of that name before may be of another.
        self.view.shelf().caches.forget(file_id);
        if !self.is_read(&sealed)? {
            return Ok(None);
        }
        let extents = self.view.shelf().extents(&sealed)?;
        let has = |kind| extents.tables.iter().any(|entry| entry.kind == kind);
        let (unreadable, lost) = (has(EntryKind::Unreadable), has(EntryKind::Lost));
        let content = SliceContent::Pack { sealed, repacked: true };
        Ok(Some(SliceRecord { content, unreadable, lost, needed_bytes: len }))
    }
}

/// The record of a pack just written.
pub(super) fn record_of(written: &Written, repacked: bool, needed_bytes: u64) -> SliceRecord {
    let has = |kind| written.index.iter().any(|entry| entry.kind == kind);
    let (unreadable, lost) = (has(EntryKind::Unreadable), has(EntryKind::Lost));
    SliceRecord { content: SliceContent::Pack { sealed: written.sealed, repacked }, unreadable, lost, needed_bytes }
}

/// The blocks of a slice of a volume.
fn extent_of(volume: &Volume, slice: u32) -> Extent {
    let start = u64::from(slice) * u64::from(SLICE_BLOCKS);
    let end = (start + u64::from(SLICE_BLOCKS)).min(blocks_in(volume.size_bytes));
    Extent::new(Block(start as u32), (end - start) as u32).expect("a slice of the volume")
}

/// Where the point is written down that a checkpoint is being built at.
#[must_use]
pub fn building_path(folder: &Path) -> PathBuf {
    checkpoints(folder).join("building")
}

/// The point at which a build was begun and not ended.
#[must_use]
pub fn building(storage: &dyn Storage, folder: &Path) -> Option<Epoch> {
    let bytes = cdp_seams::storage::read_all(storage, &building_path(folder), BUILDING_BYTES_MAX).ok()?;
    std::str::from_utf8(&bytes).ok()?.split_whitespace().next()?.parse().ok().map(Epoch)
}

/// So that what an interrupted build leaves is not swept away, and is gone on with; gives whether it is. Packs are named by the
/// number of their point: those of a point that was lost are not another's that was given it.
fn begin(storage: &dyn Storage, folder: &Path, point: Head) -> Result<bool, JournalError> {
    let path = building_path(folder);
    let line = format!("{} {}\n", point.epoch, point.hash);
    let known = cdp_seams::storage::read_all(storage, &path, BUILDING_BYTES_MAX);
    if known.is_ok_and(|known| known == line.as_bytes()) {
        // It may be in the page cache alone.
        let folder = path.parent().expect("a file has a folder");
        storage.sync_dir(folder).map_err(JournalError::io("sync folder", folder))?;
        return Ok(true);
    }
    replace(storage, &path, line.as_bytes()).map_err(JournalError::io("write", &path))?;
    Ok(false)
}

/// Ends a build, once the manifest names what it made.
///
/// # Errors
/// As the storage says.
pub fn end(storage: &dyn Storage, folder: &Path) -> Result<(), JournalError> {
    let path = building_path(folder);
    match storage.remove(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(JournalError::io("remove", &path)(error)),
        _ => Ok(()),
    }
}
