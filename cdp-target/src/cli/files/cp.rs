//! `files cp`: a file or a folder, copied to this machine.

use super::Cp;
use super::session::Session;
use crate::cli::failure::Failure;
use crate::cli::output::{bytes, json};
use crate::cli::print;
use crate::files::copy::{Copied, CopyError, Copying, Place};
use crate::files::error::TreeError;
use crate::files::name::{parts, shown};
use crate::files::tree::{Item, Kind};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::Serialize;
use std::fmt::Write as _;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

#[derive(Serialize)]
struct Document<'a> {
    path: String,
    destination: String,
    #[serde(flatten)]
    copied: &'a Copied,
}

/// A folder that is open, and a name in it.
struct Target {
    folder: OwnedFd,
    name: Vec<u8>,
}

pub(super) fn run(session: Session<'_>, arguments: &Cp) -> Result<ExitCode, Failure> {
    let volume = session.volume.name.clone();
    let opened = session.file_system()?;
    let path = arguments.path.as_encoded_bytes();
    // A link that is named is what it leads to, unless it leads nowhere: then it is copied as it is.
    let item = opened.tree.find_or_link(path)?;
    let node = item.node()?;
    if node.kind == Kind::Folder && !arguments.recursive {
        return Err(Failure::from(CopyError::Folder));
    }
    if let Kind::Special(what) = node.kind {
        return Err(TreeError::Special(what).into());
    }
    let own_name = parts(path).pop().filter(|name| name != b"..").unwrap_or_else(|| volume.into_bytes());
    let destination = Path::new(&arguments.destination);
    let target = target(destination, own_name)?;
    let place = Place { folder: &target.folder, name: &target.name };
    if !arguments.force && place.is_taken() {
        return Err(CopyError::Exists(target.name).into());
    }
    let bar = bar((node.kind == Kind::File).then_some(node.size_bytes));
    let mut copying = Copying {
        force: arguments.force,
        recursive: arguments.recursive,
        is_root: rustix::process::geteuid().is_root(),
        stop: &opened.stop,
        progress: &|bytes| bar.inc(bytes),
        failed: &|path, error| {
            let line = crate::restore::image::one_line(error);
            bar.suspend(|| eprintln!("error: copy {}: {line}", shown(path)));
        },
        copied: Copied::default(),
        depth: 0,
    };
    let done = copy(&mut copying, &item, path, &place);
    bar.finish_and_clear();
    let copied = copying.copied;
    done?;
    report(arguments, &copied)
}

fn copy(copying: &mut Copying<'_>, item: &Item, path: &[u8], place: &Place<'_>) -> Result<(), Failure> {
    copying.copy(item, path.strip_suffix(b"/").unwrap_or(path), place)?;
    // What is said to be copied is to be there after a power cut, too.
    Ok(rustix::fs::syncfs(place.folder)?)
}

/// Where it goes: into a folder that is there, or under a name of its own. A link is followed up to the folder, and is none itself.
fn target(destination: &Path, own_name: Vec<u8>) -> Result<Target, Failure> {
    let open = |path: &Path| {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    };
    let refused = |errno: Errno| {
        let hint = "give a path in a folder that exists and is yours";
        Failure::user(io::Error::from(errno)).context(format!("open {}", destination.display())).hint(hint)
    };
    match open(destination) {
        Ok(folder) => Ok(Target { folder, name: own_name }),
        Err(Errno::NOTDIR | Errno::NOENT) => {
            let name = destination.file_name().ok_or_else(|| refused(Errno::NOTDIR))?;
            let above = destination.parent().unwrap_or(Path::new("."));
            Ok(Target { folder: open(above).map_err(refused)?, name: name.as_bytes().to_vec() })
        }
        Err(errno) => Err(refused(errno)),
    }
}

fn bar(bytes: Option<u64>) -> ProgressBar {
    let (bar, template) = match bytes {
        Some(bytes) => (ProgressBar::new(bytes), "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}"),
        None => (ProgressBar::no_length(), "{bytes} {bytes_per_sec}"),
    };
    bar.with_style(ProgressStyle::with_template(template).expect("the template is constant"))
}

fn report(arguments: &Cp, copied: &Copied) -> Result<ExitCode, Failure> {
    let destination = shown(arguments.destination.as_encoded_bytes());
    if arguments.json {
        let path = shown(arguments.path.as_encoded_bytes());
        print(&json(&Document { path, destination: destination.clone(), copied }))?;
    } else {
        print(&text(copied, &destination))?;
    }
    if copied.failed > 0 {
        let hint = "what is named above is missing; take it from another point, and `cdp-target verify` this one";
        return Err(Failure::mistake(format!(
            "{} could not be copied",
            of(copied.failed, "file or folder", "files or folders")
        ))
        .hint(hint));
    }
    Ok(ExitCode::SUCCESS)
}

fn of(count: u64, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

fn text(copied: &Copied, destination: &str) -> String {
    let mut text = format!("copied {}", of(copied.files, "file", "files"));
    for (count, one, many) in [(copied.folders, "folder", "folders"), (copied.links, "link", "links")] {
        if count > 0 {
            write!(text, ", {}", of(count, one, many)).expect("text takes anything");
        }
    }
    writeln!(text, ", {}, to {destination}", bytes(copied.bytes)).expect("text takes anything");
    for (count, what) in [
        (copied.special, "devices, sockets and pipes were left out"),
        (copied.without_attributes, "files and folders have not all their extended attributes and access lists"),
        (copied.without_owner, "files and folders belong to you now: only root can give them to their owners"),
    ] {
        if count > 0 {
            writeln!(text, "{count} {what}").expect("text takes anything");
        }
    }
    text
}
