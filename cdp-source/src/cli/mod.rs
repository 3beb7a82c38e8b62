//! The commands: what can be said on the command line, and which function does it.
//!
//! Data goes to stdout, everything else to stderr.

pub mod failure;
mod layout;
mod protect;
mod restore;
mod run;
mod show;

use crate::config::TrackerChoice;
use crate::freeze;
use crate::state::StateFolder;
use cdp_seams::storage::SystemStorage;
use clap::{Args, Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

/// Protects live volumes: cuts crash-consistent recovery points and sends them to the target.
#[derive(Debug, Parser)]
#[command(name = "cdp-source", version, propagate_version = true)]
struct Cli {
    /// Folder of configuration, keys and state.
    #[arg(long, global = true, env = "CDP_SOURCE_STATE", default_value = "/var/lib/cdp-source", value_name = "DIR")]
    state: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Take a one-time bundle from the target: makes this office's key and gets its certificate.
    Join(JoinArgs),
    /// Add volumes to a group.
    Protect(ProtectArgs),
    /// Stop protecting a volume; its points stay.
    Unprotect(UnprotectArgs),
    /// Run the agent in the foreground.
    Run,
    /// How the groups stand.
    Status(JsonArgs),
    /// Make a recovery point now.
    Point(PointArgs),
    /// The recovery points that the target holds, oldest first.
    Points(PointsArgs),
    /// Put a volume back to a recovery point, moving only what differs; or a machine's whole disk.
    Restore(RestoreArgs),
    /// What works on this machine, what not, and what to do.
    Doctor(JsonArgs),
    /// Beside a file system that the agent freezes; the agent starts it.
    #[command(name = freeze::WATCHDOG_COMMAND, hide = true)]
    ThawWatchdog { deadline_ms: u64 },
}

#[derive(Debug, Args)]
struct JoinArgs {
    /// The bundle's file.
    bundle: PathBuf,
    /// Reach the target here instead of at the addresses in the bundle.
    #[arg(long, value_name = "ADDR:PORT")]
    target: Option<String>,
}

#[derive(Debug, Args)]
struct ProtectArgs {
    /// The group: volumes that are cut at the same instant.
    #[arg(long, default_value = "main")]
    group: String,
    /// What watches the volumes.
    #[arg(long, value_enum, default_value = "auto")]
    tracker: TrackerChoice,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
    /// A whole disk of this machine: its partition table, its boot area and all its partitions, as one volume.
    #[arg(long, value_name = "DEVICE")]
    disk: Vec<PathBuf>,
    /// A name and a block device or image file.
    #[arg(required_unless_present = "disk", value_name = "NAME=DEVICE")]
    volumes: Vec<String>,
}

#[derive(Debug, Args)]
struct UnprotectArgs {
    /// The volume's group.
    #[arg(long, default_value = "main")]
    group: String,
    /// The volume.
    name: String,
}

#[derive(Debug, Args)]
struct JsonArgs {
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

impl RestoreArgs {
    /// The device that is written to, where it is not the volume's own.
    fn other_device(&self) -> Option<&Path> {
        self.to.as_deref().or(self.disk.as_deref())
    }
}

/// A duration that a person gives.
fn wait_limit(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|end: char| !end.is_ascii_digit());
    let seconds = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err("a number of seconds, minutes or hours: 90s, 5m, 2h".to_owned()),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{digits:?} is not a number"))?;
    let seconds = number.checked_mul(seconds).filter(|seconds| *seconds <= 30 * 86400);
    seconds.map(Duration::from_secs).ok_or_else(|| "at most 720h; 0 waits for ever".to_owned())
}

#[derive(Debug, Args)]
struct PointArgs {
    /// The group.
    #[arg(long, default_value = "main")]
    group: String,
    /// A name for the point.
    #[arg(long)]
    label: Option<String>,
    /// Return when the target has committed the point.
    #[arg(long)]
    wait: bool,
    /// How long to wait at most, as 90s, 5m or 2h; 0 waits for ever.
    #[arg(long, default_value = "5m", value_parser = wait_limit)]
    timeout: Duration,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct PointsArgs {
    /// The group.
    #[arg(long, default_value = "main")]
    group: String,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug, Args)]
struct RestoreArgs {
    /// The volume's group.
    #[arg(long, default_value = "main")]
    group: String,
    /// The volume; with --disk only where the point has several.
    #[arg(required_unless_present = "disk")]
    volume: Option<String>,
    /// Put a whole disk back onto this one, whose content is lost: from any rescue system, without an agent.
    #[arg(long, value_name = "DEVICE", conflicts_with = "to")]
    disk: Option<PathBuf>,
    /// The point: its number, `latest`, a label, a time, or an age as 10m, 2h or 3d.
    #[arg(long, value_name = "POINT")]
    at: String,
    /// Restore to this device instead of the volume's own, which is read where it can be.
    #[arg(long, value_name = "DEVICE")]
    to: Option<PathBuf>,
    /// Say what would be moved and how long that takes on this line; change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Overwrite what is kept in no point.
    #[arg(long)]
    discard_current: bool,
    /// Restore though blocks of the point are lost, which are left as they are.
    #[arg(long)]
    accept_lost: bool,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

/// Reads the command line, does what it says, and gives the exit status: 0 done, 1 the user's mistake, 2 our fault.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    log_to_stderr();
    let state = StateFolder::new(Arc::new(SystemStorage), &absolute(cli.state));
    let done = match &cli.command {
        Command::Join(args) => run::join(&state, args),
        Command::Protect(args) => protect::protect(&state, args),
        Command::Unprotect(args) => protect::unprotect(&state, args),
        Command::Run => run::run(&state),
        Command::Status(args) => show::status(&state, args.json),
        Command::Point(args) => show::point(&state, args),
        Command::Points(args) => show::points(&state, args),
        Command::Restore(args) => restore::restore(&state, args),
        Command::Doctor(args) => show::doctor(&state, args.json),
        Command::ThawWatchdog { deadline_ms } => run::thaw_watchdog(Duration::from_millis(*deadline_ms)),
    };
    match done {
        Ok(code) => code,
        Err(error) => failure::report(&error),
    }
}

/// The parser's own errors, in our form; help and version are no errors.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        return if error.print().is_ok() { ExitCode::SUCCESS } else { ExitCode::from(2) };
    }
    let text = error.to_string();
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or_default();
    let mut message = first.strip_prefix("error: ").unwrap_or(first).trim_end_matches(':').to_owned();
    let (mut tip, mut in_list) = (None, first.ends_with(':'));
    for line in lines {
        in_list &= line.starts_with('<') || line.starts_with('-');
        if in_list {
            message.push(' ');
            message.push_str(line);
        } else if let Some(text) = line.strip_prefix("tip: ") {
            tip = Some(text.to_owned());
        }
    }
    eprintln!("error: {message}");
    eprintln!("hint: {}", tip.unwrap_or_else(|| "cdp-source --help lists what can be said".into()));
    ExitCode::from(1)
}

fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

/// Logs on stderr, as much as `CDP_LOG` asks for; at `info` and above by default.
fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("CDP_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}
