//! A recovery point's content, block by block.
//!
//! Invariant: what is handed out was verified frame by frame (checksum, seal); a block that is damaged or was never sent
//! is an error, never zeros and never older content. Nothing is loaded whole: a few decoded frames are kept.

use crate::journal::file::FileId;
use crate::journal::index::{CommitEntry, EntryKind};
use crate::journal::pieces::{Piece, PiecePlace};
use crate::journal::{GroupView, JournalError};
use crate::restore::keyring::Keyring;
use cdp_protocol::frame;
use cdp_protocol::record::Volume;
use cdp_protocol::units::{BLOCK_BYTES, Block, Epoch, Extent, VolumeSlot};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Decoded frames kept: 64 of at most 128 KiB.
const FRAMES_MAX: usize = 64;
/// Blocks that are looked up at once: 32 MiB.
const WINDOW_BLOCKS: u32 = 8192;

/// File and offset of a frame, and its content.
type DecodedFrame = (FileId, u64, Arc<Vec<u8>>);

/// A recovery point, open to be read.
pub struct PointImage {
    view: Arc<GroupView>,
    commit: CommitEntry,
    keys: Keyring,
    frames: Mutex<VecDeque<DecodedFrame>>,
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
    pub(crate) const fn new(view: Arc<GroupView>, commit: CommitEntry, keys: Keyring) -> Self {
        Self { view, commit, keys, frames: Mutex::new(VecDeque::new()) }
    }

    /// The point.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.commit.head.epoch
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
        let epoch = self.epoch();
        if !self.commit.volumes.iter().any(|volume| volume.slot == slot) {
            return Err(ReadError::NoVolume { epoch, slot });
        }
        let mut start = u64::from(extent.start.0);
        while start < extent.end() {
            let count = (extent.end() - start).min(u64::from(WINDOW_BLOCKS)) as u32;
            let window = Extent::new(Block(start as u32), count).expect("a part of an extent");
            for piece in self.view.resolve(&self.commit, slot, window)? {
                self.read_or_go_round(slot, &piece, out)?;
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
        match (self.read_piece(slot, piece, &mut give), &piece.place) {
            (Err(error @ ReadError::Damaged { .. }), PiecePlace::Frame { file: FileId::Slice(slice), .. }) if !given => {
                let caches = self.view.shelf().caches;
                if caches.is_bad(*slice) {
                    return Err(error);
                }
                tracing::error!(%slice, error = %error, "a checkpoint is damaged: reading what it was made from");
                caches.note_bad(*slice);
                for piece in self.view.resolve(&self.commit, slot, piece.extent)? {
                    self.read_or_go_round(slot, &piece, out)?;
                }
                Ok(())
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
        let content_block = match &piece.place {
            PiecePlace::NotCovered => return Err(ReadError::NotCovered { epoch, slot, extent }),
            PiecePlace::Damaged(what) => {
                return Err(ReadError::Damaged { epoch, slot, extent, what: what.clone() });
            }
            PiecePlace::Zero => {
                out(extent, Content::Zero);
                return Ok(());
            }
            PiecePlace::Frame { content_block, .. } => *content_block as usize,
        };
        let PiecePlace::Frame { entry, .. } = &piece.place else { return Ok(()) };
        let content = self.frame(slot, piece)?;
        match entry.kind {
            EntryKind::Hole => out(extent, Content::Zero),
            EntryKind::Unreadable => out(extent, Content::Unreadable),
            EntryKind::Lost => {
                let what = "they were lost before they were sealed anew".to_owned();
                return Err(ReadError::Damaged { epoch, slot, extent, what });
            }
            EntryKind::Content => {
                let from = content_block * BLOCK_BYTES;
                let bytes = content.get(from..from + extent.count as usize * BLOCK_BYTES);
                let what = || "the index does not fit the frame".to_owned();
                let bytes = bytes.ok_or_else(|| ReadError::Damaged { epoch, slot, extent, what: what() })?;
                out(extent, Content::Bytes(bytes));
            }
        }
        Ok(())
    }

    /// The opened content of a piece's frame, verified.
    fn frame(&self, slot: VolumeSlot, piece: &Piece) -> Result<Arc<Vec<u8>>, ReadError> {
        let PiecePlace::Frame { file, entry, .. } = &piece.place else {
            return Ok(Arc::default());
        };
        let mut frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        let known = frames.iter().find(|(of, at, _)| (of, at) == (file, &entry.frame_offset));
        if let Some((_, _, content)) = known {
            return Ok(Arc::clone(content));
        }
        let content = Arc::new(self.load(piece).map_err(|error| match error {
            LoadError::Journal(error) => ReadError::Journal(error),
            LoadError::Damaged(what) => ReadError::Damaged {
                epoch: self.epoch(),
                slot,
                extent: piece.extent,
                what: format!("{file} at offset {}: {what}", entry.frame_offset),
            },
        })?);
        if frames.len() >= FRAMES_MAX {
            frames.pop_front();
        }
        frames.push_back((*file, entry.frame_offset, Arc::clone(&content)));
        Ok(content)
    }

    fn load(&self, piece: &Piece) -> Result<Vec<u8>, LoadError> {
        let PiecePlace::Frame { file, entry, run, .. } = &piece.place else { return Ok(Vec::new()) };
        let file = self.view.file(*file).map_err(LoadError::Journal)?;
        let mut bytes = vec![0; (entry.frame_len as usize).min(frame::FRAME_BYTES_MAX)];
        let read = file.read_at(&mut bytes, entry.frame_offset);
        let read = read.map_err(|error| LoadError::Damaged(format!("read: {error}")))?;
        let group = self.view.identity().group;
        let frame = frame::decode(&group, &bytes[..read]).map_err(|error| LoadError::Damaged(error.to_string()))?;
        let header = &frame.header;
        let fits =
            header.volume == entry.slot && header.attempt == run.attempt && header.extents.contains(&entry.extent);
        if !fits {
            return Err(LoadError::Damaged("another frame than the index says".to_owned()));
        }
        self.keys.open(&frame).map_err(|error| LoadError::Damaged(error.to_string()))
    }
}

enum LoadError {
    Journal(JournalError),
    Damaged(String),
}
