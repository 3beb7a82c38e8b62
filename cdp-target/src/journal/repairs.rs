//! Repairs: what stands for damaged frames, a file each in the folder `repairs` beside the journal.
//!
//! Owns their bytes (`docs/format/repair.md`), their names, and which damage has one. A segment is never written again: a
//! reader that meets a frame that does not open looks here. Invariant: a repair is for one frame, named by segment, offset
//! and attempt, so that one which is left over never stands for another. Whether it opens is for who has the key.

use super::index::{Entry, Run};
use super::view::GroupView;
use super::{Damage, JournalError, Manifest};
use cdp_protocol::frame::{self, FRAME_BYTES_MAX, Frame, Kind};
use cdp_protocol::units::{AttemptId, GroupId};
use cdp_seams::storage::{Storage, read_all, replace};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// First bytes of a repair.
const MAGIC: [u8; 8] = *b"CDPREPAR";
/// The layout described here.
const VERSION: u16 = 1;
/// Bytes before the frame.
const HEADER_BYTES: usize = 52;
const BYTES_MAX: u64 = (HEADER_BYTES + FRAME_BYTES_MAX) as u64;
const FOLDER: &str = "repairs";

/// Where a damaged frame is, and whose it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FramePlace {
    pub(crate) segment: u64,
    pub(crate) offset: u64,
    pub(crate) attempt: AttemptId,
}

/// A repair, whole and of its place; not opened.
pub(crate) struct Repair {
    group: GroupId,
    bytes: Vec<u8>,
}

impl Repair {
    /// The frame that stands for the damaged one: of the same volume, epoch and generation, under an attempt of its own.
    pub(crate) fn frame(&self) -> Frame<'_> {
        frame::decode(&self.group, &self.bytes[HEADER_BYTES..]).expect("it was decoded to be a repair")
    }

    fn decode(group: GroupId, place: &FramePlace, bytes: Vec<u8>) -> Option<Self> {
        let whole = bytes.get(HEADER_BYTES..)?;
        let frame = frame::decode(&group, whole).ok()?;
        let fits = frame.bytes.len() == whole.len() && frame.header.kind == Kind::Extents;
        (fits && bytes[..HEADER_BYTES] == header(&group, place)).then_some(Self { group, bytes })
    }
}

/// What stands before the frame. Nothing in it but the place: a reader knows it and compares.
fn header(group: &GroupId, place: &FramePlace) -> [u8; HEADER_BYTES] {
    let mut out = [0; HEADER_BYTES];
    out[..8].copy_from_slice(&MAGIC);
    out[8..10].copy_from_slice(&VERSION.to_le_bytes());
    out[16..24].copy_from_slice(&place.segment.to_le_bytes());
    out[24..32].copy_from_slice(&place.offset.to_le_bytes());
    out[32..48].copy_from_slice(&place.attempt.0);
    let mut sum = crc32fast::Hasher::new();
    sum.update(&group.0);
    sum.update(&out[..48]);
    out[48..].copy_from_slice(&sum.finalize().to_le_bytes());
    out
}

/// Names of the repairs of the group in `folder` that stand for nothing any more: left behind by segments that were rewritten. One of a segment
/// as its source wrote it stays: the manifest names so many damages and no more, and may have none of one that is healed.
///
/// # Errors
/// Where they cannot be listed.
pub(crate) fn stale(storage: &dyn Storage, folder: &Path, manifest: &Manifest) -> std::io::Result<Vec<PathBuf>> {
    let repairs = folder.join(FOLDER);
    let names = match storage.list(&repairs) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        listed => listed?,
    };
    let damages = manifest.damages.iter();
    let wanted: BTreeSet<PathBuf> = damages.map(|damage| path(folder, damage.segment, damage.offset)).collect();
    let is_original = |name: &str| {
        let number = name.split_once('-').and_then(|(number, _)| u64::from_str_radix(number, 16).ok());
        let is_sealed = |number| manifest.sealed.iter().any(|sealed| (sealed.number, sealed.revision) == (number, 0));
        number.is_some_and(|number| number >= manifest.open || is_sealed(number))
    };
    let is_stale = |name: &PathBuf| {
        let is_repair = name.extension().is_some_and(|kind| kind == "frame");
        is_repair && !wanted.contains(&repairs.join(name)) && !name.to_str().is_some_and(is_original)
    };
    Ok(names.into_iter().filter(is_stale).map(|name| repairs.join(name)).collect())
}

