//! Who is enrolled: the registry of offices, invitations (one-time bundles), and how one is redeemed.
//!
//! Invariants: a token is redeemed by one key only, and not after its time; of an office only certificates that stand unrevoked
//! in the registry admit anyone; who redeems one takes the place of the hardware
//! before, whose certificate is revoked with it; until then that goes on. What is written here is durable before anybody
//! hears of it. Tokens are kept as hashes. Keys and files are `authority.rs`.

use crate::authority::{Authority, AuthorityError, Fingerprint, parse_request, sha256};
use cdp_protocol::bundle::{Bundle, StoreId, Token};
use cdp_protocol::hex;
use cdp_protocol::join::{JoinRefusal, JoinRequest};
use cdp_protocol::limits::is_name;
use cdp_protocol::units::{OfficeId, Timestamp};
use cdp_seams::random;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use std::time::Duration;

const REGISTRY_VERSION: u32 = 1;
/// Invitations remembered of an office, so that a used one can be told from an unknown one.
const INVITATIONS_MAX: usize = 16;

/// What `offices.json` holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Registry {
    version: u32,
    pub(crate) store: StoreId,
    #[serde(with = "hex")]
    pub(crate) escrow_public: Vec<u8>,
    pub(crate) server_names: Vec<String>,
    offices: Vec<Office>,
}

/// An office, a tenant of the target.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Office {
    /// Its id; stays when its hardware is replaced.
    pub id: OfficeId,
    /// Its name.
    pub name: String,
    /// Its certificates, oldest first.
    pub certificates: Vec<OfficeCertificate>,
    invitations: Vec<Invitation>,
}

/// A certificate signed for an office.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OfficeCertificate {
    /// Which.
    pub fingerprint: Fingerprint,
    /// When it was signed.
    pub signed: Timestamp,
    /// Since when it admits nobody.
    pub revoked: Option<Timestamp>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Invitation {
    token_hash: Fingerprint,
    expires: Timestamp,
    redeemed_by: Option<Fingerprint>,
}

/// How far an office is enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OfficeState {
    /// It has a certificate that admits it.
    Enrolled,
    /// It has a bundle that it did not use yet.
    Invited,
    /// Neither: its bundle expired.
    Expired,
}

/// A request for a bundle.
#[derive(Clone, Debug)]
pub struct Invite<'a> {
    /// The office's name.
    pub office: &'a str,
    /// Where the target listens, each `HOST:PORT`.
    pub targets: &'a [String],
    /// How long the bundle may be used.
    pub valid_for: Duration,
    /// Whether an enrolled office is to be enrolled again, on new hardware; its certificates are revoked when that joins.
    pub replace: bool,
}

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// Not a name.
    #[error("\"{0}\" cannot name an office: 1 to 64 of a-z A-Z 0-9 . _ -, not starting with a dot or a dash")]
    Name(String),
    /// The office has a certificate.
    #[error("office {0} is enrolled already")]
    AlreadyEnrolled(String),
    /// Nothing to replace.
    #[error("no office {0} to replace")]
    UnknownOffice(String),
    /// No address for the bundle.
    #[error("no address of this target to put into the bundle")]
    NoTarget,
    /// The registry could not be written.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

impl EnrollError {
    /// The next step, where there is one.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::AlreadyEnrolled(_) => Some(
                "--replace enrolls new hardware for it: groups and history are kept, the old certificate is revoked when the new one joins",
            ),
            Self::UnknownOffice(_) => Some("without --replace a new office is enrolled; `status` lists the known ones"),
            Self::NoTarget => Some("name the target with `init --name HOST`, or set an address in target.toml"),
            Self::Name(_) | Self::Authority(_) => None,
        }
    }
}

/// Who a certificate admits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admitted {
    /// The office.
    pub office: OfficeId,
    /// Its name.
    pub name: String,
    /// The certificate.
    pub fingerprint: Fingerprint,
}

/// Why a certificate signed by our authority admits nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// It is not in the registry.
    #[error("the certificate is of no office this target knows")]
    Unknown,
    /// It was revoked.
    #[error("the certificate was revoked: this office was enrolled anew on other hardware")]
    Revoked,
}

