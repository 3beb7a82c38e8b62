//! The store's offices and groups by the names people use.
//!
//! Reads beside a running server and changes nothing; the exceptions, `write_label`, `write_pin`, `write_change` and `write_resolution`, say that they need the lock.
//! Where no server runs and its last one left frames without their proof, whoever reads first recovers the group.
//! Folders carry ids; names come from the register of offices and from each group's own manifest.

use crate::authority::{Authority, AuthorityError};
use crate::enroll::Office;
use crate::journal::change::Change;
use crate::journal::lease::{self, Lease};
use crate::journal::{GroupJournal, GroupView, JournalError, JournalLimits, Manifest, Overview, Point, short_claim};
use crate::points::{PointInfo, PointTimes, point_time, time_doubt};
use crate::restore::image::one_line;
use crate::restore::keyring::Keyring;
use crate::store::{GroupPlace, Store, StoreError};
use cdp_protocol::escrow::{Envelope, EscrowError};
use cdp_protocol::units::{Epoch, Timestamp};
use cdp_seams::random::SystemRandom;
use std::sync::Arc;

/// The offices and groups of a store.
pub struct Catalog {
    store: Store,
    authority: Authority,
}

/// A group, opened to read.
pub struct Group {
    place: GroupPlace,
    view: Arc<GroupView>,
}

/// Why something is not in the catalogue or cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// No office of that name.
    #[error("there is no office {name}{}", closest(name, known))]
    NoOffice {
        /// The name.
        name: String,
        /// The offices there are.
        known: Vec<String>,
    },
    /// No group of that name in the office.
    #[error("office {office} has no group {name}{}", closest(name, known))]
    NoGroup {
        /// The office's name.
        office: String,
        /// The group's name.
        name: String,
        /// The groups there are.
        known: Vec<String>,
    },
    /// No volume of that name in the group.
    #[error("the point has no volume {name}, it has {}", known.join(", "))]
    NoVolume {
        /// The name.
        name: String,
        /// The volumes there are.
        known: Vec<String>,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The register of offices.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// A group's journal.
    #[error("open group {group} of office {office}")]
    Journal {
        /// The office's name.
        office: String,
        /// The group's id: its name may be what cannot be read.
        group: String,
        /// Why.
        source: JournalError,
    },
    /// A group's data key.
    #[error("open the data key of group {group}")]
    Key {
        /// The group's name.
        group: String,
        /// Why.
        source: EscrowError,
    },
}

/// "; did you mean …?" where one is near.
fn closest(name: &str, known: &[String]) -> String {
    let near = known.iter().min_by_key(|known| strsim::damerau_levenshtein(known, name));
    let near = near.filter(|known| strsim::damerau_levenshtein(known, name) <= 3);
    near.map_or_else(String::new, |near| format!("; did you mean {near}?"))
}

impl Catalog {
    /// The catalogue of an open store.
    #[must_use]
    pub fn new(store: &Store, authority: Authority) -> Self {
        Self { store: store.clone(), authority }
    }

    /// The offices, in the order in which they were enrolled.
    #[must_use]
    pub fn offices(&self) -> &[Office] {
        self.authority.offices()
    }

    /// Finds an office.
    ///
    /// # Errors
    /// Where there is none of that name.
    pub fn office(&self, name: &str) -> Result<&Office, CatalogError> {
        self.offices().iter().find(|office| office.name == name).ok_or_else(|| CatalogError::NoOffice {
            name: name.to_owned(),
            known: self.offices().iter().map(|office| office.name.clone()).collect(),
        })
    }

    /// Opens a group.
    ///
    /// # Errors
    /// Where there is none of that name, or it cannot be read.
    pub fn group(&self, office: &str, name: &str) -> Result<Group, CatalogError> {
        let office = self.office(office)?;
        let mut known = Vec::new();
        let mut failed = None;
        for place in self.store.groups(office.id)? {
            match open_group(&self.store, place) {
                Ok(group) if group.name() == name => return Ok(group),
                Ok(group) => known.push(group.name().to_owned()),
                Err(source) => failed = Some((place, source)),
            }
        }
        // A group that cannot be read may well be the one.
        Err(match failed {
            Some((place, source)) => {
                CatalogError::Journal { office: office.name.clone(), group: place.group.to_string(), source }
            }
            None => CatalogError::NoGroup { office: office.name.clone(), name: name.to_owned(), known },
        })
    }

