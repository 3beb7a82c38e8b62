//! The line over QUIC: endpoints with small, explicit limits, and `QuicLine`.
//!
//! quinn's defaults let one stranger pin gigabytes, so every limit stands here with its reason. A server gives a peer no stream
//! credit before it is admitted (`admit`): until then nothing but the handshake is buffered for it, at most
//! `HANDSHAKE_BYTES_MAX` a connection. A client learns that it was admitted by being able to open its first stream.
//!
//! Memory a server can be made to hold: strangers `INCOMING_MAX` × 1.5 KiB + `INCOMING_BYTES_MAX_TOTAL` before a handshake
//! begins, the listener's bound on handshakes × about 64 KiB after; an admitted office `RECEIVE_WINDOW_BYTES` and
//! `SEND_WINDOW_BYTES` at most.

use crate::line::{BoxFuture, Control, FrameSend, FrameStream, Line, ReceiveStream};
use aws_lc_rs::hmac;
use bytes::Bytes;
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, Connection, ConnectionError, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig,
    TokioRuntime, TransportConfig, TransportErrorCode, ValidationTokenConfig, VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Connection attempts that wait for the server to look at them; what is above is refused by QUIC itself.
pub const INCOMING_MAX: usize = 256;
/// Bytes kept for one of them: a client hello with our certificate chain is three packets at most.
pub const INCOMING_BYTES_MAX: u64 = 8 * 1024;
/// Bytes kept for all of them.
pub const INCOMING_BYTES_MAX_TOTAL: u64 = 1024 * 1024;
/// Handshake bytes kept out of order, a connection.
pub const HANDSHAKE_BYTES_MAX: usize = 16 * 1024;
/// Streams of frames that an admitted source may have open: one a group.
pub const FRAME_STREAMS_MAX: u32 = 64;
/// Bytes of one stream that may be under way: 110 Mb/s at 300 ms; does not throttle a first copy in the LAN.
pub const STREAM_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
/// Bytes that may be under way to a server, all streams of a connection.
pub const RECEIVE_WINDOW_BYTES: u32 = 8 * 1024 * 1024;
/// Bytes that may be under way to a server from a peer it did not admit yet: one join request.
pub const STRANGER_WINDOW_BYTES: u32 = 16 * 1024;
/// Bytes sent and not acknowledged, all streams of a connection.
pub const SEND_WINDOW_BYTES: u64 = 8 * 1024 * 1024;
/// Bytes that may be under way to a client: control messages only.
pub const CLIENT_WINDOW_BYTES: u32 = 1024 * 1024;
/// Silence after which the other side is taken for gone.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(45);
/// The client's keep-alive: holds the mappings of most NATs (30 s), and an idle line under 1 kB a minute.
pub const KEEP_ALIVE: Duration = Duration::from_secs(15);

const SOCKET_BUFFER_BYTES: usize = 4 * 1024 * 1024;

/// Why a connection was closed, as its application error code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseCode {
    /// All is said.
    Done = 0,
    /// The certificate is missing, not known, or revoked.
    Unauthorized = 1,
    /// The server has as many connections as it serves.
    Busy = 2,
    /// The ALPN protocol is served by nobody.
    Protocol = 3,
    /// The server failed.
    Failed = 4,
}

impl CloseCode {
    /// The code on the wire.
    #[must_use]
    pub fn code(self) -> VarInt {
        VarInt::from_u32(self as u32)
    }
}

/// A server's endpoint on `address`. `secret` is the server's own and outlives it: with it, a restarted server tells the
/// peers of its predecessor at once that their connections are gone (stateless reset, RFC 9000, 10.3); without it they
/// would wait for `IDLE_TIMEOUT`.
///
/// # Errors
/// Where the socket cannot be bound, or `tls` has no cipher suite for QUIC.
pub fn server_endpoint(address: SocketAddr, tls: rustls::ServerConfig, secret: &[u8; 32]) -> io::Result<Endpoint> {
    let crypto = QuicServerConfig::try_from(tls).map_err(no_suite)?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    let mut tokens = ValidationTokenConfig::default();
    tokens.sent(0);
    config
        .transport_config(Arc::new(server_transport()))
        .validation_token_config(tokens)
        .migration(true)
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size(INCOMING_BYTES_MAX)
        .incoming_buffer_size_total(INCOMING_BYTES_MAX_TOTAL);
    let mut shared = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, secret)));
    let cid_key = u64::from_le_bytes(*secret.first_chunk().expect("a secret has 32 bytes"));
    shared.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(cid_key)));
    endpoint(address, shared, Some(config))
}

/// A client's endpoint with any free port, for servers of the address family of `server`.
///
/// # Errors
/// Where no socket can be bound, or `tls` has no cipher suite for QUIC.
pub fn client_endpoint(server: SocketAddr, tls: rustls::ClientConfig) -> io::Result<Endpoint> {
    let crypto = QuicClientConfig::try_from(tls).map_err(no_suite)?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(client_transport())).token_store(Arc::new(quinn::NoneTokenStore));
    let any = match server {
        SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
    };
    let mut endpoint = endpoint(any, EndpointConfig::default(), None)?;
    endpoint.set_default_client_config(config);
    Ok(endpoint)
}

/// Lets an authenticated source open its control stream and its streams of frames, and fill the windows.
pub fn admit(connection: &Connection) {
    connection.set_receive_window(RECEIVE_WINDOW_BYTES.into());
    connection.set_max_concurrent_uni_streams(FRAME_STREAMS_MAX.into());
    connection.set_max_concurrent_bi_streams(1_u32.into());
}

/// Lets a peer open one bidirectional stream.
pub fn admit_one_exchange(connection: &Connection) {
    connection.set_max_concurrent_bi_streams(1_u32.into());
}

