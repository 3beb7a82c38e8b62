//! Cuts a volume as the agent does, and holds every capture against the oracle.
//!
//! Owns tracker, reader and the replica: an image in memory that only captures reach. The tracker and `cut` are the product's
//! own; between them stands one that looks at the board before and after each flip, which is the instant of a cut.

#![allow(clippy::disallowed_methods, reason = "tests use the real clock")]

use crate::PATIENCE;
use crate::board::Board;
use crate::check::{Around, Oracle, Violation};
use crate::layout::Layout;
use crate::raw::RawDisk;
use crate::record::SECTOR_BYTES;
use anyhow::{Context, Result, ensure};
use cdp_protocol::units::{BLOCK_BYTES, Block, GroupId, VolumeSlot};
use cdp_seams::clock::SystemClock;
use cdp_seams::random::{SystemRandom, array};
use cdp_seams::storage::SystemStorage;
use cdp_source::capture::{BlockContent, Capture};
use cdp_source::cut::{Cut, CutLimits, cut};
use cdp_source::reader::aligned::AlignedBuffer;
use cdp_source::reader::{self, BlockReader};
use cdp_source::tracker::ebpf::{EbpfOptions, EbpfTracker, remove};
use cdp_source::tracker::{DiskReport, TrackedVolume, Tracker, TrackerError, TrackerReport};
use roaring::RoaringBitmap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::park_timeout;
use std::time::{Duration, Instant};

/// The agent's own bound at an interval of a second.
pub(crate) const BOUND: Duration = Duration::from_millis(250);

const ZEROS: &[u8] = &[0; BLOCK_BYTES];

/// What the cuts of a test amounted to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) tried: u64,
    /// Captured, validated and checked.
    pub(crate) validated: u64,
    /// Nothing had changed.
    pub(crate) unchanged: u64,
    pub(crate) blocks: u64,
    /// Blocks that were zeros.
    pub(crate) zeros: u64,
    /// Rounds of each cut.
    pub(crate) rounds: Vec<u32>,
    pub(crate) slowest_us: u64,
    /// Flips at which the kernel had counted completions that the programs had not.
    pub(crate) completions_lost: u64,
    /// Records that the replica had seen of all chains in the end.
    pub(crate) records: u64,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let share = 100.0 * (self.validated + self.unchanged) as f64 / self.tried.max(1) as f64;
        let mut rounds = self.rounds.clone();
        rounds.sort_unstable();
        let rounds = |percent: usize| rounds.get(rounds.len() * percent / 100).or(rounds.last()).copied().unwrap_or(0);
        write!(
            f,
            "{} cuts, {} captured and checked ({share:.1} % validated), {} blocks, {} of them zeros, {} records, slowest {:.1} ms, {} flips with lost \
             completions, rounds {} at p50, {} at p99, {} at most",
            self.tried,
            self.validated,
            self.blocks,
            self.zeros,
            self.records,
            self.slowest_us as f64 / 1000.0,
            self.completions_lost,
            rounds(50),
            rounds(99),
            rounds(100)
        )
    }
}

/// What one cut came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Checked,
    Unchanged,
    NotValidated,
    Violated(Violation),
}

/// A volume under cuts.
pub(crate) struct Cutter {
    tracker: EbpfTracker,
    /// Declared, and so dropped, after the tracker, which holds the group's lock.
    pins: Pins,
    reader: Box<dyn BlockReader>,
    carry: Vec<RoaringBitmap>,
    clock: SystemClock,
    image: Vec<u8>,
    oracle: Oracle,
    pub(crate) figures: Figures,
}

/// What a cutter leaves for the next one.
pub(crate) struct Left {
    group: GroupId,
    state: tempfile::TempDir,
}

impl Cutter {
    /// Tracks `node`, which holds zeros where `layout` has chains; `change` has the last word on how.
    pub(crate) fn open(node: &Path, layout: &Layout, change: impl FnOnce(&mut EbpfOptions)) -> Result<Self> {
        let left = Left { group: GroupId(array(&SystemRandom)), state: tempfile::tempdir()? };
        Self::open_in(left, node, layout, change)
    }

