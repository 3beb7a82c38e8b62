//! Content to frames and back: zeros become holes, the rest is compressed, sealed and digested.
//!
//! One decoder for wire, spool and journal. CPU work only; runs on a bounded pool, never on a thread that serves I/O.

use crate::frame::{self, Encoding, Frame, FrameError, Header, Kind};
use crate::limits::{CONTENT_BLOCKS_MAX, CONTENT_BYTES_MAX};
use crate::packer::Packer;
use crate::record::{Begin, FrameList, MAC_BYTES};
use crate::seal::{AttemptKey, DIGEST_BYTES, DataKey, Digest, DigestKey, SealBroken, Section, TAG_BYTES};
use crate::units::{AttemptId, BLOCK_BYTES, Epoch, Extent, FrameHash, Generation, GroupId, Sequence, VolumeSlot};
use bytes::Bytes;
use std::cell::RefCell;
use zstd::zstd_safe::{self, DCtx};

/// Seals the frames of one attempt. Each sequence is to be used once; who holds the sealer counts them.
pub struct Sealer {
    group: GroupId,
    epoch: Epoch,
    generation: Generation,
    attempt: AttemptId,
    resealed: bool,
    data_key: DataKey,
    attempt_key: AttemptKey,
    digest_key: DigestKey,
}

/// The content of a frame to be, with room before it for the longest header: content that does not shrink is sealed, and
/// becomes the frame, where it lies.
pub struct Draft(Vec<u8>);

/// Room before a draft's content.
const HEADROOM: usize = frame::header_len(CONTENT_BLOCKS_MAX);
/// Room for what stands behind a full draft's content: its tag, the digests and theirs, and a checksum.
const TAILROOM: usize = TAG_BYTES + CONTENT_BLOCKS_MAX * DIGEST_BYTES + TAG_BYTES + 4;
/// Content so short is copied out of its draft, so that a frame does not hold much more memory than it has bytes.
const COPIED_BYTES_MAX: usize = CONTENT_BYTES_MAX / 2;

impl Default for Draft {
    fn default() -> Self {
        let mut bytes = Vec::with_capacity(HEADROOM + CONTENT_BYTES_MAX + TAILROOM);
        bytes.resize(HEADROOM, 0);
        Self(bytes)
    }
}

impl Draft {
    /// Adds blocks.
    pub fn push(&mut self, blocks: &[u8]) {
        self.0.extend_from_slice(blocks);
    }

