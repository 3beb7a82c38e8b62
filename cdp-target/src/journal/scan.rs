//! Finds the frames in a file: one at a known offset, or the next one behind damage.
//!
//! Reads through a window of bounded size. Knows nothing of what frames mean.

use super::segment::{FOOTER_BYTES, Footer, INDEX_MAGIC};
use cdp_protocol::frame::{self, FRAME_BYTES_MAX, FrameError, Header, MAGIC};
use cdp_protocol::units::GroupId;
use cdp_seams::storage::StorageFile;
use std::io;

/// Bytes read at once; more than a frame.
const WINDOW_BYTES: usize = 1 << 20;

/// What stands at an offset.
pub(crate) enum Found<'a> {
    /// A valid frame.
    Frame(&'a [u8]),
    /// No valid frame; its header, where that is intact and the frame would fit.
    Bad(Option<Header>),
    /// The end.
    End,
}

/// A file of frames up to some end.
pub(crate) struct FrameScan<'a> {
    file: &'a dyn StorageFile,
    group: GroupId,
    end: u64,
    window: Vec<u8>,
    window_at: u64,
}

impl<'a> FrameScan<'a> {
    pub(crate) fn new(file: &'a dyn StorageFile, group: GroupId, end: u64) -> Self {
        Self { file, group, end, window: Vec::new(), window_at: 0 }
    }

    pub(crate) const fn end(&self) -> u64 {
        self.end
    }

    /// What stands at `offset`.
    pub(crate) fn at(&mut self, offset: u64) -> io::Result<Found<'_>> {
        if offset >= self.end {
            return Ok(Found::End);
        }
        let (group, available) = (self.group, self.end - offset);
        let bytes = self.fill(offset, FRAME_BYTES_MAX)?;
        match frame::decode(&group, bytes) {
            Ok(frame) => Ok(Found::Frame(frame.bytes)),
            Err(FrameError::PayloadCrc) => {
                let header = frame::decode_header(&group, bytes).ok();
                Ok(Found::Bad(header.filter(|header| header.frame_len() as u64 <= available)))
            }
            Err(_) => Ok(Found::Bad(None)),
        }
    }

    /// The first valid frame at or behind `from`.
    pub(crate) fn find(&mut self, from: u64) -> io::Result<Option<u64>> {
        let mut at = from;
        while at < self.end {
            let bytes = self.fill(at, WINDOW_BYTES / 2)?;
            if bytes.is_empty() {
                // The file was cut meanwhile: its writer recovers beside us.
                return Ok(None);
            }
            let Some(found) = bytes.windows(MAGIC.len()).position(|window| window == MAGIC) else {
                at += (bytes.len() - (MAGIC.len() - 1).min(bytes.len() - 1)) as u64;
                continue;
            };
            at += found as u64;
            if let Found::Frame(_) = self.at(at)? {
                return Ok(Some(at));
            }
            at += 1;
        }
        Ok(None)
    }

    /// The bytes from `from` to `to`, where they are no more than a record could be.
    pub(crate) fn bytes(&mut self, from: u64, to: u64) -> io::Result<Option<&[u8]>> {
        if to <= from || to - from > FRAME_BYTES_MAX as u64 || to > self.end {
            return Ok(None);
        }
        let len = (to - from) as usize;
        Ok(self.fill(from, len)?.get(..len))
    }

    /// Whether the index of a sealed segment begins at `offset` and is whole up to the file's end.
    pub(crate) fn is_index(&mut self, offset: u64) -> io::Result<bool> {
        let file_len = self.file.len()?;
        if !self.fill(offset, INDEX_MAGIC.len())?.starts_with(&INDEX_MAGIC) || file_len < FOOTER_BYTES as u64 {
            return Ok(false);
        }
        let mut bytes = vec![0; FOOTER_BYTES];
        let read = self.file.read_at(&mut bytes, file_len - FOOTER_BYTES as u64)?;
        Ok(Footer::decode(&bytes[..read], file_len).is_ok_and(|footer| footer.frames_end == offset))
    }

    /// At least `len` bytes from `offset` on, fewer at the end.
    fn fill(&mut self, offset: u64, len: usize) -> io::Result<&[u8]> {
        let wanted = (len as u64).min(self.end.saturating_sub(offset)) as usize;
        let from = offset.wrapping_sub(self.window_at) as usize;
        let there = offset >= self.window_at && self.window.len().checked_sub(from).is_some_and(|have| have >= wanted);
        if !there {
            let whole = (WINDOW_BYTES as u64).min(self.end.saturating_sub(offset)) as usize;
            self.window.resize(whole, 0);
            let read = self.file.read_at(&mut self.window, offset)?;
            self.window.truncate(read);
            self.window_at = offset;
        }
        let from = (offset - self.window_at) as usize;
        Ok(&self.window[from.min(self.window.len())..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_seams::storage::Storage;
    use cdp_seams::storage::sim::SimStorage;
    use std::path::Path;

    #[test]
    fn a_file_that_is_cut_while_it_is_read_ends_there() {
        let disk = SimStorage::new(1);
        let file = disk.create_new(Path::new("/segment")).expect("made");
        file.write_at(&[0xa5; 100], 0).expect("written");
        for known_len in [100, 101, 5000] {
            let mut scan = FrameScan::new(file.as_ref(), GroupId([7; 16]), known_len);
            assert_eq!(scan.find(0).expect("read"), None, "{known_len}");
            assert_eq!(scan.find(99).expect("read"), None, "{known_len}");
        }
    }
}
