//! What a store's groups are doing: computed from what is durable, joined with what only a running server knows.
//!
//! The live RPO is now minus the later of the newest point and the newest validated "unchanged since"; both count by the
//! target's clock at most, so that a source whose clock runs ahead cannot look fresher than it is.

use crate::catalog::{Catalog, CatalogError, Group, open_group};
use crate::drill::report::newest as newest_drill;
use crate::drill::schedule::is_overdue;
use crate::journal::{GroupView, JournalError, Manifest, Overview, segment, short_claim};
use crate::points::Instant;
use crate::restore::image::one_line;
use crate::store::{GroupPlace, Store, StoreError};
use cdp_protocol::session::target::Claim;
use cdp_protocol::units::{Epoch, GroupId, Head, OfficeId, Timestamp};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a store holds and does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusReport {
    /// Id of the store.
    pub store: String,
    /// Now, in RFC 3339.
    pub time: String,
    /// Where the running server listens; `None` where none runs.
    pub listening: Option<String>,
    /// Bytes that can still be written.
    pub free_bytes: u64,
    /// The offices.
    pub offices: Vec<OfficeStatus>,
}

/// An office.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OfficeStatus {
    /// Its id.
    pub id: OfficeId,
    /// Its name.
    pub name: String,
    /// How far it is enrolled: `enrolled`, `invited` or `expired`.
    pub state: String,
    /// Its groups.
    pub groups: Vec<GroupStatus>,
}

/// What a group does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupState {
    /// Its source is connected.
    Connected,
    /// The server waits for its source.
    Disconnected,
    /// No server runs.
    NotServed,
    /// Its source's history is another one than ours: nothing is taken until an operator resolves it.
    Frozen,
    /// Its source is connected and put off or refused; the reason says why.
    Refused,
    /// It cannot be read: a person has to look.
    Failed,
}

/// A group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Its id.
    pub id: GroupId,
    /// Its name; the id where it cannot be read.
    pub name: String,
    /// What it does.
    pub state: GroupState,
    /// Why, where that needs saying.
    pub reason: Option<String>,
    /// Where the histories end, where it is forked: what `resolve` may be given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub histories: Vec<HistoryStatus>,
    /// How many points it has.
    pub points: u64,
    /// Its newest point.
    pub newest: Option<NewestPoint>,
    /// Until when its source said that nothing changed since.
    pub unchanged_as_of: Option<String>,
    /// Data that would be lost now, as time, in milliseconds.
    pub live_rpo_ms: Option<i64>,
    /// From the newest point's cut to its arrival, in milliseconds.
    pub lag_ms: Option<i64>,
    /// Bytes its files take.
    pub used_bytes: u64,
    /// How far it got in each stage; only a running server knows.
    pub watermarks: Option<Watermarks>,
    /// Its quota; none is set yet.
    pub quota_bytes: Option<u64>,
    /// Its last drill.
    pub last_drill: Option<DrillStatus>,
    /// Whether one should have been over long since.
    #[serde(default)]
    pub drill_overdue: bool,
}

/// A drill of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillStatus {
    /// The point.
    pub epoch: Epoch,
    /// When it was over.
    pub finished: String,
    /// The same, in milliseconds ago.
    pub age_ms: i64,
    /// Whether everything that was checked is well.
    pub passed: bool,
    /// The first thing that is not.
    pub failure: Option<String>,
}

/// One of the histories of a forked group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryStatus {
    /// Its end as `resolve --continue-from` takes it: `GENERATION/EPOCH:HASH`, with the start of the hash.
    pub head: String,
    /// The machine whose it is; `None` for the one that went on here.
    pub host: Option<String>,
    /// When that came first.
    pub since: Option<String>,
}

/// The newest point of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewestPoint {
    /// Its number.
    pub epoch: Epoch,
    /// Its time.
    pub time: String,
    /// When it arrived.
    pub received: String,
}