    /// The blocks so far.
    #[must_use]
    pub fn content(&self) -> &[u8] {
        &self.0[HEADROOM..]
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
            resealed: false,
            attempt_key: data_key.attempt_key(&attempt),
            digest_key: data_key.digest_key(),
            data_key: data_key.clone(),
        }
    }

    /// The same for a target that seals content anew as what it was at that epoch; `attempt` has to be fresh and random too.
    #[must_use]
    pub const fn resealing(mut self) -> Self {
        self.resealed = true;
        self
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
        let mut draft = Draft::default();
        draft.push(content);
        self.content_of(&mut Packer::default(), volume, sequence, extents, draft).into()
    }

    /// A frame with the content of a draft: the blocks of `extents` one after the other, at most 128 KiB of them. `packer` is
    /// kept from frame to frame.
    #[must_use]
    pub fn content_of(
        &self,
        packer: &mut Packer,
        volume: VolumeSlot,
        sequence: Sequence,
        extents: Vec<Extent>,
        draft: Draft,
    ) -> Bytes {
        self.digested_content_of(packer, volume, sequence, extents, draft).0
    }

    /// The same, with the digests of the blocks, and how the content came to be packed.
    #[must_use]
    pub fn digested_content_of(
        &self,
        packer: &mut Packer,
        volume: VolumeSlot,
        sequence: Sequence,
        extents: Vec<Extent>,
        draft: Draft,
    ) -> (Bytes, Vec<Digest>, Encoding) {
        let content = draft.content();
        let (content_len, blocks) = (content.len(), content.len() / BLOCK_BYTES);
        assert!(blocks <= CONTENT_BLOCKS_MAX && content_len == blocks * BLOCK_BYTES, "whole blocks, and not too many");
        let digests = self.digest_key.digests(content);
        let shorter = packer.pack(content);
        let (encoding, stored) = shorter.unwrap_or((Encoding::Raw, content));
        let digests_len = blocks * DIGEST_BYTES + TAG_BYTES;
        let payload_len = stored.len() + TAG_BYTES + digests_len;
        let mut header = self.header(Kind::Extents, encoding, volume, sequence, extents, payload_len, digests_len);
        header.content_len = content_len as u32;
        let start = frame::start(&self.group, &header);
        let (mut out, content_at) = if encoding == Encoding::Raw && content_len > COPIED_BYTES_MAX {
            let mut out = draft.0;
            out[HEADROOM - start.len()..HEADROOM].copy_from_slice(&start);
            (out, HEADROOM)
        } else {
            let mut out = Vec::with_capacity(header.frame_len());
            out.extend_from_slice(&start);
            out.extend_from_slice(stored);
            (out, start.len())
        };
        let associated_data = &start[..header.associated_data_len()];
        self.attempt_key.seal(sequence, Section::Content, associated_data, &mut out, content_at);
        let digests_at = out.len();
        out.extend_from_slice(digests.as_flattened());
        self.attempt_key.seal(sequence, Section::Digests, associated_data, &mut out, digests_at);
        let frame_at = content_at - start.len();
        frame::finish(&self.group, &header, &mut out, frame_at);
        (Bytes::from(out).slice(frame_at..), digests, encoding)
    }

    /// A frame of extents without content: holes, unreadable or lost blocks. Its seal is over nothing but the header; lost blocks
    /// have none.
    #[must_use]
    pub fn bare(&self, encoding: Encoding, volume: VolumeSlot, sequence: Sequence, extents: Vec<Extent>) -> Vec<u8> {
        assert!(!encoding.has_content(), "{encoding:?} has content");
        if encoding == Encoding::Lost {
            let header = self.header(Kind::Extents, encoding, volume, sequence, extents, 0, 0);
            return frame::encode(&self.group, &header, &[]);
        }
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
            resealed: self.resealed,
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
    if header.encoding == Encoding::Hole && header.resealed && header.payload_len == 0 {
        // The word of a target that had no key to seal them with.
        return Ok(Vec::new());
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
        Encoding::Zstd => unpack_zstd(plain, content_len),
        Encoding::Hole | Encoding::Unreadable if plain.is_empty() => Ok(Vec::new()),
        _ => Err(ContentError::Compression),
    }
}

thread_local! {
    /// What zstd unpacks with: to make it anew takes longer than to unpack a block.
    static UNPACKER: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
}

/// The content of one zstd frame. It is written where it belongs at once, so no window is allocated, whatever the frame says of
/// one; what was declared is all that is allocated.
fn unpack_zstd(packed: &[u8], content_len: usize) -> Result<Vec<u8>, ContentError> {
    let declared = zstd_safe::get_frame_content_size(packed).ok().flatten();
    // Frames one behind the other, and such as are to be passed over, would be taken as well.
    let is_one_frame = zstd_safe::find_frame_compressed_size(packed).ok() == Some(packed.len());
    if !is_one_frame || declared != Some(content_len as u64) {
        return Err(ContentError::Compression);
    }
    let mut content = vec![0; content_len];
    let unpacked = UNPACKER.with_borrow_mut(|unpacker| unpacker.decompress(&mut content[..], packed));
    if unpacked.ok() == Some(content_len) { Ok(content) } else { Err(ContentError::Compression) }
}

/// Opens the digests of the blocks of a frame with content, in the order of its blocks. They stand apart from the content, so they
/// may be had where that is damaged. `key` is that of the frame's attempt.
///
/// # Errors
/// Where there are none, the seal does not hold, or they are not one a block.
pub fn open_digests(frame: &Frame<'_>, key: &AttemptKey) -> Result<Vec<Digest>, ContentError> {
    let section = &frame.payload[(frame.header.payload_len - frame.header.digests_len) as usize..];
    open_digest_section(&frame.header, frame.associated_data(), section, key)
}

