//! Export: a recovery point's volume as a raw image.
//!
//! Invariant: the image has exactly the volume's size and content; what cannot be read is an error, or, where damage was
//! allowed, a bad range in the report, never silent zeros. A thread a source reads and decodes, the caller writes in order and
//! hashes; between them at most `QUEUE_CHUNKS + 2` chunks of 1 MiB a thread.

use super::output::Output;
use super::point::{Content, PointImage};
use cdp_protocol::units::{Block, Extent, VolumeSlot, blocks_in};
use serde::Serialize;
use std::error::Error;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

const CHUNK_BLOCKS: u64 = 256;
const QUEUE_CHUNKS: usize = 3;

/// What a run of blocks holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Content, 4 KiB a block.
    Bytes(&'a [u8]),
    /// Zeros.
    Zero,
    /// The source's device could not read them.
    Unreadable,
}

/// Why blocks could not be read.
pub type SourceError = Box<dyn Error + Send + Sync>;

/// A recovery point's blocks.
pub trait BlockSource: Sync {
    /// Gives the blocks of `extent` of a volume to `out`, in order and all of them.
    ///
    /// # Errors
    /// Where any of them cannot be had; what was given before counts for nothing.
    fn read(&self, slot: VolumeSlot, extent: Extent, out: &mut dyn FnMut(Extent, Piece<'_>))
    -> Result<(), SourceError>;
}

impl BlockSource for PointImage {
    fn read(
        &self,
        slot: VolumeSlot,
        extent: Extent,
        out: &mut dyn FnMut(Extent, Piece<'_>),
    ) -> Result<(), SourceError> {
        let mut give = |run: Extent, content: Content<'_>| match content {
            Content::Bytes(bytes) => out(run, Piece::Bytes(bytes)),
            Content::Zero => out(run, Piece::Zero),
            Content::Unreadable => out(run, Piece::Unreadable),
        };
        Ok(self.read_blocks(slot, extent, &mut give)?)
    }
}

/// A run of bytes that the image does not have. It reads as zeros there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BadRange {
    /// Offset of its first byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Why, in one line.
    pub reason: String,
}

/// What an export amounted to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exported {
    /// Bytes that were not holes.
    pub content_bytes: u64,
    /// BLAKE3 of the whole image.
    pub hash: blake3::Hash,
    /// What is missing.
    pub bad: Vec<BadRange>,
}

/// Why an export ended early.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The output failed.
    #[error("write image at offset {offset}")]
    Write {
        /// Where.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The image could not be made durable.
    #[error("sync image")]
    Sync(#[source] io::Error),
    /// A block cannot be read, and damage was not allowed.
    #[error("read point at offset {offset}: {reason}")]
    Damaged {
        /// Where.
        offset: u64,
        /// Why, in one line.
        reason: String,
    },
    /// The operator ended it.
    #[error("interrupted")]
    Interrupted,
}

/// How an export goes.
pub struct Export<'a> {
    /// The point, opened once for each thread that is to read it; at least one.
    pub sources: &'a [&'a dyn BlockSource],
    /// The volume's place in its group.
    pub slot: VolumeSlot,
    /// The volume's size.
    pub size_bytes: u64,
    /// Whether bad ranges are reported instead of refused.
    pub allow_damaged: bool,
    /// Ends the export where it turns true.
    pub stop: &'a AtomicBool,
    /// Told of every piece done, in bytes.
    pub progress: &'a (dyn Fn(u64) + Sync),
}

/// A run within a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Bytes,
    Zero,
    Bad(String),
}

#[derive(Default)]
struct Chunk {
    content: Vec<u8>,
    runs: Vec<(u64, Kind)>,
}

