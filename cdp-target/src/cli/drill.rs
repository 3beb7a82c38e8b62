//! `drill`: a point is restored for real, looked at and checked; the report is kept.

use super::arguments::{DataFolder, GroupPath, duration, whole_group};
use super::failure::Failure;
use super::output::json;
use super::{context, print};
use crate::catalog::Catalog;
use crate::drill::boot::Boot;
use crate::drill::report::{self, Report, page};
use crate::drill::{Done, Drill, Script};
use crate::points::PointName;
use cdp_seams::clock::{Clock, SystemClock};
use cdp_seams::random::SystemRandom;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// Arguments of `drill`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The group.
    #[arg(value_name = "OFFICE/GROUP", value_parser = whole_group)]
    group: GroupPath,
    /// The point: number, `latest`, label, time or age.
    #[arg(long, value_name = "POINT", default_value = "latest")]
    at: String,
    /// A program that checks the images in its working folder, `VOLUME.raw` each; any other exit status than 0 is a failure. By default
    /// `drill_script` of target.toml.
    #[arg(long, value_name = "PATH")]
    script: Option<PathBuf>,
    /// How long the script may take (30s, 10m, 2h). By default `drill_script_timeout_s` of target.toml.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    script_timeout: Option<Duration>,
    /// Boots a machine from the images in QEMU, without a network, and gives it so long to come up (30s, 10m). By default `drill_boot_s` of
    /// target.toml.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    boot: Option<Duration>,
    /// What stands on its serial console when it has come up. By default `drill_boot_expect` of target.toml.
    #[arg(long, value_name = "TEXT")]
    boot_expect: Option<String>,
    /// A folder with room for the images, which are gone at the end. By default `drill_folder` of target.toml, or `scratch` in the store.
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// The report as one JSON document.
    #[arg(long)]
    json: bool,
    /// Of the server's own: at the lowest priority.
    #[arg(long, hide = true)]
    scheduled: bool,
    #[command(flatten)]
    data: DataFolder,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let context = format!("drill {} at {}", arguments.group, arguments.at);
    drill(arguments).map_err(|failure| failure.context(context))
}

fn drill(arguments: &Arguments) -> Result<ExitCode, Failure> {
    if arguments.scheduled {
        // A server that answers is worth more; where it is not allowed, nothing is lost.
        let _ = rustix::process::nice(19);
    }
    let name = PointName::parse(&arguments.at, context::now())?;
    let store = context::open(&arguments.data)?;
    let catalog = Catalog::new(&store, context::authority(&store)?);
    let group = catalog.group(&arguments.group.office, &arguments.group.group)?;
    // A prune beside us takes nothing away that is still to be read.
    let (group, _lease) = group.held(&store)?;
    let points = group.points()?;
    let point = name.find(&points)?;
    let keys = catalog.keys(&group)?;
    let config = store.config();
    let boot = boot(arguments, config.drill_boot_s, config.drill_boot_expect.as_deref())?;
    let script = script(arguments, config.drill_script.as_deref(), config.drill_script_timeout_s)?;
    let scratch = arguments.scratch.clone().or_else(|| config.drill_folder.clone());
    let scratch = scratch.unwrap_or_else(|| store.folder().join("scratch"));
    let stop = context::stop_on_signal(&scratch);
    let bar = ProgressBar::no_length()
        .with_style(ProgressStyle::with_template("{msg} {bytes} {bytes_per_sec}").expect("the template is constant"));
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let drill = Drill {
        store: &store,
        office: &arguments.group.office,
        group: &group,
        keys: &keys,
        point,
        scratch: &scratch,
        script: script.as_ref(),
        boot: boot.as_ref(),
        clock,
        random: &SystemRandom,
        stop: &stop,
        progress: &|what, bytes| {
            bar.set_message(what.to_owned());
            bar.inc(bytes);
        },
    };
    let done = drill.run();
    bar.finish_and_clear();
    let Done { report, screenshot } = done?;
    let kept = report::keep(&store, group.place(), &report, screenshot.as_deref());
    print(&if arguments.json { json(&report) } else { page(&report) })?;
    let kept = kept.map_err(|error| anyhow::Error::from(error).context("keep the report"))?;
    conclude(&report, &kept)
}

/// Success, or the first of what is wrong.
fn conclude(report: &Report, kept: &Path) -> Result<ExitCode, Failure> {
    let Some(first) = report.failures.first() else { return Ok(ExitCode::SUCCESS) };
    let more = match report.failures.len() - 1 {
        0 => String::new(),
        more => format!(", and {more} more"),
    };
    let hint =
        format!("the whole report is kept in {}; take an older point, and see why this one is bad", kept.display());
    Err(Failure::mistake(format!("failed: {first}{more}")).hint(hint))
}

/// How the images are booted, where that is wanted.
fn boot(arguments: &Arguments, default_s: u64, expected: Option<&str>) -> Result<Option<Boot>, Failure> {
    let deadline = arguments.boot.unwrap_or(Duration::from_secs(default_s));
    let expected = arguments.boot_expect.as_deref().or(expected).map(str::to_owned);
    if deadline.is_zero() && arguments.boot_expect.is_some() {
        return Err(Failure::mistake("--boot-expect without a machine that is booted").hint("add --boot 3m"));
    }
    if expected.as_deref() == Some("") {
        return Err(
            Failure::mistake("nothing is expected of a machine that is booted").hint("name a text, as \"login:\"")
        );
    }
    Ok((!deadline.is_zero()).then_some(Boot { deadline, expected }))
}

/// The script, by an absolute path: it runs in another folder.
fn script(arguments: &Arguments, default: Option<&Path>, timeout_s: u64) -> Result<Option<Script>, Failure> {
    let Some(path) = arguments.script.as_deref().or(default) else { return Ok(None) };
    let absolute = std::path::absolute(path)?;
    if rustix::fs::access(&absolute, rustix::fs::Access::EXEC_OK).is_err() {
        return Err(Failure::mistake(format!("the script {} cannot be run", path.display()))
            .hint("give a file that is there and executable"));
    }
    let deadline = arguments.script_timeout.unwrap_or(Duration::from_secs(timeout_s));
    Ok(Some(Script { path: absolute, deadline }))
}
