//! What changes a group's manifest on behalf of a command: the running server, or the command itself where none runs.

use super::arguments::GroupPath;
use super::context::{self, Done};
use super::failure::Failure;
use crate::catalog::{Catalog, Group, open_group, write_change};
use crate::control::Request;
use crate::journal::change::Change;
use crate::journal::{GroupView, JournalError};
use crate::maintenance::{Hold, hold, refused};
use crate::prune::Owner;
use crate::restore::image::one_line;
use crate::restore::keyring::Keyring;
use crate::store::{GroupPlace, Store};
use std::sync::Arc;

/// The writer of a group, as a command reaches it.
pub(super) struct CommandOwner<'a> {
    store: &'a Store,
    path: &'a GroupPath,
    place: GroupPlace,
}

impl<'a> CommandOwner<'a> {
    pub(super) const fn new(store: &'a Store, path: &'a GroupPath, place: GroupPlace) -> Self {
        Self { store, path, place }
    }
}

impl Owner for CommandOwner<'_> {
    fn adopt(&mut self, change: &Change) -> Result<Arc<GroupView>, JournalError> {
        let GroupPath { office, group, .. } = self.path.clone();
        let request = Request::Adopt { office, group, change: change.clone() };
        // A server may start or end meanwhile: each change finds out anew whose it is.
        match context::serve_or_lock(self.store, &request).map_err(|failure| refused(failure.into_error()))? {
            Done::Served(_) => {}
            Done::Locked(_lock) => write_change(self.store, self.place, change)?,
        }
        Ok(Arc::clone(open_group(self.store, self.place)?.view()))
    }

    fn is_leased(&mut self) -> Result<bool, JournalError> {
        let GroupPath { office, group, .. } = self.path.clone();
        let answer = context::ask_server(self.store, &Request::Leased { office, group });
        let answer = answer.map_err(|failure| refused(failure.into_error()))?;
        // Without a server there is no view but those of commands, which hold leases of their own.
        Ok(answer.is_some_and(|answer| answer.as_bool().unwrap_or(true)))
    }
}

/// Takes the right to build in the group's folder.
pub(super) fn hold_group(store: &Store, group: &Group) -> Result<Hold, Failure> {
    let held = hold(store.storage().as_ref(), &store.group_folder(group.place()))?;
    held.ok_or_else(|| {
        Failure::mistake("a checkpoint or a prune of the group is under way")
            .hint("wait for it; the server does both by itself when they are due")
    })
}

/// The group's keys; none, with a word about it, where the target does not have them.
pub(super) fn keys(catalog: &Catalog, group: &Group) -> Option<Keyring> {
    let keys = catalog.keys(group);
    keys.inspect_err(|error| tracing::warn!(error = one_line(error), "no key: frames are kept whole")).ok()
}
