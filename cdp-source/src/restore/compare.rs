//! What differs between a device and a point, found without moving content.
//!
//! In place: a block whose content is what the digests' files say that the target was sent, and that was sent no more after the older of
//! the point and those files, is as it was at the point. All others are asked for, by their digests, and held against what is on the
//! device. To another device all blocks are asked for, since the old volume may be written to meanwhile.

use super::disk::{Disk, DiskError};
use super::line::{LineError, PointLine};
use super::{OnProgress, Plan, Progress};
use crate::audit::Found;
use crate::digests::KnownDigests;
use crate::reader::{self, BlockReader, READ_BLOCKS_MAX, ReadRequest};
use cdp_protocol::codec;
use cdp_protocol::holding::{self, Held};
use cdp_protocol::recall::{Answer, QUESTION_BLOCKS_MAX, QUESTION_EXTENTS_MAX, Question, Told, named, to_extents};
use cdp_protocol::seal::{DataKey, Digest, DigestKey};
use cdp_protocol::units::{BLOCK_BYTES, Block, Extent, GroupId, VolumeSlot};
use roaring::RoaringBitmap;
use std::collections::VecDeque;
use std::io;

/// Blocks that are read at a time: 16 MiB.
pub(super) const WINDOW_BLOCKS: u32 = 4096;

/// Why a comparison, or what follows it, ended.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The line.
    #[error(transparent)]
    Line(#[from] LineError),
    /// The device.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The device, or the digests' files, cannot be read.
    #[error("read {what}")]
    Read {
        /// Which.
        what: &'static str,
        /// What came back.
        #[source]
        source: io::Error,
    },
}

/// What is asked about.
pub struct Subject<'a> {
    /// The group.
    pub group: GroupId,
    /// The volume.
    pub slot: VolumeSlot,
    /// The group's key.
    pub key: &'a DataKey,
}

/// What the point has of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Point {
    Hole,
    Content(Digest),
    /// Content whose digest cannot be opened here.
    Sealed,
    Lost(&'static str),
}

/// The digests of blocks, and that of zeros.
struct Digester {
    key: DigestKey,
    zeros: Digest,
}

impl Digester {
    fn new(key: &DataKey) -> Self {
        let key = key.digest_key();
        let zeros = key.digest(&[0; BLOCK_BYTES]);
        Self { key, zeros }
    }

    fn found(&self, bytes: &[u8]) -> Found {
        if codec::is_zero(bytes) { Found::Hole } else { Found::Content(self.key.digest(bytes)) }
    }

    fn is_same(&self, found: Found, point: Point) -> bool {
        match (found, point) {
            (Found::Hole, Point::Hole) => true,
            (Found::Hole, Point::Content(digest)) => digest == self.zeros,
            (Found::Content(found), Point::Content(digest)) => found == digest,
            _ => false,
        }
    }
}

/// What the blocks of an extent hold now; nothing of those that cannot be read.
fn read(reader: &mut dyn BlockReader, extents: &[Extent], take: &mut dyn FnMut(Block, &[u8])) -> io::Result<()> {
    let pieces = extents.iter().flat_map(|extent| reader::runs(extent.blocks().map(|block| block.0), READ_BLOCKS_MAX));
    let requests: Vec<ReadRequest> = pieces.map(|extent| ReadRequest { volume: 0, extent }).collect();
    reader::read_blocks(reader, &requests, &mut |_, block, bytes| {
        if let Ok(bytes) = bytes {
            take(block, bytes);
        }
    })
}

