//! The one-time bundle: all that an office needs to join its target, in a text file.
//!
//! ```text
//! cdp-bundle 1                      magic word, version
//! 7b2273746f7265...                 the document (JSON), hexadecimal, 96 digits a line
//! checksum 9f86d081...              BLAKE3 of the lines above, each with its line feed; the last line
//! ```
//!
//! First and last line keep this form in every version, so that a newer bundle is told from a damaged one. Line ends may have
//! become CR LF on the way, and the last one may be missing. The bundle is a secret until it was used: it holds the token.

use crate::hex;
use crate::units::{FrameHash, OfficeId, Timestamp};
use serde::{Deserialize, Serialize};
use std::fmt;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Version of the format.
pub const BUNDLE_VERSION: u32 = 1;
/// Bytes of a bundle's text.
pub const BUNDLE_BYTES_MAX: usize = 64 * 1024;

const MAGIC: &str = "cdp-bundle ";
const CHECKSUM: &str = "checksum ";
const LINE_DIGITS: usize = 96;

/// A target's store; random, made at `init`. Lower-case hexadecimal in text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StoreId(#[serde(with = "hex")] pub [u8; 16]);

impl fmt::Display for StoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

/// What proves, once, that an office was invited. Never printed.
#[derive(Clone, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(transparent)]
pub struct Token(#[serde(with = "hex")] [u8; 32]);

impl Token {
    /// A token of random bytes.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The bytes, to be hashed or sent to the target.
    #[must_use]
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// What an office needs to join.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bundle {
    /// The target's store.
    pub store: StoreId,
    /// Where the target listens, each `HOST:PORT` or `ADDRESS:PORT`, in the order to try.
    pub targets: Vec<String>,
    /// Names the target's certificate is for; never empty.
    pub server_names: Vec<String>,
    /// The target's certificate authority, PEM: the only one the office believes.
    pub authority: String,
    /// Public half of the target's escrow key.
    #[serde(with = "hex")]
    pub escrow_public: Vec<u8>,
    /// The office.
    pub office: OfficeId,
    /// Its name.
    pub office_name: String,
    /// The one-time token.
    pub token: Token,
    /// When the token's time is over, by the target's clock.
    pub expires: Timestamp,
}

/// Why a text is not a bundle that can be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// It does not begin as a bundle does.
    #[error("not a cdp bundle")]
    NotABundle,
    /// The end is missing.
    #[error("the bundle is cut short: its end is missing")]
    CutShort,
    /// Something in it was changed.
    #[error("the bundle is damaged: its checksum does not match")]
    Damaged,
    /// Whole, but made by a newer target.
    #[error("the bundle has version {version}, this program reads up to {BUNDLE_VERSION}")]
    Newer {
        /// Its version.
        version: u32,
    },
    /// The checksum matches and the document is still none: made wrong, not damaged.
    #[error("the bundle does not hold what a bundle holds")]
    Document(#[source] serde_json::Error),
    /// A document of a wrong encoding, or without what has to be in it.
    #[error("the bundle does not hold what a bundle holds: {0}")]
    Content(&'static str),
}

impl Bundle {
    /// The bundle as the text of a file.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut document = serde_json::to_string(self).expect("a bundle has no unencodable types");
        let mut digits = hex::encode(document.as_bytes());
        document.zeroize();
        let mut text = format!("{MAGIC}{BUNDLE_VERSION}\n");
        for line in digits.as_bytes().chunks(LINE_DIGITS) {
            text.push_str(std::str::from_utf8(line).expect("hexadecimal digits"));
            text.push('\n');
        }
        digits.zeroize();
        let checksum = FrameHash(*blake3::hash(text.as_bytes()).as_bytes());
        [text.as_str(), CHECKSUM, &checksum.to_string(), "\n"].concat()
    }

    /// Reads a bundle from the bytes of a file. Does not judge `expires`: only the target's clock does.
    ///
    /// # Errors
    /// Where it is no bundle, or not all of one, or was changed, or is of a newer version.
    pub fn parse(bytes: &[u8]) -> Result<Self, BundleError> {
        let lines = checked_lines(bytes)?;
        let (first, document) = lines.split_first().ok_or(BundleError::NotABundle)?;
        let version: u32 = first[MAGIC.len()..].parse().map_err(|_| BundleError::Content("version"))?;
        if version > BUNDLE_VERSION {
            return Err(BundleError::Newer { version });
        }
        let json = hex::decode(&document.concat()).ok_or(BundleError::Content("hexadecimal digits"))?;
        let bundle: Self = serde_json::from_slice(&json).map_err(BundleError::Document)?;
        if bundle.targets.is_empty() || bundle.server_names.is_empty() {
            return Err(BundleError::Content("targets and their names"));
        }
        Ok(bundle)
    }
}

/// The lines before the checksum, once it was found to match.
fn checked_lines(bytes: &[u8]) -> Result<Vec<&str>, BundleError> {
    let whole_magic = bytes.len() >= MAGIC.len();
    if !bytes.starts_with(MAGIC.as_bytes()) {
        let begins = !whole_magic && MAGIC.as_bytes().starts_with(bytes);
        return Err(if begins { BundleError::CutShort } else { BundleError::NotABundle });
    }
    if bytes.len() > BUNDLE_BYTES_MAX {
        return Err(BundleError::Damaged);
    }
    let text = std::str::from_utf8(bytes).map_err(|_| BundleError::Damaged)?;
    let text = text.strip_suffix('\n').unwrap_or(text);
    let mut lines: Vec<&str> = text.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line)).collect();
    let last = lines.pop().unwrap_or_default();
    let Some(digits) = last.strip_prefix(CHECKSUM) else {
        return Err(without_checksum(last));
    };
    if digits.len() < 64 {
        return Err(BundleError::CutShort);
    }
    let checksum: FrameHash = digits.parse().map_err(|_| BundleError::Damaged)?;
    let mut hasher = blake3::Hasher::new();
    for line in &lines {
        hasher.update(line.as_bytes()).update(b"\n");
    }
    if hasher.finalize() == checksum.0 { Ok(lines) } else { Err(BundleError::Damaged) }
}

