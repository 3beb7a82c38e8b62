//! A source that makes random histories, and the model that says what every point has to hold.

#![allow(dead_code, reason = "each test uses a part")]
#![allow(unreachable_pub, reason = "a module of several test programs")]

use cdp_protocol::codec::{FrameListHasher, Sealer};
use cdp_protocol::escrow::Envelope;
use cdp_protocol::frame::{self, Encoding, Kind};
use cdp_protocol::record::{Begin, Commit, Meters, PartChain, PartEnd, Predecessor, Volume};
use cdp_protocol::seal::DataKey;
use cdp_protocol::session::chain::Step;
use cdp_protocol::session::lineage::Line;
use cdp_protocol::units::{
    AttemptId, BLOCK_BYTES, Block, Class, Epoch, Extent, FrameHash, Generation, GroupId, Head, KeyId, Sequence,
    Timestamp, VolumeSlot,
};
use cdp_seams::random::{SimRandom, array};
use cdp_target::journal::{GroupIdentity, GroupJournal, GroupView, JournalError, Overview, Point};
use cdp_target::prune::{CHUNK_BYTES_MAX, Prune, Pruned};
use cdp_target::restore::keyring::Keyring;
use cdp_target::restore::point::{Content, PointImage, ReadError};
use cdp_target::retention::Ladder;
use std::collections::BTreeSet;
use std::sync::Arc;

pub const GROUP: GroupId = GroupId([7; 16]);
/// Blocks of the two volumes.
pub const BLOCKS: [u32; 2] = [40, 24];

pub fn key() -> DataKey {
    DataKey::new([3; 32])
}

pub fn identity() -> GroupIdentity {
    let envelope = Envelope { key: KeyId([1; 8]), encapsulated: vec![2; 32], sealed: vec![3; 48] };
    GroupIdentity { group: GROUP, office: "branch".into(), name: "main".into(), envelope }
}

pub fn volumes() -> Vec<Volume> {
    let volume = |slot: usize| Volume {
        slot: VolumeSlot(slot as u16),
        size_bytes: u64::from(BLOCKS[slot]) * BLOCK_BYTES as u64,
        name: format!("v{slot}"),
    };
    vec![volume(0), volume(1)]
}

/// Prunes to the newest point and those that are pinned or labelled.
pub fn prune_to_newest(
    journal: &mut GroupJournal,
    now: Timestamp,
    random: &SimRandom,
    segment_bytes_max: u64,
) -> Pruned {
    let settings = Prune {
        ladder: &Ladder { every_s: 0, hourly_s: 0, daily_s: 0, weekly_s: 0 },
        now,
        wall: now,
        keys: Some(&Keyring::from(&key())),
        random,
        segment_bytes_max,
        chunk_bytes_max: CHUNK_BYTES_MAX,
        checkpoint_share: 0.5,
        keep_only_newest: true,
    };
    settings.run(journal.view(), journal, &mut |_| true, &mut |_, _| {}).expect("pruned")
}

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    NotCovered,
    Zero,
    Unreadable,
    /// A block filled with this number.
    Filled(u64),
    Damaged,
}

/// Every block of the group.
pub type Cells = Vec<Vec<Cell>>;
/// Blocks that an attempt writes.
pub type Delta = Vec<(usize, u32, Cell)>;

pub fn block_of(fill: u64) -> Vec<u8> {
    let mut block = fill.to_le_bytes().repeat(BLOCK_BYTES / 8);
    // Some blocks do not compress.
    if fill.is_multiple_of(13) {
        let noise = SimRandom::new(fill);
        for word in block[8..].chunks_exact_mut(8) {
            word.copy_from_slice(&noise.next().to_le_bytes());
        }
    }
    block
}

#[derive(Clone, Debug)]
pub struct ModelPoint {
    pub head: Head,
    pub attempt: AttemptId,
    pub cells: Arc<Cells>,
    pub received: Timestamp,
    /// Of all its frames, those of its parts too.
    pub bytes: u64,
}

#[derive(Clone, Debug)]
pub struct ModelPart {
    pub chain: PartChain,
    pub delta: Delta,
    pub bytes: u64,
}

/// The attempt that is being sent.
#[derive(Clone)]
pub struct Attempt {
    pub id: AttemptId,
    pub epoch: Epoch,
    pub frames: Vec<Vec<u8>>,
    pub delta: Delta,
    pub is_part: bool,
}

