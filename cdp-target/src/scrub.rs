//! Scrub: the store re-reads itself, segment by segment and pack by pack, so that rot is found while its source may still have the content.
//!
//! Owns the order (what was read longest ago comes first), the pace (everything once an interval, never faster than
//! `BYTES_A_SECOND` within a segment), and the record of what was read when. What is found is handed to the group's writer,
//! which keeps it in the manifest, so that every list of points names those that need it. A damage that a repair stands for counts as
//! none, and the repair is read again with its segment. Changes nothing else, and repairs nothing.

mod record;

pub use record::ScrubRecord;

use crate::authority::AuthorityError;
use crate::catalog::{Catalog, open_group};
use crate::journal::file::{FileId, Sealed};
use crate::journal::manifest::SealedSegment;
use crate::journal::walk::{Blind, Visit};
use crate::journal::{Damage, GroupView, JournalError, Manifest};
use crate::pace::Pace;
use crate::restore::image::one_line;
use crate::store::{GroupPlace, Store, StoreError};
use cdp_protocol::frame::Frame;
use cdp_protocol::units::Timestamp;
use cdp_seams::clock::Clock;
use cdp_seams::storage::Storage;
use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// How fast a segment is read at most.
const BYTES_A_SECOND: u64 = 16 << 20;
/// Between two segments at most, however small the store.
const PAUSE_MAX: Duration = Duration::from_secs(3600);
/// How soon it is looked again what there is, also where nothing is due.
const LOOK_EVERY: Duration = Duration::from_secs(600);
/// Files that are read without looking again, at most.
const TURNS_MAX: usize = 256;

/// Takes office, group, file and what is wrong with it.
pub type Found<'a> = dyn Fn(&str, GroupPlace, FileId, Vec<Damage>) -> bool + 'a;

/// What the scrub works on and with.
pub struct Scrub<'a> {
    /// The store.
    pub store: &'a Store,
    /// Names the offices and their groups.
    pub catalog: &'a dyn Fn() -> Result<Catalog, AuthorityError>,
    /// A group that is open already.
    pub view: &'a dyn Fn(GroupPlace) -> Option<Arc<GroupView>>,
    /// Takes what is wrong with a file, where that is not what was known; tells whether it is kept.
    pub found: &'a Found<'a>,
    /// Time.
    pub clock: &'a dyn Clock,
    /// Everything is read once in this time.
    pub interval: Duration,
}

/// What is wrong with a segment, read at once and as fast as it can be.
///
/// # Errors
/// Where the storage fails.
pub fn read_now(view: &GroupView, segment: u64) -> Result<Vec<Damage>, JournalError> {
    Ok(view.walk(segment, &mut Blind)?.damages)
}

/// What is to be read next.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Turn {
    office: String,
    place: GroupPlace,
    file: FileId,
    /// How long to wait before it.
    pause: Duration,
}

/// A sealed segment or a pack.
struct Candidate {
    office: String,
    place: GroupPlace,
    file: FileId,
    len: u64,
    read: Option<Timestamp>,
}

/// Why it cannot go on for now.
#[derive(Debug, thiserror::Error)]
enum ScrubError {
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Scrub<'_> {
    /// Reads until the other end of `ended` is dropped.
    pub fn run(&self, ended: &Receiver<()>) {
        // Files that could not be read: tried again when they are due again.
        let mut failed = HashMap::new();
        let mut turns = VecDeque::new();
        loop {
            if turns.is_empty() {
                turns = self.next(&failed).unwrap_or_else(|error| {
                    tracing::warn!(error = one_line(&error), "nothing is scrubbed for now");
                    VecDeque::new()
                });
            }
            let turn = turns.pop_front();
            let pause = turn.as_ref().map_or(LOOK_EVERY.min(self.interval), |turn: &Turn| turn.pause);
            if ended.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            let Some(turn) = turn else { continue };
            if let Err(error) = self.read(&turn, ended) {
                let (group, file) = (turn.place.group, turn.file);
                tracing::error!(office = turn.office, %group, %file, error = one_line(&error), "cannot be scrubbed");
                failed.insert((turn.place, turn.file), Timestamp(self.clock.wall_ms()));
            }
        }
    }