/// A redeemed invitation.
#[derive(Clone, Debug)]
pub struct Redeemed {
    /// The office.
    pub office: OfficeId,
    /// Its name.
    pub name: String,
    /// Its certificate, PEM.
    pub certificate: String,
}

impl Registry {
    pub(crate) fn new(store: StoreId, escrow_public: Vec<u8>, server_names: Vec<String>) -> Self {
        Self { version: REGISTRY_VERSION, store, escrow_public, server_names, offices: Vec::new() }
    }

    /// The registry of a file; `Err(Ok(version))` where a newer program wrote it.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Result<u32, serde_json::Error>> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_slice(bytes).map_err(Err)?;
        if version > REGISTRY_VERSION {
            return Err(Ok(version));
        }
        serde_json::from_slice(bytes).map_err(Err)
    }

    fn invitation(&self, hash: Fingerprint) -> Option<(usize, usize)> {
        let of_office = |(at, office): (usize, &Office)| {
            let found = office.invitations.iter().position(|invitation| same(invitation.token_hash, hash));
            found.map(|invitation| (at, invitation))
        };
        self.offices.iter().enumerate().find_map(of_office)
    }
}

impl Office {
    fn is_enrolled(&self) -> bool {
        self.certificates.iter().any(|certificate| certificate.revoked.is_none())
    }

    fn revoke(&mut self, now: Timestamp) {
        for certificate in &mut self.certificates {
            certificate.revoked.get_or_insert(now);
        }
    }

    /// How far the office is enrolled at `now`.
    #[must_use]
    pub fn state(&self, now: Timestamp) -> OfficeState {
        let open = |invitation: &Invitation| invitation.redeemed_by.is_none() && now <= invitation.expires;
        match () {
            () if self.is_enrolled() => OfficeState::Enrolled,
            () if self.invitations.iter().any(open) => OfficeState::Invited,
            () => OfficeState::Expired,
        }
    }
}

impl Authority {
    /// The offices, in the order in which they were first invited.
    #[must_use]
    pub fn offices(&self) -> &[Office] {
        &self.registry.offices
    }

    /// Makes a bundle for an office. An earlier bundle of it that was not used is void from now on.
    ///
    /// # Errors
    /// Where the name is none, or the office is enrolled and not to be replaced, or the reverse, or the registry cannot be
    /// written.
    pub fn invite(&mut self, invite: &Invite<'_>) -> Result<Bundle, EnrollError> {
        let name = invite.office;
        if !is_name(name) {
            return Err(EnrollError::Name(name.to_owned()));
        }
        if invite.targets.is_empty() {
            return Err(EnrollError::NoTarget);
        }
        let now = Timestamp(self.clock.wall_ms());
        let mut registry = self.registry.clone();
        let known = registry.offices.iter().position(|office| office.name == name);
        let at = match known {
            Some(at) if registry.offices[at].is_enrolled() && !invite.replace => {
                return Err(EnrollError::AlreadyEnrolled(name.to_owned()));
            }
            Some(at) => at,
            None if invite.replace => return Err(EnrollError::UnknownOffice(name.to_owned())),
            None => {
                let id = OfficeId(random::array(&*self.random));
                registry.offices.push(Office {
                    id,
                    name: name.to_owned(),
                    certificates: Vec::new(),
                    invitations: Vec::new(),
                });
                registry.offices.len() - 1
            }
        };
        let office = &mut registry.offices[at];
        let token = Token::new(random::array(&*self.random));
        let valid_ms = i64::try_from(invite.valid_for.as_millis()).unwrap_or(i64::MAX);
        let expires = Timestamp(now.0.saturating_add(valid_ms));
        office.invitations.retain(|invitation| invitation.redeemed_by.is_some());
        let surplus = office.invitations.len().saturating_sub(INVITATIONS_MAX - 1);
        office.invitations.drain(..surplus);
        office.invitations.push(Invitation { token_hash: hash(&token), expires, redeemed_by: None });
        let id = office.id;
        self.store_registry(registry)?;
        Ok(self.bundle(invite, id, token, expires))
    }