/// A source, and what its target has to hold.
pub struct Source {
    pub random: SimRandom,
    pub generation: Generation,
    pub points: Vec<ModelPoint>,
    pub acked_points: usize,
    pub parts: Vec<ModelPart>,
    pub acked_parts: usize,
    pub parts_epoch: Option<Epoch>,
    pub attempt: Option<Attempt>,
    pub time: i64,
}

impl Source {
    pub fn new(seed: u64) -> Self {
        Self {
            random: SimRandom::new(seed ^ 0xabcd_ef01),
            generation: Generation(0),
            points: Vec::new(),
            acked_points: 0,
            parts: Vec::new(),
            acked_parts: 0,
            parts_epoch: None,
            attempt: None,
            time: 1000,
        }
    }

    pub fn below(&self, bound: u64) -> u64 {
        self.random.below(bound)
    }

    fn empty() -> Cells {
        BLOCKS.iter().map(|blocks| vec![Cell::NotCovered; *blocks as usize]).collect()
    }

    fn next_epoch(&self) -> Epoch {
        let head = self.points.last().map_or(0, |point| point.head.epoch.0);
        self.parts_epoch.unwrap_or_else(|| Epoch(head + 1 + self.below(2)))
    }

    /// Makes the frames of a new attempt with 0 to `frames_max` extent frames; the one before is abandoned.
    pub fn make(&mut self, is_part: bool, frames_max: u64) {
        let epoch = self.next_epoch();
        let attempt = AttemptId(array(&self.random));
        let sealer = Sealer::new(GROUP, epoch, self.generation, attempt, &key());
        let mut frames = vec![sealer.begin(&Begin { key: KeyId([1; 8]), volumes: volumes() })];
        let mut delta = Delta::new();
        for sequence in 1..=self.below(frames_max + 1) {
            frames.push(self.extents_frame(&sealer, Sequence(sequence), &mut delta));
        }
        self.attempt = Some(self.ended(&sealer, (epoch, attempt), frames, delta, is_part));
    }

    /// Makes the frames of an attempt that writes `cells`, a frame each.
    pub fn make_of(&mut self, is_part: bool, cells: &[(usize, u32, Cell)]) {
        let epoch =
            self.parts_epoch.unwrap_or_else(|| Epoch(self.points.last().map_or(0, |point| point.head.epoch.0) + 1));
        let attempt = AttemptId(array(&self.random));
        let sealer = Sealer::new(GROUP, epoch, self.generation, attempt, &key());
        let mut frames = vec![sealer.begin(&Begin { key: KeyId([1; 8]), volumes: volumes() })];
        for (at, (volume, block, cell)) in cells.iter().enumerate() {
            let (slot, sequence) = (VolumeSlot(*volume as u16), Sequence(at as u64 + 1));
            let extents = vec![Extent { start: Block(*block), count: 1 }];
            frames.push(match cell {
                Cell::Filled(fill) => sealer.content(slot, sequence, extents, &block_of(*fill)),
                Cell::Zero => sealer.bare(Encoding::Hole, slot, sequence, extents),
                Cell::Unreadable => sealer.bare(Encoding::Unreadable, slot, sequence, extents),
                Cell::NotCovered | Cell::Damaged => panic!("nobody writes {cell:?}"),
            });
        }
        self.attempt = Some(self.ended(&sealer, (epoch, attempt), frames, cells.to_vec(), is_part));
    }

    /// Makes the frames of an attempt of content, each the blocks of a volume from one on, filled with these numbers.
    pub fn make_runs(&mut self, is_part: bool, runs: &[(usize, u32, &[u64])]) {
        let epoch =
            self.parts_epoch.unwrap_or_else(|| Epoch(self.points.last().map_or(0, |point| point.head.epoch.0) + 1));
        let attempt = AttemptId(array(&self.random));
        let sealer = Sealer::new(GROUP, epoch, self.generation, attempt, &key());
        let mut frames = vec![sealer.begin(&Begin { key: KeyId([1; 8]), volumes: volumes() })];
        let mut delta = Delta::new();
        for (at, (volume, block, fills)) in runs.iter().enumerate() {
            let (slot, sequence) = (VolumeSlot(*volume as u16), Sequence(at as u64 + 1));
            let extents = vec![Extent { start: Block(*block), count: fills.len() as u32 }];
            let content: Vec<u8> = fills.iter().flat_map(|fill| block_of(*fill)).collect();
            frames.push(sealer.content(slot, sequence, extents, &content));
            delta.extend((*block..).zip(*fills).map(|(block, fill)| (*volume, block, Cell::Filled(*fill))));
        }
        self.attempt = Some(self.ended(&sealer, (epoch, attempt), frames, delta, is_part));
    }

