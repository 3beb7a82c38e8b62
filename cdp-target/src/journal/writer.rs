//! The one writer of a group's history.
//!
//! Invariant: data durable, then the point visible, then the ack. A failed write or sync is final: the journal takes
//! nothing more until it is opened anew, and no sync is ever tried twice. Blocking calls; owned by one thread. Takes no
//! lock: the store has one.

use super::change::Change;
use super::file::FileId;
use super::index::OpenIndex;
use super::manifest::{Damage, Fork, Manifest, Mark, SealedSegment};
use super::removed::Removed;
use super::segment::{self, Footer, Header, Place};
use super::view::{Caches, GroupView, Lease};
use super::{GroupIdentity, JournalError, JournalLimits};
use cdp_protocol::frame::{self, Encoding, Frame, Kind};
use cdp_protocol::record::{Synced, Volume};
use cdp_protocol::session::chain::{Chain, Step};
use cdp_protocol::session::lineage::{Line, Lineage};
use cdp_protocol::session::target::{Claim, Ruling};
use cdp_protocol::units::{AttemptId, Epoch, Generation, GroupId, Head, Sequence, Timestamp, VolumeSlot};
use cdp_seams::storage::{Storage, StorageFile};
use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

/// Bytes appended before they are written.
const PENDING_BYTES_MAX: usize = 1 << 20;
/// A frame so long is written from where it is, not gathered first: the copy costs more than the call.
const GATHERED_BYTES_MAX: usize = 64 << 10;
/// Forks that wait for an operator at a time; of more the first are enough to decide by.
const FORKS_MAX: usize = 16;
/// Damages that the manifest names.
const DAMAGES_MAX: usize = 256;
/// Histories that were left, and whose sources are refused without freezing the group again.
const LEFT_MAX: usize = 256;
/// Extents in the open segment's index before it is sealed: 32 bytes each, twice that in memory.
const EXTENTS_MAX: usize = 1 << 20;

/// A group's history, open to be appended to.
pub struct GroupJournal {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) folder: PathBuf,
    pub(super) limits: JournalLimits,
    pub(super) manifest: Manifest,
    pub(super) place: Place,
    pub(super) open: OpenSegment,
    pub(super) caches: Arc<Caches>,
    pub(super) view: Arc<GroupView>,
    /// Views of manifests before the present one, and by which change they go.
    pub(super) leases: Vec<(u64, Lease)>,
    /// What failed, once something did, and whether for want of room.
    pub(super) poisoned: Option<(String, bool)>,
}

/// The segment that is appended to.
pub(super) struct OpenSegment {
    pub(super) path: PathBuf,
    pub(super) file: Box<dyn StorageFile>,
    pub(super) index: Arc<RwLock<OpenIndex>>,
    /// Frames appended and not written.
    pub(super) pending: Vec<u8>,
    /// Where they will be written.
    pub(super) written: u64,
    /// Everything before this offset is durable.
    pub(super) synced: u64,
    /// The newest point then.
    pub(super) synced_head: Option<Head>,
    /// Frames of a source were appended since.
    pub(super) dirty: bool,
    /// The newest receive time.
    pub(super) time: Timestamp,
}

impl OpenSegment {
    /// Offset of the next frame.
    const fn end(&self) -> u64 {
        self.written + self.pending.len() as u64
    }

    fn write_pending(&mut self) -> io::Result<()> {
        // A crash here leaves any part of these bytes behind the last proven offset: a torn tail.
        self.file.write_at(&self.pending, self.written)?;
        self.written = self.end();
        self.pending.clear();
        Ok(())
    }
}

