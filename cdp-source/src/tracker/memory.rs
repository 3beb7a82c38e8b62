//! What tracking takes of the kernel's memory: known before any of it is taken.
//!
//! Follows docs/format/tracker-maps.md; a test holds it against the maps of a real tracking.

use super::bitmap::{ISSUED_WORDS, Place, SPAN_WORDS};
use cdp_protocol::units::blocks_in;

/// Bitmaps with a bit a block: two of `dirty`, `holes` and `unacked`.
const BITMAPS: u64 = 4;
/// Everything whose size does not depend on the volumes: identity, memo, tallies and gates, the ranges of bios on their
/// way, and a page or two for each small map.
const FIXED_BYTES: u64 = 4 << 20;
const WORD_BYTES: u64 = 8;

/// Bytes of kernel memory that tracking one group with volumes of these sizes, in bytes, takes at most.
#[must_use]
pub fn kernel_memory_bytes(volumes: &[u64]) -> u64 {
    if volumes.is_empty() {
        return 0;
    }
    let words = |bytes: &u64| Place { word_base: 0, blocks: blocks_in(*bytes) }.words() as u64;
    let words: u64 = volumes.iter().map(words).sum();
    let summaries = words / SPAN_WORDS as u64 * 2;
    (words * BITMAPS + summaries + ISSUED_WORDS as u64 * 2) * WORD_BYTES + FIXED_BYTES
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
        assert!(kernel_memory_bytes(&[9 << 40]) < kernel_memory_bytes(&[8 << 40]), "granules of four blocks");
    }
}