    fn bundle(&self, invite: &Invite<'_>, office: OfficeId, token: Token, expires: Timestamp) -> Bundle {
        let mut server_names = self.registry.server_names.clone();
        if server_names.is_empty() {
            server_names.push("localhost".to_owned());
        }
        Bundle {
            store: self.registry.store,
            targets: invite.targets.to_vec(),
            server_names,
            authority: self.certificate_pem().to_owned(),
            escrow_public: self.registry.escrow_public.clone(),
            office,
            office_name: invite.office.to_owned(),
            token,
            expires,
        }
    }

    /// Redeems a token: signs a certificate for the key of the request. The same key may ask again until the token's time is
    /// over, because an answer can be lost; it gets a new certificate for the one before.
    ///
    /// # Errors
    /// Where the token is for another target, unknown, used or too old, or no certificate can be made.
    pub fn redeem(&mut self, request: &JoinRequest) -> Result<Redeemed, RedeemError> {
        let now = Timestamp(self.clock.wall_ms());
        let mut registry = self.registry.clone();
        if request.store != registry.store {
            return Err(JoinRefusal::AnotherTarget.into());
        }
        let (parsed, key) = parse_request(&request.request).ok_or(JoinRefusal::Request)?;
        let (at, which) = registry.invitation(hash(&request.token)).ok_or(JoinRefusal::Unknown)?;
        let office = &mut registry.offices[at];
        let newest = office.invitations.len() - 1;
        let invitation = &mut office.invitations[which];
        if invitation.redeemed_by.is_some_and(|by| by != key) {
            return Err(JoinRefusal::AlreadyUsed.into());
        }
        if now > invitation.expires {
            return Err(JoinRefusal::Expired { at: invitation.expires }.into());
        }
        // A bundle that was made later (for new hardware) voids this one, even for the key that redeemed it.
        if which != newest {
            return Err(JoinRefusal::AlreadyUsed.into());
        }
        invitation.redeemed_by = Some(key);
        let certificate = self.sign_office(office.id, &parsed)?;
        office.revoke(now);
        office.certificates.push(OfficeCertificate {
            fingerprint: Fingerprint::of(certificate.der()),
            signed: now,
            revoked: None,
        });
        let redeemed = Redeemed { office: office.id, name: office.name.clone(), certificate: certificate.pem() };
        self.store_registry(registry)?;
        Ok(redeemed)
    }

    /// Which office a certificate admits. The caller has checked that our authority signed it and that it is valid now.
    ///
    /// # Errors
    /// Where it is not in the registry, or revoked.
    pub fn admit(&self, certificate: &CertificateDer<'_>) -> Result<Admitted, NotAdmitted> {
        self.admit_fingerprint(Fingerprint::of(certificate))
    }

    pub(crate) fn admit_fingerprint(&self, fingerprint: Fingerprint) -> Result<Admitted, NotAdmitted> {
        let of_office = |office: &Office| {
            let found = office.certificates.iter().find(|known| known.fingerprint == fingerprint)?;
            Some((office.id, office.name.clone(), found.revoked))
        };
        match self.registry.offices.iter().find_map(of_office) {
            Some((office, name, None)) => Ok(Admitted { office, name, fingerprint }),
            Some(_) => Err(NotAdmitted::Revoked),
            None => Err(NotAdmitted::Unknown),
        }
    }
}

/// Why a token was not redeemed.
#[derive(Debug, thiserror::Error)]
pub enum RedeemError {
    /// The office's mistake.
    #[error(transparent)]
    Refused(#[from] JoinRefusal),
    /// Ours.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

impl RedeemError {
    /// What the office is told.
    #[must_use]
    pub fn refusal(&self) -> JoinRefusal {
        match self {
            Self::Refused(refusal) => *refusal,
            Self::Authority(_) => JoinRefusal::Failed,
        }
    }
}

fn hash(token: &Token) -> Fingerprint {
    Fingerprint(sha256(token.expose()))
}

/// Compares two hashes of tokens in constant time.
fn same(one: Fingerprint, other: Fingerprint) -> bool {
    aws_lc_rs::constant_time::verify_slices_are_equal(&one.0, &other.0).is_ok()
}
