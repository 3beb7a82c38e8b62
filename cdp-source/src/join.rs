//! Joining a target: a key is made here, the bundle's token is redeemed for a certificate, and both are kept.
//!
//! Invariants: the key never leaves; nothing but the bundle's authority is believed; the identity is complete when `target.json`
//! is there, written last. A join that was broken off anywhere can be repeated with the same bundle: the key is kept, and the
//! target gives the same key its certificate again. Only the target's clock judges whether the bundle has expired.

use crate::connect::{ConnectError, Dial, Identity, JoinedTarget};
use cdp_protocol::bundle::{Bundle, BundleError};
use cdp_protocol::join::{self, JOIN_BYTES_MAX, JoinAnswer, JoinRefusal, JoinRequest};
use cdp_protocol::message::{self, MessageError};
use cdp_protocol::units::Timestamp;
use cdp_seams::clock::Clock;
use cdp_seams::line::Line;
use cdp_seams::storage::{Storage, read_all, replace};
use cdp_seams::tls;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;
use zeroize::Zeroizing;

/// How long the target may take to answer, once it was reached.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// Clocks further apart than this are worth a warning.
const CLOCKS_APART_MS: u64 = 5 * 60 * 1000;
const KEY_BYTES_MAX: u64 = 16 * 1024;

/// What came of a join.
#[derive(Clone, Debug)]
pub struct Joined {
    /// The target, as it was stored.
    pub target: JoinedTarget,
    /// Our clock minus the target's, in milliseconds, at the answer; rough.
    pub clock_ahead_ms: i64,
}

impl Joined {
    /// A warning where the clocks are more than five minutes apart; everything works, but times of points mislead.
    #[must_use]
    pub fn clock_warning(&self) -> Option<String> {
        let apart_ms = self.clock_ahead_ms.unsigned_abs();
        let side = if self.clock_ahead_ms > 0 { "ahead of" } else { "behind" };
        (apart_ms > CLOCKS_APART_MS)
            .then(|| format!("this machine's clock is {} minutes {side} the target's", apart_ms / 60_000))
    }
}