/// The same, where header and digests are all there is of the frame.
pub(crate) fn open_digest_section(
    header: &Header,
    associated_data: &[u8],
    section: &[u8],
    key: &AttemptKey,
) -> Result<Vec<Digest>, ContentError> {
    if header.kind != Kind::Extents || !header.encoding.has_content() {
        return Err(ContentError::Kind(header.kind));
    }
    let mut sealed = section.to_vec();
    let plain = key.open(header.sequence, Section::Digests, associated_data, &mut sealed)?;
    let (digests, rest) = plain.as_chunks::<DIGEST_BYTES>();
    let is_one_a_block = rest.is_empty() && digests.len() as u64 == header.blocks();
    if is_one_a_block { Ok(digests.to_vec()) } else { Err(ContentError::Compression) }
}

/// Whether a record frame was made by a holder of `key`; `mac_at` is where its keyed hash begins.
#[must_use]
pub fn is_authentic(frame: &Frame<'_>, mac_at: usize, key: &DataKey) -> bool {
    let (record, mac) = frame.payload.split_at(mac_at);
    let expected = key.record_mac(&[frame.associated_data(), record].concat());
    aws_lc_rs::constant_time::verify_slices_are_equal(&expected, mac).is_ok()
}

/// The running hash over the list of an attempt's frames: each step is BLAKE3 of the hash so far and the next frame's hash,
/// from 32 zeros on. Count and hash are all there is to it, so a list can be gone on with from where it stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameListHasher(FrameList);

impl Default for FrameListHasher {
    fn default() -> Self {
        Self(FrameList { count: 0, hash: FrameHash([0; 32]) })
    }
}

impl FrameListHasher {
    /// Goes on with a list from where it stood.
    #[must_use]
    pub const fn resume(list: FrameList) -> Self {
        Self(list)
    }

    /// Adds the next frame of the attempt.
    pub fn push(&mut self, frame: &FrameHash) {
        let mut both = [0; 64];
        both[..32].copy_from_slice(&self.0.hash.0);
        both[32..].copy_from_slice(&frame.0);
        self.0 = FrameList { count: self.0.count + 1, hash: FrameHash(*blake3::hash(&both).as_bytes()) };
    }

    /// What a part end or a commit at this place has to say.
    #[must_use]
    pub const fn list(&self) -> FrameList {
        self.0
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
    use crate::packer::Packing;
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
        for (packing, content, encoding) in [
            (Packing::Lz4, &text, Encoding::Lz4),
            (Packing::zstd(3), &text, Encoding::Zstd),
            (Packing::zstd(3), &noise, Encoding::Raw),
            (Packing::Lz4, &noise, Encoding::Raw),
        ] {
            let mut draft = Draft::default();
            draft.push(content);
            let mut packer = Packer::new(packing);
            let bytes = sealer().content_of(&mut packer, VolumeSlot(1), Sequence(1), extents.clone(), draft);
            let frame = frame::decode(&GroupId([2; 16]), &bytes).expect("a frame");
            assert_eq!(frame.header.encoding, encoding);
            assert_eq!(open(&bytes).as_ref(), Ok(content));
        }
        let bytes = sealer().bare(Encoding::Hole, VolumeSlot(1), Sequence(2), extents);
        assert_eq!(open(&bytes), Ok(vec![]));
    }

    /// A frame of a source that holds the key, with something else inside than ours has.
    fn sealed(encoding: Encoding, mut plain: Vec<u8>, blocks: u32) -> Vec<u8> {
        let extents = vec![Extent { start: Block(5), count: blocks }];
        let payload_len = plain.len() + TAG_BYTES;
        let mut header = sealer().header(Kind::Extents, encoding, VolumeSlot(1), Sequence(1), extents, payload_len, 0);
        header.content_len = blocks * BLOCK_BYTES as u32;
        sealer().attempt_key.seal(Sequence(1), Section::Content, &header.associated_data(), &mut plain, 0);
        frame::encode(&GroupId([2; 16]), &header, &plain)
    }

