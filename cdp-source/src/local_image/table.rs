//! Where the newest frame of each block begins, while an image is made: 8 bytes a block, in a sparse file beside it.
//!
//! So memory does not grow with the volumes. It is of no use to anybody but the one who makes the image, and is gone with it: nothing in it
//! is synced, and nothing that a crash leaves of it is read.

use super::format::{Place, SLICE_BLOCKS, slices_of};
use cdp_seams::storage::StorageFile;
use std::io;

const ENTRY_BYTES: u64 = 8;

/// The table of all volumes.
pub(super) struct Table {
    file: Box<dyn StorageFile>,
    /// Where each volume's entries begin.
    starts: Vec<u64>,
}

impl Table {
    /// In a file that is empty, for volumes of these sizes. Every block is zeros.
    pub(super) fn new(file: Box<dyn StorageFile>, size_bytes: &[u64]) -> io::Result<Self> {
        let (mut starts, mut end) = (Vec::new(), 0);
        for size_bytes in size_bytes {
            starts.push(end);
            end += u64::from(slices_of(*size_bytes)) * u64::from(SLICE_BLOCKS) * ENTRY_BYTES;
        }
        file.set_len(end)?;
        Ok(Self { file, starts })
    }

    /// Blocks one after the other have their content there now.
    pub(super) fn set(&self, volume: usize, start: u32, count: u32, place: Place) -> io::Result<()> {
        let at = self.starts[volume] + u64::from(start) * ENTRY_BYTES;
        for (number, step) in (0..count).step_by(SLICE_BLOCKS as usize).enumerate() {
            let count = (count - step).min(SLICE_BLOCKS);
            let at = at + number as u64 * u64::from(SLICE_BLOCKS) * ENTRY_BYTES;
            // Zeros that are zeros already are not written: the file stays sparse.
            if place == Place::Zeros && self.read(at, count)?.iter().all(|byte| *byte == 0) {
                continue;
            }
            let entries = place.number().to_le_bytes().repeat(count as usize);
            self.file.write_at(&entries, at)?;
        }
        Ok(())
    }

    /// The places of a slice's blocks.
    pub(super) fn slice(&self, volume: usize, slice: u32) -> io::Result<Vec<Place>> {
        let at = self.starts[volume] + u64::from(slice) * u64::from(SLICE_BLOCKS) * ENTRY_BYTES;
        let bytes = self.read(at, SLICE_BLOCKS)?;
        let of = |entry: &[u8; 8]| {
            Place::of(u64::from_le_bytes(*entry))
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the table holds what was not written to it"))
        };
        bytes.as_chunks::<8>().0.iter().map(of).collect()
    }

    fn read(&self, at: u64, count: u32) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; count as usize * ENTRY_BYTES as usize];
        if self.file.read_at(&mut bytes, at)? == bytes.len() {
            return Ok(bytes);
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}