fn path(folder: &Path, segment: u64, offset: u64) -> PathBuf {
    folder.join(FOLDER).join(format!("{segment:016x}-{offset:016x}.frame"))
}

/// Puts `frame` in the place of a damaged one, for every reader from here on. The one that was there before is replaced.
///
/// # Errors
/// Where it cannot be written: the damage stands as it did.
pub(crate) fn write(
    storage: &dyn Storage,
    folder: &Path,
    group: &GroupId,
    place: &FramePlace,
    frame: &[u8],
) -> Result<(), JournalError> {
    let repairs = folder.join(FOLDER);
    storage.create_dir_all(&repairs).map_err(JournalError::io("create folder", &repairs))?;
    let path = path(folder, place.segment, place.offset);
    let bytes = [header(group, place).as_slice(), frame].concat();
    // A crash leaves no repair or the whole one, and perhaps a file beside it that no reader looks at.
    replace(storage, &path, &bytes).map_err(JournalError::io("write repair", &path))
}

impl GroupView {
    /// What stands for the frame at a place, if anything does that is whole; read anew each time.
    pub(crate) fn repair(&self, segment: u64, offset: u64, run: &Run) -> Option<Repair> {
        let (files, place) = (self.shelf(), FramePlace { segment, offset, attempt: run.attempt });
        let bytes = read_all(files.storage, &path(files.folder, segment, offset), BYTES_MAX).ok()?;
        let repair = Repair::decode(files.group, &place, bytes)?;
        let header = repair.frame().header;
        ((header.epoch, header.generation) == (run.epoch, run.generation)).then_some(repair)
    }

    /// The repair of a damaged frame, if there is one that is whole; read anew each time.
    pub(crate) fn repair_of(&self, damage: &Damage) -> Option<Repair> {
        let (entries, run) = self.damaged_frame(damage).ok().flatten()?;
        let repair = self.repair(damage.segment, damage.offset, &run)?;
        entries.iter().all(|entry| entry.slot == repair.frame().header.volume).then_some(repair)
    }

    /// What the index has of a damaged frame of content that is part of a point; `None` where the damage is no such frame.
    ///
    /// # Errors
    /// Where the segment cannot be read.
    pub(crate) fn damaged_frame(&self, damage: &Damage) -> Result<Option<(Vec<Entry>, Run)>, JournalError> {
        if damage.any_block || damage.first_epoch.is_none() || damage.slice.is_some() {
            return Ok(None);
        }
        let included = self.included(damage.segment)?;
        let entries = included.into_iter().map(|(_, entry)| entry);
        let entries: Vec<Entry> = entries.filter(|entry| entry.frame_offset == damage.offset).collect();
        let Some(first) = entries.first() else { return Ok(None) };
        let run = self.run_of(damage.segment, first)?;
        Ok(Some((entries, run)))
    }

    /// The attempt that an extent of a segment belongs to.
    ///
    /// # Errors
    /// Where the segment cannot be read, or its index contradicts itself.
    pub(crate) fn run_of(&self, segment: u64, entry: &Entry) -> Result<Run, JournalError> {
        let run = self.index(segment)?.runs().get(entry.run as usize).copied();
        run.ok_or_else(|| JournalError::Damaged(format!("an entry of segment {segment} has no run")))
    }

    /// Whether a damage has a repair, as far as that can be told without the key. Looked for once in a view's life.
    #[must_use]
    pub fn is_healed(&self, damage: &Damage) -> bool {
        let damages = self.damages();
        !damages.is_empty()
            && self.healed().get_or_init(|| self.find_healed()).contains(&(damage.segment, damage.offset))
    }

    fn find_healed(&self) -> BTreeSet<(u64, u64)> {
        let files = self.shelf();
        let names: BTreeSet<PathBuf> =
            files.storage.list(&files.folder.join(FOLDER)).unwrap_or_default().into_iter().collect();
        let has_file = |damage: &&Damage| {
            let path = path(files.folder, damage.segment, damage.offset);
            path.file_name().is_some_and(|name| names.contains(Path::new(name)))
        };
        let repaired = self.damages().iter().filter(has_file).filter(|damage| self.repair_of(damage).is_some());
        repaired.map(|damage| (damage.segment, damage.offset)).collect()
    }

