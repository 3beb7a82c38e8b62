//! A volume at a point as a disk: bytes out of blocks, and an overlay over them where there is one.
//!
//! Invariant: a block that is lost, damaged or was unreadable at its source is an error that names it, in the log and to the client;
//! never zeros. Nothing is ever written to the store.

use super::overlay::{OverlayError, OverlayVolume, State};
use super::points::OpenPoint;
use super::wire::{Errno, transmission};
use crate::restore::image::one_line;
use crate::restore::point::{Content, ReadError};
use cdp_protocol::record::Volume;
use cdp_protocol::units::{BLOCK_BYTES, Block, Extent, blocks_in};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of which it is told at once whether they are zeros.
const STATUS_BYTES_MAX: u64 = 1 << 30;
/// Runs of which that is told at once.
const STATUS_RUNS_MAX: usize = 8192;
/// Places of which a connection says once that they cannot be read; then it says no more of others.
const NOTED_MAX: usize = 1000;

/// What a run of bytes holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Run<'a> {
    Bytes(&'a [u8]),
    Zeros(u64),
}

/// Why something cannot be had, or kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskError {
    /// What the client is told.
    pub(super) errno: Errno,
    /// Where.
    pub(crate) offset: u64,
    /// Why, in a line.
    pub(crate) reason: String,
}

/// An export.
pub struct Disk {
    point: Arc<OpenPoint>,
    volume: Volume,
    overlay: Option<OverlayVolume>,
    description: String,
    noted: Mutex<BTreeSet<u64>>,
}

impl Disk {
    pub(super) const fn new(
        point: Arc<OpenPoint>,
        volume: Volume,
        overlay: Option<OverlayVolume>,
        description: String,
    ) -> Self {
        Self { point, volume, overlay, description, noted: Mutex::new(BTreeSet::new()) }
    }

    /// A volume of a point, for whoever reads it without a client.
    pub(crate) const fn of_point(point: Arc<OpenPoint>, volume: Volume) -> Self {
        Self::new(point, volume, None, String::new())
    }

    pub(crate) const fn size_bytes(&self) -> u64 {
        self.volume.size_bytes
    }

    pub(super) fn name(&self) -> &str {
        &self.volume.name
    }

    pub(super) fn description(&self) -> &str {
        &self.description
    }

    pub(super) const fn is_writable(&self) -> bool {
        self.overlay.is_some()
    }

    /// What the client is told that it can do.
    pub(super) const fn transmission_flags(&self, is_structured: bool) -> u16 {
        use transmission as can;
        let all = can::HAS_FLAGS | can::CAN_MULTI_CONN | can::SEND_CACHE;
        let writes = can::SEND_FLUSH | can::SEND_FUA | can::SEND_TRIM | can::SEND_WRITE_ZEROES | can::SEND_FAST_ZERO;
        all | if self.is_writable() { writes } else { can::READ_ONLY } | if is_structured { can::SEND_DF } else { 0 }
    }

    /// Gives `len` bytes from `offset` on to `out`, in order; where that fails, what was given counts for nothing.
    pub(crate) fn read(&self, offset: u64, len: u64, out: &mut dyn FnMut(Run<'_>)) -> Result<(), DiskError> {
        let Some(extent) = self.blocks(offset, len) else { return Ok(()) };
        let end = offset + len;
        // Of the first and the last block a part may be asked for.
        let mut give = |blocks: Extent, content: Option<&[u8]>| {
            let (first, last) =
                (blocks.start.to_bytes().max(offset), (blocks.start.to_bytes() + blocks.to_bytes()).min(end));
            match content {
                Some(bytes) => {
                    let skipped = (first - blocks.start.to_bytes()) as usize;
                    out(Run::Bytes(&bytes[skipped..skipped + (last - first) as usize]));
                }
                None => out(Run::Zeros(last - first)),
            }
        };
        let Some(overlay) = &self.overlay else { return self.read_point(extent, &mut give) };
        let mut bytes = Vec::new();
        for (run, state) in overlay.states(extent) {
            match state {
                State::Untouched => self.read_point(run, &mut give)?,
                State::Zero => give(run, None),
                State::Written => {
                    bytes.resize(run.to_bytes() as usize, 0);
                    overlay.read(run, &mut bytes).map_err(|error| overlay_failed(run.start.to_bytes(), &error))?;
                    give(run, Some(&bytes));
                }
            }
        }
        Ok(())
    }

    /// Reads blocks of the point.
    fn read_point(&self, extent: Extent, give: &mut dyn FnMut(Extent, Option<&[u8]>)) -> Result<(), DiskError> {
        let mut unreadable = None;
        let mut take = |run: Extent, content: Content<'_>| match content {
            Content::Bytes(bytes) => give(run, Some(bytes)),
            Content::Zero => give(run, None),
            Content::Unreadable => unreadable = unreadable.or(Some(run)),
        };
        let read = self.point.image.read_blocks(self.volume.slot, extent, &mut take);
        let (blocks, reason) = match (read, unreadable) {
            (Ok(()), None) => return Ok(()),
            (Err(error), _) => (error_extent(&error).unwrap_or(extent), one_line(&error)),
            (Ok(()), Some(run)) => {
                (run, format!("blocks {}..{} could not be read at the source", run.start, run.end()))
            }
        };
        let offset = blocks.start.to_bytes().max(extent.start.to_bytes());
        self.note(offset, &reason);
        Err(DiskError { errno: Errno::Io, offset, reason })
    }

