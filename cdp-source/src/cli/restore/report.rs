//! What a restore tells: how far it is, what it did, or would do.

use super::machine::Machine;
use crate::agent::status::rfc3339;
use crate::cli::RestoreArgs;
use crate::cli::show::{class_name, print as say, print_json};
use crate::restore::{Lost, Plan, Progress};
use crate::state::StateFolder;
use anyhow::Result;
use cdp_protocol::recall::OpenedPoint;
use cdp_protocol::units::{BLOCK_BYTES, Epoch};
use indicatif::{ProgressBar, ProgressStyle};
use roaring::RoaringBitmap;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Runs of blocks that are listed for people; all of them stand in the JSON.
const LOST_LISTED: usize = 10;

/// What it came to.
pub(super) struct Outcome {
    /// The volume's name.
    pub(super) volume: String,
    pub(super) plan: Plan,
    pub(super) device: PathBuf,
    /// Bytes that came over the line.
    pub(super) line_bytes: u64,
    /// What is said of a whole disk.
    pub(super) machine: Option<Machine>,
    pub(super) done: Done,
}

/// Whether anything was written.
pub(super) enum Done {
    Looked(Estimate),
    Restored { kept: Option<Epoch>, fetched_bytes: u64, seconds: f64 },
}

/// What a restore would take, by a sample of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Estimate {
    line_bytes: u64,
    /// Unknown where there is nothing to measure it by.
    bytes_per_s: Option<f64>,
}

impl Estimate {
    /// By what came for some of the blocks, in so long.
    pub(super) fn of(plan: &Plan, sample: &RoaringBitmap, sample_bytes: u64, took: Duration) -> Self {
        let share = plan.fetch.len() as f64 / sample.len().max(1) as f64;
        let bytes_per_s = (sample_bytes > 0).then(|| sample_bytes as f64 / took.as_secs_f64().max(1e-6));
        Self { line_bytes: (sample_bytes as f64 * share).round() as u64, bytes_per_s }
    }

    fn seconds(self) -> Option<f64> {
        self.bytes_per_s.map(|rate| self.line_bytes as f64 / rate)
    }
}

/// A bar on stderr, where that is a terminal.
pub(super) struct Bar {
    shown: ProgressBar,
    volume: String,
    phase: &'static str,
}

impl Bar {
    pub(super) fn new(volume: &str) -> Self {
        let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left")
            .expect("the template is constant");
        Self { shown: ProgressBar::new(0).with_style(style), volume: volume.to_owned(), phase: "" }
    }

    pub(super) fn show(&mut self, progress: Progress) {
        let (phase, done, all) = match progress {
            Progress::Comparing(done, all) => ("read", done, all),
            Progress::Asking(done, all) => ("compare", done, all),
            Progress::Writing(done, all) => ("restore", done, all),
        };
        if phase != self.phase {
            self.phase = phase;
            self.shown.reset();
            self.shown.set_message(format!("{}: {phase}", self.volume));
        }
        self.shown.set_length(bytes(all));
        self.shown.set_position(bytes(done));
    }

    pub(super) fn clear(&self) {
        self.shown.finish_and_clear();
    }
}

fn bytes(blocks: u64) -> u64 {
    blocks * BLOCK_BYTES as u64
}

/// Prints it; 1 where blocks of the point could not be had.
pub(super) fn print(
    state: &StateFolder,
    args: &RestoreArgs,
    point: &OpenedPoint,
    outcome: &Outcome,
) -> Result<ExitCode> {
    if args.json {
        print_json(&document(args, point, outcome))?;
    } else {
        say(&text(args, point, outcome))?;
        if let Some(machine) = &outcome.machine {
            say(&machine.text())?;
            machine.hints(state.root(), &outcome.device);
        }
    }
    let Plan { lost, .. } = &outcome.plan;
    if lost.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let blocks: u64 = lost.iter().map(|lost| u64::from(lost.extent.count)).sum();
    eprintln!("error: {blocks} blocks of point {} cannot be had, and are left as they were:", point.head.epoch);
    for Lost { extent, reason } in lost.iter().take(LOST_LISTED) {
        eprintln!("  blocks {}..{}: {reason}", extent.start.0, extent.end());
    }
    if lost.len() > LOST_LISTED {
        eprintln!("  and {} more runs of blocks: --json lists all", lost.len() - LOST_LISTED);
    }
    eprintln!("hint: `cdp-target verify` names the points that are whole; restore to one of them");
    Ok(ExitCode::from(1))
}

