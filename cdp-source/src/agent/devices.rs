//! Opens a group's volumes: chooses the tracker, and makes sure that they still are what was protected.
//!
//! One tracker watches all volumes of a group, since they are cut at one instant: eBPF where every one of them can have
//! it, `scan` otherwise. A volume of another size than it was protected with is refused: which of the two is wanted is
//! for a person to say, by protecting it once more.

use super::group::{Devices, FIRST_TRIES, Opener};
use crate::config::{GroupConfig, TrackerChoice, VolumeConfig};
use crate::doctor;
use crate::excludes::{ExcludeSet, Excludes, Window};
use crate::probe::{self, Probe};
use crate::reader::{self, BlockReader, ReadTarget};
use crate::state::{GroupState, StateFolder};
use crate::tracker::device::Device;
use crate::tracker::ebpf::{EbpfOptions, EbpfTracker};
use crate::tracker::scan::ScanTracker;
use crate::tracker::{LeftBehind, Tracker};
use anyhow::{Context, Result, bail};
use cdp_protocol::units::VolumeSlot;
use cdp_seams::clock::Clock;
use cdp_seams::random::SystemRandom;
use std::path::PathBuf;
use std::sync::Arc;

/// What opens a group's volumes, as often as it has to. `own`: files of ours that are left out. `left`: what the last stop left behind; of use
/// to the first tracking alone, and only while the group starts: what is done to the volumes later is not seen in it.
pub(super) fn opener(
    state: StateFolder,
    group: String,
    facts: GroupState,
    config: GroupConfig,
    own: Vec<PathBuf>,
    clock: Arc<dyn Clock>,
    left: Arc<dyn LeftBehind>,
) -> Opener {
    let mut left = Some(left);
    Box::new(move || {
        left = left.take().filter(|_| clock.monotonic() < FIRST_TRIES);
        let opened = open(&state, &group, &facts, &config.volumes, left.clone());
        let (devices, windows) = opened.map_err(|error| format!("{error:#}"))?;
        left = None;
        let set = ExcludeSet {
            group: group.clone(),
            volumes: windows,
            configured: config.exclude.clone(),
            own: own.clone(),
            state: state.real_root(),
        };
        let exclusion = Box::new(Excludes::new(set, Arc::clone(&clock)));
        let (tracker, reader) = devices;
        Ok(Devices { tracker, reader, exclusion })
    })
}

/// What watches the volumes and what reads them.
type Opened = (Box<dyn Tracker>, Box<dyn BlockReader>);

/// Also tells where each volume lies, unless it is an image file.
fn open(
    state: &StateFolder,
    group: &str,
    facts: &GroupState,
    volumes: &[VolumeConfig],
    left: Option<Arc<dyn LeftBehind>>,
) -> Result<(Opened, Vec<Option<Window>>)> {
    let probes = volumes.iter().map(|volume| look(state, facts, volume)).collect::<Result<Vec<_>>>()?;
    let folder = state.tracking(group);
    state.make(&folder)?;
    let paths: Vec<(VolumeSlot, PathBuf)> =
        volumes.iter().zip(&probes).map(|(volume, probe)| (volume.slot, probe.device.clone())).collect();
    let wants = |choice| volumes.iter().any(|volume| volume.tracker == choice);
    match ebpf_obstacle(state, &probes, wants(TrackerChoice::Scan)) {
        Some(obstacle) if wants(TrackerChoice::Ebpf) => bail!("tracker = \"ebpf\" cannot serve this group: {obstacle}"),
        Some(obstacle) => {
            tracing::info!(group, reason = obstacle, "tracking by scanning");
            scan(state, &folder, &paths, &probes)
        }
        None => {
            let mut options = EbpfOptions::new(facts.group, paths, folder, Arc::clone(state.storage()));
            options.left_behind = left;
            let tracker = EbpfTracker::open(&options)?;
            let targets: Vec<ReadTarget> = tracker.devices().iter().map(Device::read_target).collect();
            let windows = tracker.devices().iter().map(Window::of).map(Some).collect();
            Ok(((Box::new(tracker), reader::open(&targets)?), windows))
        }
    }
}

fn look(state: &StateFolder, facts: &GroupState, volume: &VolumeConfig) -> Result<Probe> {
    let name = &volume.name;
    let probe = probe::probe(&**state.storage(), &volume.device).with_context(|| format!("volume {name}"))?;
    match facts.protected_size_bytes(volume.slot) {
        Some(before) if before != probe.size_bytes => bail!(
            "volume {name}: {} had {before} bytes when it was protected and has {}; if this is the volume, and has grown: cdp-source protect NAME=DEVICE, or --disk DEVICE, once more",
            volume.device.display(),
            probe.size_bytes
        ),
        _ => Ok(probe),
    }
}

/// Why eBPF cannot serve these volumes.
fn ebpf_obstacle(state: &StateFolder, probes: &[Probe], wants_scan: bool) -> Option<String> {
    if wants_scan {
        return Some("the configuration asks for it".into());
    }
    probes.iter().find_map(|probe| doctor::ebpf_obstacle(&**state.storage(), probe))
}

fn scan(
    state: &StateFolder,
    folder: &std::path::Path,
    paths: &[(VolumeSlot, PathBuf)],
    probes: &[Probe],
) -> Result<(Opened, Vec<Option<Window>>)> {
    let found = probes.iter().map(scan_target).collect::<Result<Vec<_>>>()?;
    let (targets, windows): (Vec<ReadTarget>, _) = found.into_iter().unzip();
    let named: Vec<(VolumeSlot, ReadTarget)> =
        paths.iter().map(|(slot, _)| *slot).zip(targets.iter().cloned()).collect();
    let own = reader::open(&targets)?;
    let tracker = ScanTracker::open(&named, own, Arc::clone(state.storage()), folder, &SystemRandom)?;
    Ok(((Box::new(tracker), reader::open(&targets)?), windows))
}

fn scan_target(probe: &Probe) -> Result<(ReadTarget, Option<Window>)> {
    if probe.is_block() {
        let device = Device::inspect(&probe.device)?;
        return Ok((device.read_target(), Some(Window::of(&device))));
    }
    let target = ReadTarget { node: probe.device.clone(), offset_bytes: 0, size_bytes: probe.size_bytes };
    Ok((target, None))
}