    fn ended(
        &self,
        sealer: &Sealer,
        (epoch, attempt): (Epoch, AttemptId),
        mut frames: Vec<Vec<u8>>,
        delta: Delta,
        is_part: bool,
    ) -> Attempt {
        let mut list = FrameListHasher::default();
        for bytes in &frames {
            list.push(&frame::hash(bytes));
        }
        let parts = self.parts.last().map(|part| part.chain);
        let sequence = Sequence(frames.len() as u64);
        let end = if is_part {
            sealer.record(Kind::PartEnd, sequence, PartEnd { predecessor: parts, frames: list.list() }.encode())
        } else {
            let predecessor = self.points.last().map(|point| Predecessor { head: point.head, attempt: point.attempt });
            let commit = Commit {
                predecessor,
                frames: list.list(),
                parts,
                first_epoch: epoch,
                after_rollback_to: None,
                class: Class::Crash,
                cut_time: Timestamp(self.time),
                meters: Meters {
                    frame_bytes: frames.iter().map(|frame| frame.len() as u64).sum(),
                    ..Meters::default()
                },
                label: None,
                volumes: vec![],
                layouts: Vec::new(),
            };
            sealer.record(Kind::Commit, sequence, commit.encode())
        };
        frames.push(end);
        Attempt { id: attempt, epoch, frames, delta, is_part }
    }

    fn extents_frame(&self, sealer: &Sealer, sequence: Sequence, delta: &mut Delta) -> Vec<u8> {
        let volume = self.below(2) as usize;
        let slot = VolumeSlot(volume as u16);
        let mut extents = Vec::new();
        let mut at = self.below(u64::from(BLOCKS[volume])) as u32;
        while at < BLOCKS[volume] && extents.len() < 3 {
            let count = (1 + self.below(6) as u32).min(BLOCKS[volume] - at);
            extents.push(Extent { start: Block(at), count });
            at += count + self.below(8) as u32;
        }
        let blocks: Vec<u32> = extents.iter().flat_map(|extent| extent.blocks()).map(|block| block.0).collect();
        match self.below(6) {
            0 => {
                delta.extend(blocks.iter().map(|block| (volume, *block, Cell::Zero)));
                sealer.bare(Encoding::Hole, slot, sequence, extents)
            }
            1 if self.below(3) == 0 => {
                delta.extend(blocks.iter().map(|block| (volume, *block, Cell::Unreadable)));
                sealer.bare(Encoding::Unreadable, slot, sequence, extents)
            }
            _ => {
                let fills: Vec<u64> = blocks.iter().map(|_| self.random.next()).collect();
                delta.extend(blocks.iter().zip(&fills).map(|(block, fill)| (volume, *block, Cell::Filled(*fill))));
                let content: Vec<u8> = fills.iter().flat_map(|fill| block_of(*fill)).collect();
                sealer.content(slot, sequence, extents, &content)
            }
        }
    }

    /// Sends the frames of the attempt from `from` to `to`; takes note of what its end makes.
    pub fn send(&mut self, journal: &mut GroupJournal, from: usize, to: usize) -> Result<(), JournalError> {
        let Some(attempt) = self.attempt.clone() else { return Ok(()) };
        for (at, bytes) in attempt.frames.iter().enumerate().take(to).skip(from) {
            let frame = frame::decode(&GROUP, bytes).expect("a frame we made");
            self.time += 1;
            // Noted before: a cut within `append` may leave it durable.
            let is_end = at + 1 == attempt.frames.len();
            if is_end {
                self.note_end(&attempt, frame.hash());
            }
            match journal.append(&frame, Timestamp(self.time))? {
                Step::PartEnded(ended, _) => {
                    assert_eq!((ended, true, true), (attempt.id, attempt.is_part, is_end));
                }
                Step::Committed(head, _) => {
                    assert_eq!(Some(head), self.points.last().map(|point| point.head));
                }
                other => assert_eq!(other, Step::Taken),
            }
        }
        Ok(())
    }

    fn note_end(&mut self, attempt: &Attempt, hash: FrameHash) {
        let bytes = attempt.frames.iter().map(|frame| frame.len() as u64).sum();
        if attempt.is_part {
            let chain = PartChain { count: self.parts.len() as u32 + 1, hash };
            self.parts.push(ModelPart { chain, delta: attempt.delta.clone(), bytes });
            self.parts_epoch = Some(attempt.epoch);
            return;
        }
        let mut cells = self.points.last().map_or_else(Self::empty, |point| Cells::clone(&point.cells));
        let deltas = self.parts.iter().map(|part| &part.delta).chain([&attempt.delta]);
        for (volume, block, cell) in deltas.flatten() {
            cells[*volume][*block as usize] = *cell;
        }
        let head = Head { epoch: attempt.epoch, hash };
        let received = Timestamp(self.time);
        let bytes = self.parts.iter().map(|part| part.bytes).sum::<u64>() + bytes;
        self.points.push(ModelPoint { head, attempt: attempt.id, cells: Arc::new(cells), received, bytes });
        self.parts.clear();
        self.acked_parts = 0;
        self.parts_epoch = None;
    }

