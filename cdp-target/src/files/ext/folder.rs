//! Folders: names, and which inodes they name.
//!
//! Hashed folders are read as if they were not: what they add looks like entries that are free.

use super::Ext;
use super::attributes::inline_rest;
use super::blocks::run;
use super::inode::{Inode, flags};
use crate::files::tree::{ENTRIES_MAX, Entry, Kind, TreeError};
use crate::files::volume::le;

/// All entries of a folder, without `.` and `..`.
///
/// # Errors
/// Where it is none, or cannot be read.
pub(super) fn list(ext: &Ext, inode: &Inode) -> Result<Vec<Entry>, TreeError> {
    if inode.node.kind != Kind::Folder {
        return Err(TreeError::NotAFolder);
    }
    if inode.flags & flags::ENCRYPTED != 0 {
        return Err(TreeError::Encrypted);
    }
    let mut entries = Vec::new();
    if inode.flags & flags::INLINE != 0 {
        // The folder above comes first, without a name.
        collect(ext, inode, &inode.area[4..], &mut entries)?;
        collect(ext, inode, &inline_rest(ext, inode)?, &mut entries)?;
        return Ok(entries);
    }
    let end = inode.node.size_bytes.div_ceil(ext.superblock.block_bytes);
    let mut at = 0;
    while at < end {
        let run = run(ext, inode, at)?;
        let blocks = run.blocks.min(end - at);
        for block in run.block.into_iter().flat_map(|first| first..first + blocks) {
            collect(ext, inode, &ext.metadata_block(block)?, &mut entries)?;
        }
        at += blocks;
    }
    Ok(entries)
}

/// Adds the entries of a block.
fn collect(ext: &Ext, inode: &Inode, block: &[u8], entries: &mut Vec<Entry>) -> Result<(), TreeError> {
    let damaged = |what: &str| TreeError::Damaged(format!("folder of inode {}: {what}", inode.number));
    let mut at = 0;
    while at + 8 <= block.len() {
        let len = match le::<2>(block, at + 4) as usize {
            // As long as a block of 64 KiB.
            0 | 0xffff if block.len() == 0x1_0000 => 0x1_0000,
            len => len,
        };
        let named =
            if ext.superblock.has_file_types { le::<1>(block, at + 6) } else { le::<2>(block, at + 6) } as usize;
        // Inline folders end in zeros.
        if len == 0 && block.len() < 1024 {
            break;
        }
        if len < 8 || len % 4 != 0 || at + len > block.len() || named + 8 > len {
            return Err(damaged("an entry is longer than its place"));
        }
        let (id, name) = (le::<4>(block, at), &block[at + 8..at + 8 + named]);
        if id != 0 && !matches!(name, [] | [b'.'] | [b'.', b'.']) {
            if entries.len() >= ENTRIES_MAX {
                return Err(damaged("it has too many entries"));
            }
            entries.push(Entry { name: name.to_vec(), short: None, id });
        }
        at += len;
    }
    Ok(())
}
