//! `protect` and `unprotect`: change which volumes a group has. A whole disk (`disk`) is a volume like any other.
//!
//! The configuration is changed under its lock and then, where an agent runs, taken up by it at once. Nothing is changed
//! unless every volume of the command can be protected. A volume that has grown goes on in its slot, with its new size. The slot and size of a volume are durable before the
//! configuration names it: a crash in between wastes a slot and nothing else.

mod disk;

use super::failure::UserError;
use super::show::{print, print_json};
use super::{ProtectArgs, UnprotectArgs, layout};
use crate::agent;
use crate::config::{self, Config, GroupConfig, TrackerChoice, VolumeConfig};
use crate::control::{self, ControlError, Reply, Request};
use crate::doctor;
use crate::layout::Found;
use crate::probe::{self, Probe};
use crate::state::StateFolder;
use crate::tracker::device::Device;
use anyhow::Result;
use cdp_protocol::limits::{VOLUMES_MAX, is_name};
use cdp_protocol::units::VolumeSlot;
use cdp_seams::random::SystemRandom;
use cdp_seams::storage::Storage;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;

/// A volume that is to be protected, looked at.
struct Candidate {
    name: String,
    device: PathBuf,
    probe: Probe,
    tracker: &'static str,
    warnings: Vec<String>,
    /// How it is laid out, where it was named as a whole disk.
    layout: Option<Found>,
    /// Its slot, where it is protected already, and has grown since.
    grown: Option<VolumeSlot>,
}

pub(super) fn protect(state: &StateFolder, args: &ProtectArgs) -> Result<ExitCode> {
    let mut named = args.volumes.iter().map(|text| parse(text)).collect::<Result<Vec<_>>>()?;
    for device in &args.disk {
        named.push(disk::named(state, device)?);
    }
    if !is_name(&args.group) {
        return Err(UserError::new(format!("{:?} cannot name a group", args.group)).hint(NAME_HINT).into());
    }
    let mut looked = look_at(state, named, args.tracker)?;
    // The last of them are disks.
    let volumes = looked.len() - args.disk.len();
    for candidate in &mut looked[volumes..] {
        candidate.layout = Some(disk::look(&candidate.probe)?);
    }
    let lock = state.lock_changes()?;
    let config = state.config()?;
    let candidates = refuse_duplicates(state, &config, &args.group, looked)?;
    let slots = write(state, &config, args, &candidates)?;
    drop(lock);
    let is_taken_up = take_up(state)?;
    report(state, args, &candidates, &slots, is_taken_up)?;
    Ok(ExitCode::SUCCESS)
}

const NAME_HINT: &str = "a name is 1 to 64 of a-z A-Z 0-9 . _ - and does not start with a dot or a dash";

fn parse(text: &str) -> Result<(String, PathBuf)> {
    let Some((name, device)) = text.split_once('=').filter(|(_, device)| !device.is_empty()) else {
        return Err(UserError::new(format!("{text:?} is not NAME=DEVICE")).hint("for example data=/dev/vdb").into());
    };
    if !is_name(name) {
        return Err(UserError::new(format!("{name:?} cannot name a volume")).hint(NAME_HINT).into());
    }
    Ok((name.to_owned(), std::path::absolute(device)?))
}

fn look_at(state: &StateFolder, named: Vec<(String, PathBuf)>, choice: TrackerChoice) -> Result<Vec<Candidate>> {
    let storage = &**state.storage();
    let mut candidates = Vec::new();
    for (name, device) in named {
        let probe = probe::probe(storage, &device)?;
        if probe.is_block() {
            Device::inspect(&probe.device)
                .map_err(|error| UserError::new(format!("{:#}", anyhow::Error::new(error))))?;
        }
        let obstacle = doctor::ebpf_obstacle(storage, &probe);
        let tracker = doctor::tracker_for(choice, obstacle.as_deref()).map_err(|reason| {
            UserError::new(format!("{}: {reason}", device.display())).hint("--tracker scan works here")
        })?;
        let warnings = warnings(storage, state, &probe, choice, tracker, obstacle.as_deref());
        candidates.push(Candidate { name, device, probe, tracker, warnings, layout: None, grown: None });
    }
    Ok(candidates)
}