impl GroupJournal {
    /// Makes a new group in `folder`, which must not have one.
    ///
    /// A crash before the manifest is in place leaves no group: leftovers are replaced by the next try.
    ///
    /// # Errors
    /// Where there is one already, or the storage fails.
    pub fn create(
        storage: Arc<dyn Storage>,
        folder: &Path,
        identity: GroupIdentity,
        limits: JournalLimits,
    ) -> Result<Self, JournalError> {
        for folder in [folder.join("journal"), folder.join("aside")] {
            storage.create_dir_all(&folder).map_err(JournalError::io("create folder", &folder))?;
        }
        let manifest_path = super::manifest::path(folder);
        let names = storage.list(folder).map_err(JournalError::io("list", folder))?;
        if names.iter().any(|name| Some(name.as_os_str()) == manifest_path.file_name()) {
            return Err(JournalError::Exists(folder.to_owned()));
        }
        let place = Place::default();
        let header = Header { group: identity.group, number: 1, place: place.clone() }.encode();
        let open = create_segment(storage.as_ref(), folder, 1, &header)?;
        let manifest = Manifest {
            identity,
            generation: Generation(0),
            frozen: None,
            sealed: Vec::new(),
            open: 1,
            open_header: header,
            marks: std::collections::BTreeMap::new(),
            damages: Vec::new(),
            lineage: Lineage::default(),
            forks: Vec::new(),
            ruling: Ruling::default(),
            older_envelopes: Vec::new(),
            change: 0,
            removed: Removed::default(),
            floor: None,
            checkpoints: Vec::new(),
        };
        manifest.write(storage.as_ref(), folder)?;
        Ok(Self::assemble(storage, folder, limits, manifest, place, open))
    }

    pub(super) fn assemble(
        storage: Arc<dyn Storage>,
        folder: &Path,
        limits: JournalLimits,
        manifest: Manifest,
        place: Place,
        open: OpenSegment,
    ) -> Self {
        let caches = Arc::new(Caches::default());
        let view = Arc::new(GroupView::of(
            Arc::clone(&storage),
            folder,
            &manifest,
            Arc::clone(&open.index),
            open.synced,
            Arc::clone(&caches),
        ));
        Self {
            storage,
            folder: folder.to_owned(),
            limits,
            manifest,
            place,
            open,
            caches,
            view,
            leases: Vec::new(),
            poisoned: None,
        }
    }

    /// Who the group is.
    #[must_use]
    pub const fn identity(&self) -> &GroupIdentity {
        &self.manifest.identity
    }

    /// Where the group stands, counting what was appended and not synced.
    #[must_use]
    pub const fn chain(&self) -> &Chain {
        &self.place.chain
    }

    /// The newest durable point.
    #[must_use]
    pub const fn synced_head(&self) -> Option<Head> {
        self.open.synced_head
    }

    /// Why the group takes nothing, where that is so.
    #[must_use]
    pub fn frozen(&self) -> Option<&str> {
        self.manifest.frozen.as_deref()
    }

    /// Readers' view of what is durable.
    #[must_use]
    pub fn view(&self) -> Arc<GroupView> {
        Arc::clone(&self.view)
    }

    /// In which generation a durable point was made; `None` for one that is not here.
    ///
    /// # Errors
    /// Where the segment that has it cannot be read.
    pub fn made_in(&self, point: Head) -> Result<Option<Generation>, JournalError> {
        let commit = self.view.commit(point.epoch)?.filter(|commit| commit.head == point);
        Ok(commit.map(|commit| commit.generation))
    }

    /// How the generations follow one another.
    #[must_use]
    pub const fn lineage(&self) -> &Lineage {
        &self.manifest.lineage
    }

    /// What an operator said about forks.
    #[must_use]
    pub const fn ruling(&self) -> &Ruling {
        &self.manifest.ruling
    }

    /// Changes who the group is; the group's id stays, and so do the envelopes of data keys that older points need.
    ///
    /// # Errors
    /// Where the manifest cannot be replaced.
    pub fn set_identity(&mut self, identity: GroupIdentity) -> Result<(), JournalError> {
        assert_eq!(identity.group, self.manifest.identity.group, "a journal belongs to one group for ever");
        self.change(|manifest| {
            let key = identity.envelope.key;
            let before = std::mem::replace(&mut manifest.identity, identity);
            // The same key may be sealed anew; another one takes its place, and may be one that was there before.
            manifest.older_envelopes.retain(|envelope| envelope.key != key);
            if before.envelope.key != key {
                manifest.older_envelopes.push(before.envelope);
            }
        })
    }

    /// Begins a generation; durable when it returns. The forks that were resolved are history then.
    ///
    /// # Errors
    /// Where it is not above the one granted last, or the manifest cannot be replaced.
    pub fn begin(&mut self, line: Line) -> Result<(), JournalError> {
        let (wanted, granted) = (line.generation, self.place.chain.generation());
        if wanted <= granted {
            return Err(JournalError::Generation { wanted, granted });
        }
        self.change(|manifest| {
            manifest.generation = wanted;
            manifest.lineage.begin(line);
            manifest.ruling.chosen = None;
            manifest.forks.clear();
        })?;
        self.place.chain.grant(wanted);
        Ok(())
    }