    #[test]
    fn what_is_not_one_zstd_frame_of_the_declared_length_is_refused() {
        let compress = |content: &[u8]| zstd::bulk::compress(content, 3).expect("compressed");
        let (one, two) = (compress(&[7; BLOCK_BYTES]), compress(&[7; 2 * BLOCK_BYTES]));
        let huge = compress(&vec![7; 64 << 20]);
        let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0], &*two].concat();
        let mut untold = vec![0; BLOCK_BYTES];
        let mut packer = zstd_safe::CCtx::create();
        packer.set_parameter(zstd_safe::CParameter::ContentSizeFlag(false)).expect("a flag of zstd's");
        let len = packer.compress2(&mut untold[..], &[7; 2 * BLOCK_BYTES]).expect("it shrinks");
        untold.truncate(len);
        // The flag and the number of a dictionary that nobody has.
        let with_dictionary = [&two[..4], &[two[4] | 1, 9], &two[5..]].concat();
        assert_eq!(open(&sealed(Encoding::Zstd, two.clone(), 2)), Ok(vec![7; 2 * BLOCK_BYTES]));
        for (what, plain) in [
            ("shorter", one.clone()),
            ("longer", huge),
            ("two", [&*one, &*one].concat()),
            ("one that is passed over", skipped),
            ("a byte behind", [&*two, &[0]].concat()),
            ("cut off", two[..two.len() - 1].to_vec()),
            ("without its length", untold),
            ("with a dictionary", with_dictionary),
            ("lz4", lz4_flex::block::compress(&[7; 2 * BLOCK_BYTES])),
            ("nothing", Vec::new()),
        ] {
            assert_eq!(open(&sealed(Encoding::Zstd, plain, 2)), Err(ContentError::Compression), "{what}");
        }
    }

    #[test]
    fn digests_are_had_without_the_content_and_the_content_without_them() {
        let (key, content) = (DataKey::new([1; 32]), [[7; BLOCK_BYTES], [8; BLOCK_BYTES]].concat());
        let extents = vec![Extent { start: Block(5), count: 2 }];
        let whole = sealer().content(VolumeSlot(1), Sequence(1), extents.clone(), &content);
        let read = |at: usize| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            let frame = frame::decode_damaged(&GroupId([2; 16]), &bytes).expect("the header is intact");
            let attempt = key.attempt_key(&frame.header.attempt);
            (open_content(&frame, &attempt).ok(), open_digests(&frame, &attempt).ok())
        };
        let digests = key.digest_key().digests(&content);
        let header = frame::decode_header(&GroupId([2; 16]), &whole).expect("a header");
        let digests_at = header.header_len() + (header.payload_len - header.digests_len) as usize;
        for at in header.header_len()..digests_at {
            assert_eq!(read(at), (None, Some(digests.clone())), "byte {at}");
        }
        for at in digests_at..whole.len() - 4 {
            assert_eq!(read(at), (Some(content.clone()), None), "byte {at}");
        }
        let bare = sealer().bare(Encoding::Hole, VolumeSlot(1), Sequence(2), extents);
        let frame = frame::decode(&GroupId([2; 16]), &bare).expect("a frame");
        assert!(open_digests(&frame, &key.attempt_key(&frame.header.attempt)).is_err(), "a hole has none");
    }

    #[test]
    fn memory_kept_from_frame_to_frame_leaves_no_trace_in_the_next() {
        let noise: Vec<u8> =
            (0..CONTENT_BLOCKS_MAX as u32 * 128).flat_map(|i| *blake3::hash(&i.to_le_bytes()).as_bytes()).collect();
        let text = b"the same line again\n".repeat(7000)[..32 * BLOCK_BYTES].to_vec();
        let mut packer = Packer::new(Packing::zstd(1));
        let contents = [&noise[..], &text, &text[..BLOCK_BYTES], &noise[..BLOCK_BYTES], &text[..3 * BLOCK_BYTES]];
        for (sequence, content) in (1..).zip(contents.into_iter().cycle().take(15)) {
            let extents = vec![Extent { start: Block(5), count: (content.len() / BLOCK_BYTES) as u32 }];
            let mut draft = Draft::default();
            draft.push(content);
            let bytes = sealer().content_of(&mut packer, VolumeSlot(1), Sequence(sequence), extents.clone(), draft);
            assert_eq!(open(&bytes).as_deref(), Ok(content));
            let mut draft = Draft::default();
            draft.push(content);
            let mut fresh = Packer::new(Packing::zstd(1));
            assert_eq!(bytes, sealer().content_of(&mut fresh, VolumeSlot(1), Sequence(sequence), extents, draft));
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
