//! The index of a segment: which frame holds which blocks, which attempts its frames are of, which points it has.
//!
//! Owns the index as it grows with the open segment, and its bytes in a sealed one. Within a journal position is
//! precedence: a block's content at a point is in the included frame that stands last, because epochs rise, parts stand
//! before their commit, and one attempt is open at a time. Whether a run is included is decided when it is read
//! (`view`), since an attempt's end may stand in a later segment. Does not read frames.

use super::bytes::{FieldError, Input, put_long, put_volumes};
use super::manifest::PointRange;
use super::segment::SECTIONS;
use cdp_protocol::frame::{Encoding, Frame, Header, Kind};
use cdp_protocol::limits::{CONTENT_BLOCKS_MAX, HOLE_BLOCKS_MAX};
use cdp_protocol::record::{Commit, Volume};
use cdp_protocol::session::chain::Step;
use cdp_protocol::units::{AttemptId, Block, Epoch, Extent, FrameHash, Generation, Head, Timestamp, VolumeSlot};
use roaring::RoaringBitmap;
use std::collections::BTreeMap;

/// Bytes of an extent's entry.
const ENTRY_BYTES: usize = 32;

/// What an extent's blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EntryKind {
    /// Bytes of the frame's content.
    Content = 0,
    /// Zeros.
    Hole = 1,
    /// The source's device could not read them.
    Unreadable = 2,
    /// They were lost before what is around them was sealed anew.
    Lost = 3,
}

/// One extent of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What its blocks are.
    pub kind: EntryKind,
    /// Its volume.
    pub slot: VolumeSlot,
    /// Its blocks.
    pub extent: Extent,
    /// Where its content begins within the frame's, in blocks.
    pub content_block: u32,
    /// The attempt, as an index into the runs.
    pub run: u32,
    /// Where in the segment the frame begins.
    pub frame_offset: u64,
    /// Bytes of the frame.
    pub frame_len: u32,
}

/// How the frames of an attempt ended within a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RunEnd {
    /// Not yet: a later segment tells.
    Open = 0,
    /// With a part end: included if its epoch was committed in its generation.
    Part = 1,
    /// With a commit.
    Commit = 2,
    /// Another attempt took its place.
    Abandoned = 3,
}

/// An attempt's frames in a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Its epoch.
    pub epoch: Epoch,
    /// Its generation.
    pub generation: Generation,
    /// The attempt.
    pub attempt: AttemptId,
    /// How it ended here.
    pub end: RunEnd,
    /// Whether it began in an earlier segment.
    pub continued: bool,
    /// Bytes of its frames here.
    pub bytes: u64,
    /// Blocks that its frames here call unreadable: few, so that who looks for them need not read every table.
    pub unreadable_blocks: u64,
}

/// A point, as the index knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitEntry {
    /// Epoch, and hash of the commit; zeros where the commit is damaged and nothing names it.
    pub head: Head,
    /// Its generation.
    pub generation: Generation,
    /// Its own attempt.
    pub attempt: AttemptId,
    /// Where its frame begins (or the damage that took it).
    pub offset: u64,
    /// Bytes of the frame.
    pub frame_len: u32,
    /// When the target received it.
    pub received: Timestamp,
    /// The record; `None` where the commit is damaged and others speak for it.
    pub record: Option<Commit>,
    /// The group's volumes at that point.
    pub volumes: Vec<Volume>,
}

impl CommitEntry {
    /// The instant of the cut; where the commit is damaged, when it was received.
    #[must_use]
    pub fn cut_time(&self) -> Timestamp {
        self.record.as_ref().map_or(self.received, |record| record.cut_time)
    }
}

/// Bytes whose frames cannot be told any more: any block may have been in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Where they begin.
    pub offset: u64,
    /// How many they are.
    pub len: u64,
    /// The attempt they belong to, where the frames around them tell.
    pub run: Option<u32>,
}

