//! The target's certificate authority: its keys, the certificates it signs, and the file that says who is enrolled.
//!
//! Files, all mode 0600, in the folder `authority` of the store: `ca.key`, `ca.pem`, `server.key`, `server.pem`, `escrow.key`
//! (the secret half, 32 bytes), and `offices.json`, the registry, written last at `init` and replaced as a whole after that. Each is kept twice (`kept`).
//! A certificate is worth nothing by its signature alone: it has to stand, unrevoked, in the registry, so that what is
//! not known fails closed. What may be enrolled and redeemed when is `enroll.rs`.
//!
//! Certificates are valid from 30 days before they were made, so that clocks may be apart by hours or days; the authority's for
//! 30 years, the server's and the offices' for 10. There is no renewal yet: `enroll --replace` makes a new one, `revoked` in the
//! registry ends one at once.

use crate::enroll::Registry;
use crate::kept;
use aws_lc_rs::digest;
use cdp_protocol::bundle::StoreId;
use cdp_protocol::escrow::{EscrowError, EscrowKey};
use cdp_protocol::hex;
use cdp_protocol::units::{OfficeId, Timestamp};
use cdp_seams::clock::Clock;
use cdp_seams::random::{self, Random};
use cdp_seams::storage::{Storage, read_all};
use cdp_seams::tls::Credentials;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, ServerName};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroizing;

const DAY: Duration = Duration::from_secs(24 * 3600);
const BACKDATED: Duration = Duration::from_secs(30 * 24 * 3600);
const AUTHORITY_DAYS: u32 = 30 * 365;
const CERTIFICATE_DAYS: u32 = 10 * 365;
/// An emergency takes days, not years.
const READER_DAYS: u32 = 30;
/// What is made once and stays.
const FILES: [&str; 5] = ["ca.key", "ca.pem", "server.key", "server.pem", "escrow.key"];
const FILE_BYTES_MAX: u64 = 64 * 1024;
const REGISTRY_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// SHA-256 of a certificate, as `openssl x509 -fingerprint -sha256` shows it, without the colons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(#[serde(with = "hex")] pub [u8; 32]);

impl Fingerprint {
    /// The fingerprint of a certificate.
    #[must_use]
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        Self(sha256(certificate))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    digest::digest(&digest::SHA256, bytes).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// Why the authority could not be made, opened or used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file could not be read or written.
    #[error("{action}: path={path}")]
    Storage {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A certificate could not be made or read.
    #[error("{action}")]
    Certificate {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: rcgen::Error,
    },
    /// A stored key or certificate is damaged.
    #[error("read key or certificate: path={path}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: rustls::pki_types::pem::Error,
    },
    /// The escrow key could not be made.
    #[error("make escrow key")]
    Escrow(#[source] EscrowError),
    /// The registry is damaged.
    #[error("read registry: path={path}")]
    Registry {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// The registry was written by a newer program.
    #[error("the registry of offices has version {0}, newer than this program")]
    Newer(u32),
    /// Not a host name, nor an address.
    #[error("\"{0}\" is neither a host name nor an address")]
    Name(String),
}

/// The certificate authority of one store, and its registry of offices. One writer: the store's lock holder.
pub struct Authority {
    storage: Arc<dyn Storage>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) random: Arc<dyn Random>,
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    server: Credentials,
    escrow: Arc<EscrowKey>,
    pub(crate) registry: Registry,
}

impl Authority {
    /// Makes keys and certificates in `folder`; the server's certificate is for `names` (host names or addresses) and for
    /// `localhost`, `127.0.0.1` and `::1`. A crash leaves a folder without `offices.json`, which does not open.
    ///
    /// # Errors
    /// Where a name is none, or the storage fails. The folder has to be empty: the caller has looked.
    pub fn create(
        storage: Arc<dyn Storage>,
        clock: Arc<dyn Clock>,
        random: Arc<dyn Random>,
        folder: &Path,
        names: &[String],
    ) -> Result<Self, AuthorityError> {
        let store = StoreId(random::array(&*random));
        let now = Timestamp(clock.wall_ms());
        let (escrow, escrow_public) = EscrowKey::generate().map_err(AuthorityError::Escrow)?;
        let (ca_key, ca_pem) = make_authority(store, now, &*random)?;
        let issuer = issuer(&ca_pem, &ca_key)?;
        let (server_key, server_pem) = make_server(&issuer, names, now, &*random)?;
        let storage_ref = &*storage;
        storage_ref.create_dir_all(folder).map_err(at("make folder", folder))?;
        let files: [(&str, &[u8]); FILES.len()] = [
            ("ca.key", ca_key.as_bytes()),
            ("ca.pem", ca_pem.as_bytes()),
            ("server.key", server_key.as_bytes()),
            ("server.pem", server_pem.as_bytes()),
            ("escrow.key", escrow.expose()),
        ];
        for (name, bytes) in files {
            let path = folder.join(name);
            kept::write(storage_ref, &path, bytes).map_err(at("write", &path))?;
        }
        let registry = Registry::new(store, escrow_public, names.to_vec());
        write_registry(storage_ref, folder, &registry)?;
        Self::open(storage, clock, random, folder)
    }

