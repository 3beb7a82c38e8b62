//! The journal, replayed in memory: which blocks have newer content, and where in the journal it lies.
//!
//! A point of a mounted file system is as after a power cut: what was changed last stands in the journal only. Invariant: exactly the
//! transactions count that were committed, in order, up to the first that was not; a block that was revoked later than it was written is not
//! taken from the journal. Nothing is written. What it takes in memory is bounded by the journal's length.

use super::Ext;
use super::blocks::run;
use super::crc32c::{SEED, crc32c};
use super::inode::Inode;
use crate::files::tree::{Kind, TreeError};
use crate::files::volume::le;
use std::collections::BTreeMap;

/// What each of its own blocks begins with.
const MAGIC: u32 = 0xc03b_3998;
const HEADER_BYTES: usize = 12;
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCK_FIRST: u32 = 3;
const SUPERBLOCK: u32 = 4;
const REVOKE: u32 = 5;

/// Features of a journal.
mod feature {
    pub(crate) const WIDE: u32 = 0x2;
    pub(crate) const CHECKSUM_2: u32 = 0x8;
    pub(crate) const CHECKSUM_3: u32 = 0x10;
    pub(crate) const FAST_COMMIT: u32 = 0x20;
    /// Revoked blocks, asynchronous commits, and those above.
    pub(crate) const KNOWN: u32 = 0x1 | WIDE | 0x4 | CHECKSUM_2 | CHECKSUM_3 | FAST_COMMIT;
}

/// Flags of a block that a transaction has.
mod tag {
    pub(crate) const ESCAPED: u32 = 1;
    pub(crate) const SAME_UUID: u32 = 2;
    pub(crate) const DELETED: u32 = 4;
    pub(crate) const LAST: u32 = 8;
}

/// Begins what fast commits write.
const FAST_COMMIT_HEAD: u64 = 9;

/// Where a block's newest content lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Taken {
    /// A block of the file system.
    pub(super) block: u64,
    is_escaped: bool,
}

impl Taken {
    /// Gives a block back its first bytes, which would have been taken for one of the journal's own.
    pub(super) fn unescape(self, within: u64, part: &mut [u8]) {
        if self.is_escaped {
            let magic = MAGIC.to_be_bytes();
            let rest = magic.get(within as usize..).unwrap_or_default();
            let len = rest.len().min(part.len());
            part[..len].copy_from_slice(&rest[..len]);
        }
    }
}

/// What a journal has of blocks.
#[derive(Debug, Default)]
pub(super) struct Replayed {
    blocks: BTreeMap<u64, Taken>,
}

impl Replayed {
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Where the block's newest content lies, where that is the journal.
    pub(super) fn block(&self, block: u64) -> Option<Taken> {
        self.blocks.get(&block).copied()
    }
}

/// Reads the journal in that inode.
///
/// # Errors
/// Where it cannot be read, is damaged, or has what this reader does not know.
pub(super) fn replay(ext: &Ext, inode: u64) -> Result<Replayed, TreeError> {
    let inode = Inode::read(ext, inode)?;
    if inode.node.kind != Kind::File {
        return Err(damaged("it is no file"));
    }
    let journal = Journal::open(ext, inode)?;
    if journal.start == 0 {
        return Ok(Replayed::default());
    }
    let mut found = Found::default();
    journal.scan(&mut found)?;
    journal.refuse_fast_commits(&found)?;
    Ok(found.replayed())
}

fn damaged(what: &str) -> TreeError {
    TreeError::Damaged(format!("its journal: {what}"))
}

fn be(bytes: &[u8], at: usize) -> u32 {
    (le::<4>(bytes, at) as u32).swap_bytes()
}

/// A journal as its superblock tells it.
struct Journal<'a> {
    ext: &'a Ext,
    inode: Inode,
    first: u32,
    /// Behind the last block of the ring.
    last: u32,
    start: u32,
    sequence: u32,
    features: u32,
    seed: u32,
}

/// What the transactions say, before it is known which are revoked.
#[derive(Default)]
struct Found {
    /// Block, where its content lies, the transaction: in order.
    written: Vec<(u64, Taken, u32)>,
    revoked: BTreeMap<u64, u32>,
    /// The first that is not there.
    next: u32,
}

/// One transaction, before it is known whether it was committed.
#[derive(Default)]
struct Pending {
    written: Vec<(u64, Taken, u32)>,
    revoked: Vec<u64>,
}

impl Found {
    fn commit(&mut self, pending: &mut Pending, sequence: u32) {
        self.written.append(&mut pending.written);
        for block in pending.revoked.drain(..) {
            self.revoked.insert(block, sequence);
        }
    }

