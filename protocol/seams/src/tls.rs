//! TLS for the line: 1.3 only, our own certificate authority only, nothing resumed and no early data.
//!
//! Certificates are judged by the clock of the seams. Nothing here reads the system's roots. What a verified certificate may do
//! is not decided here: a server that asks for client certificates still admits a client without one, because the ALPN protocol
//! says whether it needs one; `cdp-target`'s listener is where that is refused.

use crate::clock::Clock;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::{VerifierBuilderError, WebPkiClientVerifier};
use rustls::time_provider::TimeProvider;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// A certificate and its key.
#[derive(Debug)]
pub struct Credentials {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// Its key; not printed.
    pub key: PrivateKeyDer<'static>,
}

impl Clone for Credentials {
    fn clone(&self) -> Self {
        Self { certificate: self.certificate.clone(), key: self.key.clone_key() }
    }
}

/// Why no TLS configuration could be made.
#[derive(Debug)]
pub enum TlsError {
    /// The authority's certificate, ours or our key is not usable.
    Rustls(rustls::Error),
    /// No verifier could be made from the authority's certificate.
    Verifier(VerifierBuilderError),
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("set up TLS with our certificate, key and authority")
    }
}

impl std::error::Error for TlsError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Rustls(error) => Some(error),
            Self::Verifier(error) => Some(error),
        }
    }
}

impl From<rustls::Error> for TlsError {
    fn from(error: rustls::Error) -> Self {
        Self::Rustls(error)
    }
}

impl From<VerifierBuilderError> for TlsError {
    fn from(error: VerifierBuilderError) -> Self {
        Self::Verifier(error)
    }
}

/// A server's side: asks for a client certificate of `authority`, and checks the one it gets.
///
/// # Errors
/// Where a certificate or the key is not usable.
pub fn server(
    authority: &CertificateDer<'static>,
    own: Credentials,
    protocols: &[&[u8]],
    clock: Arc<dyn Clock>,
) -> Result<ServerConfig, TlsError> {
    let provider = provider();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(authority)?, Arc::clone(&provider))
        .allow_unauthenticated()
        .build()?;
    let mut config = ServerConfig::builder_with_details(provider, Arc::new(Wall(clock)))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![own.certificate], own.key)?;
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}

/// A client's side: believes servers certified by `authority` and nobody else; shows `own`, if there is one.
///
/// # Errors
/// Where a certificate or the key is not usable.
pub fn client(
    authority: &CertificateDer<'static>,
    own: Option<Credentials>,
    protocol: &[u8],
    clock: Arc<dyn Clock>,
) -> Result<ClientConfig, TlsError> {
    let provider = provider();
    let verifier = WebPkiServerVerifier::builder_with_provider(roots(authority)?, Arc::clone(&provider)).build()?;
    let builder = ClientConfig::builder_with_details(provider, Arc::new(Wall(clock)))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_webpki_verifier(verifier);
    let mut config = match own {
        Some(own) => builder.with_client_auth_cert(vec![own.certificate], own.key)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn roots(authority: &CertificateDer<'static>) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone())?;
    Ok(Arc::new(roots))
}

struct Wall(Arc<dyn Clock>);

impl fmt::Debug for Wall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wall")
    }
}

impl TimeProvider for Wall {
    fn current_time(&self) -> Option<UnixTime> {
        let wall_ms = u64::try_from(self.0.wall_ms()).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_millis(wall_ms)))
    }
}
