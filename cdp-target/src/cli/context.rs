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
use std::sync::Arc;

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
