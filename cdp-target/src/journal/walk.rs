//! Walks a segment frame by frame: what is in it, where the chain stands behind it, what is damaged.
//!
//! Owns the reading over damage: what can be told of a frame that is gone from its header, from its payload, from the
//! frames around it and from the proofs behind it. Shared by recovery, readers and `verify`; never writes. Whether
//! bytes at the end are a torn tail or rot is decided by one number: the offset proven durable.

use super::file::FileId;
use super::index::{CommitEntry, Lost, OpenIndex, RunEnd};
use super::manifest::Damage;
use super::scan::{Found, FrameScan};
use super::segment::Place;
use cdp_protocol::frame::{self, FIXED_BYTES, Frame, Header, Kind};
use cdp_protocol::record::{Begin, Commit, PartChain, PartEnd, Synced, Volume};
use cdp_protocol::session::chain::{Chain, Step};
use cdp_protocol::units::{AttemptId, Epoch, FrameHash, GroupId, Head, Sequence, Timestamp};
use cdp_seams::storage::StorageFile;
use std::io;

/// A hash nobody could name.
const UNNAMED: FrameHash = FrameHash([0; 32]);
/// Bytes before the payload of a record frame.
const RECORD_HEADER_BYTES: usize = FIXED_BYTES + 4;

/// What a walk found.
pub(crate) struct Walked {
    /// The index of what is there.
    pub(crate) index: OpenIndex,
    /// Where the chain stands behind it.
    pub(crate) place: Place,
    /// Where the frames end: the file's end, an index, or a torn tail.
    pub(crate) end: u64,
    /// Everything before this offset was durable.
    pub(crate) proven: u64,
    /// Where the last frame of a source ends: what follows are synced records.
    pub(crate) source_end: u64,
    /// Damage before the proven offset.
    pub(crate) damages: Vec<Damage>,
    /// The target's clock at the last synced record.
    pub(crate) time: Timestamp,
}

/// Is shown every valid frame of a walk.
pub(crate) trait Visit {
    /// A valid frame.
    fn frame(&mut self, frame: &Frame<'_>, offset: u64);
}

/// Looks at nothing.
pub(crate) struct Blind;

impl Visit for Blind {
    fn frame(&mut self, _frame: &Frame<'_>, _offset: u64) {}
}

struct Walk<'a> {
    visitor: &'a mut dyn Visit,
    scan: FrameScan<'a>,
    group: GroupId,
    segment: u64,
    out: Walked,
    /// Damage was met, or the start is unknown: frames are followed over gaps.
    lenient: bool,
    proof_sought: bool,
    /// A gap nothing is known of yet: the damage and the lost range that the next frame may explain.
    gap: Option<(usize, usize)>,
    /// The attempt that was open before the present one.
    replaced: Option<(AttemptId, Vec<Volume>)>,
}

/// Walks the frames of segment `number` in `file` from `start` up to `end`, showing every valid frame to `visitor`. `place`: where the chain stands
/// at `start`; `None` where that is damaged. `proven`: offset known to be durable already, the frames' end in a sealed segment, 0 in an open one.
#[expect(clippy::too_many_arguments, reason = "a place in a file, named at each call")]
pub(crate) fn walk(
    file: &dyn StorageFile,
    end: u64,
    group: GroupId,
    number: u64,
    start: u64,
    place: Option<Place>,
    proven: u64,
    visitor: &mut dyn Visit,
) -> io::Result<Walked> {
    let lenient = place.is_none();
    let out = Walked {
        index: OpenIndex::default(),
        place: place.unwrap_or_default(),
        end: start,
        proven,
        source_end: start,
        damages: Vec::new(),
        time: Timestamp(0),
    };
    let walk = Walk {
        visitor,
        scan: FrameScan::new(file, group, end),
        group,
        segment: number,
        out,
        lenient,
        proof_sought: false,
        gap: None,
        replaced: None,
    };
    walk.run()
}

impl Walk<'_> {
    fn run(mut self) -> io::Result<Walked> {
        loop {
            let offset = self.out.end;
            match self.scan.at(offset)? {
                Found::End => break,
                Found::Frame(bytes) => {
                    let bytes = bytes.to_vec();
                    let frame = frame::decode(&self.group, &bytes).expect("it was decoded to be found");
                    if !self.follow(&frame, offset) {
                        // Whole, and of another place: only a proof behind it tells a torn tail from a write that went astray.
                        self.seek_proof(offset)?;
                        if offset >= self.out.proven {
                            break;
                        }
                        self.lose_gap(offset, "a frame that belongs elsewhere stands here")?;
                        continue;
                    }
                    self.visitor.frame(&frame, offset);
                    self.out.end += bytes.len() as u64;
                }
                Found::Bad(header) => {
                    if self.scan.is_index(offset)? {
                        break;
                    }
                    self.seek_proof(offset)?;
                    if offset >= self.out.proven {
                        break;
                    }
                    let header = header.filter(|header| !self.is_stale(header));
                    self.damaged(offset, header)?;
                }
            }
        }
        if self.out.end < self.out.proven {
            let (offset, len) = (self.out.end, self.out.proven - self.out.end);
            self.lose_any(offset, len, "cut off");
        }
        self.settle();
        Ok(self.out)
    }

