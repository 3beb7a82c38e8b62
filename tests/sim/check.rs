//! What is checked of a target's store after every recovery, against the model.
//!
//! Every promised point is listed that the ladder did not let go; nothing is listed that was not committed or that was removed;
//! numbers rise and the chain is unbroken; what is read of a point is what it has to hold, block for block. Damage has to be
//! named where it takes something.

use std::sync::Arc;

use cdp_protocol::units::{self, BLOCK_BYTES, BLOCK_SECTORS, Block, FrameHash, Head, VolumeSlot, blocks_in};
use cdp_source::sim::{Image, fill_sector};
use cdp_target::journal::{GroupView, JournalError, Point};
use cdp_target::restore::point::{Content, PointImage, ReadError};

use super::model::{Model, NOT_COVERED, key};

const SECTOR_BYTES: usize = BLOCK_BYTES / BLOCK_SECTORS as usize;

/// How much of a store is read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Depth {
    /// The newest point and one other, whose place this is.
    Sample(u64),
    /// Every block of every point.
    Everything,
}

/// How far a view can be believed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// A reader's own: it may lag behind.
    Beside,
    /// All that was promised is in it; a change that failed may come to be once the group is opened anew.
    Unsure,
    /// All that was promised is in it, and nothing else will be.
    Whole,
}

/// Checks a view. `is_hurt`: whether bits were flipped, so that points may be damaged: gives those that are missing then.
pub(crate) fn check(
    view: &Arc<GroupView>,
    model: &mut Model,
    depth: Depth,
    extent: Extent,
    is_hurt: bool,
) -> Result<Vec<Head>, String> {
    let listed: Result<Vec<Point>, _> = view.points().collect();
    let listed = listed.map_err(|error| format!("the points cannot be listed: {error}"))?;
    // Of a commit that is damaged with everything that would name it the number alone is known, and that it is damaged.
    let is_nameless = |point: &Point| is_hurt && point.damaged.is_some() && point.hash == FrameHash([0; 32]);
    let (nameless, listed): (Vec<Point>, Vec<Point>) = listed.into_iter().partition(is_nameless);
    check_chain(&listed, model, is_hurt)?;
    let missing = if extent == Extent::Beside { Vec::new() } else { missing(&listed, model) };
    let may_be_gone = |head: &Head| model.kept.may_be_gone(head) || is_hurt && view.is_removed(head.epoch);
    let missing: Vec<Head> = missing.into_iter().filter(|head| !may_be_gone(head)).collect();
    // Rot in the newest epoch, before anything proves that it was durable, looks like a torn tail: the source has to notice.
    let is_suffix = model.acked.ends_with(&missing);
    // A number that is damaged is told; so is that a segment's points cannot all be listed, with the points it had.
    let unlisted = view.unlisted();
    let is_told = |head: &Head| {
        nameless.iter().any(|point| point.epoch == head.epoch)
            || unlisted.iter().any(|(_, had)| (had.first..=had.last).contains(&head.epoch))
    };
    let is_lost = |head: &&Head| !is_hurt || view.damages().is_empty() && !is_suffix && !is_told(head);
    if let Some(lost) = missing.iter().find(is_lost) {
        return Err(format!("point {} was acked and is lost", lost.epoch));
    }
    if !is_hurt {
        listed.iter().try_for_each(|point| model.kept.listed(point, extent == Extent::Whole))?;
    }
    if extent == Extent::Whole {
        model.kept.seen(&listed);
    }
    let is_chosen = |at: usize| match depth {
        Depth::Everything => true,
        Depth::Sample(other) => at + 1 == listed.len() || at as u64 == other % listed.len() as u64,
    };
    for point in listed.iter().enumerate().filter(|(at, _)| is_chosen(*at)).map(|(_, point)| point) {
        check_content(view, point, &model.point(&head(point)).expect("checked").image, is_hurt)?;
    }
    Ok(missing)
}

const fn head(point: &Point) -> Head {
    Head { epoch: point.epoch, hash: point.hash }
}

