//! Local images: header, footer, directory and slice, and a whole one that was made by version 1.

use crate::{Check, Format};
use cdp_protocol::record::Volume;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{AttemptId, Block, Class, Epoch, Extent, Generation, GroupId, KeyId, Timestamp, VolumeSlot};
use cdp_seams::storage::{Storage, replace, sim::SimStorage};
use cdp_source::local_image::check::verify;
use cdp_source::local_image::format::{
    Footer, Header, ImageVolume, Place, Run, SliceEntry, TRAILER_BYTES, decode_slice, encode_slice,
};
use cdp_source::local_image::reader::ImageFile;
use std::path::Path;

const GROUP: GroupId = GroupId([7; 16]);
const ATTEMPT: AttemptId = AttemptId([8; 16]);
const WHOLE: &[u8] = include_bytes!("../testdata/local_image/1/image");

fn key() -> DataKey {
    DataKey::new([9; 32])
}

/// The first bytes of an image.
pub(crate) struct LocalHeader;

impl Format for LocalHeader {
    const CHECK: Check = Check::Crc;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        vec![Header { group: GROUP, attempt: ATTEMPT, generation: Generation(3) }.encode()]
    }

    fn mend(bytes: &mut [u8]) {
        let Some(header) = bytes.get_mut(..64) else { return };
        let sum = crc32fast::hash(&header[..60]).to_le_bytes();
        header[60..].copy_from_slice(&sum);
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let mut again = Header::decode(bytes).ok()?.encode();
        again.extend_from_slice(bytes.get(again.len()..)?);
        Some(again)
    }
}

/// The end of an image.
pub(crate) struct LocalFooter;

impl LocalFooter {
    fn specimen() -> Footer {
        let volume = |slot: u16, name: &str, size_bytes| ImageVolume {
            volume: Volume { slot: VolumeSlot(slot), size_bytes, name: name.into() },
            directory_at: 4711,
            directory_hash: [5; 32],
            content_blocks: 12,
            unreadable_blocks: 1,
            image_hash: [6; 32],
        };
        Footer {
            group: GROUP,
            attempt: ATTEMPT,
            key: KeyId([9; 8]),
            epoch: Epoch(1234),
            cut_time: Timestamp(1_764_000_000_000),
            made: Timestamp(1_764_000_060_000),
            class: Class::Application,
            label: Some("before-upgrade".into()),
            volumes: vec![volume(0, "data", 1 << 30), volume(4, "logs", 4097)],
        }
    }
}

impl Format for LocalFooter {
    /// Vouched for by the key.
    const CHECK: Check = Check::Hash;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let bare = Footer { label: None, volumes: Vec::new(), ..Self::specimen() };
        vec![Self::specimen().encode(&key()), bare.encode(&key())]
    }

    fn mend(bytes: &mut [u8]) {
        let Some(len) = bytes.len().checked_sub(TRAILER_BYTES + 32) else { return };
        let mac = key().record_mac(&bytes[..len]);
        bytes[len..len + 32].copy_from_slice(&mac);
        let told = (len + 32) as u32;
        let sum = crc32fast::hash(&bytes[..len + 32]);
        bytes[len + 32..len + 36].copy_from_slice(&told.to_le_bytes());
        bytes[len + 36..len + 40].copy_from_slice(&sum.to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        Some(Footer::decode(bytes, &key()).ok()?.encode(&key()))
    }
}

/// A directory of slices; a hash elsewhere covers it.
pub(crate) struct LocalDirectory;

impl Format for LocalDirectory {
    const CHECK: Check = Check::Nothing;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let entry = |at| SliceEntry { at, len: 16, hash: [3; 32] };
        vec![SliceEntry::encode_all(&[entry(64), SliceEntry::default(), entry(1 << 40)]), Vec::new()]
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        Some(SliceEntry::encode_all(&SliceEntry::decode_all(bytes).ok()?))
    }
}

/// A slice; a hash elsewhere covers it.
pub(crate) struct LocalSlice;

impl Format for LocalSlice {
    const CHECK: Check = Check::Nothing;
    const ONE_FORM: bool = true;

    fn specimens() -> Vec<Vec<u8>> {
        let run = |start, count, place| Run { start, count, place };
        let runs =
            [run(0, 32, Place::Frame(64)), run(40, 1, Place::Unreadable), run(16_000, 384, Place::Frame(1 << 50))];
        vec![encode_slice(&runs), encode_slice(&[])]
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        Some(encode_slice(&decode_slice(bytes).ok()?))
    }
}

/// A whole image, read as a restore and a proof read it.
pub(crate) struct LocalImage;

impl Format for LocalImage {
    /// Whatever is changed is found by the proof.
    const CHECK: Check = Check::Hash;
    const ONE_FORM: bool = false;

    fn specimens() -> Vec<Vec<u8>> {
        vec![WHOLE.to_vec()]
    }

    fn decode(bytes: &[u8]) -> Option<Vec<u8>> {
        let (disk, path) = (SimStorage::new(1), Path::new("/images/one"));
        disk.create_dir_all(Path::new("/images")).expect("made");
        replace(&disk, path, bytes).expect("written");
        let mut image = ImageFile::open(&disk, path, GROUP, &key()).ok()?;
        let slots: Vec<VolumeSlot> = image.footer().volumes.iter().map(|entry| entry.volume.slot).collect();
        for slot in slots {
            let _ = image.places(slot, Extent { start: Block(0), count: 40 });
        }
        verify(&mut image, &key(), &mut |_| true).ok()?;
        Some(image.footer().encode(&key()))
    }

    /// Opened frames, and a simulated disk that keeps what was written more than once.
    fn memory_max(len: usize) -> usize {
        (8 << 20) + 64 * len
    }
}

#[test]
fn an_image_of_version_1_reads_as_it_did() {
    let (disk, path) = (SimStorage::new(1), Path::new("/one"));
    replace(&disk, path, WHOLE).expect("written");
    let mut image = ImageFile::open(&disk, path, GROUP, &key()).expect("an image");
    assert!(verify(&mut image, &key(), &mut |_| true).expect("whole"));
    let footer = image.footer().clone();
    assert_eq!((footer.epoch, footer.volumes.len()), (Epoch(1234), 2));
    assert_eq!((footer.volumes[0].content_blocks, footer.volumes[0].unreadable_blocks), (38, 2));
    let mut raw = vec![0; 262_144];
    raw[3 * 4096..43 * 4096].chunks_mut(4096).zip(1..).for_each(|(block, fill)| block.fill(fill));
    raw[10 * 4096..12 * 4096].fill(0);
    assert_eq!(footer.volumes[0].image_hash, *blake3::hash(&raw).as_bytes());
    assert_eq!(footer.volumes[1].image_hash, *blake3::hash(&[0; 5000]).as_bytes());
}
