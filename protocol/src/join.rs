//! The join exchange: a token and a certificate request for an office's certificate.
//!
//! One request and one answer on the first stream of a connection with the ALPN protocol `ALPN`, which asks for no client
//! certificate. Encoded as the control messages are. The office's key never leaves the office: only its public half is in the
//! request, and of the request the target takes nothing else.

use crate::bundle::{StoreId, Token};
use crate::units::{GroupId, OfficeId, Timestamp};
use serde::{Deserialize, Serialize};

/// The ALPN protocol of a connection that joins.
pub const ALPN: &[u8] = b"cdp-join/1";
/// Bytes of a request or an answer.
pub const JOIN_BYTES_MAX: usize = 8 * 1024;
/// Groups told in an answer: of at most 96 bytes each, they fit beside the certificate.
pub const KNOWN_GROUPS_MAX: usize = 64;

/// What an office that joins asks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The target the bundle is for.
    pub store: StoreId,
    /// The one-time token.
    pub token: Token,
    /// Certificate signing request, DER.
    pub request: Vec<u8>,
}

/// What the target answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinAnswer {
    /// The office is enrolled.
    Welcome {
        /// Who it is.
        office: OfficeId,
        /// Its name.
        name: String,
        /// Its certificate, PEM.
        certificate: String,
        /// The target's clock.
        time: Timestamp,
        /// The groups it has already, at most 64: new hardware goes on with them.
        groups: Vec<KnownGroup>,
    },
    /// The office is not enrolled.
    Refused {
        /// Why.
        reason: JoinRefusal,
        /// The target's clock.
        time: Timestamp,
    },
}

/// A group of an office that joins anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownGroup {
    /// Its name.
    pub name: String,
    /// Its id.
    pub group: GroupId,
}

/// Why a token is not redeemed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum JoinRefusal {
    /// The target never made this token, or a newer bundle replaced it.
    #[error(
        "the target does not know this bundle: a newer one was made for the office, or the target was set up again"
    )]
    Unknown,
    /// The bundle is for a target with another store.
    #[error("the bundle is for another target")]
    AnotherTarget,
    /// The token was redeemed before, with another key.
    #[error("the bundle was already used")]
    AlreadyUsed,
    /// The token's time is over, by the target's clock.
    #[error("the bundle has expired")]
    Expired {
        /// When it did.
        at: Timestamp,
    },
    /// The certificate request is none.
    #[error("the target could not read the certificate request")]
    Request,
    /// The target failed, and says more in its log.
    #[error("the target failed to enroll the office; its log says why")]
    Failed,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{decode, encode};

    #[test]
    fn the_answer_is_these_bytes_and_a_request_that_is_cut_is_none() {
        let refused = JoinAnswer::Refused { reason: JoinRefusal::AlreadyUsed, time: Timestamp(7) };
        assert_eq!(encode(&refused), [1, 0, 0, 0, 2, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
        let request = JoinRequest { store: StoreId([1; 16]), token: Token::new([2; 32]), request: vec![3; 300] };
        let bytes = encode(&request);
        assert!(bytes.len() < JOIN_BYTES_MAX);
        assert_eq!(decode::<JoinRequest>(&bytes).expect("a request").request, request.request);
        for len in 0..bytes.len() {
            assert!(decode::<JoinRequest>(&bytes[..len]).is_err(), "cut to {len}");
        }
    }
}
