//! The point as NBD exports, for as long as the operator's script runs.
//!
//! Invariant: read-only, on a socket in the drill's own folder, and gone when the script is.

use super::Drill;
use crate::authority::Authority;
use crate::nbd::exports::Exports;
use crate::nbd::points::Points;
use crate::nbd::server::Server;
use crate::nbd::socket::{Address, Listener};
use cdp_seams::random::SystemRandom;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The socket's name in the drill's folder.
const SOCKET: &str = "nbd.sock";

impl Drill<'_> {
    /// Does `work` while the volumes are served, each by its name; it is told on which socket, or why they are not.
    pub(super) fn with_exports<T>(&self, folder: &Path, work: impl FnOnce(anyhow::Result<PathBuf>) -> T) -> T {
        let stop = Arc::new(AtomicBool::new(false));
        let server = match self.server(&folder.join(SOCKET), &stop) {
            Ok(server) => server,
            Err(error) => return work(Err(error)),
        };
        std::thread::scope(|threads| {
            threads.spawn(|| server.run().inspect_err(|error| tracing::warn!(%error, "the exports of a drill")));
            let done = work(Ok(folder.join(SOCKET)));
            stop.store(true, Ordering::Relaxed);
            done
        })
    }

    fn server(&self, socket: &Path, stop: &Arc<AtomicBool>) -> anyhow::Result<Server> {
        let (storage, random) = (Arc::clone(self.store.storage()), Arc::new(SystemRandom));
        let authority = Authority::open(storage, Arc::clone(&self.clock), random, &self.store.authority_folder())?;
        let points = Points::new(self.store, authority, self.office, self.group.name(), Arc::clone(&self.clock));
        let point = points.open(&self.point.epoch.to_string())?;
        let listener = Listener::bind(&Address::Unix(socket.to_owned()))?;
        Ok(Server::new(listener, Exports::new(points, point, None), None, Arc::clone(&self.clock), Arc::clone(stop)))
    }
}