    /// Opens what `create` made.
    ///
    /// # Errors
    /// Where a file is missing, damaged or of a newer program.
    pub fn open(
        storage: Arc<dyn Storage>,
        clock: Arc<dyn Clock>,
        random: Arc<dyn Random>,
        folder: &Path,
    ) -> Result<Self, AuthorityError> {
        let registry = read_registry(&*storage, folder)?;
        let ca_key = read_text(&*storage, &folder.join("ca.key"))?;
        let ca_pem = read_text(&*storage, &folder.join("ca.pem"))?;
        let escrow = read(&*storage, &folder.join("escrow.key"), FILE_BYTES_MAX)?;
        let server = read_credentials(&*storage, &folder.join("server.key"), &folder.join("server.pem"))?;
        let certificate = CertificateDer::from_pem_slice(ca_pem.as_bytes())
            .map_err(|source| AuthorityError::Pem { path: folder.join("ca.pem"), source })?;
        Ok(Self {
            issuer: issuer(&ca_pem, &ca_key)?,
            certificate,
            certificate_pem: ca_pem.to_string(),
            server,
            escrow: Arc::new(EscrowKey::from_bytes(escrow.to_vec())),
            registry,
            folder: folder.to_owned(),
            storage,
            clock,
            random,
        })
    }

    /// Mends each file from its copy or the other way round, where one of them is not as it should be. For the one writer.
    ///
    /// # Errors
    /// As the storage says.
    pub fn mend(&self) -> Result<(), AuthorityError> {
        for name in FILES.into_iter().chain(["offices.json"]) {
            let path = self.folder.join(name);
            if kept::mend(&*self.storage, &path, REGISTRY_BYTES_MAX).map_err(at("mend", &path))? {
                tracing::warn!(path = %path.display(), "this file or its copy was missing or damaged, and is written anew");
            }
        }
        Ok(())
    }

    /// The secret of the server's endpoint, the same after every start: it follows from the escrow key.
    #[must_use]
    pub fn endpoint_secret(&self) -> [u8; 32] {
        blake3::derive_key("cdp 2026-11 endpoint secret v1", self.escrow.expose())
    }

    /// The store this authority is of.
    #[must_use]
    pub fn store(&self) -> StoreId {
        self.registry.store
    }

    /// The authority's certificate.
    #[must_use]
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The same as PEM.
    pub(crate) fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The server's certificate and key.
    #[must_use]
    pub fn server(&self) -> &Credentials {
        &self.server
    }

    /// The key that opens the envelopes of groups in escrow.
    #[must_use]
    pub fn escrow(&self) -> Arc<EscrowKey> {
        Arc::clone(&self.escrow)
    }

    /// Replaces the registry, on disk and then in memory. A crash leaves the old one or the new one.
    pub(crate) fn store_registry(&mut self, registry: Registry) -> Result<(), AuthorityError> {
        write_registry(&*self.storage, &self.folder, &registry)?;
        self.registry = registry;
        Ok(())
    }

    /// Signs a certificate for an office over the public key of `request`; everything else in the request is ignored.
    pub(crate) fn sign_office(
        &self,
        office: OfficeId,
        request: &CertificateSigningRequestParams,
    ) -> Result<Certificate, AuthorityError> {
        let now = Timestamp(self.clock.wall_ms());
        let mut params = leaf(&office.to_string(), now, ExtendedKeyUsagePurpose::ClientAuth, &*self.random);
        let identity = format!("cdp:office:{office}").try_into().map_err(making("make office certificate"))?;
        params.subject_alt_names = vec![SanType::URI(identity)];
        params.signed_by(&request.public_key, &self.issuer).map_err(making("sign office certificate"))
    }

    /// A key, and a certificate over it, for somebody who is to read a point over the line: PEM both. It admits nobody by itself; who it
    /// is shown to has to know it.
    pub(crate) fn sign_reader(&self) -> Result<(Zeroizing<String>, String), AuthorityError> {
        let key = KeyPair::generate().map_err(making("make client key"))?;
        let now = Timestamp(self.clock.wall_ms());
        let mut params = leaf("cdp reader of points", now, ExtendedKeyUsagePurpose::ClientAuth, &*self.random);
        params.not_after = params.not_before + BACKDATED + DAY * READER_DAYS;
        // QEMU takes no certificate without it, though TLS 1.3 has no use for it.
        params.key_usages.push(KeyUsagePurpose::KeyEncipherment);
        let certificate = params.signed_by(&key, &self.issuer).map_err(making("sign client certificate"))?;
        Ok((Zeroizing::new(key.serialize_pem()), certificate.pem()))
    }
}

/// A certificate request, if it is one and signed by the key it names.
pub(crate) fn parse_request(der: &[u8]) -> Option<(CertificateSigningRequestParams, Fingerprint)> {
    let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der)).ok()?;
    let key = Fingerprint(sha256(&request.public_key.subject_public_key_info()));
    Some((request, key))
}