    /// The same, as the successor of one that was closed. Its replica is empty.
    pub(crate) fn open_in(
        left: Left,
        node: &Path,
        layout: &Layout,
        change: impl FnOnce(&mut EbpfOptions),
    ) -> Result<Self> {
        let volumes = vec![(VolumeSlot(0), node.to_owned())];
        let state = left.state.path().to_owned();
        let mut options = EbpfOptions::new(left.group, volumes, state, Arc::new(SystemStorage));
        change(&mut options);
        let pins = Pins { left: Some(left), bpffs: options.bpffs.clone() };
        let mut tracker = EbpfTracker::open(&options).with_context(|| format!("track {}", node.display()))?;
        let size_bytes = tracker.volumes()[0].size_bytes;
        let reader = reader::open(&[tracker.devices()[0].read_target()])?;
        Ok(Self {
            carry: tracker.take_recovered(),
            tracker,
            pins,
            reader,
            clock: SystemClock::new(),
            image: vec![0; size_bytes as usize],
            oracle: Oracle::new(layout.chains(), size_bytes / SECTOR_BYTES as u64),
            figures: Figures::default(),
        })
    }

    /// Stops cutting; the tracking goes on in the kernel.
    pub(crate) fn close(mut self) -> Left {
        self.pins.left.take().expect("it is taken once")
    }

    /// One cut, validated within `bound` or not.
    pub(crate) fn cut(&mut self, board: &Board, bound: Duration) -> Result<Outcome> {
        let limits = CutLimits { bound, blocks_max: u64::MAX };
        let mut watched = Watched { tracker: &mut self.tracker, board, around: Around::default() };
        let outcome = cut(&mut watched, &mut *self.reader, &self.clock, &mut self.carry, &limits)?;
        let around = watched.around;
        self.figures.tried += 1;
        self.figures.completions_lost = self.tracker.completions_lost();
        board.press(!matches!(outcome, Cut::NotValidated));
        match outcome {
            Cut::Captured(capture) => {
                self.take(&capture);
                // Acked at once.
                self.tracker.retain_unacked(&[RoaringBitmap::new()])?;
                if let Err(violation) = self.oracle.check(&around) {
                    return Ok(Outcome::Violated(violation));
                }
                self.figures.records = self.oracle.newest().iter().sum();
                Ok(Outcome::Checked)
            }
            Cut::Unchanged { .. } => {
                self.figures.unchanged += 1;
                Ok(Outcome::Unchanged)
            }
            Cut::NotValidated => Ok(Outcome::NotValidated),
            Cut::TooLarge => unreachable!("there is no bound on blocks"),
        }
    }

    fn take(&mut self, capture: &Capture) {
        let meters = &capture.meters;
        self.figures.validated += 1;
        self.figures.blocks += meters.dirty_blocks;
        self.figures.zeros += meters.hole_blocks;
        self.figures.slowest_us = self.figures.slowest_us.max(meters.cut_us);
        self.figures.rounds.push(meters.cut_rounds);
        for (block, content) in capture.volumes[0].iter() {
            let bytes = match content {
                BlockContent::Bytes(bytes) => bytes,
                BlockContent::Zero => ZEROS,
                BlockContent::Unreadable => unreachable!("these devices can be read"),
            };
            let at = block.0 as usize * BLOCK_BYTES;
            let len = BLOCK_BYTES.min(self.image.len() - at);
            self.image[at..at + len].copy_from_slice(&bytes[..len]);
            self.oracle.put((at / SECTOR_BYTES) as u64, &bytes[..len]);
        }
    }

    /// After a violation: says whether later cuts make up for it, and whether the sums noticed anything. What is missing for
    /// one cut has another cause than what is missing for ever.
    pub(crate) fn follow_up(&mut self, board: &Board) -> Result<()> {
        let (at, lost) = (self.figures.tried, self.tracker.completions_lost());
        for later in 1..=20 {
            if self.cut(board, BOUND)? == Outcome::Checked {
                let noticed = self.tracker.completions_lost() - lost;
                eprintln!(
                    "cut {at} is wrong, {later} cuts later all is right; {lost} and {noticed} lost completions noticed"
                );
                self.figures.tried = at;
                return Ok(());
            }
        }
        eprintln!("cut {at} is wrong, and so are 20 later ones; {lost} lost completions were noticed");
        self.figures.tried = at;
        Ok(())
    }

