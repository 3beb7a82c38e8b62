//! One set of the tracker's programs and maps in the kernel, pinned in a folder of bpffs.
//!
//! Owns making, pinning, finding again and removing (`loading` is how the kernel gets them). Invariants: the programs are
//! attached only when the tables they look into are filled; what is refused leaves nothing pinned; and an instance is taken
//! up only if every object is there, the links are live and lead to programs that use these maps, and the identity in the
//! maps is the one in the state folder. Does not decide what becomes of marks (`takeover` does). The layout of the maps is in `docs/format/tracker-maps.md`.

use super::TrackerError;
use super::barrier::{self, Gates};
use super::bitmap::{ISSUED_WORDS, Place, SPAN_WORDS, SharedWords, Unacked};
use super::device::{Device, DeviceKind, DeviceNumber, read_text};
use super::identity::Identity;
use super::kernel_counts::DiskCounts;
use super::kernel_file::KernelFile;
use super::loading::{attach, fill_tables, load};
use aya::maps::MapData;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{ProgramFd, ProgramInfo};
use cdp_protocol::limits::VOLUMES_MAX;
use cdp_protocol::units::blocks_in;
use cdp_seams::storage::{Storage, SystemStorage};
use std::error::Error;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

/// Each program and the tracepoint it is attached to.
pub(super) const PROGRAMS: [(&str, &str); 4] = [
    ("issue", "block_bio_queue"),
    ("remap", "block_bio_remap"),
    ("complete", "block_rq_complete"),
    ("bio_complete", "block_bio_complete"),
];
/// Words of `control`, and what each is (`struct control` in bpf/layout.h).
pub(super) const CONTROL_WORDS: usize = 4;
const CONTROL_ACTIVE: usize = 0;
const CONTROL_DISCARDS: usize = 1;
const CONTROL_ANSWERED: usize = 3;
/// Maps every program looks into.
const MAPS_OF_PROGRAMS: [&str; 13] = [
    "issued_0",
    "issued_1",
    "holes",
    "discards",
    "dirty_0",
    "dirty_1",
    "summary_0",
    "summary_1",
    "control",
    "gates",
    "tallies",
    "volumes",
    "disks",
];
/// Words of a record of `gates` (`struct gate`); those of entries and exits are one a parity.
const GATE_WORDS: usize = 8;
const GATE_ENTRIES: usize = 0;
const GATE_EXITS: usize = 2;
const GATE_BLIND: usize = 4;
const GATE_LOST: usize = 5;
const GATE_UNREMEMBERED: usize = 6;
const GATE_UNKNOWN: usize = 7;
/// Words of a record of `tallies` (`struct tally`).
const TALLY_WORDS: usize = 16;
const TALLY_WRITTEN: usize = 0;
const TALLY_DISCARDED: usize = 1;
const TALLY_ZEROED: usize = 2;
const TALLY_COMPLETED_EVENTS: usize = 3;
const TALLY_ISSUED: usize = 4;
const TALLY_ISSUED_EVENTS: usize = 5;
const TALLY_REMAPPED: usize = 6;
/// Of a disk's first record.
const TALLY_ORIGIN: usize = 7;
const TALLY_GIVEN_BACK: usize = 8;
/// Discards that may be on their way at once and make holes; words of the record of one; one that is being filled in.
const DISCARDS_MAX: usize = 32;
const DISCARD_WORDS: usize = 8;
const DISCARD_RESERVED: u64 = u64::MAX;
const DISCARD_TOUCHED: usize = 4;
/// Bytes of an identity, and of a memo.
const IDENTITY_BYTES_MAX: usize = 16376;
pub(super) const MEMO_BYTES_MAX: usize = 1024;
const MEMO_WORDS: usize = 1 + MEMO_BYTES_MAX / 8;

/// Events counted by the programs, summed over CPUs and disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventCounts {
    /// Writes issued to a tracked disk.
    pub issued: u64,
    /// Completions of writes to one.
    pub completed: u64,
    /// Passthrough writes, which have no range.
    pub blind: u64,
    /// Marks that could not be made.
    pub lost: u64,
    /// Writes to bio-based disks whose range could not be kept until they complete.
    pub unremembered: u64,
    /// Writes to bio-based disks that completed without a range kept.
    pub unknown: u64,
    /// Runs of the issue program the kernel passed over.
    pub issue_misses: u64,
    /// Runs of the completion program the kernel passed over.
    pub complete_misses: u64,
}