fn make_authority(
    store: StoreId,
    now: Timestamp,
    random: &dyn Random,
) -> Result<(Zeroizing<String>, String), AuthorityError> {
    let key = KeyPair::generate().map_err(making("make authority key"))?;
    let mut params = named(&format!("cdp target {store}"), now, AUTHORITY_DAYS, random);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key).map_err(making("make authority certificate"))?;
    Ok((Zeroizing::new(key.serialize_pem()), certificate.pem()))
}

fn make_server(
    issuer: &Issuer<'static, KeyPair>,
    names: &[String],
    now: Timestamp,
    random: &dyn Random,
) -> Result<(Zeroizing<String>, String), AuthorityError> {
    let mut all: Vec<String> = names.to_vec();
    all.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
    if let Some(name) = all.iter().find(|name| ServerName::try_from(name.as_str()).is_err()) {
        return Err(AuthorityError::Name(name.clone()));
    }
    let key = KeyPair::generate().map_err(making("make server key"))?;
    let mut params = leaf(&all[0], now, ExtendedKeyUsagePurpose::ServerAuth, random);
    params.subject_alt_names =
        CertificateParams::new(all).map_err(making("name server certificate"))?.subject_alt_names;
    let certificate = params.signed_by(&key, issuer).map_err(making("sign server certificate"))?;
    Ok((Zeroizing::new(key.serialize_pem()), certificate.pem()))
}

fn leaf(name: &str, now: Timestamp, usage: ExtendedKeyUsagePurpose, random: &dyn Random) -> CertificateParams {
    let mut params = named(name, now, CERTIFICATE_DAYS, random);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![usage];
    params.use_authority_key_identifier_extension = true;
    params
}

fn named(name: &str, now: Timestamp, days: u32, random: &dyn Random) -> CertificateParams {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let made = epoch + Duration::from_millis(now.0.max(0) as u64);
    let mut params = CertificateParams::default();
    params.not_before = (made - BACKDATED).max(epoch);
    params.not_after = made + DAY * days;
    params.serial_number = Some(SerialNumber::from(random::array::<16>(random).to_vec()));
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn issuer(pem: &str, key: &str) -> Result<Issuer<'static, KeyPair>, AuthorityError> {
    let key = KeyPair::from_pem(key).map_err(making("read authority key"))?;
    Issuer::from_ca_cert_pem(pem, key).map_err(making("read authority certificate"))
}

fn write_registry(storage: &dyn Storage, folder: &Path, registry: &Registry) -> Result<(), AuthorityError> {
    let path = folder.join("offices.json");
    let mut bytes = serde_json::to_vec_pretty(registry).expect("a registry has no unencodable types");
    bytes.push(b'\n');
    kept::write(storage, &path, &bytes).map_err(at("write registry", &path))
}

fn read_registry(storage: &dyn Storage, folder: &Path) -> Result<Registry, AuthorityError> {
    let path = folder.join("offices.json");
    // A newer program need not know of copies: its word is taken, also where the copy has another.
    if let Ok(bytes) = read_all(storage, &path, REGISTRY_BYTES_MAX)
        && let Err(Ok(version)) = Registry::parse(&bytes)
    {
        return Err(AuthorityError::Newer(version));
    }
    let bytes = read(storage, &path, REGISTRY_BYTES_MAX)?;
    Registry::parse(&bytes).map_err(|error| match error {
        Ok(version) => AuthorityError::Newer(version),
        Err(source) => AuthorityError::Registry { path, source },
    })
}

fn read_credentials(storage: &dyn Storage, key: &Path, certificate: &Path) -> Result<Credentials, AuthorityError> {
    let pem_error = |path: &Path| {
        let path = path.to_owned();
        move |source| AuthorityError::Pem { path, source }
    };
    let key_pem = read(storage, key, FILE_BYTES_MAX)?;
    let certificate_pem = read(storage, certificate, FILE_BYTES_MAX)?;
    Ok(Credentials {
        key: PrivateKeyDer::from_pem_slice(&key_pem).map_err(pem_error(key))?,
        certificate: CertificateDer::from_pem_slice(&certificate_pem).map_err(pem_error(certificate))?,
    })
}

fn read(storage: &dyn Storage, path: &Path, bytes_max: u64) -> Result<Zeroizing<Vec<u8>>, AuthorityError> {
    kept::read(storage, path, bytes_max).map_err(at("read", path))
}

fn read_text(storage: &dyn Storage, path: &Path) -> Result<Zeroizing<String>, AuthorityError> {
    let bytes = read(storage, path, FILE_BYTES_MAX)?;
    let text = String::from_utf8(bytes.to_vec()).map_err(|_| io::ErrorKind::InvalidData.into());
    text.map(Zeroizing::new).map_err(at("read", path))
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> AuthorityError {
    let path = path.to_owned();
    move |source| AuthorityError::Storage { action, path, source }
}

fn making(action: &'static str) -> impl FnOnce(rcgen::Error) -> AuthorityError {
    move |source| AuthorityError::Certificate { action, source }
}
