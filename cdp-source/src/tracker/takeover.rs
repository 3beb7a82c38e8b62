//! What a tracking found in bpffs is worth, and how the next one begins.
//!
//! Owns that decision (the table at the end of docs/format/tracker-maps.md). Invariants: whatever was not tracked without a
//! gap is wholly dirty; a new instance is attached before the old one's marks are read, and the old one still marks then, so
//! that no write falls in between. Does not remove the old one: it is to be named no more first (`ebpf`).

use super::bitmap::peek;
use super::device::Device;
use super::ebpf::EbpfOptions;
use super::identity::{Difference, Identity, LAYOUT, VolumeIdentity};
use super::instance::Instance;
use super::kernel_counts::DiskCounter;
use super::pins;
use super::{Left, LeftBehind, TrackerError};
use cdp_seams::clock::{Clock, SystemClock};
use cdp_seams::random::{SystemRandom, array};
use cdp_seams::storage::read_all;
use roaring::RoaringBitmap;
use std::io;
use std::path::Path;
use std::time::Duration;

/// Bytes of the record in the state folder.
const RECORD_BYTES_MAX: u64 = 64 * 1024;

/// How long a moment is waited for in which nothing is on its way to a disk.
const QUIET_WITHIN: Duration = Duration::from_secs(1);

/// An instance that watches, and what it does not know.
pub(super) struct TakenOver {
    pub(super) instance: Instance,
    /// What is dirty; what its `unacked` says, where there is nothing here.
    pub(super) recovered: Option<Vec<RoaringBitmap>>,
    /// Why volumes are dirty as a whole that were tracked before.
    pub(super) started_over: Option<String>,
    /// Which volumes were not tracked before.
    pub(super) first_copy: Option<String>,
    /// Which volumes go on from what a stop in another boot left behind.
    pub(super) taken_up: Option<String>,
    /// Each disk had nothing in flight at some moment since the programs that mark now were attached.
    pub(super) is_quiet: bool,
}

/// What was found of an earlier tracking, and what it is worth.
enum Found {
    /// It is just what is wanted.
    Same(Box<Instance>),
    /// It can be trusted, but has other volumes or programs.
    Other(Box<Instance>),
    /// It is worth nothing, for this reason; the tracking of another boot that the state folder names.
    Nothing(String, Option<Identity>),
}

/// Goes on with what is pinned in the group's `folder`, or begins anew.
pub(super) fn take_over(
    options: &EbpfOptions,
    folder: &Path,
    devices: &[Device],
    boot: String,
) -> Result<TakenOver, TrackerError> {
    let wanted = identity(options, devices, boot);
    match find(options, folder, &wanted, devices)? {
        Found::Same(instance) => {
            let instance = *instance;
            let taken_up = None;
            Ok(TakenOver { instance, recovered: None, started_over: None, first_copy: None, taken_up, is_quiet: false })
        }
        Found::Other(old) => succeed(options, wanted, devices, &old),
        Found::Nothing(reason, before) => {
            let instance = create(options, wanted, devices)?;
            let is_quiet = answer_for_the_past(&instance, devices).map_err(looking)?;
            Ok(match (before, &options.left_behind) {
                (Some(before), Some(left)) => go_on(instance, &reason, is_quiet, devices, &before, &**left),
                _ => all_dirty(instance, reason, is_quiet),
            })
        }
    }
}

fn identity(options: &EbpfOptions, devices: &[Device], boot: String) -> Identity {
    let volumes = options.volumes.iter().zip(devices).map(|((slot, _), device)| VolumeIdentity::new(*slot, device));
    let tracker = format!("{:032x}", u128::from_le_bytes(array(&SystemRandom)));
    Identity {
        layout: LAYOUT,
        tracker,
        program: options.programs().hash(),
        boot,
        group: options.group,
        volumes: volumes.collect(),
    }
}

/// The tracking the state folder names, if it can be trusted.
fn find(options: &EbpfOptions, folder: &Path, wanted: &Identity, devices: &[Device]) -> Result<Found, TrackerError> {
    let nothing = |reason: &str| Ok(Found::Nothing(reason.to_owned(), None));
    let record = match read_all(&*options.storage, &options.record(), RECORD_BYTES_MAX) {
        Ok(record) => record,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return nothing("no earlier tracking is known in the state folder");
        }
        Err(source) => {
            return Err(TrackerError::Io { step: format!("read {}", options.record().display()), source });
        }
    };
    let Ok(named) = serde_json::from_slice::<Identity>(&record) else {
        return nothing("the record of the tracking in the state folder cannot be read");
    };
    if let Some(reason) = named.unusable(&wanted.boot, wanted.group) {
        let is_of_another_boot = named.boot != wanted.boot;
        return Ok(Found::Nothing(reason, is_of_another_boot.then_some(named)));
    }
    if !pins::is_tracker_name(&named.tracker) {
        return nothing("the record of the tracking in the state folder is damaged");
    }
    let instance = match Instance::adopt(folder.join(&named.tracker), &named) {
        Ok(instance) => Box::new(instance),
        Err(reason) => return Ok(Found::Nothing(reason, None)),
    };
    let same = named.volumes == wanted.volumes && named.program == wanted.program;
    let same = same && instance.reset_disks(devices).is_empty();
    Ok(if same { Found::Same(instance) } else { Found::Other(instance) })
}

/// Every volume dirty.
fn all_dirty(instance: Instance, reason: String, is_quiet: bool) -> TakenOver {
    let mut all = Vec::new();
    for place in &instance.places {
        let blocks = place.all();
        instance.unacked.add(place, &blocks);
        all.push(blocks);
    }
    TakenOver { instance, recovered: Some(all), started_over: Some(reason), first_copy: None, taken_up: None, is_quiet }
}

