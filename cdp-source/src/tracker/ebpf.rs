//! The eBPF tracker: one instance of programs and maps a group, pinned, so that tracking outlives this process.
//!
//! Owns the flip, and the order in which a tracking is taken over: the new instance is attached, the old one's marks are
//! carried over (`takeover` says which), then the state folder names the new one, then the old one is removed; killed at
//! any step, the successor finds a named instance that has seen every write. Invariants: a block leaves the kernel's
//! record only for `unacked`; no path starts an empty record and goes on. One instance holds all volumes of the group in
//! maps sized for them. Does not read volumes. What the counts say of a flip (`trust`) decides whether it is good for a cut (`doubt`).

use super::bitmap::{drain, filter_has, forget, peek, which_have};
use super::device::{Device, read_text};
use super::doubt::{Doubt, Outcome};
use super::identity::{Identity, VolumeIdentity};
use super::instance::{Instance, MEMO_BYTES_MAX, disks_of};
use super::pins;
use super::programs::Programs;
use super::suspects::Suspects;
use super::takeover::{TakenOver, take_over};
use super::trust::{Before, Trust, TrustReport, Verdict};
use super::watch::Watch;
use super::{Parting, TrackedVolume, Tracker, TrackerError, TrackerReport};
use cdp_protocol::limits::VOLUMES_MAX;
use cdp_protocol::units::{Block, Sectors, VolumeSlot};
use cdp_seams::clock::{Clock, SystemClock};
use cdp_seams::storage::replace;
use roaring::RoaringBitmap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use super::instance::EventCounts;
pub use super::options::EbpfOptions;
pub use super::pins::{BPFFS, supported, take_down as remove};
#[cfg(feature = "sabotage")]
pub use super::programs::Sabotage;

/// How long a flip waits for runs that were counted into the old parity.
const STRAGGLERS_MS: u64 = 250;
/// How often a flip looks before it gives the processor away: a run takes less than a µs, and what was given away on a busy
/// machine comes back after milliseconds, in which more blocks are written that have to be read again.
const SPINS: u32 = 200;
/// A disk that gets passthrough writes all the time is captured whole no more often than this.
const BLIND_RESCAN_EVERY: Duration = Duration::from_secs(60);

/// The tracker of a group of block devices.
pub struct EbpfTracker {
    instance: Instance,
    devices: Vec<Device>,
    watches: Vec<Watch>,
    volumes: Vec<TrackedVolume>,
    /// Drained and not given to a cut yet.
    pending: Vec<RoaringBitmap>,
    recovered: Vec<RoaringBitmap>,
    started_over: Option<String>,
    first_copy: Option<String>,
    taken_up: Option<String>,
    trust: Trust,
    suspects: Suspects,
    issue_misses_at_flip: u64,
    marks_lost: u64,
    completions_lost: u64,
    doubt: Doubt,
    blind: Blind,
    rescans: u64,
    recaptured_blocks: u64,
    /// Nothing was in flight at the last flip, which stood.
    was_quiet: bool,
    rescanned: Option<String>,
    programs: Programs,
    clock: SystemClock,
    _lock: pins::Lock,
}

/// Passthrough writes, which may have gone anywhere.
struct Blind {
    /// Those that a rescan has answered for.
    seen: u64,
    /// When the next rescan may be.
    rescan_at: Option<Duration>,
}

