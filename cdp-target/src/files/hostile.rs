//! File systems that are damaged on purpose: whatever they say, a reader ends, without a panic, and tells what it cannot read.

#![expect(clippy::disallowed_methods, reason = "the tools that make file systems make files")]

use super::tree::{Id, Kind, Piece, Tree, TreeError, Way};
use super::volume::Shared;
use super::volume::memory::memory;
use cdp_seams::random::{SimRandom, array};
use std::path::Path;
use std::process::Command;

/// Nodes that are looked at, and pieces of content that are read, at most: a file system may say that it has any number.
const NODES_MAX: usize = 2000;
const PIECES_MAX: usize = 2000;

/// Opens a file system.
pub(super) type Open = fn(Shared) -> Result<Box<dyn Tree>, TreeError>;

/// Reads all that a file system has; gives how much could be read, and what could not.
pub(super) fn read_all(tree: &dyn Tree) -> (usize, Vec<TreeError>) {
    let mut reading = Reading { tree, way: Way::default(), nodes: 0, pieces: 0, errors: Vec::new() };
    reading.node(tree.root());
    (reading.nodes, reading.errors)
}

struct Reading<'a> {
    tree: &'a dyn Tree,
    way: Way,
    nodes: usize,
    pieces: usize,
    errors: Vec<TreeError>,
}

impl Reading<'_> {
    fn node(&mut self, id: Id) {
        self.nodes += 1;
        if self.nodes < NODES_MAX
            && let Err(error) = self.read(id)
        {
            self.errors.push(error);
        }
    }

    fn read(&mut self, id: Id) -> Result<(), TreeError> {
        let node = self.tree.node(id)?;
        self.tree.attributes(id)?;
        match node.kind {
            Kind::Folder => {
                self.way.enter(id)?;
                let entries = self.tree.list(id);
                entries.iter().flatten().for_each(|entry| self.node(entry.id));
                self.way.leave();
                entries.map(|_| ())
            }
            Kind::Link => self.tree.link(id).map(|_| ()),
            Kind::Special(_) => Ok(()),
            Kind::File => {
                let (mut content, mut buffer) = (self.tree.open(id)?, vec![0; 65_536]);
                while self.pieces < PIECES_MAX && content.next(&mut buffer)? != Piece::End {
                    self.pieces += 1;
                }
                Ok(())
            }
        }
    }
}

/// Damages an image in many ways, and reads each.
pub(super) fn damage(image: &[u8], open: Open, rounds: usize) {
    let random = SimRandom::new(7);
    let draw = |below: usize| (u64::from_le_bytes(array(&random)) % below as u64) as usize;
    let used: Vec<usize> = (0..image.len())
        .step_by(512)
        .filter(|at| image[*at..(at + 512).min(image.len())].iter().any(|byte| *byte != 0))
        .collect();
    let mut opened = 0;
    for _ in 0..rounds {
        let mut bad = image.to_vec();
        for _ in 0..=draw(12) {
            let at = used[draw(used.len())] + draw(512);
            let len = 1 + draw(8);
            let what = [0xff, 0, 1, 0x80, draw(256) as u8][draw(5)];
            let end = (at + len).min(bad.len());
            bad[at.min(end)..end].fill(what);
        }
        if let Ok(tree) = open(memory(bad)) {
            opened += 1;
            read_all(tree.as_ref());
        }
    }
    assert!(opened > rounds / 10, "{opened} of {rounds} could be opened at all");
    for len in [0, 1, 511, 512, 1023, 1024, 1500, 2048, 4096, 10_000, image.len() / 2, image.len() - 1] {
        if let Ok(tree) = open(memory(image[..len].to_vec())) {
            read_all(tree.as_ref());
        }
    }
}

/// An image that tools make: each is run with the image's path behind its arguments, or in the place of `@`. `None` where one is missing.
pub(super) fn made(kib: u64, tools: &[&[&str]]) -> Option<Vec<u8>> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    std::fs::File::create(&path).expect("made").set_len(kib << 10).expect("sized");
    for tool in tools {
        let is_there = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|at| Path::new(at).join(tool[0]).exists());
        if !is_there {
            assert!(std::env::var_os("CDP_ALL_MUST_RUN").is_none(), "no {}", tool[0]);
            eprintln!("skipped: no {}", tool[0]);
            return None;
        }
        let image = path.to_str().expect("text");
        let mut arguments: Vec<&str> = tool[1..].iter().map(|word| if *word == "@" { image } else { word }).collect();
        if !tool.contains(&"@") {
            arguments.push(image);
        }
        let search = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        let output = Command::new(tool[0]).args(&arguments).env("PATH", search).output().expect("started");
        assert!(output.status.success(), "{tool:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Some(std::fs::read(&path).expect("there"))
}

/// A folder with a file of many lines in it, for the tools.
pub(super) fn files() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    std::fs::create_dir_all(path("etc/deep")).expect("made");
    for number in 0..30 {
        std::fs::write(path(&format!("etc/deep/{number} with a longer name")), vec![b'x'; number * 300])
            .expect("written");
    }
    std::fs::write(path("large"), "all work and no play\n".repeat(10_000)).expect("written");
    folder
}
