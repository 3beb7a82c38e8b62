//! Simulated volumes under simulated writers, and the oracle of write order.
//!
//! Everything that happens, happens in steps that a seed decides: a write is issued, one of its sectors lands, it
//! completes. Readers and trackers over the world let steps pass between any two of their own, so that a read sees old,
//! new and torn content of whatever is in flight. At every flip the world notes what a power cut at that instant could
//! leave; `Instant::explain` says whether an image is one of those states.

mod death;
mod drive;
mod marks;
mod reader;
mod tracker;

pub use death::{Died, Mortality};
pub use drive::{Driver, Tally};
pub use reader::SimReader;
pub use tracker::{Sabotage, SimTracker};

use cdp_protocol::units::{BLOCK_BYTES, BLOCK_SECTORS, Block, blocks_in};
use cdp_seams::clock::{Clock, SimClock};
use cdp_seams::random::SimRandom;
use marks::{Marks, Run};
use roaring::RoaringBitmap;
use std::ops::Range;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes of a sector.
const SECTOR: usize = 512;
/// When every world begins.
const START_MS: i64 = 1_700_000_000_000;
/// One in so many steps of a slow write does anything.
const SLOWNESS: u64 = 40;
/// Contents that writes put back.
const REPEATED: u64 = 3;
/// How long a step takes.
const STEP: Duration = Duration::from_micros(10);

/// How the writers behave.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Sectors of each volume.
    pub sectors: Vec<u32>,
    /// In how many of 1000 steps a write is issued.
    pub issue_permille: u64,
    /// Writes in flight at most.
    pub in_flight_max: usize,
    /// Sectors of a write at most.
    pub write_sectors_max: u32,
    /// How many of 1000 writes go to the first 16 sectors of a volume.
    pub hot_permille: u64,
    /// How many of 1000 writes take long: only one in 40 of the steps they are given does anything.
    pub slow_permille: u64,
    /// How many of 1000 writes put a whole block back to one of three contents, so that blocks go A, B, A.
    pub repeat_permille: u64,
    /// How many of 1000 runs of the tracker's programs are held up between their entry and their exit.
    pub held_up_permille: u64,
}

impl Profile {
    /// Blocks of each volume.
    fn blocks(&self) -> Vec<u32> {
        self.sectors.iter().map(|sectors| blocks_in(u64::from(*sectors) * SECTOR as u64) as u32).collect()
    }
}

impl Default for Profile {
    fn default() -> Self {
        // The second volume ends within a block.
        let sectors = vec![64 * 8, 40 * 8 + 3];
        Self {
            sectors,
            issue_permille: 60,
            in_flight_max: 12,
            write_sectors_max: 24,
            hot_permille: 300,
            slow_permille: 100,
            repeat_permille: 0,
            held_up_permille: 100,
        }
    }
}

/// Content of every sector of every volume: the number of the write it is from, or of the first one with that content; 0 for none.
pub type Image = Vec<Vec<u64>>;

/// A set of blocks of each volume.
type Blocks = Vec<RoaringBitmap>;

/// Volumes, their writers and their marks. Shared by readers and trackers.
pub struct World {
    state: Mutex<State>,
    /// The clock that steps move.
    pub clock: Arc<SimClock>,
    /// Decides everything.
    pub random: SimRandom,
    /// When the agent dies.
    pub mortality: Mortality,
    /// How far the wall clock is off.
    wall_offset_ms: AtomicI64,
    profile: Profile,
}

struct State {
    media: Image,
    /// The write that a sector is from if nothing in flight has got anywhere, and the order in which it landed.
    settled: Vec<Vec<(u64, u64)>>,
    in_flight: Vec<Write>,
    writes: u64,
    landings: u64,
    is_quiet: bool,
    sabotage: Sabotage,
    marks: Marks,
    /// What a power cut at the last flip could have left.
    flipped: Arc<Instant>,
    unreadable: Blocks,
}

#[derive(Clone, Debug)]
struct Write {
    number: u64,
    volume: usize,
    sectors: Range<u32>,
    /// When each of its sectors landed.
    landed: Vec<Option<u64>>,
    /// A run of the tracker for it that is held up: the write goes no further meanwhile.
    run: Option<Run>,
    is_slow: bool,
}

/// What a power cut at one instant could leave.
#[derive(Clone, Debug)]
pub struct Instant {
    settled: Image,
    in_flight: Vec<Write>,
}

