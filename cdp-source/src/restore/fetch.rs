//! Content over the line to the device.
//!
//! Invariant: a block is done with once a frame that holds it was opened with the group's key, its content written, and read back. Which
//! frame is the newest of a block is the target's word, as everywhere. What is left to do is what the plan still names, so a line that is
//! lost costs what was under way.

use super::compare::{RestoreError, Subject, questions};
use super::disk::{Disk, DiskError};
use super::line::{LineError, PointLine};
use super::{OnProgress, Plan, Progress};
use crate::reader;
use cdp_protocol::codec::open_content;
use cdp_protocol::frame::{self, Encoding, FRAME_BYTES_MAX};
use cdp_protocol::recall::{Answer, Question, named, to_extents};
use cdp_protocol::units::{BLOCK_BYTES, Block, Extent, blocks_in};
use roaring::RoaringBitmap;
use std::collections::VecDeque;
use std::io;

/// Blocks that one question is about: 2 MiB, so that some progress is kept whatever happens to a thin line.
const QUESTION_BLOCKS: u32 = 512;
/// Blocks of zeros that are written, and read back, at a time.
const ZERO_BLOCKS: u32 = 16 * 1024;

/// Makes zeros what the point has as zeros.
///
/// # Errors
/// Where the device fails.
pub fn write_zeros(disk: &mut Disk, plan: &mut Plan, on_progress: &mut OnProgress<'_>) -> Result<(), DiskError> {
    let all = plan.zero.len();
    let wanted = plan.zero.clone();
    for extents in questions(&wanted, ZERO_BLOCKS) {
        for extent in extents {
            disk.zero(extent)?;
            plan.zero.remove_range(extent.start.0..=(extent.end() - 1) as u32);
        }
        on_progress(Progress::Writing(all - plan.zero.len(), all + plan.fetch.len()));
    }
    Ok(())
}

/// Fetches what the plan names, and writes it. `before`: blocks that were written before, for the progress.
///
/// # Errors
/// Where the line is lost or the device fails; what the plan names then is left.
pub fn fetch(
    disk: &mut Disk,
    plan: &mut Plan,
    before: u64,
    line: &mut PointLine,
    subject: &Subject<'_>,
    on_progress: &mut OnProgress<'_>,
) -> Result<(), RestoreError> {
    let all = before + plan.fetch.len();
    let wanted = plan.fetch.clone();
    let mut left = questions(&wanted, QUESTION_BLOCKS);
    let mut under_way: VecDeque<Vec<Extent>> = VecDeque::new();
    loop {
        while line.may_ask()
            && let Some(extents) = left.next()
        {
            line.ask(subject.slot, Question::Content { extents: named(&extents) })?;
            under_way.push_back(extents);
        }
        let Some(extents) = under_way.pop_front() else { return Ok(()) };
        let asked = Asked::new(&extents);
        let fetched = fetched(line, subject, asked.clone())?;
        write_blocks(disk, &fetched.blocks)?;
        plan.fetch -= &asked.blocks;
        fetched.lose_missing(asked.blocks, plan);
        on_progress(Progress::Writing(all - plan.fetch.len(), all));
    }
}

/// Fetches some of the blocks and writes none: a sample, to tell what all of it would take, and whether it opens. Those that cannot be had are
/// lost, and to be fetched no more. Gives the bytes that came over the line, and how many blocks could be had.
///
/// # Errors
/// Where the line is lost.
pub fn sample(
    line: &mut PointLine,
    subject: &Subject<'_>,
    blocks: &RoaringBitmap,
    plan: &mut Plan,
) -> Result<(u64, u64), LineError> {
    let (before, mut opened_blocks) = (line.received_bytes(), 0);
    for extents in questions(blocks, QUESTION_BLOCKS) {
        line.ask(subject.slot, Question::Content { extents: named(&extents) })?;
        let asked = Asked::new(&extents);
        let fetched = fetched(line, subject, asked.clone())?;
        opened_blocks += fetched.blocks.len() as u64;
        let missing = fetched.lose_missing(asked.blocks, plan);
        plan.fetch -= missing;
    }
    Ok((line.received_bytes() - before, opened_blocks))
}