impl<'b> Export<'b> {
    /// Writes the image to `output` and syncs it; to publish it is the caller's.
    ///
    /// # Errors
    /// Where the point cannot be read, the output fails or the operator ends it.
    pub fn run(&self, output: &mut dyn Output) -> Result<Exported, ExportError> {
        let chunks = blocks_in(self.size_bytes).div_ceil(CHUNK_BLOCKS);
        let threads = self.sources.len() as u64;
        let mut writer = Writer::new(self, output);
        std::thread::scope(|scope| {
            let lane = |(lane, source): (usize, &&'b dyn BlockSource)| {
                let (sender, receiver) = sync_channel(QUEUE_CHUNKS);
                let (reader, mine) = (Reader { export: self, source: *source }, lane as u64..chunks);
                scope.spawn(move || reader.run(mine.step_by(threads as usize), &sender));
                receiver
            };
            let lanes: Vec<Receiver<Chunk>> = self.sources.iter().enumerate().map(lane).collect();
            for chunk in 0..chunks {
                let lane = &lanes[(chunk % threads) as usize];
                let chunk = lane.recv().expect("a lane ends after its last chunk");
                writer.take(&chunk)?;
            }
            Ok(())
        })?;
        writer.finish()
    }
}

/// One reading thread.
struct Reader<'a> {
    export: &'a Export<'a>,
    source: &'a dyn BlockSource,
}

impl Reader<'_> {
    /// Reads these chunks, until the writer is gone.
    fn run(&self, chunks: impl Iterator<Item = u64>, sender: &SyncSender<Chunk>) {
        for chunk in chunks {
            if sender.send(self.read_chunk(chunk)).is_err() {
                return;
            }
        }
    }

    fn read_chunk(&self, chunk: u64) -> Chunk {
        let first = chunk * CHUNK_BLOCKS;
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
}

/// The end of the pipeline that writes, hashes and counts.
struct Writer<'a, 'b> {
    export: &'a Export<'b>,
    output: &'a mut dyn Output,
    hasher: blake3::Hasher,
    offset: u64,
    content_bytes: u64,
    bad: Vec<BadRange>,
}

impl<'a, 'b> Writer<'a, 'b> {
    fn new(export: &'a Export<'b>, output: &'a mut dyn Output) -> Self {
        Self { export, output, hasher: blake3::Hasher::new(), offset: 0, content_bytes: 0, bad: Vec::new() }
    }

    fn take(&mut self, chunk: &Chunk) -> Result<(), ExportError> {
        if self.export.stop.load(Ordering::Relaxed) {
            return Err(ExportError::Interrupted);
        }
        let mut content = chunk.content.as_slice();
        for (len, kind) in &chunk.runs {
            // The last block of a volume may be there in part only.
            let kept = (*len).min(self.export.size_bytes - self.offset);
            match kind {
                Kind::Bytes => {
                    let (bytes, rest) = content.split_at(*len as usize);
                    content = rest;
                    self.bytes(&bytes[..kept as usize])?;
                }
                Kind::Zero => self.zeros(kept)?,
                Kind::Bad(reason) => self.bad(kept, reason)?,
            }
            self.offset += kept;
            (self.export.progress)(kept);
        }
        Ok(())
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        self.hasher.update(bytes);
        self.content_bytes += bytes.len() as u64;
        self.output.write(self.offset, bytes).map_err(|source| ExportError::Write { offset: self.offset, source })
    }

    fn zeros(&mut self, len: u64) -> Result<(), ExportError> {
        let mut left = len;
        while left > 0 {
            let piece = left.min(ZEROS.len() as u64);
            self.hasher.update(&ZEROS[..piece as usize]);
            left -= piece;
        }
        self.output.zero(self.offset, len).map_err(|source| ExportError::Write { offset: self.offset, source })
    }

    fn bad(&mut self, len: u64, reason: &str) -> Result<(), ExportError> {
        if !self.export.allow_damaged {
            return Err(ExportError::Damaged { offset: self.offset, reason: reason.to_owned() });
        }
        match self.bad.last_mut() {
            Some(last) if last.offset + last.len == self.offset && last.reason == reason => last.len += len,
            _ => self.bad.push(BadRange { offset: self.offset, len, reason: reason.to_owned() }),
        }
        self.zeros(len)
    }

    fn finish(self) -> Result<Exported, ExportError> {
        assert_eq!(self.offset, self.export.size_bytes, "the image has the volume's size");
        self.output.sync().map_err(ExportError::Sync)?;
        Ok(Exported { content_bytes: self.content_bytes, hash: self.hasher.finalize(), bad: self.bad })
    }
}

static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// An error and its causes, in one line.
#[must_use]
pub fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Some errors print their cause themselves.
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line.replace('\n', " ")
}

#[cfg(test)]
mod tests;
