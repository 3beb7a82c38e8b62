//! The scan tracker: finds changed blocks by comparing digests of the whole volume.
//!
//! For image files, for kernels without BTF, for whoever has no rights for more. A flip reads every block and compares it with
//! its digest, 16 bytes of BLAKE3 under a key of this process; `settle` reads every block once more and holds only if
//! nothing has changed since. So an idle volume costs one read of itself a cut, one that changes now and then two, and one
//! that is never quiet gets no point. Opening takes the first digests, a read as well.
//! Memory: 16 bytes a block, 4 MiB a GiB.
//!
//! Invariant: a digest is replaced only together with a mark in `found`, and `found` is given away only by a flip that
//! succeeds: a pass that fails half way loses nothing. What it cannot see: a block that changed and changed back between the
//! two passes (A, B, A), which the cut may have read as B. Nothing is kept on disk but the memo: after a restart every block
//! is dirty.

use super::{TrackedVolume, Tracker, TrackerError, TrackerReport};
use crate::reader::{self, BlockReader, READ_BLOCKS_MAX, ReadRequest, ReadTarget};
use cdp_protocol::seal::{DIGEST_BYTES, Digest};
use cdp_protocol::units::{Block, Extent, VolumeSlot, blocks_in};
use cdp_seams::random::{Random, array};
use cdp_seams::storage::{self, Storage};
use roaring::RoaringBitmap;
use rustix::fs::{Mode, OFlags, SeekFrom};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The memo's file in the state folder.
const MEMO_FILE: &str = "scan.memo";
/// Bytes of a memo.
const MEMO_BYTES_MAX: usize = 1024;
/// Requests given to the reader at once: 128 MiB of a volume.
const BATCH: usize = 1024;
/// Stands for a block that could not be read. A digest is equal to it once in 2^128.
const UNREADABLE: Digest = [0xff; DIGEST_BYTES];

/// Compares whole volumes.
pub struct ScanTracker {
    volumes: Vec<TrackedVolume>,
    nodes: Vec<Node>,
    scan: Scan,
    /// Given once, by `take_recovered`.
    recovered: Vec<RoaringBitmap>,
    storage: Arc<dyn Storage>,
    memo: PathBuf,
}

/// What is compared, with what, and what came out.
struct Scan {
    reader: Box<dyn BlockReader>,
    key: [u8; 32],
    /// Of each volume, by block.
    digests: Vec<Vec<Digest>>,
    /// Changed, and not yet given by a flip.
    found: Vec<RoaringBitmap>,
}

/// A node as it was when it was opened.
struct Node {
    path: PathBuf,
    fact: NodeFact,
}

/// What must stay as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NodeFact {
    file_system: u64,
    inode: u64,
    device: u64,
    len_bytes: u64,
}

impl ScanTracker {
    /// Watches `targets`, read by `reader` in that order. `folder` is the group's state folder, which exists. Every block is
    /// recovered; what changes from here on comes with the flips, also while the recovered ones are sent in parts.
    ///
    /// # Errors
    /// Where a node cannot be looked at or read.
    pub fn open(
        targets: &[(VolumeSlot, ReadTarget)],
        reader: Box<dyn BlockReader>,
        storage: Arc<dyn Storage>,
        folder: &Path,
        random: &dyn Random,
    ) -> Result<Self, TrackerError> {
        let mut volumes = Vec::new();
        let mut nodes = Vec::new();
        let mut digests = Vec::new();
        let mut everything = Vec::new();
        for (slot, target) in targets {
            let fact = NodeFact::of(&target.node).map_err(|error| io_error("look at", &target.node, error))?;
            nodes.push(Node { path: target.node.clone(), fact });
            volumes.push(TrackedVolume { slot: *slot, size_bytes: target.size_bytes });
            let blocks = blocks_in(target.size_bytes);
            digests.push(vec![Digest::default(); blocks as usize]);
            everything.push(all(blocks));
        }
        let nothing = vec![RoaringBitmap::new(); volumes.len()];
        let scan = Scan { reader, key: array(random), digests, found: nothing.clone() };
        let memo = folder.join(MEMO_FILE);
        let mut tracker = Self { volumes, nodes, scan, recovered: everything, storage, memo };
        tracker.pass()?;
        // These are all recovered anyway.
        tracker.scan.found = nothing;
        Ok(tracker)
    }

