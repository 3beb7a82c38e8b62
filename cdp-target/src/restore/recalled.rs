//! A point as its own source asks it back: what is held of blocks, and their content, as frames.
//!
//! Invariant: a frame that is told was read again, whole, and found to be as it was written. Where the data key is to be had out of
//! escrow, content is opened and sealed anew, with the blocks that were asked for and no other, and digests are told one a block; else all
//! of it is told as it came. What cannot be read is said to be lost, never left out.

use crate::authority::Authority;
use crate::catalog::{Catalog, Group, points_of};
use crate::journal::file::FileId;
use crate::journal::index::{CommitEntry, Entry, EntryKind, Run};
use crate::journal::pieces::{Piece, PiecePlace};
use crate::journal::{GroupView, JournalError};
use crate::points::PointName;
use crate::receiver::PointReader;
use crate::restore::image::one_line;
use crate::restore::keyring::Keyring;
use crate::restore::point::{Content, LoadError, PointImage, with_frame};
use crate::store::{GroupPlace, Store};
use cdp_protocol::codec::{Draft, Sealer, open_digests};
use cdp_protocol::frame::{Encoding, Frame};
use cdp_protocol::holding::Held;
use cdp_protocol::limits::{CONTENT_BLOCKS_MAX, MESSAGE_EXTENTS_MAX};
use cdp_protocol::packer::{Packer, Packing};
use cdp_protocol::recall::{Answer, HOLDINGS_BYTES_MAX, OpenedPoint, PIECE_BYTES_MAX, Question, Told, named, reason};
use cdp_protocol::seal::Digest;
use cdp_protocol::units::{AttemptId, Block, Extent, Head, Sequence, Timestamp, VolumeSlot};
use cdp_seams::clock::SystemClock;
use cdp_seams::random::{SystemRandom, array};
use std::collections::VecDeque;
use std::sync::Arc;

/// Frames whose digests are kept: blocks of one frame are asked for again and again.
const KNOWN_MAX: usize = 64;

/// Tells what is held; `false` where nobody listens.
type Tell<'a> = dyn FnMut(Answer) -> bool + 'a;
/// Gives the newest view of the group.
type Newest = Box<dyn Fn() -> Arc<GroupView> + Send>;

/// A point that its source reads, once it is open.
pub(crate) struct RecalledPoint {
    store: Store,
    place: GroupPlace,
    newest: Newest,
    point: Option<OpenPoint>,
}

/// What is open: the view holds all files it goes by against pruning.
struct OpenPoint {
    view: Arc<GroupView>,
    commit: CommitEntry,
    keyed: Option<Keyed>,
    known: VecDeque<(FileId, u64, Arc<Known>)>,
}

/// With the data key.
struct Keyed {
    keys: Keyring,
    image: PointImage,
    sealer: Sealer,
    packer: Packer,
    next: u64,
}

/// What is known of a frame.
struct Known {
    extents: Vec<Extent>,
    held: Held,
    /// Where the key opens them.
    digests: Option<Vec<Digest>>,
}

impl RecalledPoint {
    pub(crate) const fn new(store: Store, place: GroupPlace, newest: Newest) -> Self {
        Self { store, place, newest, point: None }
    }

    /// The group's keys, out of escrow; none where it is not to be had: then nothing is opened here.
    fn keys(&self, view: &Arc<GroupView>) -> Option<Keyring> {
        let (storage, clock) = (Arc::clone(self.store.storage()), Arc::new(SystemClock::new()));
        let authority = Authority::open(storage, clock, Arc::new(SystemRandom), &self.store.authority_folder());
        let opened = authority.map_err(|error| one_line(&error)).and_then(|authority| {
            let group = Group::served(self.place, Arc::clone(view));
            Catalog::new(&self.store, authority).keys(&group).map_err(|error| one_line(&error))
        });
        opened.inspect_err(|why| tracing::info!(group = %self.place.group, why, "a point is read without its key")).ok()
    }
}