/// The newest epoch in each stage since the server started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watermarks {
    /// Frames of it have come.
    pub received: Option<Epoch>,
    /// Durable.
    pub journaled: Option<Epoch>,
    /// The source was told.
    pub acked: Option<Epoch>,
}

/// What only the server knows of a group.
#[derive(Clone, Default)]
pub struct LiveGroup {
    /// Whether its source is connected.
    pub connected: bool,
    /// The newest validated "unchanged since": the point, and until when.
    pub unchanged: Option<(Epoch, Timestamp)>,
    /// How far it got.
    pub watermarks: Watermarks,
    /// Why its source is put off or refused.
    pub trouble: Option<String>,
    /// Its history, where the server has it open.
    pub view: Option<Arc<GroupView>>,
}

/// The server's side of a report.
pub trait Live {
    /// Where the server listens.
    fn listening(&self) -> String;
    /// What it knows of a group.
    fn group(&self, office: &str, place: GroupPlace) -> LiveGroup;
    /// What was read of the groups it has not open.
    fn known(&self) -> &KnownGroups;
}

/// What a report tells of a group's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupFacts {
    /// The group's name.
    pub name: String,
    /// Why nothing is taken any more, where that is so.
    pub frozen: Option<String>,
    /// The history an operator has chosen, where its source did not come yet.
    pub chosen: Option<Claim>,
    /// The histories to choose from, where it is frozen.
    pub histories: Vec<HistoryStatus>,
    /// Its points in short.
    pub overview: Overview,
    /// When the oldest of them came.
    pub oldest_received: Option<Timestamp>,
}

impl GroupFacts {
    fn of(group: &Group) -> Result<Self, JournalError> {
        let manifest = group.view().manifest();
        Ok(Self {
            name: group.name().to_owned(),
            frozen: manifest.frozen.clone(),
            chosen: manifest.ruling.chosen,
            histories: histories(group),
            overview: group.overview()?,
            oldest_received: group.view().points().next().transpose()?.map(|point| point.received),
        })
    }
}

/// What was read of groups that no writer has open, kept for as long as their files are what they were: a report every few seconds is not to walk
/// every open segment. The manifest and the length of the open segment tell.
#[derive(Default)]
pub struct KnownGroups(Mutex<HashMap<GroupPlace, (FilesState, GroupFacts)>>);

/// Hash of the manifest, and bytes of the open segment.
type FilesState = (blake3::Hash, u64);

