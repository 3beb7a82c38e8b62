//! ext2, ext3 and ext4, read only, with the journal replayed in memory.
//!
//! A reader of our own: the kept one there is (`docs/decisions/2026-11-27-readers-of-file-systems.md`) takes blocks that were allocated and never
//! written for content, and gives up on journals that have wrapped, silently.

mod attributes;
mod blocks;
mod crc32c;
mod folder;
mod inode;
mod journal;
mod superblock;
#[cfg(test)]
mod tests;

use super::tree::{Attribute, Content, Entry, Id, Kind, LINK_BYTES_MAX, Node, Piece, Tree, TreeError};
use super::volume::{Bytes, Shared};
use blocks::run;
use inode::{Inode, flags};
use journal::Replayed;
use superblock::Superblock;

/// Bytes that are given at once, at most.
const PIECE_BYTES_MAX: u64 = 1 << 20;

/// A file system.
pub(crate) struct Ext {
    bytes: Shared,
    superblock: Superblock,
    /// What the journal has of blocks.
    replayed: Replayed,
}

impl Ext {
    /// Opens one; what its journal has is taken in.
    ///
    /// # Errors
    /// Where it is none, cannot be read, or has what this reader does not know.
    pub(crate) fn open(bytes: Shared) -> Result<Self, TreeError> {
        let mut ext = Self { superblock: superblock(bytes.as_ref(), None)?, bytes, replayed: Replayed::default() };
        if let Some(journal) = ext.superblock.journal.filter(|_| ext.superblock.is_dirty) {
            ext.replayed = journal::replay(&ext, journal)?;
            // The journal may have a newer superblock, too.
            ext.superblock = superblock(ext.bytes.as_ref(), Some(&ext))?;
        }
        Ok(ext)
    }

    /// Reads bytes as they are with the journal.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), TreeError> {
        self.each_block(offset, buffer, |bytes, at, part| bytes.read(at, part))
    }

    /// Reads bytes of a file's content.
    fn read_content(&self, offset: u64, buffer: &mut [u8]) -> Result<(), TreeError> {
        if self.replayed.is_empty() {
            return self.bytes.read_content(offset, buffer);
        }
        self.each_block(offset, buffer, |bytes, at, part| bytes.read_content(at, part))
    }

    fn each_block(
        &self,
        offset: u64,
        buffer: &mut [u8],
        read: impl Fn(&dyn Bytes, u64, &mut [u8]) -> Result<(), TreeError>,
    ) -> Result<(), TreeError> {
        if self.replayed.is_empty() {
            return read(self.bytes.as_ref(), offset, buffer);
        }
        let block_bytes = self.superblock.block_bytes;
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let (block, within) = (at / block_bytes, at % block_bytes);
            let taken = self.replayed.block(block);
            // Blocks that the journal does not have are read together.
            let mut len = block_bytes - within;
            while taken.is_none() && len < rest.len() as u64 && self.replayed.block((at + len) / block_bytes).is_none()
            {
                len += block_bytes;
            }
            let (part, behind) = rest.split_at_mut(len.min(rest.len() as u64) as usize);
            match taken {
                Some(taken) => {
                    read(self.bytes.as_ref(), taken.block * block_bytes + within, part)?;
                    taken.unescape(within, part);
                }
                None => read(self.bytes.as_ref(), at, part)?,
            }
            (at, rest) = (at + len, behind);
        }
        Ok(())
    }

    /// A block of the file system's own.
    fn metadata_block(&self, block: u64) -> Result<Vec<u8>, TreeError> {
        if block == 0 || block >= self.superblock.blocks {
            return Err(TreeError::Damaged(format!("block {block} of it is none")));
        }
        let mut bytes = vec![0; self.superblock.block_bytes as usize];
        self.read(block * self.superblock.block_bytes, &mut bytes)?;
        Ok(bytes)
    }
}

fn superblock(bytes: &dyn Bytes, replayed: Option<&Ext>) -> Result<Superblock, TreeError> {
    let mut raw = [0; superblock::BYTES];
    match replayed {
        Some(ext) => ext.read(superblock::OFFSET, &mut raw)?,
        None => bytes.read(superblock::OFFSET, &mut raw)?,
    }
    Superblock::parse(&raw, bytes.size_bytes())
}

impl Tree for Ext {
    fn root(&self) -> Id {
        inode::ROOT
    }