    /// Takes in a valid frame; `false` where it does not belong here.
    fn follow(&mut self, frame: &Frame<'_>, offset: u64) -> bool {
        let header = &frame.header;
        if header.kind == Kind::Synced {
            self.synced(frame, offset);
            return true;
        }
        let rises = header.generation > self.out.place.chain.generation();
        // What the target seals anew stands in files of its own.
        if header.resealed || self.is_stale(header) || (rises && !self.lenient && header.kind != Kind::Begin) {
            return false;
        }
        self.explain_gap(header);
        if rises {
            self.out.place.chain.grant(header.generation);
        }
        if self.lenient
            && header.kind == Kind::Commit
            && let Ok((commit, _)) = Commit::decode(frame.payload)
        {
            self.name_predecessor(&commit, offset);
        }
        let hash = frame.hash();
        let chain = &mut self.out.place.chain;
        let followed = match chain.step(frame, hash) {
            Err(_) if self.lenient => chain.step_over_gap(frame, hash, &[]),
            followed => followed,
        };
        let Ok(step) = followed else { return false };
        self.take(frame, offset, step);
        self.out.source_end = offset + frame.bytes.len() as u64;
        true
    }

    /// Whether a frame of a source was taken before, or fenced off before: then it was never written here, whatever is missing.
    fn is_stale(&self, header: &Header) -> bool {
        let chain = &self.out.place.chain;
        let committed = chain.head().is_some_and(|(head, _)| header.epoch <= head.epoch);
        let of_open = chain.open().filter(|open| open.attempt == header.attempt && open.epoch == header.epoch);
        let taken = of_open.is_some_and(|open| header.sequence < open.next);
        header.kind != Kind::Synced && (committed || taken || header.generation < chain.generation())
    }

    fn take(&mut self, frame: &Frame<'_>, offset: u64, step: Step) {
        let header = &frame.header;
        if step == Step::Duplicate {
            return;
        }
        if header.kind == Kind::Begin {
            self.begin(header);
        }
        self.out.index.follow(frame, step, offset, self.out.time, &self.out.place.volumes);
    }

    fn begin(&mut self, header: &Header) {
        let open = self.out.place.chain.open().filter(|open| open.attempt == header.attempt);
        let volumes = open.map(|open| open.volumes.clone()).unwrap_or_default();
        let before = std::mem::replace(&mut self.out.place.volumes, volumes);
        if let Some(run) = self.out.index.runs.last() {
            self.replaced = Some((run.attempt, before));
        }
    }

    fn end_run(&mut self, run: u32, end: RunEnd) {
        self.out.index.runs[run as usize].end = end;
    }

