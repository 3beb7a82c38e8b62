//! Aligned buffers: memory that `O_DIRECT` accepts on every device.
//!
//! Owns the one allocation; gives it out as a slice, or as a pointer for the kernel to write through.

#![allow(unsafe_code, reason = "std has no aligned buffer of a size known at run time")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Alignment in bytes: a page, and a sector of the largest kind.
pub const ALIGNMENT_BYTES: usize = 4096;

/// A buffer that starts at a multiple of `ALIGNMENT_BYTES`. All zeros at first.
#[derive(Debug)]
pub struct AlignedBuffer {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer is owned memory without any tie to a thread.
unsafe impl Send for AlignedBuffer {}
// SAFETY: through a shared reference it can only be read.
unsafe impl Sync for AlignedBuffer {}

impl AlignedBuffer {
    /// A buffer of `len` bytes, at least 1.
    #[must_use]
    pub fn new(len: usize) -> Self {
        assert!(len > 0, "a buffer is not empty");
        let layout = Layout::from_size_align(len, ALIGNMENT_BYTES).expect("a buffer's length is far below the bound");
        // SAFETY: the layout's size is not zero, as asserted above.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start, layout }
    }

    /// Where the buffer starts, for a kernel that writes into it. Whoever passes it on sees to it that the buffer
    /// outlives the operation and that no slice of it exists meanwhile.
    #[must_use]
    pub const fn as_mut_ptr(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` is valid for `layout.size()` initialised bytes for as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: `start` came from `alloc_zeroed` with this very layout and is given back once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_and_zero() {
        let mut buffer = AlignedBuffer::new(3 * ALIGNMENT_BYTES);
        assert_eq!(buffer.as_mut_ptr() as usize % ALIGNMENT_BYTES, 0);
        assert!(buffer.iter().all(|byte| *byte == 0));
        buffer[3 * ALIGNMENT_BYTES - 1] = 7;
        assert_eq!(buffer.last(), Some(&7));
    }
}
