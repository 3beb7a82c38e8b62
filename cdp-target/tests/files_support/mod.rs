//! File systems that are made, mounted and compared.

#![allow(dead_code, reason = "each test uses a part")]
#![allow(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const MIB: u64 = 1 << 20;

/// Whether a program is there; missing only where the whole run may pass over it.
pub(crate) fn has(program: &str) -> bool {
    let found = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].iter().any(|at| Path::new(at).join(program).exists());
    may_skip(found, program)
}

/// Whether file systems can be mounted here.
pub(crate) fn can_mount() -> bool {
    may_skip(rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists(), "mounting")
}

fn may_skip(found: bool, what: &str) -> bool {
    assert!(found || std::env::var_os("CDP_ALL_MUST_RUN").is_none(), "no {what}");
    if !found {
        eprintln!("skipped: no {what}");
    }
    found
}

/// Runs a program that has to succeed; gives what it says.
pub(crate) fn tool(program: &str, arguments: &[&str]) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).env("PATH", path).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Bytes that do not compress.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len).map(|_| next()).collect()
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// An image of a disk, removed with its store.
pub(crate) struct Image {
    pub(crate) path: PathBuf,
}

impl Image {
    pub(crate) fn new(path: &Path, mib: u64) -> Self {
        std::fs::File::create(path).expect("made").set_len(mib * MIB).expect("sized");
        Self { path: path.to_owned() }
    }

    pub(crate) fn mkfs(&self, mkfs: &[&str]) {
        tool(mkfs[0], &[&mkfs[1..], &[text(&self.path)]].concat());
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).expect("there")
    }
}

/// A file system that is mounted, unmounted at the end.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    pub(crate) fn new(image: &Path, at: &Path, kind: &str, options: &str) -> Self {
        std::fs::create_dir_all(at).expect("made");
        tool("mount", &["-t", kind, "-o", &format!("loop,{options}"), text(image), text(at)]);
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let ended = Command::new("umount").arg(&self.0).output().expect("umount");
        assert!(ended.status.success() || std::thread::panicking(), "{ended:?}");
    }
}

/// What is at a path: its kind, mode, owner, time, attributes and content.
type Facts = (String, BTreeMap<Vec<u8>, Vec<u8>>);

/// All that is in a folder, by path.
fn facts(at: &Path, below: &Path, compared: Compared, facts_of: &mut BTreeMap<PathBuf, Facts>) {
    for entry in std::fs::read_dir(at.join(below)).expect("listed") {
        let below = below.join(entry.expect("an entry").file_name());
        let path = at.join(&below);
        let known = std::fs::symlink_metadata(&path).expect("there");
        let content = match known.file_type() {
            kind if kind.is_file() => format!("file {}", blake3::hash(&std::fs::read(&path).expect("read"))),
            kind if kind.is_dir() => "folder".to_owned(),
            kind if kind.is_symlink() => format!("link {}", std::fs::read_link(&path).expect("read").display()),
            // Left out.
            _ => continue,
        };
        let owner = if compared == Compared::All {
            format!("{:o} {}:{}", known.mode(), known.uid(), known.gid())
        } else {
            String::new()
        };
        let size = if known.is_file() { known.len() } else { 0 };
        let modified = match compared {
            Compared::All => (known.mtime(), known.mtime_nsec()),
            Compared::Times => (known.mtime(), 0),
            Compared::Bytes => (0, 0),
        };
        facts_of.insert(below.clone(), (format!("{content} {owner} {size} {modified:?}"), attributes(&path)));
        if known.is_dir() {
            facts(at, &below, compared, facts_of);
        }
    }
}

fn attributes(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65_536];
    let len = rustix::fs::llistxattr(path, &mut names).unwrap_or(0);
    let names = names[..len]
        .split(|byte| *byte == 0)
        .filter(|name| name.starts_with(b"user.") || name.starts_with(b"system.posix_acl"));
    let value = |name: &[u8]| {
        let mut value = vec![0; 65_536];
        let len = rustix::fs::lgetxattr(path, name, &mut value).expect("read");
        value.truncate(len);
        (name.to_vec(), value)
    };
    names.map(value).collect()
}

/// Holds a copy against what it is of: each file, folder and link, with its mode, owner, time, attributes, content.
pub(crate) fn assert_same(expected: &Path, copy: &Path, what: &str) {
    compare(expected, copy, what, Compared::All);
}

/// The same without what file systems of Windows do not have.
pub(crate) fn assert_same_content(expected: &Path, copy: &Path, what: &str) {
    compare(expected, copy, what, Compared::Times);
}

/// The same of nothing but names and content.
pub(crate) fn assert_same_bytes(expected: &Path, copy: &Path, what: &str) {
    compare(expected, copy, what, Compared::Bytes);
}

/// What is compared.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Compared {
    All,
    Times,
    Bytes,
}

fn compare(expected: &Path, copy: &Path, what: &str, compared: Compared) {
    let (mut there, mut here) = (BTreeMap::new(), BTreeMap::new());
    facts(expected, Path::new(""), compared, &mut there);
    facts(copy, Path::new(""), compared, &mut here);
    let names = |facts: &BTreeMap<PathBuf, Facts>| facts.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&there), names(&here), "{what}");
    for (path, facts) in &there {
        assert_eq!(facts, &here[path], "{what}: {}", path.display());
    }
    assert!(there.len() > 5, "{what}: nothing was compared");
}