    /// Whether every node is what it was.
    fn check(&self) -> Result<(), TrackerError> {
        for (volume, node) in self.volumes.iter().zip(&self.nodes) {
            let changed = |reason| TrackerError::VolumeChanged { slot: volume.slot, reason };
            let name = node.path.display();
            match NodeFact::of(&node.path) {
                Ok(fact) if fact == node.fact => {}
                Ok(fact) if fact.len_bytes != node.fact.len_bytes => {
                    let (was, is) = (node.fact.len_bytes, fact.len_bytes);
                    return Err(changed(format!("{name} had {was} bytes and has {is}")));
                }
                Ok(_) => return Err(changed(format!("{name} is another file or device"))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(changed(format!("{name} is gone")));
                }
                Err(error) => return Err(io_error("look at", &node.path, error)),
            }
        }
        Ok(())
    }

    /// One pass over all volumes, before and after which the nodes are what they were.
    fn pass(&mut self) -> Result<(), TrackerError> {
        self.check()?;
        let scanned = (0..self.nodes.len()).try_for_each(|volume| {
            self.scan.pass(volume).map_err(|error| io_error("scan", &self.nodes[volume].path, error))
        });
        // A node that changed explains whatever went wrong with reading it.
        self.check()?;
        scanned
    }
}

impl Scan {
    /// Compares a volume with its digests; what differs goes to `found` together with its new digest.
    fn pass(&mut self, volume: usize) -> io::Result<()> {
        let blocks = self.digests[volume].len() as u64;
        let mut starts = (0..blocks).step_by(READ_BLOCKS_MAX as usize).peekable();
        while starts.peek().is_some() {
            let requests: Vec<ReadRequest> = starts
                .by_ref()
                .take(BATCH)
                .map(|start| {
                    let count = (blocks - start).min(u64::from(READ_BLOCKS_MAX)) as u32;
                    ReadRequest { volume, extent: Extent { start: Block(start as u32), count } }
                })
                .collect();
            self.compare(&requests)?;
        }
        Ok(())
    }

    fn compare(&mut self, requests: &[ReadRequest]) -> io::Result<()> {
        let Self { reader, key, digests, found } = self;
        let mut failure = None;
        reader::read_blocks(reader.as_mut(), requests, &mut |volume, block, result| {
            let digest = match result {
                Ok(bytes) => digest(key, bytes),
                Err(error) if reader::is_medium_error(&error) => UNREADABLE,
                Err(error) => {
                    failure = Some(error);
                    return;
                }
            };
            let known = &mut digests[volume][block.0 as usize];
            if *known != digest {
                *known = digest;
                found[volume].insert(block.0);
            }
        })?;
        failure.map_or(Ok(()), Err)
    }
}

impl Tracker for ScanTracker {
    fn volumes(&self) -> &[TrackedVolume] {
        &self.volumes
    }

    fn take_recovered(&mut self) -> Vec<RoaringBitmap> {
        let nothing = vec![RoaringBitmap::new(); self.volumes.len()];
        std::mem::replace(&mut self.recovered, nothing)
    }

    fn flip(&mut self) -> Result<Vec<RoaringBitmap>, TrackerError> {
        self.pass()?;
        Ok(self.scan.found.iter_mut().map(std::mem::take).collect())
    }

    fn is_conflicted(&self, _volume: usize, _block: Block) -> bool {
        false
    }

    fn sees_conflicts(&self) -> bool {
        false
    }

    fn settle(&mut self) -> Result<bool, TrackerError> {
        self.pass()?;
        Ok(self.scan.found.iter().all(RoaringBitmap::is_empty))
    }

    fn retain_unacked(&mut self, _union: &[RoaringBitmap]) -> Result<(), TrackerError> {
        // Nothing outlives this process, and the next one starts with everything.
        Ok(())
    }