/// Bytes of the point, from anywhere within the volume: a few blocks at a time, for whoever looks at what it is.
///
/// # Errors
/// Where the line is lost, or the point does not have all of them.
pub fn read_at(line: &mut PointLine, subject: &Subject<'_>, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    let end = offset + buffer.len() as u64;
    let first = offset / BLOCK_BYTES as u64;
    let blocks: RoaringBitmap = (first..blocks_in(end)).map(|block| block as u32).collect();
    for extents in questions(&blocks, QUESTION_BLOCKS) {
        line.ask(subject.slot, Question::Content { extents: named(&extents) }).map_err(io::Error::other)?;
        let fetched = fetched(line, subject, Asked::new(&extents)).map_err(io::Error::other)?;
        if let Some((_, why)) = fetched.lost.first() {
            return Err(io::Error::other(why.clone()));
        }
        for (block, bytes) in &fetched.blocks {
            reader::put_block(*block, bytes, offset, buffer);
        }
    }
    Ok(())
}

/// Writes blocks, in their order, and reads them back.
///
/// # Errors
/// Where the device fails.
pub fn write_blocks(disk: &mut Disk, blocks: &[(Block, Vec<u8>)]) -> Result<(), DiskError> {
    let mut left = blocks;
    while let Some((first, _)) = left.first() {
        let follows = |(at, (block, _)): (usize, &(Block, Vec<u8>))| {
            u64::from(block.0) == u64::from(first.0) + at as u64 && at < QUESTION_BLOCKS as usize
        };
        let count = left.iter().enumerate().take_while(|entry| follows(*entry)).count();
        let (run, rest) = left.split_at(count);
        let content: Vec<u8> = run.iter().flat_map(|(_, bytes)| bytes.iter().copied()).collect();
        disk.write(Extent { start: *first, count: count as u32 }, &content)?;
        left = rest;
    }
    Ok(())
}

/// What a question is about, and how many blocks more its answer may name.
#[derive(Clone)]
struct Asked {
    blocks: RoaringBitmap,
    left: u64,
}

impl Asked {
    fn new(extents: &[Extent]) -> Self {
        let blocks: RoaringBitmap = extents.iter().flat_map(|extent| extent.blocks()).map(|block| block.0).collect();
        Self { left: blocks.len(), blocks }
    }

    /// Counts what the answer names, before anything is kept of it: only what was asked for, and not more of it.
    fn take(&mut self, extent: Extent) -> Result<(), LineError> {
        let (Ok(last), Some(left)) = (u32::try_from(extent.end() - 1), self.left.checked_sub(extent.count.into()))
        else {
            return Err(LineError::Answer("it is of more blocks than were asked for"));
        };
        if !self.blocks.contains_range(extent.start.0..=last) {
            return Err(LineError::Answer("it is of other blocks than were asked for"));
        }
        self.left = left;
        Ok(())
    }
}

/// The answer to a question about content.
#[derive(Default)]
struct Fetched {
    blocks: Vec<(Block, Vec<u8>)>,
    lost: Vec<(Extent, String)>,
}

fn fetched(line: &mut PointLine, subject: &Subject<'_>, mut asked: Asked) -> Result<Fetched, LineError> {
    let (mut fetched, mut frame, mut of) = (Fetched::default(), Vec::new(), Vec::new());
    while let Some(piece) = line.next_piece()? {
        match piece {
            Answer::Frame { blocks, bytes, more } => {
                if frame.is_empty() {
                    of = to_extents(&blocks).ok_or(LineError::Answer("it names what are no blocks"))?;
                    of.iter().try_for_each(|extent| asked.take(*extent))?;
                }
                if bytes.is_empty() || frame.len() + bytes.len() > FRAME_BYTES_MAX {
                    return Err(LineError::Answer("a frame of no length that there is"));
                }
                frame.extend_from_slice(&bytes);
                if !more {
                    fetched.take(&std::mem::take(&mut frame), &of, subject);
                }
            }
            Answer::Lost { start, count, reason } => {
                let extent = Extent::new(start, count).ok_or(LineError::Answer("it names what are no blocks"))?;
                asked.take(extent)?;
                fetched.lost.push((extent, reason));
            }
            _ => return Err(LineError::Answer("it is of something else")),
        }
    }
    if !frame.is_empty() {
        return Err(LineError::Answer("a frame without its end"));
    }
    fetched.blocks.sort_unstable_by_key(|(block, _)| *block);
    Ok(fetched)
}