/// The index of the open segment, in memory.
#[derive(Clone, Default)]
pub struct OpenIndex {
    /// Attempts, in the order they began.
    pub runs: Vec<Run>,
    /// Points, in order.
    pub commits: Vec<CommitEntry>,
    /// Damage that hides extents.
    pub lost: Vec<Lost>,
    content: BTreeMap<(u16, u32, u64), Entry>,
    bare: BTreeMap<(u16, u32, u64), Entry>,
}

/// The extents of a sealed segment.
#[derive(Debug, Default)]
pub struct Tables {
    content: Vec<Entry>,
    bare: Vec<Entry>,
}

/// Everything else in the index of a sealed segment.
#[derive(Debug, Default)]
pub struct Summary {
    /// Attempts, in the order they began.
    pub runs: Vec<Run>,
    /// Points, in order.
    pub commits: Vec<CommitEntry>,
    /// Damage that hides extents.
    pub lost: Vec<Lost>,
    /// The blocks it touches.
    pub bitmaps: BTreeMap<u16, RoaringBitmap>,
}

impl OpenIndex {
    /// Extents it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.content.len() + self.bare.len()
    }

    /// Whether it holds no extent.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The run of the frame with `header`: the current one, or a new one. `begins` says that the frame starts its attempt.
    pub fn run_of(&mut self, header: &Header, begins: bool) -> u32 {
        let current = self.runs.last_mut();
        let same = |run: &Run| run.attempt == header.attempt && run.epoch == header.epoch && run.end == RunEnd::Open;
        match current {
            Some(run) if same(run) && !begins => {}
            current => {
                if let Some(run) = current.filter(|run| run.end == RunEnd::Open) {
                    run.end = RunEnd::Abandoned;
                }
                self.runs.push(Run {
                    epoch: header.epoch,
                    generation: header.generation,
                    attempt: header.attempt,
                    end: RunEnd::Open,
                    continued: !begins,
                    bytes: 0,
                    unreadable_blocks: 0,
                });
            }
        }
        self.runs.len() as u32 - 1
    }

    /// Takes in a frame at `offset` that the chain took as `step`; `volumes` are those of its attempt.
    pub fn follow(&mut self, frame: &Frame<'_>, step: Step, offset: u64, received: Timestamp, volumes: &[Volume]) {
        let header = &frame.header;
        if matches!(step, Step::Duplicate | Step::Synced) {
            return;
        }
        let run = self.run_of(header, header.kind == Kind::Begin);
        self.runs[run as usize].bytes += frame.bytes.len() as u64;
        match step {
            Step::PartEnded(..) => self.runs[run as usize].end = RunEnd::Part,
            Step::Committed(head, commit) => {
                self.runs[run as usize].end = RunEnd::Commit;
                self.commits.push(CommitEntry {
                    head,
                    generation: header.generation,
                    attempt: header.attempt,
                    offset,
                    frame_len: frame.bytes.len() as u32,
                    received,
                    record: Some(*commit),
                    volumes: volumes.to_vec(),
                });
            }
            _ if header.kind == Kind::Extents => self.insert(header, run, offset),
            _ => {}
        }
    }

    /// Takes in the extents of a frame at `offset`.
    pub fn insert(&mut self, header: &Header, run: u32, frame_offset: u64) {
        let kind = match header.encoding {
            Encoding::Raw | Encoding::Lz4 | Encoding::Zstd => EntryKind::Content,
            Encoding::Hole => EntryKind::Hole,
            Encoding::Unreadable => EntryKind::Unreadable,
            Encoding::Lost => EntryKind::Lost,
        };
        if kind == EntryKind::Unreadable {
            self.runs[run as usize].unreadable_blocks += header.blocks();
        }
        let table = if kind == EntryKind::Content { &mut self.content } else { &mut self.bare };
        let mut content_block = 0;
        for extent in &header.extents {
            let (slot, frame_len) = (header.volume, header.frame_len() as u32);
            let entry = Entry { kind, slot, extent: *extent, content_block, run, frame_offset, frame_len };
            table.insert((slot.0, extent.start.0, frame_offset), entry);
            content_block = content_block.saturating_add(extent.count);
        }
    }

    /// All entries.
    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.content.values().chain(self.bare.values())
    }

    /// The newest epoch whose frames it has; 0 where it has none.
    #[must_use]
    pub fn newest_run(&self) -> Epoch {
        self.runs.iter().map(|run| run.epoch).max().unwrap_or_default()
    }

    /// The run of the frame with `header` in a file that the target wrote: every run in it counts.
    pub fn pack_run(&mut self, header: &Header) -> u32 {
        let same = |run: &Run| run.attempt == header.attempt && run.epoch == header.epoch;
        if !self.runs.last().is_some_and(same) {
            let (epoch, generation, attempt) = (header.epoch, header.generation, header.attempt);
            let (end, continued, bytes, unreadable_blocks) = (RunEnd::Commit, false, 0, 0);
            self.runs.push(Run { epoch, generation, attempt, end, continued, bytes, unreadable_blocks });
        }
        self.runs.len() as u32 - 1
    }

    /// Its points in short, if it has any.
    #[must_use]
    pub fn point_range(&self) -> Option<PointRange> {
        let (first, last) = (self.commits.first()?.head.epoch, self.commits.last()?.head.epoch);
        let times = self.commits.iter().map(CommitEntry::cut_time);
        Some(PointRange { first, last, earliest: times.clone().min()?, latest: times.max()? })
    }

    /// Entries that may touch `extent` of a volume.
    pub fn candidates(&self, slot: VolumeSlot, extent: Extent, out: &mut Vec<Entry>) {
        for (table, blocks_max) in [(&self.content, CONTENT_BLOCKS_MAX as u32), (&self.bare, HOLE_BLOCKS_MAX)] {
            let from = (slot.0, extent.start.0.saturating_sub(blocks_max - 1), 0);
            let to = (slot.0, (extent.end() - 1) as u32, u64::MAX);
            let touching = table.range(from..=to).filter(|(_, entry)| entry.extent.end() > u64::from(extent.start.0));
            out.extend(touching.map(|(_, entry)| *entry));
        }
    }

    /// The sections of the index's bytes.
    #[must_use]
    pub fn encode(&self) -> [Vec<u8>; SECTIONS] {
        let mut sections: [Vec<u8>; SECTIONS] = Default::default();
        let [runs, commits, lost, bitmaps, content, bare] = &mut sections;
        self.runs.iter().for_each(|run| put_run(runs, run));
        self.commits.iter().for_each(|commit| put_commit(commits, commit));
        self.lost.iter().for_each(|range| put_lost(lost, range));
        put_bitmaps(bitmaps, &self.bitmaps());
        self.content.values().for_each(|entry| put_entry(content, entry));
        self.bare.values().for_each(|entry| put_entry(bare, entry));
        sections
    }

    /// The same index as that of a sealed segment.
    #[must_use]
    pub fn into_sealed(self) -> (Summary, Tables) {
        let bitmaps = self.bitmaps();
        let tables = Tables { content: self.content.into_values().collect(), bare: self.bare.into_values().collect() };
        (Summary { runs: self.runs, commits: self.commits, lost: self.lost, bitmaps }, tables)
    }

    fn bitmaps(&self) -> BTreeMap<u16, RoaringBitmap> {
        let mut bitmaps: BTreeMap<u16, RoaringBitmap> = BTreeMap::new();
        for entry in self.content.values().chain(self.bare.values()) {
            let last = (entry.extent.end() - 1) as u32;
            bitmaps.entry(entry.slot.0).or_default().insert_range(entry.extent.start.0..=last);
        }
        bitmaps
    }
}

