//! The receiver: connections of sources, their messages and frames, brought to the threads that own the groups.
//!
//! Owns which group has which thread, and what a connection may do before and after its hello. A frame is read header
//! first; its place in memory is taken before its bytes are. Whatever a source does wrong ends its own connection, with a
//! reason, and nothing else; what was taken of an unfinished attempt stays and is gone on with. What frames mean and
//! when they are durable is the business of `group` and of the store behind it.

mod connection;
mod group;
mod live;
mod recall;
#[cfg(feature = "sim")]
pub mod steps;
mod store_api;

pub use connection::ConnectionError;
pub use live::{LiveGroup, Unchanged};
pub use store_api::{Changed, GroupStore, GroupWriter, PointReader, StoreError};

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use cdp_protocol::units::{Extent, GroupId, VolumeSlot};
use cdp_seams::clock::Clock;
use cdp_seams::line::Line;
use cdp_seams::pulse;
use tokio::sync::{Semaphore, mpsc};

use group::{Command, GroupThread};

/// Bytes of frames a group may have between its line and its journal: half a second of 16 MiB/s.
const RECEIVE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// What a frame counts at least, so that small ones are bounded too: 8 MiB / 2 KiB are 4,096 of them.
const FRAME_CHARGE_MIN: usize = 2 * 1024;
/// Commands a group may have waiting: its frames, and room for the rest.
const COMMANDS_MAX: usize = RECEIVE_BYTES_MAX / FRAME_CHARGE_MIN + 256;

/// Serves the connections of all offices.
pub struct Receiver {
    store: Arc<dyn GroupStore>,
    clock: Arc<dyn Clock>,
    software: String,
    groups: Mutex<HashMap<(String, GroupId), Group>>,
    numbers: AtomicU64,
}

struct Group {
    handle: GroupHandle,
    live: Arc<Mutex<LiveGroup>>,
    thread: JoinHandle<()>,
}

/// The way to a group's thread.
#[derive(Clone)]
struct GroupHandle {
    commands: mpsc::Sender<Command>,
    room: Arc<Semaphore>,
}

impl Receiver {
    /// A receiver over a store; `software` is what sources are told about this program.
    #[must_use]
    pub fn new(store: Arc<dyn GroupStore>, clock: Arc<dyn Clock>, software: impl Into<String>) -> Arc<Self> {
        let software = software.into();
        Arc::new(Self { store, clock, software, groups: Mutex::default(), numbers: AtomicU64::new(1) })
    }

    /// Serves one connection of `office` until it ends. The office comes from the certificate alone.
    ///
    /// # Errors
    /// Why it ended: that the source went away is one of the reasons.
    pub async fn serve_connection(self: Arc<Self>, line: Box<dyn Line>, office: &str) -> Result<(), ConnectionError> {
        connection::serve(self, Arc::from(line), office.to_owned()).await
    }

    /// Every group that was opened since the server started, with its office.
    #[must_use]
    pub fn live(&self) -> Vec<(String, GroupId, LiveGroup)> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let copy = |live: &Mutex<LiveGroup>| live.lock().unwrap_or_else(PoisonError::into_inner).clone();
        groups.iter().map(|((office, group), entry)| (office.clone(), *group, copy(&entry.live))).collect()
    }

    /// How many threads of groups run.
    #[must_use]
    pub fn threads(&self) -> usize {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.values().filter(|group| !group.thread.is_finished()).count()
    }

    /// Runs `work` on the group's own thread, with its writer: for commands that change something. Does not wait for it.
    pub async fn with_group(
        self: &Arc<Self>,
        office: &str,
        group: GroupId,
        work: impl FnOnce(Result<&mut dyn GroupWriter, StoreError>) + Send + 'static,
    ) {
        // The thread ends only once its handles are gone, so the command arrives.
        let _ = self.group(office, group).commands.send(Command::Run(Box::new(work))).await;
    }

    /// Asks the source that has the group open, if one has, for blocks that are damaged here: at most as many extents as fit a
    /// message.
    pub async fn send_again(self: &Arc<Self>, office: &str, group: GroupId, volume: VolumeSlot, extents: Vec<Extent>) {
        let _ = self.group(office, group).commands.send(Command::SendAgain { volume, extents }).await;
    }

    /// Ends the threads of all groups once they have made durable what they hold. Connections have to be gone before.
    /// Blocks.
    pub fn close(&self) {
        let groups = std::mem::take(&mut *self.groups.lock().unwrap_or_else(PoisonError::into_inner));
        for (_, Group { handle, thread, .. }) in groups {
            drop(handle);
            if thread.join().is_err() {
                tracing::error!("the thread of a group ended in a panic");
            }
        }
    }

    /// The group's thread, started if it does not run.
    fn group(&self, office: &str, group: GroupId) -> GroupHandle {
        let key = (office.to_owned(), group);
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = groups.get(&key).filter(|running| !running.handle.commands.is_closed()) {
            return running.handle.clone();
        }
        // Those of groups that were never made: an office that asks for one after the other is not to fill the memory.
        groups.retain(|_, known| !known.thread.is_finished());
        let started = self.start(office, group);
        let handle = started.handle.clone();
        groups.insert(key, started);
        handle
    }

    fn start(&self, office: &str, group: GroupId) -> Group {
        let (commands, queue) = mpsc::channel(COMMANDS_MAX);
        let live = Arc::new(Mutex::new(LiveGroup::default()));
        let state = GroupThread::new(office, group, self.store.clone(), self.clock.clone(), live.clone());
        let name = format!("group-{}", &group.to_string()[..8]);
        let spawned = std::thread::Builder::new().name(name.clone()).spawn(move || {
            let _entered = pulse::enter(&name);
            state.run(queue);
        });
        let thread = spawned.expect("the machine has threads for as many groups as it serves");
        Group { handle: GroupHandle { commands, room: Arc::new(Semaphore::new(RECEIVE_BYTES_MAX)) }, live, thread }
    }

    /// A number no session or connection of this server has had.
    fn number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }
}
