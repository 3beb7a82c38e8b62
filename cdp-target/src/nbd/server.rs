//! The server: who is let in, how many, and how it ends.
//!
//! Invariant: at most `CONNECTIONS_MAX` clients that were admitted have a place at once, and strangers take none of these: `STRANGERS_MAX` are
//! heard at a time, and the one that was not admitted for the longest gives way to the next. Who is admitted and finds no place hears so.
//! At the end nobody new is let in, requests that were taken are answered, and what was written is flushed.

use super::ahead::Ahead;
use super::channel::Channel;
use super::connection::Connection;
use super::exports::Exports;
use super::handshake::Handshake;
use super::overlay::OverlayError;
use super::socket::{Listener, Socket};
use super::tls::Tls;
use cdp_seams::clock::Clock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Clients that are served at once.
pub const CONNECTIONS_MAX: usize = 64;
/// Clients that are heard at once before they are admitted.
const STRANGERS_MAX: usize = 16;
/// Strangers that gave way, whose threads have not noticed yet: beyond them the next connection waits a little, or is closed as it comes.
const GONE_MAX: usize = 48;
/// How often the server looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);
/// Time for requests that were taken, at the end.
const END_TIME: Duration = Duration::from_secs(3);

/// What all connections share.
pub(super) struct Shared {
    pub(super) exports: Exports,
    /// Where connections have to be encrypted.
    pub(super) tls: Option<Tls>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) ahead: Ahead,
    stop: Arc<AtomicBool>,
    clients: Mutex<Clients>,
    /// One has gone.
    gone: Condvar,
}

#[derive(Default)]
struct Clients {
    /// By their numbers, which rise.
    there: BTreeMap<u64, Client>,
    count: u64,
}

struct Client {
    socket: Socket,
    standing: Standing,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// It was not admitted yet.
    Stranger,
    /// It has a place.
    Admitted,
    /// It had to give way.
    Gone,
}

impl Clients {
    fn count(&self, standing: Standing) -> usize {
        self.there.values().filter(|client| client.standing == standing).count()
    }

    /// Makes room for one more stranger; `false` where there is none.
    fn make_room(&mut self) -> bool {
        if self.count(Standing::Gone) >= GONE_MAX {
            return false;
        }
        if self.count(Standing::Stranger) >= STRANGERS_MAX {
            let oldest = self.there.values_mut().find(|client| client.standing == Standing::Stranger);
            let oldest = oldest.expect("there are as many as may be");
            oldest.standing = Standing::Gone;
            oldest.socket.shut(Shutdown::Both);
        }
        true
    }
}

/// A server that listens.
pub struct Server {
    listener: Listener,
    shared: Arc<Shared>,
}

impl Shared {
    pub(super) fn is_ending(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Gives a client that is admitted its place; `false` where there is none.
    pub(super) fn admit(&self, number: u64) -> bool {
        let mut clients = self.clients();
        let has_place = clients.count(Standing::Admitted) < CONNECTIONS_MAX;
        match clients.there.get_mut(&number) {
            Some(client) if client.standing == Standing::Stranger && has_place => {
                client.standing = Standing::Admitted;
                true
            }
            _ => false,
        }
    }

    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Server {
    /// A server of `exports`, until `stop` turns true.
    #[must_use]
    pub fn new(
        listener: Listener,
        exports: Exports,
        tls: Option<Tls>,
        clock: Arc<dyn Clock>,
        stop: Arc<AtomicBool>,
    ) -> Self {
        let (ahead, clients) = (Ahead::start(), Mutex::default());
        Self { listener, shared: Arc::new(Shared { exports, tls, clock, ahead, stop, clients, gone: Condvar::new() }) }
    }

    /// Serves; gives once all has ended.
    ///
    /// # Errors
    /// Where what was written could not be made durable at the end.
    pub fn run(self) -> Result<(), OverlayError> {
        while !self.shared.is_ending() {
            match self.next() {
                Ok(Some(socket)) => self.hear(socket),
                Ok(None) => {}
                // Among others: too many open files. It is looked at again when the time of a look is over.
                Err(error) => {
                    tracing::warn!(%error, "a client cannot be let in");
                    wait(&[], LOOK);
                }
            }
        }
        drop(self.listener);
        end(&self.shared);
        self.shared.exports.flush()
    }

    /// The next client, or nobody for a while.
    fn next(&self) -> io::Result<Option<Socket>> {
        wait(&[PollFd::new(&self.listener, PollFlags::IN)], LOOK);
        match self.listener.accept() {
            Ok(socket) => Ok(Some(socket)),
            Err(error) if is_nobody(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn hear(&self, socket: Socket) {
        let clients = self.shared.clients();
        let too_many = |clients: &mut Clients| clients.count(Standing::Gone) >= GONE_MAX;
        let waited = self.shared.gone.wait_timeout_while(clients, LOOK, too_many);
        let mut clients = waited.unwrap_or_else(PoisonError::into_inner).0;
        if !clients.make_room() {
            tracing::debug!("a client is turned away: too many connections");
            return;
        }
        let Ok(another) = socket.another() else { return };
        clients.count += 1;
        let number = clients.count;
        clients.there.insert(number, Client { socket: another, standing: Standing::Stranger });
        drop(clients);
        let shared = Arc::clone(&self.shared);
        let serve = move || {
            let _place = PlaceOf { shared: &shared, number };
            serve(&shared, socket, number);
        };
        if let Err(error) = std::thread::Builder::new().name("nbd".into()).spawn(serve) {
            tracing::warn!(%error, "a client is turned away: no thread for it");
            self.shared.clients().there.remove(&number);
        }
    }
}

/// A client's place among the others, until dropped.
struct PlaceOf<'a> {
    shared: &'a Shared,
    number: u64,
}

impl Drop for PlaceOf<'_> {
    fn drop(&mut self) {
        self.shared.clients().there.remove(&self.number);
        self.shared.gone.notify_all();
    }
}

/// One client, from the greeting to the end.
fn serve(shared: &Shared, socket: Socket, number: u64) {
    let channel = Arc::new(Channel::new(socket));
    match Handshake::new(shared, Arc::clone(&channel), number).run() {
        Ok(Some(served)) => Connection::new(shared, &channel, served).run(),
        Ok(None) => {}
        Err(error) => tracing::debug!(%error, "a handshake ends"),
    }
    channel.close();
}

/// Ends the connections: what was taken is answered first, as far as clients take the answers in time.
fn end(shared: &Shared) {
    let mut clients = shared.clients();
    clients.there.values().for_each(|client| client.socket.shut(Shutdown::Read));
    let deadline = shared.clock.monotonic() + END_TIME;
    while !clients.there.is_empty() {
        let left = deadline.saturating_sub(shared.clock.monotonic());
        if left.is_zero() {
            break;
        }
        let waited = shared.gone.wait_timeout(clients, left);
        clients = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
    clients.there.values().for_each(|client| client.socket.shut(Shutdown::Both));
}

/// Waits for something to come, for a while.
fn wait(fds: &[PollFd<'_>], timeout: Duration) {
    let timeout = Timespec { tv_sec: 0, tv_nsec: timeout.subsec_nanos().into() };
    // A signal ends it early, which is as well.
    let _ = poll(&mut fds.to_vec(), Some(&timeout));
}

fn is_nobody(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted)
}
