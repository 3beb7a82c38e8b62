//! The store's groups as the receiver writes them: journals behind its `GroupStore`.
//!
//! Owns which folder a group is in, and that a name is one group's within its office. The receiver keeps one thread a
//! group, which alone calls the writer made here; the views of what is durable are shared with whoever reports.

use crate::journal::change::Change;
use crate::journal::file::FileId;
use crate::journal::{
    Damage, Fork, GroupIdentity, GroupJournal, GroupView, JournalError, JournalLimits, Manifest, Point, PointVolume,
};
use crate::metrics;
use crate::recall::StoredPoint;
use crate::receiver::{Changed, GroupStore, GroupWriter, PointReader, StoreError};
use crate::store::{GroupPlace, Store};
use cdp_protocol::frame::Frame;
use cdp_protocol::holding::Holding;
use cdp_protocol::join::{KNOWN_GROUPS_MAX, KnownGroup};
use cdp_protocol::limits::{MESSAGE_EXTENTS_MAX, OFFICE_GROUPS_MAX};
use cdp_protocol::message::{OpenGroup, PointSummary};
use cdp_protocol::session::chain::{Chain, Step};
use cdp_protocol::session::lineage::{Line, Lineage};
use cdp_protocol::session::target::{Claim, Ruling};
use cdp_protocol::units::{Epoch, Extent, Generation, GroupId, Head, OfficeId, Timestamp, VolumeSlot};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The groups of a store, for the receiver.
pub struct StoreGroups {
    store: Store,
    limits: JournalLimits,
    /// Offices by name, as they were admitted.
    offices: Mutex<HashMap<String, OfficeId>>,
    views: Arc<Views>,
    /// Held while a group is made: two threads are not both to find the last place free.
    making: Mutex<()>,
}

/// What is durable of each open group.
#[derive(Default)]
struct Views(Mutex<HashMap<GroupPlace, Arc<GroupView>>>);

/// An office that was not admitted on this server.
#[derive(Debug, thiserror::Error)]
#[error("office {0} is not known to the server")]
struct UnknownOffice(String);

impl Views {
    fn lock(&self) -> MutexGuard<'_, HashMap<GroupPlace, Arc<GroupView>>> {
        // Every change is one insert or remove: nothing is half done after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StoreGroups {
    /// The groups of a store whose lock is held.
    #[must_use]
    pub fn new(store: Store) -> Self {
        let limits = JournalLimits { segment_bytes_max: store.config().segment_bytes_max };
        Self { store, limits, offices: Mutex::default(), views: Arc::default(), making: Mutex::default() }
    }

