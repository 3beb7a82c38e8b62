//! Images written, read, asked and damaged, held against volumes that are just remembered.

use super::check::{Found, examine, verify};
use super::format::{Footer, FormatError, ImageVolume, Place};
use super::reader::ImageFile;
use super::source::ImagePoint;
use super::writer::{ImageWriter, Start};
use super::{ImageError, failed};
use crate::capture::CapturedVolume;
use crate::restore::line::PointSource;
use cdp_protocol::codec::open_content;
use cdp_protocol::frame;
use cdp_protocol::holding::{self, Held};
use cdp_protocol::recall::{Answer, Question, Told};
use cdp_protocol::record::Volume;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{
    AttemptId, BLOCK_BYTES, Block, Class, Epoch, Extent, Generation, GroupId, KeyId, Timestamp, VolumeSlot, blocks_in,
};
use cdp_seams::storage::Storage;
use cdp_seams::storage::sim::{Fault, SimStorage};
use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, proptest};
use roaring::RoaringBitmap;
use std::path::Path;

const GROUP: GroupId = GroupId([3; 16]);
const PATH: &str = "/images/one.cdpimage";
/// Two volumes: one of several slices, of which most is never written, and one that does not end with a block.
const SIZES: [u64; 2] = [140 << 20, 100_001];
/// The same, smaller.
const SMALL: [u64; 2] = [1 << 20, 100_001];

fn key() -> DataKey {
    DataKey::new([8; 32])
}

/// What a block was put as; `None`: unreadable.
type Image = Vec<std::collections::BTreeMap<u32, Option<u8>>>;

#[derive(Clone, Copy, Debug)]
struct Put {
    volume: usize,
    start: u32,
    count: u32,
    fill: Option<u8>,
}

fn puts() -> impl Strategy<Value = Vec<Vec<Put>>> {
    let put =
        (any::<bool>(), 0..60_u32, 1..70_u32, 0..3_u32, 0..12_u8).prop_map(|(second, start, count, slice, fill)| {
            let blocks = blocks_in(SIZES[usize::from(second)]) as u32;
            // Here and there, and around the ends of slices.
            let start =
                if second { start % blocks } else { (slice * super::format::SLICE_BLOCKS + start).saturating_sub(30) };
            let count = count.min(blocks - start);
            Put { volume: usize::from(second), start, count, fill: (fill > 0).then_some(fill % 5) }
        });
    proptest::collection::vec(proptest::collection::vec(put, 1..6), 0..12)
}

fn start(sizes: [u64; 2]) -> Start {
    let volume = |(slot, size_bytes): (usize, u64)| Volume {
        slot: VolumeSlot(slot as u16 * 3),
        size_bytes,
        name: format!("v{slot}"),
    };
    Start {
        group: GROUP,
        attempt: AttemptId([7; 16]),
        generation: Generation(2),
        epoch: Epoch(4),
        volumes: sizes.into_iter().enumerate().map(volume).collect(),
    }
}

/// Writes an image; gives it and what it is to hold.
fn written(disk: &SimStorage, sizes: [u64; 2], all: &[Vec<Put>]) -> (Image, Footer) {
    try_written(disk, sizes, all).expect("written")
}