impl World {
    /// A world of empty volumes.
    #[must_use]
    pub fn new(seed: u64, profile: Profile, sabotage: Sabotage) -> Arc<Self> {
        let image: Image = profile.sectors.iter().map(|sectors| vec![0; *sectors as usize]).collect();
        let nothing = vec![RoaringBitmap::new(); profile.sectors.len()];
        let state = State {
            settled: image.iter().map(|volume| vec![(0, 0); volume.len()]).collect(),
            flipped: Arc::new(Instant { settled: image.clone(), in_flight: Vec::new() }),
            media: image,
            in_flight: Vec::new(),
            writes: 0,
            landings: 0,
            is_quiet: false,
            sabotage,
            marks: Marks::new(&profile.blocks()),
            unreadable: nothing,
        };
        let clock = Arc::new(SimClock::new(START_MS));
        let (random, mortality, wall_offset_ms) = (SimRandom::new(seed), Mortality::default(), 0.into());
        Arc::new(Self { state: Mutex::new(state), clock, random, mortality, wall_offset_ms, profile })
    }

    /// Bytes of a volume.
    #[must_use]
    pub fn size_bytes(&self, volume: usize) -> u64 {
        u64::from(self.profile.sectors[volume]) * SECTOR as u64
    }

    /// Number of volumes.
    #[must_use]
    pub fn volumes(&self) -> usize {
        self.profile.sectors.len()
    }

    /// Lets `steps` steps pass.
    pub fn run(&self, steps: u64) {
        let mut state = self.lock();
        for _ in 0..steps {
            state.step(&self.profile, &self.random);
        }
        drop(state);
        self.pass(STEP * steps as u32);
    }

    /// Lets time pass in which nothing is written.
    pub fn pass(&self, time: Duration) {
        self.clock.advance(time);
        // Steps are far below a millisecond: the wall clock follows the monotonic one.
        let offset_ms = self.wall_offset_ms.load(Ordering::SeqCst);
        self.clock.set_wall_ms(START_MS + offset_ms + self.clock.monotonic().as_millis() as i64);
    }

    /// Sets the wall clock off, as an operator or a dead battery may.
    pub fn set_wall_offset_ms(&self, offset_ms: i64) {
        self.wall_offset_ms.store(offset_ms, Ordering::SeqCst);
        self.pass(Duration::ZERO);
    }

    /// The machine loses its power: writes in flight stay where they got to, and the tracking is gone.
    pub fn power_loss(&self) {
        let mut state = self.lock();
        state.in_flight.clear();
        state.landings += 1;
        let landed = state.landings;
        let State { settled, media, .. } = &mut *state;
        for (settled, media) in settled.iter_mut().flatten().zip(media.iter().flatten()) {
            *settled = (*media, landed);
        }
        state.marks = Marks::new(&self.profile.blocks());
    }

    /// No new writes from here on, or again; those in flight go on.
    pub fn set_quiet(&self, is_quiet: bool) {
        self.lock().is_quiet = is_quiet;
    }

    /// Makes a block fail every read with EIO.
    pub fn scratch(&self, volume: usize, block: Block) {
        self.lock().unreadable[volume].insert(block.0);
    }

    /// What is on the media now.
    #[must_use]
    pub fn media(&self) -> Image {
        self.lock().media.clone()
    }

    /// What a power cut now could leave.
    #[must_use]
    pub fn instant(&self) -> Instant {
        self.lock().instant()
    }

