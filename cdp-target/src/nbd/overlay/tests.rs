//! An overlay on storage that loses what was not synced, and in the hands of whoever gives it to another point.

use super::*;
use cdp_protocol::record::Volume;
use cdp_protocol::units::{Block, Epoch, FrameHash, GroupId, Head};
use cdp_seams::random::SimRandom;
use cdp_seams::storage::SystemStorage;
use cdp_seams::storage::sim::{Fault, SimStorage};

const PATH: &str = "/overlays/a";
const BLOCKS: u32 = 24;
const LIVES: u64 = 600;

fn base(epoch: u64) -> Base {
    let volume = |slot: u16, blocks: u64, name: &str| Volume {
        slot: VolumeSlot(slot),
        size_bytes: blocks * BLOCK_BYTES as u64,
        name: name.into(),
    };
    Base {
        group: GroupId([7; 16]),
        head: Head { epoch: Epoch(epoch), hash: FrameHash([3; 32]) },
        volumes: vec![volume(1, 3, "boot"), volume(2, BLOCKS.into(), "root")],
    }
}

fn extent(start: u32, count: u32) -> Extent {
    Extent::new(Block(start), count).expect("an extent")
}

/// What the overlay says of each block of `root`: nothing, or content that is the same byte throughout; 0 is zeros.
fn content(overlay: &Arc<Overlay>) -> Vec<Option<Vec<u8>>> {
    let volume = overlay.volume(VolumeSlot(2));
    let mut blocks = Vec::new();
    for (run, state) in volume.states(extent(0, BLOCKS)) {
        for block in run.blocks() {
            let mut bytes = vec![0; BLOCK_BYTES];
            if state == State::Written {
                volume.read(extent(block.0, 1), &mut bytes).expect("read");
            }
            blocks.push((state != State::Untouched).then_some(bytes));
        }
    }
    blocks
}

/// What a block held at the last flush, and what it came to hold since.
#[derive(Clone, Default)]
struct Known {
    flushed: Option<u8>,
    since: Vec<u8>,
}

impl Known {
    /// Whether a crash may leave it so. Content over content may be torn.
    fn may_be(&self, found: Option<&[u8]>) -> bool {
        let is = |byte: u8| found.is_some_and(|found| found.iter().all(|other| *other == byte));
        let is_flushed = self.flushed.map_or(found.is_none(), is);
        is_flushed
            || self.since.iter().any(|byte| is(*byte))
            || (self.flushed.is_some_and(|byte| byte > 0) && !self.since.is_empty())
    }
}

/// A life of a server: writes, zeros and flushes until the power is cut, or nothing is left to do.
fn live(overlay: &Arc<Overlay>, known: &mut [Known], random: &SimRandom) {
    let volume = overlay.volume(VolumeSlot(2));
    for _ in 0..20 {
        let start = random.below(u64::from(BLOCKS)) as u32;
        let count = 1 + random.below(u64::from(BLOCKS - start)) as u32;
        let blocks = start as usize..(start + count) as usize;
        match random.below(4) {
            0 => {
                if overlay.flush().is_err() {
                    return;
                }
                for known in &mut *known {
                    known.flushed = known.since.last().copied().or(known.flushed);
                    known.since.clear();
                }
            }
            1 => {
                known[blocks].iter_mut().for_each(|known| known.since.push(0));
                if volume.zero(extent(start, count)).is_err() {
                    return;
                }
            }
            _ => {
                let byte = 1 + random.below(255) as u8;
                known[blocks].iter_mut().for_each(|known| known.since.push(byte));
                if volume.write(extent(start, count), &vec![byte; count as usize * BLOCK_BYTES]).is_err() {
                    return;
                }
            }
        }
    }
}

#[test]
fn what_was_flushed_survives_every_power_cut() {
    let mut cuts = 0;
    for seed in 0..LIVES {
        let (disk, random) = (SimStorage::new(seed), SimRandom::new(seed));
        disk.create_dir_all(Path::new("/overlays")).expect("made");
        let mut known = vec![Known::default(); BLOCKS as usize];
        for _ in 0..3 {
            let fault = if random.below(8) == 0 { Fault::Error(io::ErrorKind::Other) } else { Fault::PowerCut };
            disk.fault_at(disk.calls() + 1 + random.below(60), fault);
            if let Ok(overlay) = Overlay::open(&disk, Path::new(PATH), base(9)) {
                let overlay = Arc::new(overlay);
                live(&overlay, &mut known, &random);
            }
            disk.clear_faults();
            if !disk.is_down() {
                disk.power_cut();
            }
            cuts += 1;
            disk.restart();
            let overlay = Arc::new(Overlay::open(&disk, Path::new(PATH), base(9)).expect("it opens after any cut"));
            let found = content(&overlay);
            for (at, (known, found)) in known.iter().zip(&found).enumerate() {
                assert!(known.may_be(found.as_deref()), "seed {seed}: block {at}");
            }
            // From here on that is how it is: by writing it again, where it is torn.
            let volume = overlay.volume(VolumeSlot(2));
            for (at, (known, found)) in known.iter_mut().zip(found).enumerate() {
                let (byte, block) = (found.as_ref().map(|found| found[0]), extent(at as u32, 1));
                match byte {
                    None => {}
                    Some(0) => volume.zero(block).expect("zeros"),
                    Some(byte) => volume.write(block, &[byte; BLOCK_BYTES]).expect("written"),
                }
                *known = Known { flushed: byte, since: vec![] };
            }
            overlay.flush().expect("flushed");
        }
    }
    assert_eq!(cuts, LIVES * 3);
}

