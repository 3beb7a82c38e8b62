//! Points of a store for their own sources: finds the point that a source names, and the keys to it.
//!
//! What is told of an open point is `restore/recalled`'s. Where the group's key is not to be had out of escrow, a point is read without it.

use crate::authority::Authority;
use crate::catalog::{Catalog, Group, points_of};
use crate::journal::GroupView;
use crate::points::PointName;
use crate::receiver::PointReader;
use crate::restore::image::one_line;
use crate::restore::keyring::Keyring;
use crate::restore::recalled::{Recalled, Tell};
use crate::store::{GroupPlace, Store};
use cdp_protocol::recall::{OpenedPoint, Question};
use cdp_protocol::units::{Timestamp, VolumeSlot};
use cdp_seams::clock::SystemClock;
use cdp_seams::random::SystemRandom;
use std::sync::Arc;

/// Gives the newest view of the group.
pub(crate) type Newest = Box<dyn Fn() -> Arc<GroupView> + Send>;

/// Reads one point of a group that the server has open.
pub(crate) struct StoredPoint {
    store: Store,
    place: GroupPlace,
    newest: Newest,
    point: Option<Recalled>,
}

impl StoredPoint {
    pub(crate) const fn new(store: Store, place: GroupPlace, newest: Newest) -> Self {
        Self { store, place, newest, point: None }
    }

    /// The group's keys, out of escrow; none where they are not to be had: then nothing is opened here.
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

impl PointReader for StoredPoint {
    fn open(&mut self, at: &str, now: Timestamp) -> Result<OpenedPoint, String> {
        let view = (self.newest)();
        let name = PointName::parse(at, now).map_err(|error| one_line(&error))?;
        let points = points_of(&view).map_err(|error| one_line(&error))?;
        let info = name.find(&points).map_err(|error| one_line(&error))?;
        let keys = self.keys(&view);
        let point = Recalled::new(view, info.epoch, keys, &SystemRandom).map_err(|error| one_line(&error))?;
        let opened = OpenedPoint {
            head: point.head(),
            cut_time: info.cut_time,
            class: info.class,
            label: info.label.clone(),
            volumes: point.volumes().to_vec(),
            has_key: point.has_key(),
        };
        self.point = Some(point);
        Ok(opened)
    }

    fn answer(&mut self, slot: VolumeSlot, question: &Question, tell: &mut Tell<'_>) -> Result<(), String> {
        let newest = (self.newest)();
        let point = self.point.as_mut().ok_or("no point is open")?;
        point.answer(&newest, slot, question, tell).map_err(|error| one_line(&error))
    }
}