fn text(args: &RestoreArgs, point: &OpenedPoint, outcome: &Outcome) -> String {
    let Outcome { volume: name, plan, device, line_bytes, done, .. } = outcome;
    let label = point.label.as_ref().map_or_else(String::new, |label| format!(" {label:?}"));
    let of = format!("point {}{label} of {}", point.head.epoch, rfc3339(point.cut_time));
    let (device, differing) = (device.display(), bytes(plan.differing_blocks()));
    let zeros = bytes(plan.zero.len());
    let copied = if args.to.is_some() {
        format!(", {} of them on the old volume", bytes(plan.copied_blocks))
    } else {
        String::new()
    };
    match done {
        Done::Looked(estimate) => {
            let time = estimate.seconds().map_or_else(String::new, |seconds| {
                let rate = estimate.bytes_per_s.unwrap_or_default();
                format!(", about {} at {rate:.0} bytes a second", duration(seconds))
            });
            format!(
                "{name} on {device} differs from {of} in {differing} bytes{copied}, {zeros} of them zeros there\nabout {} bytes over the line{time}; nothing was changed",
                estimate.line_bytes
            )
        }
        Done::Restored { kept, fetched_bytes, seconds } => {
            let kept = kept.map_or_else(String::new, |kept| format!("\nwhat was overwritten is point {kept}"));
            format!(
                "{name} on {device} is {of}: {differing} bytes differed{copied}, {zeros} of them zeros there\n{fetched_bytes} bytes of content in {line_bytes} over the line, {}{kept}",
                duration(*seconds)
            )
        }
    }
}

fn duration(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 100.0 => format!("{seconds:.1} s"),
        seconds if seconds < 6000.0 => format!("{:.0} min", seconds / 60.0),
        seconds => format!("{:.1} h", seconds / 3600.0),
    }
}

fn document(args: &RestoreArgs, point: &OpenedPoint, outcome: &Outcome) -> Value {
    let Outcome { volume, plan, device, line_bytes, machine, done } = outcome;
    let lost = |lost: &Lost| json!({ "start": lost.extent.start, "count": lost.extent.count, "reason": lost.reason });
    let mut document = json!({
        "group": args.group,
        "volume": volume,
        "device": device,
        "point": {
            "epoch": point.head.epoch,
            "time": rfc3339(point.cut_time),
            "class": class_name(point.class),
            "label": point.label,
        },
        "dry_run": args.dry_run,
        "differing_bytes": bytes(plan.differing_blocks()),
        "zero_bytes": bytes(plan.zero.len()),
        "copied_bytes": bytes(plan.copied_blocks),
        "unkept_bytes": bytes(plan.unkept_blocks),
        "asked_blocks": plan.asked_blocks,
        "line_bytes": line_bytes,
        "lost": plan.lost.iter().map(lost).collect::<Vec<_>>(),
    });
    if let Some(machine) = machine {
        document["disk"] = machine.document();
    }
    match done {
        Done::Looked(estimate) => {
            document["estimate"] = json!({
                "line_bytes": estimate.line_bytes,
                "bytes_per_s": estimate.bytes_per_s,
                "seconds": estimate.seconds(),
            });
        }
        Done::Restored { kept, fetched_bytes, seconds } => {
            document["kept"] = json!(kept);
            document["content_bytes"] = json!(fetched_bytes);
            document["seconds"] = json!(seconds);
        }
    }
    document
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_is_the_sample_times_what_it_is_a_sample_of() {
        let plan = Plan { fetch: (0..1000).collect(), ..Plan::default() };
        let sample: RoaringBitmap = (0..100).collect();
        let estimate = Estimate::of(&plan, &sample, 50_000, Duration::from_secs(2));
        assert_eq!((estimate.line_bytes, estimate.bytes_per_s), (500_000, Some(25_000.0)));
        assert_eq!(estimate.seconds(), Some(20.0));
        let nothing = Estimate::of(&Plan::default(), &RoaringBitmap::new(), 0, Duration::ZERO);
        assert_eq!((nothing.line_bytes, nothing.seconds()), (0, None));
    }

    #[test]
    fn durations_are_told_in_what_fits_them() {
        assert_eq!([2.0, 600.0, 7200.0].map(duration), ["2.0 s", "10 min", "2.0 h"]);
    }
}