/// What was left in another boot is dirty, of the volumes for which that is all; every other volume is.
fn go_on(
    instance: Instance,
    reason: &str,
    is_quiet: bool,
    devices: &[Device],
    before: &Identity,
    left: &dyn LeftBehind,
) -> TakenOver {
    let named: Vec<_> = instance.identity.volumes.iter().map(|volume| volume.slot).zip(devices).collect();
    let Left { stopped, volumes } = match left.left(before, &named) {
        Ok(left) => left,
        Err(why) => return all_dirty(instance, format!("{reason}; {why}"), is_quiet),
    };
    let (mut dirty, mut goes_on, mut lost) = (Vec::new(), Vec::new(), Vec::new());
    for ((found, place), (slot, _)) in volumes.into_iter().zip(&instance.places).zip(&named) {
        let blocks = match found {
            Ok(blocks) => {
                goes_on.push(slot.to_string());
                blocks
            }
            Err(why) => {
                lost.push(format!("volume {slot}: {why}"));
                place.all()
            }
        };
        instance.unacked.add(place, &blocks);
        dirty.push(blocks);
    }
    let started_over = (!lost.is_empty()).then(|| format!("{reason}; {}", lost.join("; ")));
    let taken_up = (!goes_on.is_empty()).then(|| format!("the stop at {stopped}, volume {}", goes_on.join(", ")));
    TakenOver { instance, recovered: Some(dirty), started_over, first_copy: None, taken_up, is_quiet }
}

fn create(options: &EbpfOptions, wanted: Identity, devices: &[Device]) -> Result<Instance, TrackerError> {
    let folder = pins::group_folder(&options.bpffs, options.group).join(&wanted.tracker);
    Instance::create(&folder, wanted, devices, options.programs().object)
}

/// A new instance that takes over the marks of `old` for the volumes that are the same.
fn succeed(
    options: &EbpfOptions,
    wanted: Identity,
    devices: &[Device],
    old: &Instance,
) -> Result<TakenOver, TrackerError> {
    let differences = differences(&wanted, devices, old);
    let instance = create(options, wanted, devices)?;
    // Runs of the old programs that began before the new ones were attached end before the old marks are read. Where
    // that cannot be waited for, the old marks may lack a write, and nothing is carried over.
    if let Err(error) = pins::wait_for_runs() {
        let reason = format!("the volumes changed, and the running programs cannot be waited for: {error}");
        return Ok(all_dirty(instance, reason, false));
    }
    let is_quiet = answer_for_the_past(&instance, devices).map_err(looking)?;
    let mut carried = Vec::new();
    for ((volume, place), difference) in instance.identity.volumes.iter().zip(&instance.places).zip(&differences) {
        let before = old.identity.volumes.iter().position(|before| before.slot == volume.slot);
        let blocks = match (difference, before) {
            (None, Some(before)) => {
                let before = &old.places[before];
                let dirty = peek(&old.dirty[0], before) | peek(&old.dirty[1], before);
                dirty | old.unacked.blocks(before)
            }
            _ => place.all(),
        };
        instance.unacked.add(place, &blocks);
        carried.push(blocks);
    }
    if let Some(memo) = old.memo() {
        instance.set_memo(&memo);
    }
    let (mut joined, mut lost) = (Vec::new(), Vec::new());
    for difference in differences.into_iter().flatten() {
        match difference {
            Difference::Joined(reason) => joined.push(reason),
            Difference::Lost(reason) => lost.push(reason),
        }
    }
    let told = |reasons: Vec<String>| (!reasons.is_empty()).then(|| reasons.join("; "));
    let (started_over, first_copy) = (told(lost), told(joined));
    Ok(TakenOver { instance, recovered: Some(carried), started_over, first_copy, taken_up: None, is_quiet })
}

/// Waits a while for the writes that were on their way when the new programs were attached, which know nothing of them, and
/// answers for all that have ended by now: everything is read later, or the old programs have marked them. Tells whether
/// all have.
fn answer_for_the_past(instance: &Instance, devices: &[Device]) -> io::Result<bool> {
    let clock = SystemClock::new();
    let mut all_quiet = true;
    for device in devices {
        let deadline = clock.monotonic() + QUIET_WITHIN;
        let counter = DiskCounter::open(device.disk)?;
        let mut is_quiet = counter.read()?.in_flight == 0;
        while !is_quiet && clock.monotonic() < deadline {
            std::thread::yield_now();
            is_quiet = counter.read()?.in_flight == 0;
        }
        all_quiet &= is_quiet;
    }
    instance.set_answered(&instance.counts()?);
    Ok(all_quiet)
}

fn looking(source: io::Error) -> TrackerError {
    TrackerError::Io { step: "look at what is on its way to the volumes".to_owned(), source }
}

/// Per volume of `wanted`: why the marks of `old` do not hold for it.
fn differences(wanted: &Identity, devices: &[Device], old: &Instance) -> Vec<Option<Difference>> {
    let reset = old.reset_disks(devices);
    let differences = wanted.differences(&old.identity).into_iter().zip(&wanted.volumes).zip(devices);
    let with_resets = differences.map(|((difference, volume), device)| {
        let is_reset = reset.contains(&device.disk);
        difference.or_else(|| {
            let (slot, disk) = (volume.slot, &volume.disk);
            let reason =
                format!("volume {slot} is on disk {disk}, which counts fewer writes than it had: it was reset");
            is_reset.then_some(Difference::Lost(reason))
        })
    });
    with_resets.collect()
}