    /// Says in the log what cannot be read; once, for somebody who tries it again and again.
    fn note(&self, offset: u64, reason: &str) {
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        if noted.len() < NOTED_MAX && noted.insert(offset) {
            let (volume, point) = (&self.volume.name, self.point.epoch());
            tracing::error!(volume, %point, offset, reason, "a block cannot be read");
        }
    }

    /// The blocks of some bytes; none where there are no bytes.
    fn blocks(&self, offset: u64, len: u64) -> Option<Extent> {
        assert!(offset + len <= self.size_bytes(), "a request was checked");
        let first = offset / BLOCK_BYTES as u64;
        Extent::new(Block(first as u32), (blocks_in(offset + len) - first) as u32).filter(|_| len > 0)
    }

    /// Tells of bytes from `offset` on, of at most `len` and of one at least, whether they are known to be zeros: lengths in order.
    pub(super) fn status(&self, offset: u64, len: u64) -> Result<Vec<(u32, bool)>, DiskError> {
        let len = len.min(STATUS_BYTES_MAX);
        let Some(extent) = self.blocks(offset, len) else { return Ok(Vec::new()) };
        let mut zeros = Zeros { next: offset, end: offset + len, runs: Vec::new() };
        let states =
            self.overlay.as_ref().map_or_else(|| vec![(extent, State::Untouched)], |overlay| overlay.states(extent));
        for (run, state) in states {
            if zeros.runs.len() >= STATUS_RUNS_MAX {
                break;
            }
            match state {
                State::Untouched => {
                    let told =
                        self.point.image.map_blocks(self.volume.slot, run, &mut |run, zero| zeros.push(run, zero));
                    told.map_err(|error| DiskError { errno: Errno::Io, offset, reason: one_line(&error) })?;
                }
                State::Zero => zeros.push(run, true),
                State::Written => zeros.push(run, false),
            }
        }
        zeros.runs.truncate(STATUS_RUNS_MAX);
        Ok(zeros.runs)
    }

    /// Has `len` bytes from `offset` on decoded, for whoever reads them soon. What cannot be is told to whoever does.
    pub(super) fn warm(&self, offset: u64, len: u64) {
        let Some(extent) = self.blocks(offset, len) else { return };
        if let Err(error) = self.point.image.read_blocks(self.volume.slot, extent, &mut |_, _| {}) {
            tracing::debug!(error = one_line(&error), "not read ahead");
        }
    }