    fn memo(&self) -> Result<Vec<u8>, TrackerError> {
        match storage::read_all(self.storage.as_ref(), &self.memo, MEMO_BYTES_MAX as u64) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            other => other.map_err(|error| io_error("read", &self.memo, error)),
        }
    }

    fn set_memo(&mut self, memo: &[u8]) -> Result<(), TrackerError> {
        assert!(memo.len() <= MEMO_BYTES_MAX, "a memo is a few bytes");
        storage::replace(self.storage.as_ref(), &self.memo, memo).map_err(|error| io_error("write", &self.memo, error))
    }

    fn report(&self) -> TrackerReport {
        let started_over = Some("the scan tracker keeps nothing over a restart".to_owned());
        TrackerReport { kind: "scan", started_over, ..TrackerReport::default() }
    }
}

impl NodeFact {
    fn of(path: &Path) -> io::Result<Self> {
        let node = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?;
        let stat = rustix::fs::fstat(&node)?;
        let len_bytes = rustix::fs::seek(&node, SeekFrom::End(0))?;
        Ok(Self { file_system: stat.st_dev, inode: stat.st_ino, device: stat.st_rdev, len_bytes })
    }
}

fn digest(key: &[u8; 32], block: &[u8]) -> Digest {
    *blake3::keyed_hash(key, block).as_bytes().first_chunk().expect("a hash has 32 bytes")
}

fn all(blocks: u64) -> RoaringBitmap {
    let mut set = RoaringBitmap::new();
    if let Some(last) = blocks.checked_sub(1) {
        set.insert_range(0..=last as u32);
    }
    set
}

