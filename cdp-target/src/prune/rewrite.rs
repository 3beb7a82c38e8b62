//! Rewriting segments so that they hold no more than the points that stay need.
//!
//! Between two points that stay only the last content of a block counts, as of the later one: the blocks written since the
//! earlier are its *section*. A pass goes from the newest segment to the oldest and keeps what was met of one section, so that
//! it costs one reading of the indexes; the content of a section is what the point has in these blocks. Whole chunks of
//! segments give way at once, and only where their first frame begins its attempt: how a run of frames ends is told by the
//! next segment. With the key content is sealed anew in block order, without it frames are taken over whole. A segment that is
//! damaged and not healed is left alone: rewriting it would make final what may yet be healed.

mod output;

use super::{Owner, Plan, Prune, unlisted};
use crate::checkpoint::builder::Step;
use crate::journal::change::Change;
use crate::journal::index::{Entry, Run, RunEnd};
use crate::journal::manifest::{PointRange, SealedSegment};
use crate::journal::{GroupView, JournalError};
use cdp_protocol::units::Epoch;
use output::write;
use roaring::RoaringBitmap;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// Files are rewritten where they hold more than this much of what is needed.
const WASTE_MAX: f64 = 1.05;
/// A segment below this share of a full one is joined with its neighbours.
const SMALL_SHARE: u64 = 4;
/// A segment that is being thinned is left until all its points are old enough, where it is less than this share of all segments.
const LEFT_SHARE: u64 = 32;

type Blocks = BTreeMap<u16, RoaringBitmap>;

/// Segments next to each other, and what of them is needed.
#[derive(Default)]
struct Chunk {
    /// Newest first.
    segments: Vec<SealedSegment>,
    /// Blocks whose last content before a point that stays is here, by that point.
    sections: BTreeMap<Epoch, Blocks>,
    /// Frames that hold any of them, by segment and offset.
    frames: BTreeMap<(u64, u64), u32>,
    needed_bytes: f64,
    whole_bytes: u64,
    /// Of all its frames.
    held_bytes: u64,
    /// Whether any of them has to be rewritten, or only may be.
    wasteful: bool,
}

/// The blocks of one section that were met so far, going back.
struct Met {
    point: Option<Epoch>,
    blocks: Blocks,
}

/// Which points stay.
struct Stay<'a> {
    /// They.
    kept: &'a [Epoch],
    /// All that are newer stay for now, and many of them go later.
    newest_removed: Option<Epoch>,
}

/// Rewrites to what the points need that stay by `plan`, and those that came behind them, until nothing more comes of it; gives how many
/// segments gave way.
pub(super) fn rewrite(
    prune: &Prune<'_>,
    view: &mut Arc<GroupView>,
    plan: &Plan,
    owner: &mut dyn Owner,
    step: &mut Step<'_>,
) -> Result<u64, JournalError> {
    let mut kept = plan.stays.clone();
    kept.extend(view.epochs_after(plan.stays.last().copied().unwrap_or_default())?);
    let stay = Stay { kept: &kept, newest_removed: plan.newest_removed() };
    let mut rewritten = 0;
    let mut failed = HashSet::new();
    loop {
        let mut found = None;
        pass(prune, view, &stay, &failed, &mut |chunk| {
            found = Some(chunk);
            false
        })?;
        let Some(chunk) = found else { return Ok(rewritten) };
        let numbers = chunk.segments.iter().rev().map(|sealed| (sealed.number, sealed.revision));
        let numbers: Vec<(u64, u64)> = numbers.collect();
        match write(prune, view, &chunk, step) {
            // In whole frames, or in very small ones, it may be that nothing comes of it.
            Ok(by) if by.len() >= numbers.len() && frames_bytes(&by) >= chunk.held_bytes => failed.extend(numbers),
            Ok(by) => {
                rewritten += numbers.len() as u64;
                *view = owner.adopt(&Change::Rewrite { replaced: numbers, by })?;
                // So that the disk does not have to hold old and new of everything at once.
                super::sweep::sweep(view, owner.is_leased()?)?;
            }
            Err(JournalError::Damaged(what) | JournalError::NotRead(what)) => {
                tracing::error!(what, "a segment is left as it is: `cdp-target verify` names what is damaged");
                failed.extend(numbers);
            }
            Err(error) => return Err(error),
        }
    }
}

fn frames_bytes(segments: &[SealedSegment]) -> u64 {
    segments.iter().map(|sealed| sealed.frames_end).sum()
}

/// Bytes that rewriting would give back, about.
pub(super) fn estimate(prune: &Prune<'_>, view: &Arc<GroupView>, plan: &Plan) -> Result<u64, JournalError> {
    let mut bytes = 0;
    let stay = Stay { kept: &plan.stays, newest_removed: plan.newest_removed() };
    pass(prune, view, &stay, &HashSet::new(), &mut |chunk| {
        bytes += chunk.held_bytes.saturating_sub(chunk.bytes_after(view, prune.keys.is_some()) as u64);
        true
    })?;
    Ok(bytes)
}