    /// Cuts until nothing is left: to be asked when nobody writes.
    pub(crate) fn come_to_rest(&mut self, board: &Board) -> Result<Outcome> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            match self.cut(board, BOUND)? {
                Outcome::Checked => {}
                // In doubt: it takes a moment of rest until it is believed again.
                Outcome::NotValidated => park_timeout(Duration::from_millis(20)),
                end => return Ok(end),
            }
        }
        anyhow::bail!("a volume nobody writes to does not come to rest: {}", self.figures)
    }

    /// Fails with the first byte in which the replica and the volume differ.
    pub(crate) fn equals(&self, node: &Path) -> Result<()> {
        const CHUNK: usize = 1 << 20;
        let disk = RawDisk::open(node)?;
        let mut buffer = AlignedBuffer::new(CHUNK);
        for (index, expected) in self.image.chunks(CHUNK).enumerate() {
            let found = &mut buffer[..expected.len()];
            disk.read((index * CHUNK) as u64, found)?;
            let differs = found.iter().zip(expected).position(|(found, expected)| found != expected);
            let at = differs.map(|at| index * CHUNK + at);
            ensure!(at.is_none(), "the replica differs from {} at byte {at:?}", node.display());
        }
        Ok(())
    }

    /// Where this tracking is pinned.
    pub(crate) fn pin_folder(&self) -> PathBuf {
        self.tracker.pin_folder().to_owned()
    }

    /// The counts of its disk at the last flip.
    pub(crate) fn disk(&self) -> DiskReport {
        self.tracker.report().trust.disks[0].clone()
    }

    /// Why everything was dirty when it was opened.
    pub(crate) fn started_over(&self) -> Option<String> {
        self.tracker.report().started_over
    }
}

/// What is pinned goes when the test ends, however it ends.
struct Pins {
    left: Option<Left>,
    bpffs: PathBuf,
}

impl Drop for Pins {
    fn drop(&mut self) {
        if let Some(left) = &self.left {
            let _ = remove(&self.bpffs, left.state.path(), &SystemStorage, left.group);
        }
    }
}

/// The tracker, and what the writers knew around its last flip.
struct Watched<'a> {
    tracker: &'a mut EbpfTracker,
    board: &'a Board,
    around: Around,
}

impl Tracker for Watched<'_> {
    fn volumes(&self) -> &[TrackedVolume] {
        self.tracker.volumes()
    }

    fn take_recovered(&mut self) -> Vec<RoaringBitmap> {
        self.tracker.take_recovered()
    }

    fn flip(&mut self) -> Result<Vec<RoaringBitmap>, TrackerError> {
        let finished = self.board.finished();
        let marked = self.tracker.flip()?;
        self.around = Around { finished, issued: self.board.issued() };
        Ok(marked)
    }

    fn is_conflicted(&self, volume: usize, block: Block) -> bool {
        self.tracker.is_conflicted(volume, block)
    }

    fn holes(&self, volume: usize, blocks: &RoaringBitmap) -> RoaringBitmap {
        self.tracker.holes(volume, blocks)
    }

    fn settle(&mut self) -> Result<bool, TrackerError> {
        self.tracker.settle()
    }

    fn retain_unacked(&mut self, union: &[RoaringBitmap]) -> Result<(), TrackerError> {
        self.tracker.retain_unacked(union)
    }

    fn memo(&self) -> Result<Vec<u8>, TrackerError> {
        self.tracker.memo()
    }

    fn set_memo(&mut self, memo: &[u8]) -> Result<(), TrackerError> {
        self.tracker.set_memo(memo)
    }

    fn report(&self) -> TrackerReport {
        self.tracker.report()
    }
}
