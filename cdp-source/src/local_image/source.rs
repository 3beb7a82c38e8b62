//! A local image as what a restore asks: the same questions, answered from a file instead of over the line.
//!
//! A frame, or a piece of the index, that is damaged or that the disk cannot read is told as lost, block by block, with the reason. What is told is opened with the group's key by whoever asked, as what comes over the line is.

use super::ImageError;
use super::format::Place;
use super::reader::ImageFile;
use crate::restore::line::{LineError, PointSource};
use cdp_protocol::holding::Held;
use cdp_protocol::recall::{Answer, OpenedPoint, Question, Told, reason};
use cdp_protocol::units::{Block, Extent, FrameHash, Head, VolumeSlot};
use std::collections::{BTreeMap, VecDeque};

/// An image that is asked.
pub struct ImagePoint {
    image: ImageFile,
    point: OpenedPoint,
    asked: VecDeque<(VolumeSlot, Question)>,
    answering: Option<Answering>,
    /// The frame that was told of last: blocks of one come one after the other.
    told: Option<(VolumeSlot, u64, Held)>,
}

/// What is left of an answer.
struct Answering {
    slot: VolumeSlot,
    left: VecDeque<Piece>,
}

enum Piece {
    Holding(Extent, Result<Place, String>),
    Frame(u64, Vec<Extent>),
    Answer(Answer),
}

impl ImagePoint {
    /// Asks this image.
    #[must_use]
    pub fn new(image: ImageFile) -> Self {
        let footer = image.footer();
        let point = OpenedPoint {
            head: Head { epoch: footer.epoch, hash: FrameHash([0; 32]) },
            cut_time: footer.cut_time,
            class: footer.class,
            label: footer.label.clone(),
            volumes: footer.volumes.iter().map(|entry| entry.volume.clone()).collect(),
            has_key: false,
        };
        Self { image, point, asked: VecDeque::new(), answering: None, told: None }
    }

    fn begin(&mut self, slot: VolumeSlot, question: &Question) -> Answering {
        let left = match question {
            // It has one point, and knows nothing of what came after; its key is whoever's who reads it.
            Question::Points | Question::Key => VecDeque::new(),
            Question::Changes { .. } => VecDeque::from([Piece::Answer(Answer::ChangesUnknown)]),
            Question::Holdings { .. } => {
                let places = self.places(slot, question);
                places.into_iter().map(|(extent, place)| Piece::Holding(extent, place)).collect()
            }
            Question::Content { .. } => by_frame(self.places(slot, question)),
        };
        Answering { slot, left }
    }

    /// Where the blocks are, or why that cannot be told: damage of the index is told like that of a frame.
    fn places(&mut self, slot: VolumeSlot, question: &Question) -> Vec<(Extent, Result<Place, String>)> {
        let mut all = Vec::new();
        for extent in question.extents().unwrap_or_default() {
            match self.image.places(slot, extent) {
                Ok(places) => all.extend(places.into_iter().map(|(extent, place)| (extent, Ok(place)))),
                Err(error) => all.push((extent, Err(told(error)))),
            }
        }
        all
    }

    fn answer(&mut self, slot: VolumeSlot, piece: Piece) -> Answer {
        match piece {
            Piece::Answer(answer) => answer,
            Piece::Holding(extent, place) => {
                let held = match place {
                    Ok(Place::Zeros) => Held::Hole,
                    Ok(Place::Unreadable) => Held::Unreadable,
                    Ok(Place::Frame(at)) => self.held(slot, at),
                    Err(_) => Held::Damaged,
                };
                Answer::Holdings { runs: vec![Told::Run(extent.count, held)] }
            }
            Piece::Frame(at, extents) => match self.image.frame(slot, at) {
                Ok(bytes) => {
                    let blocks = extents.iter().map(|extent| (extent.start, extent.count)).collect();
                    Answer::Frame { blocks, bytes, more: false }
                }
                Err(error) => {
                    let reason = told(error);
                    if let [first, rest @ ..] = extents.as_slice() {
                        self.lose_rest(rest, &reason);
                        lost(*first, &reason)
                    } else {
                        Answer::Done
                    }
                }
            },
        }
    }

    /// The other extents of a frame that cannot be had, each told by itself.
    fn lose_rest(&mut self, extents: &[Extent], reason: &str) {
        let Some(answering) = &mut self.answering else { return };
        for extent in extents.iter().rev() {
            answering.left.push_front(Piece::Answer(lost(*extent, reason)));
        }
    }

    fn held(&mut self, slot: VolumeSlot, at: u64) -> Held {
        if let Some((of, place, held)) = &self.told
            && (*of, *place) == (slot, at)
        {
            return held.clone();
        }
        let held = self.image.held(slot, at).unwrap_or_else(|error| {
            tracing::warn!(
                error = format!("{:#}", anyhow::Error::new(error)),
                "a frame of the local image cannot be read"
            );
            Held::Damaged
        });
        self.told = Some((slot, at, held.clone()));
        held
    }
}

/// A frame once, with all that is wanted of it, in the frames' order: the disk reads forward.
fn by_frame(places: Vec<(Extent, Result<Place, String>)>) -> VecDeque<Piece> {
    let (mut frames, mut left) = (BTreeMap::<u64, Vec<Extent>>::new(), VecDeque::new());
    for (extent, place) in places {
        match place {
            Ok(Place::Frame(at)) => frames.entry(at).or_default().push(extent),
            Err(reason) => left.push_back(Piece::Answer(lost(extent, &reason))),
            Ok(Place::Zeros) => left.push_back(Piece::Answer(lost(extent, "the image has them as zeros"))),
            Ok(Place::Unreadable) => {
                left.push_back(Piece::Answer(lost(extent, "the device could not read them when the image was made")));
            }
        }
    }
    left.extend(frames.into_iter().map(|(at, extents)| Piece::Frame(at, extents)));
    left
}

fn told(error: ImageError) -> String {
    reason(&format!("{:#}", anyhow::Error::new(error)))
}

fn lost(extent: Extent, reason: &str) -> Answer {
    let Extent { start: Block(start), count } = extent;
    Answer::Lost { start: Block(start), count, reason: reason.to_owned() }
}

impl PointSource for ImagePoint {
    fn point(&self) -> &OpenedPoint {
        &self.point
    }

    fn received_bytes(&self) -> u64 {
        self.image.read_bytes()
    }

    fn may_ask(&self) -> bool {
        self.asked.is_empty()
    }

    fn ask(&mut self, volume: VolumeSlot, question: Question) -> Result<(), LineError> {
        self.asked.push_back((volume, question));
        Ok(())
    }

    fn next_piece(&mut self) -> Result<Option<Answer>, LineError> {
        if self.answering.is_none() {
            let (slot, question) = self.asked.pop_front().ok_or(LineError::Answer("nothing was asked"))?;
            self.answering = Some(self.begin(slot, &question));
        }
        let next = self.answering.as_mut().and_then(|answering| Some((answering.slot, answering.left.pop_front()?)));
        let Some((slot, piece)) = next else {
            self.answering = None;
            return Ok(None);
        };
        Ok(Some(self.answer(slot, piece)))
    }
}
