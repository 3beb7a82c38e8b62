//! Inodes: what a file is, who may have it, when it was changed.

use super::Ext;
use super::crc32c::crc32c;
use crate::files::tree::{Kind, Moment, Node, TreeError};
use crate::files::volume::le;

/// Flags of an inode.
pub(super) mod flags {
    pub(crate) const COMPRESSED: u64 = 0x4;
    pub(crate) const ENCRYPTED: u64 = 0x800;
    pub(crate) const EXTENTS: u64 = 0x8_0000;
    pub(crate) const INLINE: u64 = 0x1000_0000;
}

/// The topmost folder.
pub(super) const ROOT: u64 = 2;

/// An inode.
#[derive(Clone, Debug)]
pub(super) struct Inode {
    pub(super) number: u64,
    pub(super) flags: u64,
    pub(super) node: Node,
    /// The extents, the map, the link's target, or the first bytes of the content.
    pub(super) area: [u8; 60],
    /// Where its extended attributes go on.
    pub(super) attributes_block: u64,
    /// What is behind its fields: extended attributes.
    pub(super) behind: Vec<u8>,
}

impl Inode {
    /// Reads one.
    ///
    /// # Errors
    /// Where there is none of that number, or it makes no sense.
    pub(super) fn read(ext: &Ext, number: u64) -> Result<Self, TreeError> {
        let superblock = &ext.superblock;
        let damaged = |what: &str| TreeError::Damaged(format!("inode {number}: {what}"));
        if number == 0 || number > superblock.inodes {
            return Err(damaged("there is none of that number"));
        }
        let (group, index) = ((number - 1) / superblock.inodes_per_group, (number - 1) % superblock.inodes_per_group);
        let mut descriptor = vec![0; superblock.descriptor_bytes()];
        ext.read(superblock.descriptor_offset(group), &mut descriptor)?;
        let table = superblock.inode_table(&descriptor);
        let offset =
            table.checked_mul(superblock.block_bytes).and_then(|at| at.checked_add(index * superblock.inode_bytes));
        let mut bytes = vec![0; superblock.inode_bytes as usize];
        ext.read(offset.ok_or_else(|| damaged("its table lies nowhere"))?, &mut bytes)?;
        let extra = if bytes.len() > 128 { le::<2>(&bytes, 0x80) as usize } else { 0 };
        if extra > bytes.len() - 128 || extra % 4 != 0 {
            return Err(damaged("its fields are too long"));
        }
        check(ext, number, extra, &bytes)?;
        let mode = le::<2>(&bytes, 0);
        let kind = kind(mode).ok_or_else(|| damaged("it is of no kind"))?;
        let has = |field: usize| 128 + extra >= field + 4;
        let moment = |at: usize, more: usize| moment(le::<4>(&bytes, at), has(more).then(|| le::<4>(&bytes, more)));
        let size_bytes = match kind {
            Kind::File | Kind::Folder => le::<4>(&bytes, 4) | le::<4>(&bytes, 0x6c) << 32,
            _ => le::<4>(&bytes, 4),
        };
        let blocks = size_bytes.div_ceil(superblock.block_bytes);
        if blocks > u64::from(u32::MAX) {
            return Err(damaged("it is larger than a file can be"));
        }
        let flags = le::<4>(&bytes, 0x20);
        let note = if flags & flags::ENCRYPTED != 0 { Some("encrypted") } else { None };
        let owner = |low: usize, high: usize| (le::<2>(&bytes, low) | le::<2>(&bytes, high) << 16) as u32;
        Ok(Self {
            number,
            flags,
            node: Node {
                kind,
                size_bytes,
                mode: Some(mode as u32 & 0o7777),
                owner: Some((owner(2, 0x78), owner(0x18, 0x7a))),
                modified: Some(moment(0x10, 0x88)),
                accessed: Some(moment(0x8, 0x8c)),
                note,
            },
            area: *bytes[0x28..].first_chunk().expect("128 bytes at least"),
            attributes_block: le::<4>(&bytes, 0x68) | le::<2>(&bytes, 0x76) << 32,
            behind: bytes[128 + extra..].to_vec(),
        })
    }
}

/// Holds an inode against its checksum, where it has one.
fn check(ext: &Ext, number: u64, extra: usize, bytes: &[u8]) -> Result<(), TreeError> {
    let Some(seed) = ext.superblock.checksum_seed else { return Ok(()) };
    let has_high = extra >= 4;
    let mut unsummed = bytes.to_vec();
    unsummed[0x7c..0x7e].fill(0);
    if has_high {
        unsummed[0x82..0x84].fill(0);
    }
    let seed = crc32c(crc32c(seed, &(number as u32).to_le_bytes()), &bytes[0x64..0x68]);
    let sum = u64::from(crc32c(seed, &unsummed));
    let (sum, told) = if has_high {
        (sum, le::<2>(bytes, 0x7c) | le::<2>(bytes, 0x82) << 16)
    } else {
        (sum & 0xffff, le::<2>(bytes, 0x7c))
    };
    if sum == told { Ok(()) } else { Err(TreeError::Damaged(format!("inode {number} does not match its checksum"))) }
}

const fn kind(mode: u64) -> Option<Kind> {
    Some(match mode & 0xf000 {
        0x1000 => Kind::Special("a named pipe"),
        0x2000 => Kind::Special("a character device"),
        0x4000 => Kind::Folder,
        0x6000 => Kind::Special("a block device"),
        0x8000 => Kind::File,
        0xa000 => Kind::Link,
        0xc000 => Kind::Special("a socket"),
        _ => return None,
    })
}

/// Seconds with a sign, two more bits of them, and nanoseconds.
fn moment(seconds: u64, more: Option<u64>) -> Moment {
    let more = more.unwrap_or(0);
    let seconds = i64::from(seconds as u32 as i32) + ((more as i64 & 3) << 32);
    Moment { seconds, nanoseconds: ((more >> 2) as u32).min(999_999_999) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_reach_from_1901_to_2446() {
        let seconds = |seconds: u32, more| moment(u64::from(seconds), more).seconds;
        assert_eq!(seconds(0, None), 0);
        assert_eq!(seconds(0xffff_ffff, Some(0)), -1);
        assert_eq!(seconds(0x8000_0000, Some(1)), 0x8000_0000);
        assert_eq!(seconds(0x7fff_ffff, Some(3)), 0x3_7fff_ffff);
        assert_eq!(moment(0, Some(500_000_000 << 2)).nanoseconds, 500_000_000);
    }
}
