//! The eBPF tracker on what is not a plain disk being written: bio-based devices, discards, granules, and trackers that
//! are wrong on purpose.

use crate::loop_device::{self, LoopDevice, RawDisk, ZramDevice};
use cdp_protocol::codec::Sealer;
use cdp_protocol::record::Begin;
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{AttemptId, Block, Epoch, Generation, GroupId, KeyId, VolumeSlot};
use cdp_seams::clock::SystemClock;
use cdp_seams::random::{SimRandom, SystemRandom, array};
use cdp_seams::storage::SystemStorage;
use cdp_source::capture::{BlockContent, Capture};
use cdp_source::cut::{Cut, CutLimits, cut};
use cdp_source::encoder::Encoder;
use cdp_source::reader::pread::PreadReader;
use cdp_source::tracker::device::Device;
use cdp_source::tracker::ebpf::{BPFFS, EbpfOptions, EbpfTracker, remove, supported};
use cdp_source::tracker::{Tracker, TrackerError};
use roaring::RoaringBitmap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const BYTES: u64 = 64 * MIB;
const LIMITS: CutLimits = CutLimits { bound: Duration::from_secs(5), blocks_max: 100 };

/// A group and its tracker, whose pins go when the test ends, however it ends.
struct Group {
    id: GroupId,
    folder: tempfile::TempDir,
    nodes: Vec<PathBuf>,
}

impl Group {
    /// `None` where this machine cannot track; the reason is printed.
    fn new(nodes: &[&Path]) -> Option<Self> {
        if let Err(error) = supported() {
            eprintln!("skipped: {error}");
            return None;
        }
        let nodes = nodes.iter().map(|node| node.to_path_buf()).collect();
        Some(Self { id: GroupId(array(&SystemRandom)), folder: tempfile::tempdir().expect("a folder"), nodes })
    }

    fn options(&self) -> EbpfOptions {
        let slot = |(slot, node): (usize, &PathBuf)| (VolumeSlot(slot as u16), node.clone());
        let volumes = self.nodes.iter().enumerate().map(slot).collect();
        EbpfOptions::new(self.id, volumes, self.folder.path().join("state"), Arc::new(SystemStorage))
    }

    /// Opened, everything acked, and nothing left of what came before.
    fn open_clean(&self) -> EbpfTracker {
        self.open_clean_with(&self.options())
    }

    fn open_clean_with(&self, options: &EbpfOptions) -> EbpfTracker {
        let mut tracker = EbpfTracker::open(options).expect("tracked");
        tracker.take_recovered();
        tracker.flip().expect("flipped");
        tracker.retain_unacked(&vec![RoaringBitmap::new(); self.nodes.len()]).expect("acked");
        tracker
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let removed = remove(Path::new(BPFFS), &self.folder.path().join("state"), &SystemStorage, self.id);
        if !std::thread::panicking() {
            removed.expect("removed");
        }
    }
}

fn loop_of(folder: &tempfile::TempDir, bytes: u64) -> LoopDevice {
    let file = folder.path().join("disk");
    std::fs::File::create_new(&file).and_then(|file| file.set_len(bytes)).expect("a file");
    LoopDevice::attach(&file)
}

/// Blocks of a range of bytes, rounded outward.
fn touched(offset: u64, len: u64) -> RoaringBitmap {
    ((offset / 4096) as u32..(offset + len).div_ceil(4096) as u32).collect()
}

fn discard(node: &Path, offset: u64, len: u64) {
    let (offset, len) = (offset.to_string(), len.to_string());
    loop_device::run("blkdiscard", &["-o", &offset, "-l", &len, &node.to_string_lossy()]);
}

fn capture(tracker: &mut EbpfTracker) -> Capture {
    capture_with(tracker, LIMITS.blocks_max)
}

