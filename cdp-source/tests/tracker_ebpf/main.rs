//! The eBPF tracker on real loop devices. Needs root and a kernel with BTF; says so and passes where it has neither.
#![expect(clippy::disallowed_methods, reason = "a test works on real files and devices")]

mod loop_device;
mod reboot;
mod refused;
mod strange;
mod versions;

use aya::maps::{Array, HashMap, Map, MapData};
use cdp_protocol::units::{Block, GroupId, VolumeSlot};
use cdp_seams::random::{SimRandom, SystemRandom, array};
use cdp_seams::storage::SystemStorage;
use cdp_source::tracker::ebpf::{BPFFS, EbpfOptions, EbpfTracker, remove, supported};
use cdp_source::tracker::memory::kernel_memory_bytes;
use cdp_source::tracker::{Tracker, TrackerError};
use loop_device::{LoopDevice, RawDisk};
use roaring::RoaringBitmap;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const MIB: u64 = 1 << 20;
const VOLUME_BYTES: u64 = 64 * MIB;
const VOLUME_BLOCKS: u32 = (VOLUME_BYTES / 4096) as u32;

/// A group on devices of its own, whose pins go when the test ends, however it ends.
struct Group {
    id: GroupId,
    folder: tempfile::TempDir,
    devices: Vec<LoopDevice>,
}

impl Group {
    /// `None` where this machine cannot track; the reason is printed.
    fn new() -> Option<Self> {
        if let Err(error) = supported() {
            eprintln!("skipped: {error}");
            return None;
        }
        let folder = tempfile::tempdir().expect("a folder");
        Some(Self { id: GroupId(array(&SystemRandom)), folder, devices: Vec::new() })
    }

    fn add_device(&mut self, bytes: u64) -> PathBuf {
        let file = self.folder.path().join(format!("disk{}", self.devices.len()));
        std::fs::File::create_new(&file).and_then(|file| file.set_len(bytes)).expect("a file");
        let device = LoopDevice::attach(&file);
        let node = device.node().to_owned();
        self.devices.push(device);
        node
    }

    fn options(&self, volumes: &[&Path]) -> EbpfOptions {
        let slot = |(slot, path): (usize, &&Path)| (VolumeSlot(slot as u16), path.to_path_buf());
        let volumes = volumes.iter().enumerate().map(slot).collect();
        EbpfOptions::new(self.id, volumes, self.folder.path().join("state"), Arc::new(SystemStorage))
    }

    fn open(&self, volumes: &[&Path]) -> EbpfTracker {
        EbpfTracker::open(&self.options(volumes)).expect("tracked")
    }

    /// Opened, everything acked, and nothing left of what came before.
    fn open_clean(&self, volumes: &[&Path]) -> EbpfTracker {
        let mut tracker = self.open(volumes);
        tracker.take_recovered();
        tracker.flip().expect("flipped");
        tracker.retain_unacked(&vec![RoaringBitmap::new(); volumes.len()]).expect("acked");
        tracker
    }

    fn pinned(&self) -> PathBuf {
        Path::new(BPFFS).join("cdp").join(self.id.to_string())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let removed = remove(Path::new(BPFFS), &self.folder.path().join("state"), &SystemStorage, self.id);
        if !std::thread::panicking() {
            removed.expect("removed");
            assert!(!self.pinned().exists());
        }
    }
}

fn blocks(range: std::ops::Range<u32>) -> RoaringBitmap {
    range.collect()
}

/// Blocks of a range of bytes, rounded outward.
fn touched(offset: u64, len: u64) -> RoaringBitmap {
    blocks((offset / 4096) as u32..(offset + len).div_ceil(4096) as u32)
}

