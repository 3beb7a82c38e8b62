//! `files ls`: folders, and the partitions of a volume.

use super::Ls;
use super::session::Session;
use crate::cli::failure::Failure;
use crate::cli::output::{Table, bytes, json};
use crate::cli::print;
use crate::files::error::TreeError;
use crate::files::name::{parts, shown};
use crate::files::partition::Partition;
use crate::files::tree::{DEPTH_MAX, Entry, Item, Kind, Node, Tree};
use crate::points::Instant;
use crate::restore::image::one_line;
use cdp_protocol::hex;
use cdp_protocol::units::Epoch;
use rustix::fs::Timespec;
use serde::Serialize;
use std::io::{self, Write};
use std::process::ExitCode;

/// Lines of a table that are put together before they are printed.
const ROWS_MAX: usize = 10_000;

#[derive(Serialize)]
struct Disk<'a> {
    office: &'a str,
    group: &'a str,
    volume: &'a str,
    epoch: Epoch,
    time: Instant,
    partitions: Vec<PartitionLine<'a>>,
}

#[derive(Serialize)]
struct PartitionLine<'a> {
    partition: Option<u32>,
    offset: u64,
    bytes: u64,
    file_system: &'a str,
    label: Option<&'a str>,
}

/// The document of a listing, but for its entries, which come one by one.
#[derive(Serialize)]
struct Head<'a> {
    office: &'a str,
    group: &'a str,
    volume: &'a str,
    epoch: Epoch,
    time: Instant,
    partition: Option<u32>,
    file_system: &'a str,
}

#[derive(Serialize)]
struct Line {
    path: String,
    name: String,
    /// The name's bytes, where it is no text.
    name_hex: Option<String>,
    kind: Option<&'static str>,
    bytes: Option<u64>,
    mode: Option<String>,
    uid: Option<u32>,
    gid: Option<u32>,
    modified: Option<String>,
    accessed: Option<String>,
    target: Option<String>,
    error: Option<String>,
}

/// Where lines go.
trait Sink {
    fn folder(&mut self, path: &str) -> Result<(), Failure>;
    fn line(&mut self, line: Line) -> Result<(), Failure>;
    fn end(&mut self) -> Result<(), Failure>;
}

pub(super) fn run(session: Session<'_>, arguments: &Ls) -> Result<ExitCode, Failure> {
    if arguments.path.is_none() && !session.is_named() && session.chosen().is_none() {
        return list_partitions(&session, arguments.json);
    }
    let (office, group) = (session.office().to_owned(), session.group().to_owned());
    let (volume, epoch, time) = (session.volume.name.clone(), session.epoch(), session.time());
    let opened = session.file_system()?;
    let head = Head {
        office: &office,
        group: &group,
        volume: &volume,
        epoch,
        time,
        partition: opened.partition.place.partition,
        file_system: opened.partition.file_system,
    };
    let path = arguments.path.as_ref().map_or(&b"/"[..], |path| path.as_encoded_bytes());
    let mut sink: Box<dyn Sink> =
        if arguments.json { Box::new(Json::begin(&head)?) } else { Box::new(Text::new(arguments.recursive)) };
    let mut listing = Listing { tree: &opened.tree, sink: sink.as_mut(), depth: 0, failed: 0 };
    listing.named(path, arguments.recursive)?;
    let failed = listing.failed;
    sink.end()?;
    if failed > 0 {
        let hint = "they are named above; take them from another point, and `cdp-target verify` this one";
        return Err(Failure::mistake(format!("{failed} of its files and folders cannot be read")).hint(hint));
    }
    Ok(ExitCode::SUCCESS)
}