fn warnings(
    storage: &dyn Storage,
    state: &StateFolder,
    probe: &Probe,
    choice: TrackerChoice,
    tracker: &str,
    obstacle: Option<&str>,
) -> Vec<String> {
    let mut warnings = Vec::new();
    if probe.holds(storage, state.root()) {
        warnings.push(format!("the state folder {} lies on this volume", state.root().display()));
    }
    if choice == TrackerChoice::Auto && probe.is_block() && tracker == "scan" {
        let why = obstacle.map_or_else(String::new, |obstacle| format!(": {obstacle}"));
        warnings.push(format!("eBPF tracking does not work here{why}; scan reads the whole volume at each cut"));
    }
    if !probe.holders.is_empty() {
        let holders = probe.holders.join(", ");
        warnings.push(format!("{holders} is built upon it: protect that instead, if file systems lie there"));
    }
    warnings
}

/// Refuses names and devices that are taken, in the command itself or in any group.
fn refuse_duplicates(
    state: &StateFolder,
    config: &Config,
    group: &str,
    looked: Vec<Candidate>,
) -> Result<Vec<Candidate>> {
    let storage = &**state.storage();
    let volumes = config.groups.iter().flat_map(|(group, config)| config.volumes.iter().map(move |v| (group, v)));
    let known: Vec<(String, Probe)> = volumes
        .filter_map(|(group, v)| Some((format!("{group}/{}", v.name), probe::probe(storage, &v.device).ok()?)))
        .collect();
    let empty = GroupConfig::empty();
    let of_group = config.groups.get(group).unwrap_or(&empty);
    let mut accepted: Vec<Candidate> = Vec::new();
    for mut candidate in looked {
        candidate.grown = grown(state, group, of_group, &candidate)?;
        if candidate.grown.is_some() {
            accepted.push(candidate);
            continue;
        }
        let is_taken = |name: &str| name == candidate.name;
        if of_group.volumes.iter().any(|v| is_taken(&v.name)) || accepted.iter().any(|c| is_taken(&c.name)) {
            return Err(UserError::new(format!("group {group} already has a volume named {:?}", candidate.name))
                .hint("give it another name, or unprotect the other one first")
                .into());
        }
        let in_command = accepted.iter().map(|other| (&other.name, &other.probe));
        let in_config = known.iter().map(|(name, probe)| (name, probe));
        if let Some((other, _)) = in_command.chain(in_config).find(|(_, probe)| probe.overlaps(&candidate.probe)) {
            let device = candidate.device.display();
            return Err(UserError::new(format!("device {device} is already protected as {other}"))
                .hint("a device, or a disk and its partitions, can be protected once")
                .into());
        }
        accepted.push(candidate);
    }
    let added = accepted.iter().filter(|candidate| candidate.grown.is_none()).count();
    if of_group.volumes.len() + added > VOLUMES_MAX {
        return Err(UserError::new(format!("group {group} would have more than {VOLUMES_MAX} volumes"))
            .hint("use another --group")
            .into());
    }
    Ok(accepted)
}

/// The slot of a volume of the group that is this very one, and smaller than its device is by now.
fn grown(state: &StateFolder, group: &str, config: &GroupConfig, candidate: &Candidate) -> Result<Option<VolumeSlot>> {
    let same = |volume: &&VolumeConfig| (&volume.name, &volume.device) == (&candidate.name, &candidate.device);
    let Some(volume) = config.volumes.iter().find(same) else { return Ok(None) };
    let before = state.group(group)?.and_then(|facts| facts.protected_size_bytes(volume.slot));
    Ok(before.filter(|before| *before < candidate.probe.size_bytes).map(|_| volume.slot))
}