impl Tables {
    /// Parses the two sections of extents, whose hashes have been verified.
    ///
    /// # Errors
    /// Where an entry is impossible or out of order.
    pub fn decode(content: &[u8], bare: &[u8]) -> Result<Self, FieldError> {
        Ok(Self { content: take_entries(content, true)?, bare: take_entries(bare, false)? })
    }

    /// Bytes it takes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        (self.content.len() + self.bare.len()) * size_of::<Entry>()
    }

    /// All entries.
    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.content.iter().chain(&self.bare)
    }

    /// Entries that may touch `extent` of a volume.
    pub fn candidates(&self, slot: VolumeSlot, extent: Extent, out: &mut Vec<Entry>) {
        for (table, blocks_max) in [(&self.content, CONTENT_BLOCKS_MAX as u32), (&self.bare, HOLE_BLOCKS_MAX)] {
            let from = (slot.0, extent.start.0.saturating_sub(blocks_max - 1));
            let first = table.partition_point(|entry| (entry.slot.0, entry.extent.start.0) < from);
            let to = (slot.0, extent.end());
            let near = table[first..].iter().take_while(|entry| (entry.slot.0, u64::from(entry.extent.start.0)) < to);
            out.extend(near.filter(|entry| entry.extent.end() > u64::from(extent.start.0)));
        }
    }
}