fn try_written(disk: &SimStorage, sizes: [u64; 2], all: &[Vec<Put>]) -> Result<(Image, Footer), ImageError> {
    let (path, table) = (Path::new(PATH), Path::new("/images/table"));
    disk.create_dir_all(Path::new("/images")).map_err(failed("make", path))?;
    let file = disk.create_new(path).map_err(failed("make", path))?;
    let table = disk.create_new(table).map_err(failed("make", table))?;
    let mut writer = ImageWriter::new(file, path, table, &start(sizes), &key())?;
    let mut image: Image = vec![std::collections::BTreeMap::new(); 2];
    for step in all {
        let mut captured = [CapturedVolume::default(), CapturedVolume::default()];
        for put in step {
            for block in put.start..put.start + put.count {
                match put.fill {
                    Some(byte) => captured[put.volume].put(Block(block), &[byte; BLOCK_BYTES]),
                    None => captured[put.volume].put_unreadable(Block(block)),
                }
                image[put.volume].insert(block, put.fill);
            }
        }
        for (volume, captured) in captured.iter().enumerate() {
            writer.put(volume, captured)?;
        }
    }
    // What is excluded is zeros in the end.
    writer.put_zeros(0, &RoaringBitmap::from_iter([3, 4]))?;
    image[0].extend([(3, Some(0)), (4, Some(0))]);
    let mut footer = Footer {
        group: GROUP,
        attempt: start(sizes).attempt,
        key: KeyId([1; 8]),
        epoch: Epoch(9),
        cut_time: Timestamp(77),
        made: Timestamp(78),
        class: Class::Crash,
        label: None,
        volumes: writer.index()?,
    };
    let file = disk.open(path).map_err(failed("open", path))?;
    let mut opened = ImageFile::of(file, path, footer.clone());
    let found = examine(&mut opened, &key(), &mut |_| true)?.expect("not ended");
    for (entry, found) in footer.volumes.iter_mut().zip(found) {
        entry.image_hash = found.image_hash;
    }
    writer.finish(&footer, &key())?;
    Ok((image, footer))
}

fn open(disk: &SimStorage) -> Result<ImageFile, ImageError> {
    ImageFile::open(disk, Path::new(PATH), GROUP, &key())
}

/// The hash of a volume's raw image, the plain way.
fn raw_hash(volume: usize, image: &Image) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for block in 0..blocks_in(SIZES[volume]) {
        let fill = image[volume].get(&(block as u32)).copied().flatten().unwrap_or_default();
        let len = (SIZES[volume] - block * BLOCK_BYTES as u64).min(BLOCK_BYTES as u64) as usize;
        hasher.update(&[fill; BLOCK_BYTES][..len]);
    }
    *hasher.finalize().as_bytes()
}

/// Answers to a question, all of them.
fn ask(point: &mut ImagePoint, slot: VolumeSlot, question: Question) -> Vec<Answer> {
    point.ask(slot, question).expect("asked");
    std::iter::from_fn(|| point.next_piece().expect("answered")).collect()
}

proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(24))]

    #[test]
    fn an_image_holds_what_was_put_last_and_answers_so(all in puts(), asked in (0..60_u32, 1..400_u32)) {
        let disk = SimStorage::new(1);
        let (image, footer) = written(&disk, SIZES, &all);
        let mut opened = open(&disk).expect("an image");
        prop_assert_eq!(opened.footer(), &footer);
        prop_assert!(verify(&mut opened, &key(), &mut |_| true).expect("whole"));
        for (volume, entry) in footer.volumes.iter().enumerate() {
            let count = |wanted: fn(&Option<u8>) -> bool| image[volume].values().filter(|fill| wanted(fill)).count() as u64;
            let found = Found {
                image_hash: raw_hash(volume, &image),
                content_blocks: count(|fill| fill.is_some_and(|fill| fill > 0)),
                unreadable_blocks: count(Option::is_none),
            };
            let ImageVolume { image_hash, content_blocks, unreadable_blocks, .. } = *entry;
            prop_assert_eq!(found, Found { image_hash, content_blocks, unreadable_blocks });
        }
        let mut point = ImagePoint::new(opened);
        let (first, count) = (super::format::SLICE_BLOCKS - 30 + asked.0, asked.1);
        for (volume, extent) in [(0, Extent { start: Block(first), count }), (1, Extent { start: Block(0), count: 25 })] {
            answers_are(&mut point, volume, extent, &image)?;
        }
    }
}