    /// Takes nothing any more, until `resolve`: a source's history is another one.
    ///
    /// # Errors
    /// Where the manifest cannot be replaced.
    pub fn freeze(&mut self, reason: &str, fork: Option<Fork>) -> Result<(), JournalError> {
        let known = |fork: &Fork| self.manifest.forks.iter().any(|known| known.claim == fork.claim);
        let fork = fork.filter(|fork| !known(fork) && self.manifest.forks.len() < FORKS_MAX);
        if self.manifest.frozen.is_some() && fork.is_none() {
            return Ok(());
        }
        self.change(|manifest| {
            manifest.frozen.get_or_insert_with(|| reason.to_owned());
            manifest.forks.extend(fork);
        })
    }

    /// Ends a fork: the history that ends at `text` goes on with the next source that may; the others are left. Nothing of any
    /// is removed. `text` is an epoch, with `GENERATION/` before it and the start of its hash behind a colon as far as needed.
    ///
    /// # Errors
    /// Where the group is not forked, no history or several end there, or the manifest cannot be replaced.
    pub fn resolve(&mut self, text: &str) -> Result<Claim, JournalError> {
        let claims: Vec<Claim> = self.manifest.histories(self.synced_head()).map(|(claim, _)| claim).collect();
        let chosen = choose(&claims, text, self.manifest.frozen.is_some() || self.manifest.ruling.chosen.is_some())?;
        self.change(|manifest| {
            manifest.frozen = None;
            manifest.ruling.chosen = Some(chosen);
            manifest.ruling.left.retain(|left| !claims.contains(left));
            manifest.ruling.left.extend(claims.iter().filter(|claim| **claim != chosen));
            let surplus = manifest.ruling.left.len().saturating_sub(LEFT_MAX);
            manifest.ruling.left.drain(..surplus);
        })?;
        Ok(chosen)
    }

    /// Names a point, or takes its name away.
    ///
    /// # Errors
    /// Where there is no such point, or the manifest cannot be replaced.
    pub fn label(&mut self, epoch: Epoch, label: Option<&str>) -> Result<(), JournalError> {
        self.mark(epoch, |mark| mark.label = Some(label.unwrap_or_default().to_owned()))
    }

    /// Keeps a point from pruning, or no longer.
    ///
    /// # Errors
    /// Where there is no such point, or the manifest cannot be replaced.
    pub fn pin(&mut self, epoch: Epoch, pinned: bool) -> Result<(), JournalError> {
        self.mark(epoch, |mark| mark.pinned = pinned)
    }

    /// What a reading of a whole sealed segment or pack found takes the place of what was known of it, as far as there is room: of more
    /// the first are enough. Nothing, where the file has given way to another meanwhile.
    ///
    /// # Errors
    /// Where the manifest cannot be replaced.
    pub fn note_damages(&mut self, file: FileId, found: &[Damage]) -> Result<(), JournalError> {
        if !self.view.sealed_files().iter().any(|sealed| sealed.id == file) {
            return Ok(());
        }
        let (known, mut damages): (Vec<_>, Vec<_>) =
            self.manifest.damages.iter().cloned().partition(|damage| damage.is_in(file));
        if known == found {
            self.look_again();
            return Ok(());
        }
        let room = DAMAGES_MAX.saturating_sub(damages.len());
        damages.extend(found.iter().take(room).cloned());
        self.change(|manifest| manifest.damages = damages)
    }

    /// Gives what was prepared elsewhere its place.
    ///
    /// # Errors
    /// `Stale`, and nothing changed, where it does not fit any more or names files that are gone; or where the manifest cannot be replaced.
    pub fn adopt(&mut self, change: &Change) -> Result<(), JournalError> {
        self.check()?;
        change.check_files(&self.view.shelf(), &self.manifest)?;
        if matches!(change, Change::Checkpoint(_)) {
            self.prove_durably()?;
        }
        let newest = self.open.synced_head.map(|head| head.epoch);
        let mut changed = self.manifest.clone();
        change.apply(&mut changed, newest)?;
        change.forget_damages(&self.view.shelf(), &mut changed)?;
        self.leases.retain(|(_, lease)| lease.strong_count() > 0);
        self.leases.push((self.manifest.change, self.view.lease()));
        let before = self.named_files(change);
        self.change(|manifest| *manifest = changed)?;
        // What is kept open takes its room on the disk, whether it has a name or not.
        before.difference(&self.named_files(change)).for_each(|file| self.caches.forget(*file));
        Ok(())
    }

