//! The files that take the place of a chunk of segments: what is needed of it, and no more.
//!
//! Invariant: what began an attempt comes before its frames, a point's commit after all of them; the files are read once more before
//! anything goes by them, and durable with their names then.

use super::{Blocks, Chunk, Prune};
use crate::checkpoint::builder::Step;
use crate::checkpoint::repack::{Repack, parts};
use crate::journal::file::FileId;
use crate::journal::index::CommitEntry;
use crate::journal::manifest::SealedSegment;
use crate::journal::pack::PackWriter;
use crate::journal::walk::{Blind, Visit};
use crate::journal::{Damage, GroupView, JournalError, extents, is_no_file, synced_frame};
use crate::restore::image::one_line;
use crate::restore::keyring::Keyring;
use cdp_protocol::frame::{self, FRAME_BYTES_MAX, Frame, Kind};
use cdp_protocol::record::Synced;
use cdp_protocol::units::{AttemptId, Epoch, VolumeSlot};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// The records that begin the attempts of points that stay: those of the others are far more.
struct Begins {
    of: HashSet<AttemptId>,
    frames: HashMap<AttemptId, Vec<u8>>,
}

impl Begins {
    fn of(view: &GroupView, chunk: &Chunk) -> Result<Self, JournalError> {
        let mut of = HashSet::new();
        for sealed in &chunk.segments {
            let index = view.index(sealed.number)?;
            let stays = index.commits().iter().filter(|commit| !view.is_removed(commit.head.epoch));
            of.extend(stays.map(|commit| commit.attempt));
        }
        Ok(Self { of, frames: HashMap::new() })
    }
}

impl Visit for Begins {
    fn frame(&mut self, frame: &Frame<'_>, _offset: u64) {
        if frame.header.kind == Kind::Begin && self.of.contains(&frame.header.attempt) {
            self.frames.insert(frame.header.attempt, frame.bytes.to_vec());
        }
    }
}

/// Writes what is needed of a chunk; gives the segments that take its place, durable with their names.
pub(super) fn write(
    prune: &Prune<'_>,
    view: &Arc<GroupView>,
    chunk: &Chunk,
    step: &mut Step<'_>,
) -> Result<Vec<SealedSegment>, JournalError> {
    let mut begins = Begins::of(view, chunk)?;
    for sealed in chunk.segments.iter().rev() {
        let walked = view.walk(sealed.number, &mut begins).map_err(|error| not_read(error, sealed.number))?;
        let healed = |damage: &&Damage| prune.keys.is_some() && view.repair_of(damage).is_some();
        if let Some(damage) = walked.damages.iter().find(|damage| !healed(damage)) {
            return Err(JournalError::Damaged(format!(
                "segment {} at offset {}: {}",
                sealed.number, damage.offset, damage.what
            )));
        }
        if !step(walked.bytes) {
            return Err(JournalError::Interrupted);
        }
    }
    let mut output = Output::new(prune, view, chunk, begins.frames);
    match prune.keys {
        Some(keys) => output.repacked(keys, step)?,
        None => output.whole(step)?,
    }
    output.finish()
}

/// What cannot be read of a segment that is to give way is its own affair: the others may.
fn not_read(error: JournalError, segment: u64) -> JournalError {
    match error {
        JournalError::Io { .. } => JournalError::NotRead(format!("segment {segment} ({})", one_line(&error))),
        error => error,
    }
}

/// The files that take a chunk's place.
struct Output<'a> {
    prune: &'a Prune<'a>,
    view: &'a Arc<GroupView>,
    chunk: &'a Chunk,
    /// What began the attempts of the points that stay.
    begins: HashMap<AttemptId, Vec<u8>>,
    numbers: Vec<u64>,
    writer: Option<PackWriter<'a>>,
    done: Vec<SealedSegment>,
}

