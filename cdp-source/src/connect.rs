//! The connection to the target: addresses are tried in turn, the target is checked against the bundle's authority and nothing
//! else, and a line is given back once the target has admitted this office.
//!
//! Owns the folder `identity` of the state: `office.key` (made here, mode 0600, never leaves), `office.pem`, `ca.pem`, and
//! `target.json`, written last when the office joins.

use cdp_protocol::bundle::StoreId;
use cdp_protocol::hex;
use cdp_protocol::message;
use cdp_protocol::units::{GroupId, OfficeId};
use cdp_seams::clock::Clock;
use cdp_seams::line::Line;
use cdp_seams::quic::{self, CloseCode, QuicLine, TlsAlert};
use cdp_seams::storage::{Storage, read_all};
use cdp_seams::tls::{self, Credentials, TlsError};
use quinn::ConnectionError;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;
use zeroize::Zeroizing;

/// How long one address of the target may take to answer and admit us. The thinnest line needs about 2 s.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Version 1 knew no groups.
const TARGET_VERSION: u32 = 2;
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// Which target this office joined, as `target.json` holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinedTarget {
    /// Version of the file.
    pub version: u32,
    /// The target's store.
    pub store: StoreId,
    /// Where it listens, each `HOST:PORT`, in the order to try.
    pub targets: Vec<String>,
    /// The name its certificate has to be for.
    pub server_name: String,
    /// Public half of its escrow key: data keys are sealed to it.
    #[serde(with = "hex")]
    pub escrow_public: Vec<u8>,
    /// Who we are there.
    pub office: OfficeId,
    /// Our name there.
    pub office_name: String,
    /// The groups this office had there when it joined: made by the hardware before, to be gone on with by this one.
    #[serde(default)]
    pub groups: BTreeMap<String, GroupId>,
}

/// Who this office is and whom it believes.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The target.
    pub target: JoinedTarget,
    authority: CertificateDer<'static>,
    own: Credentials,
}

/// Why the identity could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The office did not join yet.
    #[error("this office did not join a target yet: path={0}")]
    NotJoined(PathBuf),
    /// A file could not be read.
    #[error("read identity: path={path}")]
    Storage {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A key or certificate is damaged.
    #[error("read key or certificate: path={path}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: rustls::pki_types::pem::Error,
    },
    /// `target.json` is damaged.
    #[error("read target: path={path}")]
    Target {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// `target.json` was written by a newer program.
    #[error("target.json has version {0}, newer than this program")]
    Newer(u32),
}

impl Identity {
    /// The folder of the identity in the state folder.
    #[must_use]
    pub fn folder(state: &Path) -> PathBuf {
        state.join("identity")
    }

    /// Loads the identity from the state folder.
    ///
    /// # Errors
    /// Where the office did not join, or a file is damaged.
    pub fn load(storage: &dyn Storage, state: &Path) -> Result<Self, IdentityError> {
        let folder = Self::folder(state);
        let path = folder.join("target.json");
        let bytes = match read_all(storage, &path, FILE_BYTES_MAX) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(IdentityError::NotJoined(folder)),
            other => other.map_err(|source| IdentityError::Storage { path: path.clone(), source })?,
        };
        let target: JoinedTarget =
            serde_json::from_slice(&bytes).map_err(|source| IdentityError::Target { path, source })?;
        if target.version > TARGET_VERSION {
            return Err(IdentityError::Newer(target.version));
        }
        let read = |name: &str| {
            let path = folder.join(name);
            let bytes = read_all(storage, &path, FILE_BYTES_MAX).map(Zeroizing::new);
            bytes.map_err(|source| IdentityError::Storage { path, source })
        };
        let pem = |name: &str| {
            let path = folder.join(name);
            move |source| IdentityError::Pem { path, source }
        };
        let authority = CertificateDer::from_pem_slice(&read("ca.pem")?).map_err(pem("ca.pem"))?;
        let certificate = CertificateDer::from_pem_slice(&read("office.pem")?).map_err(pem("office.pem"))?;
        let key = PrivateKeyDer::from_pem_slice(&read("office.key")?).map_err(pem("office.key"))?;
        Ok(Self { target, authority, own: Credentials { certificate, key } })
    }
}