    /// The files that the manifest names, as far as the change may do away with them: to tell packs is to read image indexes.
    fn named_files(&self, change: &Change) -> HashSet<FileId> {
        let segments = self.manifest.sealed.iter().map(SealedSegment::id);
        let releases = matches!(change, Change::Release { checkpoints, .. } if !checkpoints.is_empty());
        let packs = if releases { self.view.packs() } else { Vec::new() };
        segments.chain(packs.iter().map(|pack| pack.id)).collect()
    }

    /// The oldest change of the manifest that a view here may still go by; `None` where all go by the present one.
    #[must_use]
    pub fn oldest_lease(&self) -> Option<u64> {
        let held = self.leases.iter().filter(|(_, lease)| lease.strong_count() > 0);
        held.map(|(change, _)| *change).min()
    }

    /// Has readers look anew for what stands beside the manifest: repairs. Not of a journal that stopped: what it has in memory may
    /// be half of a change.
    pub fn look_again(&mut self) {
        if self.poisoned.is_none() {
            self.publish();
        }
    }

    /// The group's volumes, as the newest attempt told them.
    #[must_use]
    pub fn volumes(&self) -> &[Volume] {
        &self.place.volumes
    }

    fn mark(&mut self, epoch: Epoch, set: impl FnOnce(&mut Mark)) -> Result<(), JournalError> {
        self.view.listed(epoch)?.ok_or(JournalError::NoPoint(epoch))?;
        self.change(|manifest| set(manifest.marks.entry(epoch).or_default()))
    }

    fn change(&mut self, set: impl FnOnce(&mut Manifest)) -> Result<(), JournalError> {
        self.check()?;
        set(&mut self.manifest);
        // A crash leaves the old manifest or the new one; after a failure nobody knows which.
        let written = self.manifest.write(self.storage.as_ref(), &self.folder);
        self.latch(written)?;
        self.publish();
        Ok(())
    }

    /// Takes a frame that a source sent; durable only after `sync`. `frame` was decoded for this group.
    ///
    /// # Errors
    /// Where it does not follow (nothing changed), the group is frozen, or the storage fails (nothing is taken any more).
    pub fn append(&mut self, frame: &Frame<'_>, received: Timestamp) -> Result<Step, JournalError> {
        self.check()?;
        if let Some(reason) = &self.manifest.frozen {
            return Err(JournalError::Frozen(reason.clone()));
        }
        if frame.header.kind == Kind::Synced {
            return Err(JournalError::NotFromASource);
        }
        let step = self.place.chain.step(frame, frame.hash())?;
        if step == Step::Duplicate {
            return Ok(step);
        }
        if frame.header.kind == Kind::Begin {
            self.place.volumes = self.place.chain.open().map(|open| open.volumes.clone()).unwrap_or_default();
        }
        if frame.header.kind == Kind::Commit {
            // So that the point's receive time is on disk; what it proves was proven before.
            self.open.time = received;
            let proof = self.proof();
            self.open.pending.extend_from_slice(&proof);
        }
        let offset = self.open.end();
        let mut index = self.open.index.write().unwrap_or_else(PoisonError::into_inner);
        index.follow(frame, step.clone(), offset, received, &self.place.volumes);
        let extents = index.len();
        drop(index);
        self.open.dirty = true;
        if frame.bytes.len() > GATHERED_BYTES_MAX {
            self.write_through(frame.bytes)?;
        } else {
            self.open.pending.extend_from_slice(frame.bytes);
            if self.open.pending.len() >= PENDING_BYTES_MAX {
                self.write_pending()?;
            }
        }
        // So that neither a segment nor its index grows without bound where an attempt has no end.
        if self.open.end() - self.open.synced >= self.limits.segment_bytes_max || extents >= EXTENTS_MAX {
            self.sync()?;
        }
        Ok(step)
    }