impl PointReader for RecalledPoint {
    fn open(&mut self, at: &str, now: Timestamp) -> Result<OpenedPoint, String> {
        let view = (self.newest)();
        let name = PointName::parse(at, now).map_err(|error| one_line(&error))?;
        let points = points_of(&view).map_err(|error| one_line(&error))?;
        let info = name.find(&points).map_err(|error| one_line(&error))?;
        let commit = view.listed(info.epoch).map_err(|error| one_line(&error))?;
        let commit = commit.filter(|commit| !commit.volumes.is_empty());
        let commit = commit.ok_or_else(|| format!("the commit of point {} is damaged", info.epoch))?;
        let keyed = self.keys(&view).map(|keys| Keyed::new(&view, &commit, keys)).transpose();
        let keyed = keyed.map_err(|error| one_line(&error))?;
        let opened = OpenedPoint {
            head: commit.head,
            cut_time: info.cut_time,
            class: info.class,
            label: info.label.clone(),
            volumes: commit.volumes.clone(),
            has_key: keyed.is_some(),
        };
        self.point = Some(OpenPoint { view, commit, keyed, known: VecDeque::new() });
        Ok(opened)
    }

    fn answer(&mut self, slot: VolumeSlot, question: &Question, tell: &mut Tell<'_>) -> Result<(), String> {
        let newest = (self.newest)();
        let point = self.point.as_mut().ok_or("no point is open")?;
        let extents = question.extents().ok_or("it names what are no blocks")?;
        let told = match question {
            Question::Changes { since } => changes(&newest, *since, slot, tell),
            Question::Holdings { .. } => point.holdings(slot, &extents, tell),
            Question::Content { .. } => point.content(slot, &extents, tell),
        };
        told.map_err(|error| one_line(&error))
    }
}

/// Of the newest view, whichever point is open: what was sent meanwhile counts too.
fn changes(newest: &GroupView, since: Head, slot: VolumeSlot, tell: &mut Tell<'_>) -> Result<(), JournalError> {
    let Some(changed) = newest.changes_since(since)? else {
        tell(Answer::ChangesUnknown);
        return Ok(());
    };
    let of_volume = changed.iter().filter(|(changed, _)| *changed == slot);
    for extents in of_volume.flat_map(|(_, extents)| extents.chunks(MESSAGE_EXTENTS_MAX)) {
        if !tell(Answer::Changed { extents: named(extents) }) {
            break;
        }
    }
    Ok(())
}

impl Keyed {
    fn new(view: &Arc<GroupView>, commit: &CommitEntry, keys: Keyring) -> Result<Self, JournalError> {
        let attempt = AttemptId(array(&SystemRandom));
        let (group, epoch, generation) = (view.identity().group, commit.head.epoch, commit.generation);
        let sealer = Sealer::new(group, epoch, generation, attempt, keys.present()).resealing();
        let image = view.image_of(commit.clone(), &keys)?;
        // What came packed with zstd is not to grow for being sealed anew.
        Ok(Self { keys, image, sealer, packer: Packer::new(Packing::zstd(3)), next: 0 })
    }

    fn seal(&mut self, slot: VolumeSlot, gathered: &mut Gathered, tell: &mut Tell<'_>) -> bool {
        let Gathered { extents, draft } = std::mem::take(gathered);
        if extents.is_empty() {
            return true;
        }
        let (sequence, blocks) = (Sequence(self.next), extents.clone());
        self.next += 1;
        let frame = self.sealer.content_of(&mut self.packer, slot, sequence, extents, draft);
        tell_frame(&blocks, &frame, tell)
    }

    /// Seals the content of these blocks anew, a frame at a time.
    fn content(&mut self, slot: VolumeSlot, extents: &[Extent], tell: &mut Tell<'_>) -> bool {
        let mut gathered = Gathered::default();
        for extent in extents {
            let mut at = u64::from(extent.start.0);
            while at < extent.end() {
                let room = CONTENT_BLOCKS_MAX - gathered.draft.content().len() / cdp_protocol::units::BLOCK_BYTES;
                let count = (extent.end() - at).min(room as u64) as u32;
                let wanted = Extent { start: Block(at as u32), count };
                let mut bare = Vec::new();
                let read = self.image.read_blocks(slot, wanted, &mut |run, content| {
                    at = run.end();
                    match content {
                        Content::Bytes(bytes) => gathered.push(run, bytes),
                        Content::Zero => bare.push((run, Encoding::Hole)),
                        Content::Unreadable => bare.push((run, Encoding::Unreadable)),
                    }
                });
                let lost = read.err().map(|error| {
                    at += 1;
                    lost(Block((at - 1) as u32), &one_line(&error))
                });
                let mut goes_on = lost.is_none_or(&mut *tell);
                for (run, encoding) in bare {
                    self.next += 1;
                    let frame = self.sealer.bare(encoding, slot, Sequence(self.next - 1), vec![run]);
                    goes_on = goes_on && tell_frame(&[run], &frame, tell);
                }
                if gathered.is_full() {
                    goes_on = goes_on && self.seal(slot, &mut gathered, tell);
                }
                if !goes_on {
                    return false;
                }
            }
        }
        self.seal(slot, &mut gathered, tell)
    }
}

