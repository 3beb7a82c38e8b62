//! The volumes: what is protected, and each mounted file system that is not.
//!
//! Tells of every one what it is built of, which tracker serves it or would, and what the tracking takes of the kernel's
//! memory. Does not open the tracking.

use super::{Finding, SCAN_WORKS, ebpf_obstacle, tracker_for};
use crate::config::{Config, TrackerChoice, VolumeConfig};
use crate::probe::{self, Probe};
use crate::restore::marker::Restoring;
use crate::state::StateFolder;
use crate::tracker::device::Device;
use crate::tracker::memory::kernel_memory_bytes;
use crate::unprotected::{self, Unprotected, Wanted};
use cdp_seams::storage::Storage;
use std::path::Path;

const IOSTATS_ADVICE: &str = "echo 1 > /sys/block/DISK/queue/iostats: the kernel's own counts prove the tracker's; \
    without them everything is read again whenever a write may have been missed";

/// Every protected volume.
pub(super) fn protected(state: &StateFolder, config: &Config) -> Vec<Finding> {
    let findings: Vec<Finding> = volumes(config).map(|(group, volume)| volume_finding(state, group, volume)).collect();
    if findings.is_empty() {
        return vec![Finding::warn("volumes", "none is protected", "cdp-source protect NAME=DEVICE")];
    }
    findings
}

/// Kernel memory in bytes that tracking all of `config` takes at most.
pub(super) fn tracking_memory_bytes(storage: &dyn Storage, config: &Config) -> u64 {
    let of_group = |volumes: &[VolumeConfig]| {
        let tracked = volumes.iter().filter_map(|volume| {
            let probe = probe::probe(storage, &volume.device).ok()?;
            let tracker = tracker_for(volume.tracker, ebpf_obstacle(storage, &probe).as_deref());
            (tracker == Ok("ebpf")).then_some(probe.size_bytes)
        });
        kernel_memory_bytes(&tracked.collect::<Vec<_>>())
    };
    config.groups.values().map(|group| of_group(&group.volumes)).sum()
}

fn volumes(config: &Config) -> impl Iterator<Item = (&String, &VolumeConfig)> {
    config.groups.iter().flat_map(|(group, config)| config.volumes.iter().map(move |volume| (group, volume)))
}

/// Restores that were begun and are not over.
pub(super) fn restoring(state: &StateFolder, config: &Config) -> Vec<Finding> {
    let found = config.groups.keys().filter_map(|group| {
        let subject = format!("restore in group {group}");
        match Restoring::load(state, group) {
            Ok(restoring) => restoring.map(|restoring| {
                let found = format!("{}; it is neither old nor new", restoring.describe());
                Finding::warn(&subject, found, &format!("unless it runs just now: {}", restoring.command(group)))
            }),
            Err(error) => Some(Finding::fail(&subject, error.to_string(), "restore the volume once more")),
        }
    });
    found.collect()
}

fn volume_finding(state: &StateFolder, group: &str, volume: &VolumeConfig) -> Finding {
    let storage = &**state.storage();
    let subject = format!("volume {group}/{}", volume.name);
    let looked = probe::probe(storage, &volume.device).map_err(|error| {
        let advice = error.hint().unwrap_or("bring the device back, or unprotect the volume");
        Finding::fail(&subject, format!("{:#}", anyhow::Error::new(error)), advice)
    });
    let probe = match looked {
        Ok(probe) => probe,
        Err(finding) => return finding,
    };
    let obstacle = ebpf_obstacle(storage, &probe);
    let tracker = match tracker_for(volume.tracker, obstacle.as_deref()) {
        Ok(tracker) => tracker,
        Err(reason) => return Finding::fail(&subject, reason, SCAN_WORKS),
    };
    let told = told(&probe, tracker);
    if probe.holds(storage, state.root()) {
        let advice = "every log line written there is part of the next point; better keep the state folder elsewhere";
        return Finding::warn(&subject, format!("{told}; the state folder lies on it"), advice);
    }
    if let (TrackerChoice::Auto, Some(obstacle), true) = (volume.tracker, &obstacle, probe.is_block()) {
        return Finding::warn(
            &subject,
            format!("{told}; eBPF cannot serve it: {obstacle}"),
            "scan reads all of it at each cut",
        );
    }
    if tracker == "ebpf" && !has_iostats(&probe.device) {
        return Finding::warn(&subject, format!("{told}; its iostats are off"), IOSTATS_ADVICE);
    }
    Finding::ok(&subject, told)
}

/// Every mounted file system on a device that no protected volume holds.
pub(super) fn unprotected(storage: &dyn Storage, config: &Config) -> Vec<Finding> {
    let found = unprotected::unprotected(storage, &Wanted::from(config));
    found.iter().map(|entry| mount_finding(storage, entry)).collect()
}

fn mount_finding(storage: &dyn Storage, entry: &Unprotected) -> Finding {
    const ADVICE: &str = "cdp-source protect NAME=DEVICE; or name it in leave_unprotected of source.toml";
    let subject = format!("file system {}", entry.mounted_on.join(", "));
    let told = match probe::probe(storage, &entry.device) {
        Ok(probe) => {
            let tracker = tracker_for(TrackerChoice::Auto, ebpf_obstacle(storage, &probe).as_deref());
            told(&probe, tracker.unwrap_or("scan"))
        }
        Err(error) => format!("{}: {:#}", entry.device.display(), anyhow::Error::new(error)),
    };
    let found = format!("not protected: {} on {told}", entry.file_system);
    if entry.is_left {
        return Finding::ok(&subject, format!("{found}; left so by the configuration"));
    }
    Finding::warn(&subject, found, ADVICE)
}

fn told(probe: &Probe, tracker: &str) -> String {
    let told = format!("{}: {}, tracker {tracker}", probe.device.display(), probe.describe());
    if tracker == "ebpf" {
        return format!("{told}, {} bytes of kernel memory", kernel_memory_bytes(&[probe.size_bytes]));
    }
    told
}

fn has_iostats(device: &Path) -> bool {
    Device::inspect(device).is_ok_and(|device| device.iostats)
}
