//! What the target has promised, and what every point it ever was sent has to hold: each block of each.
//!
//! Reads the frames as they leave the source, with the codec and nothing else: an interpreter of the format that knows no
//! journal. Every point is also held against the instant of its cut: it has to be a state that a power cut could have left.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use cdp_protocol::codec::open_content;
use cdp_protocol::frame::{self, Encoding, Frame, Kind};
use cdp_protocol::record::{Commit, PartEnd};
use cdp_protocol::seal::DataKey;
use cdp_protocol::session::source::{End, Outgoing};
use cdp_protocol::units::{AttemptId, BLOCK_BYTES, BLOCK_SECTORS, Epoch, FrameHash, GroupId, Head, VolumeSlot};
use cdp_source::sim::{Image, Instant, sectors_of};

use super::kept::Kept;

/// The group.
pub(crate) const GROUP: GroupId = GroupId([0x5c; 16]);
/// What no write has put there: a sector that no point covers.
pub(crate) const NOT_COVERED: u64 = u64::MAX;
/// Sectors of a block.
const SECTORS: usize = BLOCK_SECTORS as usize;

/// The group's key.
pub(crate) fn key() -> DataKey {
    DataKey::new([9; 32])
}

/// Everything that was sent, and what was promised of it.
#[derive(Default)]
pub(crate) struct Model {
    /// Sectors of each volume.
    sectors: Vec<usize>,
    attempts: HashMap<AttemptId, Attempt>,
    parts: HashMap<FrameHash, (Option<FrameHash>, AttemptId)>,
    points: HashMap<FrameHash, ModelPoint>,
    /// Points whose ack left the target, in order.
    pub(crate) acked: Vec<Head>,
    promised: HashSet<FrameHash>,
    /// Points that a store that was hurt has lost.
    gone: Vec<Head>,
    /// What pruning may have removed.
    pub(crate) kept: Kept,
}

struct Attempt {
    blocks: Vec<(usize, u32, [u64; SECTORS])>,
    /// Of its cut; none for a part.
    instant: Option<Arc<Instant>>,
}

/// A point.
pub(crate) struct ModelPoint {
    epoch: Epoch,
    pub(crate) predecessor: Option<Head>,
    /// By the source's clock.
    pub(crate) cut_time: i64,
    pub(crate) image: Arc<Image>,
}

impl Model {
    pub(crate) fn new(sectors: &[u32]) -> Self {
        Self { sectors: sectors.iter().map(|sectors| *sectors as usize).collect(), ..Self::default() }
    }

    /// A point that was sent.
    pub(crate) fn point(&self, head: &Head) -> Option<&ModelPoint> {
        self.points.get(&head.hash).filter(|point| point.epoch == head.epoch)
    }

    /// The newest promised point's image.
    pub(crate) fn newest(&self) -> Option<&Arc<Image>> {
        self.acked.last().map(|head| &self.points[&head.hash].image)
    }

    /// An attempt is ready to leave; `instant` is that of the last flip.
    pub(crate) fn submitted(&mut self, outgoing: &Outgoing, instant: Arc<Instant>) {
        let frames = outgoing.frames.iter().map(|bytes| frame::decode(&GROUP, bytes).expect("a frame of ours"));
        let blocks = frames.filter(|frame| frame.header.kind == Kind::Extents).flat_map(|frame| blocks_of(&frame));
        let instant = (outgoing.end != End::Part).then_some(instant);
        self.attempts.insert(outgoing.attempt, Attempt { blocks: blocks.collect(), instant });
    }

    /// A frame leaves the source: an end makes a part or a point.
    pub(crate) fn sent(&mut self, bytes: &[u8]) -> Result<(), String> {
        let frame = frame::decode(&GROUP, bytes).expect("a frame of ours");
        match frame.header.kind {
            Kind::PartEnd => {
                let (end, _) = PartEnd::decode(frame.payload).expect("a record of ours");
                let before = end.predecessor.map(|before| before.hash);
                self.parts.insert(frame.hash(), (before, frame.header.attempt));
                Ok(())
            }
            Kind::Commit => {
                let (commit, _) = Commit::decode(frame.payload).expect("a record of ours");
                self.committed(Head { epoch: frame.header.epoch, hash: frame.hash() }, frame.header.attempt, &commit)
            }
            Kind::Begin | Kind::Extents | Kind::Synced => Ok(()),
        }
    }

