//! The content of a cut: which blocks, and what each of them holds.
//!
//! Owns the memory: content lies in chunks that are never moved, a block has a slot in them, and a block that is read again
//! keeps its slot. Zeros take no memory but a bit each: a trimmed file system is millions of them. Whether the content is one of an instant is not known here (`cut`).

use cdp_protocol::codec;
use cdp_protocol::record::Meters;
use cdp_protocol::units::{BLOCK_BYTES, Block, Timestamp};
use roaring::RoaringBitmap;
use std::collections::BTreeMap;

/// Blocks whose content lies in one piece of memory: 256 KiB.
const CHUNK_BLOCKS: usize = 64;

/// All that was read for a recovery point, or for a part of one.
#[derive(Debug)]
pub struct Capture {
    /// The instant, by the source's clock; zero for a part, which is of no instant.
    pub cut_time: Timestamp,
    /// What the cut amounted to. Its frames' bytes are not known yet.
    pub meters: Meters,
    /// The volumes, in the tracker's order.
    pub volumes: Vec<CapturedVolume>,
    /// Blocks that were marked after the instant, and that the tracker has given already: to be carried, once what is captured is not.
    pub later: Vec<RoaringBitmap>,
}

/// What was read of one volume.
#[derive(Clone, Debug, Default)]
pub struct CapturedVolume {
    blocks: RoaringBitmap,
    /// Those of them that are zeros.
    zeros: RoaringBitmap,
    /// What the others hold.
    holdings: BTreeMap<u32, Holding>,
    /// Each as long as its slots given out so far: memory that is about to be filled is not zeroed first.
    chunks: Vec<Vec<u8>>,
    /// Slots given out so far.
    slots: u32,
    /// Slots whose block has become zeros or unreadable.
    free: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holding {
    Slot(u32),
    Unreadable,
}

/// How many blocks hold what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// Content.
    pub content: u64,
    /// Zeros.
    pub holes: u64,
    /// What the device could not read.
    pub unreadable: u64,
}

/// What a captured block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockContent<'a> {
    /// A block's bytes, not all of them zero.
    Bytes(&'a [u8]),
    /// Zeros.
    Zero,
    /// The device could not read it.
    Unreadable,
}

impl Capture {
    /// A capture of `volumes` volumes that holds nothing yet.
    #[must_use]
    pub fn new(volumes: usize) -> Self {
        let volumes = (0..volumes).map(|_| CapturedVolume::default()).collect();
        Self { cut_time: Timestamp(0), meters: Meters::default(), volumes, later: Vec::new() }
    }

    /// The blocks of each volume that the device could not read. Nothing marks them when the device recovers: who wants
    /// them in a later point carries them.
    #[must_use]
    pub fn unreadable(&self) -> Vec<RoaringBitmap> {
        let of = |volume: &CapturedVolume| {
            let unreadable = volume.holdings.iter().filter(|(_, holding)| **holding == Holding::Unreadable);
            unreadable.map(|(block, _)| *block).collect()
        };
        self.volumes.iter().map(of).collect()
    }

    /// Takes out blocks of which nothing has to be sent. They stay counted as found dirty.
    pub(crate) fn take_out(&mut self, blocks: &[RoaringBitmap]) {
        let dirty = self.meters.dirty_blocks;
        for (volume, blocks) in self.volumes.iter_mut().zip(blocks) {
            volume.remove(blocks);
        }
        self.count();
        self.meters.dirty_blocks = dirty;
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.volumes.iter().all(|volume| volume.blocks.is_empty())
    }

    /// Counts what is held into the meters.
    pub(crate) fn count(&mut self) {
        let counts: Vec<BlockCounts> = self.volumes.iter().map(CapturedVolume::counts).collect();
        let meters = &mut self.meters;
        meters.content_blocks = counts.iter().map(|counts| counts.content).sum();
        meters.hole_blocks = counts.iter().map(|counts| counts.holes).sum();
        meters.unreadable_blocks = counts.iter().map(|counts| counts.unreadable).sum();
        meters.dirty_blocks = meters.content_blocks + meters.hole_blocks + meters.unreadable_blocks;
    }
}

impl CapturedVolume {
    /// The blocks that are held.
    #[must_use]
    pub const fn blocks(&self) -> &RoaringBitmap {
        &self.blocks
    }

    /// How many blocks hold what.
    #[must_use]
    pub fn counts(&self) -> BlockCounts {
        let unreadable = self.holdings.values().filter(|holding| **holding == Holding::Unreadable).count() as u64;
        BlockCounts { content: self.holdings.len() as u64 - unreadable, holes: self.zeros.len(), unreadable }
    }

