//! Who may have a point over TCP.
//!
//! A point is all that an office has, so a connection is encrypted, by the target's own authority, and a client shows a certificate
//! of it. One of two is admitted, and nobody else whatever the authority has signed: the office's own, as long as the registry has it
//! unrevoked, and the one in the folder of credentials that the server was started with. That folder is made where there is none, as
//! libnbd, QEMU and nbdkit expect one; whoever has its key may read the point as long as a server is started with it.

use crate::authority::{Authority, AuthorityError, Fingerprint};
use crate::restore::image::one_line;
use crate::store::Store;
use cdp_protocol::units::OfficeId;
use cdp_seams::clock::Clock;
use cdp_seams::random::SystemRandom;
use cdp_seams::storage::{Storage, read_all};
use cdp_seams::tls::{self, TlsError};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ServerConfig, ServerConnection};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The files of a folder of credentials, by the names that NBD clients look for.
const AUTHORITY_FILE: &str = "ca-cert.pem";
const CERTIFICATE_FILE: &str = "client-cert.pem";
const KEY_FILE: &str = "client-key.pem";
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// Encrypts connections, and judges who is at their other end.
pub struct Tls {
    config: Arc<ServerConfig>,
    store: Store,
    clock: Arc<dyn Clock>,
    office: OfficeId,
    pinned: Option<Fingerprint>,
}

/// Why nobody can connect.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A folder with something else in it.
    #[error("folder {} is not empty and has no {CERTIFICATE_FILE}", .0.display())]
    NotEmpty(PathBuf),
    /// A certificate that cannot be read.
    #[error("{} is no certificate", .path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: rustls::pki_types::pem::Error,
    },
    /// The system refused.
    #[error("{verb} {}", .path.display())]
    System {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The authority could not sign.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The server's own certificate is of no use.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl Tls {
    /// Connections to the groups of `office`.
    ///
    /// # Errors
    /// Where the store's certificates are of no use, or the folder of credentials cannot be made or read.
    pub fn new(
        store: &Store,
        authority: &Authority,
        clock: Arc<dyn Clock>,
        office: OfficeId,
        credentials: Option<&Path>,
    ) -> Result<Self, CredentialsError> {
        let storage = store.storage().as_ref();
        let pinned = credentials.map(|folder| pinned(storage, authority, folder)).transpose()?;
        let config = tls::server(authority.certificate(), authority.server().clone(), &[], Arc::clone(&clock))?;
        Ok(Self { config: Arc::new(config), store: store.clone(), clock, office, pinned })
    }

    /// A connection's state.
    pub(super) fn connection(&self) -> Result<ServerConnection, rustls::Error> {
        ServerConnection::new(Arc::clone(&self.config))
    }

    /// Whether a certificate that the authority signed admits whoever showed it; else what they are told.
    pub(super) fn judge(&self, certificate: Option<&CertificateDer<'_>>) -> Result<(), &'static str> {
        let certificate = certificate.ok_or("show a client certificate of this target's authority")?;
        if self.pinned == Some(Fingerprint::of(certificate)) {
            return Ok(());
        }
        // Read anew: it may have been revoked meanwhile.
        let (storage, random) = (Arc::clone(self.store.storage()), Arc::new(SystemRandom));
        let folder = self.store.authority_folder();
        let admitted = match Authority::open(storage, Arc::clone(&self.clock), random, &folder) {
            Ok(authority) => authority.admit(certificate).is_ok_and(|admitted| admitted.office == self.office),
            Err(error) => {
                tracing::error!(error = one_line(&error), "nobody is admitted: the registry of offices cannot be read");
                false
            }
        };
        if admitted { Ok(()) } else { Err("this certificate is not admitted here") }
    }
}

/// The certificate of a folder of credentials, which is made where there is none.
fn pinned(storage: &dyn Storage, authority: &Authority, folder: &Path) -> Result<Fingerprint, CredentialsError> {
    let path = folder.join(CERTIFICATE_FILE);
    let pem = match read_all(storage, &path, FILE_BYTES_MAX) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(storage, authority, folder)?,
        read => read.map_err(system("read", &path))?,
    };
    let certificate = CertificateDer::from_pem_slice(&pem);
    Ok(Fingerprint::of(&certificate.map_err(|source| CredentialsError::Certificate { path, source })?))
}

/// Makes the credentials. A crash leaves a folder without the certificate, which is refused the next time as not empty.
fn make(storage: &dyn Storage, authority: &Authority, folder: &Path) -> Result<Vec<u8>, CredentialsError> {
    storage.create_dir_all(folder).map_err(system("make folder", folder))?;
    if !storage.list(folder).map_err(system("list folder", folder))?.is_empty() {
        return Err(CredentialsError::NotEmpty(folder.to_owned()));
    }
    let (key, certificate) = authority.sign_reader()?;
    let files = [
        (AUTHORITY_FILE, authority.certificate_pem().as_bytes()),
        (KEY_FILE, key.as_bytes()),
        (CERTIFICATE_FILE, certificate.as_bytes()),
    ];
    for (name, bytes) in files {
        let path = folder.join(name);
        let file = storage.create_new(&path).map_err(system("make", &path))?;
        file.write_at(bytes, 0).and_then(|()| file.sync()).map_err(system("write", &path))?;
    }
    storage.sync_dir(folder).map_err(system("sync folder", folder))?;
    Ok(certificate.into_bytes())
}

fn system(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CredentialsError {
    move |source| CredentialsError::System { verb, path: path.to_owned(), source }
}