impl Fetched {
    /// Those of the blocks that were asked for and did not come are lost, and why.
    fn lose_missing(&self, asked: RoaringBitmap, plan: &mut Plan) -> RoaringBitmap {
        let mut missing = asked;
        for (block, _) in &self.blocks {
            missing.remove(block.0);
        }
        for block in &missing {
            let is_told = |(extent, _): &&(Extent, String)| extent.start.0 <= block && u64::from(block) < extent.end();
            let reason = self.lost.iter().find(is_told).map_or("the target gave nothing for them", |(_, why)| why);
            plan.lose(Block(block), reason);
        }
        missing
    }

    /// Takes these blocks from a frame; what it does not have, or what does not open, is lost, and why.
    fn take(&mut self, bytes: &[u8], of: &[Extent], subject: &Subject<'_>) {
        let opened = opened(bytes, subject);
        for extent in of {
            let why = match &opened {
                Ok((extents, Some(content))) => match of_blocks(extents, content, *extent) {
                    Some(content) => {
                        let blocks = extent.blocks().zip(content.chunks(BLOCK_BYTES));
                        self.blocks.extend(blocks.map(|(block, bytes)| (block, bytes.to_vec())));
                        continue;
                    }
                    None => "the frame that the target gave does not have them".to_owned(),
                },
                Ok((extents, None))
                    if extents.iter().any(|held| held.start <= extent.start && extent.end() <= held.end()) =>
                {
                    self.blocks.extend(extent.blocks().map(|block| (block, vec![0; BLOCK_BYTES])));
                    continue;
                }
                Ok((_, None)) => "the frame that the target gave does not have them".to_owned(),
                Err(why) => why.clone(),
            };
            self.lost.push((*extent, why));
        }
    }
}

/// A frame's extents and content; no content where its blocks are zeros.
fn opened(bytes: &[u8], subject: &Subject<'_>) -> Result<(Vec<Extent>, Option<Vec<u8>>), String> {
    let frame = frame::decode(&subject.group, bytes).map_err(|error| format!("the target gave no frame: {error}"))?;
    if frame.header.volume != subject.slot {
        return Err("the target gave another volume's frame".to_owned());
    }
    let key = subject.key.attempt_key(&frame.header.attempt);
    let content = open_content(&frame, &key).map_err(|error| {
        format!("the frame does not open with this machine's key ({error}): `cdp-target export` may have an older one")
    })?;
    match frame.header.encoding {
        Encoding::Hole => Ok((frame.header.extents, None)),
        encoding if encoding.has_content() => Ok((frame.header.extents, Some(content))),
        Encoding::Unreadable => Err("the source's device could not read them when the point was made".to_owned()),
        _ => Err("the target has lost them".to_owned()),
    }
}

