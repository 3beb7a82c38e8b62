//! A target that listens on loopback and says whom it serves, and offices that join it.

#![expect(clippy::disallowed_methods, reason = "a test that reads files and waits as a user would")]
#![allow(dead_code, reason = "each test uses its part")]

use cdp_protocol::bundle::Bundle;
use cdp_seams::clock::{Clock, SimClock, SystemClock};
use cdp_seams::line::{BoxFuture, Line};
use cdp_seams::random::SystemRandom;
use cdp_seams::storage::SystemStorage;
use cdp_seams::tls::Credentials;
use cdp_source::connect::{ConnectError, Identity, QuicConnector};
use cdp_source::join::{JoinError, Joined, join};
use cdp_target::authority::Authority;
use cdp_target::enroll::{Admitted, EnrollError, Invite};
use cdp_target::listener::{Listener, ListenerLimits, Refusal, Serve};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::mpsc;

/// Whatever a test waits for has to happen by then.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) struct Target {
    pub(crate) folder: TempDir,
    pub(crate) authority: Arc<Mutex<Authority>>,
    pub(crate) clock: Arc<SimClock>,
    pub(crate) listener: Arc<Listener>,
    pub(crate) address: SocketAddr,
    pub(crate) served: mpsc::UnboundedReceiver<Admitted>,
}

struct Sink(mpsc::UnboundedSender<Admitted>);

impl Serve for Sink {
    fn serve(&self, office: Admitted, line: Box<dyn Line>) -> BoxFuture<'static, ()> {
        let sender = self.0.clone();
        Box::pin(async move {
            let panics = office.name == "panics";
            sender.send(office).expect("the test listens");
            assert!(!panics, "the connection of this office panics, as the test wants it");
            line.closed().await;
        })
    }
}

/// The wall clock of the machine, as milliseconds.
pub(crate) fn now_ms() -> i64 {
    SystemClock::new().wall_ms()
}

pub(crate) fn authority(folder: &Path, clock: Arc<dyn Clock>) -> Authority {
    let names = ["backup.example.org".to_owned()];
    Authority::create(Arc::new(SystemStorage), clock, Arc::new(SystemRandom), folder, &names).expect("an authority")
}

impl Target {
    pub(crate) fn start(limits: ListenerLimits) -> Self {
        let (sender, served) = mpsc::unbounded_channel();
        Self { served, ..Self::start_serving(limits, Arc::new(Sink(sender))) }
    }

    /// A target whose lines `serve` gets; `served` tells nothing.
    pub(crate) fn start_serving(limits: ListenerLimits, serve: Arc<dyn Serve>) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let clock = Arc::new(SimClock::new(now_ms()));
        let authority = authority(&folder.path().join("authority"), clock.clone());
        let authority = Arc::new(Mutex::new(authority));
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = Listener::bind(any, authority.clone(), clock.clone(), limits).expect("a port");
        let listener = Arc::new(listener);
        let (_, served) = mpsc::unbounded_channel();
        let running = listener.clone();
        tokio::spawn(async move { running.run(serve).await });
        let address = listener.local_address().expect("bound");
        Self { folder, authority, clock, listener, address, served }
    }

    pub(crate) fn invite(&self, office: &str, replace: bool) -> Result<Bundle, EnrollError> {
        let targets = [self.address.to_string()];
        let valid_for = Duration::from_secs(24 * 3600);
        self.authority.lock().expect("not poisoned").invite(&Invite { office, targets: &targets, valid_for, replace })
    }

    /// An office that joined, on a machine with the right clock.
    pub(crate) async fn office(&self, name: &str) -> Office {
        let bundle = self.invite(name, false).expect("a bundle");
        let office = Office::new(self.clock.clone());
        office.join(bundle.to_text().as_bytes(), None).await.expect("joined");
        office
    }

    pub(crate) fn authority_key(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("authority/ca.key")).expect("the authority's key")
    }

    pub(crate) fn authority_certificate(&self) -> CertificateDer<'static> {
        self.authority.lock().expect("not poisoned").certificate().clone()
    }

    /// An honest office connects and is served.
    pub(crate) async fn serves(&mut self, office: &Office) -> Box<dyn Line> {
        let line = within(office.connect()).await.expect("an honest office is admitted");
        within(self.served.recv()).await.expect("and served");
        line
    }

    /// Waits until a refusal was counted.
    pub(crate) async fn counts(&self, cause: Refusal, at_least: u64) {
        eventually(&format!("{} refusals for {}", at_least, cause.label()), || {
            self.listener.refused(cause) >= at_least
        })
        .await;
    }
}

pub(crate) struct Office {
    pub(crate) state: TempDir,
    pub(crate) clock: Arc<SimClock>,
}

impl Office {
    pub(crate) fn new(clock: Arc<SimClock>) -> Self {
        Self { state: tempfile::tempdir().expect("a folder"), clock }
    }

    pub(crate) async fn join(&self, bundle: &[u8], target: Option<&str>) -> Result<Joined, JoinError> {
        within(join(bundle, target, Arc::new(SystemStorage), self.state.path(), self.clock.clone())).await
    }

    pub(crate) async fn connect(&self) -> Result<Box<dyn Line>, ConnectError> {
        let identity = Identity::load(&SystemStorage, self.state.path()).expect("an identity");
        QuicConnector::new(identity, self.clock.clone())?.line().await
    }

    pub(crate) fn credentials(&self) -> Credentials {
        let read = |name: &str| std::fs::read(self.state.path().join("identity").join(name)).expect("a file");
        Credentials {
            certificate: CertificateDer::from_pem_slice(&read("office.pem")).expect("a certificate"),
            key: PrivateKeyDer::from_pem_slice(&read("office.key")).expect("a key"),
        }
    }
}

pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("in time")
}

pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "not in time: {what}");
        tokio::task::yield_now().await;
    }
}