impl JoinedTarget {
    /// The version that is written.
    #[must_use]
    pub const fn version() -> u32 {
        TARGET_VERSION
    }
}

/// Why there is no line to the target.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The target does not admit this office.
    #[error("the target at {target} refused this office: {reason}")]
    Refused {
        /// The target's address.
        target: String,
        /// Its words.
        reason: String,
    },
    /// Something answered that is not the target this office joined.
    #[error("what answers at {target} is not the target this office joined")]
    WrongTarget {
        /// Its address.
        target: String,
        /// What was wrong with its certificate.
        source: ConnectionError,
    },
    /// Nothing answered in time.
    #[error("no answer from the target at {target}")]
    Unreachable {
        /// Its address.
        target: String,
    },
    /// The name has no address.
    #[error("look up address of target: {target}")]
    Lookup {
        /// The name.
        target: String,
        /// Why not.
        source: io::Error,
    },
    /// The target speaks another version of the protocol.
    #[error("the target at {target} does not speak this version of the protocol")]
    Version {
        /// Its address.
        target: String,
    },
    /// The target has too much to do, or failed.
    #[error("the target at {target} cannot serve us for now: {reason}")]
    Busy {
        /// Its address.
        target: String,
        /// Its words.
        reason: String,
    },
    /// The connection broke while it was made.
    #[error("connect to target at {target}")]
    Connection {
        /// Its address.
        target: String,
        /// How.
        source: ConnectionError,
    },
    /// No socket, or no connection could be started.
    #[error("open socket to target at {target}")]
    Socket {
        /// Its address.
        target: String,
        /// Why not.
        source: io::Error,
    },
    /// Our own certificates are not usable.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The identity names no target.
    #[error("the identity names no address of the target")]
    NoAddress,
}

impl ConnectError {
    /// The next step, where there is one.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Refused { .. } => Some(
                "if this machine is to go on for the office: `cdp-target enroll OFFICE --replace`, and join with that bundle",
            ),
            Self::WrongTarget { .. } => Some(
                "check the address; a target that was set up anew needs this office to join again; see that the clock is right",
            ),
            Self::Unreachable { .. } => {
                Some("UDP port blocked? the line uses UDP; see that the target runs and that firewalls let it through")
            }
            Self::Lookup { .. } => Some("check the name and the name server"),
            Self::Version { .. } => Some("upgrade the older side"),
            _ => None,
        }
    }
}

/// A TLS configuration and where to go with it.
pub(crate) struct Dial {
    pub(crate) tls: rustls::ClientConfig,
    pub(crate) server_name: String,
    pub(crate) targets: Vec<String>,
}

impl Dial {
    /// A connection that the target has admitted, tried at every address in turn; else the most telling of the errors.
    pub(crate) async fn admitted(&self) -> Result<(QuicLine, String), ConnectError> {
        let mut failure = None;
        for target in &self.targets {
            let addresses = match tokio::net::lookup_host(target).await {
                Ok(addresses) => addresses,
                Err(source) => {
                    failure.get_or_insert(ConnectError::Lookup { target: target.clone(), source });
                    continue;
                }
            };
            for address in addresses {
                match self.one(address, target).await {
                    Ok(line) => return Ok((line, target.clone())),
                    // Somebody's word says more than silence.
                    Err(silence @ ConnectError::Unreachable { .. }) => _ = failure.get_or_insert(silence),
                    Err(error) => failure = Some(error),
                }
            }
        }
        Err(failure.unwrap_or(ConnectError::NoAddress))
    }

    async fn one(&self, address: SocketAddr, target: &str) -> Result<QuicLine, ConnectError> {
        let socket = |source| ConnectError::Socket { target: target.to_owned(), source };
        let endpoint = quic::client_endpoint(address, self.tls.clone()).map_err(socket)?;
        let connecting =
            endpoint.connect(address, &self.server_name).map_err(|error| socket(io::Error::other(error)))?;
        let admission = async { QuicLine::connected(connecting.await?, endpoint).await };
        match timeout(CONNECT_TIMEOUT, admission).await {
            Ok(Ok(line)) => Ok(line),
            Ok(Err(error)) => Err(failed(target.to_owned(), error)),
            Err(_) => Err(ConnectError::Unreachable { target: target.to_owned() }),
        }
    }
}