    fn committed(&mut self, head: Head, attempt: AttemptId, commit: &Commit) -> Result<(), String> {
        if self.points.contains_key(&head.hash) {
            return Ok(());
        }
        let predecessor = commit.predecessor.map(|before| before.head);
        let base = predecessor.map(|before| Image::clone(&self.points[&before.hash].image));
        let nothing = || self.sectors.iter().map(|sectors| vec![NOT_COVERED; *sectors]).collect();
        let mut image = base.unwrap_or_else(nothing);
        let mut attempts = vec![attempt];
        let mut part = commit.parts.map(|parts| parts.hash);
        while let Some(hash) = part {
            let (before, attempt) = self.parts.get(&hash).ok_or("a commit takes in a part that was never sent")?;
            attempts.push(*attempt);
            part = *before;
        }
        for attempt in attempts.iter().rev() {
            self.attempts[attempt].apply(&mut image);
        }
        let instant = self.attempts[&attempt].instant.as_ref().ok_or("a part's attempt makes a point")?;
        instant
            .explain(&image)
            .map_err(|why| format!("point {} was never a state of the volumes: {why}", head.epoch))?;
        let (epoch, cut_time) = (head.epoch, commit.cut_time.0);
        self.points.insert(head.hash, ModelPoint { epoch, predecessor, cut_time, image: Arc::new(image) });
        Ok(())
    }

    /// Points of a store that was hurt are gone: they may be sent again, and promised anew.
    pub(crate) fn lost(&mut self, missing: &[Head]) {
        self.acked.retain(|head| !missing.contains(head));
        self.gone.extend(missing);
        for head in missing {
            self.promised.remove(&head.hash);
        }
    }

    /// A target whose store was hurt says that it stands at `head`: what it had promised after it is lost.
    pub(crate) fn behind(&mut self, head: Option<Head>) {
        let is_lost = |acked: &&Head| head.is_none_or(|head| acked.epoch > head.epoch);
        let lost: Vec<Head> = self.acked.iter().filter(is_lost).copied().collect();
        self.lost(&lost);
    }

    /// The source says that a promised point still describes its volumes.
    pub(crate) fn unchanged(&self, epoch: Epoch, instant: &Instant) -> Result<(), String> {
        // Of a store that was hurt the source may not have heard yet what is gone.
        let mut told = self.gone.iter().chain(&self.acked).rev();
        let point = told.find(|head| head.epoch == epoch).map(|head| &self.points[&head.hash]);
        let point = point.ok_or_else(|| format!("{epoch} is called unchanged and was never acked"))?;
        instant.explain(&point.image).map_err(|why| format!("{epoch} is called unchanged and is not: {why}"))
    }

    /// The target says that a point is durable.
    pub(crate) fn promise(&mut self, head: Head) -> Result<(), String> {
        if !self.points.contains_key(&head.hash) {
            return Err(format!("the target acks {}, which was never sent", head.epoch));
        }
        if self.promised.insert(head.hash) {
            self.acked.push(head);
        }
        Ok(())
    }
}

impl Attempt {
    fn apply(&self, image: &mut Image) {
        for (volume, block, content) in &self.blocks {
            let first = *block as usize * SECTORS;
            let volume = &mut image[*volume];
            // The last block may reach beyond its volume's end.
            let end = volume.len().min(first + SECTORS);
            volume[first..end].copy_from_slice(&content[..end - first]);
        }
    }
}

/// The blocks of a frame of extents, as the numbers of the writes that their sectors are from.
fn blocks_of(frame: &Frame<'_>) -> Vec<(usize, u32, [u64; SECTORS])> {
    let VolumeSlot(volume) = frame.header.volume;
    let blocks = frame.header.extents.iter().flat_map(|extent| extent.blocks());
    let content = match frame.header.encoding {
        Encoding::Hole => vec![0; frame.header.blocks() as usize * BLOCK_BYTES],
        _ => open_content(frame, &key().attempt_key(&frame.header.attempt)).expect("a frame of ours opens"),
    };
    let numbers = content.chunks_exact(BLOCK_BYTES).map(numbers_of);
    blocks.zip(numbers).map(|(block, numbers)| (usize::from(volume), block.0, numbers)).collect()
}

/// The numbers of the writes that a block's sectors are from.
pub(crate) fn numbers_of(block: &[u8]) -> [u64; SECTORS] {
    let mut numbers = [0; SECTORS];
    numbers.iter_mut().zip(sectors_of(block)).for_each(|(number, read)| *number = read);
    numbers
}