fn io_error(verb: &str, path: &Path, source: io::Error) -> TrackerError {
    TrackerError::Io { step: format!("{verb} {}", path.display()), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::BlockContent;
    use crate::cut::{Cut, CutLimits, cut};
    use crate::reader::pread::PreadReader;
    use crate::sim::{Driver, Instant, Profile, Sabotage, SimReader, World};
    use cdp_protocol::units::BLOCK_BYTES;
    use cdp_seams::clock::SystemClock;
    use cdp_seams::random::SystemRandom;
    use cdp_seams::storage::SystemStorage;
    use std::os::unix::fs::FileExt;
    use std::time::Duration;

    const BLOCKS: u32 = 50;
    const LIMITS: CutLimits = CutLimits { bound: Duration::from_secs(5), blocks_max: 1000 };

    struct Bench {
        folder: tempfile::TempDir,
        file: tempfile::NamedTempFile,
        targets: Vec<(VolumeSlot, ReadTarget)>,
    }

    impl Bench {
        fn new() -> Self {
            let file = tempfile::NamedTempFile::new().expect("a file");
            let size_bytes = u64::from(BLOCKS) * BLOCK_BYTES as u64 - 512;
            file.as_file().set_len(size_bytes).expect("sized");
            let target = ReadTarget { node: file.path().to_owned(), offset_bytes: 0, size_bytes };
            let targets = vec![(VolumeSlot(2), target)];
            Self { folder: tempfile::tempdir().expect("a folder"), file, targets }
        }

        fn reader(&self) -> Box<dyn BlockReader> {
            Box::new(PreadReader::open(&[self.targets[0].1.clone()]).expect("opened"))
        }

        fn tracker_over(&self, reader: Box<dyn BlockReader>) -> ScanTracker {
            ScanTracker::open(&self.targets, reader, Arc::new(SystemStorage), self.folder.path(), &SystemRandom)
                .expect("opened")
        }

        fn tracker(&self) -> ScanTracker {
            self.tracker_over(self.reader())
        }

        fn write(&self, block: u32, fill: u8) {
            let at = u64::from(block) * BLOCK_BYTES as u64;
            self.file.as_file().write_all_at(&[fill; 100], at).expect("written");
        }

        fn cut(&self, tracker: &mut ScanTracker, carry: &mut Vec<RoaringBitmap>) -> Cut {
            cut(tracker, self.reader().as_mut(), &SystemClock::new(), carry, &LIMITS).expect("a cut")
        }
    }

    fn blocks(found: &[RoaringBitmap]) -> Vec<u32> {
        found[0].iter().collect()
    }

    #[test]
    fn everything_is_recovered_and_a_flip_gives_what_changed_since() {
        let bench = Bench::new();
        let mut tracker = bench.tracker();
        assert_eq!(tracker.take_recovered()[0].len(), u64::from(BLOCKS));
        assert!(tracker.take_recovered()[0].is_empty());
        assert!(blocks(&tracker.flip().expect("flips")).is_empty());
        bench.write(7, 1);
        bench.write(BLOCKS - 1, 1);
        assert_eq!(blocks(&tracker.flip().expect("flips")), [7, BLOCKS - 1]);
        assert!(tracker.settle().expect("settles"));
    }

    #[test]
    fn what_changes_after_the_flip_does_not_settle_and_comes_with_the_next() {
        let bench = Bench::new();
        let mut tracker = bench.tracker();
        tracker.flip().expect("flips");
        bench.write(3, 9);
        assert!(!tracker.settle().expect("settles"));
        assert!(!tracker.settle().expect("settles"), "it stays found until a flip gives it");
        assert_eq!(blocks(&tracker.flip().expect("flips")), [3]);
        assert!(tracker.settle().expect("settles"));
    }

    #[test]
    fn cuts_hold_what_the_file_held() {
        let bench = Bench::new();
        let mut tracker = bench.tracker();
        let mut carry = tracker.take_recovered();
        bench.write(5, 5);
        let Cut::Captured(first) = bench.cut(&mut tracker, &mut carry) else { panic!("not captured") };
        assert_eq!((first.meters.dirty_blocks, first.meters.hole_blocks), (u64::from(BLOCKS), u64::from(BLOCKS) - 1));
        assert!(matches!(bench.cut(&mut tracker, &mut carry), Cut::Unchanged { .. }));
        bench.write(6, 6);
        let Cut::Captured(second) = bench.cut(&mut tracker, &mut carry) else { panic!("not captured") };
        let held: Vec<_> = second.volumes[0].iter().collect();
        assert!(matches!(held[..], [(Block(6), BlockContent::Bytes([6, ..]))]), "{held:?}");
    }

    #[test]
    fn a_pass_that_fails_half_way_loses_no_change() {
        struct Failing(Box<dyn BlockReader>, u32);
        impl BlockReader for Failing {
            fn read(&mut self, requests: &[ReadRequest], done: &mut reader::ReadDone<'_>) -> io::Result<()> {
                self.1 += 1;
                // Passes: at open, at the first flip, at the one that fails.
                let fails = self.1 == 3;
                self.0.read(requests, &mut |index, result| {
                    let broken = fails && requests[index].extent.start.0 > 0;
                    done(index, if broken { Err(io::ErrorKind::OutOfMemory.into()) } else { result });
                })?;
                if fails { Err(io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
            }
        }
        let bench = Bench::new();
        let mut tracker = bench.tracker_over(Box::new(Failing(bench.reader(), 0)));
        tracker.flip().expect("flips");
        bench.write(1, 1);
        bench.write(40, 1);
        assert!(matches!(tracker.flip(), Err(TrackerError::Io { .. })));
        assert_eq!(blocks(&tracker.flip().expect("flips")), [1, 40]);
    }

    #[test]
    fn a_file_that_grew_shrank_vanished_or_was_replaced_is_named() {
        let reason_after = |change: &dyn Fn(&Bench)| {
            let bench = Bench::new();
            let mut tracker = bench.tracker();
            tracker.flip().expect("flips");
            change(&bench);
            match tracker.flip() {
                Err(TrackerError::VolumeChanged { slot: VolumeSlot(2), reason }) => reason,
                other => panic!("{other:?}"),
            }
        };
        assert!(
            reason_after(&|bench| bench.file.as_file().set_len(1 << 20).expect("grown")).contains("and has 1048576")
        );
        assert!(reason_after(&|bench| bench.file.as_file().set_len(4096).expect("shrunk")).contains("and has 4096"));
        let path = |bench: &Bench| bench.file.path().to_owned();
        assert!(reason_after(&|bench| SystemStorage.remove(&path(bench)).expect("removed")).contains("is gone"));
        let replaced = reason_after(&|bench| {
            let len = bench.targets[0].1.size_bytes;
            storage::replace(&SystemStorage, &path(bench), &vec![0; len as usize]).expect("replaced");
        });
        assert!(replaced.contains("another file"), "{replaced}");
    }

    /// The scan tracker over a simulated volume; notes what a power cut right before and right after a flip could have
    /// left. (A flip takes as long as its pass: unchanged means up to its beginning, captured is a state of its end.)
    struct Probe(ScanTracker, Arc<World>, [Instant; 2]);

    impl Tracker for Probe {
        fn volumes(&self) -> &[TrackedVolume] {
            self.0.volumes()
        }
        fn take_recovered(&mut self) -> Vec<RoaringBitmap> {
            self.0.take_recovered()
        }
        fn flip(&mut self) -> Result<Vec<RoaringBitmap>, TrackerError> {
            let before = self.1.instant();
            let flipped = self.0.flip();
            self.2 = [before, self.1.instant()];
            flipped
        }
        fn is_conflicted(&self, volume: usize, block: Block) -> bool {
            self.0.is_conflicted(volume, block)
        }
        fn settle(&mut self) -> Result<bool, TrackerError> {
            self.0.settle()
        }
        fn retain_unacked(&mut self, union: &[RoaringBitmap]) -> Result<(), TrackerError> {
            self.0.retain_unacked(union)
        }
        fn memo(&self) -> Result<Vec<u8>, TrackerError> {
            self.0.memo()
        }
        fn set_memo(&mut self, memo: &[u8]) -> Result<(), TrackerError> {
            self.0.set_memo(memo)
        }
        fn report(&self) -> TrackerReport {
            self.0.report()
        }
    }

    #[test]
    fn points_by_scanning_are_states_too() {
        let (mut captured, mut refused) = (0, 0);
        for seed in 0..30 {
            // Writers slow enough to leave the volume alone now and then.
            let profile = Profile { sectors: vec![400], issue_permille: 30, ..Profile::default() };
            let bench = Bench::new();
            let mut driver = Driver::new(seed, profile, Sabotage::None);
            let world = Arc::clone(&driver.world);
            let mut targets = bench.targets.clone();
            targets[0].1.size_bytes = world.size_bytes(0);
            let mut reader = SimReader::new(&world);
            reader.step_permille = 60;
            let folder = bench.folder.path();
            let scan = ScanTracker::open(&targets, Box::new(reader), Arc::new(SystemStorage), folder, &SystemRandom);
            let mut tracker = Probe(scan.expect("opened"), Arc::clone(&world), [world.instant(), world.instant()]);
            driver.reader.step_permille = 60;
            driver.carry = tracker.take_recovered();
            for round in 0..40 {
                // The first copy goes in parts, a few blocks each; at last the writers stop.
                world.set_quiet(round >= 30);
                world.run(if round >= 30 { 2000 } else { 200 });
                let limits = CutLimits { bound: Duration::from_millis(2), blocks_max: 35 };
                match cut(&mut tracker, &mut driver.reader, world.clock.as_ref(), &mut driver.carry, &limits) {
                    Ok(Cut::Captured(capture)) => {
                        driver.apply(&capture);
                        tracker.2[1].explain(&driver.image).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
                        captured += 1;
                    }
                    Ok(Cut::Unchanged { .. }) => tracker.2[0].explain(&driver.image).expect("unchanged"),
                    Ok(Cut::NotValidated) => refused += 1,
                    Ok(Cut::TooLarge) => driver.part(limits.blocks_max).expect("a part"),
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(driver.image, world.media(), "seed {seed}");
        }
        println!("captured {captured}, refused {refused}");
        assert!(captured > 100 && refused > 20, "captured {captured} refused {refused}");
    }

    #[test]
    fn the_memo_outlives_the_tracker() {
        let bench = Bench::new();
        let mut tracker = bench.tracker();
        assert!(tracker.memo().expect("read").is_empty());
        tracker.set_memo(b"head 7").expect("kept");
        drop(tracker);
        assert_eq!(bench.tracker().memo().expect("read"), b"head 7");
    }
}
