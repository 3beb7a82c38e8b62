//! Where a file's blocks lie: trees of extents, and the maps of ext2 and ext3.
//!
//! Invariant: what is told of a file's block lies within the file system, and trees end: each level is one lower than the one above.

use super::Ext;
use super::inode::{Inode, flags};
use crate::files::tree::TreeError;
use crate::files::volume::le;

/// Levels of a tree of extents, at most.
const DEPTH_MAX: u64 = 5;
/// Blocks that inodes of ext2 and ext3 name themselves.
const DIRECT: u64 = 12;

/// A run of a file's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Block of the file system; `None` where there are zeros.
    pub(super) block: Option<u64>,
    /// How many, one at least.
    pub(super) blocks: u64,
}

/// The run that a file's block `at` begins, or lies in.
///
/// # Errors
/// Where it cannot be read, or makes no sense.
pub(super) fn run(ext: &Ext, inode: &Inode, at: u64) -> Result<Run, TreeError> {
    let run = if inode.flags & flags::EXTENTS != 0 { extent(ext, inode, at)? } else { mapped(ext, inode, at)? };
    let is_within =
        run.block.is_none_or(|block| block > 0 && block.saturating_add(run.blocks) <= ext.superblock.blocks);
    if is_within { Ok(run) } else { Err(damaged(inode, "a block of it lies outside of the file system")) }
}

fn damaged(inode: &Inode, what: &str) -> TreeError {
    TreeError::Damaged(format!("inode {}: {what}", inode.number))
}

fn extent(ext: &Ext, inode: &Inode, at: u64) -> Result<Run, TreeError> {
    let mut node = inode.area.to_vec();
    let mut above: Option<u64> = None;
    // The first block behind what the node is about.
    let mut end = u64::from(u32::MAX) + 1;
    loop {
        let (magic, entries, depth) = (le::<2>(&node, 0), le::<2>(&node, 2), le::<2>(&node, 6));
        let is_well = magic == 0xf30a
            && depth <= DEPTH_MAX
            && above.is_none_or(|above| depth + 1 == above)
            && (entries as usize) < node.len() / 12;
        if !is_well {
            return Err(damaged(inode, "its tree of extents cannot be"));
        }
        let first = |entry: u64| le::<4>(&node, 12 + entry as usize * 12);
        let behind = (0..entries).find(|entry| first(*entry) > at);
        end = behind.map_or(end, |entry| first(entry).min(end));
        let hole = Run { block: None, blocks: end.saturating_sub(at).max(1) };
        let Some(entry) = behind.unwrap_or(entries).checked_sub(1) else { return Ok(hole) };
        let place = 12 + entry as usize * 12;
        if depth == 0 {
            let len = le::<2>(&node, place + 4);
            // Above 32768: allocated, and never written.
            let (len, is_written) = if len > 32768 { (len - 32768, false) } else { (len, true) };
            let within = at - first(entry);
            let Some(left @ 1..) = len.checked_sub(within) else { return Ok(hole) };
            let block = le::<4>(&node, place + 8) | le::<2>(&node, place + 6) << 32;
            return Ok(Run { block: is_written.then_some(block + within), blocks: left });
        }
        let below = le::<4>(&node, place + 4) | le::<2>(&node, place + 8) << 32;
        node = ext.metadata_block(below)?;
        above = Some(depth);
    }
}

fn mapped(ext: &Ext, inode: &Inode, at: u64) -> Result<Run, TreeError> {
    let per_block = ext.superblock.block_bytes / 4;
    if at < DIRECT {
        return Ok(joined(&inode.area, at, DIRECT));
    }
    let (mut rest, mut span) = (at - DIRECT, per_block);
    for level in 1..=3_u32 {
        if rest < span {
            return indirect(ext, le::<4>(&inode.area, 4 * (DIRECT as usize + level as usize - 1)), level, rest);
        }
        rest -= span;
        span *= per_block;
    }
    Err(damaged(inode, "it is larger than a file can be"))
}

/// Follows a map of `level` levels.
fn indirect(ext: &Ext, mut block: u64, level: u32, mut at: u64) -> Result<Run, TreeError> {
    let per_block = ext.superblock.block_bytes / 4;
    for level in (0..level).rev() {
        let span = per_block.pow(level);
        if block == 0 {
            // Nothing of what this map is about is there.
            return Ok(Run { block: None, blocks: span * per_block - at });
        }
        let map = ext.metadata_block(block)?;
        if level == 0 {
            return Ok(joined(&map, at, per_block));
        }
        block = le::<4>(&map, 4 * (at / span) as usize);
        at %= span;
        if block == 0 {
            return Ok(Run { block: None, blocks: span - at });
        }
    }
    unreachable!("the last level gives the run")
}

/// The run from entry `at` on of a map with `end` entries.
fn joined(map: &[u8], at: u64, end: u64) -> Run {
    let entry = |at: u64| le::<4>(map, 4 * at as usize);
    let first = entry(at);
    let follows = |next: &u64| entry(*next) == if first == 0 { 0 } else { first.saturating_add(next - at) };
    let blocks = 1 + (at + 1..end).take_while(follows).count() as u64;
    Run { block: (first != 0).then_some(first), blocks }
}