impl KnownGroups {
    /// What a group's files say: read where they changed since they were read last.
    ///
    /// # Errors
    /// Where the group cannot be read; its name, as far as it is known, and why.
    pub fn facts(&self, store: &Store, place: GroupPlace) -> Result<GroupFacts, (String, JournalError)> {
        let unnamed = |error| (place.group.to_string(), error);
        // Looked at before the group is read: what changes meanwhile is read once more.
        let state = files_state(store, place).map_err(unnamed)?;
        if let Some((known, facts)) = self.lock().get(&place)
            && *known == state
        {
            return Ok(facts.clone());
        }
        let group = open_group(store, place).map_err(unnamed)?;
        let facts = GroupFacts::of(&group).map_err(|error| (group.name().to_owned(), error))?;
        self.lock().insert(place, (state, facts.clone()));
        Ok(facts)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<GroupPlace, (FilesState, GroupFacts)>> {
        // Every change is one insert: nothing is half done after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn files_state(store: &Store, place: GroupPlace) -> Result<FilesState, JournalError> {
    let (storage, folder) = (store.storage(), store.group_folder(place));
    let (manifest, _) = Manifest::read(storage.as_ref(), &folder)?;
    let segment = segment::path(&folder, manifest.open);
    // One that is missing is met when the group is read.
    let len = storage.open(&segment).and_then(|file| file.len()).unwrap_or(0);
    Ok((blake3::hash(&manifest.encode()), len))
}

/// Reports on a whole store at `now`.
///
/// # Errors
/// Where the store cannot be read; a group that cannot be read is reported as failed.
pub fn report(
    store: &Store,
    catalog: &Catalog,
    live: Option<&dyn Live>,
    now: Timestamp,
) -> Result<StatusReport, CatalogError> {
    let none = KnownGroups::default();
    let known = live.map_or(&none, Live::known);
    let mut offices = Vec::new();
    for office in catalog.offices() {
        let mut groups = Vec::new();
        for place in store.groups(office.id)? {
            let used_bytes = used_bytes(store, &store.group_folder(place));
            let live = live.map(|live| live.group(&office.name, place));
            let served = live.as_ref().and_then(|live| live.view.clone());
            let facts = match served {
                Some(view) => {
                    let group = Group::served(place, view);
                    GroupFacts::of(&group).map_err(|error| (group.name().to_owned(), error))
                }
                None => known.facts(store, place),
            };
            groups.push(match facts {
                Ok(facts) => {
                    let (last, overdue) = drills(store, place, facts.oldest_received, now);
                    let status = group_status(place, facts, live, used_bytes, now);
                    GroupStatus { last_drill: last, drill_overdue: overdue, ..status }
                }
                Err((name, error)) => unreadable(place, &name, &error, used_bytes),
            });
        }
        let state = serde_json::to_value(office.state(now)).ok();
        let state = state.as_ref().and_then(serde_json::Value::as_str).unwrap_or("unknown").to_owned();
        offices.push(OfficeStatus { id: office.id, name: office.name.clone(), state, groups });
    }
    let folder = store.folder();
    let free_bytes = store.storage().free_bytes(folder).map_err(|source| {
        CatalogError::Store(StoreError::System { verb: "look at", path: folder.to_owned(), source })
    })?;
    Ok(StatusReport {
        store: store.id().to_owned(),
        time: Instant(now).to_string(),
        listening: live.map(Live::listening),
        free_bytes,
        offices,
    })
}

fn group_status(
    place: GroupPlace,
    facts: GroupFacts,
    live: Option<LiveGroup>,
    used_bytes: u64,
    now: Timestamp,
) -> GroupStatus {
    let GroupFacts { name, frozen, chosen, histories, overview: Overview { points, newest }, .. } = facts;
    let newest = newest.map(|(point, time)| NewestTimes { epoch: point.epoch, time, received: point.received });
    let unchanged = live.as_ref().and_then(|live| live.unchanged);
    let chosen = chosen.map(|claim| format!("waits for the source at {}", short_claim(claim)));
    let (state, reason) = match (&live, frozen) {
        (_, Some(reason)) => (GroupState::Frozen, Some(reason)),
        (Some(live), None) if !live.connected && chosen.is_some() => (GroupState::Disconnected, chosen),
        (None, None) => (GroupState::NotServed, None),
        (Some(LiveGroup { trouble: Some(reason), .. }), None) => (GroupState::Refused, Some(reason.clone())),
        (Some(live), None) if live.connected => (GroupState::Connected, None),
        (Some(_), None) => (GroupState::Disconnected, None),
    };
    GroupStatus {
        id: place.group,
        name,
        state,
        reason,
        histories,
        points,
        newest: newest.map(|point| NewestPoint {
            epoch: point.epoch,
            time: Instant(point.time).to_string(),
            received: Instant(point.received).to_string(),
        }),
        unchanged_as_of: unchanged.map(|(_, as_of)| Instant(as_of).to_string()),
        live_rpo_ms: newest.map(|newest| live_rpo_ms(newest, unchanged, now)),
        lag_ms: newest.map(|newest| newest.received.0.saturating_sub(newest.time.0).max(0)),
        used_bytes,
        watermarks: live.map(|live| live.watermarks),
        quota_bytes: None,
        last_drill: None,
        drill_overdue: false,
    }
}

/// What the last drill of a group said, and whether another should have been over long since: where there was none, since the oldest point
/// came.
fn drills(store: &Store, place: GroupPlace, oldest: Option<Timestamp>, now: Timestamp) -> (Option<DrillStatus>, bool) {
    let last = newest_drill(store, place);
    let since = last.as_ref().map(|last| Timestamp(last.finished_ms)).or(oldest);
    let overdue = since.is_some_and(|since| is_overdue(store.config().drill_interval_s, since, now));
    let last = last.map(|last| DrillStatus {
        epoch: last.epoch,
        age_ms: now.0.saturating_sub(last.finished_ms).max(0),
        finished: last.finished,
        passed: last.passed,
        failure: last.failures.into_iter().next(),
    });
    (last, overdue)
}

fn histories(group: &Group) -> Vec<HistoryStatus> {
    let manifest = group.view().manifest();
    if manifest.frozen.is_none() {
        return Vec::new();
    }
    let newest = group.view().newest().ok().flatten();
    let ours = newest.map(|point| Head { epoch: point.epoch, hash: point.hash });
    let told = manifest.histories(ours).map(|(claim, fork)| HistoryStatus {
        head: short_claim(claim),
        host: fork.map(|fork| fork.host.clone()),
        since: fork.map(|fork| Instant(fork.at).to_string()),
    });
    told.collect()
}

fn unreadable(place: GroupPlace, name: &str, error: &JournalError, used_bytes: u64) -> GroupStatus {
    GroupStatus {
        id: place.group,
        name: name.to_owned(),
        state: GroupState::Failed,
        reason: Some(one_line(error)),
        histories: Vec::new(),
        points: 0,
        newest: None,
        unchanged_as_of: None,
        live_rpo_ms: None,
        lag_ms: None,
        used_bytes,
        watermarks: None,
        quota_bytes: None,
        last_drill: None,
        drill_overdue: false,
    }
}

/// What the figures are computed from.
#[derive(Clone, Copy)]
struct NewestTimes {
    epoch: Epoch,
    time: Timestamp,
    received: Timestamp,
}

/// Now minus the later of the newest point and "unchanged since" that point; never below zero.
fn live_rpo_ms(newest: NewestTimes, unchanged: Option<(Epoch, Timestamp)>, now: Timestamp) -> i64 {
    let unchanged = unchanged.filter(|(epoch, _)| *epoch == newest.epoch).map(|(_, as_of)| as_of);
    let fresh = unchanged.map_or(newest.time, |as_of| as_of.max(newest.time));
    now.0.saturating_sub(fresh.0).max(0)
}

/// Bytes of a group's files: its manifest, its journal, its checkpoints, repairs, and what was kept aside. A file that goes while we look counts
/// nothing.
fn used_bytes(store: &Store, folder: &Path) -> u64 {
    let storage = store.storage();
    let below = |folder: &Path| -> u64 {
        let names = storage.list(folder).unwrap_or_default();
        names.iter().filter_map(|name| storage.open(&folder.join(name)).and_then(|file| file.len()).ok()).sum()
    };
    ["", "journal", "packs", "checkpoints", "repairs", "aside"].iter().map(|name| below(&folder.join(name))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_live_rpo_counts_from_the_later_of_point_and_unchanged() {
        let newest = NewestTimes { epoch: Epoch(9), time: Timestamp(1000), received: Timestamp(1200) };
        let rpo = |unchanged, now| live_rpo_ms(newest, unchanged, Timestamp(now));
        assert_eq!(rpo(None, 5000), 4000);
        assert_eq!(rpo(Some((Epoch(9), Timestamp(4500))), 5000), 500);
        assert_eq!(rpo(Some((Epoch(9), Timestamp(10))), 5000), 4000, "an old one does not count");
        assert_eq!(rpo(Some((Epoch(8), Timestamp(4500))), 5000), 4000, "nor one about another point");
        assert_eq!(rpo(None, 500), 0, "our clock went back");
    }
}