impl Summary {
    /// Parses the sections but the extents; their hashes have been verified.
    ///
    /// # Errors
    /// Where a field is impossible.
    pub fn decode(runs: &[u8], commits: &[u8], lost: &[u8], bitmaps: &[u8]) -> Result<Self, FieldError> {
        let mut summary = Self { bitmaps: take_bitmaps(bitmaps)?, ..Self::default() };
        let mut input = Input::new(runs);
        while !input.is_empty() {
            summary.runs.push(take_run(&mut input)?);
        }
        let mut input = Input::new(commits);
        while !input.is_empty() {
            summary.commits.push(take_commit(&mut input)?);
        }
        let mut input = Input::new(lost);
        while !input.is_empty() {
            let (offset, len, run) = (input.u64()?, input.u64()?, input.u32()?);
            summary.lost.push(Lost { offset, len, run: (run != u32::MAX).then_some(run) });
        }
        Ok(summary)
    }

    /// Bytes it takes in memory, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let bitmaps: usize = self.bitmaps.values().map(RoaringBitmap::serialized_size).sum();
        let layouts =
            self.commits.iter().filter_map(|commit| commit.record.as_ref()).flat_map(|record| &record.layouts);
        let layouts: usize = layouts.map(|(_, layout)| layout.bytes()).sum();
        bitmaps + layouts + self.runs.len() * size_of::<Run>() + self.commits.len() * (size_of::<CommitEntry>() + 128)
    }

    /// Whether any frame here touches `extent` of a volume.
    #[must_use]
    pub fn touches(&self, slot: VolumeSlot, extent: Extent) -> bool {
        let last = (extent.end() - 1) as u32;
        self.bitmaps.get(&slot.0).is_some_and(|bitmap| bitmap.range_cardinality(extent.start.0..=last) > 0)
    }
}

fn put_entry(out: &mut Vec<u8>, entry: &Entry) {
    out.extend_from_slice(&entry.slot.0.to_le_bytes());
    out.extend_from_slice(&[entry.kind as u8, 0]);
    out.extend_from_slice(&entry.extent.start.0.to_le_bytes());
    out.extend_from_slice(&entry.extent.count.to_le_bytes());
    out.extend_from_slice(&entry.content_block.to_le_bytes());
    out.extend_from_slice(&entry.run.to_le_bytes());
    out.extend_from_slice(&entry.frame_len.to_le_bytes());
    out.extend_from_slice(&entry.frame_offset.to_le_bytes());
}

fn take_entries(bytes: &[u8], with_content: bool) -> Result<Vec<Entry>, FieldError> {
    let mut entries = Vec::with_capacity(bytes.len() / ENTRY_BYTES);
    let mut input = Input::new(bytes);
    while !input.is_empty() {
        let slot = VolumeSlot(input.u16()?);
        let kind = match input.u16()? {
            0 => EntryKind::Content,
            1 => EntryKind::Hole,
            2 => EntryKind::Unreadable,
            3 => EntryKind::Lost,
            _ => return Err(FieldError("entry kind")),
        };
        let extent = Extent::new(Block(input.u32()?), input.u32()?).ok_or(FieldError("entry extent"))?;
        let (content_block, run, frame_len, frame_offset) = (input.u32()?, input.u32()?, input.u32()?, input.u64()?);
        if (kind == EntryKind::Content) != with_content {
            return Err(FieldError("entry kind"));
        }
        entries.push(Entry { kind, slot, extent, content_block, run, frame_offset, frame_len });
    }
    Ok(entries)
}

