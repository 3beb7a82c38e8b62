//! Export: a recovery point's volume as an image.
//!
//! Invariant: the image has exactly the volume's size and content; what cannot be read is an error, or, where damage was
//! allowed, a bad range in the report, never silent zeros. A thread a source reads, decodes, hashes and, where that is wanted, compresses
//! (`lane`); the caller writes in order; between them at most `QUEUE_CHUNKS + 2` chunks of 1 MiB a thread.

mod lane;

use super::output::Output;
use super::point::{Content, PointImage};
use super::progress::Line;
use super::tree_hash::{STRIDE_LEAVES, TreeHash};
use cdp_protocol::units::{Block, Extent, VolumeSlot, blocks_in};
use lane::{Chunk, Kind, Lane};
use serde::Serialize;
use std::error::Error;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};

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

    /// Gives the runs of `extent` that may hold anything but zeros, in order: by the index, without reading them.
    ///
    /// # Errors
    /// Where the index cannot be read.
    fn content(&self, slot: VolumeSlot, extent: Extent, out: &mut dyn FnMut(Extent)) -> Result<(), SourceError>;
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

    fn content(&self, slot: VolumeSlot, extent: Extent, out: &mut dyn FnMut(Extent)) -> Result<(), SourceError> {
        Ok(self.content_of(slot, extent, out)?)
    }
}

/// Bytes of a volume that may be other than zeros, by the index.
///
/// # Errors
/// Where the index cannot be read.
pub(crate) fn content_bytes(source: &dyn BlockSource, slot: VolumeSlot, size_bytes: u64) -> Result<u64, SourceError> {
    let mut bytes = 0;
    let all = u32::try_from(blocks_in(size_bytes)).ok().and_then(|count| Extent::new(Block(0), count));
    if let Some(all) = all {
        source.content(slot, all, &mut |run| bytes += run.to_bytes())?;
    }
    Ok(bytes)
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
    /// What was written cannot be read again.
    #[error("read again what was written")]
    ReadAgain(#[source] io::Error),
    /// A thread could not begin.
    #[error("prepare to compress")]
    Packer(#[source] io::Error),
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

/// What of an image is there already, proved.
#[derive(Clone, Debug, Default)]
pub struct Begun {
    /// The hash so far, of whole strides.
    pub(crate) hash: TreeHash,
    /// Bytes of it that are no zeros by the point's index.
    pub(crate) content_bytes: u64,
}

impl Begun {
    /// How many strides, the last one of the image being short or not.
    pub(crate) fn strides(&self) -> usize {
        self.hash.count().div_ceil(STRIDE_LEAVES) as usize
    }

    /// Bytes; more than the image has where its last stride is short.
    pub(crate) fn bytes(&self) -> u64 {
        self.hash.count() * lane::CHUNK_BYTES
    }
}

impl Export<'_> {
    /// Writes the image to `output` and syncs it; to publish it is the caller's.
    ///
    /// # Errors
    /// Where the point cannot be read, the output fails or the operator ends it.
    pub fn run(&self, output: &mut dyn Output) -> Result<Exported, ExportError> {
        self.go_on(output, Begun::default(), &mut |_| ())
    }

    /// The same behind what has begun. Tells `note` of each stride that was handed to the output, up to the first bad range.
    ///
    /// # Errors
    /// As [`Export::run`].
    pub fn go_on(
        &self,
        output: &mut dyn Output,
        begun: Begun,
        note: &mut dyn FnMut(Line),
    ) -> Result<Exported, ExportError> {
        let chunks = lane::chunks_in(self.size_bytes);
        let (first, threads) = (begun.hash.count(), self.sources.len() as u64);
        let packs = output.is_packed();
        let from = begun.bytes().min(self.size_bytes);
        output.cut(from).and_then(|()| output.begin()).map_err(|source| ExportError::Write { offset: from, source })?;
        let mut writer = Writer::new(self, output, begun, note);
        std::thread::scope(|scope| {
            let mut lanes: Vec<Receiver<Chunk>> = Vec::new();
            for (number, source) in self.sources.iter().enumerate() {
                let (sender, receiver) = sync_channel(QUEUE_CHUNKS);
                let mut lane = Lane::new(self, *source, packs).map_err(ExportError::Packer)?;
                let mine = (first + number as u64..chunks).step_by(threads as usize);
                scope.spawn(move || lane.run(mine, &sender));
                lanes.push(receiver);
            }
            for chunk in first..chunks {
                let lane = &lanes[((chunk - first) % threads) as usize];
                let chunk = lane.recv().expect("a lane ends after its last chunk");
                writer.take(&chunk)?;
            }
            Ok(())
        })?;
        writer.finish()
    }
}

/// The end of the pipeline that writes and counts.
struct Writer<'a, 'b> {
    export: &'a Export<'b>,
    output: &'a mut dyn Output,
    note: &'a mut dyn FnMut(Line),
    hash: TreeHash,
    offset: u64,
    content_bytes: u64,
    /// Of the stride that is under way.
    stride_bytes: u64,
    bad: Vec<BadRange>,
}

impl<'a, 'b> Writer<'a, 'b> {
    fn new(export: &'a Export<'b>, output: &'a mut dyn Output, begun: Begun, note: &'a mut dyn FnMut(Line)) -> Self {
        let offset = export.size_bytes.min(begun.bytes());
        let (hash, content_bytes) = (begun.hash, begun.content_bytes);
        Self { export, output, note, hash, offset, content_bytes, stride_bytes: 0, bad: Vec::new() }
    }

    fn take(&mut self, chunk: &Chunk) -> Result<(), ExportError> {
        if self.export.stop.load(Ordering::Relaxed) {
            return Err(ExportError::Interrupted);
        }
        let packs = self.output.is_packed();
        let start = self.offset;
        let mut content = chunk.content.as_slice();
        for (len, kind) in &chunk.runs {
            match kind {
                Kind::Bytes => {
                    let (bytes, rest) = content.split_at(*len as usize);
                    content = rest;
                    self.stride_bytes += len;
                    if !packs {
                        self.output.write(self.offset, bytes).map_err(self.failed())?;
                    }
                }
                Kind::Zero => self.zeros(*len)?,
                Kind::Bad(reason) => self.bad(*len, reason)?,
            }
            self.offset += len;
            (self.export.progress)(*len);
        }
        for cluster in &chunk.clusters {
            self.output.cluster(cluster).map_err(|source| ExportError::Write { offset: start, source })?;
        }
        self.hash.push(chunk.hash);
        if self.hash.count().is_multiple_of(STRIDE_LEAVES) || self.offset == self.export.size_bytes {
            self.end_stride();
        }
        Ok(())
    }

    fn end_stride(&mut self) {
        let content_bytes = std::mem::take(&mut self.stride_bytes);
        self.content_bytes += content_bytes;
        // What is bad is to be reported again when this is gone on with.
        if self.bad.is_empty() {
            (self.note)(Line { value: self.hash.stride(), content_bytes });
        }
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> ExportError + use<> {
        let offset = self.offset;
        move |source| ExportError::Write { offset, source }
    }

    fn zeros(&mut self, len: u64) -> Result<(), ExportError> {
        if self.output.is_packed() { Ok(()) } else { self.output.zero(self.offset, len).map_err(self.failed()) }
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
        Ok(Exported { content_bytes: self.content_bytes, hash: self.hash.root(), bad: self.bad })
    }
}

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