#[test]
fn a_flip_gives_exactly_what_was_written_since_the_last() {
    let Some(mut group) = Group::new() else { return };
    let node = group.add_device(VOLUME_BYTES);
    let mut tracker = group.open(&[&node]);
    assert!(tracker.report().started_over.is_some());
    assert_eq!(tracker.take_recovered(), [blocks(0..VOLUME_BLOCKS)]);
    assert_eq!(tracker.take_recovered(), [RoaringBitmap::new()]);
    let disk = RawDisk::open(&node);
    let random = SimRandom::new(7);
    for _ in 0..20 {
        let mut oracle = RoaringBitmap::new();
        for _ in 0..random.below(40) {
            let len = 512 * (1 + random.below(300));
            let offset = 512 * random.below((VOLUME_BYTES - len) / 512 + 1);
            disk.write(offset, len, 0xaa);
            oracle |= touched(offset, len);
        }
        assert_eq!(tracker.flip().expect("flipped"), [oracle]);
    }
    assert_eq!(tracker.flip().expect("flipped"), [RoaringBitmap::new()]);
    let report = tracker.report();
    assert!(report.issued > 0 && report.completed > 0);
}

#[test]
fn the_kernel_takes_the_memory_that_was_foretold() {
    let Some(mut group) = Group::new() else { return };
    let (small, large) = (group.add_device(VOLUME_BYTES), group.add_device(5 << 30));
    let tracker = group.open(&[&small, &large]);
    let mut taken = 0;
    for entry in std::fs::read_dir(tracker.pin_folder()).expect("listed") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if name.ends_with("_program") || name.ends_with("_link") {
            continue;
        }
        let map = MapData::from_pin(&path).expect("a map");
        let info = format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd());
        let info = std::fs::read_to_string(info).expect("told");
        let bytes = info.lines().find_map(|line| line.strip_prefix("memlock:")).expect("a size");
        taken += bytes.trim().parse::<u64>().expect("a number");
    }
    let foretold = kernel_memory_bytes(&[VOLUME_BYTES, 5 << 30]);
    assert!(taken <= foretold && foretold - taken < 5 << 20, "{taken} bytes taken, {foretold} foretold");
}

#[test]
fn marks_that_could_not_be_made_while_no_agent_looked_make_everything_dirty() {
    let Some(mut group) = Group::new() else { return };
    let node = group.add_device(VOLUME_BYTES);
    let folder = group.open_clean(&[&node]).pin_folder().to_owned();
    assert_eq!(group.open(&[&node]).take_recovered(), [RoaringBitmap::new()]);
    let gates = MapData::from_pin(folder.join("gates")).expect("pinned");
    let mut gates: Array<_, [u64; 8]> = Map::Array(gates).try_into().expect("an array");
    let mut gate = gates.get(&0, 0).expect("read");
    gate[5] += 1;
    gates.set(0, gate, 0).expect("set");
    assert_eq!(group.open(&[&node]).take_recovered(), [blocks(0..VOLUME_BLOCKS)]);
    group.open_clean(&[&node]);
    assert_eq!(group.open(&[&node]).take_recovered(), [RoaringBitmap::new()], "once");
}