/// The blocks that have to be asked for, and those of them that hold what the target is not known to have: by the digests' files,
/// where there are any; else all.
///
/// # Errors
/// Where the device cannot be read, or the line is lost.
pub fn candidates(
    reader: &mut dyn BlockReader,
    blocks: u64,
    known: Option<&KnownDigests>,
    line: &mut PointLine,
    subject: &Subject<'_>,
    on_progress: &mut OnProgress<'_>,
) -> Result<(RoaringBitmap, RoaringBitmap), RestoreError> {
    let mut all = RoaringBitmap::new();
    if let Some(last) = blocks.checked_sub(1) {
        all.insert_range(0..=last as u32);
    }
    let Some(known) = known else { return Ok((all.clone(), all)) };
    let (digester, mut differing) = (Digester::new(subject.key), RoaringBitmap::new());
    let mut from = 0;
    while from < blocks {
        on_progress(Progress::Comparing(from, blocks));
        let count = (blocks - from).min(WINDOW_BLOCKS.min(KnownDigests::RUN_BLOCKS_MAX).into()) as u32;
        let extent = Extent { start: Block(from as u32), count };
        let expected = known.of(extent).map_err(|source| RestoreError::Read { what: "the digests", source })?;
        differing.insert_range(extent.start.0..=(extent.end() - 1) as u32);
        read(reader, &[extent], &mut |block, bytes| {
            if expected[(block.0 - extent.start.0) as usize] == Some(digester.found(bytes)) {
                differing.remove(block.0);
            }
        })
        .map_err(|source| RestoreError::Read { what: "the device", source })?;
        from += u64::from(count);
    }
    on_progress(Progress::Comparing(blocks, blocks));
    // After everything was read: what an agent wrote of the digests meanwhile is of blocks that were sent since the base.
    let point = line.point().head;
    let since = if point.epoch < known.base().epoch { point } else { known.base() };
    let changed = changes(line, subject.slot, since)?;
    let (Some(changed), Some(unsure)) = (changed, known.unsure_since()) else { return Ok((all.clone(), all)) };
    let unkept = &differing | &unsure;
    let asked = (&unkept | &changed) & all;
    Ok((asked, unkept))
}

/// The blocks that the target was sent after a point; `None` where it cannot tell.
fn changes(
    line: &mut PointLine,
    slot: VolumeSlot,
    since: cdp_protocol::units::Head,
) -> Result<Option<RoaringBitmap>, LineError> {
    let mut changed = Some(RoaringBitmap::new());
    line.ask(slot, Question::Changes { since })?;
    while let Some(piece) = line.next_piece()? {
        match (piece, &mut changed) {
            (Answer::Changed { extents }, Some(changed)) => {
                let extents = to_extents(&extents).ok_or(LineError::Answer("it names what are no blocks"))?;
                for extent in extents {
                    changed.insert_range(extent.start.0..=(extent.end() - 1) as u32);
                }
            }
            (Answer::ChangesUnknown, changed) => *changed = None,
            _ => return Err(LineError::Answer("it is of something else")),
        }
    }
    Ok(changed)
}

/// Where blocks of the point may be had besides the target.
pub struct Old<'a> {
    /// Reads the old volume.
    pub reader: &'a mut dyn BlockReader,
    /// Whether what it has is written; else only counted.
    pub writes: bool,
}

/// Asks what the point has of the candidates (and which of those hold what no point is known to have) and holds it against what is on the device. What an old volume has is written at once.
///
/// # Errors
/// Where the device cannot be read or written, or the line is lost.
pub fn plan(
    disk: &mut Side<'_>,
    (candidates, unkept): (&RoaringBitmap, &RoaringBitmap),
    mut old: Option<Old<'_>>,
    line: &mut PointLine,
    subject: &Subject<'_>,
    on_progress: &mut OnProgress<'_>,
) -> Result<Plan, RestoreError> {
    let digester = Digester::new(subject.key);
    let (mut plan, all) = (Plan::default(), candidates.len());
    let mut left = questions(candidates, WINDOW_BLOCKS);
    let mut under_way: VecDeque<Vec<Extent>> = VecDeque::new();
    loop {
        while line.may_ask()
            && let Some(extents) = left.next()
        {
            ask_holdings(line, subject.slot, &extents)?;
            under_way.push_back(extents);
        }
        let Some(extents) = under_way.pop_front() else { break };
        on_progress(Progress::Asking(plan.asked_blocks, all));
        let held = holdings(line, &extents, subject)?;
        plan.asked_blocks += held.len() as u64;
        let differing = differing(disk.reader(), &digester, &extents, &held)?;
        plan.unkept_blocks += differing.iter().filter(|(block, _)| unkept.contains(block.0)).count() as u64;
        let wanted = match &mut old {
            Some(old) => take_from(old, disk, &digester, differing, &mut plan)?,
            None => differing,
        };
        for (block, point) in wanted {
            match point {
                Point::Hole => _ = plan.zero.insert(block.0),
                Point::Content(_) => _ = plan.fetch.insert(block.0),
                Point::Sealed => _ = (plan.fetch.insert(block.0), plan.sealed.insert(block.0)),
                Point::Lost(reason) => plan.lose(block, reason),
            }
        }
    }
    plan.compared_blocks = all;
    on_progress(Progress::Asking(all, all));
    Ok(plan)
}

