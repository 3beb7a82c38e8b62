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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, LISTEN_DEFAULT};
    use crate::enroll::Invite;
    use crate::store;
    use cdp_protocol::join::JoinRequest;
    use cdp_protocol::units::Timestamp;
    use cdp_seams::clock::SystemClock;
    use cdp_seams::storage::SystemStorage;
    use rcgen::{CertificateParams, KeyPair};
    use std::time::Duration;

    /// Lets an office join; gives its certificate.
    fn join(authority: &mut Authority, office: &str, replace: bool) -> CertificateDer<'static> {
        let targets = ["127.0.0.1:7443".to_owned()];
        let invite = Invite { office, targets: &targets, valid_for: Duration::from_secs(3600), replace };
        let bundle = authority.invite(&invite).expect("invited");
        let key = KeyPair::generate().expect("a key");
        let request = CertificateParams::default().serialize_request(&key).expect("a request");
        let request = JoinRequest { store: bundle.store, token: bundle.token, request: request.der().to_vec() };
        let redeemed = authority.redeem(&request).expect("redeemed");
        CertificateDer::from_pem_slice(redeemed.certificate.as_bytes()).expect("a certificate")
    }

    #[test]
    fn the_office_and_the_pinned_certificate_are_admitted_and_nobody_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let storage: Arc<dyn Storage> = Arc::new(SystemStorage);
        let (clock, random) = (Arc::new(SystemClock::new()), Arc::new(SystemRandom));
        let mut made = None;
        let at = folder.path().join("store");
        store::init(&storage, &at, &Config::new(LISTEN_DEFAULT, vec![]), Timestamp(0), |authority| {
            let names = ["backup.example".to_owned()];
            let authority = Authority::create(Arc::clone(&storage), clock.clone(), random.clone(), authority, &names);
            let id = made.insert(authority.expect("made")).store().to_string();
            Ok::<_, store::StoreError>(id)
        })
        .expect("a store");
        let mut authority = made.expect("made");
        let (paris, berlin) = (join(&mut authority, "paris", false), join(&mut authority, "berlin", false));
        let store = Store::open(Arc::clone(&storage), &at).expect("opened");
        let office = authority.admit(&paris).expect("enrolled").office;
        let tls = |credentials: &str| {
            let folder = folder.path().join(credentials);
            Tls::new(&store, &authority, clock.clone(), office, Some(&folder)).expect("credentials")
        };
        let read = |credentials: &str| {
            let path = folder.path().join(credentials).join(CERTIFICATE_FILE);
            CertificateDer::from_pem_slice(&read_all(&SystemStorage, &path, FILE_BYTES_MAX).expect("made"))
                .expect("PEM")
        };
        let (mine, other) = (tls("mine"), tls("other"));
        assert!(mine.judge(None).is_err(), "nobody");
        for (certificate, is_admitted) in
            [(&read("mine"), true), (&read("other"), false), (&paris, true), (&berlin, false)]
        {
            assert_eq!(mine.judge(Some(certificate)).is_ok(), is_admitted);
        }
        assert!(other.judge(Some(&read("mine"))).is_err());
        assert!(tls("mine").judge(Some(&read("mine"))).is_ok(), "the folder stays good");
        drop((mine, other));
        let again = Tls::new(&store, &authority, clock.clone(), office, None).expect("no credentials");
        join(&mut authority, "paris", true);
        assert!(again.judge(Some(&paris)).is_err(), "revoked while the server runs");
    }
}