/// A segment on the way back, by its index alone.
struct Stop {
    number: u64,
    /// Where it may give way.
    movable: Option<SealedSegment>,
    /// It holds frames of points that went, or of attempts that nothing came of.
    wasteful: bool,
    /// Its first frames belong to an attempt that began before.
    continues: bool,
}

fn stop(
    view: &GroupView,
    number: u64,
    kept: &[Epoch],
    failed: &HashSet<(u64, u64)>,
    with_key: bool,
) -> Result<Stop, JournalError> {
    let sealed = view.sealed_segment(number);
    let (runs, lost) = if let Some(sealed) = sealed {
        view.shelf().runs(&sealed.sealed())?
    } else {
        let index = view.index(number)?;
        (index.runs().to_vec(), index.lost().to_vec())
    };
    let floor = view.manifest().floor;
    let newest = kept.last().copied().unwrap_or_default();
    let mut damages = view.damages().iter().filter(|damage| damage.slice.is_none() && damage.segment == number);
    let is_damaged = damages.any(|damage| !with_key || !view.is_healed(damage));
    // What has no end yet may still be gone on with.
    let is_open_ended = runs.last().is_some_and(|run| run.epoch > newest);
    let stays = is_damaged || !lost.is_empty() || is_open_ended;
    let movable = sealed
        .copied()
        .filter(|sealed| !stays && sealed.len > 0 && !failed.contains(&(sealed.number, sealed.revision)));
    let is_waste = |run: &Run| {
        let is_kept = kept.binary_search(&run.epoch).is_ok() && run.end != RunEnd::Abandoned;
        run.bytes > 0 && (!is_kept || floor.is_some_and(|floor| run.epoch <= floor))
    };
    let continues = runs.first().is_some_and(|run| run.continued);
    Ok(Stop { number, movable, wasteful: runs.iter().any(is_waste), continues })
}

/// The segment that has points on both sides of the newest that went. The younger ones go in their turn, so it would be written again with every
/// prune until they have; where it is small beside the others it waits until then.
fn left_for_later(view: &GroupView, stay: &Stay<'_>) -> Option<u64> {
    let edge = stay.newest_removed?;
    let sealed = &view.manifest().sealed;
    let bytes: u64 = sealed.iter().map(|sealed| sealed.len).sum();
    let is_across = |points: PointRange| points.first <= edge && edge < points.last;
    let left = sealed.iter().find(|sealed| sealed.points.is_some_and(is_across))?;
    (left.len < bytes / LEFT_SHARE).then_some(left.number)
}

/// Goes from the newest segment to the oldest, and gives every chunk that is worth rewriting to `found` until that has enough.
fn pass(
    prune: &Prune<'_>,
    view: &Arc<GroupView>,
    stay: &Stay<'_>,
    failed: &HashSet<(u64, u64)>,
    found: &mut dyn FnMut(Chunk) -> bool,
) -> Result<(), JournalError> {
    let kept = stay.kept;
    let numbers: Vec<u64> = view.segments_from(0).collect();
    let stops = numbers.into_iter().rev().map(|number| stop(view, number, kept, failed, prune.keys.is_some()));
    let mut stops = stops.collect::<Result<Vec<_>, _>>()?;
    let left = left_for_later(view, stay);
    for stop in stops.iter_mut().filter(|stop| left == Some(stop.number)) {
        (stop.movable, stop.wasteful) = (None, false);
    }
    // What points need that cannot be listed nobody knows: all that is older stays.
    let unlisted = unlisted::unlisted(view).last().map(|unlisted| unlisted.segment);
    for stop in stops.iter_mut().filter(|stop| unlisted >= Some(stop.number)) {
        stop.movable = None;
    }
    let floor = view.manifest().floor;
    // Where there is little room, little at a time.
    let (storage, folder) = view.place();
    let free_bytes = storage.free_bytes(folder).map_err(JournalError::io("look at", folder))?;
    let chunk_bytes_max = prune.chunk_bytes_max.min(free_bytes / 2);
    let mut met = Met { point: None, blocks: Blocks::new() };
    let mut chunk = Chunk::default();
    for (at, stop) in stops.iter().enumerate() {
        let is_small = stop.movable.is_some_and(|sealed| sealed.len < prune.segment_bytes_max / SMALL_SHARE);
        let wanted = stop.movable.filter(|_| stop.wasteful || is_small || chunk.must_go_on(view));
        if wanted.is_none() {
            if let Some(chunk) = chunk.close(view, prune)
                && !found(chunk)
            {
                return Ok(());
            }
            chunk = Chunk::default();
            let older_needs_it = stops.get(at + 1).is_some_and(|older| older.wasteful);
            if !stop.wasteful && !stop.continues && !older_needs_it {
                // All it holds belongs to points that stay, and none of it has to do with the segment before.
                met = Met { point: None, blocks: Blocks::new() };
                continue;
            }
        }
        let into = wanted.map(|sealed| {
            chunk.segments.push(sealed);
            chunk.held_bytes += sealed.frames_end;
            chunk.wasteful |= stop.wasteful;
            &mut chunk
        });
        sift(stop.number, &view.included(stop.number)?, kept, floor, &mut met, into);
        if chunk.held_bytes >= chunk_bytes_max && !stop.continues {
            if let Some(chunk) = chunk.close(view, prune)
                && !found(chunk)
            {
                return Ok(());
            }
            chunk = Chunk::default();
        }
    }
    if let Some(chunk) = chunk.close(view, prune) {
        found(chunk);
    }
    Ok(())
}

