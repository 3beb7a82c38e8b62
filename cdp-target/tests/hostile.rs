//! Strangers and impostors on the QUIC port: none is served, none stops the server, and after each an honest office connects.
//!
//! TLS 1.2 has no row: QUIC carries TLS 1.3 only (RFC 9001, 4.2), and rustls cannot be made to offer less over it.

#![expect(clippy::disallowed_methods, reason = "a test that reads the target's own files")]

mod support;

use cdp_protocol::{join, message};
use cdp_seams::clock::Clock;
use cdp_seams::line::BoxFuture;
use cdp_seams::quic;
use cdp_seams::random::{Random, SimRandom};
use cdp_seams::tls::{self, Credentials};
use cdp_source::connect::{Identity, QuicConnector};
use cdp_target::listener::{ListenerLimits, Refusal};
use quinn::{Connection, ConnectionError};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::{Office, Target, now_ms, within};
use tokio::net::UdpSocket;
use tokio::task::JoinHandle;

/// Dials as anybody may, and gives back the connection if its handshake went through.
async fn dial(target: &Target, own: Option<Credentials>, protocol: &[u8]) -> Result<Connection, ConnectionError> {
    let clock: Arc<dyn Clock> = target.clock.clone();
    let tls = tls::client(&target.authority_certificate(), own, protocol, clock).expect("usable certificates");
    let endpoint = quic::client_endpoint(target.address, tls).expect("a port");
    within(endpoint.connect(target.address, "localhost").expect("a connection")).await
}

/// Dials, and asserts that the target ends the connection without ever letting it open a stream.
async fn is_refused(target: &mut Target, what: &str, own: Option<Credentials>, protocol: &[u8]) {
    let refused = async {
        let connection = dial(target, own, protocol).await?;
        tokio::select! {
            stream = connection.open_bi() => stream.map(|_| "a control stream"),
            stream = connection.open_uni() => stream.map(|_| "a stream of frames"),
        }
    };
    match within(refused).await {
        Err(ConnectionError::TimedOut) => panic!("{what}: not refused, but left alone"),
        Err(_) => {}
        Ok(stream) => panic!("{what}: got {stream}"),
    }
    assert!(target.served.try_recv().is_err(), "{what}: was served");
}

