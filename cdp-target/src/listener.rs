//! The listener: QUIC connections are taken, authenticated, and handed on as lines of an office; offices join here too.
//!
//! Invariants: nobody but an office with a certificate in the registry, not revoked, is admitted, and no stream of anybody else
//! is accepted (but for the one exchange of `cdp-join/1`); whatever fails on the way refuses. What strangers can make us hold is
//! bounded by `ListenerLimits` and `cdp_seams::quic`. A panic in one connection ends that connection.
//!
//! TLS 1.2 needs no refusal: QUIC has none.

use crate::authority::{Authority, Fingerprint};
use crate::enroll::{Admitted, NotAdmitted, RedeemError, Redeemed};
use crate::listener::counters::{Counters, Gate};
use cdp_protocol::join::{self, JOIN_BYTES_MAX, JoinAnswer, JoinRefusal, JoinRequest, KnownGroup};
use cdp_protocol::message;
use cdp_protocol::units::{OfficeId, Timestamp};
use cdp_seams::clock::Clock;
use cdp_seams::line::{BoxFuture, Line};
use cdp_seams::quic::{self, CloseCode, QuicLine, TlsAlert};
use cdp_seams::tls::{self, TlsError};
use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, ConnectionError, Endpoint, Incoming};
use rustls::pki_types::CertificateDer;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

mod counters;

pub use counters::Refusal;

/// Bounds on what peers can make the listener do.
#[derive(Clone, Copy, Debug)]
pub struct ListenerLimits {
    /// Handshakes and join exchanges at a time; each holds about 64 KiB.
    pub handshakes_max: usize,
    /// Of those, from one address.
    pub handshakes_per_address_max: usize,
    /// Above so many handshakes a peer has to prove its address first (QUIC Retry), which costs us no memory.
    pub retry_above: usize,
    /// Connections of offices at a time.
    pub connections_max: usize,
    /// How long a handshake may take, and after it a join exchange.
    pub handshake_timeout: Duration,
}

impl Default for ListenerLimits {
    fn default() -> Self {
        Self {
            handshakes_max: 256,
            handshakes_per_address_max: 64,
            retry_above: 32,
            connections_max: 2048,
            handshake_timeout: Duration::from_secs(15),
        }
    }
}

/// Serves the lines of offices.
pub trait Serve: Send + Sync {
    /// The groups that an office has already. Blocks.
    fn groups(&self, office: OfficeId) -> Vec<KnownGroup> {
        let _ = office;
        Vec::new()
    }

    /// Serves one line until it ends. The line closes when it is dropped.
    fn serve(&self, office: Admitted, line: Box<dyn Line>) -> BoxFuture<'static, ()>;
}

/// Why the listener could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The UDP port is not to be had.
    #[error("listen: address={address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// The authority's or the server's certificate is not usable.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// The QUIC endpoint and everything that runs on it.
pub struct Listener {
    endpoint: Endpoint,
    shared: Arc<Shared>,
}

struct Shared {
    authority: Arc<Mutex<Authority>>,
    clock: Arc<dyn Clock>,
    limits: ListenerLimits,
    counters: Counters,
    handshakes: Arc<Gate>,
    connections: Arc<Semaphore>,
    /// Connections of offices, by quinn's id, from before their certificate is looked up: so that a certificate that is revoked
    /// meanwhile is found in one place or the other.
    live: Mutex<HashMap<usize, (Fingerprint, Connection)>>,
}

impl Listener {
    /// Binds the UDP port; nothing is answered before `run`.
    ///
    /// # Errors
    /// Where the port is taken, or the certificates are not usable.
    pub fn bind(
        address: SocketAddr,
        authority: Arc<Mutex<Authority>>,
        clock: Arc<dyn Clock>,
        limits: ListenerLimits,
    ) -> Result<Self, ListenError> {
        let (tls, secret) = {
            let authority = authority.lock().unwrap_or_else(PoisonError::into_inner);
            let protocols = [message::ALPN, join::ALPN];
            let tls = tls::server(authority.certificate(), authority.server().clone(), &protocols, Arc::clone(&clock))?;
            (tls, authority.endpoint_secret())
        };
        let endpoint =
            quic::server_endpoint(address, tls, &secret).map_err(|source| ListenError::Bind { address, source })?;
        let shared = Shared {
            authority,
            counters: Counters::new(Arc::clone(&clock)),
            clock,
            handshakes: Gate::new(limits.handshakes_max, limits.handshakes_per_address_max),
            connections: Arc::new(Semaphore::new(limits.connections_max)),
            live: Mutex::default(),
            limits,
        };
        Ok(Self { endpoint, shared: Arc::new(shared) })
    }

