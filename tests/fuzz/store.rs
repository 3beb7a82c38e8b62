//! The files of the target's store: segments' headers and indexes, manifests.

use crate::{Check, Format};
use cdp_protocol::units::{Block, Epoch, Extent, Timestamp, VolumeSlot};
use cdp_target::journal::file::{FileId, SliceId};
use cdp_target::journal::index::{Summary, Tables};
use cdp_target::journal::manifest::Checkpoint;
use cdp_target::journal::segment::{FOOTER_BYTES, Footer, Header, INDEX_MAGIC, SECTIONS};
use cdp_target::journal::{Damage, Manifest};
use cdp_target::kept;

pub(crate) const SEALED: &[u8] = include_bytes!("../testdata/segment/1/sealed.seg");
pub(crate) const OPEN: &[u8] = include_bytes!("../testdata/segment/1/open.seg");
pub(crate) const MANIFEST: &[u8] = include_bytes!("../testdata/manifest/3/manifest");
const OLD_MANIFESTS: [&[u8]; 2] =
    [include_bytes!("../testdata/manifest/1/manifest"), include_bytes!("../testdata/manifest/2/manifest")];

/// The first bytes of a segment.
pub(crate) struct SegmentHeader;

impl SegmentHeader {
    /// Puts the header's sum in order; gives its length, if it has one.
    pub(crate) fn mend_at_start(bytes: &mut [u8]) -> Option<usize> {
        let len = u32::from_le_bytes(*bytes.get(12..)?.first_chunk()?) as usize;
        let sum_at = len.checked_sub(4)?;
        let sum = crc32fast::hash(bytes.get(..sum_at)?).to_le_bytes();
        bytes.get_mut(sum_at..len)?.copy_from_slice(&sum);
        Some(len)
    }
}

impl Format for SegmentHeader {
    const CHECK: Check = Check::Crc;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        [SEALED, OPEN].map(|bytes| bytes[..Header::decode(bytes).expect("a header").1].to_vec()).to_vec()
    }

    fn mend(bytes: &mut [u8]) {
        let _ = Self::mend_at_start(bytes);
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let (header, len) = Header::decode(bytes).ok()?;
        assert!(len <= bytes.len());
        let mut again = header.encode();
        again.extend_from_slice(&bytes[len..]);
        Some(again)
    }
}

/// The end of a sealed segment, from the index's magic on: sections, then the footer, as if no frame stood before them.
pub(crate) struct SegmentIndex;

impl SegmentIndex {
    /// Where each section is, by the footer's lengths.
    fn sections(bytes: &[u8]) -> Option<[(usize, usize); SECTIONS]> {
        let footer = &bytes[bytes.len().checked_sub(FOOTER_BYTES)?..];
        let mut at = INDEX_MAGIC.len();
        let mut places = [(0, 0); SECTIONS];
        for (number, place) in places.iter_mut().enumerate() {
            let len = u64::from_le_bytes(*footer[24 + number * 40..].first_chunk()?) as usize;
            *place = (at, len);
            at = at.checked_add(len).filter(|end| *end <= bytes.len() - FOOTER_BYTES)?;
        }
        Some(places)
    }
}

impl Format for SegmentIndex {
    const CHECK: Check = Check::Hash;
    const ONE_FORM: bool = false;

    fn specimens() -> Vec<Vec<u8>> {
        let len = SEALED.len();
        let footer = Footer::decode(&SEALED[len - FOOTER_BYTES..], len as u64).expect("a footer");
        let sections: [Vec<u8>; SECTIONS] = {
            let index = [&SEALED[footer.frames_end as usize..], &[]].concat();
            Self::sections(&index).expect("sections").map(|(at, len)| index[at..at + len].to_vec())
        };
        vec![Footer::build(0, &sections).1, Footer::build(0, &Default::default()).1]
    }