    /// A point whose commit is gone, by the word of others.
    fn presume(&mut self, head: Head, attempt: AttemptId, offset: u64, frame_len: u32) {
        self.out.index.commits.push(CommitEntry {
            head,
            generation: self.out.place.chain.generation(),
            attempt,
            offset,
            frame_len,
            received: self.out.time,
            record: None,
            volumes: self.out.place.volumes.clone(),
        });
    }

    fn synced(&mut self, frame: &Frame<'_>, offset: u64) {
        let Ok(synced) = Synced::decode(frame.payload) else { return };
        if synced.segment == self.segment {
            self.out.proven = self.out.proven.max(synced.offset.min(offset));
        }
        self.out.time = synced.time;
        if let Some(head) = synced.head.filter(|_| self.lenient) {
            self.name_head(head, offset);
        }
    }

    /// The proofs behind `offset`, which the walk has not come to yet.
    fn seek_proof(&mut self, offset: u64) -> io::Result<()> {
        if std::mem::replace(&mut self.proof_sought, true) {
            return Ok(());
        }
        let mut from = offset + 1;
        while let Some(found) = self.scan.find(from)? {
            let Found::Frame(bytes) = self.scan.at(found)? else { break };
            let frame = frame::decode(&self.group, bytes).expect("it was decoded to be found");
            from = found + frame.bytes.len() as u64;
            if frame.header.kind == Kind::Synced
                && let Ok(synced) = Synced::decode(frame.payload)
                && synced.segment == self.segment
            {
                self.out.proven = self.out.proven.max(synced.offset.min(found));
            }
        }
        Ok(())
    }

    /// Bytes that were durable and are no frame any more.
    fn damaged(&mut self, offset: u64, header: Option<Header>) -> io::Result<()> {
        self.lenient = true;
        if let Some(header) = header {
            self.out.end = offset + header.frame_len() as u64;
            self.gap = None;
            self.lose_payload(&header, offset);
            return Ok(());
        }
        let next = self.scan.find(offset + 1)?.unwrap_or(self.scan.end()).max(offset + 1);
        let len = next - offset;
        self.out.end = next;
        match self.rebuild(offset, next)? {
            Some(Rebuilt::Synced) => self.damage(offset, len, None, "a synced record is damaged"),
            Some(Rebuilt::Record(bytes)) => {
                let frame = frame::decode(&self.group, &bytes).expect("just encoded");
                self.damage(offset, len, Some(frame.header.epoch), "the header of a record is damaged");
                self.follow(&frame, offset);
            }
            None => self.lose_gap(offset, "frames are damaged beyond telling")?,
        }
        Ok(())
    }

    /// Nothing is known of what stood from `offset` up to the next valid frame; that one may tell.
    fn lose_gap(&mut self, offset: u64, what: &str) -> io::Result<()> {
        let next = self.scan.find(offset + 1)?.unwrap_or(self.scan.end()).max(offset + 1);
        self.out.end = next;
        self.lose_any(offset, next - offset, what);
        self.gap = Some((self.out.damages.len() - 1, self.out.index.lost.len() - 1));
        Ok(())
    }

    /// A frame whose header is intact and whose payload is not.
    fn lose_payload(&mut self, header: &Header, offset: u64) {
        let len = header.frame_len() as u64;
        let what = format!("the payload of a frame ({:?}) is damaged", header.kind);
        if header.kind == Kind::Synced {
            return self.damage(offset, len, None, &what);
        }
        if header.generation > self.out.place.chain.generation() {
            self.out.place.chain.grant(header.generation);
        }
        let begins = header.kind == Kind::Begin;
        self.damage(offset, len, Some(header.epoch).filter(|_| header.kind != Kind::PartEnd), &what);
        if begins {
            self.out.place.chain.lose(header, &[]);
            self.begin(header);
        }
        let run = self.out.index.run_of(header, begins);
        match header.kind {
            Kind::Extents => {
                self.out.place.chain.lose(header, &[]);
                self.out.index.insert(header, run, offset);
            }
            Kind::PartEnd => {
                let before = self.out.place.chain.parts().map_or(0, |(_, parts)| parts.count);
                self.end_run(run, RunEnd::Part);
                let parts = PartChain { count: before.saturating_add(1), hash: UNNAMED };
                self.out.place.chain.presume_part(header.epoch, parts);
            }
            Kind::Commit => {
                self.end_run(run, RunEnd::Commit);
                let head = Head { epoch: header.epoch, hash: UNNAMED };
                self.presume(head, header.attempt, offset, len as u32);
                self.out.place.chain.presume_commit(head, header.attempt);
            }
            Kind::Begin | Kind::Synced => {}
        }
    }