impl EventCounts {
    /// Events after which a mark may be missing, or at the wrong place.
    pub(super) const fn unmarked(&self) -> u64 {
        self.blind + self.lost + self.unremembered + self.unknown + self.issue_misses
    }
}

/// Sectors the programs counted on a disk, summed over CPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) written: u64,
    pub(super) discarded: u64,
    /// By `WRITE_ZEROES` and `SECURE_ERASE`.
    pub(super) zeroed: u64,
    /// Issued, and not given back before they became a request.
    pub(super) issued: u64,
    /// Sent on to this disk by a stacked driver: issued ones again, or ones that are not among them.
    pub(super) remapped: u64,
}

impl Tally {
    /// Sectors completed, by whatever operation.
    pub(super) fn completed(&self) -> u64 {
        self.written.wrapping_add(self.discarded).wrapping_add(self.zeroed)
    }
}

/// A loaded, attached and pinned tracker.
pub(super) struct Instance {
    pub(super) folder: PathBuf,
    pub(super) identity: Identity,
    pub(super) places: Vec<Place>,
    pub(super) dirty: [SharedWords; 2],
    pub(super) summary: [SharedWords; 2],
    pub(super) issued: [SharedWords; 2],
    pub(super) holes: SharedWords,
    pub(super) unacked: Unacked,
    control: SharedWords,
    discards: SharedWords,
    gates: SharedWords,
    tallies: SharedWords,
    memo: SharedWords,
    programs: Vec<LiveProgram>,
    /// Held open: a program whose link's pin is removed while this process runs would be detached, and nothing would say so.
    _links: Vec<FdLink>,
    cpus: usize,
    /// How many disks the volumes are on.
    disks: usize,
}

/// A program that runs, held open, and where the kernel tells of it.
struct LiveProgram {
    info: KernelFile,
    _program: ProgramFd,
}

/// The volumes' places in the bitmaps, one after the other.
fn places(identity: &Identity) -> Vec<Place> {
    let mut word_base = 0;
    let place = |volume: &super::identity::VolumeIdentity| {
        let place = Place { word_base, blocks: blocks_in(volume.length_sectors.to_bytes()) };
        word_base += place.words();
        place
    };
    identity.volumes.iter().map(place).collect()
}

impl Instance {
    /// Loads a new instance with empty maps into `folder`, which is made, and attaches it. Where the kernel refuses any of
    /// it, nothing stays pinned.
    pub(super) fn create(
        folder: &Path,
        identity: Identity,
        devices: &[Device],
        object: &[u8],
    ) -> Result<Self, TrackerError> {
        rustix::fs::mkdir(folder, rustix::fs::Mode::RWXU).map_err(|error| TrackerError::Io {
            step: format!("make the pin folder {}", folder.display()),
            source: error.into(),
        })?;
        Self::build(folder, identity, devices, object).inspect_err(|_| {
            let removed = SystemStorage.list(folder).and_then(|names| remove(folder, &names));
            // It is a leftover, removed by whoever tracks the group next.
            removed.unwrap_or_else(|error| tracing::warn!(%error, "what was pinned of a refused tracking is left"));
        })
    }

    fn build(folder: &Path, identity: Identity, devices: &[Device], object: &[u8]) -> Result<Self, TrackerError> {
        let failed = |step: &str| {
            let step = format!("{step} for {}", folder.display());
            move |source: io::Error| TrackerError::Io { step, source }
        };
        let places = places(&identity);
        let cpus = possible_cpus().map_err(failed("count CPUs"))?;
        let mut ebpf = load(object, &places, devices, cpus)?;
        fill_tables(&mut ebpf, &places, devices).map_err(failed("fill the tracker's tables"))?;
        for (name, map) in ebpf.maps() {
            map.pin(folder.join(name)).map_err(|error| failed("pin a map")(other(error)))?;
        }
        put_identity(folder, &identity).map_err(failed("keep the identity"))?;
        attach(&mut ebpf, folder)?;
        drop(ebpf);
        Self::open(folder.to_owned(), identity, places)
            .map_err(|reason| failed("open the pinned maps")(io::Error::other(reason)))
    }