    /// The files that were read longest ago, as far as they are due.
    fn next(&self, failed: &HashMap<(GroupPlace, FileId), Timestamp>) -> Result<VecDeque<Turn>, ScrubError> {
        let mut candidates = Vec::new();
        for office in (self.catalog)()?.offices() {
            for place in self.store.groups(office.id)? {
                candidates.extend(self.candidates(&office.name, place));
            }
        }
        for candidate in &mut candidates {
            candidate.read = candidate.read.max(failed.get(&(candidate.place, candidate.file)).copied());
        }
        Ok(choose(candidates, Timestamp(self.clock.wall_ms()), self.interval))
    }

    /// The sealed segments and the packs of a group; none of one that cannot be read, which others complain of.
    fn candidates(&self, office: &str, place: GroupPlace) -> Vec<Candidate> {
        let (storage, folder) = (self.store.storage().as_ref(), self.store.group_folder(place));
        let Ok(files) = sealed_files(storage, &folder) else { return Vec::new() };
        let record = ScrubRecord::read(storage, &folder);
        let candidate = |sealed: Sealed| Candidate {
            office: office.to_owned(),
            place,
            file: sealed.id,
            len: sealed.len,
            read: record.read_at(sealed.id),
        };
        files.into_iter().map(candidate).collect()
    }

    fn read(&self, turn: &Turn, ended: &Receiver<()>) -> Result<(), JournalError> {
        let view = match (self.view)(turn.place) {
            Some(view) => view,
            None => Arc::clone(open_group(self.store, turn.place)?.view()),
        };
        let files = view.sealed_files();
        let Some(file) = files.iter().find(|file| file.id == turn.file) else {
            // It went while it was waited for.
            return Ok(());
        };
        let mut paced = Paced(Pace::new(self.clock, ended, BYTES_A_SECOND));
        let walked = view.walk_file(file, &mut paced)?;
        let (storage, folder) = (self.store.storage().as_ref(), self.store.group_folder(turn.place));
        let is_named = |files: Vec<Sealed>| files.iter().any(|file| file.id == turn.file);
        if !walked.damages.is_empty() && !is_named(sealed_files(storage, &folder)?) {
            // No lease held it: it was swept away while it was read.
            return Ok(());
        }
        let (healed, damaged): (Vec<_>, Vec<_>) =
            walked.damages.iter().partition(|damage| view.repair_of(damage).is_some());
        crate::metrics::scrubbed(walked.bytes, damaged.len());
        let is_clean = damaged.is_empty();
        // A repair that rotted in its turn: its damage is to be named again.
        let are_repairs_known =
            healed.iter().all(|damage| view.is_healed(damage)) && !damaged.iter().any(|damage| view.is_healed(damage));
        let known: Vec<&Damage> = view.damages().iter().filter(|damage| damage.is_in(turn.file)).collect();
        if (!known.into_iter().eq(&walked.damages) || !are_repairs_known)
            && !(self.found)(&turn.office, turn.place, turn.file, walked.damages)
        {
            // Read again soon: nothing is recorded.
            return Ok(());
        }
        let mut record = ScrubRecord::read(storage, &folder);
        record.keep(files.iter().map(|file| file.id));
        // A file that is damaged proves nothing.
        if is_clean {
            record.set(turn.file, Timestamp(self.clock.wall_ms()));
        } else {
            record.set_damaged(turn.file, Timestamp(self.clock.wall_ms()));
        }
        // A crash leaves the old record or the new one; at worst a file is read once more.
        record.write(storage, &folder).map_err(JournalError::io("write", &record::path(&folder)))
    }
}

/// The sealed segments and the packs that the manifest of the group in `folder` names now.
fn sealed_files(storage: &dyn Storage, folder: &Path) -> Result<Vec<Sealed>, JournalError> {
    let (manifest, _) = Manifest::read(storage, folder)?;
    let packs = crate::checkpoint::packs(storage, folder, &manifest);
    Ok(manifest.sealed.iter().map(SealedSegment::sealed).chain(packs).collect())
}

