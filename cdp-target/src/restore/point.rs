//! A recovery point's content, block by block.
//!
//! Invariant: what is handed out was verified frame by frame (checksum, seal); a block that is damaged or was never sent
//! is an error, never zeros and never older content. Where a frame is damaged and has a repair, that is verified and handed out.
//! Nothing is loaded whole: a few decoded frames are kept.

use crate::journal::file::FileId;
use crate::journal::index::{CommitEntry, Entry, EntryKind, Run};
use crate::journal::pieces::{Piece, PiecePlace};
use crate::journal::{GroupView, JournalError};
use crate::restore::frames::FrameCache;
use crate::restore::keyring::Keyring;
use cdp_protocol::frame::{self, Frame};
use cdp_protocol::record::Volume;
use cdp_protocol::units::{BLOCK_BYTES, Block, Epoch, Extent, Head, VolumeSlot};
use std::sync::Arc;

/// Memory for the decoded frames of a point that is opened alone: 64 of 128 KiB.
const FRAMES_BYTES_MAX: usize = 8 << 20;
/// Blocks that are looked up at once: 32 MiB.
const WINDOW_BLOCKS: u32 = 8192;

/// What a frame holds, verified.
#[derive(Default)]
pub(crate) struct Opened {
    extents: Vec<Extent>,
    /// Nothing where the blocks have no content.
    content: Vec<u8>,
}

impl Opened {
    #[cfg(test)]
    pub(super) const fn of(extents: Vec<Extent>, content: Vec<u8>) -> Self {
        Self { extents, content }
    }

    /// Memory that it takes, about.
    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>() + self.extents.capacity() * size_of::<Extent>() + self.content.capacity()
    }

    /// The content of blocks that lie within one of its extents.
    pub(crate) fn blocks(&self, wanted: Extent) -> Option<&[u8]> {
        let mut before = 0;
        for extent in &self.extents {
            if extent.start <= wanted.start && wanted.end() <= extent.end() {
                let from = before + (wanted.start.0 - extent.start.0) as usize;
                return self.content.get(from * BLOCK_BYTES..(from + wanted.count as usize) * BLOCK_BYTES);
            }
            before += extent.count as usize;
        }
        None
    }
}

/// A recovery point, open to be read by as many threads as like to.
pub struct PointImage {
    view: Arc<GroupView>,
    commit: CommitEntry,
    keys: Keyring,
    frames: Arc<FrameCache>,
    /// Whose files are meant in `frames`.
    owner: u64,
}

/// What some blocks hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// These bytes.
    Bytes(&'a [u8]),
    /// Zeros.
    Zero,
    /// The source's device could not read them.
    Unreadable,
}

/// Why blocks cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// No such volume at that point.
    #[error("point {epoch} has no volume in slot {slot}")]
    NoVolume {
        /// The point.
        epoch: Epoch,
        /// The slot.
        slot: VolumeSlot,
    },
    /// The frame that holds them is damaged.
    #[error("read volume {slot} blocks {}..{} of point {epoch}: {what}", extent.start, extent.end())]
    Damaged {
        /// The point.
        epoch: Epoch,
        /// The volume.
        slot: VolumeSlot,
        /// The blocks.
        extent: Extent,
        /// What is wrong.
        what: String,
    },
    /// They were never sent.
    #[error("volume {slot} blocks {}..{} are not covered by point {epoch}", extent.start, extent.end())]
    NotCovered {
        /// The point.
        epoch: Epoch,
        /// The volume.
        slot: VolumeSlot,
        /// The blocks.
        extent: Extent,
    },
    /// The journal cannot be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

impl PointImage {
    pub(crate) fn new(view: Arc<GroupView>, commit: CommitEntry, keys: Keyring) -> Self {
        Self { view, commit, keys, frames: Arc::new(FrameCache::new(FRAMES_BYTES_MAX)), owner: 0 }
    }

    /// The same with decoded frames that other points keep theirs in, too. Only points of one view may have one `owner`.
    #[must_use]
    pub fn sharing(self, frames: &Arc<FrameCache>, owner: u64) -> Self {
        Self { frames: Arc::clone(frames), owner, ..self }
    }