    /// Takes up the instance `identity` names from `folder`.
    ///
    /// # Errors
    /// Why it cannot be relied upon, in a line.
    pub(super) fn adopt(folder: PathBuf, identity: &Identity) -> Result<Self, String> {
        if rustix::fs::stat(&folder).is_err() {
            return Err(format!("the pinned maps and programs are gone ({})", folder.display()));
        }
        let words = map_words(&folder, "identity", 1 + IDENTITY_BYTES_MAX / 8)?;
        let pinned: Option<Identity> =
            words.counted_bytes(0, IDENTITY_BYTES_MAX).and_then(|json| serde_json::from_slice(&json).ok());
        if pinned.as_ref() != Some(identity) {
            return Err("the pinned identity is not the one in the state folder".to_owned());
        }
        let places = places(identity);
        Self::open(folder, identity.clone(), places)
    }

    fn open(folder: PathBuf, identity: Identity, places: Vec<Place>) -> Result<Self, String> {
        let cpus = possible_cpus().map_err(|error| format!("the CPUs could not be counted: {error}"))?;
        let words = words_of(&places);
        let spans = words / SPAN_WORDS;
        let map = |name: &str, words: usize| map_words(&folder, name, words);
        let pair = |name: &str, words: usize| {
            Ok::<_, String>([map(&format!("{name}_0"), words)?, map(&format!("{name}_1"), words)?])
        };
        let (programs, links) = live_programs(&folder)?;
        Ok(Self {
            disks: disk_names(&identity).len(),
            dirty: pair("dirty", words)?,
            summary: pair("summary", spans)?,
            issued: pair("issued", ISSUED_WORDS)?,
            holes: map("holes", words)?,
            unacked: Unacked::new(map("unacked", words)?),
            control: map("control", CONTROL_WORDS)?,
            discards: map("discards", DISCARDS_MAX * DISCARD_WORDS)?,
            gates: map("gates", cpus * GATE_WORDS)?,
            tallies: map("tallies", cpus * VOLUMES_MAX * TALLY_WORDS)?,
            memo: map("memo", 1 + 2 * MEMO_WORDS)?,
            programs,
            _links: links,
            folder,
            identity,
            places,
            cpus,
        })
    }

    /// The parity that is marked now.
    pub(super) fn active(&self) -> usize {
        (self.control.load(CONTROL_ACTIVE) & 1) as usize
    }

    /// Lets `parity` be marked from now on: the instant of a cut.
    pub(super) fn set_active(&self, parity: usize) {
        self.control.store(CONTROL_ACTIVE, parity as u64);
    }

    /// Whether every run that was counted into `parity` has left it.
    pub(super) fn is_passed(&self, parity: usize) -> bool {
        barrier::is_passed(self, parity)
    }

    /// Frees the entries of discards whose completion went missing, while nothing is in flight. One that is issued just now
    /// may lose its entry with them, and makes no holes then.
    pub(super) fn free_discards(&self) {
        if self.control.load(CONTROL_DISCARDS) == 0 {
            return;
        }
        for entry in (0..DISCARDS_MAX).map(|entry| entry * DISCARD_WORDS) {
            let left = self.discards.load(entry);
            if left != 0 && left != DISCARD_RESERVED && self.discards.clear_if(entry, left) {
                self.control.decrement(CONTROL_DISCARDS);
            }
        }
    }

    /// Lets no discard on its way make holes: a write that overlaps one may not have been seen to.
    pub(super) fn touch_discards(&self) {
        if self.control.load(CONTROL_DISCARDS) != 0 {
            (0..DISCARDS_MAX).for_each(|entry| self.discards.set(entry * DISCARD_WORDS + DISCARD_TOUCHED, 1));
        }
    }

    /// What the programs counted.
    pub(super) fn counts(&self) -> io::Result<EventCounts> {
        let sum = |field: usize| (0..self.cpus).map(|cpu| self.gates.load(cpu * GATE_WORDS + field)).sum();
        let events = |field: usize| {
            let rows = (0..self.cpus).flat_map(|cpu| (0..self.disks).map(move |disk| cpu * VOLUMES_MAX + disk));
            rows.map(|row| self.tallies.load(row * TALLY_WORDS + field)).sum()
        };
        Ok(EventCounts {
            issued: events(TALLY_ISSUED_EVENTS),
            completed: events(TALLY_COMPLETED_EVENTS),
            blind: sum(GATE_BLIND),
            lost: sum(GATE_LOST),
            unremembered: sum(GATE_UNREMEMBERED),
            unknown: sum(GATE_UNKNOWN),
            issue_misses: self.programs[0].misses()? + self.programs[1].misses()?,
            complete_misses: self.programs[2].misses()? + self.programs[3].misses()?,
        })
    }