    /// A sync succeeded: everything sent is acked.
    pub fn acked(&mut self) {
        self.acked_points = self.points.len();
        self.acked_parts = self.parts.len();
    }

    /// One random step: an epoch, a part, an abandoned attempt, a new generation; then perhaps a sync.
    pub fn step(&mut self, journal: &mut GroupJournal) -> Result<(), JournalError> {
        if self.generation.0 == 0 || self.below(25) == 0 {
            self.grant(journal)?;
        }
        let is_part = self.below(4) == 0;
        self.make(is_part, 3);
        let frames = self.attempt.as_ref().map_or(0, |attempt| attempt.frames.len());
        let to = if self.below(6) == 0 { self.below(frames as u64) as usize } else { frames };
        self.send(journal, 0, to)?;
        if self.below(3) > 0 {
            self.sync(journal)?;
        }
        Ok(())
    }

    pub fn sync(&mut self, journal: &mut GroupJournal) -> Result<(), JournalError> {
        journal.sync()?;
        self.acked();
        Ok(())
    }

    pub fn grant(&mut self, journal: &mut GroupJournal) -> Result<(), JournalError> {
        // Whether it was granted is learned at the next hello where the answer was lost.
        let generation = Generation(self.generation.0 + 1);
        let head = journal.chain().head().map(|(head, _)| head.epoch);
        let granted = journal.begin(Line { generation, after: head, from: None });
        self.fence(generation);
        granted
    }

    fn fence(&mut self, generation: Generation) {
        self.generation = generation;
        self.parts.clear();
        self.acked_parts = 0;
        self.parts_epoch = None;
        self.attempt = None;
    }

    /// After a recovery: goes on from where the target says it stands, which has to be at or behind what was acked.
    pub fn line_up(&mut self, journal: &mut GroupJournal) -> Result<(), JournalError> {
        let chain = journal.chain().clone();
        let head = chain.head().map(|(head, _)| head);
        let kept = head.map_or(0, |head| {
            let at = self.points.iter().position(|point| point.head == head);
            1 + at.unwrap_or_else(|| panic!("the target's head {head:?} was never sent"))
        });
        assert!(kept >= self.acked_points, "acked point lost: {kept} of {} left", self.acked_points);
        let was_newest = kept == self.points.len();
        self.points.truncate(kept);
        if chain.generation() != self.generation {
            // The grant that was cut off did not come to be, or the parts of a commit that was lost are gone.
            assert!(chain.generation() < self.generation, "a generation nobody asked for");
            self.grant(journal)?;
        }
        let chain = journal.chain().clone();
        if was_newest {
            let parts = chain.parts().map_or(0, |(_, parts)| parts.count as usize);
            assert!(parts >= self.acked_parts, "acked part lost: {parts} of {} left", self.acked_parts);
            assert_eq!(chain.parts().map(|(_, parts)| parts), parts.checked_sub(1).map(|at| self.parts[at].chain));
            self.parts.truncate(parts);
        } else {
            // Parts of a commit that was lost: the source knows them no more, a new generation fences them.
            self.grant(journal)?;
        }
        if self.parts.is_empty() {
            self.parts_epoch = None;
        }
        self.resume(journal)
    }

    /// Goes on with the open attempt, or abandons it.
    fn resume(&mut self, journal: &mut GroupJournal) -> Result<(), JournalError> {
        let Some(attempt) = self.attempt.clone() else { return Ok(()) };
        let Some(open) = journal.chain().open().filter(|open| open.attempt == attempt.id) else { return Ok(()) };
        let next = open.next.0 as usize;
        if self.below(2) == 0 {
            self.send(journal, next, attempt.frames.len())?;
        }
        Ok(())
    }
}