    fn mend(bytes: &mut [u8]) {
        let Some(sections) = Self::sections(bytes) else { return };
        let footer_at = bytes.len() - FOOTER_BYTES;
        for (number, (at, len)) in sections.into_iter().enumerate() {
            let hash = blake3::hash(&bytes[at..at + len]);
            bytes[footer_at + 32 + number * 40..][..32].copy_from_slice(hash.as_bytes());
        }
        let sum_at = bytes.len() - 12;
        let sum = crc32fast::hash(&bytes[footer_at..sum_at]).to_le_bytes();
        bytes[sum_at..sum_at + 4].copy_from_slice(&sum);
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let footer = &bytes[bytes.len().checked_sub(FOOTER_BYTES)?..];
        let footer = Footer::decode(footer, bytes.len() as u64).ok()?;
        let mut at = footer.frames_end as usize + INDEX_MAGIC.len();
        let mut sections = [&[][..]; SECTIONS];
        for (place, (len, hash)) in sections.iter_mut().zip(footer.sections) {
            *place = &bytes[at..at + len as usize];
            at += len as usize;
            if *blake3::hash(place).as_bytes() != hash {
                return None;
            }
        }
        let [runs, commits, lost, bitmaps, content, bare] = sections;
        let summary = Summary::decode(runs, commits, lost, bitmaps).ok()?;
        let tables = Tables::decode(content, bare).ok()?;
        let anywhere = [(0, 1), (5, 40), (u32::MAX, 1), (0, u32::MAX)];
        let mut near = Vec::new();
        for extent in anywhere.map(|(start, count)| Extent::new(Block(start), count).expect("an extent")) {
            let _touched_or_not = summary.touches(VolumeSlot(0), extent);
            near.clear();
            tables.candidates(VolumeSlot(0), extent, &mut near);
        }
        assert!(tables.iter().count() * 32 <= bytes.len() && summary.bytes() < Self::memory_max(bytes.len()));
        Some(footer.encode())
    }

    /// A bitmap of long runs is smaller as bytes than in memory: 8 KiB for each 65,536 blocks it touches.
    fn memory_max(len: usize) -> usize {
        (64 << 10) + 2048 * len
    }
}

/// One of a manifest's two copies.
pub(crate) struct ManifestCopy;

fn mend_manifest(bytes: &mut [u8]) {
    let Some(sum_at) = bytes.len().checked_sub(32) else { return };
    let hash = blake3::hash(&bytes[..sum_at]);
    bytes[sum_at..].copy_from_slice(hash.as_bytes());
}

impl Format for ManifestCopy {
    const CHECK: Check = Check::Hash;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let (old, _) = Manifest::decode_file(OLD_MANIFESTS[0]).expect("a manifest");
        let (mut pruned, _) = Manifest::decode_file(MANIFEST).expect("a manifest");
        pruned.change = 12;
        pruned.removed.insert(Epoch(0), Epoch(4));
        pruned.removed.insert(Epoch(7), Epoch(7));
        pruned.floor = Some(Epoch(5));
        let checkpoint = Checkpoint {
            epoch: Epoch(5),
            made: Timestamp(1_800_000_000_000),
            index_len: 700,
            index_hash: [6; 32],
            held_bytes: 9000,
            needed_bytes: 8000,
            lost_blocks: 1,
        };
        pruned.checkpoints = vec![checkpoint, Checkpoint { epoch: Epoch(9), ..checkpoint }];
        let slice = SliceId { slot: VolumeSlot(1), slice: 2, epoch: Epoch(5) };
        let damage = Damage::of(FileId::Slice(slice), "a pack is damaged".to_owned());
        pruned.damages.push(Damage { offset: 88, len: 9, first_epoch: Some(Epoch(5)), ..damage });
        vec![MANIFEST[..MANIFEST.len() / 2].to_vec(), old.encode(), pruned.encode()]
    }

    fn mend(bytes: &mut [u8]) {
        mend_manifest(bytes);
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let manifest = Manifest::decode(bytes).ok()?;
        // What an older version did not have is written by this one.
        let is_old = bytes[8] < 3;
        Some(if is_old { bytes.to_vec() } else { manifest.encode() })
    }
}

/// The file, of two copies: damage to one of them changes nothing.
pub(crate) struct ManifestFile;

impl Format for ManifestFile {
    const CHECK: Check = Check::Hash;
    const ONE_FORM: bool = false;

    fn specimens() -> Vec<Vec<u8>> {
        [&[MANIFEST][..], &OLD_MANIFESTS].concat().into_iter().map(<[u8]>::to_vec).collect()
    }

    fn mend(bytes: &mut [u8]) {
        let (first, second) = bytes.split_at_mut(bytes.len() / 2);
        mend_manifest(first);
        mend_manifest(second);
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let (manifest, _) = Manifest::decode_file(bytes).ok()?;
        Some(manifest.encode())
    }
}

/// The copy of a file that is kept twice.
pub(crate) struct KeptCopy;

impl Format for KeptCopy {
    const CHECK: Check = Check::Hash;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        [&b"secret"[..], &[]].map(|content| kept::encode(content).to_vec()).to_vec()
    }

    fn mend(bytes: &mut [u8]) {
        let Some((header, content)) = bytes.split_at_mut_checked(kept::HEADER_BYTES) else { return };
        header[kept::MAGIC.len()..].copy_from_slice(blake3::hash(content).as_bytes());
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        kept::decode(bytes).map(|content| kept::encode(content).to_vec())
    }
}