    /// Makes everything appended durable, then visible. What `append` called committed or ended may be acked after it.
    ///
    /// # Errors
    /// Where the storage fails: nothing since the last sync may be acked, and nothing is taken any more.
    pub fn sync(&mut self) -> Result<(), JournalError> {
        self.check()?;
        if !self.open.dirty {
            return Ok(());
        }
        self.write_pending()?;
        // A crash here leaves any part of the bytes since the last sync; after a failure the page cache may have dropped
        // them, and a second sync would say that all is well.
        let synced = self.open.file.sync().map_err(JournalError::io("sync", &self.open.path));
        self.latch(synced)?;
        self.open.synced = self.open.end();
        self.open.synced_head = self.place.chain.head().map(|(head, _)| head);
        self.open.dirty = false;
        self.view = Arc::new(self.view.advanced(self.open.synced));
        // What follows is not what the caller waits for: a failure is remembered and met by the next call.
        let _remembered = self.after_sync();
        Ok(())
    }

    /// Writes down that the sync succeeded, and seals the segment if it is full.
    fn after_sync(&mut self) -> Result<(), JournalError> {
        self.prove()?;
        let extents = self.open.index.read().unwrap_or_else(PoisonError::into_inner).len();
        if self.open.end() >= self.limits.segment_bytes_max || extents >= EXTENTS_MAX {
            self.roll()?;
        }
        Ok(())
    }

    /// Appends the proof of the last sync, itself not synced.
    pub(super) fn prove(&mut self) -> Result<(), JournalError> {
        let proof = self.proof();
        self.open.pending.extend_from_slice(&proof);
        self.write_pending()
    }

    /// Makes the proof of the last sync durable. A checkpoint stands on a point: rot there is then never taken for a torn tail,
    /// which would have another point given its number.
    fn prove_durably(&mut self) -> Result<(), JournalError> {
        self.sync()?;
        self.check()?;
        let synced = self.open.file.sync().map_err(JournalError::io("sync", &self.open.path));
        self.latch(synced)
    }

    fn proof(&self) -> Vec<u8> {
        let (segment, offset, head) = (self.manifest.open, self.open.synced, self.open.synced_head);
        let record = Synced { segment, offset, head, time: self.open.time };
        synced_frame(&self.manifest.identity.group, self.place.chain.generation(), &record)
    }

    /// Seals the open segment and starts the next one. Nothing but a synced record is unsynced.
    pub(super) fn roll(&mut self) -> Result<(), JournalError> {
        let rolled = self.try_roll();
        self.latch(rolled)?;
        self.publish();
        Ok(())
    }

    fn try_roll(&mut self) -> Result<(), JournalError> {
        let frames_end = self.open.end();
        let index = self.open.index.read().unwrap_or_else(PoisonError::into_inner).clone();
        let (footer, bytes) = Footer::build(frames_end, &index.encode());
        // A crash from here on leaves the frames with an index, whole or in part, behind them: recovery cuts it off and
        // goes on with the segment.
        let written = self.open.file.write_at(&bytes, frames_end).and_then(|()| self.open.file.sync());
        written.map_err(JournalError::io("seal segment", &self.open.path))?;
        let sealed = SealedSegment {
            number: self.manifest.open,
            revision: 0,
            len: frames_end + bytes.len() as u64,
            frames_end,
            footer_hash: footer.hash(),
            points: index.point_range(),
            newest_run: index.newest_run(),
        };
        let number = self.manifest.open + 1;
        let header = Header { group: self.manifest.identity.group, number, place: self.place.clone() }.encode();
        // A crash from here on leaves a segment that no manifest names: it is made anew at the next roll.
        let next = create_segment(self.storage.as_ref(), &self.folder, number, &header)?;
        self.manifest.sealed.push(sealed);
        self.manifest.open = number;
        self.manifest.open_header = header;
        // A crash leaves the old manifest (see above) or the new one.
        self.manifest.write(self.storage.as_ref(), &self.folder)?;
        let (synced_head, time) = (self.open.synced_head, self.open.time);
        self.open = OpenSegment { synced_head, time, ..next };
        Ok(())
    }

    fn write_pending(&mut self) -> Result<(), JournalError> {
        let written = self.open.write_pending().map_err(JournalError::io("append to", &self.open.path));
        self.latch(written)
    }