fn capture_with(tracker: &mut EbpfTracker, blocks_max: u64) -> Capture {
    let targets: Vec<_> = tracker.devices().iter().map(Device::read_target).collect();
    let mut reader = PreadReader::open(&targets).expect("opened");
    match cut(tracker, &mut reader, &SystemClock::new(), &mut Vec::new(), &CutLimits { blocks_max, ..LIMITS }) {
        Ok(Cut::Captured(capture)) => capture,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_bio_based_device_is_tracked_at_issue_and_at_completion() {
    if !ZramDevice::is_supported() {
        eprintln!("skipped: no zram here");
        return;
    }
    let device = ZramDevice::new(BYTES);
    let Some(group) = Group::new(&[device.node()]) else { return };
    let mut tracker = group.open_clean();
    let disk = RawDisk::open(device.node());
    let random = SimRandom::new(3);
    for _ in 0..20 {
        let mut oracle = RoaringBitmap::new();
        for _ in 0..random.below(40) {
            let len = 4096 * (1 + random.below(80));
            let offset = 4096 * random.below((BYTES - len) / 4096 + 1);
            disk.write(offset, len, 0xaa);
            oracle |= touched(offset, len);
        }
        assert_eq!(tracker.flip().expect("flipped"), [oracle]);
    }
    let counts = tracker.counts().expect("counts");
    assert!(counts.issued > 0);
    assert_eq!((counts.completed, counts.unremembered, counts.unknown), (counts.issued, 0, 0), "{counts:?}");
    assert_eq!(tracker.completions_lost(), 0);
    discard(device.node(), MIB, MIB);
    assert_eq!(tracker.flip().expect("flipped"), [touched(MIB, MIB)]);
    assert_eq!(tracker.holes(0, &touched(0, 4 * MIB)), touched(MIB, MIB));
}

/// A reset keeps the device's sequence number: nothing but its counts tell that all of it is zeros now.
#[test]
fn a_zram_device_that_was_reset_is_not_the_one_that_was_tracked() {
    if !ZramDevice::is_supported() {
        eprintln!("skipped: no zram here");
        return;
    }
    let device = ZramDevice::new(BYTES);
    let Some(group) = Group::new(&[device.node()]) else { return };
    RawDisk::open(device.node()).write(0, MIB, 1);
    let mut tracker = group.open_clean();
    RawDisk::open(device.node()).write(MIB, MIB, 2);
    discard(device.node(), 0, 4096);
    loop_device::run("blkdiscard", &["-z", "-l", "4096", &device.node().to_string_lossy()]);
    assert_eq!(tracker.flip().expect("flipped"), [touched(0, 4096) | touched(MIB, MIB)]);
    tracker.retain_unacked(&[RoaringBitmap::new()]).expect("acked");
    drop(tracker);
    let mut tracker = EbpfTracker::open(&group.options()).expect("tracked");
    assert_eq!(tracker.report().started_over, None, "not reset");

    // While it is watched, and nobody has it open.
    device.reset(BYTES);
    let noticed = tracker.flip().expect_err("noticed");
    assert!(matches!(&noticed, TrackerError::VolumeChanged { reason, .. } if reason.contains("reset")), "{noticed}");
    drop(tracker);
    let everything = touched(0, BYTES);
    starts_over(&group, &everything);

    // While nobody looks, with more written since than ever before.
    RawDisk::open(device.node()).write(0, MIB, 3);
    drop(group.open_clean());
    device.reset(BYTES);
    RawDisk::open(device.node()).write(4 * MIB, 4 * MIB, 4);
    starts_over(&group, &everything);
}

/// Opened, with all of it dirty because the device was reset; and once more, with nothing to complain of.
fn starts_over(group: &Group, everything: &RoaringBitmap) {
    let mut tracker = EbpfTracker::open(&group.options()).expect("tracked");
    assert!(tracker.report().started_over.is_some_and(|reason| reason.contains("was reset")));
    assert_eq!(&tracker.take_recovered()[0], everything);
    tracker.flip().expect("flipped");
    drop(tracker);
    assert_eq!(EbpfTracker::open(&group.options()).expect("tracked").report().started_over, None);
}

#[test]
fn whole_blocks_of_a_discard_are_holes_until_they_are_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let device = loop_of(&folder, BYTES);
    let Some(group) = Group::new(&[device.node()]) else { return };
    let mut tracker = group.open_clean();
    let disk = RawDisk::open(device.node());
    disk.write(0, 16 * MIB, 0xaa);
    tracker.flip().expect("flipped");
    // One and a half blocks in, to half a block short of the end.
    discard(device.node(), 6144, 8 * MIB - 8192);
    assert_eq!(tracker.flip().expect("flipped"), [touched(6144, 8 * MIB - 8192)]);
    let everything = touched(0, BYTES);
    assert_eq!(tracker.holes(0, &everything), touched(8192, 8 * MIB - 12288));
    disk.write(MIB, 512, 1);
    assert_eq!(tracker.holes(0, &everything), touched(8192, 8 * MIB - 12288) - touched(MIB, 512));
    loop_device::run("blkdiscard", &["-z", "-o", "16777216", "-l", "1048576", &device.node().to_string_lossy()]);
    assert!(tracker.holes(0, &everything).contains(4096));
}

#[test]
fn a_cut_takes_holes_without_reading_them_and_what_was_written_after_from_the_device() {
    let folder = tempfile::tempdir().expect("a folder");
    let device = loop_of(&folder, BYTES);
    let Some(group) = Group::new(&[device.node()]) else { return };
    let mut tracker = group.open_clean();
    discard(device.node(), 0, 32 * MIB);
    RawDisk::open(device.node()).write(40960, 4096, 7);
    // 8,192 blocks, of which 100 may be held in memory.
    let capture = capture(&mut tracker);
    let meters = capture.meters;
    assert_eq!((meters.dirty_blocks, meters.hole_blocks, meters.content_blocks), (8192, 8191, 1));
    assert_eq!(capture.volumes[0].blocks(), &touched(0, 32 * MIB));
}

#[test]
fn a_hole_of_a_partition_is_whole_blocks_of_the_partition() {
    let folder = tempfile::tempdir().expect("a folder");
    let device = loop_of(&folder, BYTES);
    let partition = device.partition(63, 10 * 2048 + 3);
    let Some(group) = Group::new(&[device.node(), &partition]) else { return };
    let mut tracker = group.open_clean();
    discard(device.node(), 0, 32 * MIB);
    let flipped = tracker.flip().expect("flipped");
    assert_eq!(flipped, [touched(0, 32 * MIB), touched(0, 10 * MIB + 1536)]);
    assert_eq!(tracker.holes(1, &flipped[1]), flipped[1], "its last block is a part of one");
    RawDisk::open(device.node()).write(63 * 512, 512, 1);
    assert_eq!(tracker.holes(0, &flipped[0]), &flipped[0] - touched(63 * 512, 512));
    assert_eq!(tracker.holes(1, &flipped[1]), &flipped[1] - touched(0, 512));
}

/// What happens to a disk, as a naive oracle keeps it for one window: sectors, no words, no bits.
struct Window {
    start: u64,
    sectors: u64,
    dirty: RoaringBitmap,
    holes: RoaringBitmap,
}

impl Window {
    fn new(start: u64, sectors: u64) -> Self {
        Self { start, sectors, dirty: RoaringBitmap::new(), holes: RoaringBitmap::new() }
    }

    fn happens(&mut self, from: u64, to: u64, is_discard: bool) {
        for block in 0..self.sectors.div_ceil(8) {
            let sectors = self.start + block * 8..self.start + (block * 8 + 8).min(self.sectors);
            let inside = sectors.clone().filter(|sector| (from..to).contains(sector)).count() as u64;
            if inside > 0 {
                self.dirty.insert(block as u32);
                self.holes.remove(block as u32);
                if is_discard && inside == sectors.end - sectors.start {
                    self.holes.insert(block as u32);
                }
            }
        }
    }
}

#[test]
fn windows_that_start_and_end_anywhere_are_clipped_as_a_naive_oracle_clips_them() {
    const SECTORS: u64 = 4 * 2048;
    let folder = tempfile::tempdir().expect("a folder");
    let device = loop_of(&folder, SECTORS * 512);
    let partition = device.partition(63, 2 * 2048 + 5);
    let Some(group) = Group::new(&[device.node(), &partition]) else { return };
    let mut tracker = group.open_clean();
    let disk = RawDisk::open(device.node());
    let mut windows = [Window::new(0, SECTORS), Window::new(63, 2 * 2048 + 5)];
    let random = SimRandom::new(11);
    for _ in 0..150 {
        for _ in 0..random.below(6) {
            let from = random.below(SECTORS);
            let to = (from + 1 + random.below(900)).min(SECTORS);
            let is_discard = random.below(2) == 0;
            if is_discard {
                discard(device.node(), from * 512, (to - from) * 512);
            } else {
                disk.write(from * 512, (to - from) * 512, 1);
            }
            // The kernel begins a discard with a bio of its own up to the next multiple of the device's granularity: a block
            // of the partition that lies across is wholly inside neither.
            let aligned = if is_discard { from.next_multiple_of(8).min(to) } else { from };
            for window in &mut windows {
                window.happens(from, aligned, is_discard);
                window.happens(aligned, to, is_discard);
            }
        }
        let flipped = tracker.flip().expect("flipped");
        for (volume, window) in windows.iter_mut().enumerate() {
            assert_eq!(flipped[volume], std::mem::take(&mut window.dirty), "volume {volume}");
            let all: RoaringBitmap = (0..window.sectors.div_ceil(8) as u32).collect();
            assert_eq!(tracker.holes(volume, &all), window.holes, "volume {volume}");
        }
    }
}

#[test]
fn a_volume_above_8_tib_is_tracked_in_granules() {
    const TIB: u64 = 1 << 40;
    let folder = tempfile::tempdir().expect("a folder");
    let device = loop_of(&folder, 9 * TIB + 512);
    let Some(group) = Group::new(&[device.node()]) else { return };
    let mut tracker = EbpfTracker::open(&group.options()).expect("tracked");
    let disk = RawDisk::open(device.node());
    let blocks = (9 * TIB / 4096) as u32 + 1;
    assert_eq!(tracker.take_recovered()[0].len(), u64::from(blocks));
    tracker.flip().expect("flipped");
    disk.write(9 * TIB - 4096, 4608, 1);
    let last = tracker.flip().expect("flipped");
    assert_eq!(last, [(blocks - 5..blocks).collect()], "the granule before the end, and the part of one at the end");
    disk.write(5 * 4096, 4096, 2);
    assert!(tracker.is_conflicted(0, Block(4)) && tracker.is_conflicted(0, Block(7)));
    assert!(!tracker.is_conflicted(0, Block(8)) && !tracker.is_conflicted(0, Block(3)));
    assert_eq!(tracker.flip().expect("flipped"), [(4..8).collect()]);
    discard(device.node(), 4096, 40 * 4096);
    assert_eq!(tracker.flip().expect("flipped"), [(0..44).collect()]);
    assert_eq!(tracker.holes(0, &(0..60).collect()), (4..40).collect::<RoaringBitmap>());
}

#[test]
fn a_kernel_that_does_not_count_is_in_doubt_until_it_does_and_all_is_captured_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let device = loop_of(&folder, BYTES);
    let Some(group) = Group::new(&[device.node()]) else { return };
    let mut tracker = group.open_clean();
    device.set_count(false);
    RawDisk::open(device.node()).write(0, 4096, 1);
    let refused = tracker.flip().expect_err("in doubt");
    assert!(matches!(&refused, TrackerError::InDoubt(reason) if reason.contains("iostats")), "{refused}");
    assert!(tracker.report().trust.doubt.is_some());
    device.set_count(true);
    assert_eq!(tracker.flip().expect("flipped"), [touched(0, BYTES)]);
    let trust = tracker.report().trust;
    assert_eq!((trust.doubt, trust.rescans), (None, 1));
    assert!(trust.rescanned.is_some_and(|reason| reason.contains("iostats")));
    assert_eq!(tracker.flip().expect("flipped"), [RoaringBitmap::new()]);
}

