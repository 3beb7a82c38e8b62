//! Keys and seals: AES-256-GCM for what a frame carries, keyed BLAKE3 for records and digests.
//!
//! Invariant: nothing is ever sealed twice under one attempt. The key of an attempt comes from the group's data key and
//! the attempt's random id, the nonce from the frame's sequence; a stored frame may be sent again as it is, anything
//! else needs a new attempt. Records (begin, part end, commit) are in the clear, so that a target without the key can
//! index and prune; they carry a keyed BLAKE3 instead, for which a repeated input is harmless.

use crate::units::{AttemptId, BLOCK_BYTES, Sequence};
use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Bytes that a seal adds.
pub const TAG_BYTES: usize = 16;
/// Bytes of a block's digest.
pub const DIGEST_BYTES: usize = 16;

/// A block's digest: 16 bytes of BLAKE3, keyed by the group's data key.
pub type Digest = [u8; DIGEST_BYTES];

/// A group's data key: made at the office, never printed.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct DataKey([u8; 32]);

impl std::fmt::Debug for DataKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DataKey(…)")
    }
}

/// What a sealed section is, within its frame: part of the nonce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Section {
    /// The content.
    Content = 0,
    /// The digests of its blocks.
    Digests = 1,
}

/// A seal did not open: another key, or other bytes than were sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the seal does not hold: damaged, or sealed under another key")]
pub struct SealBroken;

impl DataKey {
    /// Takes 32 random bytes as a key.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The key's bytes, to be stored or put into escrow and nothing else.
    #[must_use]
    pub const fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// The key that seals the frames of one attempt.
    #[must_use]
    pub fn attempt_key(&self, attempt: &AttemptId) -> AttemptKey {
        let mut material = [0; 48];
        material[..32].copy_from_slice(&self.0);
        material[32..].copy_from_slice(&attempt.0);
        let mut key = blake3::derive_key("cdp 2026-11 frame seal v1", &material);
        material.zeroize();
        let unbound = UnboundKey::new(&AES_256_GCM, &key).expect("32 bytes are a key of AES-256");
        key.zeroize();
        AttemptKey(LessSafeKey::new(unbound))
    }

    /// The keyed hash of a record's bytes: says that a holder of the key made it.
    #[must_use]
    pub fn record_mac(&self, record: &[u8]) -> [u8; 32] {
        *blake3::keyed_hash(&blake3::derive_key("cdp 2026-11 record mac v1", &self.0), record).as_bytes()
    }

    /// The key for digests.
    #[must_use]
    pub fn digest_key(&self) -> DigestKey {
        DigestKey(blake3::derive_key("cdp 2026-11 block digest v1", &self.0))
    }
}

/// Computes digests of blocks.
#[derive(Clone, ZeroizeOnDrop)]
pub struct DigestKey([u8; 32]);

impl DigestKey {
    /// The digest of each block of `BLOCK_BYTES` in `blocks`, in their order.
    #[must_use]
    pub fn digests(&self, blocks: &[u8]) -> Vec<Digest> {
        blocks.chunks_exact(BLOCK_BYTES).map(|block| self.digest(block)).collect()
    }

    /// The digest of one block.
    #[must_use]
    pub fn digest(&self, block: &[u8]) -> Digest {
        *blake3::keyed_hash(&self.0, block).as_bytes().first_chunk().expect("a hash has 32 bytes")
    }
}

/// Seals and opens the frames of one attempt.
pub struct AttemptKey(LessSafeKey);

impl AttemptKey {
    /// Seals `buffer[from..]` in place and appends the tag; `associated_data` is the frame's header.
    pub fn seal(
        &self,
        sequence: Sequence,
        section: Section,
        associated_data: &[u8],
        buffer: &mut Vec<u8>,
        from: usize,
    ) {
        let tag = self
            .0
            .seal_in_place_separate_tag(nonce(sequence, section), Aad::from(associated_data), &mut buffer[from..])
            .expect("a frame is far below the cipher's bound");
        buffer.extend_from_slice(tag.as_ref());
    }

    /// Opens a sealed section in place; gives back the plain bytes at its start.
    ///
    /// # Errors
    /// `SealBroken` where the bytes, the header or the key are not those of the seal.
    pub fn open<'a>(
        &self,
        sequence: Sequence,
        section: Section,
        associated_data: &[u8],
        sealed: &'a mut [u8],
    ) -> Result<&'a mut [u8], SealBroken> {
        self.0.open_in_place(nonce(sequence, section), Aad::from(associated_data), sealed).map_err(|_| SealBroken)
    }
}

fn nonce(sequence: Sequence, section: Section) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&(section as u32).to_le_bytes());
    bytes[4..].copy_from_slice(&sequence.0.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}