    /// How many of `EventCounts::unmarked` were answered for: it outlives the agent, so that what happens while none looks counts.
    pub(super) fn answered(&self) -> u64 {
        self.control.load(CONTROL_ANSWERED)
    }

    /// All of `counts` are answered for: what they may have hurt is dirty.
    pub(super) fn set_answered(&self, counts: &EventCounts) {
        self.control.store(CONTROL_ANSWERED, counts.unmarked());
    }

    /// What the programs counted on disk `index`, in the order of the disks' first volumes.
    pub(super) fn tally(&self, index: usize) -> Tally {
        let sum = |field: usize| {
            (0..self.cpus).map(|cpu| self.tallies.load((cpu * VOLUMES_MAX + index) * TALLY_WORDS + field)).sum()
        };
        // Asked first: what is given back was issued before, and more must not seem completed than was ever issued.
        let given_back: u64 = sum(TALLY_GIVEN_BACK);
        Tally {
            written: sum(TALLY_WRITTEN),
            discarded: sum(TALLY_DISCARDED),
            zeroed: sum(TALLY_ZEROED),
            issued: sum(TALLY_ISSUED).wrapping_sub(given_back),
            remapped: sum(TALLY_REMAPPED),
        }
    }

    /// Keeps by how much the kernel's count of written sectors is ahead of the programs', for `reset_disks`. Only grows.
    pub(super) fn note_origins(&self, devices: &[Device]) -> io::Result<()> {
        for (index, disk) in disks_of(devices).into_iter().enumerate() {
            // The kernel first: what completes in between makes it less.
            let written = DiskCounts::read(disk)?.written;
            let ahead = written.wrapping_sub(self.tally(index).written) as i64;
            let place = index * TALLY_WORDS + TALLY_ORIGIN;
            self.tallies.store(place, ahead.max(self.tallies.load(place) as i64) as u64);
        }
        Ok(())
    }

    /// Bio-based disks among `devices` that this instance watches and whose count of written sectors fell behind: zram keeps
    /// its sequence number over a reset, and begins to count anew. What was written since is in both counts.
    pub(super) fn reset_disks(&self, devices: &[Device]) -> Vec<DeviceNumber> {
        let names = disk_names(&self.identity);
        let is_reset = |device: &&Device| {
            let name = device.disk.to_string();
            let Some(index) = names.iter().position(|known| *known == name) else { return false };
            // The programs first: a bio is counted by the kernel before they see that it has ended.
            let counted = self.tally(index).written;
            let Ok(kernel) = DiskCounts::read(device.disk) else { return true };
            let origin = self.tallies.load(index * TALLY_WORDS + TALLY_ORIGIN) as i64;
            (kernel.written.wrapping_sub(counted) as i64) < origin
        };
        let bio_based = devices.iter().filter(|device| device.kind == DeviceKind::Bio);
        bio_based.filter(is_reset).map(|device| device.disk).collect()
    }

    /// The memo; empty where none was kept.
    pub(super) fn memo(&self) -> Option<Vec<u8>> {
        let place = (self.memo.load(0) & 1) as usize;
        self.memo.counted_bytes(1 + place * MEMO_WORDS, MEMO_BYTES_MAX)
    }

    /// Keeps `memo`. A process that is killed in here leaves the old one: the new one is written beside it, and one
    /// store makes it current.
    pub(super) fn set_memo(&self, memo: &[u8]) {
        let place = 1 - (self.memo.load(0) & 1);
        self.memo.put_counted_bytes(1 + place as usize * MEMO_WORDS, memo);
        self.memo.store(0, place);
    }
}

impl Gates for Instance {
    fn cpus(&self) -> usize {
        self.cpus
    }

    fn exits(&self, cpu: usize, parity: usize) -> u64 {
        self.gates.load(cpu * GATE_WORDS + GATE_EXITS + parity)
    }

    fn entries(&self, cpu: usize, parity: usize) -> u64 {
        self.gates.load(cpu * GATE_WORDS + GATE_ENTRIES + parity)
    }

    fn full_barrier(&self) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}

/// The disks of `devices`, each once, in the order of their first volumes: the order of their tallies.
pub(super) fn disks_of(devices: &[Device]) -> Vec<DeviceNumber> {
    let mut disks: Vec<DeviceNumber> = Vec::new();
    for device in devices {
        if !disks.contains(&device.disk) {
            disks.push(device.disk);
        }
    }
    disks
}

