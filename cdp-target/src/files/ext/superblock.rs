//! The superblock: how large everything is, and where it begins.
//!
//! Every number is checked before anything is computed from it, so that what comes after may compute.

use super::crc32c::{SEED, crc32c};
use crate::files::tree::TreeError;
use crate::files::volume::le;

/// Where it stands.
pub(super) const OFFSET: u64 = 1024;
/// Its bytes.
pub(super) const BYTES: usize = 1024;

/// Features without which a reader would read wrongly.
pub(super) mod incompatible {
    pub(crate) const FILETYPE: u64 = 0x2;
    pub(crate) const RECOVER: u64 = 0x4;
    pub(crate) const META_BG: u64 = 0x10;
    pub(crate) const WIDE: u64 = 0x80;
    pub(crate) const SEED: u64 = 0x2000;
    /// All that this reader knows: extents, multi-mount protection, flexible groups, values in inodes, large folders, inline data,
    /// encryption, folded case.
    pub(crate) const KNOWN: u64 =
        FILETYPE | RECOVER | META_BG | 0x40 | WIDE | 0x100 | 0x200 | 0x400 | SEED | 0x4000 | 0x8000 | 0x10000 | 0x20000;
}

const HAS_JOURNAL: u64 = 0x4;
const SPARSE_SUPER2: u64 = 0x200;
const FAST_COMMIT: u64 = 0x400;
const SPARSE_SUPER: u64 = 0x1;
const METADATA_CSUM: u64 = 0x400;

/// What is known of the file system as a whole.
#[derive(Clone, Debug)]
pub(super) struct Superblock {
    pub(super) block_bytes: u64,
    pub(super) blocks: u64,
    pub(super) inodes: u64,
    pub(super) inode_bytes: u64,
    pub(super) inodes_per_group: u64,
    /// Whether inodes and blocks of metadata have checksums, and what these begin with.
    pub(super) checksum_seed: Option<u32>,
    /// The journal's inode, where it has one within.
    pub(super) journal: Option<u64>,
    /// Whether the journal has what the blocks do not have yet.
    pub(super) is_dirty: bool,
    pub(super) has_fast_commits: bool,
    pub(super) has_file_types: bool,
    first_block: u64,
    blocks_per_group: u64,
    descriptor_bytes: u64,
    /// The first group of which descriptors lie in their own groups.
    first_meta_group: u64,
    is_sparse: bool,
    backup_groups: Option<[u64; 2]>,
}

impl Superblock {
    /// Reads it.
    ///
    /// # Errors
    /// Where it is none, or says what cannot be.
    pub(super) fn parse(bytes: &[u8; BYTES], size_bytes: u64) -> Result<Self, TreeError> {
        let damaged = |what: &str| TreeError::Damaged(format!("its superblock: {what}"));
        if le::<2>(bytes, 0x38) != 0xef53 {
            return Err(damaged("the magic number is missing"));
        }
        let has_features = le::<4>(bytes, 0x4c) > 0;
        let features = |at| if has_features { le::<4>(bytes, at) } else { 0 };
        let (compatible, must, may) = (features(0x5c), features(0x60), features(0x64));
        let unknown = must & !incompatible::KNOWN;
        if unknown != 0 {
            return Err(TreeError::Unsupported(format!(
                "its file system has features that the reader does not know ({unknown:#x})"
            )));
        }
        let log = le::<4>(bytes, 0x18);
        if log > 6 {
            return Err(damaged("its blocks are too large"));
        }
        let block_bytes = 1024 << log;
        let is_wide = must & incompatible::WIDE != 0;
        let blocks = le::<4>(bytes, 0x4) | if is_wide { le::<4>(bytes, 0x150) << 32 } else { 0 };
        let inode_bytes = if has_features { le::<2>(bytes, 0x58) } else { 128 };
        let descriptor_bytes = if is_wide { le::<2>(bytes, 0xfe) } else { 32 };
        let has_checksums = may & METADATA_CSUM != 0;
        let superblock = Self {
            block_bytes,
            blocks,
            inodes: le::<4>(bytes, 0x0),
            inode_bytes,
            inodes_per_group: le::<4>(bytes, 0x28),
            checksum_seed: has_checksums.then(|| seed(bytes, must)),
            journal: (compatible & HAS_JOURNAL != 0).then(|| le::<4>(bytes, 0xe0)),
            is_dirty: must & incompatible::RECOVER != 0,
            has_fast_commits: compatible & FAST_COMMIT != 0,
            has_file_types: must & incompatible::FILETYPE != 0,
            first_block: le::<4>(bytes, 0x14),
            blocks_per_group: le::<4>(bytes, 0x20),
            descriptor_bytes,
            first_meta_group: if must & incompatible::META_BG != 0 { le::<4>(bytes, 0x104) } else { u64::MAX },
            is_sparse: may & SPARSE_SUPER != 0,
            backup_groups: (compatible & SPARSE_SUPER2 != 0).then(|| [le::<4>(bytes, 0x24c), le::<4>(bytes, 0x250)]),
        };
        let is_well = superblock.blocks > 0
            && superblock.blocks.checked_mul(block_bytes).is_some()
            && superblock.inodes_per_group > 0
            && superblock.blocks_per_group > 0
            && superblock.first_block <= 1
            && (128..=block_bytes).contains(&inode_bytes)
            && inode_bytes.is_power_of_two()
            && (32..=1024.min(block_bytes)).contains(&descriptor_bytes)
            && descriptor_bytes.is_power_of_two();
        if !is_well {
            return Err(damaged("its sizes cannot be"));
        }
        if has_checksums && u64::from(crc32c(SEED, &bytes[..0x3fc])) != le::<4>(bytes, 0x3fc) {
            return Err(damaged("it does not match its checksum"));
        }
        if superblock.blocks * block_bytes > size_bytes {
            return Err(damaged(&format!(
                "it is larger than where it lies, {} of {size_bytes} bytes",
                superblock.blocks * block_bytes
            )));
        }
        Ok(superblock)
    }

    /// Where an inode's group is described.
    pub(super) fn descriptor_offset(&self, group: u64) -> u64 {
        let per_block = self.block_bytes / self.descriptor_bytes;
        let (block, within) = (group / per_block, group % per_block * self.descriptor_bytes);
        let own = OFFSET / self.block_bytes;
        let at = if block < self.first_meta_group {
            own + 1 + block
        } else {
            let first = block * per_block;
            first.saturating_mul(self.blocks_per_group) + self.first_block + u64::from(self.has_superblock(first))
        };
        at.saturating_mul(self.block_bytes).saturating_add(within)
    }

    /// Block of the table of inodes that a descriptor names.
    pub(super) fn inode_table(&self, descriptor: &[u8]) -> u64 {
        le::<4>(descriptor, 0x8) | if self.descriptor_bytes >= 64 { le::<4>(descriptor, 0x28) << 32 } else { 0 }
    }

    /// Bytes of a group's description.
    pub(super) const fn descriptor_bytes(&self) -> usize {
        self.descriptor_bytes as usize
    }

    /// Whether a copy of the superblock begins a group.
    fn has_superblock(&self, group: u64) -> bool {
        if let Some(groups) = self.backup_groups {
            return group == 0 || groups.contains(&group);
        }
        let is_power_of = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        !self.is_sparse || group <= 1 || [3, 5, 7].into_iter().any(is_power_of)
    }
}

fn seed(bytes: &[u8; BYTES], must: u64) -> u32 {
    if must & incompatible::SEED != 0 { le::<4>(bytes, 0x270) as u32 } else { crc32c(SEED, &bytes[0x68..0x78]) }
}