    /// Keeps bytes at `offset`.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.change(offset, bytes.len() as u64, &mut |overlay, change| match change {
            Change::Whole(blocks) => {
                let from = (blocks.start.to_bytes() - offset) as usize;
                overlay.write(blocks, &bytes[from..from + blocks.to_bytes() as usize])
            }
            Change::Part(block, content, within) => {
                let from = (block.start.to_bytes() + within.start as u64 - offset) as usize;
                content[within.clone()].copy_from_slice(&bytes[from..from + within.len()]);
                overlay.write(block, content)
            }
        })
    }

    /// Makes `len` bytes from `offset` on zeros; with `provision` they have their room on the disk.
    pub(super) fn zero(&self, offset: u64, len: u64, provision: bool) -> Result<(), DiskError> {
        self.change(offset, len, &mut |overlay, change| match change {
            Change::Whole(blocks) if provision => {
                parts_of(blocks).try_for_each(|part| overlay.write(part, &ZEROS[..part.to_bytes() as usize]))
            }
            Change::Whole(blocks) => overlay.zero(blocks),
            Change::Part(block, content, within) => {
                content[within].fill(0);
                overlay.write(block, content)
            }
        })
    }

    /// Makes what is whole of the blocks of some bytes zeros: they are of no use any more.
    pub(super) fn trim(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.change(offset, len, &mut |overlay, change| match change {
            Change::Whole(blocks) => overlay.zero(blocks),
            Change::Part(..) => Ok(()),
        })
    }

    /// Makes durable what was written before, by anybody.
    pub(super) fn flush(&self) -> Result<(), DiskError> {
        let Some(overlay) = &self.overlay else { return Ok(()) };
        overlay.flush().map_err(|error| overlay_failed(0, &error))
    }

    /// Changes some bytes: whole blocks as they are, of others a part, with the rest as it was.
    fn change(&self, offset: u64, len: u64, apply: &mut Apply<'_>) -> Result<(), DiskError> {
        let overlay = self.overlay.as_ref().expect("a request was checked: only what is writable is written");
        let Some(extent) = self.blocks(offset, len) else { return Ok(()) };
        let end = offset + len;
        let is_whole = |block: Block| block.to_bytes() >= offset && block.to_bytes() + BLOCK_BYTES as u64 <= end;
        let (mut first, mut last) = (u64::from(extent.start.0), extent.end());
        let mut parts = Vec::new();
        if !is_whole(extent.start) {
            parts.push(extent.start);
            first += 1;
        }
        let end_block = Block((last - 1) as u32);
        if last > first && !is_whole(end_block) {
            parts.push(end_block);
            last -= 1;
        }
        for block in parts {
            let block = Extent::new(block, 1).expect("a block of the volume");
            let start = block.start.to_bytes();
            let within = offset.saturating_sub(start) as usize..(end - start).min(BLOCK_BYTES as u64) as usize;
            // Others may write another part of it.
            let _parts = overlay.parts();
            let mut content = self.whole_block(block)?;
            apply(overlay, Change::Part(block, &mut content, within)).map_err(|error| overlay_failed(start, &error))?;
        }
        if let Some(whole) = Extent::new(Block(first as u32), (last - first) as u32) {
            let at = whole.start.to_bytes();
            apply(overlay, Change::Whole(whole)).map_err(|error| overlay_failed(at, &error))?;
        }
        Ok(())
    }

    /// A block as it is now, with zeros behind the volume's end.
    fn whole_block(&self, block: Extent) -> Result<Vec<u8>, DiskError> {
        let start = block.start.to_bytes();
        let len = (self.size_bytes() - start).min(BLOCK_BYTES as u64);
        let mut content = Vec::with_capacity(BLOCK_BYTES);
        self.read(start, len, &mut |run| match run {
            Run::Bytes(bytes) => content.extend_from_slice(bytes),
            Run::Zeros(len) => content.resize(content.len() + len as usize, 0),
        })?;
        content.resize(BLOCK_BYTES, 0);
        Ok(content)
    }
}

/// A change of a disk's blocks.
enum Change<'a> {
    /// Of all of them.
    Whole(Extent),
    /// Of these bytes of one block, whose content as it is now is there.
    Part(Extent, &'a mut [u8], Range<usize>),
}

/// Does a change.
type Apply<'a> = dyn FnMut(&OverlayVolume, Change<'_>) -> Result<(), OverlayError> + 'a;

static ZEROS: [u8; 256 * BLOCK_BYTES] = [0; 256 * BLOCK_BYTES];

/// Blocks in parts of as many as there are in `ZEROS`.
fn parts_of(blocks: Extent) -> impl Iterator<Item = Extent> {
    let step = ZEROS.len() / BLOCK_BYTES;
    let part = move |start: u64| {
        let count = (blocks.end() - start).min(step as u64) as u32;
        Extent::new(Block(start as u32), count).expect("a part of an extent")
    };
    (u64::from(blocks.start.0)..blocks.end()).step_by(step).map(part)
}

/// What the client is told of an overlay that did not do its part; the log has it already where it is to be there.
fn overlay_failed(offset: u64, error: &OverlayError) -> DiskError {
    let errno = if error.is_full() { Errno::NoSpace } else { Errno::Io };
    DiskError { errno, offset, reason: one_line(error) }
}

/// The blocks that an error is about.
const fn error_extent(error: &ReadError) -> Option<Extent> {
    match error {
        ReadError::Damaged { extent, .. } | ReadError::NotCovered { extent, .. } => Some(*extent),
        ReadError::NoVolume { .. } | ReadError::Journal(_) => None,
    }
}

/// Joins what is told of zeros, and cuts it where it was asked for.
struct Zeros {
    next: u64,
    end: u64,
    runs: Vec<(u32, bool)>,
}

impl Zeros {
    fn push(&mut self, blocks: Extent, is_zero: bool) {
        let end = (blocks.start.to_bytes() + blocks.to_bytes()).min(self.end);
        let len = end.saturating_sub(self.next) as u32;
        self.next += u64::from(len);
        match self.runs.last_mut() {
            Some((known, state)) if *state == is_zero => *known += len,
            _ if len > 0 => self.runs.push((len, is_zero)),
            _ => {}
        }
    }
}