    /// The same with bounds that no configuration may set: segments of a few frames, for simulations.
    #[cfg(feature = "sim")]
    #[must_use]
    pub const fn with_limits(mut self, limits: JournalLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Lets an office's groups be opened: the receiver knows offices by name, the store by id.
    pub fn admit(&self, name: &str, office: OfficeId) {
        self.offices.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), office);
    }

    /// What is durable of a group, where it is open.
    #[must_use]
    pub fn view(&self, place: GroupPlace) -> Option<Arc<GroupView>> {
        self.views.lock().get(&place).cloned()
    }

    /// Where a group of an office that was admitted is.
    pub(crate) fn place(&self, office: &str, group: GroupId) -> Result<GroupPlace, StoreError> {
        let offices = self.offices.lock().unwrap_or_else(PoisonError::into_inner);
        let office = offices.get(office).copied().ok_or_else(|| UnknownOffice(office.to_owned()));
        office.map(|office| GroupPlace { office, group }).map_err(|error| StoreError::Failed(error.into()))
    }

    /// The groups of an office, by name: what its new hardware has to go on with. One that cannot be read is left out.
    #[must_use]
    pub fn known(&self, office: OfficeId) -> Vec<KnownGroup> {
        let places = self.store.groups(office).unwrap_or_else(|error| {
            tracing::error!(%office, %error, "the groups of an office cannot be listed");
            Vec::new()
        });
        let known = places.into_iter().filter_map(|place| {
            let read = Manifest::read(self.store.storage().as_ref(), &self.store.group_folder(place));
            let manifest =
                read.inspect_err(|error| tracing::error!(group = %place.group, %error, "not told at a join"));
            Some(KnownGroup { name: manifest.ok()?.0.identity.name, group: place.group })
        });
        known.take(KNOWN_GROUPS_MAX).collect()
    }

    fn open_journal(&self, place: GroupPlace) -> Result<Box<dyn GroupWriter>, StoreError> {
        let folder = self.store.group_folder(place);
        let (journal, report) =
            GroupJournal::open(Arc::clone(self.store.storage()), &folder, self.limits).map_err(failed)?;
        if report.torn_bytes > 0 {
            tracing::info!(group = %place.group, bytes = report.torn_bytes, "cut off a torn tail that was never acked");
        }
        for damage in &report.damages {
            let (segment, offset, what) = (damage.segment, damage.offset, &damage.what);
            tracing::error!(group = %place.group, segment, offset, what, "damaged: `cdp-target verify` names the points");
        }
        Ok(self.writer(place, journal))
    }

    fn writer(&self, place: GroupPlace, journal: GroupJournal) -> Box<dyn GroupWriter> {
        self.views.lock().insert(place, journal.view());
        Box::new(JournalWriter { journal, place, store: self.store.clone(), views: Arc::clone(&self.views) })
    }
}

/// Whether another group of the office has the name.
fn is_taken(store: &Store, place: GroupPlace, name: &str) -> Result<bool, StoreError> {
    let others = store.groups(place.office).map_err(|error| StoreError::Failed(error.into()))?;
    for other in others.into_iter().filter(|other| *other != place) {
        let folder = store.group_folder(other);
        match Manifest::read(store.storage().as_ref(), &folder) {
            Ok((manifest, _)) if manifest.identity.name == name => return Ok(true),
            Ok(_) => {}
            // A group that cannot be read is not to keep the others of its office from going on.
            Err(error) => tracing::error!(group = %other.group, %error, "the manifest of a group cannot be read"),
        }
    }
    Ok(false)
}

impl GroupStore for StoreGroups {
    fn open_or_create(&self, office: &str, request: &OpenGroup) -> Result<Box<dyn GroupWriter>, StoreError> {
        let place = self.place(office, request.group)?;
        let known = self.store.groups(place.office).map_err(|error| StoreError::Failed(error.into()))?;
        if known.contains(&place) {
            return self.open_journal(place);
        }
        let _making = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let groups = self.store.groups(place.office).map_err(|error| StoreError::Failed(error.into()))?.len();
        if groups >= OFFICE_GROUPS_MAX {
            return Err(StoreError::TooMany(groups));
        }
        if is_taken(&self.store, place, &request.name)? {
            return Err(StoreError::NameTaken);
        }
        let identity = GroupIdentity {
            group: request.group,
            office: office.to_owned(),
            name: request.name.clone(),
            envelope: request.envelope.clone(),
        };
        let (storage, folder) = (Arc::clone(self.store.storage()), self.store.group_folder(place));
        let journal = GroupJournal::create(storage, &folder, identity, self.limits).map_err(failed)?;
        tracing::info!(office, group = request.name, "new group");
        Ok(self.writer(place, journal))
    }

    fn open(&self, office: &str, group: GroupId) -> Result<Box<dyn GroupWriter>, StoreError> {
        self.open_journal(self.place(office, group)?)
    }

    fn has(&self, office: &str, group: GroupId) -> bool {
        let Ok(place) = self.place(office, group) else { return false };
        // Where the folder cannot be listed, to open the group tells why.
        self.store.groups(place.office).map_or(true, |known| known.contains(&place))
    }
}

/// A journal as the receiver's writer.
struct JournalWriter {
    journal: GroupJournal,
    place: GroupPlace,
    store: Store,
    views: Arc<Views>,
}