    /// The first frame behind a gap tells whether it hid frames of the open attempt, and of which.
    fn explain_gap(&mut self, header: &Header) {
        let Some((damage, lost)) = self.gap.take() else { return };
        let Some(open) = self.out.place.chain.open() else { return };
        if open.attempt != header.attempt || open.epoch != header.epoch {
            return;
        }
        if open.next == header.sequence {
            self.out.index.lost.remove(lost);
            let damage = &mut self.out.damages[damage];
            damage.first_epoch = None;
            damage.any_block = false;
            "a record of the target is damaged".clone_into(&mut damage.what);
        } else {
            self.out.index.lost[lost].run = Some(self.out.index.run_of(header, false));
        }
    }

    /// A commit names the point before it: also one whose own commit is gone.
    fn name_predecessor(&mut self, commit: &Commit, offset: u64) {
        let Some(before) = commit.predecessor else { return };
        let known = self.out.place.chain.head();
        match known {
            Some((head, _)) if head.epoch > before.head.epoch => return,
            Some((head, _)) if head.epoch == before.head.epoch => {
                if let Some(entry) = self.out.index.commits.last_mut().filter(|entry| entry.head.hash == UNNAMED) {
                    entry.head = before.head;
                }
            }
            _ => {
                if let Some(run) = self.out.index.runs.iter_mut().rev().find(|run| run.attempt == before.attempt) {
                    run.end = RunEnd::Commit;
                }
                let volumes = self.replaced.take().filter(|(attempt, _)| *attempt == before.attempt);
                let volumes = volumes.map(|(_, volumes)| volumes).unwrap_or_default();
                let now = std::mem::replace(&mut self.out.place.volumes, volumes);
                self.presume(before.head, before.attempt, offset, 0);
                self.out.place.volumes = now;
                self.damage(offset, 0, Some(before.head.epoch), "the commit of this point is damaged");
            }
        }
        self.set_head(before.head, before.attempt);
    }

    /// A synced record names the newest point: also one whose commit is gone.
    fn name_head(&mut self, head: Head, offset: u64) {
        match self.out.place.chain.head() {
            Some((known, _)) if known.epoch > head.epoch => {}
            Some((known, attempt)) if known.epoch == head.epoch => {
                if known.hash == UNNAMED {
                    self.set_head(head, attempt);
                    if let Some(entry) = self.out.index.commits.last_mut() {
                        entry.head = head;
                    }
                }
            }
            _ => {
                let open = self.out.place.chain.open().filter(|open| open.epoch == head.epoch);
                let attempt = open.map(|open| open.attempt).unwrap_or_default();
                if let Some(run) = self.out.index.runs.iter_mut().rev().find(|run| run.attempt == attempt) {
                    run.end = RunEnd::Commit;
                } else {
                    self.out.place.volumes.clear();
                }
                self.presume(head, attempt, offset, 0);
                self.out.place.chain.presume_commit(head, attempt);
                self.damage(offset, 0, Some(head.epoch), "the commit of this point is damaged");
            }
        }
    }

    fn set_head(&mut self, head: Head, attempt: AttemptId) {
        let chain = &self.out.place.chain;
        let open = chain.open().cloned();
        self.out.place.chain = Chain::at(Some((head, attempt)), chain.generation(), chain.parts()).with_open(open);
    }