    fn node(&self, id: Id) -> Result<Node, TreeError> {
        Ok(Inode::read(self, id)?.node)
    }

    fn list(&self, id: Id) -> Result<Vec<Entry>, TreeError> {
        folder::list(self, &Inode::read(self, id)?)
    }

    fn link(&self, id: Id) -> Result<Vec<u8>, TreeError> {
        let inode = Inode::read(self, id)?;
        let size = inode.node.size_bytes;
        if inode.node.kind != Kind::Link || size > LINK_BYTES_MAX {
            return Err(TreeError::Damaged(format!("inode {id}: it is no symbolic link that could be followed")));
        }
        if inode.flags & flags::ENCRYPTED != 0 {
            return Err(TreeError::Encrypted);
        }
        if size < inode.area.len() as u64 && inode.flags & flags::INLINE == 0 {
            return Ok(inode.area[..size as usize].to_vec());
        }
        let mut target = vec![0; size as usize];
        let mut content = File::new(self, inode)?;
        let mut at = 0;
        while at < target.len() {
            match content.next(&mut target[at..])? {
                Piece::Bytes(len) => at += len,
                Piece::Hole(_) | Piece::End => break,
            }
        }
        Ok(target)
    }

    fn open(&self, id: Id) -> Result<Box<dyn Content + '_>, TreeError> {
        let inode = Inode::read(self, id)?;
        match inode.node.kind {
            Kind::File => Ok(Box::new(File::new(self, inode)?)),
            Kind::Folder => Err(TreeError::IsAFolder),
            Kind::Link => Err(TreeError::Special("a symbolic link")),
            Kind::Special(what) => Err(TreeError::Special(what)),
        }
    }

    fn attributes(&self, id: Id) -> Result<(Vec<Attribute>, bool), TreeError> {
        attributes::attributes(self, &Inode::read(self, id)?)
    }

    fn warnings(&self) -> Vec<String> {
        if self.superblock.is_dirty && self.superblock.journal.is_none() {
            return vec!["its file system was not unmounted, and its journal lies elsewhere: what was written last may be missing".into()];
        }
        Vec::new()
    }
}

/// A file's content.
struct File<'a> {
    ext: &'a Ext,
    inode: Inode,
    /// What lies within the inode.
    inline: Option<Vec<u8>>,
    at: u64,
}

impl<'a> File<'a> {
    fn new(ext: &'a Ext, inode: Inode) -> Result<Self, TreeError> {
        if inode.flags & flags::ENCRYPTED != 0 {
            return Err(TreeError::Encrypted);
        }
        if inode.flags & flags::COMPRESSED != 0 {
            return Err(TreeError::Unsupported("it is compressed in a way that no kernel reads".into()));
        }
        let inline = if inode.flags & flags::INLINE != 0 {
            Some([&inode.area[..], &attributes::inline_rest(ext, &inode)?].concat())
        } else {
            None
        };
        Ok(Self { ext, inode, inline, at: 0 })
    }
}

impl Content for File<'_> {
    fn next(&mut self, buffer: &mut [u8]) -> Result<Piece, TreeError> {
        let left = self.inode.node.size_bytes - self.at;
        if left == 0 || buffer.is_empty() {
            return Ok(Piece::End);
        }
        if let Some(inline) = &self.inline {
            let rest = inline.get(self.at as usize..).unwrap_or_default();
            let len = rest.len().min(buffer.len()).min(left as usize);
            if len == 0 {
                return Err(TreeError::Damaged(format!("inode {}: its content is shorter than it", self.inode.number)));
            }
            buffer[..len].copy_from_slice(&rest[..len]);
            self.at += len as u64;
            return Ok(Piece::Bytes(len));
        }
        let block_bytes = self.ext.superblock.block_bytes;
        let within = self.at % block_bytes;
        let run = run(self.ext, &self.inode, self.at / block_bytes)?;
        let len = (run.blocks.saturating_mul(block_bytes) - within).min(left);
        let Some(block) = run.block else {
            self.at += len;
            return Ok(Piece::Hole(len));
        };
        let len = len.min(buffer.len() as u64).min(PIECE_BYTES_MAX);
        self.ext.read_content(block * block_bytes + within, &mut buffer[..len as usize])?;
        self.at += len;
        Ok(Piece::Bytes(len as usize))
    }
}
