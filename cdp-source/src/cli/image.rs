//! `image`: local images made ready, made, listed, proved.
//!
//! Making is the agent's; this waits for it, and whoever ends the command leaves it going on. Listing and proving need no agent and no
//! configuration where the folder is named: a machine that has the group's key and nothing else can do both.

use super::failure::UserError;
use super::show::{ask, print, print_json};
use super::{ImageArgs, ImageCommand, VerifyArgs};
use crate::agent::status::{GroupStatus, rfc3339};
use crate::config::LocalImageConfig;
use crate::control::{Reply, Request};
use crate::local_image::ImageError;
use crate::local_image::check;
use crate::local_image::folder::{self, Checked, ImageFolder, Listed, Listing};
use crate::local_image::named;
use crate::local_image::reader::ImageFile;
use crate::local_image::status::{ImagePhase, LocalImageStatus};
use crate::state::StateFolder;
use anyhow::{Context, Result, bail};
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{BLOCK_BYTES, GroupId, Timestamp};
use cdp_seams::clock::{Clock, SystemClock};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// How often the agent is asked how far it is.
const ASK_EVERY: Duration = Duration::from_millis(300);

pub(super) fn image(state: &StateFolder, command: &ImageCommand) -> Result<ExitCode> {
    match command {
        ImageCommand::Init(args) => init(state, args),
        ImageCommand::Now(args) => now(state, args),
        ImageCommand::Ls(args) => list(state, args),
        ImageCommand::Verify(args) => verify(state, args),
    }
}

fn configured(state: &StateFolder, group: &str) -> Result<LocalImageConfig> {
    let config = state.config()?;
    let found = config.groups.get(group).and_then(|group| group.local_image.clone());
    found.ok_or_else(|| {
        UserError::new(format!("group {group} has no local_image in source.toml"))
            .hint(format!("write local_image.folder = \"/mnt/…\" under [groups.{group}]; or name one with --from"))
            .into()
    })
}

fn init(state: &StateFolder, args: &ImageArgs) -> Result<ExitCode> {
    let folder = match &args.from {
        Some(folder) => std::path::absolute(folder).context("the folder's path")?,
        None => configured(state, &args.group)?.folder,
    };
    let config = state.config()?;
    let volumes: Vec<PathBuf> =
        config.groups.values().flat_map(|group| group.volumes.iter().map(|volume| volume.device.clone())).collect();
    let facts = state.group(&args.group)?.ok_or_else(|| {
        UserError::new(format!("no group named {:?} is protected", args.group)).hint("cdp-source protect NAME=DEVICE")
    })?;
    let path = folder::init(state.storage(), &folder, &volumes, (&args.group, facts.group))?;
    if args.json {
        print_json(&json!({ "group": args.group, "folder": path }))?;
    } else {
        print(&format!("{} is ready for the images of group {}", path.display(), args.group))?;
        eprintln!("hint: the agent makes one when it is due; now: cdp-source image now");
    }
    Ok(ExitCode::SUCCESS)
}

