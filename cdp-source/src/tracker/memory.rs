//! What tracking takes of the kernel's memory: known before any of it is taken.
//!
//! Follows docs/format/tracker-maps.md; a test holds it against the maps of a real tracking.

use super::bitmap::{ISSUED_WORDS, SPAN_WORDS};
use cdp_protocol::units::blocks_in;

/// Bitmaps with a bit a block: two of `dirty`, and `unacked`.
const BITMAPS: u64 = 3;
/// Everything whose size does not depend on the volumes: identity, memo, and a page or two for each small map.
const FIXED_BYTES: u64 = 256 * 1024;
const WORD_BYTES: u64 = 8;

/// Bytes of kernel memory that tracking one group with volumes of these sizes, in bytes, takes at most.
#[must_use]
pub fn kernel_memory_bytes(volumes: &[u64]) -> u64 {
    if volumes.is_empty() {
        return 0;
    }
    let spans: u64 = volumes.iter().map(|bytes| blocks_in(*bytes).div_ceil(SPAN_WORDS as u64 * 64)).sum();
    let words = spans * SPAN_WORDS as u64;
    (words * BITMAPS + spans * 2 + ISSUED_WORDS as u64 * 2) * WORD_BYTES + FIXED_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_proportional_to_the_size_and_counted_by_spans() {
        assert_eq!(kernel_memory_bytes(&[]), 0);
        let (small, large) = (kernel_memory_bytes(&[1]), kernel_memory_bytes(&[1 << 40]));
        assert_eq!(small, kernel_memory_bytes(&[1 << 30]));
        assert_eq!(large - small, (SPAN_WORDS as u64 * BITMAPS + 2) * WORD_BYTES * 1023);
        assert!(large < 160 << 20, "{large}");
    }
}
