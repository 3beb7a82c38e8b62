//! A point as its own source asks it back: what is held of blocks, and their content, as frames.
//!
//! Invariant: a frame that is told was read again, whole, and found to be as it was written. Where the data key is to be had out of
//! escrow, content is opened and sealed anew, with the blocks that were asked for and no other, and digests are told one a block; else all
//! of it is told as it came. What cannot be read is said to be lost, never left out.

mod keyed;

use crate::journal::file::FileId;
use crate::journal::index::{CommitEntry, Entry, EntryKind, Run};
use crate::journal::pieces::{Piece, PiecePlace};
use crate::journal::{GroupView, JournalError, Point};
use crate::restore::keyring::Keyring;
use crate::restore::point::{LoadError, with_frame};
use cdp_protocol::codec::open_digests;
use cdp_protocol::frame::Frame;
use cdp_protocol::holding::Held;
use cdp_protocol::limits::MESSAGE_EXTENTS_MAX;
use cdp_protocol::message::PointSummary;
use cdp_protocol::recall::{Answer, HOLDINGS_BYTES_MAX, PIECE_BYTES_MAX, Question, Told, named, reason};
use cdp_protocol::record::Volume;
use cdp_protocol::seal::Digest;
use cdp_protocol::units::{Block, Epoch, Extent, Head, VolumeSlot};
use cdp_seams::random::Random;
use keyed::Keyed;
use std::collections::VecDeque;
use std::sync::Arc;

/// Points that are told in one message: of at most 200 bytes each.
const POINTS_TOLD: usize = 200;
/// Frames whose digests are kept: blocks of one frame are asked for again and again.
const KNOWN_MAX: usize = 64;

/// Takes a piece of an answer; `false` where nobody listens.
pub type Tell<'a> = dyn FnMut(Answer) -> bool + 'a;
/// A point that its source reads. The view holds all files it goes by against pruning.
pub struct Recalled {
    view: Arc<GroupView>,
    commit: CommitEntry,
    keyed: Option<Keyed>,
    known: VecDeque<(FileId, u64, Arc<Known>)>,
}

/// What is known of a frame.
struct Known {
    extents: Vec<Extent>,
    held: Held,
    /// Where the key opens them.
    digests: Option<Vec<Digest>>,
}

/// All points there are by now, in as many messages as it takes.
fn points(newest: &GroupView, tell: &mut Tell<'_>) -> Result<(), JournalError> {
    let mut after = Epoch(0);
    loop {
        let page: Vec<PointSummary> =
            newest.points_after(after, POINTS_TOLD)?.into_iter().map(Point::summary).collect();
        let Some(last) = page.last() else { return Ok(()) };
        after = last.epoch;
        if !tell(Answer::Points { points: page }) {
            return Ok(());
        }
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

impl Recalled {
    /// Opens point `epoch`, with the group's keys where they are to be had.
    ///
    /// # Errors
    /// Where there is no such point, its list of volumes is damaged, or a segment cannot be read.
    pub fn new(
        view: Arc<GroupView>,
        epoch: Epoch,
        keys: Option<Keyring>,
        random: &dyn Random,
    ) -> Result<Self, JournalError> {
        let commit = view.listed(epoch)?.ok_or(JournalError::NoPoint(epoch))?;
        let keyed = keys.map(|keys| Keyed::new(&view, &commit, keys, random)).transpose()?;
        Ok(Self { view, commit, keyed, known: VecDeque::new() })
    }

    /// The point.
    #[must_use]
    pub const fn head(&self) -> Head {
        self.commit.head
    }

    /// Its volumes.
    #[must_use]
    pub fn volumes(&self) -> &[Volume] {
        &self.commit.volumes
    }

    /// Whether content is sealed anew.
    #[must_use]
    pub const fn has_key(&self) -> bool {
        self.keyed.is_some()
    }

    /// Answers a question about a volume of the point, but for the end of the answer. `newest` is what is known of the group by now.
    ///
    /// # Errors
    /// Where the history cannot be read: the answer is not whole.
    pub fn answer(
        &mut self,
        newest: &GroupView,
        slot: VolumeSlot,
        question: &Question,
        tell: &mut Tell<'_>,
    ) -> Result<(), JournalError> {
        let extents = question.extents().unwrap_or_default();
        match question {
            Question::Points => points(newest, tell),
            Question::Changes { since } => changes(newest, *since, slot, tell),
            Question::Holdings { .. } => self.holdings(slot, &extents, tell),
            Question::Content { .. } => self.content(slot, &extents, tell),
            Question::Key => {
                if let Some(keyed) = &self.keyed {
                    tell(Answer::Key { key: keyed.keys.present().into() });
                }
                Ok(())
            }
        }
    }

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
