//! Compressing one frame after the other, and knowing when it is of no use.
//!
//! Content that does not shrink comes in stretches (films, archives, encrypted files). After a few frames that did not, only
//! samples of the next are tried, taken at other places each time, until one shrinks. What is given back is shorter than
//! the content or nothing. Does not frame or seal.

use crate::limits::CONTENT_BLOCKS_MAX;
use crate::units::BLOCK_BYTES;

/// Frames in a row that did not shrink after which samples decide.
const FUTILE_MAX: u32 = 4;
/// One of so many blocks is a sample.
const SAMPLE_EVERY: usize = 8;
const _: () = assert!(CONTENT_BLOCKS_MAX >= SAMPLE_EVERY, "a full frame has samples");

/// Memory and evidence for compressing one frame after the other.
pub struct Packer {
    table: lz4_flex::block::CompressTable,
    packed: Vec<u8>,
    /// Frames tried in a row that did not shrink.
    futile: u32,
    /// Where the next samples are taken from.
    turn: usize,
}

impl Default for Packer {
    fn default() -> Self {
        Self { table: lz4_flex::block::CompressTable::large(), packed: Vec::new(), futile: 0, turn: 0 }
    }
}

impl Packer {
    /// `content` compressed, where that is shorter and worth trying.
    pub(crate) fn pack(&mut self, content: &[u8]) -> Option<&[u8]> {
        if self.futile >= FUTILE_MAX && !self.a_sample_shrinks(content) {
            return None;
        }
        let len = self.compress(content);
        let shrinks = len < content.len();
        self.futile = if shrinks { 0 } else { self.futile.saturating_add(1) };
        shrinks.then(|| &self.packed[..len])
    }

    fn a_sample_shrinks(&mut self, content: &[u8]) -> bool {
        self.turn = (self.turn + 1) % SAMPLE_EVERY;
        // A short frame may have no block at that place; its first one is its sample then.
        let first = if self.turn * BLOCK_BYTES < content.len() { self.turn } else { 0 };
        let mut samples = content.chunks_exact(BLOCK_BYTES).skip(first).step_by(SAMPLE_EVERY);
        samples.any(|sample| self.compress(sample) < sample.len())
    }

    fn compress(&mut self, content: &[u8]) -> usize {
        let bound = lz4_flex::block::get_maximum_output_size(content.len());
        if self.packed.len() < bound {
            self.packed.resize(bound, 0);
        }
        lz4_flex::block::compress_into_with_table(content, &mut self.packed, &mut self.table)
            .expect("the buffer has the bound's size")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(blocks: usize) -> Vec<u8> {
        let mut noise = vec![0; blocks * BLOCK_BYTES];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        noise
    }

    fn text(blocks: usize) -> Vec<u8> {
        b"the same line again\n".repeat(7000)[..blocks * BLOCK_BYTES].to_vec()
    }

    fn after_much_noise() -> Packer {
        let mut packer = Packer::default();
        for _ in 0..2 * FUTILE_MAX {
            assert!(packer.pack(&noise(CONTENT_BLOCKS_MAX)).is_none());
        }
        packer
    }

    #[test]
    fn what_does_not_shrink_is_soon_only_sampled() {
        assert_eq!(after_much_noise().futile, FUTILE_MAX);
    }

    #[test]
    fn what_shrinks_is_compressed_at_once_however_much_did_not() {
        for blocks in [1, 2, 9, CONTENT_BLOCKS_MAX] {
            let mut packer = after_much_noise();
            assert!(packer.pack(&text(blocks)).is_some_and(|packed| packed.len() < blocks * BLOCK_BYTES / 4));
            assert_eq!(packer.futile, 0);
        }
    }

    #[test]
    fn a_single_block_that_shrinks_is_found_within_a_turn_of_samples() {
        let mut packer = after_much_noise();
        let mut content = noise(CONTENT_BLOCKS_MAX);
        content[13 * BLOCK_BYTES..14 * BLOCK_BYTES].copy_from_slice(&text(1));
        assert!((0..SAMPLE_EVERY).any(|_| packer.pack(&content).is_some()));
    }
}