fn list_partitions(session: &Session<'_>, is_json: bool) -> Result<ExitCode, Failure> {
    if is_json {
        let line = |partition: &'_ Partition| (partition.place, partition.file_system, partition.label.clone());
        let owned: Vec<_> = session.partitions.iter().map(line).collect();
        let partitions = owned.iter().map(|(place, file_system, label)| PartitionLine {
            partition: place.partition,
            offset: place.offset,
            bytes: place.bytes,
            file_system,
            label: label.as_deref(),
        });
        print(&json(&Disk {
            office: session.office(),
            group: session.group(),
            volume: &session.volume.name,
            epoch: session.epoch(),
            time: session.time(),
            partitions: partitions.collect(),
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new(&[">partition", ">size", "file_system", "label"]);
    for Partition { place, file_system, label } in &session.partitions {
        let number = place.partition.map_or_else(|| "-".to_owned(), |number| number.to_string());
        let label = label.clone().unwrap_or_else(|| "-".to_owned());
        table.row(vec![number, bytes(place.bytes), (*file_system).to_owned(), label]);
    }
    print(&table.render())?;
    Ok(ExitCode::SUCCESS)
}

/// A listing under way.
struct Listing<'a> {
    tree: &'a Tree,
    sink: &'a mut dyn Sink,
    depth: usize,
    failed: u64,
}

impl Listing<'_> {
    /// Lists what a path names.
    fn named(&mut self, path: &[u8], recursive: bool) -> Result<(), Failure> {
        let item = self.tree.find_or_link(path)?;
        let parts = parts(path);
        if item.node()?.kind == Kind::Folder {
            return self.folder(&item, &parts.join(&b'/'), recursive, true);
        }
        let name = parts.last().cloned().unwrap_or_default();
        let above = parts[..parts.len() - 1].join(&b'/');
        self.entry(&above, &Entry { name, item })?;
        Ok(())
    }

    fn folder(&mut self, item: &Item, path: &[u8], recursive: bool, is_first: bool) -> Result<(), Failure> {
        let listed = if self.depth < DEPTH_MAX { item.list() } else { Err(TreeError::TooDeep(DEPTH_MAX)) };
        let entries = match listed {
            Err(error) if is_first => return Err(error.into()),
            Err(error) => {
                self.tell(path, &error);
                return Ok(());
            }
            Ok(entries) => entries,
        };
        self.sink.folder(&format!("/{}", shown(path)))?;
        let mut folders = Vec::new();
        for entry in entries {
            if self.entry(path, &entry)? == Some(Kind::Folder) && recursive {
                folders.push(entry);
            }
        }
        self.depth += 1;
        for Entry { name, item } in folders {
            self.folder(&item, &below(path, &name), recursive, false)?;
        }
        self.depth -= 1;
        Ok(())
    }

    fn tell(&mut self, path: &[u8], error: &TreeError) {
        self.failed += 1;
        eprintln!("error: list /{}: {}", shown(path), one_line(error));
    }

    /// Adds an entry; gives what it is, where that can be read.
    fn entry(&mut self, folder: &[u8], Entry { name, item }: &Entry) -> Result<Option<Kind>, Failure> {
        let path = below(folder, name);
        let node = item.node();
        let target = match &node {
            Ok(Node { kind: Kind::Link, .. }) => Some(item.link()),
            _ => None,
        };
        let (target, unread) = match target.transpose() {
            Ok(target) => (target, None),
            Err(error) => (None, Some(error)),
        };
        let error = node.as_ref().err().or(unread.as_ref());
        if let Some(error) = error {
            self.tell(&path, error);
        }
        let error = error.map(|error| one_line(error));
        let known = node.as_ref().ok();
        let utc = |moment: Option<Timespec>| moment.and_then(timestamp).map(|time| format!("{time:.3}"));
        self.sink.line(Line {
            path: format!("/{}", shown(&path)),
            name: shown(name),
            name_hex: std::str::from_utf8(name).is_err().then(|| hex::encode(name)),
            kind: known.map(|node| kind_name(node.kind)),
            bytes: known.map(|node| node.size_bytes),
            mode: known.map(|node| format!("{:04o}", node.mode)),
            uid: known.map(|node| node.owner.0),
            gid: known.map(|node| node.owner.1),
            modified: utc(known.map(|node| node.modified)),
            accessed: utc(known.map(|node| node.accessed)),
            target: target.map(|target| shown(&target)),
            error,
        })?;
        Ok(known.map(|node| node.kind))
    }
}

fn below(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() { name.to_vec() } else { [folder, b"/", name].concat() }
}

const fn kind_name(kind: Kind) -> &'static str {
    match kind {
        Kind::File => "file",
        Kind::Folder => "folder",
        Kind::Link => "link",
        Kind::Special(_) => "special",
    }
}

fn timestamp(moment: Timespec) -> Option<jiff::Timestamp> {
    jiff::Timestamp::new(moment.tv_sec, moment.tv_nsec as i32).ok()
}

/// One JSON document, written as its entries come.
struct Json {
    is_first: bool,
}

impl Json {
    fn begin(head: &Head<'_>) -> Result<Self, Failure> {
        let text = serde_json::to_string(head)?;
        let open = text.strip_suffix('}').unwrap_or(&text);
        print(&format!("{open},\"entries\":["))?;
        Ok(Self { is_first: true })
    }
}

impl Sink for Json {
    fn folder(&mut self, _path: &str) -> Result<(), Failure> {
        Ok(())
    }

    fn line(&mut self, line: Line) -> Result<(), Failure> {
        let comma = if std::mem::take(&mut self.is_first) { "\n" } else { ",\n" };
        let text = serde_json::to_string(&line)?;
        Ok(write!(io::stdout().lock(), "{comma}{text}")?)
    }

    fn end(&mut self) -> Result<(), Failure> {
        print("\n]}\n")
    }
}

/// Tables, one a folder.
struct Text {
    is_recursive: bool,
    is_first: bool,
    rows: Vec<Vec<String>>,
}

impl Text {
    const fn new(is_recursive: bool) -> Self {
        Self { is_recursive, is_first: true, rows: Vec::new() }
    }
}

impl Sink for Text {
    fn folder(&mut self, path: &str) -> Result<(), Failure> {
        self.end()?;
        if self.is_recursive {
            let gap = if std::mem::take(&mut self.is_first) { "" } else { "\n" };
            print(&format!("{gap}{path}:\n"))?;
        }
        Ok(())
    }

    fn line(&mut self, line: Line) -> Result<(), Failure> {
        let mut name = line.name;
        if line.kind == Some("folder") {
            name.push('/');
        }
        name.extend(line.target.iter().flat_map(|target| [" -> ", target]));
        let modified = line.modified.and_then(|time| time.parse::<jiff::Timestamp>().ok());
        let local = |time: jiff::Timestamp| {
            time.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S %:z").to_string()
        };
        self.rows.push(vec![
            letters(line.kind, line.mode.as_deref()),
            line.uid.zip(line.gid).map_or_else(|| "-".to_owned(), |(user, group)| format!("{user}:{group}")),
            line.bytes.map_or_else(|| "?".to_owned(), |bytes| bytes.to_string()),
            modified.map_or_else(|| "-".to_owned(), local),
            name,
        ]);
        if self.rows.len() >= ROWS_MAX { self.end() } else { Ok(()) }
    }

    fn end(&mut self) -> Result<(), Failure> {
        if self.rows.is_empty() {
            return Ok(());
        }
        let mut table = Table::new(&["mode", "owner", ">bytes", "modified", "name"]);
        self.rows.drain(..).for_each(|row| table.row(row));
        print(&table.render())
    }
}

/// As `ls` writes a mode; the kind alone where it cannot be read.
fn letters(kind: Option<&str>, mode: Option<&str>) -> String {
    let mut text = String::from(match kind {
        Some("folder") => "d",
        Some("link") => "l",
        Some("file") => "-",
        Some(_) => "s",
        None => "?",
    });
    let Some(mode) = mode.and_then(|mode| u32::from_str_radix(mode, 8).ok()) else { return text };
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift & 7;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::letters;

    #[test]
    fn modes_are_written_as_ls_does() {
        for (kind, mode, text) in [
            ("file", "0644", "-rw-r--r--"),
            ("folder", "1777", "drwxrwxrwt"),
            ("file", "4755", "-rwsr-xr-x"),
            ("file", "2640", "-rw-r-S---"),
            ("link", "0777", "lrwxrwxrwx"),
        ] {
            assert_eq!(letters(Some(kind), Some(mode)), text);
        }
        assert_eq!(letters(Some("folder"), None), "d");
        assert_eq!(letters(None, None), "?");
    }
}