/// Asks for digests and content, and holds both against what was put.
fn answers_are(
    point: &mut ImagePoint,
    volume: usize,
    extent: Extent,
    image: &Image,
) -> Result<(), proptest::test_runner::TestCaseError> {
    let slot = start(SIZES).volumes[volume].slot;
    let fill = |block: Block| image[volume].get(&block.0).copied().unwrap_or(Some(0));
    let (digest_key, named) = (key().digest_key(), vec![(extent.start, extent.count)]);
    let mut blocks = extent.blocks();
    for answer in ask(point, slot, Question::Holdings { extents: named.clone() }) {
        let Answer::Holdings { runs } = answer else { panic!("holdings") };
        for told in runs {
            let Told::Run(count, held) = told else { panic!("a run") };
            let run: Vec<Block> = blocks.by_ref().take(count as usize).collect();
            match held {
                Held::Hole => prop_assert!(run.iter().all(|block| fill(*block) == Some(0))),
                Held::Unreadable => prop_assert!(run.iter().all(|block| fill(*block).is_none())),
                Held::Frame { header, digests } => {
                    let of = Extent { start: run[0], count };
                    let digests = holding::open(&GROUP, slot, of, (&header, &digests), &key()).expect("opens");
                    let wanted =
                        run.iter().map(|block| digest_key.digest(&[fill(*block).unwrap_or_default(); BLOCK_BYTES]));
                    prop_assert!(digests.into_iter().eq(wanted));
                }
                other => panic!("{other:?}"),
            }
        }
    }
    prop_assert!(blocks.next().is_none(), "all are told of");
    let mut content = std::collections::BTreeMap::new();
    for answer in ask(point, slot, Question::Content { extents: named }) {
        let Answer::Frame { blocks, bytes, more: false } = answer else { continue };
        let frame = frame::decode(&GROUP, &bytes).expect("a frame");
        let opened = open_content(&frame, &key().attempt_key(&frame.header.attempt)).expect("opens");
        for (start, count) in blocks {
            let of = Extent { start, count };
            let bytes = crate::restore::fetch::of_blocks(&frame.header.extents, &opened, of).expect("has them");
            of.blocks().zip(bytes.chunks(BLOCK_BYTES)).for_each(|(block, bytes)| _ = content.insert(block, bytes[0]));
        }
    }
    let wanted = extent.blocks().filter_map(|block| Some((block, fill(block).filter(|fill| *fill > 0)?)));
    prop_assert!(content.into_iter().eq(wanted));
    Ok(())
}

/// What a small image is made of.
fn few() -> Vec<Vec<Put>> {
    let put = |volume, start, count, fill| Put { volume, start, count, fill };
    vec![vec![put(0, 10, 40, Some(1)), put(0, 50, 2, None)], vec![put(1, 0, 25, Some(2)), put(0, 20, 3, Some(3))]]
}

/// A small image, and its bytes.
fn small() -> (SimStorage, Vec<u8>) {
    let disk = SimStorage::new(1);
    written(&disk, SMALL, &few());
    let bytes = cdp_seams::storage::read_all(&disk, Path::new(PATH), 1 << 20).expect("read");
    (disk, bytes)
}

fn set(disk: &SimStorage, bytes: &[u8]) {
    cdp_seams::storage::replace(disk, Path::new(PATH), bytes).expect("written");
}

#[test]
fn any_flipped_byte_that_the_image_needs_is_found() {
    let (disk, bytes) = small();
    let mut unfound = Vec::new();
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 0x10;
        set(&disk, &changed);
        let found = open(&disk).and_then(|mut image| verify(&mut image, &key(), &mut |_| true));
        if found.is_ok() {
            unfound.push(at);
        }
    }
    assert!(unfound.is_empty(), "{} of {} bytes, from {:?} on", unfound.len(), bytes.len(), unfound.first());
}

#[test]
fn an_image_that_is_cut_short_of_another_group_key_or_version_is_refused() {
    let (disk, bytes) = small();
    for len in (0..bytes.len()).step_by(97).chain([bytes.len() - 1]) {
        set(&disk, &bytes[..len]);
        assert!(open(&disk).is_err(), "{len} bytes");
    }
    set(&disk, &bytes);
    let other = ImageFile::open(&disk, Path::new(PATH), GroupId([4; 16]), &key()).err().expect("another group");
    assert!(matches!(other, ImageError::OtherGroup { .. }), "{other}");
    let other = ImageFile::open(&disk, Path::new(PATH), GROUP, &DataKey::new([9; 32])).err().expect("another key");
    assert!(matches!(other, ImageError::Format { reason: FormatError::Key, .. }) && other.hint().is_some(), "{other}");
    let mut newer = bytes;
    newer[8] = 9;
    set(&disk, &newer);
    let newer = open(&disk).err().expect("newer");
    assert!(newer.to_string().contains("a newer program made it") && newer.hint().is_some(), "{newer}");
}