/// Goes back over the entries of a segment, and puts what is needed into the chunk.
fn sift(
    number: u64,
    entries: &[(Epoch, Entry)],
    kept: &[Epoch],
    floor: Option<Epoch>,
    met: &mut Met,
    mut chunk: Option<&mut Chunk>,
) {
    let mut needed_of: HashMap<u64, (u64, u64, u32)> = HashMap::new();
    for (epoch, entry) in entries.iter().rev() {
        if floor.is_some_and(|floor| *epoch <= floor) {
            continue;
        }
        let Some(point) = kept.get(kept.partition_point(|point| point < epoch)).copied() else { continue };
        if met.point != Some(point) {
            *met = Met { point: Some(point), blocks: Blocks::new() };
        }
        let mut blocks = RoaringBitmap::new();
        blocks.insert_range(entry.extent.start.0..=(entry.extent.end() - 1) as u32);
        let covered = met.blocks.entry(entry.slot.0).or_default();
        let needed = &blocks - &*covered;
        *covered |= &blocks;
        let Some(chunk) = chunk.as_deref_mut() else { continue };
        let of = needed_of.entry(entry.frame_offset).or_insert((0, 0, entry.frame_len));
        of.0 += needed.len();
        of.1 += u64::from(entry.extent.count);
        if !needed.is_empty() {
            *chunk.sections.entry(point).or_default().entry(entry.slot.0).or_default() |= needed;
            chunk.frames.insert((number, entry.frame_offset), entry.frame_len);
        }
    }
    let Some(chunk) = chunk else { return };
    for (needed, blocks, frame_len) in needed_of.into_values() {
        chunk.needed_bytes += f64::from(frame_len) * needed as f64 / blocks.max(1) as f64;
        chunk.whole_bytes += if needed > 0 { u64::from(frame_len) } else { 0 };
    }
}

impl Chunk {
    /// Whether its oldest segment goes on with an attempt of the one before, which then has to give way with it.
    fn must_go_on(&self, view: &GroupView) -> bool {
        let Some(oldest) = self.segments.last() else { return false };
        let first = view.index(oldest.number).ok().and_then(|index| index.runs().first().copied());
        oldest.revision == 0 && first.is_some_and(|run| run.continued)
    }

    /// The chunk, if it can be rewritten and something comes of it.
    fn close(&mut self, view: &GroupView, prune: &Prune<'_>) -> Option<Self> {
        // Where an attempt began in a segment that stays, that one's end is told here: this one stays too, with the points in it.
        // What was counted of it for a later point is written all the same, before that point: the same content once more.
        while self.must_go_on(view) {
            let segment = self.segments.pop()?;
            self.sections.retain(|point, _| segment.points.is_none_or(|points| *point > points.last));
            self.held_bytes -= segment.frames_end;
            self.frames.retain(|(number, _), _| *number != segment.number);
        }
        let after = self.bytes_after(view, prune.keys.is_some());
        let full = prune.segment_bytes_max as f64;
        let fewer = self.segments.len() >= 2 && (after / full).ceil() * 2.0 <= self.segments.len() as f64;
        let worth = (self.wasteful && after * WASTE_MAX < self.held_bytes as f64) || fewer;
        (worth && !self.segments.is_empty()).then(|| std::mem::take(self))
    }

    /// Bytes it takes once it is rewritten, about.
    fn bytes_after(&self, view: &GroupView, with_key: bool) -> f64 {
        let records = self.segments.iter().map(|sealed| record_bytes(view, sealed)).sum::<u64>();
        records as f64 + if with_key { self.needed_bytes } else { self.whole_bytes as f64 }
    }
}

/// Bytes that the commits of a segment take wherever they stand, about.
fn record_bytes(view: &GroupView, sealed: &SealedSegment) -> u64 {
    let Ok(index) = view.index(sealed.number) else { return 0 };
    index.commits().iter().map(|commit| 3 * u64::from(commit.frame_len)).sum()
}