    fn replayed(self) -> Replayed {
        let mut blocks = BTreeMap::new();
        for (block, taken, sequence) in self.written {
            // Numbers go round.
            let is_revoked = self.revoked.get(&block).is_some_and(|revoked| revoked.wrapping_sub(sequence) as i32 >= 0);
            if !is_revoked {
                blocks.insert(block, taken);
            }
        }
        Replayed { blocks }
    }
}

impl<'a> Journal<'a> {
    fn open(ext: &'a Ext, inode: Inode) -> Result<Self, TreeError> {
        let mut journal = Self { ext, inode, first: 0, last: 1, start: 0, sequence: 0, features: 0, seed: SEED };
        let block = journal.block(0)?.1;
        let kind = be(&block, 4);
        if be(&block, 0) != MAGIC || !matches!(kind, SUPERBLOCK_FIRST | SUPERBLOCK) {
            return Err(damaged("its superblock is none"));
        }
        if u64::from(be(&block, 0xc)) != ext.superblock.block_bytes {
            return Err(damaged("its blocks are not as large as the file system's"));
        }
        let features = if kind == SUPERBLOCK { be(&block, 0x28) } else { 0 };
        if features & !feature::KNOWN != 0 {
            return Err(TreeError::Unsupported(format!(
                "its journal has features that the reader does not know ({features:#x})"
            )));
        }
        let mut fast = if features & feature::FAST_COMMIT != 0 { be(&block, 0x54) } else { 0 };
        if features & feature::FAST_COMMIT != 0 && fast == 0 {
            fast = 256;
        }
        let last = be(&block, 0x10).checked_sub(fast);
        let blocks = journal.inode.node.size_bytes / ext.superblock.block_bytes;
        (journal.first, journal.start, journal.sequence) = (be(&block, 0x14), be(&block, 0x1c), be(&block, 0x18));
        journal.last =
            last.filter(|last| u64::from(*last) <= blocks).ok_or_else(|| damaged("it is longer than its file"))?;
        let is_well = journal.first > 0 && journal.first < journal.last;
        let begins = journal.start == 0 || (journal.first..journal.last).contains(&journal.start);
        if !is_well || !begins {
            return Err(damaged("it begins or ends nowhere"));
        }
        journal.features = features;
        if journal.has_checksums() {
            let mut unsummed = block[..1024].to_vec();
            unsummed[0xfc..0x100].fill(0);
            if crc32c(SEED, &unsummed) != be(&block, 0xfc) {
                return Err(damaged("its superblock does not match its checksum"));
            }
            journal.seed = crc32c(SEED, &block[0x30..0x40]);
        }
        Ok(journal)
    }

    const fn has_checksums(&self) -> bool {
        self.features & (feature::CHECKSUM_2 | feature::CHECKSUM_3) != 0
    }

    /// A block of the journal: where it lies, and what it holds.
    fn block(&self, at: u32) -> Result<(u64, Vec<u8>), TreeError> {
        let run = run(self.ext, &self.inode, u64::from(at))?;
        let block = run.block.ok_or_else(|| damaged("a block of it was never written"))?;
        Ok((block, self.ext.metadata_block(block)?))
    }

    const fn next(&self, at: u32) -> u32 {
        if at + 1 >= self.last { self.first } else { at + 1 }
    }

    /// Goes through the transactions.
    fn scan(&self, found: &mut Found) -> Result<(), TreeError> {
        let (mut at, mut sequence, mut pending) = (self.start, self.sequence, Pending::default());
        // Each block of the ring once, whatever it says.
        let mut left = self.last - self.first;
        while let Some(rest) = left.checked_sub(1) {
            left = rest;
            let (_, block) = self.block(at)?;
            if be(&block, 0) != MAGIC || be(&block, 8) != sequence {
                break;
            }
            match be(&block, 4) {
                DESCRIPTOR if self.tail_matches(&block) => {
                    let tags = self.tags(&block)?;
                    let Some(rest) = left.checked_sub(tags.len() as u32) else { break };
                    left = rest;
                    for Tag { block, flags, sum } in tags {
                        at = self.next(at);
                        let (place, content) = self.block(at)?;
                        if flags & tag::DELETED != 0 {
                            continue;
                        }
                        let taken = Taken { block: place, is_escaped: flags & tag::ESCAPED != 0 };
                        if !self.content_matches(&content, sequence, sum) {
                            // Of the last transaction, which was never committed, or of one that was.
                            return self.end_or_damage(found, at, sequence);
                        }
                        pending.written.push((block, taken, sequence));
                    }
                }
                REVOKE if self.tail_matches(&block) => pending.revoked.extend(self.revoked(&block)?),
                COMMIT if self.commit_matches(&block) => {
                    found.commit(&mut pending, sequence);
                    sequence = sequence.wrapping_add(1);
                }
                _ => break,
            }
            at = self.next(at);
        }
        found.next = sequence;
        Ok(())
    }

