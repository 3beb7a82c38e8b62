//! What an agent takes up of the one before: the points that waited, where nothing was told to the target or heard of it since.
//!
//! Invariant: what is taken up goes on from the very point and the very parts that the group stands at, under the same generation,
//! without a gap; anything else is thrown away as a whole. Its blocks are in the tracker's `unacked` either way.

use super::contents::{Contents, Keys};
use super::file::{Layout, SpoolFile};
use super::index::{Index, IndexEntry, decode_memo};
use super::{Entry, HeldIn, Spool};
use crate::agent::ledger::Blocks;
use cdp_protocol::codec::Sealer;
use cdp_protocol::frame::Frame;
use cdp_protocol::record::Begin;
use cdp_protocol::session::memo::Memo;
use cdp_protocol::session::source::End;
use cdp_protocol::units::{AttemptId, Epoch, Timestamp};
use std::sync::Arc;

/// An attempt that an agent before captured.
#[derive(Debug)]
pub struct TakenUp {
    /// Its epoch.
    pub epoch: Epoch,
    /// The attempt.
    pub attempt: AttemptId,
    /// Its cut's instant; none for a part.
    pub cut_time: Option<Timestamp>,
    /// What it holds.
    pub blocks: Arc<Blocks>,
    /// What of it could not be read.
    pub unreadable: Blocks,
    /// Bytes of its frames.
    pub bytes: u64,
}

impl Spool {
    /// Takes up what is in the file, of a group that stands where `memo` says. Reads all of it.
    ///
    /// # Errors
    /// Why what there was is thrown away.
    pub fn take_up(&mut self, keys: Keys<'_>, begin: &Begin, memo: &Memo) -> Result<Vec<TakenUp>, String> {
        if !self.is_on() {
            return Ok(Vec::new());
        }
        let layout = Layout::of(self.limits.bytes_max);
        let opened = SpoolFile::open_existing(Arc::clone(&self.storage), &self.folder, layout);
        let Some(mut file) = opened.map_err(|error| error.to_string())? else { return Ok(Vec::new()) };
        let copies = [file.read_index(0), file.read_index(1)].into_iter().flatten();
        let newest = copies.filter_map(|bytes| Index::decode(&bytes)).max_by_key(|index| index.number);
        self.index_number = newest.as_ref().map_or(0, |index| index.number);
        let Some(index) = newest.filter(|index| !index.entries.is_empty()) else {
            self.file = Some(file);
            return Ok(Vec::new());
        };
        let page = file.read_memo().ok().and_then(|page| decode_memo(&page));
        let found = self.follow(&mut file, index, (page, memo), (keys, begin));
        self.file = Some(file);
        self.is_indexed = true;
        match found {
            Ok((entries, taken_up)) => {
                self.entries = entries.into();
                self.parts_acked = memo.parts.map(|(epoch, parts)| (epoch, parts.count));
                // Nor is one changed whose commit may have left.
                let sent = memo.sent.iter().map(|head| head.epoch).max();
                self.begun = memo.parts.map(|(epoch, _)| epoch).max(sent);
                // What it does not name any more may be written over.
                self.refresh(memo);
                Ok(taken_up)
            }
            Err(why) => {
                match self.file.as_mut().expect("just put there").wipe() {
                    Ok(()) => self.truncate(0, memo),
                    Err(error) => self.failure = Some(error.to_string()),
                }
                Err(why)
            }
        }
    }

    fn refresh(&mut self, memo: &Memo) {
        match self.write_index(memo) {
            Ok(true) => {}
            Ok(false) => self.failure = Some("its index has no room".into()),
            Err(error) => self.failure = Some(error.to_string()),
        }
    }

