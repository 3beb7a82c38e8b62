//! A value in clusters of its own: holes, what was never written, what is compressed.
//!
//! Invariant: what was allocated and never written is zeros, whatever its clusters hold: that may be another file's.

use super::lznt1::unpack;
use super::{Ntfs, damaged};
use crate::files::tree::{Content, Piece, TreeError};

/// Bytes that are given at once, at most.
const PIECE_BYTES_MAX: u64 = 1 << 20;

/// Clusters that lie one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The first one within the value.
    pub(super) at: u64,
    /// The first one within the file system; `None` for zeros.
    pub(super) cluster: Option<u64>,
    pub(super) clusters: u64,
}

/// A value in clusters.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    /// In order of what they are about.
    pub(super) runs: Vec<Run>,
    pub(super) size_bytes: u64,
    /// Up to where it was ever written.
    pub(super) initialized_bytes: u64,
    pub(super) is_encrypted: bool,
    /// Clusters that are compressed together; 0 where they are not.
    pub(super) unit_clusters: u64,
    pub(super) cluster_bytes: u64,
}

impl Stream {
    /// The run that a byte lies in: its place on the disk, and how many bytes follow it there.
    fn place(&self, offset: u64) -> Result<(Option<u64>, u64), TreeError> {
        let at = offset / self.cluster_bytes;
        let behind = self.runs.partition_point(|run| run.at <= at);
        let run = behind.checked_sub(1).map(|number| self.runs[number]).filter(|run| at - run.at < run.clusters);
        let run = run.ok_or_else(|| damaged("its clusters are fewer than it is long"))?;
        let within = offset - run.at * self.cluster_bytes;
        let left = run.clusters.saturating_mul(self.cluster_bytes) - within;
        let place = run.cluster.map(|cluster| cluster.saturating_mul(self.cluster_bytes).saturating_add(within));
        Ok((place, left))
    }

    /// Reads bytes of it, which must not be compressed.
    ///
    /// # Errors
    /// Where they cannot be read.
    pub(super) fn read(&self, ntfs: &Ntfs, offset: u64, buffer: &mut [u8]) -> Result<(), TreeError> {
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let (place, left) = if at >= self.initialized_bytes { (None, rest.len() as u64) } else { self.place(at)? };
            let (part, behind) = rest.split_at_mut(left.min(rest.len() as u64) as usize);
            match place {
                Some(place) => ntfs.bytes.read(place, part)?,
                None => part.fill(0),
            }
            let read = at + part.len() as u64;
            if read > self.initialized_bytes {
                let written = self.initialized_bytes.saturating_sub(at) as usize;
                part[written..].fill(0);
            }
            (at, rest) = (read, behind);
        }
        Ok(())
    }
}

/// A file's content.
pub(super) enum File<'a> {
    /// In the record.
    Here { value: Vec<u8>, at: usize },
    /// In clusters.
    Away { ntfs: &'a Ntfs, stream: Stream, at: u64, unit: Vec<u8>, unit_at: u64 },
}

impl Content for File<'_> {
    fn next(&mut self, buffer: &mut [u8]) -> Result<Piece, TreeError> {
        match self {
            Self::Here { value, at } => {
                let len = (value.len() - *at).min(buffer.len());
                buffer[..len].copy_from_slice(&value[*at..*at + len]);
                *at += len;
                Ok(if len == 0 { Piece::End } else { Piece::Bytes(len) })
            }
            Self::Away { ntfs, stream, at, unit, unit_at } => {
                let left = stream.size_bytes - *at;
                if left == 0 || buffer.is_empty() {
                    return Ok(Piece::End);
                }
                if *at >= stream.initialized_bytes {
                    *at = stream.size_bytes;
                    return Ok(Piece::Hole(left));
                }
                let left = left.min(stream.initialized_bytes - *at);
                let piece = if stream.unit_clusters > 0 {
                    packed(ntfs, stream, *at, (unit, unit_at), buffer, left)?
                } else {
                    plain(ntfs, stream, *at, buffer, left)?
                };
                *at += match piece {
                    Piece::Bytes(len) => len as u64,
                    Piece::Hole(len) => len,
                    Piece::End => 0,
                };
                Ok(piece)
            }
        }
    }
}

fn plain(ntfs: &Ntfs, stream: &Stream, at: u64, buffer: &mut [u8], left: u64) -> Result<Piece, TreeError> {
    let (place, run) = stream.place(at)?;
    let len = run.min(left);
    let Some(place) = place else { return Ok(Piece::Hole(len)) };
    let len = len.min(buffer.len() as u64).min(PIECE_BYTES_MAX) as usize;
    ntfs.bytes.read_content(place, &mut buffer[..len])?;
    Ok(Piece::Bytes(len))
}

/// Content that is compressed in units: one that has all its clusters is as it is, one that has none is zeros.
fn packed(
    ntfs: &Ntfs,
    stream: &Stream,
    at: u64,
    (unit, unit_at): (&mut Vec<u8>, &mut u64),
    buffer: &mut [u8],
    left: u64,
) -> Result<Piece, TreeError> {
    let unit_bytes = stream.unit_clusters * stream.cluster_bytes;
    if unit_bytes > PIECE_BYTES_MAX {
        return Err(damaged("its units of compression are too large"));
    }
    let start = at / unit_bytes * unit_bytes;
    let within = (at - start) as usize;
    if unit.is_empty() || *unit_at != start {
        let mut stored = Vec::new();
        let mut next = start;
        while next < start + unit_bytes {
            let (Some(place), run) = stream.place(next)? else { break };
            let len = run.min(start + unit_bytes - next);
            let from = stored.len();
            stored.resize(from + len as usize, 0);
            ntfs.bytes.read_content(place, &mut stored[from..])?;
            next += len;
        }
        if stored.is_empty() {
            return Ok(Piece::Hole((unit_bytes - within as u64).min(left)));
        }
        *unit = if next == start + unit_bytes { stored } else { unpack(&stored, unit_bytes as usize)? };
        *unit_at = start;
    }
    let len = (unit.len() - within).min(left as usize).min(buffer.len());
    buffer[..len].copy_from_slice(&unit[within..within + len]);
    Ok(Piece::Bytes(len))
}
