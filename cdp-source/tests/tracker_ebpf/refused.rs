//! What the kernel or a disk refuses the tracker: a program, memory, a place to remember a write, a discard; and writes that do
//! not say where they go.

use crate::loop_device::{self, LoopDevice, RawDisk, ZramDevice};
use crate::{Group, MIB, VOLUME_BLOCKS, VOLUME_BYTES, blocks, touched};
use aya::maps::{Array, HashMap, Map, MapData};
use cdp_source::tracker::ebpf::{EbpfOptions, EbpfTracker};
use cdp_source::tracker::memory::kernel_memory_bytes;
use cdp_source::tracker::{Tracker, TrackerError};
use roaring::RoaringBitmap;
use rustix::fs::{MemfdFlags, SealFlags};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Names of what is pinned for a group: trackings.
fn pinned(group: &Group) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(group.pinned()).expect("listed");
    entries.map(|entry| entry.expect("an entry").path()).collect()
}

fn refused(options: &EbpfOptions) -> String {
    let error = EbpfTracker::open(options).err().expect("refused");
    assert!(matches!(error, TrackerError::Unsupported { .. }), "{error:?}");
    error.to_string()
}

/// A memory control group of its own, for one thread.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    /// `None` where this machine has no such groups with a limit for each (cgroup v1); it is said.
    fn new(limit_bytes: u64) -> Option<Self> {
        let folder = PathBuf::from(format!("/sys/fs/cgroup/memory/cdp-test-{}", std::process::id()));
        if std::fs::create_dir(&folder).is_err() || std::fs::write(folder.join("tasks"), "").is_err() {
            eprintln!("skipped: no control groups for memory (cgroup v1)");
            drop(Self(folder));
            return None;
        }
        let group = Self(folder);
        std::fs::write(group.0.join("memory.limit_in_bytes"), limit_bytes.to_string()).expect("limited");
        Some(group)
    }

    /// Runs `work` with this thread in the group.
    fn within<T>(&self, work: impl FnOnce() -> T) -> T {
        let thread = rustix::thread::gettid().as_raw_nonzero().to_string();
        let join = |folder: &Path| std::fs::write(folder.join("tasks"), &thread).expect("joined");
        join(&self.0);
        let done = work();
        join(self.0.parent().expect("a folder above"));
        done
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        drop(std::fs::remove_dir(&self.0));
    }
}

#[test]
fn where_the_kernel_has_no_memory_the_error_says_how_much_was_wanted_and_nothing_stays_pinned() {
    const TIB: u64 = 1 << 40;
    let Some(mut group) = Group::new() else { return };
    let Some(limited) = MemoryGroup::new(48 * MIB) else { return };
    let node = group.add_device(TIB);
    let options = group.options(&[&node]);
    let refused = limited.within(|| refused(&options));
    let wanted = format!("{} MiB", kernel_memory_bytes(&[TIB]).div_ceil(MIB));
    assert!(refused.contains("Cannot allocate memory") && refused.contains(&wanted), "{refused}");
    assert!(refused.contains("make the tracker's map") && refused.contains("`scan` tracker"), "{refused}");
    assert!(pinned(&group).is_empty(), "{:?}", pinned(&group));
    // Nothing of it is in the way once there is room.
    assert!(group.open(&[&node]).report().started_over.is_some());
}

/// Lines logged at ERROR while `work` runs in this thread.
fn errors_logged(work: impl FnOnce()) -> String {
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no holder panics").extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Log::default();
    let sink = log.clone();
    let subscriber = tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::ERROR);
    tracing::subscriber::with_default(subscriber.with_writer(move || sink.clone()).finish(), work);
    let bytes = log.0.lock().expect("no holder panics").clone();
    String::from_utf8(bytes).expect("text")
}

/// Passthrough writes cannot be sent to a loop device; so what the program counts them in is raised by hand.
#[test]
fn passthrough_writes_make_everything_dirty_and_are_told() {
    let Some(mut group) = Group::new() else { return };
    let node = group.add_device(VOLUME_BYTES);
    let mut tracker = group.open_clean(&[&node]);
    let gates = MapData::from_pin(tracker.pin_folder().join("gates")).expect("pinned");
    let mut gates: Array<_, [u64; 8]> = Map::Array(gates).try_into().expect("an array");
    let mut raise = |count: u64| {
        let mut gate = gates.get(&0, 0).expect("read");
        gate[4] += count;
        gates.set(0, gate, 0).expect("set");
    };
    raise(3);
    let logged = errors_logged(|| assert_eq!(tracker.flip().expect("flipped"), [blocks(0..VOLUME_BLOCKS)]));
    assert!(logged.contains("ERROR") && logged.contains("passthrough"), "{logged}");
    let trust = tracker.report().trust;
    assert_eq!((trust.blind_writes, trust.rescans, trust.recaptured_blocks), (3, 1, u64::from(VOLUME_BLOCKS)));
    assert!(trust.rescanned.is_some_and(|reason| reason.contains("passthrough writes")));
    // A disk that gets them all the time is not read all the time; they are counted.
    raise(1);
    assert_eq!(tracker.flip().expect("flipped"), [RoaringBitmap::new()]);
    let trust = tracker.report().trust;
    assert_eq!((trust.blind_writes, trust.rescans), (4, 1));
}

