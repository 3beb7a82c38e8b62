//! Reading blocks of live volumes: the trait of all readers.
//!
//! A mounted device is never read through the page cache: `O_DIRECT` only. A partition is read through its whole-disk node.

pub mod aligned;
pub mod pread;
pub mod uring;

use cdp_protocol::units::Extent;

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
pub type ReadDone<'a> = dyn FnMut(usize, Result<&[u8], std::io::Error>) + 'a;

/// Reads blocks of a group's volumes.
pub trait BlockReader: Send {
    /// Runs all requests, several at a time, in any order. `done` is called once for each as soon as it has returned,
    /// with its index and either all its bytes or the device's error. The last block of a volume that is not of whole
    /// blocks is filled up with zeros.
    ///
    /// # Errors
    /// Where reading itself is impossible (not where a device fails a request: that goes to `done`).
    fn read(&mut self, requests: &[ReadRequest], done: &mut ReadDone<'_>) -> std::io::Result<()>;
}
