//! The writers: chains past the page cache, and others beside them through it.
//!
//! Owns the rule of a chain: the next record is made, naming what the others have finished, only after the one before it
//! completed. The buffered and the mapped writer have no order to show; what they leave must equal the device in the end.

#![allow(clippy::disallowed_methods, reason = "tests use real devices")]

use crate::board::Board;
use crate::layout::Layout;
use crate::raw::{RawDisk, WriteRing, map};
use crate::record::{Chain, Operation, SECTOR_BYTES, encode};
use anyhow::{Context, Result};
use cdp_seams::random::SimRandom;
use cdp_source::reader::aligned::AlignedBuffer;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread::{Scope, ScopedJoinHandle, park_timeout};
use std::time::Duration;

/// How long the writers through the page cache rest between two writes: the chains are what is to be fast.
const REST: Duration = Duration::from_millis(2);

type Handle<'scope> = ScopedJoinHandle<'scope, Result<()>>;

/// Starts all writers of `layout` on `node`. They end when the board says so, or with what went wrong.
pub(crate) fn start<'scope>(
    scope: &'scope Scope<'scope, '_>,
    node: &'scope Path,
    layout: &'scope Layout,
    board: &'scope Board,
) -> Vec<Handle<'scope>> {
    let mut handles = Vec::new();
    for chain in &layout.alone {
        handles.push(scope.spawn(move || ended(board, write_alone(node, chain, board))));
    }
    if !layout.at_depth.is_empty() {
        handles.push(scope.spawn(move || ended(board, write_at_depth(node, &layout.at_depth, board))));
    }
    if !layout.buffered.is_empty() {
        handles.push(scope.spawn(move || ended(board, write_buffered(node, &layout.buffered, board))));
    }
    if !layout.mapped.is_empty() {
        handles.push(scope.spawn(move || ended(board, write_mapped(node, &layout.mapped, board))));
    }
    handles
}

/// Joins the writers; gives the first thing that went wrong.
pub(crate) fn join(handles: Vec<Handle<'_>>) -> Result<()> {
    handles.into_iter().try_for_each(|handle| handle.join().map_err(|_| anyhow::anyhow!("a writer panicked"))?)
}

/// One that fails stops all.
fn ended(board: &Board, result: Result<()>) -> Result<()> {
    if result.is_err() {
        board.stop();
    }
    result
}

fn write_alone(node: &Path, chain: &Chain, board: &Board) -> Result<()> {
    let disk = RawDisk::open(node)?;
    let longest = (0..chain.slots).map(|slot| chain.length(slot)).max().context("a chain has slots")?;
    let mut buffer = AlignedBuffer::new(longest as usize * SECTOR_BYTES);
    let mut number = 0;
    while !board.is_stopped() {
        number += 1;
        let place = chain.place(number);
        let (offset, len) = (place.sector * SECTOR_BYTES as u64, place.sectors * SECTOR_BYTES as u64);
        let bytes = &mut buffer[..len as usize];
        if chain.operation(number) == Operation::Write {
            encode(chain, number, &board.finished(), bytes);
        }
        board.issue(chain.index, number);
        match chain.operation(number) {
            Operation::Write => disk.write(offset, bytes),
            Operation::Discard => disk.discard(offset, len),
            Operation::ZeroOut => disk.zero_out(offset, len),
            Operation::PunchHole => disk.punch_hole(offset, len),
        }
        .with_context(|| format!("record {number} of {}", chain.name))?;
        board.finish(chain.index, number);
        rest(chain, board);
    }
    Ok(())
}

fn rest(chain: &Chain, board: &Board) {
    let rest = chain.rest + board.pace();
    if !rest.is_zero() {
        park_timeout(rest);
    }
}

fn write_at_depth(node: &Path, chains: &[Chain], board: &Board) -> Result<()> {
    let longest = chains.iter().flat_map(|chain| chain.lengths).max().context("chains have lengths")?;
    let mut ring = WriteRing::new(RawDisk::open(node)?, chains.len(), *longest as usize * SECTOR_BYTES)?;
    let mut numbers = vec![0; chains.len()];
    let mut idle: Vec<usize> = (0..chains.len()).collect();
    loop {
        if !board.is_stopped() {
            for index in idle.drain(..) {
                let chain = &chains[index];
                numbers[index] += 1;
                let (number, place) = (numbers[index], chain.place(numbers[index]));
                let len = place.sectors as usize * SECTOR_BYTES;
                let seen = board.finished();
                board.issue(chain.index, number);
                ring.start(index, place.sector * SECTOR_BYTES as u64, len, |buffer| {
                    encode(chain, number, &seen, buffer);
                })?;
            }
        }
        if !ring.is_busy() {
            return Ok(());
        }
        for index in ring.wait()? {
            board.finish(chains[index].index, numbers[index]);
            idle.push(index);
        }
        rest(&chains[0], board);
    }
}

fn write_buffered(node: &Path, sectors: &Range<u64>, board: &Board) -> Result<()> {
    let file = std::fs::File::options().write(true).open(node)?;
    let random = SimRandom::new(11);
    while !board.is_stopped() {
        for _ in 0..16 {
            let len = 1 + random.below(16);
            let sector = sectors.start + random.below(sectors.end - sectors.start - len);
            let bytes = cdp_tests::files::content(random.next(), len as usize * SECTOR_BYTES);
            file.write_all_at(&bytes, sector * SECTOR_BYTES as u64)?;
            park_timeout(REST);
        }
        file.sync_data()?;
    }
    Ok(file.sync_all()?)
}

fn write_mapped(node: &Path, sectors: &Range<u64>, board: &Board) -> Result<()> {
    let bytes = SECTOR_BYTES as u64;
    let mut mapping = map(node, sectors.start * bytes..sectors.end * bytes)?;
    let random = SimRandom::new(13);
    while !board.is_stopped() {
        for _ in 0..16 {
            let at = random.below(mapping.len() as u64 - 64) as usize;
            mapping[at..at + 64].fill(random.next() as u8);
            park_timeout(REST);
        }
        mapping.flush()?;
    }
    Ok(mapping.flush()?)
}
