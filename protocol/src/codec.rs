//! Content to frames and back: zeros become holes, the rest is compressed, sealed and digested.
//!
//! One decoder for wire, spool and journal. CPU work only; runs on a bounded pool, never on a thread that serves I/O.

use crate::frame::{self, Encoding, Frame, FrameError, Header, Kind};
use crate::limits::CONTENT_BLOCKS_MAX;
use crate::record::{Begin, FrameList, MAC_BYTES};
use crate::seal::{AttemptKey, DIGEST_BYTES, DataKey, DigestKey, SealBroken, Section, TAG_BYTES};
use crate::units::{AttemptId, BLOCK_BYTES, Epoch, Extent, FrameHash, Generation, GroupId, Sequence, VolumeSlot};

/// Seals the frames of one attempt. Each sequence is to be used once; who holds the sealer counts them.
pub struct Sealer {
    group: GroupId,
    epoch: Epoch,
    generation: Generation,
    attempt: AttemptId,
    data_key: DataKey,
    attempt_key: AttemptKey,
    digest_key: DigestKey,
}

/// Memory for compressing one frame after the other.
pub struct Packer {
    table: lz4_flex::block::CompressTable,
    packed: Vec<u8>,
}

impl Default for Packer {
    fn default() -> Self {
        Self { table: lz4_flex::block::CompressTable::large(), packed: Vec::new() }
    }
}

impl Packer {
    /// The shorter of `content` compressed and as it is.
    fn pack<'a>(&'a mut self, content: &'a [u8]) -> (Encoding, &'a [u8]) {
        let bound = lz4_flex::block::get_maximum_output_size(content.len());
        if self.packed.len() < bound {
            self.packed.resize(bound, 0);
        }
        let packed = lz4_flex::block::compress_into_with_table(content, &mut self.packed, &mut self.table)
            .expect("the buffer has the bound's size");
        if packed < content.len() { (Encoding::Lz4, &self.packed[..packed]) } else { (Encoding::Raw, content) }
    }
}

/// Why the content of a frame cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContentError {
    /// Not a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Another key, or damage.
    #[error(transparent)]
    Seal(#[from] SealBroken),
    /// The seal held but what was in it does not decompress to the declared length.
    #[error("content does not decompress to its declared length")]
    Compression,
    /// The frame has no content to give.
    #[error("a frame of kind {0:?} has no content")]
    Kind(Kind),
}

impl Sealer {
    /// A sealer for one attempt at `epoch`; `attempt` has to be fresh and random.
    #[must_use]
    pub fn new(group: GroupId, epoch: Epoch, generation: Generation, attempt: AttemptId, data_key: &DataKey) -> Self {
        Self {
            group,
            epoch,
            generation,
            attempt,
            attempt_key: data_key.attempt_key(&attempt),
            digest_key: data_key.digest_key(),
            data_key: data_key.clone(),
        }
    }

    /// The epoch the frames belong to.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The generation the frames are sealed under.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// The attempt the frames belong to.
    #[must_use]
    pub const fn attempt(&self) -> AttemptId {
        self.attempt
    }

    /// The `Begin` frame, always sequence 0.
    #[must_use]
    pub fn begin(&self, begin: &Begin) -> Vec<u8> {
        self.record(Kind::Begin, Sequence(0), begin.encode())
    }

    /// A record frame: `record` with its keyed hash behind it.
    #[must_use]
    pub fn record(&self, kind: Kind, sequence: Sequence, mut record: Vec<u8>) -> Vec<u8> {
        let header = self.header(kind, Encoding::Raw, VolumeSlot(0), sequence, vec![], record.len() + MAC_BYTES, 0);
        let mac = self.data_key.record_mac(&[header.associated_data().as_slice(), &record].concat());
        record.extend_from_slice(&mac);
        frame::encode(&self.group, &header, &record)
    }

    /// A frame with content: `content` is the blocks of `extents` one after the other, at most 128 KiB of them.
    #[must_use]
    pub fn content(&self, volume: VolumeSlot, sequence: Sequence, extents: Vec<Extent>, content: &[u8]) -> Vec<u8> {
        self.content_with(&mut Packer::default(), volume, sequence, extents, content)
    }