fn put_run(out: &mut Vec<u8>, run: &Run) {
    out.extend_from_slice(&run.epoch.0.to_le_bytes());
    out.extend_from_slice(&run.generation.0.to_le_bytes());
    out.extend_from_slice(&run.attempt.0);
    out.extend_from_slice(&[run.end as u8, u8::from(run.continued)]);
    out.extend_from_slice(&run.bytes.to_le_bytes());
    out.extend_from_slice(&run.unreadable_blocks.to_le_bytes());
}

fn take_run(input: &mut Input<'_>) -> Result<Run, FieldError> {
    let (epoch, generation, attempt) = (Epoch(input.u64()?), Generation(input.u64()?), AttemptId(input.array()?));
    let end = match input.u8()? {
        0 => RunEnd::Open,
        1 => RunEnd::Part,
        2 => RunEnd::Commit,
        3 => RunEnd::Abandoned,
        _ => return Err(FieldError("run end")),
    };
    let (continued, bytes, unreadable_blocks) = (input.flag()?, input.u64()?, input.u64()?);
    Ok(Run { epoch, generation, attempt, end, continued, bytes, unreadable_blocks })
}

fn put_lost(out: &mut Vec<u8>, lost: &Lost) {
    out.extend_from_slice(&lost.offset.to_le_bytes());
    out.extend_from_slice(&lost.len.to_le_bytes());
    out.extend_from_slice(&lost.run.unwrap_or(u32::MAX).to_le_bytes());
}

pub(crate) fn put_commit(out: &mut Vec<u8>, commit: &CommitEntry) {
    out.extend_from_slice(&commit.head.epoch.0.to_le_bytes());
    out.extend_from_slice(&commit.head.hash.0);
    out.extend_from_slice(&commit.generation.0.to_le_bytes());
    out.extend_from_slice(&commit.attempt.0);
    out.extend_from_slice(&commit.offset.to_le_bytes());
    out.extend_from_slice(&commit.frame_len.to_le_bytes());
    out.extend_from_slice(&commit.received.0.to_le_bytes());
    let record = commit.record.as_ref().map(Commit::encode).unwrap_or_default();
    put_long(out, &record);
    put_volumes(out, &commit.volumes);
}

pub(crate) fn take_commit(input: &mut Input<'_>) -> Result<CommitEntry, FieldError> {
    let head = Head { epoch: Epoch(input.u64()?), hash: FrameHash(input.array()?) };
    let (generation, attempt) = (Generation(input.u64()?), AttemptId(input.array()?));
    let (offset, frame_len, received) = (input.u64()?, input.u32()?, Timestamp(input.i64()?));
    let mut record = input.long()?.to_vec();
    let record = if record.is_empty() {
        None
    } else {
        // A record is parsed with its keyed hash behind it; the index does not keep that.
        record.extend_from_slice(&[0; cdp_protocol::record::MAC_BYTES]);
        Some(Commit::decode(&record).map_err(|_| FieldError("commit record"))?.0)
    };
    Ok(CommitEntry { head, generation, attempt, offset, frame_len, received, record, volumes: input.volumes()? })
}

fn put_bitmaps(out: &mut Vec<u8>, bitmaps: &BTreeMap<u16, RoaringBitmap>) {
    for (slot, bitmap) in bitmaps {
        out.extend_from_slice(&slot.to_le_bytes());
        let mut bytes = Vec::with_capacity(bitmap.serialized_size());
        bitmap.serialize_into(&mut bytes).expect("a vector takes all bytes");
        put_long(out, &bytes);
    }
}

fn take_bitmaps(bytes: &[u8]) -> Result<BTreeMap<u16, RoaringBitmap>, FieldError> {
    let mut bitmaps = BTreeMap::new();
    let mut input = Input::new(bytes);
    while !input.is_empty() {
        let slot = input.u16()?;
        let bitmap = RoaringBitmap::deserialize_from(input.long()?).map_err(|_| FieldError("bitmap"))?;
        bitmaps.insert(slot, bitmap);
    }
    Ok(bitmaps)
}