fn now(state: &StateFolder, args: &ImageArgs) -> Result<ExitCode> {
    // A group that has just been started does not tell of them yet.
    let before = loop {
        match standing(state, &args.group)? {
            Some(status) if status.since == Timestamp::default() => wait(),
            status => break status.unwrap_or_default(),
        }
    };
    let Reply::Image = ask(state, &Request::Image { group: args.group.clone() })? else {
        bail!("the agent did not answer the wish for an image")
    };
    let bar = bar("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left");
    let status = loop {
        let status = standing(state, &args.group)?;
        let status = status.with_context(|| format!("the agent keeps no images of group {} any more", args.group))?;
        if status.since != before.since {
            let error =
                UserError::new("the agent was started again, or reads another configuration: the image was given up");
            return Err(error.hint("give the same command again").into());
        }
        if status.tries > before.tries && status.phase.is_none() {
            break status;
        }
        show(&bar, &status);
        wait();
    };
    bar.finish_and_clear();
    if let Some(failure) = status.failure {
        let error = UserError::new(failure.reason);
        return Err(if let Some(hint) = failure.hint { error.hint(hint) } else { error }.into());
    }
    let last = status.last.context("the agent tells of no image")?;
    if args.json {
        let mut value = serde_json::to_value(&last)?;
        (value["time"], value["made"]) = (json!(rfc3339(last.time)), json!(rfc3339(last.made)));
        print_json(&value)?;
    } else {
        print(&format!(
            "image of point {} of {}: {} bytes in {}, made and verified in {:.1} s",
            last.epoch,
            rfc3339(last.time),
            last.bytes,
            last.path.display(),
            last.seconds
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Until the agent is asked again.
fn wait() {
    std::thread::sleep(ASK_EVERY);
}

fn standing(state: &StateFolder, group: &str) -> Result<Option<LocalImageStatus>> {
    let Reply::Status(status) = ask(state, &Request::Status)? else { bail!("the agent does not tell its status") };
    let of_group = |status: &GroupStatus| status.group == group;
    Ok(status.groups.into_iter().find(of_group).and_then(|status| status.local_image))
}

/// How the images of a group stand, for `status`.
pub(super) fn status_lines(status: &LocalImageStatus) -> Vec<String> {
    let last = status.last.as_ref().map_or_else(
        || "none yet".to_owned(),
        |last| format!("the last of point {} of {}, {} bytes", last.epoch, rfc3339(last.time), last.bytes),
    );
    let percent = |done: u64| done.saturating_mul(100).checked_div(status.all_bytes).unwrap_or_default();
    let now = status.phase.map_or_else(String::new, |phase| match phase {
        ImagePhase::Reading => format!("; one is made, {} % read", percent(status.done_bytes)),
        ImagePhase::Closing => "; one is made, and waits for its point".to_owned(),
        ImagePhase::Verifying => format!("; one is made, {} % verified", percent(status.done_bytes)),
    });
    let next = status.next.map_or_else(String::new, |next| format!("; the next is due {}", rfc3339(next)));
    let mut lines = vec![format!("  local images in {}: {last}{next}{now}", status.folder.display())];
    lines.extend(status.alarm().map(|alarm| format!("  ALARM: local image: {alarm}")));
    lines
}

fn bar(template: &str) -> ProgressBar {
    ProgressBar::new(0).with_style(ProgressStyle::with_template(template).expect("the template is constant"))
}

fn show(bar: &ProgressBar, status: &LocalImageStatus) {
    let phase = match status.phase {
        None => "waiting",
        Some(ImagePhase::Reading) => "reading",
        Some(ImagePhase::Closing) => "closing",
        Some(ImagePhase::Verifying) => "verifying",
    };
    if bar.message() != phase {
        bar.reset();
        bar.set_message(phase);
    }
    bar.set_length(status.all_bytes);
    bar.set_position(status.done_bytes);
}

/// The folder of images that is meant, and what opens them.
fn opened(state: &StateFolder, args: &ImageArgs) -> Result<(ImageFolder, PathBuf, GroupId, DataKey)> {
    let folder = match &args.from {
        Some(folder) => folder.clone(),
        None => configured(state, &args.group)?.folder,
    };
    let key = state.data_key(&args.group)?;
    let (path, group) = folder::find(&**state.storage(), &folder, &args.group)?;
    if let Some(known) = state.group(&args.group)?.map(|facts| facts.group).filter(|known| *known != group) {
        return Err(ImageError::OtherGroup { path, found: group, wanted: known }.into());
    }
    Ok((ImageFolder::open(Arc::clone(state.storage()), &path, group)?, path, group, key))
}

fn list(state: &StateFolder, args: &ImageArgs) -> Result<ExitCode> {
    let (folder, path, _, key) = opened(state, args)?;
    let Listing { images, unreadable } = folder.list(&key)?;
    let text = |error: ImageError| format!("{:#}", anyhow::Error::new(error));
    if args.json {
        let unreadable: Vec<Value> = unreadable
            .into_iter()
            .map(|(path, error)| json!({ "image": path.file_name().map(|name| name.to_string_lossy()), "reason": text(error) }))
            .collect();
        let images: Vec<Value> = images.iter().map(Listed::document).collect();
        print_json(&json!({ "group": args.group, "folder": path, "images": images, "unreadable": unreadable }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut lines =
        vec![format!("{:>10}  {:24}  {:>14}  {:>14}  {:24}  file", "epoch", "time", "volumes", "bytes", "verified")];
    lines.extend(images.iter().map(|listed| {
        let size: u64 = listed.footer.volumes.iter().map(|entry| entry.volume.size_bytes).sum();
        let (time, file) = (rfc3339(listed.footer.cut_time), listed.path.file_name().unwrap_or_default());
        let (epoch, file) = (listed.footer.epoch.0, file.to_string_lossy());
        format!("{epoch:>10}  {time:24}  {size:>14}  {:>14}  {:24}  {file}", listed.bytes, verified(listed))
    }));
    if images.is_empty() {
        lines = vec![format!("there are no images in {}", path.display())];
    }
    print(&lines.join("\n"))?;
    for (_, error) in unreadable {
        eprintln!("warning: passed over: {}", text(error));
    }
    Ok(ExitCode::SUCCESS)
}

fn verified(listed: &Listed) -> String {
    match &listed.checked {
        None => "-".into(),
        Some(checked) if checked.damage.is_some() => "DAMAGED".into(),
        Some(checked) => checked.time.clone(),
    }
}

fn verify(state: &StateFolder, args: &VerifyArgs) -> Result<ExitCode> {
    let (folder, path, group, key) = opened(state, &args.image)?;
    let Listing { mut images, unreadable } = folder.list(&key)?;
    let clock = SystemClock::new();
    if let Some(at) = &args.at {
        let found = named::find(&images, at, Timestamp(clock.wall_ms()))?.path.clone();
        images.retain(|listed| listed.path == found);
    }
    let mut results = Vec::new();
    for listed in &mut images {
        let damage = prove(state, listed, group, &key);
        listed.checked = Some(Checked::at(Timestamp(clock.wall_ms()), damage.clone()));
        if let Err(error) = folder.write_manifest(listed) {
            // One that cannot be written to can be read and proved all the same.
            eprintln!("warning: that is not kept: {:#}", anyhow::Error::new(error));
        }
        results.push((listed.path.clone(), damage));
    }
    if args.at.is_none() {
        let text = |error: ImageError| format!("{:#}", anyhow::Error::new(error));
        results.extend(unreadable.into_iter().map(|(path, error)| (path, Some(text(error)))));
    }
    if results.is_empty() {
        return Err(UserError::new(format!("there are no images in {}", path.display())).into());
    }
    tell(args, &results)
}

/// Reads an image again; gives what is damaged in it.
fn prove(state: &StateFolder, listed: &Listed, group: GroupId, key: &DataKey) -> Option<String> {
    let bar = bar("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left");
    bar.set_message(format!("point {}", listed.footer.epoch));
    bar.set_length(listed.footer.volumes.iter().map(|entry| entry.volume.size_bytes).sum());
    let mut on_blocks = |blocks: u64| {
        bar.set_position(blocks * BLOCK_BYTES as u64);
        true
    };
    let opened = ImageFile::open(&**state.storage(), &listed.path, group, key);
    let proved = opened.and_then(|mut image| check::verify(&mut image, key, &mut on_blocks));
    bar.finish_and_clear();
    proved.err().map(|error| format!("{:#}", anyhow::Error::new(error)))
}

fn tell(args: &VerifyArgs, results: &[(PathBuf, Option<String>)]) -> Result<ExitCode> {
    let damaged = results.iter().filter(|(_, damage)| damage.is_some()).count();
    if args.image.json {
        let all: Vec<Value> = results.iter().map(|(path, damage)| json!({ "image": path, "damage": damage })).collect();
        print_json(&json!({ "group": args.image.group, "images": all, "damaged": damaged }))?;
    } else {
        let line = |(path, damage): &(PathBuf, Option<String>)| match damage {
            None => format!("whole    {}", path.display()),
            Some(damage) => format!("DAMAGED  {damage}"),
        };
        print(&results.iter().map(line).collect::<Vec<_>>().join("\n"))?;
    }
    if damaged > 0 {
        eprintln!("error: {damaged} of {} images are damaged", results.len());
        eprintln!("hint: the others can be restored from; make a new one: cdp-source image now");
    }
    Ok(ExitCode::from(u8::from(damaged > 0)))
}