/// Another loop device stands in for a path of native NVMe multipath, which this machine does not have.
#[test]
fn what_completes_on_a_path_is_marked_on_its_head() {
    let Some(mut group) = Group::new() else { return };
    let (head, path) = (group.add_device(VOLUME_BYTES), group.add_device(VOLUME_BYTES));
    let mut tracker = group.open_clean(&[&head]);
    let number = tracker.devices()[0].disk.to_kernel();
    // So often that what is outstanding at rest is known.
    for _ in 0..12 {
        RawDisk::open(&head).write(0, 4096, 1);
        assert_eq!(tracker.flip().expect("flipped"), [blocks(0..1)]);
    }
    RawDisk::open(&path).write(4096, 4096, 1);
    assert_eq!(tracker.flip().expect("flipped"), [RoaringBitmap::new()], "no path of it yet");

    let pinned = |name: &str| MapData::from_pin(tracker.pin_folder().join(name)).expect("pinned");
    let mut name = [0; 32];
    let text = path.file_name().expect("a name").as_encoded_bytes();
    name[..text.len()].copy_from_slice(text);
    let mut paths: HashMap<_, [u8; 32], u32> = Map::HashMap(pinned("paths")).try_into().expect("a table");
    paths.insert(name, number, 0).expect("inserted");
    let mut control: Array<_, [u64; 4]> = Map::Array(pinned("control")).try_into().expect("an array");
    let [active, discards, _, answered] = control.get(&0, 0).expect("read");
    control.set(0, [active, discards, 1, answered], 0).expect("set");
    let before = tracker.report().completed;
    RawDisk::open(&path).write(8192, 4096, 2);
    let dirty: Array<_, u64> = Map::Array(pinned(&format!("dirty_{active}"))).try_into().expect("an array");
    assert_eq!(dirty.get(&0, 0).expect("read"), 1 << 2);
    assert_eq!(tracker.report().completed, before + 1);
    // It was issued to no head: the counts are in doubt over that.
    assert_eq!(tracker.flip().expect("flipped"), [blocks(0..VOLUME_BLOCKS)]);
}

#[test]
fn discards_and_zeroed_ranges_are_marked_whole() {
    let Some(mut group) = Group::new() else { return };
    let node = group.add_device(VOLUME_BYTES);
    let mut tracker = group.open_clean(&[&node]);
    loop_device::run("blkdiscard", &["-o", "1048576", "-l", "33554432", &node.to_string_lossy()]);
    assert_eq!(tracker.flip().expect("flipped"), [touched(MIB, 32 * MIB)]);
    loop_device::run("blkdiscard", &["-z", "-o", "8192", "-l", "1536", &node.to_string_lossy()]);
    assert_eq!(tracker.flip().expect("flipped"), [touched(8192, 1536)]);
}

#[test]
fn a_partition_at_sector_63_and_its_disk_are_tracked_side_by_side() {
    const START: u64 = 63 * 512;
    const LEN: u64 = 10 * MIB + 3 * 512;
    let Some(mut group) = Group::new() else { return };
    let disk = group.add_device(VOLUME_BYTES);
    let partition = group.devices[0].partition(63, LEN / 512);
    let mut tracker = group.open_clean(&[&disk, &partition]);
    assert_eq!(tracker.volumes()[1].size_bytes, LEN);
    let target = tracker.devices()[1].read_target();
    assert_eq!((target.node, target.offset_bytes, target.size_bytes), (disk.clone(), START, LEN));

    RawDisk::open(&partition).write(512 * 9, 512 * 20, 1);
    let in_partition = touched(512 * 9, 512 * 20);
    assert_eq!(tracker.flip().expect("flipped"), [touched(START + 512 * 9, 512 * 20), in_partition]);
    // Through the disk: over the partition's first sector, its last one, and past it.
    let raw = RawDisk::open(&disk);
    raw.write(START - 512, 1024, 2);
    assert_eq!(tracker.flip().expect("flipped"), [touched(START - 512, 1024), blocks(0..1)]);
    raw.write(START + LEN - 512, 1024, 3);
    assert_eq!(tracker.flip().expect("flipped"), [touched(START + LEN - 512, 1024), touched(LEN - 512, 512)]);
    raw.write(START + LEN, 4096, 4);
    assert_eq!(tracker.flip().expect("flipped"), [touched(START + LEN, 4096), RoaringBitmap::new()]);
}