    /// Writes a repair of this group.
    pub(crate) fn write_repair(&self, place: &FramePlace, frame: &[u8]) -> Result<(), JournalError> {
        let files = self.shelf();
        write(files.storage, files.folder, &files.group, place, frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::manifest::SealedSegment;
    use crate::journal::{GroupIdentity, GroupJournal, JournalLimits};
    use cdp_protocol::codec::Sealer;
    use cdp_protocol::escrow::Envelope;
    use cdp_protocol::seal::DataKey;
    use cdp_protocol::units::{BLOCK_BYTES, Block, Epoch, Extent, Generation, KeyId, Sequence, VolumeSlot};
    use cdp_seams::storage::sim::SimStorage;
    use std::sync::Arc;

    const GROUP: GroupId = GroupId([7; 16]);

    fn frame() -> Vec<u8> {
        let sealer = Sealer::new(GROUP, Epoch(5), Generation(2), AttemptId([9; 16]), &DataKey::new([3; 32]));
        let extents = vec![Extent { start: Block(4), count: 1 }];
        sealer.content(VolumeSlot(1), Sequence(3), extents, &[8; BLOCK_BYTES])
    }

    #[test]
    fn only_repairs_of_segments_that_were_rewritten_are_stale() {
        let (disk, folder) = (SimStorage::new(1), Path::new("/g"));
        let envelope = Envelope { key: KeyId([1; 8]), encapsulated: vec![], sealed: vec![] };
        let identity = GroupIdentity { group: GROUP, office: "o".to_owned(), name: "n".to_owned(), envelope };
        let storage = Arc::new(disk.clone());
        let journal = GroupJournal::create(storage, folder, identity, JournalLimits::default()).expect("made");
        let mut manifest = journal.view().manifest().clone();
        let sealed = |number, revision| SealedSegment {
            number,
            revision,
            len: 0,
            frames_end: 0,
            footer_hash: [0; 32],
            points: None,
            newest_run: Epoch(0),
        };
        manifest.sealed = vec![sealed(1, 0), sealed(2, 9)];
        manifest.open = 4;
        manifest.damages = vec![Damage { offset: 7, ..Damage::of(sealed(2, 9).id(), "rot".to_owned()) }];
        for (segment, offset) in [(1, 5), (2, 5), (2, 7), (3, 5), (4, 5)] {
            let place = FramePlace { segment, offset, attempt: AttemptId([6; 16]) };
            write(&disk, folder, &GROUP, &place, &frame()).expect("written");
        }
        replace(&disk, &folder.join("repairs/README"), b"an operator's").expect("written");
        let found = stale(&disk, folder, &manifest).expect("listed");
        assert_eq!(found, [path(folder, 2, 5), path(folder, 3, 5)], "of the rewritten one, and of one that is gone");
    }

    #[test]
    fn a_repair_is_these_bytes_and_stands_for_no_other_frame() {
        let place = FramePlace { segment: 0x1122, offset: 0x3344, attempt: AttemptId([6; 16]) };
        let start = header(&GROUP, &place);
        let mut expected = b"CDPREPAR\x01\0\0\0\0\0\0\0\x22\x11\0\0\0\0\0\0\x44\x33\0\0\0\0\0\0".to_vec();
        expected.extend_from_slice(&[6; 16]);
        let sum = crc32fast::hash(&[GROUP.0.as_slice(), &expected].concat());
        expected.extend_from_slice(&sum.to_le_bytes());
        assert_eq!(start.as_slice(), expected);
        assert_eq!(
            path(Path::new("/g"), 0x1122, 0x3344),
            Path::new("/g/repairs/0000000000001122-0000000000003344.frame")
        );

        let bytes = [expected, frame()].concat();
        let repair = Repair::decode(GROUP, &place, bytes.clone()).expect("whole");
        assert_eq!(repair.frame().bytes, frame());
        for other in [
            FramePlace { segment: 1, ..place },
            FramePlace { offset: 1, ..place },
            FramePlace { attempt: AttemptId([1; 16]), ..place },
        ] {
            assert!(Repair::decode(GROUP, &other, bytes.clone()).is_none(), "{other:?}");
        }
        assert!(Repair::decode(GroupId([8; 16]), &place, bytes.clone()).is_none());
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 4;
            assert!(Repair::decode(GROUP, &place, flipped).is_none(), "byte {at}");
            assert!(Repair::decode(GROUP, &place, bytes[..at].to_vec()).is_none(), "cut to {at}");
        }
        assert!(Repair::decode(GROUP, &place, [bytes, vec![0]].concat()).is_none());
    }
}