    /// What a power cut at the last flip could have left.
    #[must_use]
    pub fn flipped(&self) -> Arc<Instant> {
        Arc::clone(&self.lock().flipped)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn step(&mut self, profile: &Profile, random: &SimRandom) {
        let may_issue = !self.is_quiet && self.in_flight.len() < profile.in_flight_max;
        if may_issue && random.below(1000) < profile.issue_permille {
            self.issue(profile, random);
        } else if !self.in_flight.is_empty() {
            let index = random.below(self.in_flight.len() as u64) as usize;
            self.go_on(index, profile, random);
        }
    }

    fn issue(&mut self, profile: &Profile, random: &SimRandom) {
        let volume = random.below(profile.sectors.len() as u64) as usize;
        let all = profile.sectors[volume];
        let is_hot = random.below(1000) < profile.hot_permille;
        let mut start = random.below(u64::from(if is_hot { all.min(16) } else { all })) as u32;
        let mut len = 1 + random.below(u64::from(profile.write_sectors_max.min(all - start))) as u32;
        self.writes += 1;
        let mut number = self.writes;
        if profile.repeat_permille > 0 && random.below(1000) < profile.repeat_permille {
            start -= start % BLOCK_SECTORS as u32;
            len = (BLOCK_SECTORS as u32).min(all - start);
            number = 1 + random.below(REPEATED);
        }
        let (landed, run) = (vec![None; len as usize], Some(self.marks.enter(false)));
        let is_slow = random.below(1000) < profile.slow_permille;
        self.in_flight.push(Write { number, volume, sectors: start..start + len, landed, run, is_slow });
        if random.below(1000) >= profile.held_up_permille {
            self.exit(self.in_flight.len() - 1);
        }
    }

    /// Lands one more sector of a write, or completes it.
    fn go_on(&mut self, index: usize, profile: &Profile, random: &SimRandom) {
        let write = &mut self.in_flight[index];
        if write.is_slow && random.below(SLOWNESS) > 0 {
            return;
        }
        if write.run.is_some() {
            self.exit(index);
            return;
        }
        let waiting: Vec<usize> = (0..write.landed.len()).filter(|at| write.landed[*at].is_none()).collect();
        if waiting.is_empty() {
            write.run = Some(self.marks.enter(true));
            if random.below(1000) >= profile.held_up_permille {
                self.exit(index);
            }
            return;
        }
        // Sometimes all the rest at once: a write of many sectors is not always slow.
        let count = if random.below(3) == 0 { waiting.len() } else { 1 };
        let first = random.below((waiting.len() - count + 1) as u64) as usize;
        for at in &waiting[first..first + count] {
            self.landings += 1;
            write.landed[*at] = Some(self.landings);
            self.media[write.volume][write.sectors.start as usize + at] = write.number;
        }
    }

    /// Ends the tracker's run for a write; one for a completion ends the write with it. Tells whether it did.
    fn exit(&mut self, index: usize) -> bool {
        let write = &mut self.in_flight[index];
        let Some(run) = write.run.take() else { return false };
        let (volume, blocks) = (write.volume, write.blocks());
        self.marks.exit(run, volume, blocks, self.sabotage);
        if run.is_completion {
            self.complete(index);
        }
        run.is_completion
    }

    fn complete(&mut self, index: usize) {
        let write = self.in_flight.swap_remove(index);
        for (sector, landed) in write.sectors.clone().zip(&write.landed) {
            let landed = landed.expect("a write completes when all of it has landed");
            let settled = &mut self.settled[write.volume][sector as usize];
            if landed > settled.1 {
                *settled = (write.number, landed);
            }
        }
    }

    /// The flip of the tracker: the instant, the straggler barrier.
    fn flip(&mut self) {
        self.flipped = Arc::new(self.instant());
        self.marks.flip();
        if self.sabotage == Sabotage::SkipBarrier {
            return;
        }
        let mut index = 0;
        while index < self.in_flight.len() {
            if !self.exit(index) {
                index += 1;
            }
        }
    }

    fn instant(&self) -> Instant {
        let settled = self.settled.iter().map(|volume| volume.iter().map(|settled| settled.0).collect()).collect();
        Instant { settled, in_flight: self.in_flight.clone() }
    }
}

impl Write {
    fn blocks(&self) -> Range<u32> {
        let sectors = BLOCK_SECTORS as u32;
        self.sectors.start / sectors..self.sectors.end.div_ceil(sectors)
    }
}

impl Instant {
    /// Whether `image` is a state that a power cut at this instant could have left: every sector from the last write that
    /// had completed, or from one in flight.
    ///
    /// # Errors
    /// Names the first sector that is not.
    pub fn explain(&self, image: &Image) -> Result<(), String> {
        for (volume, sectors) in image.iter().enumerate() {
            for (sector, held) in sectors.iter().enumerate() {
                let settled = self.settled[volume][sector];
                let is_in_flight = |write: &Write| {
                    write.number == *held && write.volume == volume && write.sectors.contains(&(sector as u32))
                };
                if *held != settled && !self.in_flight.iter().any(is_in_flight) {
                    return Err(format!(
                        "volume {volume} sector {sector}: holds write {held}; {settled} had completed, and {held} was not in flight"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Fills a sector's bytes as write `number` does; 0 gives zeros.
pub fn fill_sector(bytes: &mut [u8], number: u64) {
    bytes.fill(0);
    bytes[..8].copy_from_slice(&number.to_le_bytes());
}

/// The writes that the sectors of a block are from.
pub fn sectors_of(block: &[u8]) -> impl Iterator<Item = u64> {
    assert_eq!(block.len(), BLOCK_BYTES);
    block.chunks_exact(SECTOR).map(|sector| u64::from_le_bytes(*sector.first_chunk().expect("eight bytes")))
}