/// The table is filled with ranges of bios that never end.
#[test]
fn a_write_that_cannot_be_remembered_puts_the_tracking_in_doubt_and_is_not_lost() {
    if !ZramDevice::is_supported() {
        eprintln!("skipped: no zram here");
        return;
    }
    let Some(group) = Group::new() else { return };
    let device = ZramDevice::new(VOLUME_BYTES);
    let mut tracker = group.open_clean(&[device.node()]);
    let disk = RawDisk::open(device.node());
    let ranges = MapData::from_pin(tracker.pin_folder().join("ranges")).expect("pinned");
    let mut ranges: HashMap<_, u64, [u64; 3]> = Map::HashMap(ranges).try_into().expect("a table");
    let filled: Vec<u64> = (1..=1 << 20).take_while(|bio| ranges.insert(bio, [0; 3], 0).is_ok()).collect();
    assert_eq!(filled.len(), 16 * 1024);
    disk.write(40960, 4096, 1);
    let doubted = tracker.flip();
    let trust = tracker.report().trust;
    assert_eq!((trust.unremembered, trust.unknown), (1, 1), "{trust:?}");
    for bio in &filled {
        ranges.remove(bio).expect("removed");
    }
    // It ends at the first quiet flip, which may be the one at which it is noticed.
    let mut found = RoaringBitmap::new();
    for flip in std::iter::once(doubted).chain((0..5).map(|_| tracker.flip())) {
        match flip {
            Ok(flipped) => found |= &flipped[0],
            Err(TrackerError::InDoubt(reason)) => assert!(reason.contains("writes"), "{reason}"),
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(found, blocks(0..VOLUME_BLOCKS), "a completion without a range may have been anywhere");
    let trust = tracker.report().trust;
    assert_eq!((trust.doubt, trust.rescans), (None, 1));
    disk.write(4096, 4096, 2);
    assert_eq!(tracker.flip().expect("flipped"), [blocks(1..2)], "trusted again");
}

/// A file in memory that is sealed refuses to have holes punched, as a file system without them does.
#[test]
fn a_discard_that_fails_makes_no_holes() {
    let Some(group) = Group::new() else { return };
    let file = rustix::fs::memfd_create("cdp-disk", MemfdFlags::ALLOW_SEALING).expect("a file in memory");
    rustix::fs::ftruncate(&file, VOLUME_BYTES).expect("sized");
    let device = LoopDevice::attach(Path::new(&format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())));
    let mut tracker = group.open_clean(&[device.node()]);
    let node = device.node().to_string_lossy().into_owned();
    let discard = || std::process::Command::new("blkdiscard").args(["-o", "1048576", "-l", "1048576", &node]).output();
    RawDisk::open(device.node()).write(0, 4 * MIB, 7);
    assert!(discard().expect("started").status.success());
    assert_eq!(tracker.holes(0, &touched(0, 4 * MIB)), touched(MIB, MIB), "this one does not fail");
    RawDisk::open(device.node()).write(0, 4 * MIB, 7);
    tracker.flip().expect("flipped");

    rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE).expect("sealed");
    let output = discard().expect("started");
    assert!(!output.status.success(), "{output:?}");
    assert_eq!(tracker.flip().expect("flipped"), [touched(MIB, MIB)]);
    assert_eq!(tracker.holes(0, &touched(0, VOLUME_BYTES)), RoaringBitmap::new());
    // What it left is read: nobody knows how far it came.
    drop(loop_device::run("dd", &[&format!("if={node}"), "of=/dev/null", "bs=1M", "count=4", "status=none"]));
}

#[cfg(feature = "sabotage")]
#[test]
fn a_program_that_the_kernel_refuses_is_named_and_leaves_the_tracking_that_is_there_alone() {
    use cdp_source::tracker::ebpf::Sabotage;

    let Some(mut group) = Group::new() else { return };
    let node = group.add_device(VOLUME_BYTES);
    let wrong = EbpfOptions { sabotage: Some(Sabotage::RefusedProgram), ..group.options(&[&node]) };
    let refused_at_first = refused(&wrong);
    assert!(refused_at_first.contains("`bio_complete`: the kernel refuses it"), "{refused_at_first}");
    assert!(refused_at_first.contains("invalid mem access"), "the verifier's reason: {refused_at_first}");
    assert!(refused_at_first.contains("`scan` tracker") && refused_at_first.len() < 400, "{refused_at_first}");
    assert!(pinned(&group).is_empty(), "three programs had been attached: {:?}", pinned(&group));

    let tracker = group.open_clean(&[&node]);
    let kept = tracker.pin_folder().to_owned();
    drop(tracker);
    assert_eq!(refused(&wrong), refused_at_first);
    assert_eq!(pinned(&group), std::slice::from_ref(&kept));
    RawDisk::open(&node).write(8192, 4096, 1);
    let mut tracker = group.open(&[&node]);
    assert_eq!((tracker.report().started_over, tracker.pin_folder()), (None, kept.as_path()));
    assert_eq!(tracker.take_recovered(), [RoaringBitmap::new()]);
    assert_eq!(tracker.flip().expect("flipped"), [blocks(2..3)]);
}
