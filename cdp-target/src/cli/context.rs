//! What a command starts from: the store, the clock, a running server where there is one.

use super::arguments::DataFolder;
use super::failure::Failure;
use crate::authority::Authority;
use crate::control::{Reply, Request, ask};
use crate::store::{Store, StoreError, StoreLock};
use cdp_protocol::units::Timestamp;
use cdp_seams::clock::{Clock, SystemClock};
use cdp_seams::random::SystemRandom;
use cdp_seams::storage::{Storage, SystemStorage};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// How long a command waits for a server that is starting, or for another command, to let it in.
const START_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a server waits for a command that has the lock.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(2);
/// How often it looks. Nothing announces that another process lets go of a lock.
const START_LOOK: Duration = Duration::from_millis(20);

/// Who does what a command wants.
pub(super) enum Done {
    /// The running server did it, and answered.
    Served(serde_json::Value),
    /// No server runs: the command does it itself, under the lock.
    Locked(StoreLock),
}

/// The machine's storage.
pub(super) fn storage() -> Arc<dyn Storage> {
    Arc::new(SystemStorage)
}

/// The time, for ages and labels.
pub(super) fn now() -> Timestamp {
    Timestamp(SystemClock::new().wall_ms())
}

/// Opens the store a command names.
pub(super) fn open(data: &DataFolder) -> Result<Store, Failure> {
    Ok(Store::open(storage(), &data.folder)?)
}

/// Opens the store's authority.
pub(super) fn authority(store: &Store) -> Result<Authority, Failure> {
    let (clock, random) = (Arc::new(SystemClock::new()), Arc::new(SystemRandom));
    Ok(Authority::open(Arc::clone(store.storage()), clock, random, &store.authority_folder())?)
}

/// Has the running server do something; `None` where none runs.
pub(super) fn ask_server(store: &Store, request: &Request) -> Result<Option<serde_json::Value>, Failure> {
    match ask(&store.socket(), request)? {
        None => Ok(None),
        Some(Reply::Done(value)) => Ok(Some(value)),
        Some(Reply::Failed { error, hint, user }) => Err(Failure::reported(user, error, hint)),
    }
}

/// Has the running server do something, or takes the store's lock where none runs. A server that is starting has the
/// lock a moment before it has its socket, so this looks again for a while where there is neither.
pub(super) fn serve_or_lock(store: &Store, request: &Request) -> Result<Done, Failure> {
    let clock = SystemClock::new();
    loop {
        if let Some(answer) = ask_server(store, request)? {
            return Ok(Done::Served(answer));
        }
        match store.lock() {
            Ok(lock) => return Ok(Done::Locked(lock)),
            Err(StoreError::InUse { .. }) if look_again(&clock, START_TIMEOUT) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes the store's lock for a server. A command may have it for a moment, to recover a group.
pub(super) fn lock_to_serve(store: &Store) -> Result<StoreLock, Failure> {
    let clock = SystemClock::new();
    loop {
        match store.lock() {
            Err(StoreError::InUse { .. }) if look_again(&clock, COMMAND_TIMEOUT) => {}
            other => return Ok(other?),
        }
    }
}

/// Waits a little; `false` where the time is over.
fn look_again(clock: &SystemClock, timeout: Duration) -> bool {
    let in_time = clock.monotonic() < timeout;
    if in_time {
        std::thread::sleep(START_LOOK);
    }
    in_time
}

/// Turns true when the operator ends the command. Not where the output is stdout: there is nothing to clean up there, and
/// the signal may end us while we wait for the reader.
pub(super) fn stop_on_signal(output: &Path) -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    if output.as_os_str() != "-" {
        let flag = Arc::clone(&stop);
        on_signal(move || flag.store(true, Ordering::Relaxed));
    }
    stop
}

/// Does something when the operator ends the command, in a thread of its own: from here on the signal alone does not end us.
pub(super) fn on_signal(action: impl FnOnce() + Send + 'static) {
    let (handled, is_handled) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        let waited = runtime.and_then(|runtime| {
            runtime.block_on(async {
                let mut interrupt = signal(SignalKind::interrupt())?;
                let mut terminate = signal(SignalKind::terminate())?;
                drop(handled);
                tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
                Ok(())
            })
        });
        match waited {
            Ok(()) => action(),
            Err(error) => tracing::warn!(%error, "signals are not handled: what is unfinished may be left behind"),
        }
    });
    // From here on a signal does not end us half-way. An error means that there is nothing more to wait for.
    let _ = is_handled.recv();
}