#[test]
fn an_overlay_belongs_to_one_point_and_one_server() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("overlay");
    let overlay = Overlay::open(&SystemStorage, &path, base(9)).expect("made");
    assert!(matches!(Overlay::open(&SystemStorage, &path, base(9)), Err(OverlayError::InUse(_))));
    drop(overlay);
    drop(Overlay::open(&SystemStorage, &path, base(9)).expect("opened again"));
    let Err(OverlayError::Other { found, wanted, .. }) = Overlay::open(&SystemStorage, &path, base(10)) else {
        panic!("it is of another point");
    };
    assert!(
        found.starts_with("point 9 (03030303) of group 0707") && wanted.starts_with("point 10 "),
        "{found}, {wanted}"
    );
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a test that puts other things in the file's place")]
fn what_is_no_overlay_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("overlay");
    let refusal = |bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("written");
        let refused = Overlay::open(&SystemStorage, &path, base(9)).err();
        assert_eq!(std::fs::read(&path).expect("read"), bytes, "it is as it was");
        refused
    };
    let not = |refused| matches!(refused, Some(OverlayError::Header { source: HeaderError::NotAnOverlay, .. }));
    assert!(not(refusal(b"somebody's letter")));
    assert!(not(refusal(&[0; 1 << 20])), "an image that begins with zeros");
    let header = format::encode_header(&base(9));
    for len in [1, 100, HEADER_BYTES - 1] {
        assert!(refusal(&header[..len]).is_some(), "{len} bytes");
    }
    assert!(not(refusal(b"")));
}

#[test]
fn a_map_that_is_gone_is_not_taken_for_an_empty_one() {
    let disk = SimStorage::new(1);
    disk.create_dir_all(Path::new("/overlays")).expect("made");
    let overlay = Arc::new(Overlay::open(&disk, Path::new(PATH), base(9)).expect("made"));
    let volume = overlay.volume(VolumeSlot(2));
    for _ in 0..2 {
        volume.write(extent(0, 1), &[1; BLOCK_BYTES]).expect("written");
        overlay.flush().expect("flushed");
        volume.zero(extent(0, 1)).expect("zeros");
        overlay.flush().expect("flushed");
    }
    let (first, second) = (overlay.layout.page(1, 0, 0), overlay.layout.page(1, 0, 1));
    drop((overlay, volume));
    disk.flip_bit(Path::new(PATH), first * 8 + 7);
    Overlay::open(&disk, Path::new(PATH), base(9)).expect("one copy is whole");
    disk.flip_bit(Path::new(PATH), second * 8 + 7);
    let damaged = Overlay::open(&disk, Path::new(PATH), base(9)).err();
    assert!(matches!(damaged, Some(OverlayError::Map { page: 0, .. })), "{damaged:?}");
}

/// Bytes of version 1, as they were released.
#[test]
fn version_1_is_read_and_written_as_ever() {
    const HEADER: &[u8; HEADER_BYTES] = include_bytes!("../../../../tests/testdata/overlay/1/header");
    const PAGE: &[u8; PAGE_BYTES] = include_bytes!("../../../../tests/testdata/overlay/1/page");
    let volume = |slot, name: &str| Volume { slot: VolumeSlot(slot), size_bytes: 1 << 40, name: name.into() };
    let released = Base { volumes: vec![volume(0, "root"), volume(7, "data")], ..base(9) };
    assert_eq!(format::decode_header(HEADER), Ok(released.clone()));
    assert_eq!(format::encode_header(&released), HEADER);
    let states = vec![(0, State::Written), (1, State::Zero), (format::PAGE_BLOCKS - 1, State::Zero)];
    assert_eq!(format::encode_page(1, 2, 1, states.iter().copied()), PAGE);
    assert_eq!(format::decode_page(1, 2, PAGE), Copy::Whole { sequence: 1, states });
}

#[test]
fn the_first_flush_syncs_what_a_killed_server_wrote_and_nobody_elses_file_is_touched() {
    let disk = SimStorage::new(1);
    disk.create_dir_all(Path::new("/overlays")).expect("made");
    let beside = Path::new("/overlays/.a.overlay-new");
    let other = disk.create_new(beside).expect("made");
    other.write_at(b"somebody's own", 0).expect("written");
    let overlay = Overlay::open(&disk, Path::new(PATH), base(9)).expect("made under another name");
    let mut bytes = [0; 14];
    other.read_at(&mut bytes, 0).expect("read");
    assert_eq!(&bytes, b"somebody's own");
    assert_eq!(disk.list(Path::new("/overlays")).expect("listed").len(), 2);
    let before = disk.calls();
    overlay.flush().expect("flushed");
    assert!(disk.calls() > before, "it cannot know that all is durable");
    let before = disk.calls();
    overlay.flush().expect("flushed");
    assert_eq!(disk.calls(), before, "and then it does");
}