impl JournalWriter {
    fn publish(&self) {
        self.views.lock().insert(self.place, self.journal.view());
    }
}

impl Drop for JournalWriter {
    fn drop(&mut self) {
        self.views.lock().remove(&self.place);
    }
}

impl GroupWriter for JournalWriter {
    fn chain(&self) -> &Chain {
        self.journal.chain()
    }

    fn made_in(&self, point: Head) -> Result<Option<Generation>, StoreError> {
        self.journal.made_in(point).map_err(failed)
    }

    fn lineage(&self) -> &Lineage {
        self.journal.lineage()
    }

    fn ruling(&self) -> &Ruling {
        self.journal.ruling()
    }

    fn identify(&mut self, request: &OpenGroup) -> Result<(), StoreError> {
        let known = self.journal.identity();
        if known.name == request.name && known.envelope == request.envelope {
            return Ok(());
        }
        if known.name != request.name && is_taken(&self.store, self.place, &request.name)? {
            return Err(StoreError::NameTaken);
        }
        let identity =
            GroupIdentity { name: request.name.clone(), envelope: request.envelope.clone(), ..known.clone() };
        self.journal.set_identity(identity).map_err(failed)?;
        self.publish();
        Ok(())
    }

    fn begin(&mut self, line: Line) -> Result<(), StoreError> {
        self.journal.begin(line).map_err(failed)?;
        self.publish();
        Ok(())
    }

    fn append(&mut self, frame: &Frame<'_>, received: Timestamp) -> Result<Step, StoreError> {
        let step = self.journal.append(frame, received).map_err(failed)?;
        if let Step::Committed(_, commit) = &step {
            let identity = self.journal.identity();
            metrics::committed(&identity.office, &identity.name, &PointVolume::of(commit, self.journal.volumes()));
        }
        Ok(step)
    }

    fn sync(&mut self) -> Result<(), StoreError> {
        self.journal.sync().map_err(failed)?;
        self.publish();
        Ok(())
    }

    fn frozen(&self) -> Option<String> {
        self.journal.frozen().map(str::to_owned)
    }

    fn freeze(&mut self, reason: &str, fork: Option<Fork>) -> Result<(), StoreError> {
        self.journal.freeze(reason, fork).map_err(failed)?;
        self.publish();
        Ok(())
    }

    fn resolve(&mut self, head: &str) -> Result<Claim, StoreError> {
        let chosen = self.journal.resolve(head).map_err(failed)?;
        self.publish();
        Ok(chosen)
    }

    fn points(&self, after: Option<Epoch>, max: usize) -> Result<Vec<PointSummary>, StoreError> {
        let points = self.journal.view().points_after(after.unwrap_or_default(), max).map_err(failed)?;
        Ok(points.into_iter().map(Point::summary).collect())
    }

    fn changes_since(&self, since: Head) -> Result<Option<Vec<Changed>>, StoreError> {
        let Some(changes) = self.journal.view().changes_since(since).map_err(failed)? else { return Ok(None) };
        let messages = changes.iter().flat_map(|(slot, extents)| {
            extents.chunks(MESSAGE_EXTENTS_MAX).map(|extents| {
                let plain = |extent: &Extent| (extent.start, extent.count);
                (*slot, extents.iter().map(plain).collect())
            })
        });
        Ok(Some(messages.collect()))
    }

    fn holdings(&self, head: Head, slot: VolumeSlot, blocks: Extent) -> Result<Option<Vec<Holding>>, StoreError> {
        self.journal.view().holdings(head, slot, blocks).map_err(failed)
    }

    fn reader(&self) -> Option<Box<dyn PointReader>> {
        let (place, views, own) = (self.place, Arc::clone(&self.views), self.journal.view());
        let newest = move || views.lock().get(&place).cloned().unwrap_or_else(|| Arc::clone(&own));
        Some(Box::new(StoredPoint::new(self.store.clone(), place, Box::new(newest))))
    }

