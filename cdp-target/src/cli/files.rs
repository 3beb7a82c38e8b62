//! `files`: single files of a volume as of a recovery point, without restoring it.

mod cat;
mod cp;
mod ls;
mod session;

use super::arguments::{DataFolder, GroupPath};
use super::failure::Failure;
use session::Session;
use std::ffi::OsString;
use std::process::ExitCode;

/// Arguments of `files`.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The volume; where the group has one only, the group will do.
    #[arg(value_name = "OFFICE/GROUP/VOLUME")]
    volume: GroupPath,
    /// The point: number, `latest`, label, RFC 3339 time, or age (30s, 10m, 2h, 3d).
    #[arg(long, value_name = "POINT")]
    at: String,
    /// The partition, by its number. Not needed where one only has files.
    #[arg(long, value_name = "NUMBER", global = true)]
    partition: Option<u32>,
    #[command(flatten)]
    data: DataFolder,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Lists a folder; without a path the partitions of the volume, where several have files.
    Ls(Ls),
    /// Prints files on stdout.
    Cat(Cat),
    /// Copies a file, or with -r a folder, to this machine.
    Cp(Cp),
}

#[derive(Debug, clap::Args)]
struct Ls {
    /// The folder, or a file.
    #[arg(value_name = "PATH")]
    path: Option<OsString>,
    /// Folders in it, too.
    #[arg(short = 'R', long)]
    recursive: bool,
    /// One JSON document.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Cat {
    /// The files.
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<OsString>,
}

#[derive(Debug, clap::Args)]
struct Cp {
    /// The file or folder.
    #[arg(value_name = "PATH")]
    path: OsString,
    /// Where it goes: a new name, or a folder that is there.
    #[arg(value_name = "DESTINATION")]
    destination: OsString,
    /// Folders, with all that is in them.
    #[arg(short, long)]
    recursive: bool,
    /// Replaces files that are there; folders that are there stay, and get what they do not have.
    #[arg(long)]
    force: bool,
    /// What was copied, as one JSON document.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let (verb, path) = match &arguments.what {
        What::Ls(ls) => ("list", ls.path.clone()),
        What::Cat(cat) => ("read", cat.paths.first().cloned().filter(|_| cat.paths.len() == 1)),
        What::Cp(cp) => ("copy", Some(cp.path.clone())),
    };
    let path =
        path.map_or_else(String::new, |path| format!("{} of ", crate::files::name::shown(path.as_encoded_bytes())));
    let context = format!("{verb} {path}{} at {}", arguments.volume, arguments.at);
    files(arguments).map_err(|failure| failure.context(context))
}

fn files(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let session = Session::open(arguments)?;
    match &arguments.what {
        What::Ls(what) => ls::run(session, what),
        What::Cat(what) => cat::run(session, what),
        What::Cp(what) => cp::run(session, what),
    }
}
