//! `protect --disk`: a whole disk as one volume, named as the kernel names it (`docs/decisions/2026-11-27-a-disk-is-one-volume.md`).

use crate::cli::failure::UserError;
use crate::cli::layout as told;
use crate::layout::{self, Found};
use crate::probe::{self, Kind, Probe};
use crate::reader;
use crate::state::StateFolder;
use crate::tracker::device::{self, Device};
use anyhow::{Context, Result};
use cdp_protocol::layout::Partition;
use cdp_protocol::limits::is_name;
use std::path::{Path, PathBuf};

/// What does for a device that is no disk.
const OR: &str = "NAME=DEVICE protects a device by itself";

/// The name of the volume that a disk becomes, and its device.
pub(super) fn named(state: &StateFolder, path: &Path) -> Result<(String, PathBuf)> {
    let storage = &**state.storage();
    let path = std::path::absolute(path)?;
    let probe = probe::probe(storage, &path)?;
    let Kind::Block { disk, .. } = &probe.kind else {
        let error = UserError::new(format!("{} is an image file, not a disk of the machine", path.display()));
        return Err(error.hint(OR).into());
    };
    told::refuse_pieces(&probe, OR)?;
    let is_file = probe.stack.as_ref().is_some_and(|stack| stack.what.starts_with("loop device"));
    if is_file && probe.holds(storage, state.root()) {
        let (device, folder) = (path.display(), state.root().display());
        let error =
            UserError::new(format!("{device} is a file of another disk, and the state folder {folder} lies on it"));
        return Err(error.hint("protect the disk that the file lies on, or put the state folder elsewhere").into());
    }
    if !is_name(disk) {
        let error = UserError::new(format!("{disk:?} cannot name a volume"));
        return Err(error.hint(format!("give it a name: cdp-source protect NAME={}", path.display())).into());
    }
    Ok((disk.clone(), path))
}

/// How a disk is laid out.
pub(super) fn look(probe: &Probe) -> Result<Found> {
    let device = Device::inspect(&probe.device)?;
    let mut reader = reader::open(&[device.read_target()])?;
    let sector_bytes =
        device.sector_bytes().with_context(|| format!("ask for the sectors of {}", probe.device.display()))?;
    let mut read = |offset: u64, buffer: &mut [u8]| reader::read_at(&mut *reader, 0, offset, buffer);
    layout::look(&mut read, probe.size_bytes, &[sector_bytes])
        .with_context(|| format!("read the partition table of {}", probe.device.display()))
}

/// What was found, and what comes of it.
pub(super) fn text(state: &StateFolder, probe: &Probe, found: &Found) -> String {
    let storage = &**state.storage();
    let numbers = match &probe.kind {
        Kind::Block { number, .. } => device::partitions_of_number(number).unwrap_or_default(),
        Kind::File { .. } => Vec::new(),
    };
    let nodes = numbers.iter().filter_map(|number| device::node_of(&number.to_string()).ok());
    let partitions: Vec<Probe> = nodes.filter_map(|node| probe::probe(storage, &node).ok()).collect();
    let said = |partition: &Partition| {
        let is_it =
            |probe: &&Probe| matches!(probe.kind, Kind::Block { partition: Some(n), .. } if n == partition.number);
        let Some(probe) = partitions.iter().find(is_it) else { return String::new() };
        let mounted = probe.mounted_on.iter().map(|folder| format!(", mounted on {folder}"));
        let holders = probe.holders.iter().map(|holder| format!(", under {holder}"));
        mounted.chain(holders).collect()
    };
    let lines = told::text(found, said);
    format!(
        "{lines}\n  one volume: all of this is in every point, and `restore --disk` puts it back onto an empty disk"
    )
}
