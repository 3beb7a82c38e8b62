//! The bytes on disk: frozen by fixtures, and no flipped bit is taken for them.

#![expect(clippy::disallowed_methods, reason = "reads fixtures of the repository")]

mod journal_support;

use cdp_protocol::codec::{Draft, Sealer, open_content, open_digests};
use cdp_protocol::frame::{self, Encoding};
use cdp_protocol::layout::{Content, Layout, Partition, Table};
use cdp_protocol::packer::{Packer, Packing};
use cdp_protocol::record::volume_meters::VolumeMeters;
use cdp_protocol::record::{Commit, FrameList, Meters};
use cdp_protocol::units::{
    AttemptId, BLOCK_BYTES, Block, Class, Epoch, Extent, FrameHash, Generation, Sequence, Timestamp, VolumeSlot,
};
use cdp_seams::random::SimRandom;
use cdp_seams::storage::sim::SimStorage;
use cdp_seams::storage::{Storage, SystemStorage};
use cdp_target::inspect::{Description, inspect};
use cdp_target::journal::segment::{FOOTER_BYTES, Footer, Header};
use cdp_target::journal::{GroupJournal, JournalLimits, Manifest};
use journal_support::{Source, check, identity, key, prune_to_newest};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const FOLDER: &str = "/store/branch/main";
const LIMITS: JournalLimits = JournalLimits { segment_bytes_max: 5000 };

/// The same journal every time: fixtures are made of it.
fn made() -> (SimStorage, Source) {
    let disk = SimStorage::new(77);
    let mut journal =
        GroupJournal::create(Arc::new(disk.clone()), Path::new(FOLDER), identity(), LIMITS).expect("made");
    let mut source = Source::new(77);
    for _ in 0..10 {
        source.step(&mut journal).expect("no fault is set");
    }
    source.sync(&mut journal).expect("no fault is set");
    journal.label(source.points[0].head.epoch, Some("first")).expect("labelled");
    (disk, source)
}

/// The same with a checkpoint, and with segments that were rewritten: two points are pinned, the others go.
fn made_and_pruned() -> SimStorage {
    let (disk, source) = made();
    let (mut journal, _) = GroupJournal::open(Arc::new(disk.clone()), Path::new(FOLDER), LIMITS).expect("opened");
    for at in [1, 3] {
        journal.pin(source.points[at].head.epoch, true).expect("pinned");
    }
    journal.label(source.points[0].head.epoch, None).expect("unlabelled");
    prune_to_newest(&mut journal, Timestamp(source.time + 1), &SimRandom::new(78), LIMITS.segment_bytes_max);
    disk
}

/// The last file of a kind below the group's folder.
fn last_of(disk: &SimStorage, folder: &str, kind: &str) -> String {
    let names = disk.list(&Path::new(FOLDER).join(folder)).expect("listed");
    let found = names.iter().rfind(|name| name.extension().is_some_and(|extension| extension == kind));
    format!("{folder}/{}", found.expect("one of the kind").display())
}

#[test]
fn packs_and_image_indexes_are_still_read_and_still_written() {
    let disk = made_and_pruned();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/testdata");
    for (fixture, folder, kind) in [
        ("pack/1/slice.pack", "packs", "pack"),
        ("pack/1/segment.thin", "journal", "thin"),
        ("image/1/checkpoint.image", "checkpoints", "image"),
    ] {
        let written = bytes_of(&disk, &last_of(&disk, folder, kind));
        freeze(&data.join(fixture), &written);
        let description = inspect(&SystemStorage, &data.join(fixture)).expect("described");
        match description {
            Description::Pack(pack) => assert!(pack.damages.is_empty() && !pack.frames.is_empty(), "{pack:?}"),
            Description::Image(image) => {
                assert!(image.copies_agree && image.slices.iter().any(|slice| slice.pack.is_some()), "{image:?}");
                assert!(image.slices.iter().all(|slice| !slice.damaged), "{image:?}");
            }
            other => panic!("no such fixture: {other:?}"),
        }
    }
}

#[test]
fn a_newer_pack_or_image_index_is_refused_with_both_versions() {
    let disk = made_and_pruned();
    for (folder, kind, words) in [
        ("packs", "pack", "pack format version 9, this program reads 1"),
        ("checkpoints", "image", "image index format version 9, this program reads 1"),
    ] {
        let path = Path::new(FOLDER).join(last_of(&disk, folder, kind));
        let mut bytes = cdp_seams::storage::read_all(&disk, &path, 1 << 20).expect("read");
        // An image index has two copies.
        let second = if kind == "image" { bytes.len() / 2 } else { 0 };
        for at in [0, second] {
            bytes[at + 8] = 9;
        }
        cdp_seams::storage::replace(&disk, &path, &bytes).expect("replaced");
        let error = inspect(&disk, &path).expect_err("refused");
        let source = std::error::Error::source(&error).expect("a source").to_string();
        assert_eq!(source, words);
    }
}

