//! A thread of an export: reads chunks of a point, hashes them, compresses them where that is wanted.
//!
//! Invariant: a chunk has exactly its bytes of the image, in runs; where a block cannot be had its run says why.

use super::{BlockSource, Export, Piece, SourceError, one_line};
use crate::restore::qcow2::packer::{Cluster, Packer};
use crate::restore::tree_hash::{LEAF_BYTES, LeafHasher, Value};
use cdp_protocol::units::{BLOCK_BYTES, Block, Extent, blocks_in};
use std::io;
use std::sync::mpsc::SyncSender;

/// Bytes of a chunk: a leaf of the hash.
pub(super) const CHUNK_BYTES: u64 = LEAF_BYTES;
const CHUNK_BLOCKS: u64 = CHUNK_BYTES / BLOCK_BYTES as u64;

/// Chunks of a volume of so many bytes.
pub(super) const fn chunks_in(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(CHUNK_BYTES)
}

/// A run within a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Bytes,
    Zero,
    Bad(String),
}

/// A part of the image.
#[derive(Default)]
pub(super) struct Chunk {
    /// Of the runs that have any, one behind the other.
    pub(super) content: Vec<u8>,
    /// Length in bytes, and kind.
    pub(super) runs: Vec<(u64, Kind)>,
    /// All of it for a compressed image, or none.
    pub(super) clusters: Vec<Cluster>,
    /// Its value as a leaf.
    pub(super) hash: Value,
}

/// One reading thread.
pub(super) struct Lane<'a> {
    export: &'a Export<'a>,
    source: &'a dyn BlockSource,
    packer: Option<Packer>,
}

impl<'a> Lane<'a> {
    pub(super) fn new(export: &'a Export<'a>, source: &'a dyn BlockSource, packs: bool) -> io::Result<Self> {
        Ok(Self { export, source, packer: packs.then(Packer::new).transpose()? })
    }

    /// Reads these chunks, until the writer is gone.
    pub(super) fn run(&mut self, chunks: impl Iterator<Item = u64>, sender: &SyncSender<Chunk>) {
        for number in chunks {
            let mut chunk = self.read_chunk(number);
            chunk.trim(CHUNK_BYTES.min(self.export.size_bytes - number * CHUNK_BYTES));
            chunk.hash = chunk.value(number * CHUNK_BYTES, self.export.size_bytes);
            if let Some(packer) = &mut self.packer {
                chunk.pack(packer);
            }
            if sender.send(chunk).is_err() {
                return;
            }
        }
    }

    fn read_chunk(&self, number: u64) -> Chunk {
        let first = number * CHUNK_BLOCKS;
        let count = CHUNK_BLOCKS.min(blocks_in(self.export.size_bytes) - first);
        let extent = Extent::new(Block(first as u32), count as u32).expect("volumes are bounded");
        self.read_extent(extent).unwrap_or_else(|_| {
            // Something in it is bad: block by block, to know what.
            let mut parts = Chunk::default();
            for block in extent.blocks() {
                let one = Extent::new(block, 1).expect("one block of the volume");
                match self.read_extent(one) {
                    Ok(part) => parts.append(part),
                    Err(error) => parts.push(one, Kind::Bad(one_line(error.as_ref()))),
                }
            }
            parts
        })
    }

    fn read_extent(&self, extent: Extent) -> Result<Chunk, SourceError> {
        let mut chunk = Chunk::default();
        let mut next = u64::from(extent.start.0);
        let mut in_order = true;
        self.source.read(self.export.slot, extent, &mut |run, piece| {
            in_order &= u64::from(run.start.0) == next;
            next = run.end();
            match piece {
                Piece::Bytes(bytes) => {
                    in_order &= bytes.len() as u64 == run.to_bytes();
                    chunk.content.extend_from_slice(bytes);
                    chunk.push(run, Kind::Bytes);
                }
                Piece::Zero => chunk.push(run, Kind::Zero),
                Piece::Unreadable => chunk.push(run, Kind::Bad("the source could not read it".to_owned())),
            }
        })?;
        assert!(in_order && next == extent.end(), "a point gives all blocks in order: {extent:?} ended at {next}");
        Ok(chunk)
    }
}

impl Chunk {
    fn push(&mut self, run: Extent, kind: Kind) {
        match self.runs.last_mut() {
            Some((len, last)) if *last == kind => *len += run.to_bytes(),
            _ => self.runs.push((run.to_bytes(), kind)),
        }
    }

    fn append(&mut self, other: Self) {
        self.content.extend_from_slice(&other.content);
        self.runs.extend(other.runs);
    }

    /// The last block of a volume may be there in part only: less than a block goes from the last run.
    fn trim(&mut self, len: u64) {
        let surplus = self.runs.iter().map(|(len, _)| len).sum::<u64>() - len;
        let Some((last, kind)) = self.runs.last_mut() else { return };
        *last -= surplus;
        if *kind == Kind::Bytes {
            self.content.truncate(self.content.len() - surplus as usize);
        }
    }

    fn value(&self, offset: u64, size_bytes: u64) -> Value {
        let mut hasher = LeafHasher::new(offset, size_bytes);
        let mut content = self.content.as_slice();
        for (len, kind) in &self.runs {
            if *kind == Kind::Bytes {
                let (bytes, rest) = content.split_at(*len as usize);
                content = rest;
                hasher.update(bytes);
            } else {
                hasher.update_zeros(*len);
            }
        }
        hasher.finish()
    }

    /// Compresses the content; it goes to the output as clusters only.
    fn pack(&mut self, packer: &mut Packer) {
        let mut whole = Vec::with_capacity(CHUNK_BYTES as usize);
        let mut content = self.content.as_slice();
        for (len, kind) in &self.runs {
            if *kind == Kind::Bytes {
                let (bytes, rest) = content.split_at(*len as usize);
                content = rest;
                whole.extend_from_slice(bytes);
            } else {
                whole.resize(whole.len() + *len as usize, 0);
            }
        }
        self.clusters = packer.pack(&whole);
    }
}
