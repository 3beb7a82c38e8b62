//! A report on groups that no source has opened yet reads their segments once, and again only when they changed.

mod journal_support;

use cdp_protocol::units::{OfficeId, Timestamp};
use cdp_seams::storage::Storage;
use cdp_seams::storage::sim::SimStorage;
use cdp_target::config::{Config, LISTEN_DEFAULT};
use cdp_target::journal::{GroupJournal, JournalLimits};
use cdp_target::status::KnownGroups;
use cdp_target::store::{self, GroupPlace, Store, StoreError};
use journal_support::{GROUP, Source, identity};
use std::path::Path;
use std::sync::Arc;

#[test]
fn a_group_that_is_not_open_is_read_again_only_where_its_files_changed() {
    let disk = SimStorage::new(3);
    let storage: Arc<dyn Storage> = Arc::new(disk.clone());
    let config = Config::new(LISTEN_DEFAULT, vec![]);
    let made =
        store::init(&storage, Path::new("/store"), &config, Timestamp(0), |_| Ok::<_, StoreError>("0".repeat(32)));
    made.expect("made");
    let store = Store::open(Arc::clone(&storage), Path::new("/store")).expect("opened");
    let place = GroupPlace { office: OfficeId([1; 16]), group: GROUP };
    let (folder, limits) = (store.group_folder(place), JournalLimits::default());
    let mut journal = GroupJournal::create(storage, &folder, identity(), limits).expect("made");
    let mut source = Source::new(3);
    source.grant(&mut journal).expect("granted");

    let known = KnownGroups::default();
    let read = || {
        let before = disk.calls();
        let facts = known.facts(&store, place).expect("read");
        (facts, disk.calls() - before)
    };
    let mut repeated = Vec::new();
    for points in 1..=4 {
        source.make(false, 3);
        source.send(&mut journal, 0, usize::MAX).expect("sent");
        source.sync(&mut journal).expect("synced");
        let (facts, first) = read();
        assert_eq!((facts.overview.points, facts.name.as_str()), (points, "main"));
        let (again, second) = read();
        assert_eq!(again, facts);
        assert!(second < first, "{second} calls where {first} read it all");
        repeated.push(second);
    }
    let newest = source.points.last().expect("a point").head.epoch;
    journal.label(newest, Some("named")).expect("labelled");
    let labelled = read().0.overview.newest.and_then(|(point, _)| point.label);
    assert_eq!(labelled.as_deref(), Some("named"), "the manifest changed, the segment did not");
    assert!(repeated.windows(2).all(|pair| pair[0] == pair[1]), "{repeated:?}");
}