/// Content of a frame to be.
#[derive(Default)]
struct Gathered {
    extents: Vec<Extent>,
    draft: Draft,
}

impl Gathered {
    fn push(&mut self, run: Extent, bytes: &[u8]) {
        self.draft.push(bytes);
        match self.extents.last_mut() {
            Some(last) if last.end() == u64::from(run.start.0) => last.count += run.count,
            _ => self.extents.push(run),
        }
    }

    fn is_full(&self) -> bool {
        self.draft.content().len() >= cdp_protocol::limits::CONTENT_BYTES_MAX
    }
}

impl OpenPoint {
    /// Tells how these blocks are held, in their order.
    fn holdings(&mut self, slot: VolumeSlot, extents: &[Extent], tell: &mut Tell<'_>) -> Result<(), JournalError> {
        let (mut runs, mut bytes) = (Vec::new(), 0);
        for extent in extents {
            for piece in self.pieces(slot, *extent)? {
                let told = self.told(&piece)?;
                bytes += told.bytes();
                push(&mut runs, told);
                if bytes >= HOLDINGS_BYTES_MAX {
                    bytes = 0;
                    if !tell(Answer::Holdings { runs: std::mem::take(&mut runs) }) {
                        return Ok(());
                    }
                }
            }
        }
        if !runs.is_empty() {
            tell(Answer::Holdings { runs });
        }
        Ok(())
    }

    /// Where these blocks are; what a checkpoint has that turns out to be damaged is looked for in what it was made from.
    fn pieces(&mut self, slot: VolumeSlot, extent: Extent) -> Result<Vec<Piece>, JournalError> {
        let mut pieces = Vec::new();
        for piece in self.view.resolve(&self.commit, slot, extent)? {
            let is_bad = match &piece.place {
                PiecePlace::Frame { file: file @ FileId::Slice(slice), entry, run } => {
                    let is_bad = self.known(*file, entry, run)?.held == Held::Damaged && entry.kind != EntryKind::Lost;
                    is_bad.then_some(*slice)
                }
                _ => None,
            };
            match is_bad {
                Some(slice) => {
                    self.view.shelf().caches.note_bad(slice);
                    pieces.extend(self.view.resolve(&self.commit, slot, piece.extent)?);
                }
                None => pieces.push(piece),
            }
        }
        Ok(pieces)
    }

    fn told(&mut self, piece: &Piece) -> Result<Told, JournalError> {
        let count = piece.extent.count;
        let PiecePlace::Frame { file, entry, run } = &piece.place else {
            let held = match &piece.place {
                PiecePlace::Zero => Held::Hole,
                PiecePlace::NotCovered => Held::Nothing,
                _ => Held::Damaged,
            };
            return Ok(Told::Run(count, held));
        };
        let known = self.known(*file, entry, run)?;
        let digests = known.digests.as_ref().and_then(|digests| of_blocks(&known.extents, digests, piece.extent));
        Ok(digests.map_or_else(|| Told::Run(count, known.held.clone()), |digests| Told::Digests(digests.to_vec())))
    }

    /// What a frame holds, read again.
    fn known(&mut self, file: FileId, entry: &Entry, run: &Run) -> Result<Arc<Known>, JournalError> {
        let place = (file, entry.frame_offset);
        if let Some((.., known)) = self.known.iter().find(|(file, offset, _)| (*file, *offset) == place) {
            return Ok(Arc::clone(known));
        }
        let keys = self.keyed.as_ref().map(|keyed| &keyed.keys);
        let read = with_frame(&self.view, file, entry, run, |frame| Ok(known(&frame, keys)));
        let known = Arc::new(match read {
            Ok(known) => known,
            Err(LoadError::Damaged(_)) => Known { extents: Vec::new(), held: Held::Damaged, digests: None },
            Err(LoadError::Journal(error)) => return Err(error),
        });
        if self.known.len() >= KNOWN_MAX {
            self.known.pop_front();
        }
        self.known.push_back((place.0, place.1, Arc::clone(&known)));
        Ok(known)
    }