    /// Writes what is pending, and `bytes` behind it.
    fn write_through(&mut self, bytes: &[u8]) -> Result<(), JournalError> {
        if !self.open.pending.is_empty() {
            self.write_pending()?;
        }
        // A crash here leaves any part of them, as of what was pending: a torn tail.
        let written = self.open.file.write_at(bytes, self.open.written);
        self.latch(written.map_err(JournalError::io("append to", &self.open.path)))?;
        self.open.written += bytes.len() as u64;
        Ok(())
    }

    fn publish(&mut self) {
        self.view = Arc::new(GroupView::of(
            Arc::clone(&self.storage),
            &self.folder,
            &self.manifest,
            Arc::clone(&self.open.index),
            self.open.synced,
            Arc::clone(&self.caches),
        ));
    }

    fn check(&self) -> Result<(), JournalError> {
        match &self.poisoned {
            Some((cause, full)) => Err(JournalError::Poisoned { cause: cause.clone(), full: *full }),
            None => Ok(()),
        }
    }

    fn latch<T>(&mut self, result: Result<T, JournalError>) -> Result<T, JournalError> {
        if let Err(error) = &result {
            self.poisoned.get_or_insert_with(|| (error.to_string(), error.is_full()));
        }
        result
    }
}

/// The one history that `text` names.
fn choose(claims: &[Claim], text: &str, is_forked: bool) -> Result<Claim, JournalError> {
    if !is_forked {
        return Err(JournalError::NotForked);
    }
    let (place, prefix) = text.split_once(':').unwrap_or((text, ""));
    let (generation, epoch) = place.split_once('/').map_or((None, place), |(of, epoch)| (Some(of), epoch));
    let named = |claim: &&Claim| {
        generation.is_none_or(|of| claim.generation.to_string() == of)
            && claim.head.epoch.to_string() == epoch
            && claim.head.hash.to_string().starts_with(&prefix.to_lowercase())
    };
    match claims.iter().filter(named).collect::<Vec<_>>().as_slice() {
        [one] => Ok(**one),
        found => Err(JournalError::NoHistory {
            named: text.to_owned(),
            is_ambiguous: !found.is_empty(),
            known: claims.iter().copied().map(short_claim).collect(),
        }),
    }
}

/// The end of a history as people read and write it: generation, epoch and enough of the hash. The generation belongs to it:
/// a source that was granted one stands at the journal's newest point, and so may the one that made the point.
#[must_use]
pub fn short_claim(claim: Claim) -> String {
    let Claim { generation, head } = claim;
    let hash = head.hash.to_string();
    format!("{generation}/{}:{}", head.epoch, hash.get(..12).unwrap_or(&hash))
}

/// Makes a segment of nothing but its header, durable with its name; replaces one that no manifest names.
pub(super) fn create_segment(
    storage: &dyn Storage,
    folder: &Path,
    number: u64,
    header: &[u8],
) -> Result<OpenSegment, JournalError> {
    let path = segment::path(folder, number);
    match storage.remove(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(JournalError::io("remove leftover", &path)(error));
        }
        _ => {}
    }
    let file = storage.create_new(&path).map_err(JournalError::io("create", &path))?;
    file.write_at(header, 0).and_then(|()| file.sync()).map_err(JournalError::io("write header of", &path))?;
    let parent = folder.join("journal");
    storage.sync_dir(&parent).map_err(JournalError::io("sync folder", &parent))?;
    let written = header.len() as u64;
    Ok(OpenSegment {
        path,
        file,
        index: Arc::default(),
        pending: Vec::new(),
        written,
        synced: written,
        synced_head: None,
        dirty: false,
        time: Timestamp(0),
    })
}

/// The frame of a synced record.
pub(crate) fn synced_frame(group: &GroupId, generation: Generation, record: &Synced) -> Vec<u8> {
    let payload = record.encode();
    let header = frame::Header {
        kind: Kind::Synced,
        encoding: Encoding::Raw,
        volume: VolumeSlot(0),
        epoch: record.head.map_or(Epoch(0), |head| head.epoch),
        generation,
        attempt: AttemptId::default(),
        sequence: Sequence(0),
        resealed: false,
        payload_len: payload.len() as u32,
        content_len: 0,
        digests_len: 0,
        extents: Vec::new(),
    };
    frame::encode(group, &header, &payload)
}