#[test]
fn the_counts_are_told_and_agree() {
    let folder = tempfile::tempdir().expect("a folder");
    let device = loop_of(&folder, BYTES);
    let Some(group) = Group::new(&[device.node()]) else { return };
    let mut tracker = group.open_clean();
    let before = tracker.report().trust.disks.remove(0);
    RawDisk::open(device.node()).write(0, MIB, 1);
    discard(device.node(), MIB, MIB);
    loop_device::run("blkdiscard", &["-z", "-l", "1048576", &device.node().to_string_lossy()]);
    tracker.flip().expect("flipped");
    let trust = tracker.report().trust;
    let disk = &trust.disks[0];
    assert_eq!((disk.issued - before.issued, disk.completed - before.completed), (6144, 6144));
    assert_eq!(disk.kernel_written - before.kernel_written, 4096);
    assert_eq!(disk.kernel_discarded - before.kernel_discarded, 2048);
    assert_eq!((trust.completions_lost, trust.blind_writes, trust.doubt), (0, 0, None));
}

/// A mounted file system; unmounted when the test ends.
struct Mount(PathBuf);

impl Mount {
    fn new(node: &Path, folder: &tempfile::TempDir) -> Self {
        let path = folder.path().join("mounted");
        std::fs::create_dir(&path).expect("made");
        loop_device::run("mkfs.ext4", &["-q", "-E", "nodiscard", &node.to_string_lossy()]);
        loop_device::run("mount", &[&node.to_string_lossy(), &path.to_string_lossy()]);
        Self(path)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        drop(std::process::Command::new("umount").arg(&self.0).output());
    }
}