fn write(
    state: &StateFolder,
    config: &Config,
    args: &ProtectArgs,
    candidates: &[Candidate],
) -> Result<Vec<VolumeSlot>> {
    let target = super::run::identity(state)?;
    let escrow_public = target.escrow_public;
    let mut group = if let Some(group) = state.group(&args.group)? {
        group
    } else {
        let known = target.groups.get(&args.group).copied();
        state.make_group(&args.group, &SystemRandom, &escrow_public, known)?
    };
    state.renew_envelope(&args.group, &mut group, &escrow_public)?;
    let used = config.groups.get(&args.group).and_then(|group| group.volumes.iter().map(|v| v.slot.0 + 1).max());
    group.next_slot = group.next_slot.max(used.unwrap_or(0));
    let mut text = state.config_text()?;
    let mut slots = Vec::new();
    for candidate in candidates {
        if let Some(slot) = candidate.grown {
            group.set_protected_size_bytes(slot, candidate.probe.size_bytes);
            slots.push(slot);
            continue;
        }
        let slot = VolumeSlot(group.next_slot);
        group.next_slot = group.next_slot.checked_add(1).ok_or_else(|| {
            UserError::new(format!("group {} has used up its 65535 slots", args.group)).hint("use another --group")
        })?;
        group.set_protected_size_bytes(slot, candidate.probe.size_bytes);
        let volume = VolumeConfig {
            name: candidate.name.clone(),
            slot,
            device: candidate.device.clone(),
            tracker: args.tracker,
        };
        text = config::with_volume(&text, &args.group, &volume)?;
        slots.push(slot);
    }
    state.set_group(&args.group, &group)?;
    state.replace_config(&text)?;
    Ok(slots)
}

fn report(
    state: &StateFolder,
    args: &ProtectArgs,
    candidates: &[Candidate],
    slots: &[VolumeSlot],
    is_taken_up: bool,
) -> Result<()> {
    if args.json {
        let volumes: Vec<Value> = candidates
            .iter()
            .zip(slots)
            .map(|(c, slot)| {
                let layout = c.layout.as_ref().map(layout::document);
                json!({ "name": c.name, "slot": slot, "found": c.probe, "tracker": c.tracker, "warnings": c.warnings, "layout": layout })
            })
            .collect();
        return print_json(&json!({ "group": args.group, "volumes": volumes, "taken_up": is_taken_up }));
    }
    for candidate in candidates {
        let (name, found) = (&candidate.name, candidate.probe.describe());
        print(&format!(
            "{}/{name}: {}: {found}; tracker {}",
            args.group,
            candidate.device.display(),
            candidate.tracker
        ))?;
        if let Some(found) = &candidate.layout {
            print(&disk::text(state, &candidate.probe, found))?;
        }
        if candidate.grown.is_some() {
            print("  it has grown, and goes on with its new size")?;
        }
        for warning in &candidate.warnings {
            eprintln!("warning: {name}: {warning}");
        }
    }
    say_whether_taken_up(is_taken_up);
    Ok(())
}

fn say_whether_taken_up(is_taken_up: bool) {
    if is_taken_up {
        eprintln!("the running agent has taken it up");
    } else {
        eprintln!("hint: no agent is running; start it: cdp-source run");
    }
}

/// Has a running agent read the configuration again. `false` where none runs.
fn take_up(state: &StateFolder) -> Result<bool> {
    match control::ask(state, &Request::Reload) {
        Ok(Reply::Failed { message, hint }) => {
            let error = UserError::new(format!("source.toml is changed, but the agent did not take it up: {message}"));
            Err(error.hint(hint.unwrap_or_else(|| "restart the agent".into())).into())
        }
        Ok(_) => Ok(true),
        Err(ControlError::NotRunning(_)) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn unprotect(state: &StateFolder, args: &UnprotectArgs) -> Result<ExitCode> {
    let lock = state.lock_changes()?;
    let config = state.config()?;
    let volumes = config.groups.get(&args.group).map(|group| group.volumes.as_slice()).unwrap_or_default();
    if !volumes.iter().any(|volume| volume.name == args.name) {
        let names: Vec<&str> = volumes.iter().map(|volume| volume.name.as_str()).collect();
        let error = UserError::new(format!("group {} has no volume named {:?}", args.group, args.name));
        return Err(match names.as_slice() {
            [] => error.hint("cdp-source status lists what is protected").into(),
            names => error.hint(format!("it has {}", names.join(", "))).into(),
        });
    }
    state.replace_config(&config::without_volume(&state.config_text()?, &args.group, &args.name)?)?;
    drop(lock);
    let is_taken_up = take_up(state)?;
    let is_empty = state.config()?.groups.get(&args.group).is_none_or(|group| group.volumes.is_empty());
    if is_empty && !is_taken_up {
        // A running agent does this itself; without one nobody else would, and the kernel would go on marking.
        agent::forget_tracking(state, &args.group);
    }
    print(&format!("{}/{} is no longer protected; its points stay", args.group, args.name))?;
    say_whether_taken_up(is_taken_up);
    Ok(ExitCode::SUCCESS)
}
