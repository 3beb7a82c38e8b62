//! What readers see of a group: its durable points, and which frame holds a block at a point.
//!
//! Never writes. A view is a moment: points synced after it was taken are not in it. Beside a running server it is opened
//! from the files alone and shows only what a synced record or a seal proves. Memory is bounded: indexes of sealed
//! segments are loaded when needed (`sealed`), that of the open one is shared with the writer.

use super::file::FileId;
use super::index::{CommitEntry, Entry, Lost, OpenIndex, Run, Summary};
use super::manifest::{Checkpoint, PointRange, SealedSegment};
use super::point::Point;
use super::reach::{Seen, told_by_index};
use super::recovery::{open_place, walk_open};
use super::sealed::Shelf;
use super::walk::{Visit, walk};
use super::{Damage, GroupIdentity, JournalError, Manifest, segment};
use crate::checkpoint::index::ImageIndex;
use crate::restore::keyring::Keyring;
use crate::restore::point::PointImage;
use crate::scrub::ScrubRecord;
use cdp_protocol::record::Volume;
use cdp_protocol::units::{Epoch, Timestamp};
use cdp_seams::storage::{Storage, StorageFile};
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard};

pub(super) use super::caches::Caches;

/// A reader's view of a group.
pub struct GroupView {
    facts: Arc<Facts>,
    open: Arc<RwLock<OpenIndex>>,
    /// What stands at or behind this offset of the open segment is not shown.
    limit: u64,
    /// Bytes of a source's whole frames behind it.
    unproven_bytes: u64,
    caches: Arc<Caches>,
}

/// Tells how many views of a manifest there are.
pub(super) struct Lease(std::sync::Weak<Facts>);

impl Lease {
    pub(super) fn strong_count(&self) -> usize {
        self.0.strong_count()
    }
}

/// What changes only with the manifest.
struct Facts {
    storage: Arc<dyn Storage>,
    folder: PathBuf,
    manifest: Manifest,
    /// Damages that have a repair, once that was looked for.
    healed: OnceLock<BTreeSet<(u64, u64)>>,
}

/// Points whose reading needs what a damage took.
pub(crate) type Reach = (Epoch, Option<Epoch>);

/// What a walk over a segment found.
pub(crate) struct WalkedSegment {
    /// What is wrong.
    pub(crate) damages: Vec<Damage>,
    /// Bytes read.
    pub(crate) bytes: u64,
}

pub(crate) enum SegmentIndex<'a> {
    Open(RwLockReadGuard<'a, OpenIndex>, u64),
    Sealed(Arc<Summary>, SealedSegment),
}

impl SegmentIndex<'_> {
    pub(crate) fn runs(&self) -> &[Run] {
        match self {
            Self::Open(index, _) => &index.runs,
            Self::Sealed(summary, _) => &summary.runs,
        }
    }

    pub(crate) fn lost(&self) -> &[Lost] {
        match self {
            Self::Open(index, _) => &index.lost,
            Self::Sealed(summary, _) => &summary.lost,
        }
    }

    pub(crate) fn commits(&self) -> &[CommitEntry] {
        match self {
            Self::Open(index, limit) => {
                let shown = index.commits.partition_point(|commit| commit.offset < *limit);
                &index.commits[..shown]
            }
            Self::Sealed(summary, _) => &summary.commits,
        }
    }
}

impl GroupView {
    pub(super) fn of(
        storage: Arc<dyn Storage>,
        folder: &Path,
        manifest: &Manifest,
        open: Arc<RwLock<OpenIndex>>,
        limit: u64,
        caches: Arc<Caches>,
    ) -> Self {
        let facts = Facts { storage, folder: folder.to_owned(), manifest: manifest.clone(), healed: OnceLock::new() };
        Self { facts: Arc::new(facts), open, limit, unproven_bytes: 0, caches }
    }

    pub(super) fn advanced(&self, limit: u64) -> Self {
        let (facts, open, caches) = (Arc::clone(&self.facts), Arc::clone(&self.open), Arc::clone(&self.caches));
        Self { facts, open, limit, unproven_bytes: 0, caches }
    }