    /// `content`, with memory kept from frame to frame. Content that does not compress is copied once.
    #[must_use]
    pub fn content_with(
        &self,
        packer: &mut Packer,
        volume: VolumeSlot,
        sequence: Sequence,
        extents: Vec<Extent>,
        content: &[u8],
    ) -> Vec<u8> {
        let blocks = content.len() / BLOCK_BYTES;
        assert!(
            blocks <= CONTENT_BLOCKS_MAX && content.len() == blocks * BLOCK_BYTES,
            "whole blocks, and not too many"
        );
        let (encoding, stored) = packer.pack(content);
        let digests_len = blocks * DIGEST_BYTES + TAG_BYTES;
        let payload_len = stored.len() + TAG_BYTES + digests_len;
        let mut header = self.header(Kind::Extents, encoding, volume, sequence, extents, payload_len, digests_len);
        header.content_len = content.len() as u32;
        let mut out = frame::start(&self.group, &header);
        let associated_data = out[..header.associated_data_len()].to_vec();
        let from = out.len();
        out.extend_from_slice(stored);
        self.attempt_key.seal(sequence, Section::Content, &associated_data, &mut out, from);
        let from = out.len();
        for block in content.chunks_exact(BLOCK_BYTES) {
            out.extend_from_slice(&self.digest_key.digest(block));
        }
        self.attempt_key.seal(sequence, Section::Digests, &associated_data, &mut out, from);
        frame::finish(&self.group, &header, out)
    }

    /// A frame of extents without content: holes or unreadable blocks. Its seal is over nothing but the header.
    #[must_use]
    pub fn bare(&self, encoding: Encoding, volume: VolumeSlot, sequence: Sequence, extents: Vec<Extent>) -> Vec<u8> {
        assert!(!encoding.has_content(), "{encoding:?} has content");
        let header = self.header(Kind::Extents, encoding, volume, sequence, extents, TAG_BYTES, 0);
        let mut payload = Vec::with_capacity(TAG_BYTES);
        self.attempt_key.seal(sequence, Section::Content, &header.associated_data(), &mut payload, 0);
        frame::encode(&self.group, &header, &payload)
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of a header, named at each call")]
    fn header(
        &self,
        kind: Kind,
        encoding: Encoding,
        volume: VolumeSlot,
        sequence: Sequence,
        extents: Vec<Extent>,
        payload_len: usize,
        digests_len: usize,
    ) -> Header {
        Header {
            kind,
            encoding,
            volume,
            epoch: self.epoch,
            generation: self.generation,
            attempt: self.attempt,
            sequence,
            payload_len: payload_len as u32,
            content_len: 0,
            digests_len: digests_len as u32,
            extents,
        }
    }
}

/// Opens and decompresses the content of a verified frame; holes give no bytes. `key` is that of the frame's attempt.
///
/// # Errors
/// Where the seal does not hold or the content is not what the header says.
pub fn open_content(frame: &Frame<'_>, key: &AttemptKey) -> Result<Vec<u8>, ContentError> {
    let header = &frame.header;
    if header.kind != Kind::Extents {
        return Err(ContentError::Kind(header.kind));
    }
    let sealed_len = (header.payload_len - header.digests_len) as usize;
    let mut sealed = frame.payload[..sealed_len].to_vec();
    let plain = key.open(header.sequence, Section::Content, frame.associated_data(), &mut sealed)?;
    let content_len = header.content_len as usize;
    match header.encoding {
        Encoding::Raw if plain.len() == content_len => {
            sealed.truncate(content_len);
            Ok(sealed)
        }
        Encoding::Lz4 => {
            let mut content = vec![0; content_len];
            let unpacked = lz4_flex::block::decompress_into(plain, &mut content);
            if unpacked.ok() == Some(content_len) { Ok(content) } else { Err(ContentError::Compression) }
        }
        Encoding::Hole | Encoding::Unreadable if plain.is_empty() => Ok(Vec::new()),
        _ => Err(ContentError::Compression),
    }
}

/// Whether a record frame was made by a holder of `key`; `mac_at` is where its keyed hash begins.
#[must_use]
pub fn is_authentic(frame: &Frame<'_>, mac_at: usize, key: &DataKey) -> bool {
    let (record, mac) = frame.payload.split_at(mac_at);
    let expected = key.record_mac(&[frame.associated_data(), record].concat());
    aws_lc_rs::constant_time::verify_slices_are_equal(&expected, mac).is_ok()
}

/// The running hash over the list of an attempt's frames.
#[derive(Clone, Default)]
pub struct FrameListHasher {
    count: u64,
    hasher: blake3::Hasher,
}

impl FrameListHasher {
    /// Adds the next frame of the attempt.
    pub fn push(&mut self, frame: &FrameHash) {
        self.count += 1;
        self.hasher.update(&frame.0);
    }