fn check_chain(listed: &[Point], model: &Model, is_hurt: bool) -> Result<(), String> {
    let mut before: Option<Head> = None;
    for point in listed {
        let known =
            model.point(&head(point)).ok_or_else(|| format!("{} is listed and was never committed", point.epoch))?;
        if before.is_some_and(|before| before.epoch >= point.epoch) {
            return Err(format!("{} stands behind a higher number", point.epoch));
        }
        let mut expected = known.predecessor;
        // Over those that were removed.
        while let Some(gone) = expected.filter(|head| Some(*head) != before && model.kept.may_be_gone(head)) {
            expected = model.point(&gone).and_then(|gone| gone.predecessor);
        }
        if !is_hurt && expected != before {
            return Err(format!("the chain is broken before {}: {expected:?} instead of {before:?}", point.epoch));
        }
        if let Some(damage) = point.damaged.as_ref().filter(|_| !is_hurt) {
            return Err(format!("{} is called damaged and nothing was: {damage}", point.epoch));
        }
        before = Some(head(point));
    }
    Ok(())
}

/// Points that were promised and are not listed.
fn missing(listed: &[Point], model: &Model) -> Vec<Head> {
    let mut points = listed.iter().map(head).peekable();
    let mut missing = Vec::new();
    for acked in &model.acked {
        while points.next_if(|point| point.epoch < acked.epoch).is_some() {}
        if points.next_if_eq(acked).is_none() {
            missing.push(*acked);
        }
    }
    missing
}

fn check_content(view: &Arc<GroupView>, point: &Point, expected: &Image, is_hurt: bool) -> Result<(), String> {
    let image = match view.image(point.epoch, &key()) {
        Err(JournalError::Damaged(_)) if is_hurt => return Ok(()),
        image => image.map_err(|error| format!("{} cannot be opened: {error}", point.epoch))?,
    };
    for (volume, sectors) in expected.iter().enumerate() {
        match check_volume(&image, volume, sectors)? {
            None => {}
            Some(ReadError::Damaged { .. } | ReadError::Journal(_)) if is_hurt => {}
            Some(error) => return Err(format!("point {} volume {volume}: {error}", point.epoch)),
        }
    }
    Ok(())
}

/// Gives the error that ended the reading; a wrong block is one of ours.
fn check_volume(image: &PointImage, volume: usize, sectors: &[u64]) -> Result<Option<ReadError>, String> {
    let blocks = blocks_in((sectors.len() * SECTOR_BYTES) as u64) as u32;
    let whole = units::Extent::new(Block(0), blocks).expect("a volume has blocks");
    let (mut next, mut wrong) = (0, None);
    let read = image.read_blocks(VolumeSlot(volume as u16), whole, &mut |extent, content| {
        for (index, block) in extent.blocks().enumerate() {
            let bytes = match content {
                Content::Bytes(bytes) => &bytes[index * BLOCK_BYTES..][..BLOCK_BYTES],
                Content::Zero => &[0; BLOCK_BYTES],
                Content::Unreadable => &[0xff; BLOCK_BYTES],
            };
            if block.0 != next || !is_block(bytes, &sectors[next as usize * BLOCK_SECTORS as usize..]) {
                wrong.get_or_insert(block.0);
            }
            next += 1;
        }
    });
    match (wrong, read) {
        (Some(block), _) => Err(format!("point {} volume {volume} block {block} holds something else", image.epoch())),
        (None, Ok(())) if next == blocks => Ok(None),
        (None, Ok(())) => Err(format!("point {} volume {volume} ends at block {next}", image.epoch())),
        (None, Err(error)) => Ok(Some(error)),
    }
}

/// Whether a block holds what the first sectors of `sectors` say; beyond the volume's end zeros.
fn is_block(bytes: &[u8], sectors: &[u64]) -> bool {
    let mut expected = [0; SECTOR_BYTES];
    bytes.chunks_exact(SECTOR_BYTES).enumerate().all(|(at, sector)| {
        let number = sectors.get(at).copied().unwrap_or(0);
        fill_sector(&mut expected, number);
        number != NOT_COVERED && sector == expected
    })
}
