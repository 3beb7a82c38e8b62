//! The one writer of a group's history.
//!
//! Invariant: data durable, then the point visible, then the ack. A failed write or sync is final: the journal takes
//! nothing more until it is opened anew, and no sync is ever tried twice. Blocking calls; owned by one thread. Takes no
//! lock: the store has one.

use super::index::OpenIndex;
use super::manifest::{Manifest, SealedSegment};
use super::removed::Removed;
use super::segment::{self, Footer, Header, Place};
use super::view::{Caches, GroupView, Lease};
use super::{GroupIdentity, JournalError, JournalLimits};
use cdp_protocol::frame::{self, Encoding, Frame, Kind};
use cdp_protocol::record::{Synced, Volume};
use cdp_protocol::session::chain::{Chain, Step};
use cdp_protocol::session::lineage::Lineage;
use cdp_protocol::session::target::Ruling;
use cdp_protocol::units::{AttemptId, Epoch, Generation, GroupId, Head, Sequence, Timestamp, VolumeSlot};
use cdp_seams::storage::{Storage, StorageFile};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

/// Bytes appended before they are written.
const PENDING_BYTES_MAX: usize = 1 << 20;
/// A frame so long is written from where it is, not gathered first: the copy costs more than the call.
const GATHERED_BYTES_MAX: usize = 64 << 10;
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

    /// Readers' view of what is durable.
    #[must_use]
    pub fn view(&self) -> Arc<GroupView> {
        Arc::clone(&self.view)
    }

    /// The group's volumes, as the newest attempt told them.
    #[must_use]
    pub fn volumes(&self) -> &[Volume] {
        &self.place.volumes
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
    pub(super) fn prove_durably(&mut self) -> Result<(), JournalError> {
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

    pub(super) fn publish(&mut self) {
        self.view = Arc::new(GroupView::of(
            Arc::clone(&self.storage),
            &self.folder,
            &self.manifest,
            Arc::clone(&self.open.index),
            self.open.synced,
            Arc::clone(&self.caches),
        ));
    }

    pub(super) fn check(&self) -> Result<(), JournalError> {
        match &self.poisoned {
            Some((cause, full)) => Err(JournalError::Poisoned { cause: cause.clone(), full: *full }),
            None => Ok(()),
        }
    }

    pub(super) fn latch<T>(&mut self, result: Result<T, JournalError>) -> Result<T, JournalError> {
        if let Err(error) = &result {
            self.poisoned.get_or_insert_with(|| (error.to_string(), error.is_full()));
        }
        result
    }
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