/// The same, of the volumes of an identity.
fn disk_names(identity: &Identity) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for volume in &identity.volumes {
        if !names.contains(&volume.disk.as_str()) {
            names.push(&volume.disk);
        }
    }
    names
}

/// Removes a pinned instance, links first; what is not there is not missed.
pub(super) fn remove(folder: &Path, names: &[PathBuf]) -> io::Result<()> {
    let (links, others): (Vec<_>, Vec<_>) =
        names.iter().partition(|name| name.to_str().is_some_and(|name| name.ends_with("_link")));
    for name in links.into_iter().chain(others) {
        match rustix::fs::unlink(folder.join(name)) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(rustix::fs::rmdir(folder)?)
}

pub(super) fn other(error: impl Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(error)
}

pub(super) fn words_of(places: &[Place]) -> usize {
    places.iter().map(Place::words).sum()
}

fn put_identity(folder: &Path, identity: &Identity) -> io::Result<()> {
    let json = serde_json::to_vec(identity)?;
    if json.len() > IDENTITY_BYTES_MAX {
        return Err(io::Error::other("the identity does not fit its map"));
    }
    let words = map_words(folder, "identity", 1 + IDENTITY_BYTES_MAX / 8).map_err(io::Error::other)?;
    words.put_counted_bytes(0, &json);
    Ok(())
}

fn pinned_map(folder: &Path, name: &str) -> Result<MapData, String> {
    MapData::from_pin(folder.join(name)).map_err(|_| format!("the pinned map {name} is gone"))
}

fn map_words(folder: &Path, name: &str, words: usize) -> Result<SharedWords, String> {
    let map = pinned_map(folder, name)?;
    SharedWords::map(map.fd().as_fd(), words)
        .map_err(|error| format!("the pinned map {name} cannot be mapped: {error}"))
}

/// The pinned programs, if their links are live and they use the pinned maps.
fn live_programs(folder: &Path) -> Result<(Vec<LiveProgram>, Vec<FdLink>), String> {
    let mut maps = Vec::new();
    for name in MAPS_OF_PROGRAMS {
        let info =
            pinned_map(folder, name)?.info().map_err(|error| format!("the pinned map {name} is strange: {error}"))?;
        maps.push(info.id());
    }
    let program = |(name, _): &(&str, &str)| {
        let (program, link, used) = live_program(folder, name)?;
        if maps.iter().all(|map| used.contains(map)) {
            Ok((program, link))
        } else {
            Err(format!("the pinned {name} program marks other maps than the pinned ones"))
        }
    };
    PROGRAMS.iter().map(program).collect()
}

fn live_program(folder: &Path, name: &str) -> Result<(LiveProgram, FdLink, Vec<u32>), String> {
    let link = PinnedLink::from_pin(folder.join(format!("{name}_link")))
        .map_err(|_| format!("the link of the {name} program is detached"))?;
    let link = FdLink::from(link);
    let attached = link.info().map_err(|error| format!("the link of {name} is strange: {error}"))?;
    let info = ProgramInfo::from_pin(folder.join(format!("{name}_program")))
        .map_err(|_| format!("the pinned {name} program is gone"))?;
    if attached.program_id() != info.id() {
        return Err(format!("the link of {name} leads to another program"));
    }
    let strange = |error| format!("the {name} program is strange: {error}");
    let maps = info.map_ids().map_err(strange)?.unwrap_or_default();
    let program = LiveProgram::new(info.fd().map_err(strange)?)
        .map_err(|error| format!("nothing is told of the {name} program: {error}"))?;
    Ok((program, link, maps))
}

impl LiveProgram {
    fn new(program: ProgramFd) -> io::Result<Self> {
        let info = KernelFile::open(Path::new(&format!("/proc/self/fdinfo/{}", program.as_fd().as_raw_fd())))?;
        Ok(Self { info, _program: program })
    }

    /// Runs that the kernel passed over.
    fn misses(&self) -> io::Result<u64> {
        self.info.read(|text| {
            let misses = text.lines().find_map(|line| line.strip_prefix("recursion_misses:"));
            misses?.trim().parse().ok()
        })
    }
}

/// One more than the highest CPU there may ever be.
fn possible_cpus() -> io::Result<usize> {
    let text = read_text(Path::new("/sys/devices/system/cpu/possible"))?;
    let last = text.rsplit([',', '-']).next().and_then(|last| last.parse::<usize>().ok());
    last.map(|last| last + 1).ok_or_else(|| io::Error::other(format!("possible CPUs: {text}")))
}