/// The content of blocks that lie within one of the extents.
fn of_blocks<'a>(extents: &[Extent], content: &'a [u8], wanted: Extent) -> Option<&'a [u8]> {
    let mut before = 0;
    for extent in extents {
        if extent.start <= wanted.start && wanted.end() <= extent.end() {
            let from = before + (wanted.start.0 - extent.start.0) as usize;
            return content.get(from * BLOCK_BYTES..(from + wanted.count as usize) * BLOCK_BYTES);
        }
        before += extent.count as usize;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_protocol::codec::Sealer;
    use cdp_protocol::seal::DataKey;
    use cdp_protocol::units::{AttemptId, Epoch, Generation, GroupId, Sequence, VolumeSlot};

    const GROUP: GroupId = GroupId([3; 16]);
    const SLOT: VolumeSlot = VolumeSlot(4);

    fn extent(start: u32, count: u32) -> Extent {
        Extent { start: Block(start), count }
    }

    fn sealer(key: &DataKey) -> Sealer {
        Sealer::new(GROUP, Epoch(5), Generation(1), AttemptId([6; 16]), key)
    }

    fn taken(bytes: &[u8], of: &[Extent], key: &DataKey, slot: VolumeSlot) -> Fetched {
        let mut fetched = Fetched::default();
        fetched.take(bytes, of, &Subject { group: GROUP, slot, key });
        fetched
    }

    #[test]
    fn a_frame_gives_the_blocks_that_are_to_be_taken_from_it_and_no_other() {
        let key = DataKey::new([8; 32]);
        let content: Vec<u8> = (0..5 * BLOCK_BYTES).map(|at| (at / BLOCK_BYTES) as u8 + 1).collect();
        let frame = sealer(&key).content(SLOT, Sequence(1), vec![extent(7, 2), extent(20, 3)], &content);
        let fetched = taken(&frame, &[extent(8, 1), extent(21, 2)], &key, SLOT);
        let blocks: Vec<(u32, u8)> = fetched.blocks.iter().map(|(block, bytes)| (block.0, bytes[0])).collect();
        assert_eq!((blocks, fetched.lost), (vec![(8, 2), (21, 4), (22, 5)], vec![]));
        let hole = sealer(&key).bare(Encoding::Hole, SLOT, Sequence(2), vec![extent(7, 9)]);
        let fetched = taken(&hole, &[extent(8, 2)], &key, SLOT);
        assert!(
            fetched.blocks.len() == 2 && fetched.blocks.iter().all(|(_, bytes)| bytes.iter().all(|byte| *byte == 0))
        );
    }

    #[test]
    fn an_answer_names_nothing_that_was_not_asked_for_and_nothing_twice_over() {
        let asked = Asked::new(&[extent(7, 2), extent(20, 3)]);
        let takes = |extents: &[Extent]| {
            let mut asked = asked.clone();
            extents.iter().try_for_each(|extent| asked.take(*extent)).is_ok()
        };
        assert!(takes(&[extent(20, 3), extent(8, 1), extent(7, 1)]));
        for beyond in
            [[extent(8, 2)].as_slice(), &[extent(0, 1)], &[extent(20, 3), extent(20, 3)], &[extent(u32::MAX, 1)]]
        {
            assert!(!takes(beyond), "{beyond:?}");
        }
    }

    #[test]
    fn what_does_not_open_or_is_of_other_blocks_is_lost_and_never_zeros() {
        let (key, other) = (DataKey::new([8; 32]), DataKey::new([9; 32]));
        let frame = sealer(&key).content(SLOT, Sequence(1), vec![extent(7, 2)], &[1; 2 * BLOCK_BYTES]);
        let unreadable = sealer(&key).bare(Encoding::Unreadable, SLOT, Sequence(2), vec![extent(7, 2)]);
        let hole = sealer(&key).bare(Encoding::Hole, SLOT, Sequence(2), vec![extent(7, 2)]);
        let mut damaged = frame.clone();
        *damaged.last_mut().expect("bytes") ^= 1;
        let (wanted, beyond) = ([extent(7, 1)], [extent(8, 2)]);
        for (bytes, of, key, slot) in [
            (&frame, &wanted, &other, SLOT),
            (&frame, &wanted, &key, VolumeSlot(5)),
            (&frame, &beyond, &key, SLOT),
            (&hole, &beyond, &key, SLOT),
            (&hole, &wanted, &other, SLOT),
            (&unreadable, &wanted, &key, SLOT),
            (&damaged, &wanted, &key, SLOT),
            (&vec![], &wanted, &key, SLOT),
        ] {
            let fetched = taken(bytes, of, key, slot);
            assert!(fetched.blocks.is_empty(), "nothing is taken");
            assert!(fetched.lost.len() == 1 && fetched.lost[0].0 == of[0] && !fetched.lost[0].1.is_empty());
        }
    }
}