/// Frames of every packing are read whatever this program packs with. They are not held against what it writes now: how
/// tight lz4 and zstd pack is their own affair.
#[test]
fn frames_of_every_packing_are_still_read() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/testdata/frame/1");
    let content = b"the same line again\n".repeat(500)[..2 * BLOCK_BYTES].to_vec();
    let extents = vec![Extent::new(Block(5), 1).expect("a block"), Extent::new(Block(9), 1).expect("a block")];
    for (name, packing, encoding) in [
        ("lz4.frame", Packing::Lz4, Encoding::Lz4),
        ("zstd.frame", Packing::zstd(3), Encoding::Zstd),
        ("zstd-high.frame", Packing::zstd(19), Encoding::Zstd),
    ] {
        let path = data.join(name);
        if std::env::var_os("CDP_WRITE_FIXTURES").is_some() {
            let sealer = Sealer::new(identity().group, Epoch(7), Generation(1), AttemptId([4; 16]), &key());
            let mut draft = Draft::default();
            draft.push(&content);
            let frame =
                sealer.content_of(&mut Packer::new(packing), VolumeSlot(1), Sequence(1), extents.clone(), draft);
            std::fs::create_dir_all(&data).expect("made");
            std::fs::write(&path, frame).expect("written");
        }
        let bytes = std::fs::read(path).expect("the fixture");
        let frame = frame::decode(&identity().group, &bytes).expect("a frame");
        assert_eq!((frame.header.encoding, &frame.header.extents), (encoding, &extents));
        let attempt = key().attempt_key(&frame.header.attempt);
        assert_eq!(open_content(&frame, &attempt).as_ref(), Ok(&content), "{name}");
        assert_eq!(open_digests(&frame, &attempt), Ok(key().digest_key().digests(&content)), "{name}");
    }
}

/// Commits of before the volumes were counted, those that tell no layout, and those that do: all are read, and encoded as they were, since
/// the chain of points is made of their hashes.
#[test]
fn commits_of_all_forms_are_still_read_and_still_written() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/testdata/frame/1");
    let meters = VolumeMeters {
        written_bytes: Some(1 << 33),
        dirty_blocks: 9,
        unchanged_blocks: 1,
        content_blocks: 5,
        hole_blocks: 2,
        unreadable_blocks: 1,
        rewritten_blocks: 3,
        incompressible_blocks: 4,
        frame_bytes: 17_000,
    };
    let uncounted = VolumeMeters { written_bytes: None, ..VolumeMeters::default() };
    let both = vec![(VolumeSlot(1), meters), (VolumeSlot(4), uncounted)];
    for (name, volumes, layouts) in [
        ("commit.frame", vec![], vec![]),
        ("commit-volumes.frame", both.clone(), vec![]),
        ("commit-layouts.frame", both, vec![(VolumeSlot(4), layout())]),
        ("commit-layout-alone.frame", vec![], vec![(VolumeSlot(1), layout())]),
    ] {
        let commit = Commit {
            predecessor: None,
            frames: FrameList { count: 3, hash: FrameHash([6; 32]) },
            parts: None,
            first_epoch: Epoch(7),
            after_rollback_to: None,
            class: Class::Crash,
            cut_time: Timestamp(1_764_000_000_000),
            meters: Meters { cut_rounds: 1, cut_us: 900, dirty_blocks: 9, ..Meters::default() },
            label: Some("before-upgrade".into()),
            volumes,
            layouts,
        };
        let sealer = Sealer::new(identity().group, Epoch(7), Generation(1), AttemptId([4; 16]), &key());
        let written = sealer.record(frame::Kind::Commit, Sequence(3), commit.encode());
        freeze(&data.join(name), &written);
        let frame = frame::decode(&identity().group, &written).expect("a frame");
        let (read, mac_at) = Commit::decode(frame.payload).expect("a commit");
        assert_eq!((read.encode().as_slice(), &read), (&frame.payload[..mac_at], &commit), "{name}");
    }
}

fn layout() -> Layout {
    let partition = Partition {
        number: 2,
        start_bytes: 2 << 20,
        size_bytes: 5 << 20,
        kind: [0xaf; 16],
        id: [3; 16],
        is_active: true,
        content: Content::Ext,
        name: "root".into(),
    };
    let (table, partitions) = (Table::Gpt([4; 16]), vec![partition]);
    Layout { sector_bytes: 512, size_bytes: 8 << 20, table, has_boot_code: true, partitions }
}

/// Writes a fixture where that was asked for; holds it against what is written now.
fn freeze(fixture: &Path, written: &[u8]) {
    if std::env::var_os("CDP_WRITE_FIXTURES").is_some() {
        std::fs::create_dir_all(fixture.parent().expect("a folder")).expect("made");
        std::fs::write(fixture, written).expect("written");
    }
    let frozen = std::fs::read(fixture).expect("the fixture");
    assert!(frozen == written, "{} is not what this program writes", fixture.display());
}