    /// The address the listener is bound to.
    ///
    /// # Errors
    /// As the operating system says.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Takes connections until `close`, then waits until all that is served has ended.
    pub async fn run(&self, serve: Arc<dyn Serve>) {
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                incoming = self.endpoint.accept() => match incoming {
                    Some(incoming) => self.take(incoming, &serve, &mut tasks),
                    None => break,
                },
                Some(ended) = tasks.join_next() => self.ended(ended.err()),
            }
        }
        while let Some(ended) = tasks.join_next().await {
            self.ended(ended.err());
        }
        self.endpoint.wait_idle().await;
    }

    /// Closes every connection; `run` ends.
    pub fn close(&self) {
        self.endpoint.close(CloseCode::Done.code(), b"the target is shutting down");
    }

    /// How often connections were refused for `cause`.
    #[must_use]
    pub fn refused(&self, cause: Refusal) -> u64 {
        self.shared.counters.refused(cause)
    }

    /// Handshakes and join exchanges that are under way.
    #[must_use]
    pub fn handshakes(&self) -> usize {
        self.shared.handshakes.inside()
    }

    /// Connections of offices.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.limits.connections_max - self.shared.connections.available_permits()
    }

    fn take(&self, incoming: Incoming, serve: &Arc<dyn Serve>, tasks: &mut JoinSet<()>) {
        let shared = &self.shared;
        let peer = incoming.remote_address();
        if shared.handshakes.inside() >= shared.limits.retry_above && !incoming.remote_address_validated() {
            // Fails only where the address is validated.
            let _ = incoming.retry();
            return;
        }
        let Some(place) = shared.handshakes.enter(peer.ip()) else {
            incoming.refuse();
            shared.counters.count(Refusal::Busy, peer, "too many handshakes at a time");
            return;
        };
        let (shared, serve) = (Arc::clone(shared), Arc::clone(serve));
        tasks.spawn(async move {
            if let Err((cause, detail)) = shared.connection(incoming, place, serve).await {
                shared.counters.count(cause, peer, &detail);
            }
        });
    }

    fn ended(&self, failure: Option<tokio::task::JoinError>) {
        if failure.is_some_and(|failure| failure.is_panic()) {
            self.shared.counters.panicked();
        }
    }
}

type Outcome<T = ()> = Result<T, (Refusal, String)>;

impl Shared {
    async fn connection(&self, incoming: Incoming, place: counters::Place, serve: Arc<dyn Serve>) -> Outcome {
        let connecting = incoming.accept().map_err(|error| failed_handshake(&error))?;
        let connection = match timeout(self.limits.handshake_timeout, connecting).await {
            Ok(connection) => connection.map_err(|error| failed_handshake(&error))?,
            Err(_) => return Err((Refusal::Timeout, "handshake not finished in time".to_owned())),
        };
        match protocol(&connection).as_deref() {
            Some(protocol) if protocol == message::ALPN => self.office(connection, place, serve).await,
            Some(protocol) if protocol == join::ALPN => {
                let exchange = timeout(self.limits.handshake_timeout, self.join(&connection, serve));
                exchange.await.unwrap_or(Err((Refusal::Timeout, "join not finished in time".to_owned())))
            }
            _ => {
                connection.close(CloseCode::Protocol.code(), b"no such protocol");
                Err((Refusal::Protocol, "no ALPN protocol in common".to_owned()))
            }
        }
    }

    async fn office(&self, connection: Connection, place: counters::Place, serve: Arc<dyn Serve>) -> Outcome {
        let refuse = |code: CloseCode, cause, detail: String| {
            connection.close(code.code(), detail.as_bytes());
            Err((cause, detail))
        };
        let Some(certificate) = certificate(&connection) else {
            return refuse(CloseCode::Unauthorized, Refusal::Certificate, "no client certificate".to_owned());
        };
        let _live = Live::new(self, Fingerprint::of(&certificate), connection.clone());
        let admitted = match self.admit(certificate).await {
            Ok(Ok(admitted)) => admitted,
            Ok(Err(NotAdmitted::Unknown)) => {
                return refuse(CloseCode::Unauthorized, Refusal::Unknown, NotAdmitted::Unknown.to_string());
            }
            Ok(Err(NotAdmitted::Revoked)) => {
                return refuse(CloseCode::Unauthorized, Refusal::Revoked, NotAdmitted::Revoked.to_string());
            }
            Err(AuthorityDown) => {
                return refuse(CloseCode::Failed, Refusal::Failed, "the registry of offices failed".to_owned());
            }
        };
        let Ok(_permit) = self.connections.try_acquire() else {
            return refuse(CloseCode::Busy, Refusal::Busy, "too many connections".to_owned());
        };
        drop(place);
        quic::admit(&connection);
        serve.serve(admitted, Box::new(QuicLine::accepted(connection))).await;
        Ok(())
    }

    async fn admit(
        &self,
        certificate: CertificateDer<'static>,
    ) -> Result<Result<Admitted, NotAdmitted>, AuthorityDown> {
        self.with_authority(move |authority| authority.admit(&certificate)).await
    }

