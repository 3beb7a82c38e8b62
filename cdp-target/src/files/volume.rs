//! The bytes of a partition of a volume at a point.
//!
//! What is small is read by pieces that are kept, up to `PIECES_MAX`; content is read as it is asked for, and ahead of whoever reads in order.
//! Invariant: a read gives all of its bytes, or an error that says which byte of the volume cannot be had.

use super::tree::TreeError;
use crate::nbd::Disk;
use crate::nbd::ahead::{Ahead, Sequence};
use crate::nbd::disk::Run;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

/// Bytes of a piece.
const PIECE_BYTES: u64 = 32 << 10;
/// Pieces that are kept: 8 MiB.
const PIECES_MAX: usize = 256;

/// Bytes at offsets, of anything.
pub(crate) trait Bytes {
    /// Reads all of `buffer`.
    ///
    /// # Errors
    /// Where it cannot be read.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), TreeError>;

    /// Reads what is content, rather than the file system's own; those who read it in order are read ahead of.
    ///
    /// # Errors
    /// Where it cannot be read.
    fn read_content(&self, offset: u64, buffer: &mut [u8]) -> Result<(), TreeError> {
        self.read(offset, buffer)
    }

    /// How many there are.
    fn size_bytes(&self) -> u64;
}

/// Bytes that several hold.
pub(crate) type Shared = Rc<dyn Bytes>;

/// A part of a disk.
pub(crate) struct Window {
    disk: Arc<Disk>,
    ahead: Ahead,
    start: u64,
    size_bytes: u64,
    sequence: RefCell<Sequence>,
    pieces: RefCell<Pieces>,
}

/// The pieces that are kept, by number, each with when it was used last.
#[derive(Default)]
struct Pieces {
    kept: BTreeMap<u64, (u64, Vec<u8>)>,
    uses: u64,
}

impl Window {
    /// `size_bytes` bytes from `start` on.
    pub(crate) fn new(disk: Arc<Disk>, start: u64, size_bytes: u64) -> Self {
        let (sequence, pieces) = (RefCell::default(), RefCell::default());
        Self { disk, ahead: Ahead::start(), start, size_bytes, sequence, pieces }
    }

    fn check(&self, offset: u64, len: usize) -> Result<(), TreeError> {
        let is_within = offset.checked_add(len as u64).is_some_and(|end| end <= self.size_bytes);
        let reason = || {
            format!("bytes {offset} to {} lie behind its end, {}", offset.saturating_add(len as u64), self.size_bytes)
        };
        if is_within { Ok(()) } else { Err(TreeError::Damaged(reason())) }
    }

    fn read_piece(&self, number: u64) -> Result<Vec<u8>, TreeError> {
        let offset = number * PIECE_BYTES;
        let mut piece = vec![0; PIECE_BYTES.min(self.size_bytes - offset) as usize];
        read_disk(&self.disk, self.start + offset, &mut piece)?;
        Ok(piece)
    }

    /// Takes a part of one piece from what is kept, or keeps it.
    fn take_from_piece(&self, offset: u64, buffer: &mut [u8]) -> Result<(), TreeError> {
        let (number, within) = (offset / PIECE_BYTES, (offset % PIECE_BYTES) as usize);
        let mut pieces = self.pieces.borrow_mut();
        pieces.uses += 1;
        let now = pieces.uses;
        if let Some((used, piece)) = pieces.kept.get_mut(&number) {
            *used = now;
            buffer.copy_from_slice(&piece[within..within + buffer.len()]);
            return Ok(());
        }
        let Ok(piece) = self.read_piece(number) else {
            // What is lost may lie beside what is asked for.
            return read_disk(&self.disk, self.start + offset, buffer);
        };
        buffer.copy_from_slice(&piece[within..within + buffer.len()]);
        if pieces.kept.len() >= PIECES_MAX {
            let oldest = pieces.kept.iter().min_by_key(|(_, (used, _))| *used).map(|(number, _)| *number);
            oldest.and_then(|oldest| pieces.kept.remove(&oldest));
        }
        pieces.kept.insert(number, (now, piece));
        Ok(())
    }
}

impl Bytes for Window {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), TreeError> {
        self.check(offset, buffer.len())?;
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let len = (PIECE_BYTES - at % PIECE_BYTES).min(rest.len() as u64) as usize;
            let (part, behind) = rest.split_at_mut(len);
            self.take_from_piece(at, part)?;
            (at, rest) = (at + len as u64, behind);
        }
        Ok(())
    }

    fn read_content(&self, offset: u64, buffer: &mut [u8]) -> Result<(), TreeError> {
        self.check(offset, buffer.len())?;
        let at = self.start + offset;
        if let Some((from, len)) = self.sequence.borrow_mut().read(at, buffer.len() as u64) {
            self.ahead.read(&self.disk, from, len);
        }
        read_disk(&self.disk, at, buffer)
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
}

/// Reads bytes of a disk.
///
/// # Errors
/// Where one of them cannot be read.
pub(crate) fn read_disk(disk: &Disk, offset: u64, buffer: &mut [u8]) -> Result<(), TreeError> {
    let mut at = 0;
    let read = disk.read(offset, buffer.len() as u64, &mut |run| match run {
        Run::Bytes(bytes) => {
            buffer[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        }
        Run::Zeros(len) => {
            buffer[at..at + len as usize].fill(0);
            at += len as usize;
        }
    });
    read.map_err(|error| TreeError::Lost { offset: error.offset, reason: error.reason })
}

/// The number of `N` bytes at a place, little-endian; zero behind the end, which no reader takes for a number that is well.
pub(crate) fn le<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    if let Some(field) = bytes.get(at..).and_then(|rest| rest.get(..N)) {
        number[..N].copy_from_slice(field);
    }
    u64::from_le_bytes(number)
}

#[cfg(test)]
pub(crate) mod memory {
    //! Bytes in memory, for tests.

    use super::{Bytes, Shared, TreeError};
    use std::rc::Rc;

    struct Memory(Vec<u8>);

    impl Bytes for Memory {
        fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), TreeError> {
            let bytes = usize::try_from(offset).ok().and_then(|at| self.0.get(at..)?.get(..buffer.len()));
            buffer.copy_from_slice(bytes.ok_or_else(|| TreeError::Damaged("behind the end".into()))?);
            Ok(())
        }

        fn size_bytes(&self) -> u64 {
            self.0.len() as u64
        }
    }

    pub(crate) fn memory(bytes: Vec<u8>) -> Shared {
        Rc::new(Memory(bytes))
    }
}