    fn content(&mut self, slot: VolumeSlot, extents: &[Extent], tell: &mut Tell<'_>) -> Result<(), JournalError> {
        if let Some(keyed) = &mut self.keyed {
            keyed.content(slot, extents, tell);
            return Ok(());
        }
        // Each frame once, whichever of its blocks are asked for.
        let mut frames: Vec<(FileId, Entry, Run, Vec<Extent>)> = Vec::new();
        for extent in extents {
            for piece in self.pieces(slot, *extent)? {
                match piece.place {
                    PiecePlace::Frame { file, entry, run } => {
                        let same = |(of, other, ..): &&mut (FileId, Entry, Run, Vec<Extent>)| {
                            (*of, other.frame_offset) == (file, entry.frame_offset)
                        };
                        match frames.iter_mut().rev().find(same) {
                            Some((.., blocks)) => blocks.push(piece.extent),
                            None => frames.push((file, entry, run, vec![piece.extent])),
                        }
                    }
                    PiecePlace::Zero | PiecePlace::NotCovered => {
                        if !tell(lost_all(piece.extent, "the point has no content of them")) {
                            return Ok(());
                        }
                    }
                    PiecePlace::Damaged(what) => {
                        if !tell(lost_all(piece.extent, &what)) {
                            return Ok(());
                        }
                    }
                }
            }
        }
        for (file, entry, run, blocks) in frames {
            let goes_on = match with_frame(&self.view, file, &entry, &run, |frame| Ok(frame.bytes.to_vec())) {
                Ok(frame) => tell_frame(&blocks, &frame, tell),
                Err(LoadError::Damaged(what)) => {
                    let what = format!("{file} at offset {}: {what}", entry.frame_offset);
                    blocks.iter().all(|blocks| tell(lost_all(*blocks, &what)))
                }
                Err(LoadError::Journal(error)) => return Err(error),
            };
            if !goes_on {
                break;
            }
        }
        Ok(())
    }
}

fn known(frame: &Frame<'_>, keys: Option<&Keyring>) -> Known {
    let attempt = &frame.header.attempt;
    let digests = keys.filter(|_| frame.header.encoding.has_content());
    let digests = digests.and_then(|keys| keys.find(|key| open_digests(frame, &key.attempt_key(attempt)).ok()));
    Known { extents: frame.header.extents.clone(), held: Held::of(frame), digests }
}

/// What belongs to blocks that lie within one of the extents.
fn of_blocks<'a, T>(extents: &[Extent], all: &'a [T], wanted: Extent) -> Option<&'a [T]> {
    let mut before = 0;
    for extent in extents {
        if extent.start <= wanted.start && wanted.end() <= extent.end() {
            let from = before + (wanted.start.0 - extent.start.0) as usize;
            return all.get(from..from + wanted.count as usize);
        }
        before += extent.count as usize;
    }
    None
}

/// Adds what is told of the next blocks; the same of one run more is one run.
fn push(runs: &mut Vec<Told>, told: Told) {
    match (runs.last_mut(), told) {
        (Some(Told::Digests(last)), Told::Digests(digests)) => last.extend(digests),
        (Some(Told::Run(count, Held::Hole)), Told::Run(more, Held::Hole)) => *count += more,
        (_, told) => runs.push(told),
    }
}

fn lost(block: Block, why: &str) -> Answer {
    Answer::Lost { start: block, count: 1, reason: reason(why) }
}

fn lost_all(blocks: Extent, why: &str) -> Answer {
    Answer::Lost { start: blocks.start, count: blocks.count, reason: reason(why) }
}

/// Tells a frame, in as many pieces as it takes.
fn tell_frame(blocks: &[Extent], frame: &[u8], tell: &mut Tell<'_>) -> bool {
    let mut blocks = named(blocks);
    let pieces = frame.len().div_ceil(PIECE_BYTES_MAX);
    frame.chunks(PIECE_BYTES_MAX).enumerate().all(|(at, piece)| {
        let blocks = std::mem::take(&mut blocks);
        tell(Answer::Frame { blocks, bytes: piece.to_vec(), more: at + 1 < pieces })
    })
}