impl EbpfTracker {
    /// Starts to track, or goes on with the tracking a predecessor left.
    ///
    /// # Errors
    /// Where a volume or this machine cannot be tracked, or another process tracks the group.
    pub fn open(options: &EbpfOptions) -> Result<Self, TrackerError> {
        let devices = inspect(&options.volumes)?;
        pins::supported_at(&options.bpffs)?;
        let folder = pins::group_folder(&options.bpffs, options.group);
        let lock = pins::lock(&folder)?;
        let failed = |step: &str| {
            let step = format!("{step} of group {}", options.group);
            move |source: io::Error| TrackerError::Io { step, source }
        };
        let boot = read_text(&options.boot_id_path).map_err(failed("read the boot id for the tracking"))?;
        let TakenOver { instance, recovered, started_over, first_copy, taken_up, is_quiet } =
            take_over(options, &folder, &devices, boot)?;
        instance.note_origins(&devices).map_err(failed("keep the kernel's counts"))?;
        let record = serde_json::to_vec_pretty(&instance.identity).expect("an identity has only plain fields");
        let kept = options.storage.create_dir_all(&options.state_folder);
        if let Err(error) = kept.and_then(|()| replace(&*options.storage, &options.record(), &record)) {
            if recovered.is_some() {
                // It is new, and nothing names it: it is not to stay for each time this fails.
                pins::remove(&instance.folder).map_err(failed("remove a tracking that cannot be named"))?;
            }
            return Err(failed("keep the identity of the tracking")(error));
        }
        pins::remove_others(&folder, &instance.folder).map_err(failed("remove an old tracking"))?;
        let clock = SystemClock::new();
        let trust = Trust::new(&instance, &devices, clock.monotonic()).map_err(failed("read the counts"))?;
        let mut tracker = Self::assemble(instance, devices, trust, lock, clock).map_err(failed("read the counts"))?;
        tracker.started_over = started_over;
        tracker.first_copy = first_copy;
        tracker.taken_up = taken_up;
        tracker.programs = options.programs();
        // Asked after the measure began: what comes later is seen at the first flip.
        let counts = tracker.counts_of("read the counts at the start")?;
        if counts.unmarked() != tracker.instance.answered() {
            tracker.rescan("writes may have gone unmarked while no agent looked");
            tracker.instance.set_answered(&counts);
        }
        tracker.recover(recovered)?;
        if !is_quiet {
            // Writes of before may be in flight still.
            tracker.suspects.add(&tracker.recovered);
        }
        Ok(tracker)
    }

    fn assemble(
        instance: Instance,
        devices: Vec<Device>,
        trust: Trust,
        lock: pins::Lock,
        clock: SystemClock,
    ) -> io::Result<Self> {
        let tracked = |(volume, device): (&VolumeIdentity, &Device)| TrackedVolume {
            slot: volume.slot,
            size_bytes: device.size_bytes(),
        };
        let counts = instance.counts()?;
        let volumes: Vec<TrackedVolume> = instance.identity.volumes.iter().zip(&devices).map(tracked).collect();
        let none = vec![RoaringBitmap::new(); volumes.len()];
        Ok(Self {
            watches: devices.iter().map(Watch::begin).collect::<io::Result<_>>()?,
            suspects: Suspects::new(volumes.len(), clock.monotonic()),
            pending: none.clone(),
            recovered: none,
            volumes,
            instance,
            devices,
            started_over: None,
            first_copy: None,
            taken_up: None,
            trust,
            issue_misses_at_flip: counts.issue_misses,
            marks_lost: counts.lost,
            completions_lost: 0,
            doubt: Doubt::default(),
            blind: Blind { seen: counts.blind, rescan_at: None },
            rescans: 0,
            recaptured_blocks: 0,
            was_quiet: false,
            rescanned: None,
            programs: Programs::PLAIN,
            clock,
            _lock: lock,
        })
    }

    /// What was drained and not acked, and what a predecessor began to drain.
    fn recover(&mut self, unacked: Option<Vec<RoaringBitmap>>) -> Result<(), TrackerError> {
        let stale = 1 - self.instance.active();
        self.pass(stale)?;
        self.drain(stale);
        let in_map = || self.instance.places.iter().map(|place| self.instance.unacked.blocks(place)).collect();
        self.recovered = unacked.unwrap_or_else(in_map);
        for (recovered, pending) in self.recovered.iter_mut().zip(&mut self.pending) {
            *recovered |= std::mem::take(pending);
        }
        Ok(())
    }

    /// Where to read the volumes, in their order.
    #[must_use]
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// The tracking's identity.
    #[must_use]
    pub const fn identity(&self) -> &Identity {
        &self.instance.identity
    }

    /// Where this tracking is pinned.
    #[must_use]
    pub fn pin_folder(&self) -> &Path {
        &self.instance.folder
    }

    /// What the programs counted.
    ///
    /// # Errors
    /// Where the kernel does not tell of missed runs.
    pub fn counts(&self) -> io::Result<EventCounts> {
        self.instance.counts()
    }