fn failed(target: String, error: ConnectionError) -> ConnectError {
    match (TlsAlert::of(&error), &error) {
        (Some(alert), _) if alert.is_about_protocol() => ConnectError::Version { target },
        (Some(TlsAlert::Sent(_)), _) => ConnectError::WrongTarget { target, source: error },
        (Some(alert), _) if alert.is_about_certificate() => {
            ConnectError::Refused { target, reason: "it does not accept our certificate".to_owned() }
        }
        (None, ConnectionError::VersionMismatch) => ConnectError::Version { target },
        (None, ConnectionError::TimedOut) => ConnectError::Unreachable { target },
        (None, ConnectionError::ApplicationClosed(close)) => {
            let reason = String::from_utf8_lossy(&close.reason).into_owned();
            match close.error_code {
                code if code == CloseCode::Unauthorized.code() => ConnectError::Refused { target, reason },
                code if code == CloseCode::Protocol.code() => ConnectError::Version { target },
                code if code == CloseCode::Done.code() => ConnectError::Connection { target, source: error },
                _ => ConnectError::Busy { target, reason },
            }
        }
        (None, ConnectionError::ConnectionClosed(close))
            if close.error_code == quinn::TransportErrorCode::CONNECTION_REFUSED =>
        {
            ConnectError::Busy { target, reason: "it takes no more connections for now".to_owned() }
        }
        _ => ConnectError::Connection { target, source: error },
    }
}

/// Connects to the target of an identity.
pub struct QuicConnector {
    dial: Dial,
}

impl QuicConnector {
    /// A connector for `identity`.
    ///
    /// # Errors
    /// Where its certificates or key are not usable.
    pub fn new(identity: Identity, clock: Arc<dyn Clock>) -> Result<Self, ConnectError> {
        let tls = tls::client(&identity.authority, Some(identity.own), message::ALPN, clock)?;
        let JoinedTarget { server_name, targets, .. } = identity.target;
        Ok(Self { dial: Dial { tls, server_name, targets } })
    }

    /// Connects; a line means that the target has admitted this office.
    ///
    /// # Errors
    /// Where no address of the target does.
    pub async fn line(&self) -> Result<Box<dyn Line>, ConnectError> {
        let (line, target) = self.dial.admitted().await?;
        tracing::debug!(target, "connected");
        Ok(Box::new(line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_seams::clock::SystemClock;
    use cdp_seams::storage::SystemStorage;
    use rcgen::KeyPair;

    fn dial(targets: Vec<String>) -> Dial {
        let key = KeyPair::generate().expect("a key");
        let authority = rcgen::CertificateParams::default().self_signed(&key).expect("a certificate");
        let tls = tls::client(authority.der(), None, message::ALPN, Arc::new(SystemClock::new())).expect("usable");
        Dial { tls, server_name: "localhost".to_owned(), targets }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_named_and_hints_at_the_udp_port() {
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
        let address = silent.local_addr().expect("bound").to_string();
        let error = dial(vec![address.clone()]).admitted().await.err().expect("nobody answers");
        assert!(matches!(&error, ConnectError::Unreachable { target } if *target == address), "{error}");
        assert!(error.hint().is_some_and(|hint| hint.starts_with("UDP port blocked?")));
    }

    #[tokio::test]
    async fn an_address_that_is_none_and_no_address_at_all_are_errors() {
        let error = dial(vec!["no-port".to_owned()]).admitted().await.err().expect("no address");
        assert!(matches!(error, ConnectError::Lookup { .. }), "{error}");
        assert!(matches!(dial(Vec::new()).admitted().await.err(), Some(ConnectError::NoAddress)));
    }

    #[test]
    fn an_office_that_did_not_join_is_told_so() {
        let state = tempfile::tempdir().expect("a folder");
        assert!(matches!(Identity::load(&SystemStorage, state.path()), Err(IdentityError::NotJoined(_))));
    }
}
