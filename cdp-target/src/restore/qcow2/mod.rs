//! Images in QEMU's qcow2 format, version 3, written in one pass from front to back.
//!
//! Invariant: what is written passes `qemu-img check`: every cluster of the file is referred to as often as it is counted. `plan`
//! and `plain` write an image whose layout is known beforehand, so that it may go into a pipe and be gone on with; `packed` one whose
//! clusters are compressed, and which knows only at its end where everything is. Never reads a foreign image.

pub(crate) mod packed;
pub(crate) mod packer;
pub(crate) mod plain;
pub(crate) mod plan;

/// Bits of an offset within a cluster: QEMU's own default.
const CLUSTER_BITS: u32 = 16;
/// Bytes of a cluster.
pub(crate) const CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;
/// Offsets in a cluster of an L1, L2 or refcount table.
const ENTRIES: u64 = CLUSTER_BYTES / 8;
/// Counts, of two bytes, in a cluster.
const COUNTS: u64 = CLUSTER_BYTES / 2;
/// In an entry: what it names is referred to once.
const COPIED: u64 = 1 << 63;
/// In an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// Units of a disk's size.
const SECTOR_BYTES: u64 = 512;

/// What the first cluster says.
struct Header {
    /// Of the disk; rounded up to whole sectors.
    size_bytes: u64,
    l1_offset: u64,
    l1_entries: u64,
    counts_offset: u64,
    counts_clusters: u64,
    /// Whether there are clusters compressed by zstd.
    is_packed: bool,
}

impl Header {
    /// The first cluster, whole.
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(CLUSTER_BYTES as usize);
        bytes.extend_from_slice(b"QFI\xfb");
        bytes.extend_from_slice(&3_u32.to_be_bytes());
        // No backing file.
        bytes.extend_from_slice(&[0; 12]);
        bytes.extend_from_slice(&CLUSTER_BITS.to_be_bytes());
        bytes.extend_from_slice(&self.size_bytes.next_multiple_of(SECTOR_BYTES).to_be_bytes());
        // Not encrypted.
        bytes.extend_from_slice(&0_u32.to_be_bytes());
        bytes.extend_from_slice(&(self.l1_entries as u32).to_be_bytes());
        bytes.extend_from_slice(&self.l1_offset.to_be_bytes());
        bytes.extend_from_slice(&self.counts_offset.to_be_bytes());
        bytes.extend_from_slice(&(self.counts_clusters as u32).to_be_bytes());
        // No snapshots.
        bytes.extend_from_slice(&[0; 12]);
        // The incompatible feature 3: another compression than deflate. No others.
        bytes.extend_from_slice(&(u64::from(self.is_packed) << 3).to_be_bytes());
        bytes.extend_from_slice(&[0; 16]);
        // Counts of 2^4 bits; the header's length; the compression, 1 for zstd.
        bytes.extend_from_slice(&4_u32.to_be_bytes());
        bytes.extend_from_slice(&112_u32.to_be_bytes());
        bytes.push(u8::from(self.is_packed));
        bytes.resize(CLUSTER_BYTES as usize, 0);
        bytes
    }
}

/// A table's entries, filled up to whole clusters.
fn encode_table(entries: impl IntoIterator<Item = u64>) -> Vec<u8> {
    let mut bytes: Vec<u8> = entries.into_iter().flat_map(u64::to_be_bytes).collect();
    bytes.resize(bytes.len().next_multiple_of(CLUSTER_BYTES as usize), 0);
    bytes
}

/// Clusters of a disk of so many bytes.
const fn clusters_in(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(CLUSTER_BYTES)
}

#[cfg(test)]
mod tests;
