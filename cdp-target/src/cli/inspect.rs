//! `inspect`: what is in a file of the store, without the server and without a key.

use super::failure::Failure;
use super::output::{Table, bytes, json};
use super::{context, print};
use crate::inspect::{
    Description, FrameDescription, ImageDescription, InspectError, PackDescription, SegmentDescription, inspect,
};
use crate::journal::{Damage, Manifest};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `inspect`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// A segment, a pack, an image index or a manifest.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// One JSON document.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let described = inspect(context::storage().as_ref(), &arguments.file).map_err(|error| match error {
        InspectError::Unknown(_) => Failure::user(error).hint("they are below offices/ in the store"),
        InspectError::Journal(_) | InspectError::Pack { .. } | InspectError::Image { .. } => Failure::user(error),
    });
    let described = described.map_err(|failure| failure.context(format!("inspect {}", arguments.file.display())))?;
    if arguments.json {
        print(&json(&described))?;
    } else {
        print(&match described {
            Description::Segment(segment) => segment_text(&segment),
            Description::Manifest(manifest) => manifest_text(&manifest),
            Description::Pack(pack) => pack_text(&pack),
            Description::Image(image) => image_text(&image),
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

fn segment_text(segment: &SegmentDescription) -> String {
    let sealed = if segment.sealed { "sealed" } else { "open" };
    let head = segment.head.map_or_else(|| "none".to_owned(), |head| head.epoch.to_string());
    let mut text = format!(
        "segment {} of group {}, {sealed}, {}\ngeneration {}, newest point before it: {head}\n\
         frames end at {}, durable up to {}\n",
        segment.number,
        segment.group,
        bytes(segment.bytes),
        segment.generation,
        segment.frames_end,
        segment.proven,
    );
    text.push_str(&frames_text(&segment.frames, &segment.damages));
    text
}

fn pack_text(pack: &PackDescription) -> String {
    let how = if pack.repacked { "sealed anew" } else { "frames taken over whole" };
    let (of, group, len, end) = (pack.of, pack.group, bytes(pack.bytes), pack.frames_end);
    let frames = frames_text(&pack.frames, &pack.damages);
    format!("{of}, of group {group}: {how}, {len}\nframes end at {end}\n{frames}")
}

fn image_text(image: &ImageDescription) -> String {
    let ImageDescription { group, epoch, copies_agree, slices } = image;
    let mut text = format!("image index of group {group} at point {epoch}: {} slices\n", slices.len());
    if !copies_agree {
        text.push_str("its two copies are not the same\n");
    }
    for slice in slices {
        let pack = if slice.damaged { "damaged" } else { slice.pack.as_deref().unwrap_or("zeros") };
        write!(text, "volume {} slice {}: {pack}", slice.volume, slice.slice).expect("text takes anything");
        if slice.pack.is_some() {
            let (held, needed) = (bytes(slice.held_bytes), bytes(slice.needed_bytes));
            write!(text, ", {held} held, {needed} needed").expect("text takes anything");
        }
        text.push('\n');
    }
    text
}

fn frames_text(frames: &[FrameDescription], damages: &[Damage]) -> String {
    let columns = [">offset", ">bytes", "kind", ">epoch", "attempt", ">sequence", ">volume", ">extents", ">blocks"];
    let mut table = Table::new(&columns);
    for frame in frames {
        table.row(vec![
            frame.offset.to_string(),
            frame.bytes.to_string(),
            frame.kind.clone(),
            frame.epoch.to_string(),
            frame.attempt.to_string()[..8].to_owned(),
            frame.sequence.to_string(),
            frame.volume.map_or_else(|| "-".to_owned(), |volume| volume.to_string()),
            frame.extents.to_string(),
            frame.blocks.to_string(),
        ]);
    }
    let mut text = table.render();
    for damage in damages {
        writeln!(text, "damaged: offset {} len {}: {}", damage.offset, damage.len, damage.what)
            .expect("text takes anything");
    }
    text
}

fn manifest_text(manifest: &Manifest) -> String {
    let identity = &manifest.identity;
    let mut text = format!(
        "manifest of group {} ({}/{}), generation {}\n{} sealed segments, open segment {}, {} labels and pins\n",
        identity.group,
        identity.office,
        identity.name,
        manifest.generation,
        manifest.sealed.len(),
        manifest.open,
        manifest.marks.len(),
    );
    if let Some(reason) = &manifest.frozen {
        writeln!(text, "frozen: {reason}").expect("text takes anything");
    }
    let mut table = Table::new(&[">segment", ">bytes", ">frames end", ">first epoch", ">last epoch"]);
    for sealed in &manifest.sealed {
        let epoch =
            |epoch: Option<cdp_protocol::units::Epoch>| epoch.map_or_else(|| "-".to_owned(), |epoch| epoch.to_string());
        table.row(vec![
            sealed.number.to_string(),
            sealed.len.to_string(),
            sealed.frames_end.to_string(),
            epoch(sealed.points.map(|points| points.first)),
            epoch(sealed.points.map(|points| points.last)),
        ]);
    }
    if !manifest.sealed.is_empty() {
        text.push_str(&table.render());
    }
    for checkpoint in &manifest.checkpoints {
        let (epoch, held, needed) = (checkpoint.epoch, bytes(checkpoint.held_bytes), bytes(checkpoint.needed_bytes));
        writeln!(text, "checkpoint at point {epoch}: {held} held, {needed} needed").expect("text takes anything");
    }
    for (first, last) in manifest.removed.ranges() {
        writeln!(text, "removed: points {first} to {last}").expect("text takes anything");
    }
    if let Some(floor) = manifest.floor {
        writeln!(text, "floor: checkpoint {floor}; there is no content below it").expect("text takes anything");
    }
    for damage in &manifest.damages {
        let (place, offset, len) = (damage.place(), damage.offset, damage.len);
        writeln!(text, "damaged: {place} offset {offset} len {len}: {}", damage.what).expect("text takes anything");
    }
    text
}