/// The device that is compared: to be written, or only looked at.
pub enum Side<'a> {
    /// Open to be written.
    Disk(&'a mut Disk),
    /// Only read.
    Reader(&'a mut dyn BlockReader),
}

impl Side<'_> {
    /// Reads it.
    pub fn reader(&mut self) -> &mut dyn BlockReader {
        match self {
            Self::Disk(disk) => disk.reader(),
            Self::Reader(reader) => &mut **reader,
        }
    }
}

/// Blocks as questions, one after the other: bounded in blocks and in extents.
pub(super) fn questions(all: &RoaringBitmap, blocks_max: u32) -> impl Iterator<Item = Vec<Extent>> {
    assert!(u64::from(blocks_max) <= QUESTION_BLOCKS_MAX, "a question has room for so many");
    let mut blocks = all.iter().peekable();
    std::iter::from_fn(move || {
        let mut extents: Vec<Extent> = Vec::new();
        let mut count = 0;
        while let Some(block) = blocks.peek().copied() {
            let goes_on = extents.last().is_some_and(|last| last.end() == u64::from(block));
            if count == blocks_max || !goes_on && extents.len() == QUESTION_EXTENTS_MAX {
                break;
            }
            match extents.last_mut() {
                Some(last) if goes_on => last.count += 1,
                _ => extents.push(Extent { start: Block(block), count: 1 }),
            }
            count += 1;
            blocks.next();
        }
        (!extents.is_empty()).then_some(extents)
    })
}

/// Asks what the point has of these blocks.
pub(super) fn ask_holdings(line: &mut PointLine, slot: VolumeSlot, extents: &[Extent]) -> Result<(), LineError> {
    line.ask(slot, Question::Holdings { extents: named(extents) })
}

/// The answer to a question: what the point has of each of the blocks, in their order.
pub(super) fn holdings(
    line: &mut PointLine,
    extents: &[Extent],
    subject: &Subject<'_>,
) -> Result<Vec<Point>, LineError> {
    let asked: Vec<Block> = extents.iter().flat_map(|extent| extent.blocks()).collect();
    let mut held = Vec::with_capacity(asked.len());
    while let Some(piece) = line.next_piece()? {
        let Answer::Holdings { runs } = piece else { return Err(LineError::Answer("it is of something else")) };
        for told in runs {
            let blocks = asked.get(held.len()..held.len() + told.count()).filter(|blocks| !blocks.is_empty());
            let blocks = blocks.ok_or(LineError::Answer("it is of other blocks than were asked for"))?;
            match told {
                Told::Digests(digests) => held.extend(digests.into_iter().map(Point::Content)),
                Told::Run(_, run) => held.extend(opened(&run, blocks, subject)),
            }
        }
    }
    if held.len() == asked.len() {
        Ok(held)
    } else {
        Err(LineError::Answer("it is of fewer blocks than were asked for"))
    }
}

/// What a run is told to hold, block by block. One that has content lies within an extent of its frame.
fn opened(held: &Held, blocks: &[Block], subject: &Subject<'_>) -> Vec<Point> {
    let alike = |point| vec![point; blocks.len()];
    match held {
        Held::Hole => alike(Point::Hole),
        Held::Nothing => alike(Point::Lost("the point does not have them: they were never sent")),
        Held::Unreadable => alike(Point::Lost("the source's device could not read them when the point was made")),
        Held::Damaged => alike(Point::Lost("what the target has of them is damaged")),
        Held::Frame { header, digests } => {
            let extent = Extent { start: blocks[0], count: blocks.len() as u32 };
            let opened = holding::open(&subject.group, subject.slot, extent, (header, digests), subject.key);
            // Sealed under the key of the machine before, perhaps: its content tells.
            opened.map_or_else(|_| alike(Point::Sealed), |digests| digests.into_iter().map(Point::Content).collect())
        }
    }
}