fn bytes_of(disk: &SimStorage, path: &str) -> Vec<u8> {
    cdp_seams::storage::read_all(disk, &Path::new(FOLDER).join(path), 1 << 20).expect("read")
}

fn fixtures() -> [(PathBuf, &'static str); 3] {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/testdata");
    [
        (data.join("segment/1/sealed.seg"), "journal/0000000000000001.seg"),
        (data.join("segment/1/open.seg"), ""),
        (data.join("manifest/3/manifest"), "manifest"),
    ]
}

fn open_name(disk: &SimStorage) -> String {
    let names = disk.list(&Path::new(FOLDER).join("journal")).expect("listed");
    format!("journal/{}", names.last().expect("a segment").display())
}

#[test]
fn fixtures_are_still_read_and_still_written() {
    let (disk, source) = made();
    check(
        &GroupJournal::open(Arc::new(disk.clone()), Path::new(FOLDER), LIMITS).expect("opened").0.view(),
        &source.points,
        |_| true,
    );
    let (disk, _) = made();
    for (fixture, path) in fixtures() {
        let path = if path.is_empty() { open_name(&disk) } else { path.to_owned() };
        let written = bytes_of(&disk, &path);
        freeze(&fixture, &written);
        let description = inspect(&SystemStorage, &fixture).expect("described");
        match &description {
            Description::Segment(segment) => {
                assert!(segment.damages.is_empty() && !segment.frames.is_empty());
                assert_eq!(segment.sealed, fixture.ends_with("sealed.seg"));
            }
            Description::Manifest(manifest) => assert_eq!(manifest.identity, identity()),
            Description::Pack(_) | Description::Image(_) => panic!("no such fixture"),
        }
    }
}

#[test]
fn no_decoder_takes_a_flipped_bit() {
    let (disk, _) = made();
    let manifest = bytes_of(&disk, "manifest");
    let copy = &manifest[..manifest.len() / 2];
    let segment = bytes_of(&disk, "journal/0000000000000001.seg");
    let (_, header_len) = Header::decode(&segment).expect("a header");
    let footer = &segment[segment.len() - FOOTER_BYTES..];
    let len = segment.len() as u64;
    assert!(Manifest::decode(copy).is_ok() && Footer::decode(footer, len).is_ok());
    let refuses = |bytes: &[u8], takes: &dyn Fn(&[u8]) -> bool| {
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(!takes(&flipped), "bit {bit}");
        }
        for cut in 0..bytes.len() {
            assert!(!takes(&bytes[..cut]), "cut to {cut}");
        }
    };
    refuses(copy, &|bytes| Manifest::decode(bytes).is_ok());
    refuses(footer, &|bytes| Footer::decode(bytes, len).is_ok());
    refuses(&segment[..header_len], &|bytes| Header::decode(bytes).is_ok());
}

#[test]
fn a_newer_manifest_is_refused_with_both_versions() {
    let (disk, _) = made();
    let mut manifest = bytes_of(&disk, "manifest");
    let half = manifest.len() / 2;
    for at in [8, half + 8] {
        manifest[at] = 4;
    }
    cdp_seams::storage::replace(&disk, &Path::new(FOLDER).join("manifest"), &manifest).expect("replaced");
    let error = GroupJournal::open(Arc::new(disk), Path::new(FOLDER), LIMITS).err().expect("refused");
    let source = std::error::Error::source(&error).expect("a source").to_string();
    assert_eq!(source, "manifest format version 4, this program reads up to 3");
}

#[test]
fn a_manifest_of_version_1_is_read_as_one_without_a_lineage() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/testdata/manifest/1/manifest");
    let bytes = std::fs::read(path).expect("the fixture");
    let (manifest, is_damaged) = Manifest::decode_file(&bytes).expect("read");
    let (disk, _) = made();
    let (now, _) = Manifest::decode_file(&bytes_of(&disk, "manifest")).expect("read");
    assert!(!is_damaged && manifest.lineage.lines().is_empty() && manifest.forks.is_empty());
    assert_eq!((&manifest.identity, manifest.open), (&now.identity, now.open));
    assert_eq!(manifest.sealed.len(), now.sealed.len(), "the same history, of commits that were shorter then");
}

#[test]
fn a_manifest_of_version_2_is_read_as_one_of_which_nothing_was_removed() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/testdata/manifest/2/manifest");
    let (manifest, is_damaged) = Manifest::decode_file(&std::fs::read(path).expect("the fixture")).expect("read");
    let (disk, _) = made();
    let (now, _) = Manifest::decode_file(&bytes_of(&disk, "manifest")).expect("read");
    assert!(!is_damaged && manifest.removed.ranges().is_empty() && manifest.checkpoints.is_empty());
    assert_eq!((manifest.change, manifest.floor), (0, None));
    // Which epochs a segment has frames of was not written down.
    let mut expected = now;
    expected.sealed.iter_mut().for_each(|sealed| sealed.newest_run = Epoch(u64::MAX));
    assert_eq!(manifest, expected, "all else is the same history");
}