/// Why an office did not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The bundle is not one that can be used.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The bundle's authority is no certificate.
    #[error("the bundle holds no certificate authority")]
    Authority(#[source] rustls::pki_types::pem::Error),
    /// The office joined before.
    #[error("this office already joined as {office}: path={path}")]
    AlreadyJoined {
        /// Its name.
        office: String,
        /// Where its identity is.
        path: PathBuf,
    },
    /// The target said no.
    #[error(transparent)]
    Refused(#[from] JoinRefusal),
    /// The target was not reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The connection broke during the exchange.
    #[error("redeem bundle: the connection broke")]
    Broken(#[source] io::Error),
    /// The answer did not come in time.
    #[error("redeem bundle: no answer in time")]
    NoAnswer,
    /// The answer does not decode.
    #[error("redeem bundle: the target's answer does not decode")]
    Answer(#[source] MessageError),
    /// The key or the request could not be made.
    #[error("make key and certificate request")]
    Request(#[source] rcgen::Error),
    /// A file of the state folder could not be read or written.
    #[error("{action}: path={path}")]
    Storage {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl JoinError {
    /// The next step, where there is one.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Bundle(BundleError::NotABundle) => Some("`cdp-target enroll OFFICE --output FILE` makes one"),
            Self::Bundle(BundleError::Newer { .. }) => Some("upgrade cdp-source"),
            Self::Bundle(_) => Some("copy the file again, or make a new one with `cdp-target enroll OFFICE`"),
            Self::AlreadyJoined { .. } => Some("`cdp-source status` shows the target; to join another one, use another --state folder"),
            Self::Refused(JoinRefusal::AnotherTarget) => Some("leave out --target, or take the bundle of this target"),
            Self::Refused(JoinRefusal::AlreadyUsed) => {
                Some("`cdp-target enroll OFFICE --replace` makes a new bundle; if it was not you who used this one, do so at once")
            }
            Self::Refused(JoinRefusal::Expired { .. } | JoinRefusal::Unknown) => {
                Some("`cdp-target enroll OFFICE` makes a new bundle (with --replace for an enrolled office)")
            }
            Self::Connect(error @ ConnectError::WrongTarget { .. }) => error.hint().and(Some(
                "the bundle is for another target, or the target was set up anew; check --target, and see that the clock is right",
            )),
            Self::Connect(error) => error.hint(),
            Self::Broken(_) | Self::NoAnswer => Some("try again with the same bundle"),
            _ => None,
        }
    }
}

/// Joins the target of a bundle, at `target` (`HOST:PORT`) if one is given, and stores the identity in the state folder.
///
/// # Errors
/// Where the bundle is not one, the office joined before, the target is not reached or says no, or the folder cannot be written.
pub async fn join(
    bundle: &[u8],
    target: Option<&str>,
    storage: Arc<dyn Storage>,
    state: &Path,
    clock: Arc<dyn Clock>,
) -> Result<Joined, JoinError> {
    let bundle = Bundle::parse(bundle)?;
    let folder = Identity::folder(state);
    let key = {
        let (storage, folder) = (Arc::clone(&storage), folder.clone());
        blocking(move || prepare(&*storage, &folder)).await?
    };
    let request = CertificateParams::default().serialize_request(&key).map_err(JoinError::Request)?;
    let authority = CertificateDer::from_pem_slice(bundle.authority.as_bytes()).map_err(JoinError::Authority)?;
    let targets = target.map_or_else(|| bundle.targets.clone(), |target| vec![target.to_owned()]);
    let tls = tls::client(&authority, None, join::ALPN, Arc::clone(&clock)).map_err(ConnectError::from)?;
    let dial = Dial { tls, server_name: bundle.server_names[0].clone(), targets: targets.clone() };
    let (line, _) = dial.admitted().await?;
    let request = JoinRequest { store: bundle.store, token: bundle.token.clone(), request: request.der().to_vec() };
    let answer = timeout(ANSWER_TIMEOUT, exchange(&line, &request)).await.map_err(|_| JoinError::NoAnswer)??;
    drop(line);
    let ((office, office_name, groups), certificate, time) = match answer {
        JoinAnswer::Welcome { office, name, certificate, time, groups } => ((office, name, groups), certificate, time),
        JoinAnswer::Refused { reason, .. } => return Err(reason.into()),
    };
    let target = JoinedTarget {
        version: JoinedTarget::version(),
        store: bundle.store,
        targets,
        server_name: bundle.server_names[0].clone(),
        escrow_public: bundle.escrow_public.clone(),
        office,
        office_name,
        groups: groups.into_iter().map(|known| (known.name, known.group)).collect(),
    };
    let stored = target.clone();
    blocking(move || store(&*storage, &folder, &bundle.authority, &certificate, &stored)).await?;
    Ok(Joined { target, clock_ahead_ms: clock_ahead_ms(&*clock, time) })
}

fn clock_ahead_ms(clock: &dyn Clock, target: Timestamp) -> i64 {
    clock.wall_ms().saturating_sub(target.0)
}

async fn exchange(line: &dyn Line, request: &JoinRequest) -> Result<JoinAnswer, JoinError> {
    let mut control = line.open_control().await.map_err(JoinError::Broken)?;
    let bytes = Zeroizing::new(message::encode(request));
    control.send.write_all(&bytes).await.map_err(JoinError::Broken)?;
    control.send.shutdown().await.map_err(JoinError::Broken)?;
    let mut answer = Vec::new();
    let mut bounded = control.receive.take(JOIN_BYTES_MAX as u64);
    bounded.read_to_end(&mut answer).await.map_err(JoinError::Broken)?;
    message::decode(&answer).map_err(JoinError::Answer)
}

/// The key of this office: a new one, or the one that an earlier join made and did not come to use.
fn prepare(storage: &dyn Storage, folder: &Path) -> Result<KeyPair, JoinError> {
    match Identity::load(storage, folder.parent().unwrap_or(folder)) {
        Ok(identity) => {
            return Err(JoinError::AlreadyJoined { office: identity.target.office_name, path: folder.to_owned() });
        }
        Err(crate::connect::IdentityError::NotJoined(_)) => {}
        Err(_) => return Err(JoinError::AlreadyJoined { office: "unknown".to_owned(), path: folder.to_owned() }),
    }
    let path = folder.join("office.key");
    let stored = read_all(storage, &path, KEY_BYTES_MAX).map(Zeroizing::new);
    let kept = stored.ok().and_then(|bytes| KeyPair::from_pem(std::str::from_utf8(&bytes).ok()?).ok());
    if let Some(key) = kept {
        return Ok(key);
    }
    let key = KeyPair::generate().map_err(JoinError::Request)?;
    let pem = Zeroizing::new(key.serialize_pem());
    storage.create_dir_all(folder).map_err(at("make folder", folder))?;
    replace(storage, &path, pem.as_bytes()).map_err(at("write key", &path))?;
    Ok(key)
}

/// Keeps what the target gave. A crash before `target.json` leaves an office that did not join, with its key.
fn store(
    storage: &dyn Storage,
    folder: &Path,
    authority: &str,
    certificate: &str,
    target: &JoinedTarget,
) -> Result<(), JoinError> {
    let json = serde_json::to_vec_pretty(target).expect("a target has no unencodable types");
    let files = [("ca.pem", authority.as_bytes()), ("office.pem", certificate.as_bytes()), ("target.json", &json)];
    for (name, bytes) in files {
        let path = folder.join(name);
        replace(storage, &path, bytes).map_err(at("write identity", &path))?;
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, JoinError> + Send + 'static,
) -> Result<T, JoinError> {
    tokio::task::spawn_blocking(work).await.expect("file work does not panic and is not aborted")
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> JoinError {
    let path = path.to_owned();
    move |source| JoinError::Storage { action, path, source }
}