    /// A block of a transaction is not what the transaction says: fine where the transaction was not committed.
    fn end_or_damage(&self, found: &mut Found, mut at: u32, sequence: u32) -> Result<(), TreeError> {
        for _ in self.first..self.last {
            at = self.next(at);
            let (_, block) = self.block(at)?;
            let is_own = be(&block, 0) == MAGIC && be(&block, 8) == sequence;
            if is_own && be(&block, 4) == COMMIT && self.commit_matches(&block) {
                return Err(damaged(&format!("a block of transaction {sequence} does not match its checksum")));
            }
        }
        found.next = sequence;
        Ok(())
    }

    /// Whether a block with a checksum in its last bytes matches it.
    fn tail_matches(&self, block: &[u8]) -> bool {
        let tail = block.len() - 4;
        !self.has_checksums() || crc32c(crc32c(self.seed, &block[..tail]), &[0; 4]) == be(block, tail)
    }

    fn commit_matches(&self, block: &[u8]) -> bool {
        let mut unsummed = block.to_vec();
        unsummed[16..20].fill(0);
        !self.has_checksums() || crc32c(self.seed, &unsummed) == be(block, 16)
    }

    fn content_matches(&self, content: &[u8], sequence: u32, sum: u32) -> bool {
        let own = crc32c(crc32c(self.seed, &sequence.to_be_bytes()), content);
        match self.features {
            features if features & feature::CHECKSUM_3 != 0 => own == sum,
            features if features & feature::CHECKSUM_2 != 0 => own & 0xffff == sum,
            _ => true,
        }
    }

    /// The blocks that a descriptor says follow it.
    fn tags(&self, block: &[u8]) -> Result<Vec<Tag>, TreeError> {
        let is_wide = self.features & feature::WIDE != 0;
        let is_third = self.features & feature::CHECKSUM_3 != 0;
        let second = if self.features & feature::CHECKSUM_2 != 0 { 2 } else { 0 };
        let len = if is_third { 16 } else { 8 + second + if is_wide { 4 } else { 0 } };
        let end = block.len() - if self.has_checksums() { 4 } else { 0 };
        let (mut at, mut tags) = (HEADER_BYTES, Vec::new());
        while at + len <= end {
            let short = |at: usize| u32::from((le::<2>(block, at) as u16).swap_bytes());
            let (flags, sum) =
                if is_third { (be(block, at + 4), be(block, at + 12)) } else { (short(at + 6), short(at + 4)) };
            let high = if is_wide { u64::from(be(block, at + 8)) << 32 } else { 0 };
            let number = u64::from(be(block, at)) | high;
            if number >= self.ext.superblock.blocks {
                return Err(damaged("it has a block that lies outside of the file system"));
            }
            tags.push(Tag { block: number, flags, sum });
            if flags & tag::LAST != 0 {
                break;
            }
            at += len + if flags & tag::SAME_UUID == 0 { 16 } else { 0 };
        }
        Ok(tags)
    }

    fn revoked(&self, block: &[u8]) -> Result<Vec<u64>, TreeError> {
        let (end, is_wide) = (be(block, HEADER_BYTES) as usize, self.features & feature::WIDE != 0);
        let records = block.get(16..end).ok_or_else(|| damaged("it revokes more than a block has room for"))?;
        let wide = |record: &[u8]| u64::from(be(record, 0)) << 32 | u64::from(be(record, 4));
        Ok(if is_wide {
            records.chunks_exact(8).map(wide).collect()
        } else {
            records.chunks_exact(4).map(|record| u64::from(be(record, 0))).collect()
        })
    }

    /// Fast commits stand behind the ring, and say what was changed rather than blocks.
    fn refuse_fast_commits(&self, found: &Found) -> Result<(), TreeError> {
        if self.features & feature::FAST_COMMIT == 0 || !self.ext.superblock.has_fast_commits {
            return Ok(());
        }
        let (_, block) = self.block(self.last)?;
        let is_head = le::<2>(&block, 0) == FAST_COMMIT_HEAD;
        if is_head && le::<4>(&block, 8) as u32 == found.next {
            return Err(TreeError::Unsupported("its journal has fast commits, which the reader cannot replay".into()));
        }
        Ok(())
    }
}

/// A block that a transaction has.
struct Tag {
    block: u64,
    flags: u32,
    sum: u32,
}