    /// One request, one answer; the caller sees to it that it ends.
    async fn join(&self, connection: &Connection, serve: Arc<dyn Serve>) -> Outcome {
        let broken = |error: &dyn std::error::Error| (Refusal::Handshake, format!("join broken off: {error}"));
        quic::admit_one_exchange(connection);
        let (mut send, mut receive) = connection.accept_bi().await.map_err(|error| broken(&error))?;
        let bytes = receive.read_to_end(JOIN_BYTES_MAX).await.map_err(|error| {
            connection.close(CloseCode::Protocol.code(), b"not a join request");
            broken(&error)
        })?;
        let Ok(request) = message::decode::<JoinRequest>(&bytes) else {
            connection.close(CloseCode::Protocol.code(), b"not a join request");
            return Err((Refusal::Protocol, "not a join request".to_owned()));
        };
        let (answer, outcome) = self.redeem(request, serve).await;
        let delivery = async {
            send.write_all(&message::encode(&answer)).await?;
            send.finish()?;
            // Until the office has all of it; whether it has is its business.
            let _ = send.stopped().await;
            io::Result::Ok(())
        };
        if let Err(error) = delivery.await {
            tracing::warn!(peer = %connection.remote_address(), %error, "the answer to a join was not delivered");
        }
        outcome
    }

    async fn redeem(&self, request: JoinRequest, serve: Arc<dyn Serve>) -> (JoinAnswer, Outcome) {
        let time = Timestamp(self.clock.wall_ms());
        let refused = |reason: JoinRefusal| JoinAnswer::Refused { reason, time };
        match self.with_authority(move |authority| authority.redeem(&request)).await {
            Ok(Ok(redeemed)) => {
                tracing::info!(office = redeemed.name, "office enrolled");
                let Redeemed { office, name, certificate } = redeemed;
                // From here on the hardware before is kept out: its line too, if it has one.
                self.close_revoked().await;
                let groups = tokio::task::spawn_blocking(move || serve.groups(office)).await.unwrap_or_default();
                (JoinAnswer::Welcome { office, name, certificate, time, groups }, Ok(()))
            }
            Ok(Err(error)) => {
                if let RedeemError::Authority(failure) = &error {
                    tracing::error!(error = failure as &dyn std::error::Error, "an office could not be enrolled");
                }
                (refused(error.refusal()), Err((Refusal::Join, error.to_string())))
            }
            Err(AuthorityDown) => {
                (refused(JoinRefusal::Failed), Err((Refusal::Failed, "the registry of offices failed".to_owned())))
            }
        }
    }

    /// Closes the connections of certificates that no longer admit anyone.
    async fn close_revoked(&self) {
        let live: Vec<(Fingerprint, Connection)> = self.live_connections().values().cloned().collect();
        let revoked = move |authority: &mut Authority| {
            let is_revoked = |fingerprint| authority.admit_fingerprint(fingerprint).is_err();
            live.into_iter().filter(|(fingerprint, _)| is_revoked(*fingerprint)).collect::<Vec<_>>()
        };
        for (_, connection) in self.with_authority(revoked).await.unwrap_or_default() {
            connection.close(CloseCode::Unauthorized.code(), NotAdmitted::Revoked.to_string().as_bytes());
        }
    }

    /// Runs `work` on a thread that may block. Once a panic has left the authority in an unknown state, nobody is admitted any
    /// more until a restart.
    async fn with_authority<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Authority) -> T + Send + 'static,
    ) -> Result<T, AuthorityDown> {
        let authority = Arc::clone(&self.authority);
        let run = move || authority.lock().map(|mut authority| work(&mut authority)).map_err(|_| AuthorityDown);
        tokio::task::spawn_blocking(run).await.unwrap_or(Err(AuthorityDown))
    }

    fn live_connections(&self) -> std::sync::MutexGuard<'_, HashMap<usize, (Fingerprint, Connection)>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The authority cannot be asked.
struct AuthorityDown;

/// Keeps a connection in `live` for as long as it is served.
struct Live<'a> {
    shared: &'a Shared,
    id: usize,
}

impl<'a> Live<'a> {
    fn new(shared: &'a Shared, fingerprint: Fingerprint, connection: Connection) -> Self {
        let id = connection.stable_id();
        shared.live_connections().insert(id, (fingerprint, connection));
        Self { shared, id }
    }
}

impl Drop for Live<'_> {
    fn drop(&mut self) {
        self.shared.live_connections().remove(&self.id);
    }
}

fn protocol(connection: &Connection) -> Option<Vec<u8>> {
    connection.handshake_data()?.downcast::<HandshakeData>().ok()?.protocol
}

fn certificate(connection: &Connection) -> Option<CertificateDer<'static>> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.into_iter().next()
}

fn failed_handshake(error: &ConnectionError) -> (Refusal, String) {
    let cause = match (TlsAlert::of(error), error) {
        (Some(alert @ TlsAlert::Sent(_)), _) if alert.is_about_certificate() => Refusal::Certificate,
        (Some(alert), _) if alert.is_about_protocol() => Refusal::Protocol,
        (None, ConnectionError::TimedOut) => Refusal::Timeout,
        _ => Refusal::Handshake,
    };
    (cause, error.to_string())
}