    /// What a part end or a commit at this place has to say.
    #[must_use]
    pub fn list(&self) -> FrameList {
        FrameList { count: self.count, hash: FrameHash(*self.hasher.finalize().as_bytes()) }
    }
}

/// Whether a block is all zeros.
#[must_use]
pub fn is_zero(block: &[u8]) -> bool {
    let (words, rest) = block.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Block;

    fn sealer() -> Sealer {
        let key = DataKey::new([1; 32]);
        Sealer::new(GroupId([2; 16]), Epoch(3), Generation(1), AttemptId([4; 16]), &key)
    }

    fn open(bytes: &[u8]) -> Result<Vec<u8>, ContentError> {
        let frame = frame::decode(&GroupId([2; 16]), bytes)?;
        open_content(&frame, &DataKey::new([1; 32]).attempt_key(&frame.header.attempt))
    }

    #[test]
    fn content_comes_back() {
        let extents = vec![Extent { start: Block(5), count: 2 }];
        let text = b"the same line again\n".repeat(500)[..2 * BLOCK_BYTES].to_vec();
        let noise: Vec<u8> =
            (0..2 * BLOCK_BYTES as u32).map(|i| blake3::hash(&i.to_le_bytes()).as_bytes()[0]).collect();
        for (content, encoding) in [(text, Encoding::Lz4), (noise, Encoding::Raw)] {
            let bytes = sealer().content(VolumeSlot(1), Sequence(1), extents.clone(), &content);
            let frame = frame::decode(&GroupId([2; 16]), &bytes).expect("a frame");
            assert_eq!(frame.header.encoding, encoding);
            assert_eq!(open(&bytes), Ok(content));
        }
        let bytes = sealer().bare(Encoding::Hole, VolumeSlot(1), Sequence(2), extents);
        assert_eq!(open(&bytes), Ok(vec![]));
    }

    #[test]
    fn memory_kept_from_frame_to_frame_leaves_no_trace_in_the_next() {
        let noise: Vec<u8> =
            (0..CONTENT_BLOCKS_MAX as u32 * 128).flat_map(|i| *blake3::hash(&i.to_le_bytes()).as_bytes()).collect();
        let text = b"the same line again\n".repeat(7000)[..32 * BLOCK_BYTES].to_vec();
        let mut packer = Packer::default();
        let contents = [&noise[..], &text, &text[..BLOCK_BYTES], &noise[..BLOCK_BYTES], &text[..3 * BLOCK_BYTES]];
        for (sequence, content) in (1..).zip(contents.into_iter().cycle().take(15)) {
            let extents = vec![Extent { start: Block(5), count: (content.len() / BLOCK_BYTES) as u32 }];
            let bytes = sealer().content_with(&mut packer, VolumeSlot(1), Sequence(sequence), extents.clone(), content);
            assert_eq!(bytes, sealer().content(VolumeSlot(1), Sequence(sequence), extents, content));
            assert_eq!(open(&bytes).as_deref(), Ok(content));
        }
    }

    #[test]
    fn a_changed_header_breaks_the_seal_even_with_right_checksums() {
        let extents = vec![Extent { start: Block(5), count: 1 }];
        let bytes = sealer().content(VolumeSlot(1), Sequence(1), extents, &[7; BLOCK_BYTES]);
        let frame = frame::decode(&GroupId([2; 16]), &bytes).expect("a frame");
        let mut moved = frame.header.clone();
        moved.extents[0].start = Block(6);
        let forged = frame::encode(&GroupId([2; 16]), &moved, frame.payload);
        assert_eq!(open(&forged), Err(ContentError::Seal(SealBroken)));
    }

    #[test]
    fn records_are_authentic_only_under_their_key() {
        let begin = Begin { key: crate::units::KeyId::default(), volumes: vec![] };
        let bytes = sealer().begin(&begin);
        let frame = frame::decode(&GroupId([2; 16]), &bytes).expect("a frame");
        let (_, mac_at) = Begin::decode(frame.payload).expect("a record");
        assert!(is_authentic(&frame, mac_at, &DataKey::new([1; 32])));
        assert!(!is_authentic(&frame, mac_at, &DataKey::new([9; 32])));
    }

    #[test]
    fn only_zeros_are_zero() {
        let mut block = [0; BLOCK_BYTES];
        assert!(is_zero(&block));
        block[BLOCK_BYTES - 1] = 1;
        assert!(!is_zero(&block));
    }
}