impl<'a> Output<'a> {
    fn new(
        prune: &'a Prune<'a>,
        view: &'a Arc<GroupView>,
        chunk: &'a Chunk,
        begins: HashMap<AttemptId, Vec<u8>>,
    ) -> Self {
        let numbers = chunk.segments.iter().map(|sealed| sealed.number).collect();
        Self { prune, view, chunk, begins, numbers, writer: None, done: Vec::new() }
    }

    /// Sections sealed anew, each before its point. One segment's commits are held at a time: a chunk may have 150,000.
    fn repacked(&mut self, keys: &Keyring, step: &mut Step<'_>) -> Result<(), JournalError> {
        let (view, chunk) = (self.view, self.chunk);
        let mut sections = chunk.sections.clone();
        let mut last = Epoch(0);
        for sealed in chunk.segments.iter().rev() {
            for commit in view.index(sealed.number)?.commits() {
                last = commit.head.epoch;
                if let Some(section) = sections.remove(&last) {
                    self.section(keys, commit, &section, step)?;
                }
                self.commit(sealed.number, commit)?;
            }
        }
        // What belongs to a point behind the chunk.
        assert!(
            sections.keys().all(|point| *point > last),
            "content of an older point does not stand behind a newer one's"
        );
        for (point, section) in sections {
            let commit = self.view.commit(point)?.ok_or(JournalError::NoPoint(point))?;
            self.section(keys, &commit, &section, step)?;
        }
        Ok(())
    }

    fn section(
        &mut self,
        keys: &Keyring,
        commit: &CommitEntry,
        section: &Blocks,
        step: &mut Step<'_>,
    ) -> Result<(), JournalError> {
        let image = self.view.image_of(commit.clone(), keys)?;
        let mut repack = Repack::new(self.view, keys, self.prune.random, commit.head.epoch, commit.generation);
        let mut frames = Vec::new();
        for (slot, blocks) in section {
            for extent in extents(blocks).flat_map(parts) {
                repack.read(&image, VolumeSlot(*slot), extent, step)?;
                if repack.lost_blocks() > 0 {
                    // Nothing comes of it.
                    let point = commit.head.epoch;
                    return Err(JournalError::Damaged(format!(
                        "blocks of point {point} in {extent:?} of volume {slot}"
                    )));
                }
                frames.extend(repack.drain());
                for frame in frames.drain(..) {
                    self.push(&frame)?;
                }
            }
        }
        repack.flush();
        frames.extend(repack.drain());
        frames.iter().try_for_each(|frame| self.push(frame))
    }

    /// Frames taken over whole, in the order they stand in.
    fn whole(&mut self, step: &mut Step<'_>) -> Result<(), JournalError> {
        let (view, chunk) = (self.view, self.chunk);
        let mut frames = chunk.frames.iter().peekable();
        for sealed in chunk.segments.iter().rev() {
            for commit in view.index(sealed.number)?.commits() {
                let is_before = |(place, _): &(&(u64, u64), &u32)| **place < (sealed.number, commit.offset);
                while let Some(((of, at), len)) = frames.next_if(is_before) {
                    self.copy(*of, *at, *len, step)?;
                }
                self.commit(sealed.number, commit)?;
            }
        }
        for ((of, at), len) in frames {
            self.copy(*of, *at, *len, step)?;
        }
        Ok(())
    }

    fn copy(&mut self, number: u64, offset: u64, len: u32, step: &mut Step<'_>) -> Result<(), JournalError> {
        let bytes = self.frame(number, offset, len)?;
        if !step(u64::from(len)) {
            return Err(JournalError::Interrupted);
        }
        self.push(&bytes)
    }

    /// A commit with its receive time, and with what began it where the point stays.
    fn commit(&mut self, number: u64, commit: &CommitEntry) -> Result<(), JournalError> {
        let mut frames = Vec::new();
        if !self.view.is_removed(commit.head.epoch) {
            let begin = self.begins.get(&commit.attempt).cloned();
            frames.push(
                begin.ok_or_else(|| JournalError::Damaged(format!("the volumes of point {}", commit.head.epoch)))?,
            );
        }
        let record = Synced { segment: number, offset: 0, head: None, time: commit.received };
        frames.push(synced_frame(&self.view.identity().group, commit.generation, &record));
        frames.push(self.frame(number, commit.offset, commit.frame_len)?);
        // In one file: what stands before a commit is told to it.
        let frames: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
        self.push_all(&frames)
    }

