//! Reading blocks of live volumes: the trait of all readers.
//!
//! A mounted device is never read through the page cache: `O_DIRECT` only. A partition is read through its whole-disk node.
//! Owns how a set of blocks becomes requests and how a failed request is narrowed down to the blocks at fault; the
//! readers themselves know nothing of either.

pub mod aligned;
#[cfg(test)]
mod conformance;
pub mod pread;
pub mod target;
pub mod uring;

use cdp_protocol::units::{BLOCK_BYTES, Block, Extent, blocks_in};
use roaring::RoaringBitmap;
use std::io;

pub use target::{OpenError, ReadTarget};

/// Blocks that one request may read: 128 KiB.
pub const READ_BLOCKS_MAX: u32 = 32;

/// One read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadRequest {
    /// Index of the volume.
    pub volume: usize,
    /// The blocks, at most `READ_BLOCKS_MAX`.
    pub extent: Extent,
}

/// Called once for each request, with its index.
pub type ReadDone<'a> = dyn FnMut(usize, io::Result<&[u8]>) + 'a;

/// Called once for each block: volume, block, its bytes or the device's error.
pub type BlockDone<'a> = dyn FnMut(usize, Block, io::Result<&[u8]>) + 'a;

/// Reads blocks of a group's volumes.
pub trait BlockReader: Send {
    /// Runs all requests, several at a time, in any order. `done` is called once for each as soon as it has returned,
    /// with its index and either all its bytes or the device's error. The last block of a volume that is not of whole
    /// blocks is filled up with zeros.
    ///
    /// # Errors
    /// Where reading itself is impossible (not where a device fails a request: that goes to `done`).
    fn read(&mut self, requests: &[ReadRequest], done: &mut ReadDone<'_>) -> io::Result<()>;
}

/// The best reader for these volumes: `io_uring`, or plain reads where the kernel has none to give or an image file's
/// file system has no `O_DIRECT`. Says in the log when it is not the first.
///
/// # Errors
/// Where a node cannot be opened, is too small, or is a device that cannot be read with `O_DIRECT`.
pub fn open(targets: &[ReadTarget]) -> Result<Box<dyn BlockReader>, OpenError> {
    match uring::UringReader::open(targets) {
        Ok(reader) => Ok(Box::new(reader)),
        Err(reason @ (OpenError::Uring(_) | OpenError::Direct(_))) => {
            let reader = pread::PreadReader::open(targets)?;
            tracing::warn!(%reason, direct = reader.is_direct(), "reading with plain reads, one at a time");
            Ok(Box::new(reader))
        }
        Err(error) => Err(error),
    }
}

/// The requests that read exactly `blocks` of a volume, in block order.
#[must_use]
pub fn requests_of(volume: usize, blocks: &RoaringBitmap) -> Vec<ReadRequest> {
    runs(blocks.iter(), READ_BLOCKS_MAX).into_iter().map(|extent| ReadRequest { volume, extent }).collect()
}

/// Ascending blocks as extents of at most `blocks_max`.
#[must_use]
pub fn runs(blocks: impl IntoIterator<Item = u32>, blocks_max: u32) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for block in blocks {
        match extents.last_mut() {
            Some(last) if last.end() == u64::from(block) && last.count < blocks_max => last.count += 1,
            _ => extents.push(Extent { start: Block(block), count: 1 }),
        }
    }
    extents
}

/// Reads all requests and gives the result block by block. A request that fails is read again a block at a time, so
/// that only the blocks at fault are given as errors.
///
/// # Errors
/// Where reading itself is impossible.
pub fn read_blocks(reader: &mut dyn BlockReader, requests: &[ReadRequest], done: &mut BlockDone<'_>) -> io::Result<()> {
    let mut again = Vec::new();
    reader.read(requests, &mut |index, result| {
        let ReadRequest { volume, extent } = requests[index];
        match result {
            Ok(bytes) => give(volume, extent, bytes, done),
            Err(error) if extent.count == 1 => done(volume, extent.start, Err(error)),
            Err(_) => {
                again.extend(extent.blocks().map(|start| ReadRequest { volume, extent: Extent { start, count: 1 } }));
            }
        }
    })?;
    if again.is_empty() {
        return Ok(());
    }
    reader.read(&again, &mut |index, result| done(again[index].volume, again[index].extent.start, result))
}

/// Reads bytes of a volume, from anywhere within it.
///
/// # Errors
/// Where any of them cannot be read.
pub fn read_at(reader: &mut dyn BlockReader, volume: usize, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    let end = offset + buffer.len() as u64;
    let (first, count) = (offset / BLOCK_BYTES as u64, blocks_in(end) - offset / BLOCK_BYTES as u64);
    let blocks = (first..first + count).map(|block| block as u32);
    let requests: Vec<ReadRequest> =
        runs(blocks, READ_BLOCKS_MAX).into_iter().map(|extent| ReadRequest { volume, extent }).collect();
    let mut failure = None;
    read_blocks(reader, &requests, &mut |_, block, result| match result {
        Ok(bytes) => put_block(block, bytes, offset, buffer),
        Err(error) => failure = Some(error),
    })?;
    failure.map_or(Ok(()), Err)
}

/// Puts what a block has of the bytes from `offset` on into the buffer for them.
pub(crate) fn put_block(block: Block, bytes: &[u8], offset: u64, buffer: &mut [u8]) {
    let start = block.to_bytes();
    let (from, to) = (start.max(offset), (start + BLOCK_BYTES as u64).min(offset + buffer.len() as u64));
    let piece = &bytes[(from - start) as usize..(to - start) as usize];
    buffer[(from - offset) as usize..(to - offset) as usize].copy_from_slice(piece);
}

fn give(volume: usize, extent: Extent, bytes: &[u8], done: &mut BlockDone<'_>) {
    assert_eq!(bytes.len() as u64, extent.to_bytes(), "a reader gives all bytes of a request or an error");
    for (block, bytes) in extent.blocks().zip(bytes.chunks_exact(BLOCK_BYTES)) {
        done(volume, block, Ok(bytes));
    }
}

/// Whether an error says that the medium has lost this block, and not that the device, the request or the kernel failed.
#[must_use]
pub fn is_medium_error(error: &io::Error) -> bool {
    use rustix::io::Errno;
    // What the block layer makes of a medium error, a failed integrity check and a target's own failure (blk_errors).
    [Errno::IO, Errno::NODATA, Errno::ILSEQ, Errno::REMOTEIO].contains(&match error.raw_os_error() {
        Some(code) => Errno::from_raw_os_error(code),
        None => return false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_whole_and_bounded() {
        let blocks: RoaringBitmap = (0..70).chain([80, u32::MAX - 1, u32::MAX]).collect();
        let extents: Vec<(u32, u32)> =
            runs(blocks.iter(), READ_BLOCKS_MAX).iter().map(|extent| (extent.start.0, extent.count)).collect();
        assert_eq!(extents, [(0, 32), (32, 32), (64, 6), (80, 1), (u32::MAX - 1, 2)]);
    }

    #[test]
    fn a_device_that_is_gone_is_no_medium_error() {
        assert!(is_medium_error(&rustix::io::Errno::IO.into()));
        assert!(!is_medium_error(&rustix::io::Errno::NXIO.into()));
        assert!(!is_medium_error(&io::ErrorKind::UnexpectedEof.into()));
    }
}