    /// Reads what the index names and is not acked.
    fn follow(
        &self,
        file: &mut SpoolFile,
        index: Index,
        (page, memo): (Option<Memo>, &Memo),
        (keys, begin): (Keys<'_>, &Begin),
    ) -> Result<(Vec<Entry>, Vec<TakenUp>), String> {
        if index.group != self.group {
            return Err("it is another group's".into());
        }
        if index.slab_bytes != file.layout().slab_bytes {
            return Err("its size has another layout".into());
        }
        if page.as_ref() != Some(memo) || memo.generation != Some(index.generation) {
            return Err("the group has gone on without it".into());
        }
        let wanted = wanted(index.entries, memo)?;
        if !wanted.iter().all(|entry| file.take(&entry.place)) {
            return Err("its index is damaged".into());
        }
        let mut found = (Vec::new(), Vec::new());
        for named in wanted {
            let sealer = Sealer::new(self.group, named.epoch, index.generation, named.attempt, keys.data_key);
            let (entry, taken_up) = read(file, named, sealer, (keys, begin))?;
            found.0.push(entry);
            found.1.push(taken_up);
        }
        Ok(found)
    }
}

/// What of an index goes on from where the group stands: whole points, each with all its parts that are not acked.
fn wanted(entries: Vec<IndexEntry>, memo: &Memo) -> Result<Vec<IndexEntry>, String> {
    let head = memo.head().map(|head| head.epoch).unwrap_or_default();
    let is_held = |entry: &IndexEntry| {
        let parts = memo.parts.filter(|(epoch, _)| *epoch == entry.epoch).map_or(0, |(_, parts)| parts.count);
        entry.epoch <= head || entry.end == End::Part && entry.parts_before < parts
    };
    let mut wanted: Vec<IndexEntry> = entries.into_iter().filter(|entry| !is_held(entry)).collect();
    // The epoch that was being captured: its blocks are captured again.
    let whole = wanted.iter().rposition(|entry| entry.end != End::Part).map_or(0, |at| at + 1);
    wanted.truncate(whole);
    // What is open is the first epoch's, with so many parts; behind its commit a higher one begins.
    let mut open = memo.parts.map(|(epoch, parts)| (epoch, parts.count));
    let mut last = head;
    for entry in &wanted {
        let (epoch, parts) = open.unwrap_or((entry.epoch, 0));
        if entry.epoch != epoch || epoch <= last || entry.parts_before != parts {
            return Err("its attempts do not follow one another".into());
        }
        match entry.end {
            End::Part => open = Some((epoch, parts + 1)),
            End::Commit(_) => (open, last) = (None, epoch),
        }
    }
    Ok(wanted)
}

fn read(
    file: &SpoolFile,
    named: IndexEntry,
    sealer: Sealer,
    (keys, begin): (Keys<'_>, &Begin),
) -> Result<(Entry, TakenUp), String> {
    let IndexEntry { epoch, attempt, list, end, place, .. } = named;
    let failed = |why: &str| format!("epoch {epoch}: {why}");
    let frames = file.read(&place).map_err(|error| failed(&error.to_string()))?;
    let decoded = keys.frames(attempt, list, &frames).filter(|decoded| {
        decoded.iter().all(|frame| frame.header.epoch == epoch && frame.header.generation == sealer.generation())
    });
    let is_of_the_group = |first: &Frame<'_>| Begin::decode(first.payload).is_ok_and(|(found, _)| found == *begin);
    if !decoded.as_ref().and_then(|frames| frames.first()).is_none_or(is_of_the_group) {
        return Err(failed("the group's volumes are others than then"));
    }
    let contents = decoded.and_then(|frames| keys.contents(attempt, &frames));
    let Contents { blocks, unreadable, .. } = contents.ok_or_else(|| failed("its frames are not what was written"))?;
    let bytes = frames.iter().map(|frame| frame.len() as u64).sum();
    let blocks = Arc::new(blocks);
    let entry = Entry {
        epoch,
        attempt,
        list,
        bytes,
        end,
        sealer: Arc::new(sealer),
        blocks: Arc::clone(&blocks),
        held: HeldIn::File(place),
    };
    let cut_time = entry.cut_time();
    Ok((entry, TakenUp { epoch, attempt, cut_time, blocks, unreadable, bytes }))
}
