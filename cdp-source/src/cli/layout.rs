//! A disk's layout as commands tell it, and which device is a whole disk.

use super::failure::UserError;
use crate::layout::Found;
use crate::probe::{Kind, Probe};
use anyhow::Result;
use cdp_protocol::layout::{Content, Layout, Partition, Table};
use serde_json::{Value, json};

/// Refuses what is no whole disk of a machine; `or`: what does for it instead.
pub(super) fn refuse_pieces(probe: &Probe, or: &str) -> Result<()> {
    let device = probe.device.display();
    if let Kind::Block { disk, partition: Some(number), .. } = &probe.kind {
        let error = UserError::new(format!("{device} is partition {number} of {disk}, not a whole disk"));
        return Err(error.hint(format!("/dev/{disk} is the whole disk; {or}")).into());
    }
    let Some(stack) = &probe.stack else { return Ok(()) };
    if !stack.over.is_empty() {
        let below: Vec<&str> = stack.over.iter().map(|layer| layer.name.as_str()).collect();
        let error = UserError::new(format!("{device} is {stack}, not a disk of the machine"));
        return Err(error.hint(format!("the disks it is built of are below {}; {or}", below.join(", "))).into());
    }
    if stack.what == "zram" {
        let error = UserError::new(format!("{device} is memory, not a disk of the machine"));
        return Err(error.hint(or).into());
    }
    Ok(())
}

/// The layout in lines, for people. `notes`: what else is known of a partition.
pub(super) fn text(found: &Found, notes: impl Fn(&Partition) -> String) -> String {
    let Layout { table, has_boot_code, partitions, sector_bytes, .. } = &found.layout;
    let boot = if *has_boot_code { "with boot code" } else { "without boot code" };
    let mut lines = Vec::new();
    match (table, found.content) {
        (Table::None, Content::Unknown) => lines.push("  no partition table, and no content that is known".to_owned()),
        (Table::None, content) => lines.push(format!("  no partition table: {} on the whole disk", content.name())),
        _ => lines.push(format!("  {} in sectors of {sector_bytes} bytes, {boot}", table.name())),
    }
    if let Some(first) = partitions.iter().map(|partition| partition.start_bytes).min() {
        lines.push(format!("  boot area of {first} bytes before the first partition"));
    }
    for partition in partitions {
        let Partition { number, start_bytes, size_bytes, content, name, is_active, .. } = partition;
        let kind = partition.kind_name();
        let name = if name.is_empty() { String::new() } else { format!(" {name:?}") };
        let active = if *is_active { ", active" } else { "" };
        let (content, notes) = (content.name(), notes(partition));
        lines.push(format!(
            "  partition {number}{name} at {start_bytes}, {size_bytes} bytes: {kind}{active}, {content}{notes}"
        ));
    }
    lines.extend(found.broken.iter().map(|what| format!("  warning: {what}")));
    lines.join("\n")
}

/// The layout as a document.
pub(super) fn document(found: &Found) -> Value {
    let mut document = json!(found.layout);
    document["content"] = json!(Some(found.content.name()).filter(|_| found.content != Content::Unknown));
    document["broken"] = json!(found.broken);
    document
}