    /// A gap that is exactly one record whose payload is intact: its header follows from its place.
    fn rebuild(&mut self, offset: u64, next: u64) -> io::Result<Option<Rebuilt>> {
        let Some(bytes) = self.scan.bytes(offset, next)? else { return Ok(None) };
        let bytes = bytes.to_vec();
        if bytes.len() < RECORD_HEADER_BYTES + 4 {
            return Ok(None);
        }
        let payload = &bytes[RECORD_HEADER_BYTES..bytes.len() - 4];
        let mut header = Header {
            kind: Kind::Synced,
            encoding: frame::Encoding::Raw,
            volume: cdp_protocol::units::VolumeSlot(0),
            epoch: Epoch(0),
            generation: self.out.place.chain.generation(),
            attempt: AttemptId::default(),
            sequence: Sequence(0),
            resealed: false,
            payload_len: payload.len() as u32,
            content_len: 0,
            digests_len: 0,
            extents: Vec::new(),
        };
        // Whatever the header was, the sum behind the payload has to be the one a frame of this group has there.
        let rebuilt = frame::encode(&self.group, &header, payload);
        if rebuilt[rebuilt.len() - 4..] != bytes[bytes.len() - 4..] {
            return Ok(None);
        }
        if Synced::decode(payload).is_ok_and(|synced| synced.segment == self.segment) {
            return Ok(Some(Rebuilt::Synced));
        }
        if let Some(open) = self.out.place.chain.open().filter(|open| open.is_whole()) {
            (header.epoch, header.attempt, header.sequence) = (open.epoch, open.attempt, open.next);
            let list = open.list();
            let commit = Commit::decode(payload).is_ok_and(|(commit, _)| commit.frames == list);
            let part_end = PartEnd::decode(payload).is_ok_and(|(end, _)| end.frames == list);
            if commit || part_end {
                header.kind = if commit { Kind::Commit } else { Kind::PartEnd };
                return Ok(Some(Rebuilt::Record(frame::encode(&self.group, &header, payload))));
            }
        }
        let Found::Frame(after) = self.scan.at(next)? else { return Ok(None) };
        let after = frame::decode(&self.group, after).expect("it was decoded to be found").header;
        if Begin::decode(payload).is_err() || after.sequence != Sequence(1) {
            return Ok(None);
        }
        header.kind = Kind::Begin;
        (header.epoch, header.attempt, header.generation) = (after.epoch, after.attempt, after.generation);
        Ok(Some(Rebuilt::Record(frame::encode(&self.group, &header, payload))))
    }

    fn lose_any(&mut self, offset: u64, len: u64, what: &str) {
        let chain = &self.out.place.chain;
        let next = chain.head().map_or(1, |(head, _)| head.epoch.0.saturating_add(1));
        let epoch = chain.open().map_or(Epoch(next), |open| Epoch(open.epoch.0.min(next)));
        self.damage(offset, len, Some(epoch), what);
        self.out.damages.last_mut().expect("just pushed").any_block = true;
        self.out.index.lost.push(Lost { offset, len, run: None });
        self.lenient = true;
    }

    fn damage(&mut self, offset: u64, len: u64, first_epoch: Option<Epoch>, what: &str) {
        let file = FileId::Segment { number: self.segment, revision: 0 };
        self.out.damages.push(Damage { offset, len, first_epoch, ..Damage::of(file, what.to_owned()) });
    }

    /// Leaves nothing in the chain that the source could not go on from.
    fn settle(&mut self) {
        let chain = &mut self.out.place.chain;
        chain.forget_broken();
        if chain.parts().is_some_and(|(_, parts)| parts.hash == UNNAMED) {
            *chain = Chain::at(chain.head(), chain.generation(), None).with_open(chain.open().cloned());
        }
    }
}

enum Rebuilt {
    Synced,
    Record(Vec<u8>),
}