#[test]
fn a_successor_goes_on_with_what_was_drained_and_what_was_marked_since() {
    let Some(mut group) = Group::new() else { return };
    let node = group.add_device(VOLUME_BYTES);
    let disk = RawDisk::open(&node);
    let mut tracker = group.open_clean(&[&node]);
    assert_eq!(tracker.memo().expect("read"), b"");
    tracker.set_memo(b"the first").expect("kept");
    tracker.set_memo(&[7; 1024]).expect("kept");
    tracker.set_memo(&[7; 1025]).expect_err("too long");
    disk.write(4096, 4096, 1);
    assert_eq!(tracker.flip().expect("flipped"), [blocks(1..2)]);
    drop(tracker);
    disk.write(8192, 4096, 2);

    let mut tracker = group.open(&[&node]);
    assert_eq!(tracker.report().started_over, None);
    assert_eq!(tracker.memo().expect("read"), [7; 1024]);
    assert_eq!(tracker.take_recovered(), [blocks(1..2)]);
    assert_eq!(tracker.flip().expect("flipped"), [blocks(2..3)]);
    tracker.retain_unacked(&[blocks(2..3)]).expect("acked");
    drop(tracker);
    assert_eq!(group.open(&[&node]).take_recovered(), [blocks(2..3)]);
}

/// Opens again after `change` and expects that the whole volume is dirty, for a reason that has `words` in it.
fn starts_over(words: &str, change: impl FnOnce(&mut Group, &Path, &mut EbpfOptions)) {
    let Some(mut group) = Group::new() else { return };
    let node = group.add_device(VOLUME_BYTES);
    let mut tracker = group.open_clean(&[&node]);
    tracker.set_memo(b"of the old").expect("kept");
    let pins = tracker.pin_folder().to_owned();
    drop(tracker);
    let mut options = group.options(&[&node]);
    change(&mut group, &pins, &mut options);
    let mut tracker = EbpfTracker::open(&options).expect("tracked");
    let reason = tracker.report().started_over.expect("a reason");
    assert!(reason.contains(words), "{reason}");
    assert_eq!(tracker.take_recovered(), [blocks(0..VOLUME_BLOCKS)]);
    assert_eq!(std::fs::read_dir(group.pinned()).expect("listed").count(), 1, "the old pins are gone");
    drop(tracker);
    // And the new tracking is one that goes on.
    let mut tracker = EbpfTracker::open(&options).expect("tracked");
    assert_eq!(tracker.report().started_over, None);
    assert_eq!(tracker.take_recovered(), [blocks(0..VOLUME_BLOCKS)]);
}

#[test]
fn removed_pins_start_over() {
    starts_over("are gone", |_, pins, _| std::fs::remove_dir_all(pins).expect("removed"));
}

#[test]
fn one_missing_map_starts_over() {
    starts_over("dirty_1 is gone", |_, pins, _| std::fs::remove_file(pins.join("dirty_1")).expect("removed"));
}

#[test]
fn a_detached_link_starts_over() {
    starts_over("complete program is detached", |_, pins, _| {
        std::fs::remove_file(pins.join("complete_link")).expect("removed");
    });
}

#[test]
fn a_new_boot_id_starts_over() {
    starts_over("started anew", |group, _, options| {
        options.boot_id_path = group.folder.path().join("boot_id");
        std::fs::write(&options.boot_id_path, "00000000-0000-0000-0000-000000000000\n").expect("written");
    });
}

#[test]
fn a_lost_state_folder_starts_over() {
    starts_over("no earlier tracking", |group, _, _| {
        std::fs::remove_dir_all(group.folder.path().join("state")).expect("removed");
    });
}

#[test]
fn a_damaged_record_starts_over() {
    starts_over("cannot be read", |group, _, _| {
        let name = format!("state/tracker-{}.json", group.id);
        std::fs::write(group.folder.path().join(name), "{").expect("written");
    });
}

#[test]
fn the_device_attached_to_another_file_starts_over() {
    starts_over("another device", |group, _, _| {
        let file = group.folder.path().join("other");
        std::fs::File::create_new(&file).and_then(|file| file.set_len(VOLUME_BYTES)).expect("a file");
        group.devices[0].attach_again(&file);
    });
}