    /// The group's data keys, out of escrow.
    ///
    /// # Errors
    /// Where an envelope does not open.
    pub fn keys(&self, group: &Group) -> Result<Keyring, CatalogError> {
        let escrow = self.authority.escrow();
        let open = |envelope: &Envelope| {
            let opened = escrow.open(&group.place.group, envelope);
            opened.map_err(|source| CatalogError::Key { group: group.name().to_owned(), source })
        };
        let manifest = group.view.manifest();
        let older = manifest.older_envelopes.iter().rev().map(open).collect::<Result<Vec<_>, _>>()?;
        Ok(Keyring::new(open(&manifest.identity.envelope)?, older))
    }
}

/// Opens a group's history from its files, once what a server that is gone left without its proof is recovered.
///
/// # Errors
/// Where it cannot be read.
pub fn open_group(store: &Store, place: GroupPlace) -> Result<Group, JournalError> {
    let group = read_group(store, place)?;
    if group.view.unproven_bytes() > 0 && recover(store, place)? { read_group(store, place) } else { Ok(group) }
}

/// Makes durable what the last server left without its proof, acked points among it; `false` where a server runs, or where
/// nobody may write here.
fn recover(store: &Store, place: GroupPlace) -> Result<bool, JournalError> {
    let _lock = match store.lock() {
        Ok(lock) => lock,
        // Its server does it.
        Err(StoreError::InUse { .. }) => return Ok(false),
        Err(error) => {
            let error = one_line(&error);
            tracing::warn!(group = %place.group, error, "frames without a proof are not shown: nobody may write to the store");
            return Ok(false);
        }
    };
    let limits = JournalLimits { segment_bytes_max: store.config().segment_bytes_max };
    GroupJournal::open(Arc::clone(store.storage()), &store.group_folder(place), limits).map(|_| true)
}

/// Opens a group's history from its files. Again where the server began another segment meanwhile: the files it was put
/// together from may then not belong together.
///
/// # Errors
/// Where it cannot be read.
fn read_group(store: &Store, place: GroupPlace) -> Result<Group, JournalError> {
    let (storage, folder) = (store.storage(), store.group_folder(place));
    for _ in 0..OPEN_ATTEMPTS {
        let view = GroupView::open(Arc::clone(storage), &folder);
        let (manifest, _) = Manifest::read(storage.as_ref(), &folder)?;
        match view {
            Ok(view) if view.manifest().open == manifest.open => return Ok(Group { place, view: Arc::new(view) }),
            Ok(_) | Err(_) => {}
        }
    }
    let view = GroupView::open(Arc::clone(storage), &folder)?;
    Ok(Group { place, view: Arc::new(view) })
}

/// How often a history is opened anew when its server is faster.
const OPEN_ATTEMPTS: usize = 4;

impl Group {
    /// A group that a server has open.
    #[must_use]
    pub const fn served(place: GroupPlace, view: Arc<GroupView>) -> Self {
        Self { place, view }
    }

    /// Where it is in the store.
    #[must_use]
    pub const fn place(&self) -> GroupPlace {
        self.place
    }

    /// Its name within its office.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.view.identity().name
    }

    /// Its history.
    #[must_use]
    pub const fn view(&self) -> &Arc<GroupView> {
        &self.view
    }

    /// Opened again, with what its manifest names held against pruning until the lease is dropped; none where nothing can be
    /// written here, and so nothing pruned.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn held(&self, store: &Store) -> Result<(Self, Option<Lease>), JournalError> {
        let lease = lease::hold(store.storage(), &store.group_folder(self.place), &SystemRandom)?;
        Ok((open_group(store, self.place)?, lease))
    }

    /// Its recovery points, oldest first.
    ///
    /// # Errors
    /// Where a segment cannot be read: what would be left out is not to be missed silently.
    pub fn points(&self) -> Result<Vec<PointInfo>, JournalError> {
        points_of(&self.view)
    }

    /// How many recovery points it has, and the newest with its time: without listing them.
    ///
    /// # Errors
    /// Where a segment cannot be read.
    pub fn overview(&self) -> Result<Overview, JournalError> {
        self.view.overview()
    }
}

/// The recovery points of a history, oldest first.
///
/// # Errors
/// Where a segment cannot be read.
pub fn points_of(view: &GroupView) -> Result<Vec<PointInfo>, JournalError> {
    let mut before = None;
    let unreadable = view.unreadable();
    let verified = verified(view);
    let points = view.all_points().map(|known| {
        let known = known?;
        let time = point_time(known.times, before);
        before = Some(time);
        let Some(point) = known.point else { return Ok(None) };
        let mut blocks = 0;
        if unreadable.any(point.epoch) {
            blocks = unreadable.blocks(point.epoch, &view.volumes(point.epoch)?);
        }
        let place = verified.partition_point(|(last, _)| *last < point.epoch);
        let at = verified.get(place).and_then(|(_, at)| *at).filter(|_| point.damaged.is_none());
        Ok(Some(PointInfo { verified: at, ..info(point, time, blocks) }))
    });
    points.filter_map(Result::transpose).collect()
}