    /// The point.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.commit.head.epoch
    }

    /// The point, with the hash of its commit.
    #[must_use]
    pub const fn head(&self) -> Head {
        self.commit.head
    }

    /// Its volumes.
    #[must_use]
    pub fn volumes(&self) -> &[Volume] {
        &self.commit.volumes
    }

    /// Hands out the blocks of `extent` in order, all of them, in runs of one kind.
    ///
    /// # Errors
    /// Where a block is damaged or was never sent; what stands before it has been handed out.
    pub fn read_blocks(
        &self,
        slot: VolumeSlot,
        extent: Extent,
        out: &mut dyn FnMut(Extent, Content<'_>),
    ) -> Result<(), ReadError> {
        self.resolve_windows(slot, extent, &mut |piece| self.read_or_go_round(slot, piece, out))
    }

    /// Tells of the blocks of `extent` in order, all of them, which are known to be zeros; reads none of them. The others may be
    /// anything, damaged too.
    ///
    /// # Errors
    /// Where there is no such volume, or the indexes cannot be read.
    pub fn map_blocks(
        &self,
        slot: VolumeSlot,
        extent: Extent,
        out: &mut dyn FnMut(Extent, bool),
    ) -> Result<(), ReadError> {
        self.resolve_windows(slot, extent, &mut |piece| {
            let is_zero = match &piece.place {
                PiecePlace::Zero => true,
                PiecePlace::Frame { entry, .. } => entry.kind == EntryKind::Hole,
                PiecePlace::Damaged(_) | PiecePlace::NotCovered => false,
            };
            out(piece.extent, is_zero);
            Ok(())
        })
    }

    /// Where the blocks of `extent` are, piece by piece, looked up a window at a time.
    fn resolve_windows(
        &self,
        slot: VolumeSlot,
        extent: Extent,
        take: &mut dyn FnMut(&Piece) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        if !self.commit.volumes.iter().any(|volume| volume.slot == slot) {
            return Err(ReadError::NoVolume { epoch: self.epoch(), slot });
        }
        let mut start = u64::from(extent.start.0);
        while start < extent.end() {
            let count = (extent.end() - start).min(u64::from(WINDOW_BLOCKS)) as u32;
            let window = Extent::new(Block(start as u32), count).expect("a part of an extent");
            self.view.resolve(&self.commit, slot, window)?.iter().try_for_each(&mut *take)?;
            start += u64::from(count);
        }
        Ok(())
    }

    /// Hands out the runs of `extent` that may hold anything but zeros, in order, by the index alone.
    ///
    /// # Errors
    /// Where the index cannot be read.
    pub fn content_of(&self, slot: VolumeSlot, extent: Extent, out: &mut dyn FnMut(Extent)) -> Result<(), ReadError> {
        let mut start = u64::from(extent.start.0);
        while start < extent.end() {
            let count = (extent.end() - start).min(u64::from(WINDOW_BLOCKS)) as u32;
            let window = Extent::new(Block(start as u32), count).expect("a part of an extent");
            for piece in self.view.resolve(&self.commit, slot, window)? {
                let is_hole = match &piece.place {
                    PiecePlace::Frame { entry, .. } => entry.kind == EntryKind::Hole,
                    PiecePlace::Zero => true,
                    PiecePlace::Damaged(_) | PiecePlace::NotCovered => false,
                };
                if !is_hole {
                    out(piece.extent);
                }
            }
            start += u64::from(count);
        }
        Ok(())
    }

    /// Reads a piece; where a checkpoint's pack turns out to be damaged, what it was made from, as long as that is there.
    fn read_or_go_round(
        &self,
        slot: VolumeSlot,
        piece: &Piece,
        out: &mut dyn FnMut(Extent, Content<'_>),
    ) -> Result<(), ReadError> {
        let mut given = false;
        let mut give = |extent: Extent, content: Content<'_>| {
            given = true;
            out(extent, content);
        };
        let caches = self.view.shelf().caches;
        let failed_before = caches.failed_reads();
        match (self.read_piece(slot, piece, &mut give), &piece.place) {
            (Err(error @ ReadError::Damaged { .. }), PiecePlace::Frame { file: FileId::Slice(slice), .. })
                if !given =>
            {
                let was_bad = caches.is_bad(*slice);
                if !was_bad {
                    tracing::error!(%slice, error = %error, "a checkpoint is damaged: reading what it was made from");
                }
                let is_passing = !was_bad && caches.failed_reads() != failed_before;
                caches.note_bad(*slice);
                // Where it is the floor's, there is no way round.
                let is_same = |piece: &Piece| matches!(piece.place, PiecePlace::Frame { file, .. } if file == FileId::Slice(*slice));
                let pieces = self.view.resolve(&self.commit, slot, piece.extent).map_err(ReadError::from);
                let around = match pieces {
                    Ok(pieces) if pieces.iter().any(is_same) => Err(error),
                    pieces => pieces
                        .and_then(|pieces| pieces.iter().try_for_each(|piece| self.read_or_go_round(slot, piece, out))),
                };
                // Another time it may be read.
                if is_passing {
                    caches.forget_bad(*slice);
                }
                around
            }
            (read, _) => read,
        }
    }

    fn read_piece(
        &self,
        slot: VolumeSlot,
        piece: &Piece,
        out: &mut dyn FnMut(Extent, Content<'_>),
    ) -> Result<(), ReadError> {
        let (epoch, extent) = (self.epoch(), piece.extent);
        match &piece.place {
            PiecePlace::NotCovered => return Err(ReadError::NotCovered { epoch, slot, extent }),
            PiecePlace::Damaged(what) => {
                return Err(ReadError::Damaged { epoch, slot, extent, what: what.clone() });
            }
            PiecePlace::Zero => {
                out(extent, Content::Zero);
                return Ok(());
            }
            PiecePlace::Frame { .. } => {}
        }
        let PiecePlace::Frame { entry, .. } = &piece.place else { return Ok(()) };
        let opened = self.frame(slot, piece)?;
        match entry.kind {
            EntryKind::Hole => out(extent, Content::Zero),
            EntryKind::Unreadable => out(extent, Content::Unreadable),
            EntryKind::Lost => {
                let what = "they were lost before they were sealed anew".to_owned();
                return Err(ReadError::Damaged { epoch, slot, extent, what });
            }
            EntryKind::Content => {
                let bytes = opened.blocks(extent);
                let what = || "the index does not fit the frame".to_owned();
                let bytes = bytes.ok_or_else(|| ReadError::Damaged { epoch, slot, extent, what: what() })?;
                out(extent, Content::Bytes(bytes));
            }
        }
        Ok(())
    }

    /// What a piece's frame holds, verified.
    fn frame(&self, slot: VolumeSlot, piece: &Piece) -> Result<Arc<Opened>, ReadError> {
        let PiecePlace::Frame { file, entry, run } = &piece.place else {
            return Ok(Arc::default());
        };
        let place = (self.owner, *file, entry.frame_offset);
        self.frames.find(place, || read_frame(&self.view, &self.keys, *file, entry, run)).map_err(|error| match error {
            LoadError::Journal(error) => ReadError::Journal(error),
            LoadError::Damaged(what) => ReadError::Damaged {
                epoch: self.epoch(),
                slot,
                extent: piece.extent,
                what: format!("{file} at offset {}: {what}", entry.frame_offset),
            },
        })
    }
}

/// Reads and verifies the frame that holds an extent; where it is damaged, what stands for it.
pub(crate) fn read_frame(
    view: &GroupView,
    keys: &Keyring,
    file: FileId,
    entry: &Entry,
    run: &Run,
) -> Result<Opened, LoadError> {
    with_frame(view, file, entry, run, |frame| open(keys, frame))
}

/// Reads the frame that holds an extent, whole, for `take`; where it is damaged, or `take` finds that it is, what stands for it.
pub(crate) fn with_frame<T>(
    view: &GroupView,
    file: FileId,
    entry: &Entry,
    run: &Run,
    take: impl Fn(Frame<'_>) -> Result<T, LoadError>,
) -> Result<T, LoadError> {
    read_journal(view, file, entry, run, &take).or_else(|error| match error {
        LoadError::Damaged(what) => read_repair(view, file, entry, run, &take).ok_or(LoadError::Damaged(what)),
        error @ LoadError::Journal(_) => Err(error),
    })
}

fn read_journal<T>(
    view: &GroupView,
    file: FileId,
    entry: &Entry,
    run: &Run,
    take: impl Fn(Frame<'_>) -> Result<T, LoadError>,
) -> Result<T, LoadError> {
    let file = view.file(file).map_err(LoadError::Journal)?;
    let mut bytes = vec![0; (entry.frame_len as usize).min(frame::FRAME_BYTES_MAX)];
    let read = file.read_at(&mut bytes, entry.frame_offset);
    let read = read.map_err(|error| {
        view.shelf().caches.note_failed_read();
        LoadError::Damaged(format!("read: {error}"))
    })?;
    let group = view.identity().group;
    let frame = frame::decode(&group, &bytes[..read]).map_err(|error| LoadError::Damaged(error.to_string()))?;
    let header = &frame.header;
    let fits = header.volume == entry.slot && header.attempt == run.attempt && header.extents.contains(&entry.extent);
    if !fits {
        return Err(LoadError::Damaged("another frame than the index says".to_owned()));
    }
    take(frame)
}

/// Only of content: nothing else has a repair. One that does not have all of the blocks asked for is found out by `Opened::blocks`.
fn read_repair<T>(
    view: &GroupView,
    file: FileId,
    entry: &Entry,
    run: &Run,
    take: impl Fn(Frame<'_>) -> Result<T, LoadError>,
) -> Option<T> {
    let FileId::Segment { number, .. } = file else { return None };
    let repair = view.repair(number, entry.frame_offset, run)?;
    let frame = repair.frame();
    let fits = entry.kind == EntryKind::Content && frame.header.volume == entry.slot;
    if fits { take(frame).ok() } else { None }
}

fn open(keys: &Keyring, frame: Frame<'_>) -> Result<Opened, LoadError> {
    let content = keys.open(&frame).map_err(|error| LoadError::Damaged(error.to_string()))?;
    Ok(Opened { extents: frame.header.extents, content })
}

/// Why a frame cannot be had.
pub(crate) enum LoadError {
    Journal(JournalError),
    Damaged(String),
}