#[test]
fn a_volume_that_joins_is_dirty_and_the_others_go_on() {
    let Some(mut group) = Group::new() else { return };
    let (first, second) = (group.add_device(VOLUME_BYTES), group.add_device(8 * MIB));
    let mut tracker = group.open_clean(&[&first]);
    tracker.set_memo(b"head").expect("kept");
    let disk = RawDisk::open(&first);
    disk.write(0, 4096, 1);
    tracker.flip().expect("flipped");
    disk.write(40960, 4096, 2);
    drop(tracker);

    let mut tracker = group.open(&[&first, &second]);
    let report = tracker.report();
    assert_eq!(report.started_over, None, "nothing was interrupted");
    assert_eq!(report.first_copy.as_deref(), Some("volume 1 was not tracked before"));
    assert_eq!(tracker.take_recovered(), [blocks(0..1) | blocks(10..11), blocks(0..2048)]);
    assert_eq!(tracker.memo().expect("read"), b"head");
    disk.write(8192, 4096, 3);
    RawDisk::open(&second).write(4096, 4096, 4);
    assert_eq!(tracker.flip().expect("flipped"), [blocks(2..3), blocks(1..2)]);
    assert_eq!(std::fs::read_dir(group.pinned()).expect("listed").count(), 1, "the old tracking is gone");
    drop(tracker);

    // Left alone again, with nothing forgotten.
    let mut tracker = group.open(&[&first]);
    assert_eq!(tracker.report().started_over, None);
    assert_eq!(tracker.take_recovered(), [blocks(0..1) | blocks(2..3) | blocks(10..11)]);
}

#[test]
fn a_write_after_the_flip_conflicts_until_the_next() {
    let Some(mut group) = Group::new() else { return };
    let node = group.add_device(VOLUME_BYTES);
    let disk = RawDisk::open(&node);
    let mut tracker = group.open_clean(&[&node]);
    disk.write(5 * 4096, 4096, 1);
    tracker.flip().expect("flipped");
    assert!(!tracker.is_conflicted(0, Block(5)), "written before the flip");
    disk.write(6 * 4096 - 512, 1024, 2);
    assert!(tracker.is_conflicted(0, Block(5)) && tracker.is_conflicted(0, Block(6)));
    assert!(!tracker.is_conflicted(0, Block(4)) && !tracker.is_conflicted(0, Block(7)));
    assert!(tracker.settle().expect("settled"));
    tracker.flip().expect("flipped");
    assert!(!tracker.is_conflicted(0, Block(5)) && !tracker.is_conflicted(0, Block(6)));
}

/// A write and the flips around it: it must be in a set after `after`, up to `until`.
struct Written {
    block: u32,
    after: usize,
    until: usize,
}

#[test]
fn every_write_that_completes_among_many_flips_is_in_the_right_one() {
    const FLIPS: usize = 400;
    const WRITES: usize = 2000;
    let Some(mut group) = Group::new() else { return };
    let node = group.add_device(VOLUME_BYTES);
    let mut tracker = group.open_clean(&[&node]);
    let (begun, ended, completed) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let stop = AtomicBool::new(false);
    let mut sets = vec![RoaringBitmap::new()];
    let written = std::thread::scope(|scope| {
        let (begun, ended, completed, stop) = (&begun, &ended, &completed, &stop);
        let node = &node;
        let write = move |seed: u64| {
            let (disk, random, mut written) = (RawDisk::open(node), SimRandom::new(seed), Vec::new());
            while !stop.load(Ordering::SeqCst) {
                let block = random.below(u64::from(VOLUME_BLOCKS)) as u32;
                let after = ended.load(Ordering::SeqCst);
                disk.write(u64::from(block) * 4096, 4096, seed as u8);
                written.push(Written { block, after, until: begun.load(Ordering::SeqCst) + 1 });
                completed.fetch_add(1, Ordering::SeqCst);
            }
            written
        };
        let writers: Vec<_> = (0..4).map(|seed| scope.spawn(move || write(seed))).collect();
        while sets.len() <= FLIPS || completed.load(Ordering::SeqCst) < WRITES {
            begun.fetch_add(1, Ordering::SeqCst);
            let set = tracker.flip();
            // Stopped before anything that may panic, or the scope would wait for ever.
            if set.is_err() {
                stop.store(true, Ordering::SeqCst);
            }
            sets.push(set.expect("flipped").remove(0));
            ended.fetch_add(1, Ordering::SeqCst);
        }
        stop.store(true, Ordering::SeqCst);
        writers.into_iter().flat_map(|writer| writer.join().expect("ended")).collect::<Vec<_>>()
    });
    sets.push(tracker.flip().expect("flipped").remove(0));
    for write in &written {
        let found = sets[write.after + 1..=write.until].iter().any(|set| set.contains(write.block));
        assert!(found, "block {} after flip {} until {}", write.block, write.after, write.until);
    }
    let (report, counts) = (tracker.report(), tracker.counts().expect("counts"));
    eprintln!(
        "{} writes, {} flips, {} lost completions, {counts:?}",
        written.len(),
        sets.len(),
        tracker.completions_lost()
    );
    assert_eq!((report.issued, counts.lost), (counts.issued, 0));
}