    fn label(&mut self, epoch: Epoch, label: Option<&str>) -> Result<(), StoreError> {
        self.journal.label(epoch, label).map_err(failed)?;
        self.publish();
        Ok(())
    }

    fn pin(&mut self, epoch: Epoch, pinned: bool) -> Result<(), StoreError> {
        self.journal.pin(epoch, pinned).map_err(failed)?;
        self.publish();
        Ok(())
    }

    fn adopt(&mut self, change: &Change) -> Result<(), StoreError> {
        self.journal.adopt(change).map_err(failed)?;
        self.publish();
        Ok(())
    }

    fn oldest_lease(&self) -> Option<u64> {
        self.journal.oldest_lease()
    }

    fn note_damages(&mut self, file: FileId, damages: &[Damage]) -> Result<(), StoreError> {
        self.journal.note_damages(file, damages).map_err(failed)?;
        self.publish();
        Ok(())
    }

    fn look_again(&mut self) {
        self.journal.look_again();
        self.publish();
    }
}

/// What the receiver has to tell apart.
fn failed(error: JournalError) -> StoreError {
    match error {
        JournalError::Chain(error) => StoreError::Chain(error),
        error if error.is_full() => StoreError::Full(crate::restore::image::one_line(&error)),
        error => StoreError::Failed(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, LISTEN_DEFAULT};
    use cdp_protocol::escrow::Envelope;
    use cdp_protocol::message::Instance;
    use cdp_protocol::units::KeyId;
    use cdp_seams::storage::{Storage, SystemStorage};

    fn request(group: u8, name: &str) -> OpenGroup {
        OpenGroup {
            group: GroupId([group; 16]),
            name: name.to_owned(),
            generation: None,
            acked: vec![],
            sent: vec![],
            parts: None,
            parts_sent: vec![],
            anew: false,
            instance: Instance::default(),
            envelope: Envelope { key: KeyId([1; 8]), encapsulated: vec![2; 32], sealed: vec![3; 48] },
            volumes: vec![],
        }
    }

    #[test]
    fn a_name_is_one_groups_within_its_office() {
        let folder = tempfile::tempdir().expect("a folder");
        let storage: Arc<dyn Storage> = Arc::new(SystemStorage);
        let config = Config::new(LISTEN_DEFAULT, vec![]);
        crate::store::init(&storage, folder.path(), &config, Timestamp(0), |_| {
            Ok::<_, crate::store::StoreError>("0".repeat(32))
        })
        .expect("made");
        let groups = StoreGroups::new(Store::open(storage, folder.path()).expect("opened"));
        assert!(matches!(groups.open_or_create("paris", &request(1, "main")), Err(StoreError::Failed(_))));
        groups.admit("paris", OfficeId([1; 16]));
        groups.admit("lyon", OfficeId([2; 16]));
        let place = GroupPlace { office: OfficeId([1; 16]), group: GroupId([1; 16]) };

        let mut main = groups.open_or_create("paris", &request(1, "main")).expect("made");
        assert!(matches!(groups.open_or_create("paris", &request(2, "main")), Err(StoreError::NameTaken)));
        drop(groups.open_or_create("lyon", &request(3, "main")).expect("another office"));
        let mut other = groups.open_or_create("paris", &request(2, "other")).expect("made");
        assert!(matches!(other.identify(&request(2, "main")), Err(StoreError::NameTaken)));
        main.identify(&request(1, "renamed")).expect("free");
        assert_eq!(groups.view(place).expect("open").identity().name, "renamed");
        other.identify(&request(2, "main")).expect("free now");

        drop(main);
        assert!(groups.view(place).is_none(), "no view outlives its writer");
        let main = groups.open("paris", GroupId([1; 16])).expect("there");
        assert_eq!(main.chain().head(), None);
        assert!(matches!(groups.open("paris", GroupId([9; 16])), Err(StoreError::Failed(_))));
    }
}