/// The blocks that are not on the device as the point has them.
fn differing(
    reader: &mut dyn BlockReader,
    digester: &Digester,
    extents: &[Extent],
    held: &[Point],
) -> Result<Vec<(Block, Point)>, RestoreError> {
    let asked: Vec<Block> = extents.iter().flat_map(|extent| extent.blocks()).collect();
    let mut same = RoaringBitmap::new();
    read(reader, extents, &mut |block, bytes| {
        let at = asked.binary_search(&block).expect("only what was asked for is read");
        if digester.is_same(digester.found(bytes), held[at]) {
            same.insert(block.0);
        }
    })
    .map_err(|source| RestoreError::Read { what: "the device", source })?;
    Ok(asked.into_iter().zip(held.iter().copied()).filter(|(block, _)| !same.contains(block.0)).collect())
}

/// Takes from the old volume what it has as the point has it; gives the rest.
fn take_from(
    old: &mut Old<'_>,
    disk: &mut Side<'_>,
    digester: &Digester,
    differing: Vec<(Block, Point)>,
    plan: &mut Plan,
) -> Result<Vec<(Block, Point)>, RestoreError> {
    let wanted: RoaringBitmap =
        differing.iter().filter(|(_, point)| matches!(point, Point::Content(_))).map(|(block, _)| block.0).collect();
    let (mut had, mut taken) = (Vec::new(), RoaringBitmap::new());
    read(old.reader, &reader::runs(&wanted, READ_BLOCKS_MAX), &mut |block, bytes| {
        let at = differing.partition_point(|(other, _)| *other < block);
        if digester.is_same(digester.found(bytes), differing[at].1) {
            taken.insert(block.0);
            had.push((block, bytes.to_vec()));
        }
    })
    .map_err(|source| RestoreError::Read { what: "the old volume", source })?;
    plan.copied_blocks += taken.len();
    if let (Side::Disk(disk), true) = (disk, old.writes) {
        had.sort_unstable_by_key(|(block, _)| *block);
        super::fetch::write_blocks(disk, &had)?;
    }
    Ok(differing.into_iter().filter(|(block, _)| !taken.contains(block.0)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{prop_assert, proptest};

    proptest! {
        #[test]
        fn questions_name_every_candidate_once_and_keep_their_bounds(
            runs in proptest::collection::vec((0..60_000u32, 1..9000u32), 0..12),
            scattered in proptest::collection::btree_set(0..200_000u32, 0..6000),
        ) {
            let mut candidates: RoaringBitmap = scattered.into_iter().collect();
            for (start, count) in runs {
                candidates.insert_range(start..start + count);
            }
            let asked: Vec<Vec<Extent>> = questions(&candidates, WINDOW_BLOCKS).collect();
            for extents in &asked {
                let question = Question::Holdings { extents: named(extents) };
                prop_assert!(question.extents().as_ref() == Some(extents));
            }
            let named: Vec<u32> = asked.iter().flatten().flat_map(|extent| extent.blocks()).map(|block| block.0).collect();
            prop_assert!(named == candidates.iter().collect::<Vec<u32>>());
        }
    }

    #[test]
    fn zeros_are_the_same_however_the_point_has_them() {
        let digester = Digester::new(&DataKey::new([7; 32]));
        let (zeros, ones) = ([0; BLOCK_BYTES], [1; BLOCK_BYTES]);
        let (hole, content) = (digester.found(&zeros), digester.found(&ones));
        let digest = |bytes| Point::Content(digester.key.digest(bytes));
        assert!(digester.is_same(hole, Point::Hole) && digester.is_same(hole, digest(&zeros)));
        assert!(digester.is_same(content, digest(&ones)));
        assert!(!digester.is_same(content, Point::Hole) && !digester.is_same(hole, digest(&ones)));
        assert!(!digester.is_same(content, digest(&zeros)) && !digester.is_same(hole, Point::Sealed));
    }
}