/// A certificate with our authority's true signature that the registry does not know, valid for `days` from now.
fn forged(target: &Target, usage: ExtendedKeyUsagePurpose, days: std::ops::Range<i64>) -> Credentials {
    let authority_key = KeyPair::from_pem(&target.authority_key()).expect("the authority's key");
    let issuer = Issuer::from_ca_cert_der(&target.authority_certificate(), authority_key).expect("an issuer");
    let at =
        |days: i64| rcgen::date_time_ymd(1970, 1, 1) + Duration::from_millis((now_ms() + days * 24 * 3_600_000) as u64);
    let mut params = CertificateParams::new(["localhost".to_owned()]).expect("a name");
    params.subject_alt_names.push(SanType::URI("cdp:office:00".try_into().expect("an address")));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    (params.not_before, params.not_after) = (at(days.start), at(days.end));
    let key = KeyPair::generate().expect("a key");
    let certificate = params.signed_by(&key, &issuer).expect("signed");
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Credentials { certificate: certificate.der().clone(), key }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_but_a_known_office_gets_a_stream() {
    let mut target = Target::start(ListenerLimits::default());
    let honest = target.office("honest").await;
    let revoked = target.office("revoked").await;
    let bundle = target.invite("revoked", true).expect("replaced");
    Office::new(target.clock.clone()).join(bundle.to_text().as_bytes(), None).await.expect("joined on other hardware");
    let elsewhere = Target::start(ListenerLimits::default()).office("honest").await;
    let server = target.authority.lock().expect("not poisoned").server().clone();
    let client_auth = ExtendedKeyUsagePurpose::ClientAuth;
    let unknown = forged(&target, client_auth.clone(), -1..10);
    let expired = forged(&target, client_auth.clone(), -10..-1);
    let too_early = forged(&target, client_auth, 1..10);
    let for_a_server = forged(&target, ExtendedKeyUsagePurpose::ServerAuth, -1..10);

    let rows: Vec<(&str, Option<Credentials>, &[u8], Refusal)> = vec![
        ("no certificate", None, message::ALPN, Refusal::Certificate),
        ("another authority", Some(elsewhere.credentials()), message::ALPN, Refusal::Certificate),
        ("signed, but not registered", Some(unknown), message::ALPN, Refusal::Unknown),
        ("revoked", Some(revoked.credentials()), message::ALPN, Refusal::Revoked),
        ("expired", Some(expired), message::ALPN, Refusal::Certificate),
        ("not valid yet", Some(too_early), message::ALPN, Refusal::Certificate),
        ("the server's own certificate", Some(server), message::ALPN, Refusal::Certificate),
        ("a certificate for servers", Some(for_a_server), message::ALPN, Refusal::Certificate),
        ("an older protocol", Some(honest.credentials()), b"cdp/0", Refusal::Protocol),
        ("another protocol", Some(honest.credentials()), b"h3", Refusal::Protocol),
    ];
    for (what, own, protocol, cause) in rows {
        let before = target.listener.refused(cause);
        is_refused(&mut target, what, own, protocol).await;
        target.counts(cause, before + 1).await;
        target.serves(&honest).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_stream_is_granted_before_the_registry_has_answered() {
    let target = Target::start(ListenerLimits::default());
    let honest = target.office("honest").await;
    let authority = target.authority.clone();
    let (locked, is_locked) = tokio::sync::oneshot::channel();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let holder = tokio::task::spawn_blocking(move || {
        let _guard = authority.lock().expect("not poisoned");
        locked.send(()).expect("the test waits");
        released.recv().expect("the test releases");
    });
    let dial_locked = dial_with(&target, honest.credentials());
    within(is_locked).await.expect("locked");
    let first = within(dial_locked()).await;
    // By the time the second handshake is through, a credit given at the end of the first has long arrived.
    let second = within(dial_locked()).await;
    for connection in [&first, &second] {
        assert!(connection.close_reason().is_none());
    }
    let granted = first.stats().frame_rx;
    assert_eq!((granted.max_streams_bidi, granted.max_streams_uni, granted.max_data), (0, 0, 0));
    release.send(()).expect("released");
    holder.await.expect("released");
    within(first.open_bi()).await.expect("admitted once the registry has answered");
}

/// Dials again and again as one office, without asking the authority for anything.
fn dial_with(target: &Target, own: Credentials) -> impl Fn() -> BoxFuture<'static, Connection> + use<> {
    let clock: Arc<dyn Clock> = target.clock.clone();
    let address = target.address;
    let pem = std::fs::read(target.folder.path().join("authority/ca.pem")).expect("the authority");
    let authority = CertificateDer::from_pem_slice(&pem).expect("a certificate");
    move || {
        let tls = tls::client(&authority, Some(own.clone()), message::ALPN, clock.clone()).expect("usable");
        let endpoint = quic::client_endpoint(address, tls).expect("a port");
        let connecting = endpoint.connect(address, "localhost").expect("begun");
        Box::pin(async move { connecting.await.expect("a handshake") })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_connection_gets_one_exchange_and_nothing_else() {
    let mut target = Target::start(ListenerLimits::default());
    let honest = target.office("honest").await;
    let bundle = target.invite("south", false).expect("a bundle");
    let whole = message::encode(&join::JoinRequest {
        store: bundle.store,
        token: bundle.token.clone(),
        request: vec![0x30; 300],
    });
    let requests: [(&str, Vec<u8>, Refusal); 4] = [
        ("garbage", vec![0xff; 500], Refusal::Protocol),
        ("cut short", whole[..100].to_vec(), Refusal::Protocol),
        ("oversize", vec![0; 1024 * 1024], Refusal::Handshake),
        ("a token with a request that is none", whole, Refusal::Join),
    ];
    for (what, bytes, cause) in requests {
        let before = target.listener.refused(cause);
        let connection = dial(&target, Some(honest.credentials()), join::ALPN).await.expect("a handshake");
        let (mut send, mut receive) = within(connection.open_bi()).await.expect("one stream");
        let exchange = async {
            send.write_all(&bytes).await.ok()?;
            send.finish().ok()?;
            receive.read_to_end(join::JOIN_BYTES_MAX).await.ok()
        };
        if let Some(answer) = within(exchange).await {
            let answer = message::decode::<join::JoinAnswer>(&answer).expect("an answer");
            assert!(matches!(answer, join::JoinAnswer::Refused { .. }), "{what}: {answer:?}");
        }
        within(connection.closed()).await;
        target.counts(cause, before + 1).await;
    }
    assert!(target.served.try_recv().is_err(), "a join is never served as an office");
    target.serves(&honest).await;
    let office = Office::new(target.clock.clone());
    office.join(bundle.to_text().as_bytes(), None).await.expect("the token is still good");
}

/// Stands between a client and the target, and keeps what the client sends.
struct Relay {
    address: SocketAddr,
    sent: Arc<Mutex<Vec<Vec<u8>>>>,
    task: JoinHandle<()>,
}

impl Relay {
    async fn start(target: SocketAddr) -> Self {
        let front = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let back = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        back.connect(target).await.expect("connected");
        let address = front.local_addr().expect("bound");
        let sent = Arc::new(Mutex::new(Vec::new()));
        let kept = sent.clone();
        let task = tokio::spawn(async move {
            let (mut up, mut down) = (vec![0; 65536], vec![0; 65536]);
            let mut client = None;
            loop {
                tokio::select! {
                    Ok((len, from)) = front.recv_from(&mut up) => {
                        client = Some(from);
                        kept.lock().expect("not poisoned").push(up[..len].to_vec());
                        let _ = back.send(&up[..len]).await;
                    }
                    Ok(len) = back.recv(&mut down) => {
                        if let Some(client) = client {
                            let _ = front.send_to(&down[..len], client).await;
                        }
                    }
                }
            }
        });
        Self { address, sent, task }
    }

    /// An honest connection through the relay, and the datagrams of its source.
    async fn record(target: &mut Target, office: &Office) -> Vec<Vec<u8>> {
        let relay = Self::start(target.address).await;
        let mut identity = Identity::load(&cdp_seams::storage::SystemStorage, office.state.path()).expect("joined");
        identity.target.targets = vec![relay.address.to_string()];
        let connector = QuicConnector::new(identity, office.clock.clone()).expect("a connector");
        let line = within(connector.line()).await.expect("through the relay");
        within(target.served.recv()).await.expect("served");
        line.close("recorded");
        support::eventually("the connection is over", || target.listener.connections() == 0).await;
        relay.task.abort();
        let sent = relay.sent.lock().expect("not poisoned").clone();
        assert!(sent.len() >= 3, "an Initial, a Handshake and a close at least");
        sent
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_replayed_datagrams_get_nothing_accepted() {
    let mut target = Target::start(ListenerLimits::default());
    let honest = target.office("honest").await;
    let recorded = Relay::record(&mut target, &honest).await;
    let stranger = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
    let random = SimRandom::new(7);

    for round in 0..200_u64 {
        let mut bytes = vec![0; (random.below(1500)) as usize];
        random.fill(&mut bytes);
        if let (Some(first), 1) = (bytes.first_mut(), round % 2) {
            *first |= 0xc0;
        }
        let _ = stranger.send_to(&bytes, target.address).await;
    }
    for len in [1_453, 9_000, 65_507] {
        let mut oversize = recorded[0].clone();
        oversize.resize(len, 0);
        stranger.send_to(&oversize, target.address).await.expect("sent");
    }
    for len in (0..recorded[0].len()).step_by(7) {
        stranger.send_to(&recorded[0][..len], target.address).await.expect("sent");
    }
    for bit in (0..recorded[0].len() * 8).step_by(61) {
        let mut flipped = recorded[0].clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        stranger.send_to(&flipped, target.address).await.expect("sent");
    }
    target.serves(&honest).await;
    for _ in 0..5 {
        for datagram in &recorded {
            stranger.send_to(datagram, target.address).await.expect("sent");
        }
    }
    target.serves(&honest).await;
    assert!(target.served.try_recv().is_err(), "only the honest office was served, once each time");
    assert_eq!(target.listener.refused(Refusal::Failed), 0, "nothing panicked");
}

/// First datagrams of `count` connections that will never go on.
async fn initials(target: &Target, count: usize) -> Vec<Vec<u8>> {
    let clock: Arc<dyn Clock> = target.clock.clone();
    let tls = tls::client(&target.authority_certificate(), None, message::ALPN, clock).expect("usable");
    let silent = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
    let address = silent.local_addr().expect("bound");
    let endpoint = quic::client_endpoint(address, tls).expect("a port");
    let (mut initials, mut buffer) = (Vec::new(), vec![0; 65536]);
    for _ in 0..count {
        let connecting = endpoint.connect(address, "localhost").expect("begun");
        let (len, _) = within(silent.recv_from(&mut buffer)).await.expect("received");
        initials.push(buffer[..len].to_vec());
        drop(connecting);
    }
    initials
}

#[tokio::test(flavor = "multi_thread")]
async fn half_open_connections_are_bounded_and_keep_nobody_out() {
    let limits = ListenerLimits { handshakes_max: 16, retry_above: 4, ..ListenerLimits::default() };
    let mut target = Target::start(limits);
    let honest = target.office("honest").await;
    let flood = initials(&target, 300).await;
    let mut most = 0;
    for (number, initial) in flood.iter().enumerate() {
        let from = format!("127.0.{}.{}:0", 1 + number / 200, 1 + number % 200);
        let stranger = UdpSocket::bind(from).await.expect("any loopback address");
        stranger.send_to(initial, target.address).await.expect("sent");
        most = most.max(target.listener.handshakes());
        if number % 100 == 99 {
            target.serves(&honest).await;
        }
    }
    most = most.max(target.listener.handshakes());
    assert!(most >= limits.retry_above, "the flood did reach the listener: {most}");
    assert!(most <= limits.handshakes_max, "half-open connections: {most}");
    assert!(target.served.try_recv().is_err(), "none of them is served");
    target.serves(&honest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_in_one_connection_ends_that_connection_only() {
    let mut target = Target::start(ListenerLimits::default());
    let honest = target.office("honest").await;
    let line = target.serves(&honest).await;
    let panics = target.office("panics").await;
    // The connection may end before its client knows that it was admitted.
    if let Ok(doomed) = within(panics.connect()).await {
        within(doomed.closed()).await;
    }
    within(target.served.recv()).await.expect("it was served");
    target.counts(Refusal::Failed, 1).await;
    assert!(line.round_trip().is_some());
    assert!(is_pending(line.closed()).await, "the other connection goes on");
    target.serves(&honest).await;
}

/// Whether a future is not ready when it is asked once.
async fn is_pending(future: impl Future<Output = ()>) -> bool {
    tokio::select! {
        biased;
        () = future => false,
        () = std::future::ready(()) => true,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_closes_tells_its_offices_and_ends() {
    let mut target = Target::start(ListenerLimits::default());
    let honest = target.office("honest").await;
    let line = target.serves(&honest).await;
    target.listener.close();
    within(line.closed()).await;
    support::eventually("the connection is given up", || target.listener.connections() == 0).await;
}
