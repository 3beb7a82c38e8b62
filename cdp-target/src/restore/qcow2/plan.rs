//! Where everything is in a qcow2 image that is not compressed, before any of it is written.
//!
//! Invariant: follows from the point alone, so that an image that was broken off has the same layout when it is gone on with. In the file
//! stand, in this order: header, refcount table, refcount blocks, L1 table, L2 tables, the clusters that hold anything. Two bits
//! a cluster at most are kept, and nothing of the content.

use super::{CLUSTER_BYTES, COPIED, COUNTS, ENTRIES, Header, clusters_in, encode_table};
use crate::restore::image::{BlockSource, SourceError};
use cdp_protocol::units::{BLOCK_BYTES, Block, Extent, VolumeSlot, blocks_in};
use roaring::RoaringBitmap;
use std::io;
use std::ops::Range;

/// Blocks that are looked up at once: 1 GiB.
const WINDOW_BLOCKS: u64 = 1 << 18;
const CLUSTER_BLOCKS: u64 = CLUSTER_BYTES / BLOCK_BYTES as u64;

/// The layout of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    size_bytes: u64,
    /// The clusters that are in the file.
    held: RoaringBitmap,
    /// Those tables of a cluster each that are in the file, by the number of the L1 entry.
    l2_tables: RoaringBitmap,
    counts_table_clusters: u64,
    counts_clusters: u64,
}

impl Plan {
    /// The layout of a volume, by what its index says that may be other than zeros.
    ///
    /// # Errors
    /// Where the index cannot be read.
    pub(crate) fn of(source: &dyn BlockSource, slot: VolumeSlot, size_bytes: u64) -> Result<Self, SourceError> {
        let mut held = RoaringBitmap::new();
        let mut start = 0;
        while start < blocks_in(size_bytes) {
            let count = WINDOW_BLOCKS.min(blocks_in(size_bytes) - start);
            let window = Extent::new(Block(start as u32), count as u32).expect("a part of a volume");
            source.content(slot, window, &mut |run| {
                let (first, last) = (u64::from(run.start.0) / CLUSTER_BLOCKS, (run.end() - 1) / CLUSTER_BLOCKS);
                held.insert_range(first as u32..=last as u32);
            })?;
            start += count;
        }
        Ok(Self::with(size_bytes, held))
    }

    /// The layout of a disk of so many bytes with these clusters.
    pub(super) fn with(size_bytes: u64, held: RoaringBitmap) -> Self {
        let tables = clusters_in(size_bytes).div_ceil(ENTRIES);
        let is_there = |table: &u64| held.range_cardinality(table_clusters(*table)) > 0;
        let l2_tables = (0..tables).filter(is_there).map(|table| table as u32).collect();
        let mut plan = Self { size_bytes, held, l2_tables, counts_table_clusters: 1, counts_clusters: 1 };
        // The counts count themselves: they grow until they are enough.
        loop {
            let counts = plan.file_clusters().div_ceil(COUNTS);
            let table = counts.div_ceil(ENTRIES);
            if (counts, table) == (plan.counts_clusters, plan.counts_table_clusters) {
                return plan;
            }
            (plan.counts_clusters, plan.counts_table_clusters) = (counts, table);
        }
    }

    /// Of the disk.
    pub(crate) const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Length of the file.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.file_clusters() * CLUSTER_BYTES
    }

    /// Where a cluster of the disk is in the file; `None` where it holds only zeros.
    pub(super) fn offset_of(&self, cluster: u64) -> Option<u64> {
        let cluster = u32::try_from(cluster).ok().filter(|cluster| self.held.contains(*cluster))?;
        Some((self.front_clusters() + self.held.rank(cluster) - 1) * CLUSTER_BYTES)
    }

    /// Where in the file the clusters stand that begin at `offset` of the disk or behind it.
    pub(super) fn offset_behind(&self, offset: u64) -> u64 {
        let first = u32::try_from(offset.div_ceil(CLUSTER_BYTES)).unwrap_or(u32::MAX);
        (self.front_clusters() + self.held.range_cardinality(..first)) * CLUSTER_BYTES
    }

    const fn l1_entries(&self) -> u64 {
        clusters_in(self.size_bytes).div_ceil(ENTRIES)
    }

    const fn counts_at(&self) -> u64 {
        1 + self.counts_table_clusters
    }

    const fn l1_at(&self) -> u64 {
        self.counts_at() + self.counts_clusters
    }

    const fn l2_at(&self) -> u64 {
        self.l1_at() + self.l1_entries().div_ceil(ENTRIES)
    }

    fn front_clusters(&self) -> u64 {
        self.l2_at() + self.l2_tables.len()
    }

    fn file_clusters(&self) -> u64 {
        self.front_clusters() + self.held.len()
    }

    /// Gives what stands before the disk's clusters, with its offset, in order.
    ///
    /// # Errors
    /// What `give` says.
    pub(super) fn front(&self, give: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut at = 0;
        let mut give = |bytes: &[u8]| {
            give(at, bytes)?;
            at += bytes.len() as u64;
            Ok::<_, io::Error>(())
        };
        let header = Header {
            size_bytes: self.size_bytes,
            l1_offset: self.l1_at() * CLUSTER_BYTES,
            l1_entries: self.l1_entries(),
            counts_offset: CLUSTER_BYTES,
            counts_clusters: self.counts_table_clusters,
            is_packed: false,
        };
        give(&header.encode())?;
        let counts = (0..self.counts_clusters).map(|at| (self.counts_at() + at) * CLUSTER_BYTES);
        give(&encode_table(counts))?;
        for block in 0..self.counts_clusters {
            give(&self.counts(block))?;
        }
        give(&encode_table(self.l1()))?;
        for table in &self.l2_tables {
            give(&encode_table(self.l2(u64::from(table))))?;
        }
        Ok(())
    }

    /// A block of counts: each cluster of the file is referred to once.
    fn counts(&self, block: u64) -> Vec<u8> {
        let counted = (self.file_clusters() - block * COUNTS).min(COUNTS);
        let mut bytes = 1_u16.to_be_bytes().repeat(counted as usize);
        bytes.resize(CLUSTER_BYTES as usize, 0);
        bytes
    }

    fn l1(&self) -> impl Iterator<Item = u64> {
        let entry = |table: u64| {
            let table = table as u32;
            let is_there = self.l2_tables.contains(table);
            is_there.then(|| COPIED | ((self.l2_at() + self.l2_tables.rank(table) - 1) * CLUSTER_BYTES))
        };
        // An L1 table has an entry at least, also for an empty disk.
        (0..self.l1_entries().max(1)).map(move |table| entry(table).unwrap_or(0))
    }

    fn l2(&self, table: u64) -> impl Iterator<Item = u64> {
        let clusters = table_clusters(table);
        let mut next = self.front_clusters() + self.held.range_cardinality(..clusters.start);
        clusters.map(move |cluster| {
            if !self.held.contains(cluster) {
                return 0;
            }
            next += 1;
            COPIED | ((next - 1) * CLUSTER_BYTES)
        })
    }
}

/// The clusters that an L2 table names.
fn table_clusters(table: u64) -> Range<u32> {
    (table * ENTRIES) as u32..((table + 1) * ENTRIES) as u32
}