/// A TLS alert that ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsAlert {
    /// We refused the other side's handshake.
    Sent(u8),
    /// The other side refused ours.
    Received(u8),
}

impl TlsAlert {
    /// The alert behind `error`, if there is one.
    #[must_use]
    pub fn of(error: &ConnectionError) -> Option<Self> {
        let alert = |code: TransportErrorCode| {
            let code = u64::from(code);
            (code & !0xff == 0x100).then_some((code & 0xff) as u8)
        };
        match error {
            ConnectionError::TransportError(error) => alert(error.code).map(Self::Sent),
            ConnectionError::ConnectionClosed(close) => alert(close.error_code).map(Self::Received),
            _ => None,
        }
    }

    /// Whether a certificate was missing or not believed (RFC 8446, 6.2).
    #[must_use]
    pub fn is_about_certificate(self) -> bool {
        let (Self::Sent(code) | Self::Received(code)) = self;
        matches!(code, 42..=46 | 48 | 49 | 51 | 116)
    }

    /// Whether the two sides have no ALPN protocol in common.
    #[must_use]
    pub fn is_about_protocol(self) -> bool {
        matches!(self, Self::Sent(120) | Self::Received(120))
    }
}

fn transport() -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(0_u32.into())
        .max_concurrent_uni_streams(0_u32.into())
        .datagram_receive_buffer_size(None)
        .crypto_buffer_size(HANDSHAKE_BYTES_MAX)
        .send_window(SEND_WINDOW_BYTES)
        .max_idle_timeout(Some(IdleTimeout::try_from(IDLE_TIMEOUT).expect("45 s fit in a variable-length integer")))
        .mtu_discovery_config(Some(MtuDiscoveryConfig::default()));
    config
}

fn server_transport() -> TransportConfig {
    let mut config = transport();
    config.stream_receive_window(STREAM_WINDOW_BYTES.into()).receive_window(STRANGER_WINDOW_BYTES.into());
    config
}

fn client_transport() -> TransportConfig {
    let mut config = transport();
    config
        .stream_receive_window(CLIENT_WINDOW_BYTES.into())
        .receive_window(CLIENT_WINDOW_BYTES.into())
        .keep_alive_interval(Some(KEEP_ALIVE));
    config
}

fn endpoint(address: SocketAddr, shared: EndpointConfig, server: Option<ServerConfig>) -> io::Result<Endpoint> {
    let socket = UdpSocket::bind(address)?;
    // A wish: the kernel gives what its limits allow, and the line works with less.
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES);
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES);
    Endpoint::new(shared, server, socket, Arc::new(TokioRuntime))
}

fn no_suite(error: NoInitialCipherSuite) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

/// A line over a QUIC connection that was admitted.
pub struct QuicLine {
    connection: Connection,
    /// The client's own: it has this connection alone.
    endpoint: Option<Endpoint>,
    opened: Mutex<Option<Control>>,
}

impl QuicLine {
    /// The server's end of a connection it has admitted.
    #[must_use]
    pub fn accepted(connection: Connection) -> Self {
        Self { connection, endpoint: None, opened: Mutex::new(None) }
    }

    /// The client's end, on an endpoint of its own: waits until the server has admitted it, which is when the control stream
    /// can be opened.
    ///
    /// # Errors
    /// Where the server does not admit us, or the connection breaks.
    pub async fn connected(connection: Connection, endpoint: Endpoint) -> Result<Self, ConnectionError> {
        let control = boxed(connection.open_bi().await?);
        Ok(Self { connection, endpoint: Some(endpoint), opened: Mutex::new(Some(control)) })
    }
}

impl Drop for QuicLine {
    fn drop(&mut self) {
        self.connection.close(CloseCode::Done.code(), b"");
    }
}

impl Line for QuicLine {
    fn open_control(&self) -> BoxFuture<'_, io::Result<Control>> {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner).take();
        Box::pin(async move {
            match opened {
                Some(control) => Ok(control),
                None => Ok(boxed(self.connection.open_bi().await?)),
            }
        })
    }

    fn accept_control(&self) -> BoxFuture<'_, io::Result<Control>> {
        Box::pin(async { Ok(boxed(self.connection.accept_bi().await?)) })
    }

    fn open_frames(&self) -> BoxFuture<'_, io::Result<FrameStream>> {
        Box::pin(async { Ok(Box::new(self.connection.open_uni().await?) as FrameStream) })
    }

    fn accept_frames(&self) -> BoxFuture<'_, io::Result<ReceiveStream>> {
        Box::pin(async { Ok(Box::new(self.connection.accept_uni().await?) as ReceiveStream) })
    }

    fn close(&self, reason: &str) {
        self.connection.close(CloseCode::Done.code(), reason.as_bytes());
    }

    fn end<'a>(&'a self, reason: &'a str) -> BoxFuture<'a, ()> {
        self.close(reason);
        Box::pin(async {
            if let Some(endpoint) = &self.endpoint {
                endpoint.wait_idle().await;
            }
        })
    }

    fn closed(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.connection.closed().await;
        })
    }

    fn round_trip(&self) -> Option<Duration> {
        Some(self.connection.rtt())
    }
}

impl FrameSend for quinn::SendStream {
    fn hand_over<'a>(&'a mut self, bytes: &'a mut Bytes) -> BoxFuture<'a, io::Result<usize>> {
        Box::pin(async { Ok(self.write_chunks(std::slice::from_mut(bytes)).await?.bytes) })
    }
}

fn boxed((send, receive): (quinn::SendStream, quinn::RecvStream)) -> Control {
    Control { send: Box::new(send), receive: Box::new(receive) }
}
