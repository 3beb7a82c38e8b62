//! What the target holds of every block, asked for by a machine whose own digests are lost: 16 bytes a block instead of its content.
//!
//! Asks of the newest point there is when it begins; what the target is sent later is for whoever opens the group to ask for, as after any
//! death. Reads no volume and writes none.

use super::compare::{self, Point, Subject};
use super::line::{LineError, PointLine};
use crate::audit::Found;
use crate::connect::Identity;
use crate::digests::Learning;
use cdp_protocol::record::Volume;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{Extent, GroupId, Head, VolumeSlot, blocks_in};
use cdp_seams::random::SystemRandom;
use cdp_seams::storage::Storage;
use roaring::RoaringBitmap;
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;

/// Why it is not known.
#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    /// The target does not tell, and will not.
    #[error("{0}")]
    Refused(String),
    /// The line, or the disk; it may go well later.
    #[error("{0}")]
    Lost(String),
}

/// Whose blocks, and where the digests are kept.
pub struct Lost<'a> {
    /// Where files are kept.
    pub storage: &'a Arc<dyn Storage>,
    /// The digests' folder.
    pub folder: &'a Path,
    /// The group.
    pub group: GroupId,
    /// Its volumes.
    pub volumes: &'a [Volume],
    /// Its key.
    pub key: &'a DataKey,
}

/// Asks for all of it, and keeps it. `goes_on` is told how many blocks of how many are done.
///
/// # Errors
/// Where the target does not tell, the line is lost, the disk fails, or `goes_on` says that it does not.
pub fn learn(lost: &Lost<'_>, identity: Identity, goes_on: &mut dyn FnMut(u64, u64) -> bool) -> Result<(), LearnError> {
    let mut line = PointLine::open(identity, lost.group, "latest").map_err(|error| of_line(&error))?;
    let point = line.point().clone();
    let kept = |error: std::io::Error| LearnError::Lost(format!("keep the digests: {error}"));
    let mut learning =
        Learning::begin(lost.storage, lost.folder, lost.group, lost.volumes, &SystemRandom).map_err(kept)?;
    // Of a volume that has grown since, what it had then.
    let held = |volume: &Volume| point.volumes.iter().find(|held| held.slot == volume.slot).map(|held| held.size_bytes);
    let asked = lost.volumes.iter().enumerate().filter_map(|(at, volume)| {
        let blocks = blocks_in(held(volume)?).min(blocks_in(volume.size_bytes));
        Some((at, volume.slot, blocks))
    });
    let asked: Vec<(usize, VolumeSlot, u64)> = asked.collect();
    let all: u64 = asked.iter().map(|(_, _, blocks)| blocks).sum();
    let mut done = 0;
    for (volume, slot, blocks) in asked {
        let subject = Subject { group: lost.group, slot, key: lost.key };
        ask(&mut line, &subject, blocks, &mut |extents, told| {
            learning.put(volume, extents, &told).map_err(kept)?;
            done += told.len() as u64;
            goes_on(done, all).then_some(()).ok_or_else(|| LearnError::Lost("the group is ended".into()))
        })?;
    }
    let Head { epoch, .. } = point.head;
    tracing::debug!(group = %lost.group, %epoch, blocks = done, "the target has told what it holds");
    learning.end(point.head).map_err(kept)
}

/// Takes what a point has of some blocks.
type Take<'a> = dyn FnMut(&[Extent], Vec<Option<Found>>) -> Result<(), LearnError> + 'a;

/// Asks what the point has of every block of a volume.
fn ask(line: &mut PointLine, subject: &Subject<'_>, blocks: u64, take: &mut Take<'_>) -> Result<(), LearnError> {
    let mut all = RoaringBitmap::new();
    if let Some(last) = blocks.checked_sub(1) {
        all.insert_range(0..=last as u32);
    }
    let mut left = compare::questions(&all, compare::WINDOW_BLOCKS);
    let mut under_way: VecDeque<Vec<Extent>> = VecDeque::new();
    loop {
        while line.may_ask()
            && let Some(extents) = left.next()
        {
            compare::ask_holdings(line, subject.slot, &extents).map_err(|error| of_line(&error))?;
            under_way.push_back(extents);
        }
        let Some(extents) = under_way.pop_front() else { return Ok(()) };
        let held = compare::holdings(line, &extents, subject).map_err(|error| of_line(&error))?;
        take(&extents, held.into_iter().map(found).collect())?;
    }
}

fn found(held: Point) -> Option<Found> {
    match held {
        Point::Hole => Some(Found::Hole),
        Point::Content(digest) => Some(Found::Content(digest)),
        Point::Sealed | Point::Lost(_) => None,
    }
}

/// A target that does not admit this machine may do so once it has joined anew; one that has no such point never will have had it.
fn of_line(error: &LineError) -> LearnError {
    match error {
        LineError::Connect(_) | LineError::Lost(_) | LineError::Runtime(_) => LearnError::Lost(error.to_string()),
        LineError::Refused(_) | LineError::Failed(_) | LineError::Answer(_) => LearnError::Refused(error.to_string()),
    }
}
