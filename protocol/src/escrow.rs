//! Escrow: a group's data key, sealed to the target's escrow key with HPKE (RFC 9180, X25519, HKDF-SHA256, AES-256-GCM).
//!
//! The default, so that export, drills and repacking work unattended. The office seals; the target keeps the envelope and
//! opens it with its escrow key. The group and the key's name are bound into the seal.

use crate::seal::DataKey;
use crate::units::{GroupId, KeyId};
use rustls::crypto::aws_lc_rs::hpke::DH_KEM_X25519_HKDF_SHA256_AES_256 as SUITE;
use rustls::crypto::hpke::{EncapsulatedSecret, Hpke, HpkePrivateKey, HpkePublicKey};
use serde::{Deserialize, Serialize};

const INFO: &[u8] = b"cdp 2026-11 escrow v1";

/// A data key sealed to a target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// Name of the key inside.
    pub key: KeyId,
    /// HPKE's encapsulated secret, 32 bytes.
    pub encapsulated: Vec<u8>,
    /// The sealed key, 48 bytes.
    pub sealed: Vec<u8>,
}

/// The target's side of escrow. Never printed.
pub struct EscrowKey(HpkePrivateKey);

/// Why an envelope could not be made or opened.
#[derive(Debug, thiserror::Error)]
pub enum EscrowError {
    /// HPKE refused: another escrow key, another group, or damage.
    #[error("escrow envelope does not open: damaged, or sealed to another target")]
    Hpke(#[source] rustls::Error),
    /// What was inside is no data key.
    #[error("escrow envelope does not hold a data key of 32 bytes")]
    Length,
}

impl std::fmt::Debug for EscrowKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EscrowKey(…)")
    }
}

impl EscrowKey {
    /// Makes a key pair; gives back the secret and the public half.
    ///
    /// # Errors
    /// Where the random source fails.
    pub fn generate() -> Result<(Self, Vec<u8>), EscrowError> {
        let (public, private) = SUITE.generate_key_pair().map_err(EscrowError::Hpke)?;
        Ok((Self(private), public.0))
    }

    /// Takes back a key that was stored.
    #[must_use]
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(HpkePrivateKey::from(bytes))
    }

    /// The secret's bytes, to be stored and nothing else.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        self.0.secret_bytes()
    }

    /// Opens the envelope of a group.
    ///
    /// # Errors
    /// Where it was sealed to another target or for another group, or is damaged.
    pub fn open(&self, group: &GroupId, envelope: &Envelope) -> Result<DataKey, EscrowError> {
        let encapsulated = EncapsulatedSecret(envelope.encapsulated.clone());
        let mut plain = SUITE
            .open(&encapsulated, INFO, &associated_data(group, envelope.key), &envelope.sealed, &self.0)
            .map_err(EscrowError::Hpke)?;
        let key = <[u8; 32]>::try_from(plain.as_slice()).map_err(|_| EscrowError::Length);
        zeroize::Zeroize::zeroize(&mut plain);
        key.map(DataKey::new)
    }
}

/// Seals `data_key`, named `key`, to the target whose escrow key has the public half `public`.
///
/// # Errors
/// Where `public` is no key.
pub fn seal(group: &GroupId, key: KeyId, data_key: &DataKey, public: &[u8]) -> Result<Envelope, EscrowError> {
    let public = HpkePublicKey(public.to_vec());
    let (encapsulated, sealed) =
        SUITE.seal(INFO, &associated_data(group, key), data_key.expose(), &public).map_err(EscrowError::Hpke)?;
    Ok(Envelope { key, encapsulated: encapsulated.0, sealed })
}

fn associated_data(group: &GroupId, key: KeyId) -> Vec<u8> {
    [group.0.as_slice(), &key.0].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_target_it_was_sealed_to_opens_an_envelope_for_its_group() {
        let (secret, public) = EscrowKey::generate().expect("random bytes");
        let (other, _) = EscrowKey::generate().expect("random bytes");
        let group = GroupId([1; 16]);
        let envelope = seal(&group, KeyId([2; 8]), &DataKey::new([3; 32]), &public).expect("a public key");
        assert_eq!(secret.open(&group, &envelope).expect("its own").expose(), &[3; 32]);
        assert!(other.open(&group, &envelope).is_err());
        assert!(secret.open(&GroupId([9; 16]), &envelope).is_err());
        assert!(seal(&group, KeyId([2; 8]), &DataKey::new([3; 32]), &[0; 3]).is_err());
    }
}
