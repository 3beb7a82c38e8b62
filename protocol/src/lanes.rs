//! Keyed BLAKE3 of many blocks side by side.
//!
//! A block has four chunks, and hashed alone it fills four lanes of a processor that has sixteen; the same chunk of many
//! blocks fills them all. The result is BLAKE3's, byte for byte: a test holds it to `blake3::keyed_hash`. Of the crate it
//! uses the functions that its own tree is built from; they are hidden in its documentation, so the lock file pins them.

use crate::units::BLOCK_BYTES;
use blake3::IncrementCounter;
use blake3::platform::Platform;

/// Bytes of a chunk, and of the hash of one.
const CHUNK_BYTES: usize = 1024;
const HASH_BYTES: usize = 32;
/// Chunks of a block: two parents and a root above them.
const CHUNKS: usize = BLOCK_BYTES / CHUNK_BYTES;
const _: () = assert!(CHUNKS == 4, "the tree below has two levels");
/// Below this a block alone fills as many lanes.
const BLOCKS_MIN: usize = 5;

const CHUNK_START: u8 = 1 << 0;
const CHUNK_END: u8 = 1 << 1;
const PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;
const KEYED: u8 = 1 << 4;

type Hash = [u8; HASH_BYTES];

/// The hash of each block of `blocks`, which are whole.
pub(crate) fn keyed_hashes(key: &[u8; 32], blocks: &[u8]) -> Vec<Hash> {
    let (blocks, rest) = blocks.as_chunks::<BLOCK_BYTES>();
    assert!(rest.is_empty(), "digests are of whole blocks");
    if blocks.len() < BLOCKS_MIN {
        return blocks.iter().map(|block| *blake3::keyed_hash(key, block).as_bytes()).collect();
    }
    let lanes = Lanes { platform: Platform::detect(), key: words(key) };
    let [a, b, c, d] = std::array::from_fn(|chunk| {
        let chunks: Vec<&[u8; CHUNK_BYTES]> = blocks.iter().map(|block| &block.as_chunks().0[chunk]).collect();
        lanes.hash(&chunks, chunk as u64, 0, (CHUNK_START, CHUNK_END))
    });
    let (left, right) = (lanes.parents(&a, &b, PARENT), lanes.parents(&c, &d, PARENT));
    lanes.parents(&left, &right, PARENT | ROOT)
}

struct Lanes {
    platform: Platform,
    key: [u32; 8],
}

impl Lanes {
    fn hash<const N: usize>(&self, inputs: &[&[u8; N]], counter: u64, flags: u8, ends: (u8, u8)) -> Vec<Hash> {
        let mut out = vec![[0; HASH_BYTES]; inputs.len()];
        let (flags, bytes) = (flags | KEYED, out.as_flattened_mut());
        self.platform.hash_many(inputs, &self.key, counter, IncrementCounter::No, flags, ends.0, ends.1, bytes);
        out
    }

    fn parents(&self, left: &[Hash], right: &[Hash], flags: u8) -> Vec<Hash> {
        let mut pairs = vec![[0; 2 * HASH_BYTES]; left.len()];
        for ((pair, left), right) in pairs.iter_mut().zip(left).zip(right) {
            pair[..HASH_BYTES].copy_from_slice(left);
            pair[HASH_BYTES..].copy_from_slice(right);
        }
        self.hash(&pairs.iter().collect::<Vec<_>>(), 0, flags, (0, 0))
    }
}

fn words(key: &[u8; 32]) -> [u32; 8] {
    let (words, _) = key.as_chunks::<4>();
    std::array::from_fn(|index| u32::from_le_bytes(words[index]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn side_by_side_or_alone_the_hashes_are_the_same() {
        let key = std::array::from_fn(|index| index as u8 * 7);
        let mut blocks = vec![0; 67 * BLOCK_BYTES];
        blake3::Hasher::new().finalize_xof().fill(&mut blocks);
        for count in (0..=67).filter(|count| *count < 20 || count % 16 < 2 || *count > 60) {
            let blocks = &blocks[..count * BLOCK_BYTES];
            let alone = blocks.chunks_exact(BLOCK_BYTES).map(|block| *blake3::keyed_hash(&key, block).as_bytes());
            assert_eq!(keyed_hashes(&key, blocks), alone.collect::<Vec<_>>(), "{count} blocks");
        }
    }
}