fn frame_bytes(capture: &Capture) -> u64 {
    let sealer = Sealer::new(GroupId([1; 16]), Epoch(1), Generation(1), AttemptId([2; 16]), &DataKey::new([3; 32]));
    let begin = Begin { key: KeyId([1; 8]), volumes: vec![] };
    Encoder::new(1).encode(capture, &[VolumeSlot(0)], &begin, Arc::new(sealer)).bytes
}

#[test]
fn a_trim_of_a_mounted_file_system_costs_next_to_nothing_and_a_file_written_after_it_is_there() {
    const GIB: u64 = 1 << 30;
    let folder = tempfile::tempdir().expect("a folder");
    let device = loop_of(&folder, GIB + 200 * MIB);
    let Some(group) = Group::new(&[device.node()]) else { return };
    let mount = Mount::new(device.node(), &folder);
    let mut tracker = group.open_clean();
    loop_device::run("fstrim", &[&mount.0.to_string_lossy()]);
    let trimmed = capture_with(&mut tracker, 10_000);
    assert!(trimmed.meters.hole_blocks * 4096 >= GIB, "{:?}", trimmed.meters);
    assert!(frame_bytes(&trimmed) < 64 << 10, "{} bytes", frame_bytes(&trimmed));

    drop(mount);
    let folder = tempfile::tempdir().expect("a folder");
    let mount = Mount::new(device.node(), &folder);
    tracker.flip().expect("flipped");
    loop_device::run("fstrim", &[&mount.0.to_string_lossy()]);
    std::fs::write(mount.0.join("after"), [0x5a; 40960]).expect("written");
    rustix::fs::sync();
    let written = capture_with(&mut tracker, 10_000);
    assert!(written.meters.hole_blocks * 4096 >= GIB, "{:?}", written.meters);
    let is_its = |content: BlockContent<'_>| matches!(content, BlockContent::Bytes(bytes) if bytes == [0x5a; 4096]);
    assert_eq!(written.volumes[0].iter().filter(|(_, content)| is_its(*content)).count(), 10);
}