    /// What a block that is held holds.
    #[must_use]
    pub fn block(&self, block: Block) -> BlockContent<'_> {
        if self.zeros.contains(block.0) {
            return BlockContent::Zero;
        }
        self.content(*self.holdings.get(&block.0).expect("the block is one of `blocks`"))
    }

    /// Everything held, in block order.
    pub fn iter(&self) -> impl Iterator<Item = (Block, BlockContent<'_>)> {
        let (mut zeros, mut held) = (self.zeros.iter().peekable(), self.holdings.iter().peekable());
        std::iter::from_fn(move || {
            let zero_first = match (zeros.peek(), held.peek()) {
                (Some(zero), Some((block, _))) => zero < *block,
                (zero, _) => zero.is_some(),
            };
            if zero_first {
                return zeros.next().map(|block| (Block(block), BlockContent::Zero));
            }
            held.next().map(|(block, holding)| (Block(*block), self.content(*holding)))
        })
    }

    /// Takes a block's content, in the place of what it held before.
    pub(crate) fn put(&mut self, block: Block, bytes: &[u8]) {
        if codec::is_zero(bytes) {
            self.put_zero(block);
            return;
        }
        let reused = match self.holdings.get(&block.0) {
            Some(Holding::Slot(slot)) => Some(*slot),
            _ => self.free.pop(),
        };
        let slot = if let Some(slot) = reused {
            let (chunk, within) = place(slot);
            self.chunks[chunk][within..within + BLOCK_BYTES].copy_from_slice(bytes);
            slot
        } else {
            self.append(bytes)
        };
        self.hold(block, Holding::Slot(slot));
    }

    /// Notes that a block is zeros, without having read it.
    pub(crate) fn put_zero(&mut self, block: Block) {
        self.blocks.insert(block.0);
        self.zeros.insert(block.0);
        if let Some(Holding::Slot(before)) = self.holdings.remove(&block.0) {
            self.free.push(before);
        }
    }

    /// Notes that the device could not read a block.
    pub(crate) fn put_unreadable(&mut self, block: Block) {
        self.hold(block, Holding::Unreadable);
    }

    /// Forgets blocks that are held.
    pub(crate) fn remove(&mut self, blocks: &RoaringBitmap) {
        self.blocks -= blocks;
        self.zeros -= blocks;
        for block in blocks {
            if let Some(Holding::Slot(slot)) = self.holdings.remove(&block) {
                self.free.push(slot);
            }
        }
    }

    fn hold(&mut self, block: Block, holding: Holding) {
        self.blocks.insert(block.0);
        self.zeros.remove(block.0);
        if let Some(Holding::Slot(before)) = self.holdings.insert(block.0, holding)
            && holding != Holding::Slot(before)
        {
            self.free.push(before);
        }
    }

    /// Puts a block's bytes into a new slot.
    fn append(&mut self, bytes: &[u8]) -> u32 {
        assert_eq!(bytes.len(), BLOCK_BYTES, "slots are of one block");
        let slot = self.slots;
        self.slots += 1;
        let (chunk, _) = place(slot);
        if chunk == self.chunks.len() {
            self.chunks.push(Vec::with_capacity(CHUNK_BLOCKS * BLOCK_BYTES));
        }
        self.chunks[chunk].extend_from_slice(bytes);
        slot
    }

    fn content(&self, holding: Holding) -> BlockContent<'_> {
        match holding {
            Holding::Unreadable => BlockContent::Unreadable,
            Holding::Slot(slot) => {
                let (chunk, within) = place(slot);
                BlockContent::Bytes(&self.chunks[chunk][within..within + BLOCK_BYTES])
            }
        }
    }
}

/// A slot's chunk, and where in it the slot begins.
const fn place(slot: u32) -> (usize, usize) {
    (slot as usize / CHUNK_BLOCKS, slot as usize % CHUNK_BLOCKS * BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{Strategy, any, prop_assert_eq, proptest};

    #[derive(Clone, Copy, Debug)]
    enum Put {
        Bytes(u8),
        Unreadable,
        /// What is there is taken out.
        Nothing,
    }

    fn puts() -> impl Strategy<Value = Vec<(u32, Put)>> {
        // Zero, and so a hole, is one of few fills.
        let put = any::<u8>().prop_map(|fill| match fill {
            251.. => Put::Unreadable,
            230.. => Put::Nothing,
            _ => Put::Bytes(fill % 4),
        });
        proptest::collection::vec((0..150u32, put), 0..400)
    }

    proptest! {
        #[test]
        fn every_block_holds_what_was_put_last(puts in puts()) {
            let mut capture = Capture::new(1);
            let mut oracle = BTreeMap::new();
            for (block, put) in puts {
                match put {
                    Put::Bytes(fill) => capture.volumes[0].put(Block(block), &[fill; BLOCK_BYTES]),
                    Put::Unreadable => capture.volumes[0].put_unreadable(Block(block)),
                    Put::Nothing => {
                        capture.volumes[0].remove(&RoaringBitmap::from_iter([block]));
                        oracle.remove(&block);
                        continue;
                    }
                }
                oracle.insert(block, put);
            }
            capture.count();
            let volume = &capture.volumes[0];
            prop_assert_eq!(volume.blocks().iter().collect::<Vec<_>>(), oracle.keys().copied().collect::<Vec<_>>());
            for (block, put) in &oracle {
                match (volume.block(Block(*block)), put) {
                    (BlockContent::Bytes(bytes), Put::Bytes(fill)) => prop_assert_eq!(bytes, [*fill; BLOCK_BYTES]),
                    (content, Put::Bytes(0)) => prop_assert_eq!(content, BlockContent::Zero),
                    (content, _) => prop_assert_eq!(content, BlockContent::Unreadable),
                }
            }
            let meters = capture.meters;
            prop_assert_eq!(meters.dirty_blocks, oracle.len() as u64);
            prop_assert_eq!(u64::from(volume.slots), meters.content_blocks + volume.free.len() as u64);
        }
    }
}