    /// Flips at which the kernel had counted completions that the programs had not.
    #[must_use]
    pub const fn completions_lost(&self) -> u64 {
        self.completions_lost
    }

    /// What is marked now, left where it is, by a look at every word: what a drain would be without the summaries.
    #[must_use]
    pub fn marked(&self) -> Vec<RoaringBitmap> {
        let dirty = &self.instance.dirty[self.instance.active()];
        self.instance.places.iter().map(|place| peek(dirty, place)).collect()
    }

    /// The straggler barrier of `parity`.
    fn pass(&self, parity: usize) -> Result<(), TrackerError> {
        let deadline = self.clock.monotonic() + Duration::from_millis(STRAGGLERS_MS);
        let mut looks = 0;
        while !self.programs.skips_barrier && !self.instance.is_passed(parity) {
            looks += 1;
            if looks < SPINS {
                std::hint::spin_loop();
                continue;
            }
            if self.clock.monotonic() > deadline {
                let reason = format!("runs that mark parity {parity} did not end within {STRAGGLERS_MS} ms");
                return Err(TrackerError::Stragglers(reason));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    fn drain(&mut self, parity: usize) {
        let (dirty, summary) = (&self.instance.dirty[parity], &self.instance.summary[parity]);
        for (place, pending) in self.instance.places.iter().zip(&mut self.pending) {
            *pending |= drain(dirty, summary, &self.instance.unacked, place);
        }
    }

    fn check_devices(&self) -> Result<(), TrackerError> {
        for (watch, volume) in self.watches.iter().zip(&self.volumes) {
            let changed = |reason| TrackerError::VolumeChanged { slot: volume.slot, reason };
            watch.look().map_err(changed)?;
        }
        Ok(())
    }

    /// A disk whose counts went back was reset, which some bio-based ones do without becoming another device.
    fn check_counts(&self, before: &Before) -> Result<(), TrackerError> {
        let Some(disk) = self.trust.started_anew(before) else { return Ok(()) };
        let volume = self.devices.iter().position(|device| device.disk == disk).map(|index| self.volumes[index].slot);
        let reason = format!("disk {disk} counts fewer sectors written than it had: it was reset");
        Err(TrackerError::VolumeChanged { slot: volume.unwrap_or(VolumeSlot(0)), reason })
    }

    /// Adds what the counts of this flip say may have been missed.
    ///
    /// # Errors
    /// Where they say that it is good for no cut.
    fn distrust(&mut self, mut verdict: Verdict, counts: EventCounts) -> Result<(), TrackerError> {
        let now = self.clock.monotonic();
        if self.programs.skips_sums {
            return Ok(());
        }
        let outcome = self.doubt.flipped(verdict.doubt.take(), verdict.quiet, now);
        if verdict.lost {
            self.completions_lost += 1;
        }
        if verdict.quiet {
            self.instance.free_discards();
        }
        verdict.lost |= matches!(outcome, Outcome::Recapture(_));
        if verdict.lost {
            self.distrust_holes();
        }
        if let Some(joining) = self.suspects.flipped(&self.pending, &verdict, now) {
            tracing::info!("completions were missed: what was written since the last quiet moment is captured again");
            self.carry(&joining);
        }
        if counts.lost != self.marks_lost {
            self.marks_lost = counts.lost;
            self.rescan("the tracker's programs could not make a mark");
        }
        if counts.blind != self.blind.seen && self.blind.rescan_at.is_none_or(|at| now >= at) {
            self.blind = Blind { seen: counts.blind, rescan_at: Some(now + BLIND_RESCAN_EVERY) };
            self.rescan("passthrough writes, which do not tell where they go, were sent to a disk");
        }
        let answered = self.settle_doubt(outcome);
        if self.doubt.reason().is_none() && self.blind.seen == counts.blind {
            self.instance.set_answered(&counts);
        }
        answered
    }

    /// A write that landed after an overlapping discard and whose completion was lost has not taken the discard's hole back:
    /// what this flip drained is read, whatever its hole bits say, and discards on their way make none. (Touched first:
    /// a discard that completes meanwhile sees that, or its bits are there to be taken.)
    fn distrust_holes(&self) {
        self.instance.touch_discards();
        for (place, pending) in self.instance.places.iter().zip(&self.pending) {
            forget(&self.instance.holes, place, pending);
        }
    }

    fn settle_doubt(&mut self, outcome: Outcome) -> Result<(), TrackerError> {
        match outcome {
            Outcome::Trusted => Ok(()),
            Outcome::Recapture(reason) => {
                tracing::warn!(reason, "the tracking was in doubt: what was written meanwhile is captured again");
                Ok(())
            }
            Outcome::Rescan(reason) => {
                self.rescan(&reason);
                Ok(())
            }
            Outcome::RescanVoid(reason) => {
                self.rescan(&reason);
                Err(TrackerError::InDoubt(reason))
            }
            Outcome::Void(reason) => Err(TrackerError::InDoubt(reason)),
        }
    }

    /// Makes everything dirty.
    fn rescan(&mut self, reason: &str) {
        tracing::error!(reason, "marks may be missing: all volumes are captured again");
        self.rescans += 1;
        self.rescanned = Some(reason.to_owned());
        let all: Vec<_> = self.instance.places.iter().map(super::bitmap::Place::all).collect();
        self.carry(&all);
    }

    /// Adds what has to be captured again, from the device: what a hole bit says of it is not believed either.
    fn carry(&mut self, blocks: &[RoaringBitmap]) {
        for ((place, pending), blocks) in self.instance.places.iter().zip(&mut self.pending).zip(blocks) {
            self.instance.unacked.add(place, blocks);
            forget(&self.instance.holes, place, blocks);
            *pending |= blocks;
            self.recaptured_blocks += blocks.len();
        }
    }

    fn counts_of(&self, step: &str) -> Result<EventCounts, TrackerError> {
        self.instance.counts().map_err(|source| TrackerError::Io { step: step.to_owned(), source })
    }
}

impl Tracker for EbpfTracker {
    fn volumes(&self) -> &[TrackedVolume] {
        &self.volumes
    }

    fn take_recovered(&mut self) -> Vec<RoaringBitmap> {
        let none = vec![RoaringBitmap::new(); self.volumes.len()];
        std::mem::replace(&mut self.recovered, none)
    }

    fn flip(&mut self) -> Result<Vec<RoaringBitmap>, TrackerError> {
        let failed = |source| TrackerError::Io { step: "compare the kernel's counts".to_owned(), source };
        self.check_devices()?;
        let old = self.instance.active();
        let new = 1 - old;
        // What a flip that did not get past its barrier left behind. No run is in `new` when its filter is cleared.
        if !self.programs.skips_barrier {
            self.pass(new)?;
            self.drain(new);
        }
        self.instance.issued[new].clear();
        let before = self.trust.before(&self.instance).map_err(failed)?;
        self.check_counts(&before)?;
        self.issue_misses_at_flip = self.counts_of("read the counts before the flip")?.issue_misses;
        self.instance.set_active(new);
        self.pass(old)?;
        self.drain(old);
        let verdict = self.trust.judge(&self.instance, &before, self.clock.monotonic()).map_err(failed)?;
        let counts = self.counts_of("read the counts after the flip")?;
        let is_quiet = verdict.quiet;
        self.was_quiet = false;
        self.distrust(verdict, counts)?;
        self.was_quiet = is_quiet;
        let none = vec![RoaringBitmap::new(); self.volumes.len()];
        Ok(std::mem::replace(&mut self.pending, none))
    }

    fn is_conflicted(&self, volume: usize, block: Block) -> bool {
        // The block's content was read before this: a write that shows in it was marked before it was sent to the disk.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let issued = &self.instance.issued[self.instance.active()];
        !self.programs.skips_validation && filter_has(issued, &self.instance.places[volume], block)
    }

    fn was_quiet(&self) -> bool {
        self.was_quiet
    }

    /// The last mark of a block with its hole bit set was the successful completion of a discard or write-zeroes. Asked
    /// before the filter of issued writes is: if a write to it was issued after τ and its run cleared the bit, the block
    /// is read; if the bit was seen before that run, the filter has the write or the write had not been sent to the disk.
    /// A write issued before τ and not completed at τ was in flight: zeros are what a crash at τ may leave. One completed
    /// before τ, after the discard, has cleared the bit, and the barrier has waited for the run that did. If that run went
    /// missing, the counts tell, and the bits of what it can hurt are cleared (`carry`).
    fn holes(&self, volume: usize, blocks: &RoaringBitmap) -> RoaringBitmap {
        let holes = which_have(&self.instance.holes, &self.instance.places[volume], blocks);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        holes
    }

    fn settle(&mut self) -> Result<bool, TrackerError> {
        let counts = self.counts_of("read the counts of a round")?;
        Ok(counts.issue_misses == self.issue_misses_at_flip && counts.lost == self.marks_lost)
    }

    fn retain_unacked(&mut self, union: &[RoaringBitmap]) -> Result<(), TrackerError> {
        for (index, place) in self.instance.places.iter().enumerate() {
            // What was not given away yet is of no epoch, and stays; so does what a lost completion may still bring back.
            let kept = &union[index] | &self.pending[index] | &self.recovered[index] | self.suspects.of(index);
            self.instance.unacked.retain(place, &kept);
        }
        Ok(())
    }

    fn memo(&self) -> Result<Vec<u8>, TrackerError> {
        let source = || io::Error::new(io::ErrorKind::InvalidData, "its length is past its place");
        let step = || "read the pinned memo".to_owned();
        self.instance.memo().ok_or_else(|| TrackerError::Io { step: step(), source: source() })
    }

    fn set_memo(&mut self, memo: &[u8]) -> Result<(), TrackerError> {
        if memo.len() > MEMO_BYTES_MAX {
            let source = io::ErrorKind::FileTooLarge.into();
            return Err(TrackerError::Io { step: format!("keep a memo of {} bytes", memo.len()), source });
        }
        self.instance.set_memo(memo);
        Ok(())
    }

    fn written_bytes(&self) -> Vec<Option<u64>> {
        let disks = disks_of(&self.devices);
        let bytes = |index| Sectors(self.instance.tally(index).issued).to_bytes();
        let of = |device: &Device| disks.iter().position(|disk| *disk == device.disk).map(bytes);
        self.devices.iter().map(of).collect()
    }

    fn parting(&self) -> Option<Parting<'_>> {
        let dirty = |place| {
            let marked = self.instance.dirty.iter().map(|dirty| peek(dirty, place));
            marked.fold(self.instance.unacked.blocks(place), |dirty, marked| dirty | marked)
        };
        let dirty = self.instance.places.iter().map(dirty).collect();
        let is_answered = self.instance.counts().is_ok_and(|counts| counts.unmarked() == self.instance.answered());
        Some(Parting { identity: &self.instance.identity, devices: &self.devices, dirty, is_answered })
    }

    fn report(&self) -> TrackerReport {
        let counts = self.instance.counts().unwrap_or_default();
        TrackerReport {
            kind: "ebpf",
            started_over: self.started_over.clone(),
            first_copy: self.first_copy.clone(),
            taken_up: self.taken_up.clone(),
            issued: counts.issued,
            completed: counts.completed,
            misses: counts.issue_misses + counts.complete_misses + counts.lost,
            trust: TrustReport {
                disks: self.trust.disks(),
                completions_lost: self.completions_lost,
                blind_writes: counts.blind,
                unremembered: counts.unremembered,
                unknown: counts.unknown,
                doubt: self.doubt.reason().map(str::to_owned),
                rescans: self.rescans,
                recaptured_blocks: self.recaptured_blocks,
                rescanned: self.rescanned.clone(),
            },
        }
    }
}

fn inspect(volumes: &[(VolumeSlot, PathBuf)]) -> Result<Vec<Device>, TrackerError> {
    if volumes.is_empty() || volumes.len() > VOLUMES_MAX {
        let reason = format!("a group has 1 to {VOLUMES_MAX} volumes, not {}", volumes.len());
        return Err(TrackerError::Unsupported { step: "track a group".to_owned(), reason });
    }
    volumes.iter().map(|(_, path)| Device::inspect(path)).collect()
}