#[cfg(feature = "sabotage")]
mod sabotage {
    use super::*;
    use cdp_source::tracker::ebpf::Sabotage;

    fn wrong(group: &Group, sabotage: Sabotage) -> EbpfTracker {
        group.open_clean_with(&EbpfOptions { sabotage: Some(sabotage), ..group.options() })
    }

    #[test]
    fn completions_that_are_dropped_are_noticed() {
        let folder = tempfile::tempdir().expect("a folder");
        let device = loop_of(&folder, BYTES);
        let Some(group) = Group::new(&[device.node()]) else { return };
        let mut tracker = wrong(&group, Sabotage::DropCompletions);
        let disk = RawDisk::open(device.node());
        // None of 10,000 is dropped once in 20,000 times.
        for _ in 0..100 {
            for block in 0..100 {
                disk.write(block * 4096, 512, 1);
            }
            assert_eq!(tracker.flip().expect("flipped")[0].range_cardinality(0..100), 100);
        }
        let trust = tracker.report().trust;
        assert!(trust.completions_lost > 0, "{trust:?}");
        assert_eq!((trust.doubt, trust.rescans), (None, 0));
    }

    #[test]
    fn each_wrong_tracker_is_wrong_in_its_own_way() {
        let folder = tempfile::tempdir().expect("a folder");
        let device = loop_of(&folder, BYTES);
        let Some(group) = Group::new(&[device.node()]) else { return };
        let disk = RawDisk::open(device.node());
        let conflicts = |sabotage| {
            let mut tracker = wrong(&group, sabotage);
            disk.write(0, 4096, 1);
            let flipped = tracker.flip().expect("flipped");
            assert!(flipped[0].contains(0), "{sabotage:?}");
            disk.write(0, 4096, 2);
            tracker.is_conflicted(0, Block(0))
        };
        assert!(conflicts(Sabotage::IssueOnly));
        assert!(conflicts(Sabotage::CompletionOnly));
        assert!(conflicts(Sabotage::HoldRuns));
        assert!(conflicts(Sabotage::NoBarrier));
        assert!(!conflicts(Sabotage::NoValidation));
    }
}