/// Those that were read longest ago, if that is an interval ago: what is read before it is looked again, and one at least. To look is
/// to read what every group of the store has.
fn choose(mut candidates: Vec<Candidate>, now: Timestamp, interval: Duration) -> VecDeque<Turn> {
    let total: u64 = candidates.iter().map(|candidate| candidate.len).sum();
    let interval_ms = i64::try_from(interval.as_millis()).unwrap_or(i64::MAX);
    let is_due = |read: Timestamp| now.0.saturating_sub(read.0) >= interval_ms || read > now;
    candidates.retain(|candidate| candidate.read.is_none_or(is_due));
    candidates.sort_by_key(|candidate| (candidate.read, candidate.file));
    let turn = |Candidate { office, place, file, len, .. }: Candidate| {
        let share = len as f64 / total.max(1) as f64;
        // Reading takes its own part of the time.
        let reading = Duration::from_secs_f64(len as f64 / BYTES_A_SECOND as f64);
        Turn { office, place, file, pause: interval.mul_f64(share).saturating_sub(reading).min(PAUSE_MAX) }
    };
    let mut until = Duration::ZERO;
    let is_soon = |turn: &Turn| {
        let begins = until;
        until = until.saturating_add(turn.pause);
        begins < LOOK_EVERY
    };
    candidates.into_iter().map(turn).take(TURNS_MAX).take_while(is_soon).collect()
}

/// Keeps the reading of a file to its pace.
struct Paced<'a>(Pace<'a>);

impl Visit for Paced<'_> {
    fn frame(&mut self, frame: &Frame<'_>, _offset: u64) {
        // Where the end has come there is no wait any more, and the file is soon over.
        self.0.spend(frame.bytes.len() as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_protocol::units::{GroupId, OfficeId};

    const HOUR: Duration = Duration::from_secs(3600);

    fn candidate(group: u8, segment: u64, len: u64, read: Option<i64>) -> Candidate {
        let place = GroupPlace { office: OfficeId([1; 16]), group: GroupId([group; 16]) };
        let file = FileId::Segment { number: segment, revision: 0 };
        Candidate { office: "berlin".to_owned(), place, file, len, read: read.map(Timestamp) }
    }

    /// Groups, segments and pauses in seconds.
    fn chosen(candidates: Vec<Candidate>, now: i64) -> Vec<(u8, u64, u64)> {
        let seconds = |turn: &Turn| turn.pause.as_secs_f64().round() as u64;
        let number = |turn: &Turn| match turn.file {
            FileId::Segment { number, .. } => number,
            FileId::Slice(_) => 0,
        };
        let turns = choose(candidates, Timestamp(now), HOUR);
        turns.iter().map(|turn| (turn.place.group.0[0], number(turn), seconds(turn))).collect()
    }

    #[test]
    fn what_was_never_read_comes_first_then_what_was_read_longest_ago() {
        let hour = 3_600_000;
        assert_eq!(chosen(vec![], 0), []);
        let all = || vec![candidate(1, 1, 100, Some(5)), candidate(2, 1, 200, None), candidate(2, 2, 100, Some(3))];
        assert_eq!(chosen(all(), 10), [(2, 1, 1800)], "half of all bytes, half of the interval");
        let all = || vec![candidate(1, 1, 100, Some(5)), candidate(2, 1, 200, Some(9)), candidate(2, 2, 100, Some(3))];
        assert_eq!(chosen(all(), hour), [], "nothing is an interval old");
        assert_eq!(chosen(all(), hour + 3), [(2, 2, 900)]);
        assert_eq!(chosen(vec![candidate(1, 1, 100, Some(hour))], 5), [(1, 1, 3600)], "the clock went back");
    }

    #[test]
    fn of_many_small_files_as_many_are_chosen_as_are_read_before_it_is_looked_again() {
        let files = |count: u64| (0..count).map(|segment| candidate(1, segment, 100, None)).collect();
        let turns = chosen(files(50), 10);
        assert_eq!((turns.len(), turns[0], turns[8]), (9, (1, 0, 72), (1, 8, 72)));
        assert_eq!(chosen(files(3600), 10).len(), TURNS_MAX);
    }
}