/// What the target serves of a volume's blocks at a point.
pub fn cells_of(image: &PointImage, volume: usize) -> Vec<Cell> {
    let slot = VolumeSlot(volume as u16);
    let mut cells = vec![Cell::NotCovered; BLOCKS[volume] as usize];
    let whole = Extent::new(Block(0), BLOCKS[volume]).expect("blocks");
    let mut at = 0;
    let all = image.read_blocks(slot, whole, &mut |extent, content| {
        assert_eq!(extent.start.0, at, "in block order");
        at += extent.count;
        put(&mut cells, extent, content);
    });
    if all.is_ok() {
        assert_eq!(at, BLOCKS[volume], "all of it");
        return cells;
    }
    for block in 0..BLOCKS[volume] {
        let extent = Extent { start: Block(block), count: 1 };
        match image.read_blocks(slot, extent, &mut |extent, content| put(&mut cells, extent, content)) {
            Ok(()) => {}
            Err(ReadError::NotCovered { .. }) => cells[block as usize] = Cell::NotCovered,
            Err(ReadError::Damaged { .. } | ReadError::Journal(_)) => cells[block as usize] = Cell::Damaged,
            Err(error) => panic!("{error}"),
        }
    }
    cells
}

fn put(cells: &mut [Cell], extent: Extent, content: Content<'_>) {
    for (index, block) in extent.blocks().enumerate() {
        cells[block.0 as usize] = match content {
            Content::Zero => Cell::Zero,
            Content::Unreadable => Cell::Unreadable,
            Content::Bytes(bytes) => {
                let bytes = &bytes[index * BLOCK_BYTES..][..BLOCK_BYTES];
                let fill = u64::from_le_bytes(*bytes.first_chunk().expect("8 bytes"));
                assert!(bytes == block_of(fill), "a block nobody wrote");
                Cell::Filled(fill)
            }
        };
    }
}

pub fn image_cells(view: &Arc<GroupView>, epoch: Epoch) -> Result<Cells, JournalError> {
    let image = view.image(epoch, &key())?;
    Ok((0..BLOCKS.len()).map(|volume| cells_of(&image, volume)).collect())
}

/// Checks that the view lists exactly `points`; those for which `deep` holds are read whole.
pub fn check(view: &Arc<GroupView>, points: &[ModelPoint], deep: impl Fn(usize) -> bool) {
    let listed: Vec<_> = view.points().map(|point| point.expect("a point")).collect();
    let heads: Vec<Head> = listed.iter().map(|point| Head { epoch: point.epoch, hash: point.hash }).collect();
    assert_eq!(heads, points.iter().map(|point| point.head).collect::<Vec<_>>());
    check_overview(view, &listed);
    let unreadable = view.unreadable();
    for (at, (listed, point)) in listed.iter().zip(points).enumerate() {
        assert_eq!(listed.damaged, None);
        assert_eq!(listed.received, point.received, "receive time of {}", point.head.epoch);
        let standing = point.cells.iter().flatten().filter(|cell| **cell == Cell::Unreadable).count() as u64;
        assert_eq!(unreadable.blocks(listed.epoch, &volumes()), standing, "unreadable at {}", point.head.epoch);
        assert_eq!(listed.bytes, point.bytes, "bytes of {}", point.head.epoch);
        if deep(at) {
            let cells = image_cells(view, point.head.epoch).expect("an image");
            assert_eq!(cells, *point.cells, "point {}", point.head.epoch);
        }
    }
}

/// Checks that what is told without listing all points is what the list says.
fn check_overview(view: &GroupView, listed: &[Point]) {
    let overview = view.overview().expect("an overview");
    let time = listed.iter().map(|point| point.cut_time.min(point.received)).max();
    assert_eq!(overview, Overview { points: listed.len() as u64, newest: listed.last().cloned().zip(time) });
    assert_eq!(view.newest().expect("the newest").as_ref(), listed.last());
    for after in [0, listed.len() / 2, listed.len()] {
        let above = after.checked_sub(1).map_or(Epoch(0), |at| listed[at].epoch);
        for max in [0, 3, usize::MAX] {
            let page = &listed[after..listed.len().min(after.saturating_add(max))];
            assert_eq!(view.points_after(above, max).expect("a page"), page, "{max} after {above}");
        }
    }
}

/// What differs from the model: blocks that are damaged; panics on any that is wrong.
pub fn damaged_blocks(cells: &Cells, model: &Cells) -> BTreeSet<(usize, usize)> {
    let mut damaged = BTreeSet::new();
    for (volume, (found, expected)) in cells.iter().zip(model).enumerate() {
        for (block, (found, expected)) in found.iter().zip(expected).enumerate() {
            if *found == Cell::Damaged {
                damaged.insert((volume, block));
            } else {
                assert_eq!(found, expected, "wrong content: volume {volume} block {block}");
            }
        }
    }
    damaged
}