#[test]
fn a_frame_that_is_damaged_is_told_as_that_and_the_others_are_given() {
    let (disk, mut bytes) = small();
    let mut image = open(&disk).expect("an image");
    let slot = start(SIZES).volumes[0].slot;
    let places = image.places(slot, Extent { start: Block(0), count: 100 }).expect("places");
    let at = places.iter().find_map(|(extent, place)| match place {
        Place::Frame(at) if extent.start.0 >= 30 => Some(*at),
        _ => None,
    });
    // In the content, and in the header.
    for within in [90, 20] {
        bytes[at.expect("a frame") as usize + within] ^= 1;
        set(&disk, &bytes);
        let mut point = ImagePoint::new(open(&disk).expect("the footer is whole"));
        let answers = ask(&mut point, slot, Question::Content { extents: vec![(Block(10), 40)] });
        let lost: u64 = answers
            .iter()
            .map(|answer| if let Answer::Lost { count, .. } = answer { u64::from(*count) } else { 0 })
            .sum();
        let given = answers.iter().filter(|answer| matches!(answer, Answer::Frame { .. })).count();
        assert!(lost > 0 && lost < 40 && given > 0, "{lost} lost, {given} frames given");
    }
    let held = ask(
        &mut ImagePoint::new(open(&disk).expect("open")),
        slot,
        Question::Holdings { extents: vec![(Block(10), 40)] },
    );
    assert!(
        held.iter().any(
            |answer| matches!(answer, Answer::Holdings { runs } if matches!(runs[0], Told::Run(_, Held::Damaged)))
        )
    );
}

#[test]
fn a_call_that_fails_is_told_wherever_it_is() {
    let calls = small().0.calls();
    let (mut ended, mut is_told) = (0, false);
    for kind in [std::io::ErrorKind::StorageFull, std::io::ErrorKind::Other] {
        for call in 0..calls {
            let disk = SimStorage::new(1);
            disk.fault_at(call, Fault::Error(kind));
            let made = try_written(&disk, SMALL, &few());
            disk.clear_faults();
            ended += u64::from(made.is_err());
            is_told |= made.as_ref().err().and_then(ImageError::hint).is_some_and(|hint| hint.contains("full"));
            // What was written and not synced may be whole all the same; it has no name yet.
            assert!(made.is_err() || open(&disk).is_ok(), "call {call} was passed over");
        }
    }
    assert!(ended > calls && is_told, "{ended} of twice {calls} calls ended it");
}

#[test]
fn a_damaged_index_is_told_as_lost_blocks_and_the_other_volume_is_given() {
    let (disk, mut bytes) = small();
    let footer = open(&disk).expect("an image").footer().clone();
    bytes[footer.volumes[0].directory_at as usize + 20] ^= 1;
    set(&disk, &bytes);
    let mut point = ImagePoint::new(open(&disk).expect("the footer is whole"));
    let slots = [0, 1].map(|volume: usize| footer.volumes[volume].volume.slot);
    let content = |point: &mut ImagePoint, slot| ask(point, slot, Question::Content { extents: vec![(Block(10), 5)] });
    let lost = content(&mut point, slots[0]);
    assert!(matches!(lost.as_slice(), [Answer::Lost { count: 5, .. }]), "{lost:?}");
    let held = ask(&mut point, slots[0], Question::Holdings { extents: vec![(Block(10), 5)] });
    assert_eq!(held, [Answer::Holdings { runs: vec![Told::Run(5, Held::Damaged)] }]);
    assert!(matches!(content(&mut point, slots[1]).as_slice(), [Answer::Frame { .. }]));
}
