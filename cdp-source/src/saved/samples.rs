//! Some blocks of a volume that are looked at instead of all of them: where file systems keep what changes with every mount, and a
//! few everywhere.
//!
//! What is written to none of them is not noticed here.

use crate::reader::{self, BlockReader};
use cdp_protocol::seal::{DIGEST_BYTES, Digest};
use cdp_protocol::units::Block;
use cdp_seams::random::{Random, array};
use roaring::RoaringBitmap;

/// Blocks at each end that are all looked at: 1 MiB. Superblocks, partition tables and their copies, LVM and md metadata lie there.
const END_BLOCKS: u64 = 256;
/// Blocks in between: one of each of so many stretches of the same length.
const BETWEEN: u64 = 256;

/// Which blocks of a volume of `blocks` to look at.
pub(super) fn choose(blocks: u64, random: &dyn Random) -> RoaringBitmap {
    let ends = (0..blocks.min(END_BLOCKS)).chain(blocks.saturating_sub(END_BLOCKS)..blocks);
    let mut chosen: RoaringBitmap = ends.map(|block| block as u32).collect();
    for stretch in 0..BETWEEN {
        let (from, to) = (blocks * stretch / BETWEEN, blocks * (stretch + 1) / BETWEEN);
        if from < to {
            chosen.insert((from + u64::from_le_bytes(array(random)) % (to - from)) as u32);
        }
    }
    chosen
}

/// What these blocks of a volume hold.
///
/// # Errors
/// Where one cannot be read, in a line.
pub(super) fn read(
    reader: &mut dyn BlockReader,
    volume: usize,
    blocks: &RoaringBitmap,
    digest: &dyn Fn(&[u8]) -> Digest,
) -> Result<Vec<(Block, Digest)>, String> {
    let mut held = vec![(Block(0), [0; DIGEST_BYTES]); blocks.len() as usize];
    let mut failure = None;
    reader::read_blocks(reader, &reader::requests_of(volume, blocks), &mut |_, block, result| match result {
        Ok(bytes) => held[blocks.rank(block.0) as usize - 1] = (block, digest(bytes)),
        Err(error) => failure = Some(format!("block {block} cannot be read: {error}")),
    })
    .map_err(|error| format!("it cannot be read: {error}"))?;
    failure.map_or(Ok(held), Err)
}

#[cfg(test)]
mod tests {
    use super::super::format::SAMPLES_MAX;
    use super::*;
    use cdp_seams::random::SimRandom;

    #[test]
    fn both_ends_are_chosen_whole_and_something_of_every_stretch() {
        let random = SimRandom::new(1);
        let blocks: u64 = 1 << 28;
        let chosen = choose(blocks, &random);
        assert!(chosen.len() <= SAMPLES_MAX as u64 && chosen.len() > 3 * END_BLOCKS - 10, "{}", chosen.len());
        assert!((0..256).all(|block| chosen.contains(block) && chosen.contains((blocks - 1) as u32 - block)));
        let stretch = blocks / BETWEEN;
        assert!(
            (0..BETWEEN).all(|at| chosen.range_cardinality((at * stretch) as u32..((at + 1) * stretch) as u32) > 0)
        );
        assert_ne!(chosen, choose(blocks, &random), "others each time");
    }

    #[test]
    fn of_a_small_volume_every_block_is_chosen_and_none_beyond_it() {
        for blocks in [0, 1, 255, 256, 400, 512] {
            assert_eq!(choose(blocks, &SimRandom::new(blocks)).len(), blocks);
        }
        assert_eq!(choose(1 << 32, &SimRandom::new(3)).max(), Some(u32::MAX));
    }
}