    /// The bytes of a frame of the chunk, whole.
    fn frame(&self, number: u64, offset: u64, len: u32) -> Result<Vec<u8>, JournalError> {
        let file = self.view.file_id(number);
        let mut bytes = vec![0; (len as usize).min(FRAME_BYTES_MAX)];
        let path = file.path(self.view.place().1);
        let read = self.view.file(file)?.read_at(&mut bytes, offset).map_err(JournalError::io("read", &path));
        let read = read.map_err(|error| not_read(error, number))?;
        let decoded = frame::decode(&self.view.identity().group, &bytes[..read]).map(|frame| frame.bytes.len());
        match decoded {
            Ok(len) => {
                bytes.truncate(len);
                Ok(bytes)
            }
            Err(error) => Err(JournalError::Damaged(format!("{file} at offset {offset}: {error}"))),
        }
    }

    fn push(&mut self, frame: &[u8]) -> Result<(), JournalError> {
        self.push_all(&[frame])
    }

    /// Frames that belong into one file.
    fn push_all(&mut self, frames: &[&[u8]]) -> Result<(), JournalError> {
        let bytes: u64 = frames.iter().map(|frame| frame.len() as u64).sum();
        let full = |writer: &PackWriter<'_>| writer.bytes() + bytes > self.prune.segment_bytes_max;
        if self.writer.as_ref().is_some_and(full) && !self.numbers.is_empty() {
            self.close()?;
        }
        let writer = match &mut self.writer {
            Some(writer) => writer,
            none => {
                let number = self.numbers.pop().expect("there are no more new files than old ones");
                let id = free_name(self.view, number)?;
                let (storage, folder) = self.view.place();
                none.insert(PackWriter::create(storage.as_ref(), folder, self.view.identity().group, id)?)
            }
        };
        frames.iter().try_for_each(|frame| writer.push(frame))
    }

    fn close(&mut self) -> Result<(), JournalError> {
        let Some(writer) = self.writer.take() else { return Ok(()) };
        let written = writer.finish(self.prune.keys.is_some())?;
        let FileId::Segment { number, revision } = written.sealed.id else { unreachable!("it was made as a segment") };
        self.done.push(SealedSegment {
            number,
            revision,
            len: written.sealed.len,
            frames_end: written.sealed.frames_end,
            footer_hash: written.sealed.footer_hash,
            points: written.sealed.points,
            newest_run: written.index.newest_run(),
        });
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<SealedSegment>, JournalError> {
        self.close()?;
        let (storage, folder) = self.view.place();
        // They are to stand for the others: read once more, before anybody goes by them.
        for sealed in &self.done {
            let walked = self.view.shelf().walk(&sealed.sealed(), &mut Blind)?;
            if let Some(damage) = walked.damages.first() {
                return Err(JournalError::Damaged(format!("{} just written: {}", sealed.id(), damage.what)));
            }
        }
        let journal = folder.join("journal");
        storage.sync_dir(&journal).map_err(JournalError::io("sync folder", &journal))?;
        Ok(self.done)
    }
}

/// A name that no file has. What a rewriting left behind that was given up may have its place in the manifest yet, where the group's
/// writer was only late: such a file stays what it is.
fn free_name(view: &GroupView, number: u64) -> Result<FileId, JournalError> {
    let (storage, folder) = view.place();
    let mut revision = view.manifest().change + 1;
    loop {
        let id = FileId::Segment { number, revision };
        let path = id.path(folder);
        match storage.open(&path) {
            Err(error) if is_no_file(&error) => {
                // One that was swept away may have had it.
                view.shelf().caches.forget(id);
                return Ok(id);
            }
            opened => drop(opened.map_err(JournalError::io("look at", &path))?),
        }
        revision += 1;
    }
}
