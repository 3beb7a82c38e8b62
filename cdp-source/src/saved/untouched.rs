//! Whether anything was written to a device since it appeared, by the kernel's own counts.
//!
//! They begin at zero with the device and count every write by its partition as well. So a partition is untouched if it counts
//! nothing itself, and its disk counts nothing that the other partitions do not. Passthrough commands are not counted.

use crate::tracker::DiskCounts;
use crate::tracker::device::{Device, DeviceNumber, partitions_of, place_of};
use std::io;

/// How often the counts of a disk that is in use are asked for until nothing moves meanwhile.
const ASKED_MAX: u32 = 100;

/// Why something may have been written to `device` since it appeared; `None` where nothing was.
pub(super) fn why_not(device: &Device) -> Option<String> {
    look(device).unwrap_or_else(|error| Some(format!("the kernel does not tell what was written to it: {error}")))
}

fn look(device: &Device) -> io::Result<Option<String>> {
    if DiskCounts::read(device.disk)?.is_off {
        return Ok(Some("the kernel does not count what is written to its disk (queue/iostats is 0)".to_owned()));
    }
    let own = DiskCounts::read(device.number)?;
    if written(&own) != 0 || own.in_flight != 0 {
        return Ok(Some(format!("{} sectors were written to it since the machine was started", written(&own).max(1))));
    }
    if device.number == device.disk { Ok(None) } else { look_beside(device) }
}

/// Whether all that was written to the disk of a partition was written by way of other partitions, which lie elsewhere.
fn look_beside(device: &Device) -> io::Result<Option<String>> {
    let partitions = partitions_of(device.disk)?;
    let mut before = counts(&partitions)?;
    for _ in 0..ASKED_MAX {
        let disk = written(&DiskCounts::read(device.disk)?);
        let after = counts(&partitions)?;
        if before == after {
            if disk != after.iter().sum::<u64>() {
                return Ok(Some(
                    "its disk was written to past its partitions since the machine was started".to_owned(),
                ));
            }
            return overlapping(device, &partitions, &after);
        }
        before = after;
    }
    Ok(Some("its disk is written to all the time".to_owned()))
}

fn overlapping(device: &Device, partitions: &[DeviceNumber], written: &[u64]) -> io::Result<Option<String>> {
    for (partition, _) in partitions.iter().zip(written).filter(|(_, written)| **written > 0) {
        let (_, start, length) = place_of(*partition)?;
        if start.0 < device.start.0 + device.length.0 && device.start.0 < start.0 + length.0 {
            return Ok(Some(format!("partition {partition}, which it shares sectors with, was written to")));
        }
    }
    Ok(None)
}

fn counts(partitions: &[DeviceNumber]) -> io::Result<Vec<u64>> {
    partitions.iter().map(|partition| Ok(written(&DiskCounts::read(*partition)?))).collect()
}

fn written(counts: &DiskCounts) -> u64 {
    counts.written + counts.discarded
}