#[test]
fn a_group_has_one_tracker_and_its_pins_stay_while_it_runs() {
    let Some(mut group) = Group::new() else { return };
    let node = group.add_device(VOLUME_BYTES);
    let tracker = group.open(&[&node]);
    let refused = EbpfTracker::open(&group.options(&[&node])).err().expect("refused").to_string();
    assert!(refused.contains("another process tracks this group"), "{refused}");
    let state = group.folder.path().join("state");
    remove(Path::new(BPFFS), &state, &SystemStorage, group.id).expect_err("refused");
    drop(tracker);
    group.open(&[&node]);
}

#[test]
fn a_device_that_grows_shrinks_or_vanishes_is_noticed_at_the_flip() {
    let Some(mut group) = Group::new() else { return };
    let node = group.add_device(VOLUME_BYTES);
    for (bytes, words) in [(VOLUME_BYTES + MIB, "grew"), (VOLUME_BYTES - MIB, "shrank")] {
        group.devices[0].resize(VOLUME_BYTES);
        let mut tracker = group.open_clean(&[&node]);
        group.devices[0].resize(bytes);
        expect_changed(&mut tracker, &[words]);
        drop(tracker);
        let mut tracker = group.open(&[&node]);
        assert!(tracker.report().started_over.is_some_and(|reason| reason.contains("sectors")));
        assert_eq!(tracker.take_recovered(), [blocks(0..(bytes / 4096) as u32)]);
    }
    let mut tracker = group.open_clean(&[&node]);
    group.devices[0].detach();
    expect_changed(&mut tracker, &["shrank", "another device", "vanished"]);
    drop(tracker);
    let refused = EbpfTracker::open(&group.options(&[&node])).err().expect("refused").to_string();
    assert!(refused.contains("has no size"), "{refused}");
}

fn expect_changed(tracker: &mut EbpfTracker, words: &[&str]) {
    match tracker.flip() {
        Err(TrackerError::VolumeChanged { slot: VolumeSlot(0), reason }) => {
            assert!(words.iter().any(|words| reason.contains(words)), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_tebibyte_takes_at_most_160_mib_of_the_kernel() {
    let Some(mut group) = Group::new() else { return };
    let node = group.add_device(1 << 40);
    let mut tracker = group.open(&[&node]);
    RawDisk::open(&node).write((1 << 40) - 4096, 4096, 1);
    assert_eq!(tracker.flip().expect("flipped"), [blocks((1 << 28) - 1..1 << 28)]);
    let bytes: u64 = std::fs::read_dir(tracker.pin_folder())
        .expect("listed")
        .filter_map(|entry| loop_device::map_bytes(&entry.expect("listed").path()))
        .sum();
    assert!((96 * MIB..=160 * MIB).contains(&bytes), "{bytes}");
}