/// Up to which point all sealed segments were last read again when: by the oldest of their readings, for the last point of
/// each segment that has any.
fn verified(view: &GroupView) -> Vec<(Epoch, Option<Timestamp>)> {
    let record = view.scrub_record();
    // All points stand on the checkpoint where the journal's content begins, where there is one.
    let mut oldest = Some(Timestamp(i64::MAX));
    for pack in view.packs_of_the_floor() {
        oldest = oldest.zip(record.clean_at(pack)).map(|(oldest, read)| oldest.min(read));
    }
    let sealed = view.manifest().sealed.iter().filter_map(|sealed| {
        oldest = oldest.zip(record.clean_at(sealed.id())).map(|(oldest, read)| oldest.min(read));
        Some((sealed.points?.last, oldest))
    });
    sealed.collect()
}

/// `unreadable`: blocks of it that the source's device could not read, in its own cut or in one before.
fn info(point: Point, time: Timestamp, unreadable: u64) -> PointInfo {
    let rollback = point.after_rollback_to.map(|to| format!("after rollback to {to}"));
    let unreadable = (unreadable > 0).then(|| format!("{unreadable} blocks unreadable at the source"));
    let recaptured = point.meters.recaptured_blocks;
    let recaptured = (recaptured > 0)
        .then(|| format!("{recaptured} blocks captured again: writes to them may have been missed before"));
    let damaged = point.damaged.as_ref().map(|what| format!("damaged: {what}"));
    let doubt = time_doubt(PointTimes { cut: point.cut_time, received: point.received }, time);
    let warnings: Vec<String> = [damaged, unreadable, recaptured, rollback, doubt].into_iter().flatten().collect();
    PointInfo {
        epoch: point.epoch,
        first_epoch: point.first_epoch,
        time,
        cut_time: point.cut_time,
        received: point.received,
        class: point.class,
        label: point.label,
        pinned: point.pinned,
        bytes: point.bytes,
        cut_us: point.meters.cut_us,
        cut_rounds: point.meters.cut_rounds,
        volumes: point.volumes,
        layouts: point.layouts,
        verified: None,
        damaged: point.damaged,
        warning: (!warnings.is_empty()).then(|| warnings.join("; ")),
    }
}

/// Gives a point a label. The caller holds the store's lock.
///
/// # Errors
/// Where the group cannot be opened or written.
pub fn write_label(store: &Store, place: GroupPlace, epoch: Epoch, label: &str) -> Result<(), JournalError> {
    open_to_write(store, place)?.label(epoch, Some(label))
}

/// Keeps a point from pruning, or no longer. The caller holds the store's lock.
///
/// # Errors
/// Where the group cannot be opened or written.
pub fn write_pin(store: &Store, place: GroupPlace, epoch: Epoch, pinned: bool) -> Result<(), JournalError> {
    open_to_write(store, place)?.pin(epoch, pinned)
}

/// Gives a change that was prepared its place in the manifest. The caller holds the store's lock.
///
/// # Errors
/// Where the group cannot be opened or written, or the change does not fit any more.
pub fn write_change(store: &Store, place: GroupPlace, change: &Change) -> Result<(), JournalError> {
    open_to_write(store, place)?.adopt(change)
}

/// Ends a fork; gives the end of the history that goes on, as people read it. The caller holds the store's lock.
///
/// # Errors
/// Where the group cannot be opened or written, is not forked, or no history ends at `continue_from`.
pub fn write_resolution(store: &Store, place: GroupPlace, continue_from: &str) -> Result<String, JournalError> {
    let head = short_claim(open_to_write(store, place)?.resolve(continue_from)?);
    tracing::warn!(group = %place.group, head, "fork resolved by an operator");
    Ok(head)
}

fn open_to_write(store: &Store, place: GroupPlace) -> Result<GroupJournal, JournalError> {
    let limits = JournalLimits { segment_bytes_max: store.config().segment_bytes_max };
    Ok(GroupJournal::open(Arc::clone(store.storage()), &store.group_folder(place), limits)?.0)
}
