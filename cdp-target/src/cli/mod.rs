//! The commands: what they take, and what they print.
//!
//! Data goes to stdout, logs to stderr. Each command is a file; this one knows their arguments and nothing else.

mod arguments;
mod checkpoint;
mod context;
mod drill;
mod enroll;
mod export;
mod failure;
mod files;
mod init;
mod inspect;
mod label;
mod nbd;
mod output;
mod owner;
mod pin;
mod points;
mod prune;
mod resolve;
mod serve;
mod status;
mod verify;

use clap::{Parser, Subcommand};
use failure::Failure;
use std::io::Write;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Receives the volumes of branch offices and gives back any recovery point.
#[derive(Debug, Parser)]
#[command(name = "cdp-target", version, arg_required_else_help = true, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Makes a new store: certificate authority, server certificate, configuration.
    Init(init::Arguments),
    /// Makes a one-time bundle with which an office joins.
    Enroll(enroll::Arguments),
    /// Runs the server in the foreground; SIGTERM ends it cleanly.
    Serve(serve::Arguments),
    /// Shows offices and groups, their live RPO, lag, state and space used.
    Status(status::Arguments),
    /// Lists a group's recovery points, oldest first.
    Points(points::Arguments),
    /// Names a recovery point.
    Label(label::Arguments),
    /// Keeps a recovery point from pruning.
    Pin(pin::Arguments),
    /// Lets a recovery point be pruned again.
    Unpin(pin::Arguments),
    /// Writes a volume as of a recovery point to a file, a device or stdout, or a whole group into a folder.
    Export(export::Arguments),
    /// Lists, prints or copies single files of a volume as of a recovery point.
    Files(files::Arguments),
    /// Serves a group's volumes as of a recovery point, and of any other, as disks to NBD clients.
    Nbd(nbd::Arguments),
    /// Makes a full image of a recovery point now.
    Checkpoint(checkpoint::Arguments),
    /// Applies the retention ladder now; prints what goes and what comes back.
    Prune(prune::Arguments),
    /// Ends a fork: says which history goes on. The other one stays readable.
    Resolve(resolve::Arguments),
    /// Restores a point for real, checks what is in it and keeps the report; exit 1 if anything is wrong.
    Drill(drill::Arguments),
    /// Re-reads and proves what the points stand on; exit 1 and the damaged points if anything is wrong.
    Verify(verify::Arguments),
    /// Shows what is in a segment or manifest, without a server.
    Inspect(inspect::Arguments),
}

/// A server's answer to a command that failed, as the command will report it.
pub(crate) fn failure_reply(error: anyhow::Error) -> crate::control::Reply {
    let failure = Failure::from(error);
    crate::control::Reply::Failed {
        error: failure.line(),
        hint: failure.next_step().map(str::to_owned),
        user: failure.fault() == failure::Fault::User,
    }
}

/// Runs the program.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    start_log(matches!(cli.command, Command::Serve(_)));
    crate::open_files::allow();
    match run(cli.command) {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Init(arguments) => init::run(&arguments),
        Command::Enroll(arguments) => enroll::run(&arguments),
        Command::Serve(arguments) => serve::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::Points(arguments) => points::run(&arguments),
        Command::Label(arguments) => label::run(&arguments),
        Command::Pin(arguments) => pin::run(&arguments, true),
        Command::Unpin(arguments) => pin::run(&arguments, false),
        Command::Export(arguments) => export::run(&arguments),
        Command::Files(arguments) => files::run(&arguments),
        Command::Nbd(arguments) => nbd::run(&arguments),
        Command::Checkpoint(arguments) => checkpoint::run(&arguments),
        Command::Prune(arguments) => prune::run(&arguments),
        Command::Resolve(arguments) => resolve::run(&arguments),
        Command::Drill(arguments) => drill::run(&arguments),
        Command::Verify(arguments) => verify::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
    }
}

/// Prints data on stdout.
fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// Help goes to stdout; a mistake on the command line becomes an error in our form.
fn usage(error: &clap::Error) -> ExitCode {
    let text = error.render().to_string();
    if !error.use_stderr() {
        return print(&text).map_or_else(|failure| failure.report(), |()| ExitCode::SUCCESS);
    }
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return Failure::mistake("no command given").hint("`cdp-target --help` lists the commands").report();
    }
    let mut paragraphs = text.split("\n\n");
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let line = words(paragraphs.next().unwrap_or_default());
    let tip = paragraphs.map(words).find_map(|text| text.strip_prefix("tip: ").map(str::to_owned));
    let hint =
        tip.unwrap_or_else(|| "`cdp-target --help` and `cdp-target COMMAND --help` show what there is".to_owned());
    Failure::mistake(line.strip_prefix("error: ").unwrap_or(&line)).hint(hint).report()
}

fn start_log(serves: bool) {
    let default = if serves { "info" } else { "warn" };
    let filter = EnvFilter::try_from_env("CDP_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}