    /// The same with another manifest: what a change would come to.
    pub(crate) fn as_if(&self, change: impl FnOnce(&mut Manifest)) -> Self {
        let mut manifest = self.facts.manifest.clone();
        change(&mut manifest);
        let (storage, folder) = (Arc::clone(&self.facts.storage), self.facts.folder.as_path());
        Self::of(storage, folder, &manifest, Arc::clone(&self.open), self.limit, Arc::clone(&self.caches))
    }

    /// Opens a view from the files alone, also beside a running server. Writes nothing.
    ///
    /// # Errors
    /// Where there is no group, its manifest cannot be used, or the storage fails.
    pub fn open(storage: Arc<dyn Storage>, folder: &Path) -> Result<Self, JournalError> {
        let (mut manifest, _) = Manifest::read(storage.as_ref(), folder)?;
        let place = open_place(folder, &manifest)?.place;
        let path = segment::path(folder, manifest.open);
        let (index, limit, frames_end) = match storage.open(&path) {
            Ok(file) => {
                let (walked, _) =
                    walk_open(file.as_ref(), &manifest, place).map_err(JournalError::io("read", &path))?;
                manifest.damages.extend(walked.damages);
                (walked.index, walked.proven, walked.source_end)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => (OpenIndex::default(), 0, 0),
            Err(error) => return Err(JournalError::io("open", &path)(error)),
        };
        let open = Arc::new(RwLock::new(index));
        let view = Self::of(storage, folder, &manifest, open, limit, Arc::default());
        Ok(Self { unproven_bytes: frames_end.saturating_sub(limit), ..view })
    }

    /// Bytes of whole frames that are not shown, because nothing on disk proves that they are durable. Beside a server they are
    /// on their way. Without one they are what recovery makes durable, points that were acked among them: the proof of the
    /// newest is written behind the ack's sync, and waits for the next.
    #[must_use]
    pub const fn unproven_bytes(&self) -> u64 {
        self.unproven_bytes
    }

    /// Who the group is.
    #[must_use]
    pub fn identity(&self) -> &GroupIdentity {
        &self.facts.manifest.identity
    }

    /// The manifest of this moment.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.facts.manifest
    }

    /// Damage that recovery found.
    #[must_use]
    pub fn damages(&self) -> &[Damage] {
        &self.facts.manifest.damages
    }

    pub(super) fn healed(&self) -> &OnceLock<BTreeSet<(u64, u64)>> {
        &self.facts.healed
    }

    /// When which sealed segment was read again.
    #[must_use]
    pub fn scrub_record(&self) -> ScrubRecord {
        ScrubRecord::read(self.facts.storage.as_ref(), &self.facts.folder)
    }

