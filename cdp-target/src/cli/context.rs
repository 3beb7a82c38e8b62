//! What a command starts from: the store, the clock, a running server where there is one.

use super::arguments::DataFolder;
use super::failure::Failure;
use crate::authority::Authority;
use crate::control::{Reply, Request, ask};
use crate::store::Store;
use cdp_protocol::units::Timestamp;
use cdp_seams::clock::{Clock, SystemClock};
use cdp_seams::random::SystemRandom;
use cdp_seams::storage::{Storage, SystemStorage};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::signal::unix::{SignalKind, signal};

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

/// Turns true when the operator ends the command. Not where the output is stdout: there is nothing to clean up there, and
/// the signal may end us while we wait for the reader.
pub(super) fn stop_on_signal(output: &Path) -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    if output.as_os_str() == "-" {
        return stop;
    }
    let flag = Arc::clone(&stop);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        let waited = runtime.and_then(|runtime| {
            runtime.block_on(async {
                let mut interrupt = signal(SignalKind::interrupt())?;
                let mut terminate = signal(SignalKind::terminate())?;
                tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
                Ok(())
            })
        });
        match waited {
            Ok(()) => flag.store(true, Ordering::Relaxed),
            Err(error) => tracing::warn!(%error, "signals are not handled: an unfinished image may be left behind"),
        }
    });
    stop
}
