//! The server's own upkeep, look by look: what a failure leaves undone, and how often a group is opened.

#![expect(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

mod cli_support;

use cdp_protocol::units::Epoch;
use cdp_seams::clock::SimClock;
use cdp_seams::random::SystemRandom;
use cdp_seams::storage::SystemStorage;
use cdp_target::authority::Authority;
use cdp_target::catalog::{Catalog, open_group, write_change};
use cdp_target::journal::change::Change;
use cdp_target::maintenance::{Looks, Maintenance};
use cdp_target::store::{GroupPlace, Store};
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::Duration;

const HOUR: Duration = Duration::from_secs(3600);
const DAY_MS: i64 = 86_400_000;
/// Of the three points, minutes apart, the first stands for its day and the last is the newest; a checkpoint is due.
const START_MS: i64 = cli_support::START_MS + 8 * DAY_MS;

/// A store with a group, and what its server does for itself.
struct Upkeep {
    _files: cli_support::Store,
    store: Store,
    place: GroupPlace,
    clock: Arc<SimClock>,
    looks: RefCell<Looks>,
    /// Changes that the group's writer does not take.
    to_refuse: Cell<u32>,
    taken: RefCell<Vec<Change>>,
    is_open: bool,
}

impl Upkeep {
    fn new(is_open: bool) -> Self {
        let files = cli_support::Store::new();
        files.fill();
        let store = Store::open(Arc::new(SystemStorage), &files.data()).expect("a store");
        let clock = Arc::new(SimClock::new(START_MS));
        let catalog = catalog(&store, &clock);
        let office = catalog.offices().iter().next().expect("an office").id;
        let place = store.groups(office).expect("listed")[0];
        let (looks, to_refuse, taken) = Default::default();
        Self { _files: files, store, place, clock, looks, to_refuse, taken, is_open }
    }

    /// One look; gives the changes that were taken.
    fn look(&self) -> Vec<Change> {
        let (_running, ended) = mpsc::channel();
        let maintenance = Maintenance {
            store: &self.store,
            catalog: &|| Ok(catalog(&self.store, &self.clock)),
            view: &|place| self.is_open.then(|| Arc::clone(open_group(&self.store, place).expect("opened").view())),
            change: &|_, place, change| {
                if self.to_refuse.get() > 0 {
                    self.to_refuse.set(self.to_refuse.get() - 1);
                    anyhow::bail!("the group's thread is busy");
                }
                self.taken.borrow_mut().push(change.clone());
                Ok(write_change(&self.store, place, change)?)
            },
            is_leased: &|_, _| Ok(false),
            clock: &*self.clock,
            random: &SystemRandom,
        };
        maintenance.look(&mut self.looks.borrow_mut(), &ended);
        self.taken.take()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.store.group_folder(self.place).join(name)
    }

    fn epochs(&self) -> Vec<u64> {
        let group = open_group(&self.store, self.place).expect("opened");
        group.points().expect("listed").iter().map(|point| point.epoch.0).collect()
    }
}

fn catalog(store: &Store, clock: &Arc<SimClock>) -> Catalog {
    let (storage, clock) = (Arc::clone(store.storage()), Arc::clone(clock));
    let authority = Authority::open(storage, clock, Arc::new(SystemRandom), &store.authority_folder());
    Catalog::new(store, authority.expect("an authority"))
}

/// The clock of retention as it is kept, in hours since the start.
fn kept_hours(upkeep: &Upkeep) -> i64 {
    let text = std::fs::read(upkeep.path("retention-clock")).expect("kept");
    let kept: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    (kept["now"].as_i64().expect("a number") - START_MS) / 3_600_000
}

fn is_checkpoint_at_3(change: &Change) -> bool {
    matches!(change, Change::Checkpoint(made) if made.epoch == Epoch(3))
}

#[test]
fn a_checkpoint_that_cannot_be_made_does_not_keep_points_from_going() {
    let upkeep = Upkeep::new(true);
    upkeep.to_refuse.set(1);
    let taken = upkeep.look();
    assert!(matches!(taken.first(), Some(Change::Remove { .. })), "{taken:?}");
    assert_eq!(upkeep.epochs(), [1, 3]);
    // It is tried again with the next prune, and not every minute.
    upkeep.clock.advance(Duration::from_secs(60));
    assert_eq!(upkeep.look(), []);
    upkeep.clock.advance(HOUR);
    let taken = upkeep.look();
    assert!(taken.iter().any(is_checkpoint_at_3), "{taken:?}");
}

#[test]
fn a_clock_that_jumps_while_the_server_runs_is_believed_an_hour_and_no_more() {
    let upkeep = Upkeep::new(false);
    let jump = |days: i64| {
        upkeep.clock.advance(HOUR);
        upkeep.clock.set_wall_ms(START_MS + days * DAY_MS);
        upkeep.look();
        kept_hours(&upkeep)
    };
    assert_eq!(jump(0), 0);
    assert_eq!(jump(20), 2, "an hour went by, and an hour's slack");
    assert_eq!(jump(21), 3, "the slack does not add up");
    // An operator confirms that it is right.
    let accepted = serde_json::json!({ "now": START_MS + 21 * DAY_MS });
    std::fs::write(upkeep.path("retention-clock"), accepted.to_string()).expect("written");
    upkeep.clock.advance(HOUR);
    upkeep.look();
    assert_eq!(kept_hours(&upkeep), 21 * 24 + 1);
    // A server that starts knows no better than what was written down.
    upkeep.looks.take();
    assert_eq!(jump(40), 40 * 24);
}

#[test]
fn a_group_that_nobody_has_open_is_opened_where_pruning_is_due() {
    for is_open in [false, true] {
        let upkeep = Upkeep::new(is_open);
        upkeep.clock.set_wall_ms(cli_support::START_MS + DAY_MS / 2);
        assert_eq!(upkeep.look(), [], "nothing is due yet");
        let lock = upkeep.path("maintenance.lock");
        std::fs::remove_file(&lock).expect("it was looked at");
        // A week later by the clock, a minute later in truth: a checkpoint is due.
        upkeep.clock.set_wall_ms(START_MS);
        upkeep.clock.advance(Duration::from_secs(60));
        assert_eq!(upkeep.look().iter().any(is_checkpoint_at_3), is_open);
        assert_eq!(lock.exists(), is_open);
        upkeep.clock.advance(HOUR);
        assert_eq!(upkeep.look().iter().any(is_checkpoint_at_3), !is_open);
        assert!(lock.exists());
    }
}