/// Where the last line is no checksum, it is one of the lines before it or the beginning of one.
fn without_checksum(last: &str) -> BundleError {
    let document = last.len() <= LINE_DIGITS && last.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let version = last.strip_prefix(MAGIC).is_some_and(|version| version.bytes().all(|byte| byte.is_ascii_digit()));
    if document || version || CHECKSUM.starts_with(last) { BundleError::CutShort } else { BundleError::Damaged }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle() -> Bundle {
        Bundle {
            store: StoreId([1; 16]),
            targets: vec!["backup.example.org:7443".into(), "192.0.2.1:7443".into()],
            server_names: vec!["backup.example.org".into()],
            authority: "-----BEGIN CERTIFICATE-----\n…".into(),
            escrow_public: vec![9; 32],
            office: OfficeId([2; 16]),
            office_name: "north".into(),
            token: Token::new([3; 32]),
            expires: Timestamp(1_800_000_000_000),
        }
    }

    #[test]
    fn a_bundle_survives_mail_but_is_not_printed() {
        let text = bundle().to_text();
        for sent in [text.clone(), text.trim_end().to_owned(), text.replace('\n', "\r\n")] {
            let read = Bundle::parse(sent.as_bytes()).expect("a bundle");
            assert_eq!(read.to_text(), text);
            assert_eq!(read.token.expose(), &[3; 32]);
            assert!(!format!("{read:?}").contains("3, 3"), "the token is not printed");
        }
    }

    #[test]
    fn cut_at_every_length_it_is_cut_short() {
        let text = bundle().to_text();
        for len in 0..text.len() - 1 {
            let error = Bundle::parse(&text.as_bytes()[..len]).expect_err("cut");
            assert!(matches!(error, BundleError::CutShort), "cut to {len}: {error}");
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let text = bundle().to_text().into_bytes();
        let mut damaged = 0;
        // The line feed at the very end may be missing, so what takes its place is judged with the checksum's line.
        for bit in 0..text.len() * 8 {
            let mut flipped = text.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            match Bundle::parse(&flipped).expect_err("one bit is flipped") {
                BundleError::NotABundle => assert!(bit / 8 < MAGIC.len(), "bit {bit}"),
                BundleError::Damaged => damaged += 1,
                other => panic!("bit {bit}: {other}"),
            }
        }
        assert_eq!(damaged, (text.len() - MAGIC.len()) * 8);
    }

    #[test]
    fn a_newer_version_is_named_and_other_texts_are_no_bundles() {
        let newer = format!("{MAGIC}2\nsomething else altogether\n");
        let checksum = blake3::hash(newer.as_bytes());
        let newer = format!("{newer}{CHECKSUM}{checksum}\n");
        assert!(matches!(Bundle::parse(newer.as_bytes()), Err(BundleError::Newer { version: 2 })));
        for other in [b"#!/bin/sh\n".as_slice(), b"{}", &[0xff; 40], b"cdp-bungle 1\n"] {
            assert!(matches!(Bundle::parse(other), Err(BundleError::NotABundle)));
        }
        let empty = format!("{MAGIC}1\n7b7d\n");
        let empty = format!("{empty}{CHECKSUM}{}\n", blake3::hash(empty.as_bytes()));
        assert!(matches!(Bundle::parse(empty.as_bytes()), Err(BundleError::Document(_))));
    }
}