    /// Bytes of all segments up to the last sync.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.facts.manifest.sealed.iter().map(|segment| segment.len).sum::<u64>() + self.limit
    }

    /// The storage and the group's folder.
    pub(crate) fn place(&self) -> (&Arc<dyn Storage>, &Path) {
        (&self.facts.storage, &self.facts.folder)
    }

    /// Tells whether the views of this manifest are gone: what only it named may be removed then.
    pub(super) fn lease(&self) -> Lease {
        Lease(Arc::downgrade(&self.facts))
    }

    /// Point `epoch`.
    ///
    /// # Errors
    /// Where the segment that has it cannot be read.
    pub fn point(&self, epoch: Epoch) -> Result<Option<Point>, JournalError> {
        Ok(self.listed(epoch)?.map(|commit| self.to_point(&commit, &self.reaches())))
    }

    /// The newest point whose cut was at or before `time`.
    ///
    /// # Errors
    /// Where a segment on the way cannot be read.
    pub fn point_at_or_before(&self, time: Timestamp) -> Result<Option<Point>, JournalError> {
        let sealed = &self.facts.manifest.sealed;
        let early = sealed.iter().filter(|segment| segment.points.is_some_and(|points| points.earliest <= time));
        let early = early.rev().map(|segment| segment.number);
        for number in [self.facts.manifest.open].into_iter().chain(early) {
            let fits = |commit: &&CommitEntry| commit.cut_time() <= time && !self.is_removed(commit.head.epoch);
            let found = self.index(number)?.commits().iter().rev().find(fits).cloned();
            if let Some(commit) = found {
                return Ok(Some(self.to_point(&commit, &self.reaches())));
            }
        }
        Ok(None)
    }

    /// The newest point named `label`.
    ///
    /// # Errors
    /// Where a segment on the way cannot be read.
    pub fn point_labelled(&self, label: &str) -> Result<Option<Point>, JournalError> {
        let named =
            |point: &Result<Point, _>| point.as_ref().map_or(true, |point| point.label.as_deref() == Some(label));
        self.points().rev().find(named).transpose()
    }

    /// The content of point `epoch`, opened with the group's keys.
    ///
    /// # Errors
    /// Where there is no such point, its list of volumes is damaged, or a segment cannot be read.
    pub fn image(self: &Arc<Self>, epoch: Epoch, keys: impl Into<Keyring>) -> Result<PointImage, JournalError> {
        let commit = self.listed(epoch)?.ok_or(JournalError::NoPoint(epoch))?;
        self.image_of(commit, keys)
    }

    /// The same for a point that may have been removed.
    pub(crate) fn image_of(
        self: &Arc<Self>,
        commit: CommitEntry,
        keys: impl Into<Keyring>,
    ) -> Result<PointImage, JournalError> {
        let epoch = commit.head.epoch;
        if commit.volumes.is_empty() {
            return Err(JournalError::Damaged(format!("the volumes of point {epoch} cannot be told")));
        }
        Ok(PointImage::new(Arc::clone(self), commit, keys.into()))
    }

    /// The volumes of point `epoch`.
    ///
    /// # Errors
    /// Where there is no such point or its segment cannot be read.
    pub fn volumes(&self, epoch: Epoch) -> Result<Vec<Volume>, JournalError> {
        Ok(self.listed(epoch)?.ok_or(JournalError::NoPoint(epoch))?.volumes)
    }

    /// Whether the point was removed: its commit stays, and nobody can restore it.
    #[must_use]
    pub fn is_removed(&self, epoch: Epoch) -> bool {
        self.facts.manifest.removed.contains(epoch)
    }

    /// The commit of a point that was not removed.
    pub(crate) fn listed(&self, epoch: Epoch) -> Result<Option<CommitEntry>, JournalError> {
        if self.is_removed(epoch) { Ok(None) } else { self.commit(epoch) }
    }

    /// The commit of a point, also of one that was removed.
    pub(crate) fn commit(&self, epoch: Epoch) -> Result<Option<CommitEntry>, JournalError> {
        if let Some(commit) = self.journal_commit(epoch)? {
            return Ok(Some(commit));
        }
        // Its segment may be gone: the image of a checkpoint needs nothing of the journal before it.
        let checkpoint = self.manifest().checkpoints.iter().find(|checkpoint| checkpoint.epoch == epoch);
        let Some(checkpoint) = checkpoint else { return Ok(None) };
        Ok(self.image_index(checkpoint)?.map(|image| image.commit().clone()))
    }

    fn journal_commit(&self, epoch: Epoch) -> Result<Option<CommitEntry>, JournalError> {
        let Some(segment) = self.segment_of(epoch) else { return Ok(None) };
        let index = self.index(segment)?;
        let commits = index.commits();
        let found = commits.binary_search_by_key(&epoch, |commit| commit.head.epoch);
        Ok(found.ok().map(|at| commits[at].clone()))
    }

    /// The index of a checkpoint; `None` where it is missing, damaged or of a point that is not here.
    pub(crate) fn image_index(&self, checkpoint: &Checkpoint) -> Result<Option<Arc<ImageIndex>>, JournalError> {
        let Shelf { storage, folder, group, caches } = self.shelf();
        if let Some(image) = caches.image(&checkpoint.index_hash) {
            return Ok(Some(image));
        }
        let Some(image) = ImageIndex::open(storage, folder, group, checkpoint)?.map(Arc::new) else { return Ok(None) };
        let head = image.commit().head;
        match self.journal_commit(head.epoch) {
            // The point it was made at was lost, and its number given again.
            Ok(Some(commit)) if commit.head != head => return Ok(None),
            Ok(Some(_)) => caches.keep_image(checkpoint.index_hash, &image),
            // Its number may yet be given again: that is looked up each time.
            _ => {}
        }
        Ok(Some(image))
    }

    /// A file of frames.
    pub(crate) fn file(&self, file: FileId) -> Result<Arc<Box<dyn StorageFile>>, JournalError> {
        self.shelf().file(file)
    }

    /// The file of segment `number`.
    pub(crate) fn file_id(&self, number: u64) -> FileId {
        let revision = self.sealed_segment(number).map_or(0, |sealed| sealed.revision);
        FileId::Segment { number, revision }
    }

    /// Sealed segment `number`.
    pub(crate) fn sealed_segment(&self, number: u64) -> Option<&SealedSegment> {
        let sealed = &self.facts.manifest.sealed;
        sealed.binary_search_by_key(&number, |segment| segment.number).ok().map(|at| &sealed[at])
    }

    pub(crate) fn shelf(&self) -> Shelf<'_> {
        Shelf {
            storage: self.facts.storage.as_ref(),
            folder: &self.facts.folder,
            group: self.facts.manifest.identity.group,
            caches: &self.caches,
        }
    }

    /// Walks a segment frame by frame, as far as this view shows it; also checks its index.
    pub(crate) fn walk(&self, segment: u64, visitor: &mut dyn Visit) -> Result<WalkedSegment, JournalError> {
        if self.shelf().is_missing(self.file_id(segment)) {
            return Ok(WalkedSegment { damages: vec![self.missing(segment)], bytes: 0 });
        }
        let manifest = &self.facts.manifest;
        if let Some(sealed) = self.sealed_segment(segment) {
            let file = sealed.sealed();
            let mut seen = Seen { visitor, frames: HashMap::new() };
            let mut damages = self.shelf().walk(&file, &mut seen)?.damages;
            if self.shelf().index_is_whole(&file)? {
                damages = told_by_index(self, segment, damages, &seen.frames)?;
            } else {
                let (offset, len) = (sealed.frames_end, sealed.len - sealed.frames_end);
                let what = "the segment's index is damaged; it can be made anew from the frames".to_owned();
                self.not_before(sealed, &mut damages);
                damages.push(Damage { offset, len, ..Damage::of(file.id, what) });
            }
            let path = file.id.path(&self.facts.folder);
            let len = self.file(file.id)?.len().map_err(JournalError::io("read", &path))?;
            damages.extend(sealed.surplus(len));
            return Ok(WalkedSegment { damages, bytes: sealed.len });
        }
        let place = open_place(&self.facts.folder, manifest)?.place;
        let (group, start) = (manifest.identity.group, manifest.open_header.len() as u64);
        let (file, limit) = (self.file(self.file_id(segment))?, self.limit);
        let path = segment::path(&self.facts.folder, segment);
        let walked = walk(file.as_ref().as_ref(), limit, group, segment, start, Some(place), limit, visitor);
        let walked = walked.map_err(JournalError::io("read", &path))?;
        Ok(WalkedSegment { damages: walked.damages, bytes: limit })
    }

    /// Damage of a sealed segment that nothing tells of. Its header is gone with its index: then so may be any frame before the
    /// first that stands. What was before the segment is not concerned, and the manifest says where that ends.
    fn not_before(&self, sealed: &SealedSegment, damages: &mut Vec<Damage>) {
        if let Some(header) = damages.iter().find(|damage| damage.offset == 0 && !damage.any_block) {
            let (what, len) = ("what stood behind the header cannot be told".to_owned(), header.len);
            let first_epoch = Some(Epoch(0));
            damages.push(Damage { len, first_epoch, any_block: true, ..Damage::of(sealed.id(), what) });
        }
        let older = self.facts.manifest.sealed.iter().take_while(|older| older.number < sealed.number);
        let before = older.filter_map(|older| older.points).last().map_or(Epoch(0), |points| points.last);
        let first = sealed.points.map_or(Epoch(before.0.saturating_add(1)), |points| points.first);
        for damage in damages.iter_mut().filter(|damage| damage.any_block) {
            damage.first_epoch = damage.first_epoch.map(|epoch| epoch.max(first));
        }
    }

    /// Segments whose points cannot all be listed, because they are gone or damaged: with the points they had.
    #[must_use]
    pub fn unlisted(&self) -> Vec<(u64, PointRange)> {
        let is_whole = |sealed: &SealedSegment, points: &PointRange| {
            self.index(sealed.number).is_ok_and(|index| {
                let (first, last) = (index.commits().first(), index.commits().last());
                first.map(|commit| commit.head.epoch) == Some(points.first)
                    && last.map(|commit| commit.head.epoch) == Some(points.last)
            })
        };
        let sealed = self.facts.manifest.sealed.iter().filter_map(|sealed| Some((sealed, sealed.points?)));
        let unlisted = sealed.filter(|(sealed, points)| !is_whole(sealed, points));
        unlisted.map(|(sealed, points)| (sealed.number, points)).collect()
    }

    /// That a segment is not there at all.
    fn missing(&self, segment: u64) -> Damage {
        let sealed = self.facts.manifest.sealed.iter().find(|sealed| sealed.number == segment);
        let points = sealed.and_then(|sealed| sealed.points);
        let len = sealed.map_or(self.limit, |sealed| sealed.len);
        let had = points.map(|points| format!("; it had points {} to {}", points.first, points.last));
        let what = format!("the segment is missing{}", had.unwrap_or_default());
        let first_epoch = Some(points.map_or(Epoch(0), |points| points.first));
        Damage { len, first_epoch, any_block: true, ..Damage::of(self.file_id(segment), what) }
    }

    /// First and last point that a damage hits.
    pub(crate) fn reach(&self, damage: &Damage) -> Option<Reach> {
        super::reach::reach(self, damage)
    }

    /// Points that need what each damage took.
    pub(super) fn reaches(&self) -> Vec<(Reach, &Damage)> {
        let damages = self.facts.manifest.damages.iter().filter(|damage| !self.is_healed(damage));
        damages.filter_map(|damage| Some((self.reach(damage)?, damage))).collect()
    }

    /// All included extents of `segment`, with their epochs.
    pub(crate) fn included(&self, segment: u64) -> Result<Vec<(Epoch, Entry)>, JournalError> {
        let index = self.index(segment)?;
        let (entries, runs): (Vec<Entry>, Vec<Run>) = match &index {
            SegmentIndex::Open(open, limit) => {
                (open.iter().filter(|entry| entry.frame_offset < *limit).copied().collect(), open.runs.clone())
            }
            SegmentIndex::Sealed(_, sealed) => {
                let extents = self.shelf().extents(&sealed.sealed())?;
                (extents.tables.iter().copied().collect(), extents.runs.clone())
            }
        };
        drop(index);
        let mut included = Vec::new();
        for entry in entries {
            if let Some(run) = runs.get(entry.run as usize)
                && self.includes(segment, run, entry.run as usize + 1 == runs.len(), Epoch(u64::MAX))?
            {
                included.push((run.epoch, entry));
            }
        }
        included.sort_unstable_by_key(|(_, entry)| entry.frame_offset);
        Ok(included)
    }

    /// Numbers of all segments from `first` on.
    pub(crate) fn segments_from(&self, first: u64) -> impl Iterator<Item = u64> + '_ {
        let sealed = self.facts.manifest.sealed.iter().map(|segment| segment.number);
        sealed.chain([self.facts.manifest.open]).filter(move |number| *number >= first)
    }

    pub(crate) fn index(&self, number: u64) -> Result<SegmentIndex<'_>, JournalError> {
        let sealed = &self.facts.manifest.sealed;
        if let Ok(at) = sealed.binary_search_by_key(&number, |segment| segment.number) {
            return Ok(SegmentIndex::Sealed(self.shelf().summary(&sealed[at].sealed())?, sealed[at]));
        }
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        Ok(SegmentIndex::Open(open, self.limit))
    }

    /// The segment that has the commit of `epoch`, if any has.
    pub(super) fn segment_of(&self, epoch: Epoch) -> Option<u64> {
        let sealed = self.facts.manifest.sealed.iter();
        let ranges = sealed.filter_map(|segment| Some((segment.points?, segment.number)));
        let mut newer = ranges.skip_while(|(points, _)| points.last < epoch);
        match newer.next() {
            Some((points, number)) => (points.first <= epoch).then_some(number),
            None => Some(self.facts.manifest.open),
        }
    }
}
