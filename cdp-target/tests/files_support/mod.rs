//! File systems that are made, mounted and compared.

#![allow(dead_code, reason = "each test uses a part")]
#![allow(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

use crate::cli_support::{Store, program};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// Whether a program is there; missing only where the whole run may pass over it.
pub(crate) fn has(program: &str) -> bool {
    let found = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].iter().any(|at| Path::new(at).join(program).exists());
    may_skip(found, program)
}

/// Whether file systems can be mounted here, and those of points, too.
pub(crate) fn can_mount() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    may_skip(is_root && Path::new("/dev/loop-control").exists(), "mounting") && has("nbdfuse") && has("losetup")
}

/// Whether the kernel has a file system; some are built without, and no package mends that.
pub(crate) fn kernel_has(name: &str) -> bool {
    let _ = Command::new("/sbin/modprobe").args(["--quiet", name]).output();
    let list = std::fs::read_to_string("/proc/filesystems").expect("there");
    list.lines().any(|line| line.split_whitespace().last() == Some(name))
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
    let output = Command::new(program).args(arguments).env("PATH", path).env("LC_ALL", "C.UTF-8").output();
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

/// What is at each path of a folder: its kind and content, its mode, owner and time, its attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Facts(BTreeMap<PathBuf, Fact>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Fact {
    content: String,
    mode: u32,
    owner: (u32, u32),
    modified: (i64, i64),
    attributes: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Facts {
    /// All that is below a folder, but for devices, sockets and pipes.
    pub(crate) fn of(at: &Path) -> Self {
        let mut facts = Self(BTreeMap::new());
        facts.add(at, Path::new(""));
        assert!(facts.0.len() > 5, "too little to compare: {facts:?}");
        facts
    }

    fn add(&mut self, at: &Path, below: &Path) {
        for entry in std::fs::read_dir(at.join(below)).expect("listed") {
            let below = below.join(entry.expect("an entry").file_name());
            let path = at.join(&below);
            let known = std::fs::symlink_metadata(&path).expect("there");
            let content = match known.file_type() {
                kind if kind.is_file() => format!("file {}", blake3::hash(&std::fs::read(&path).expect("read"))),
                kind if kind.is_dir() => "folder".to_owned(),
                kind if kind.is_symlink() => format!("link {}", std::fs::read_link(&path).expect("read").display()),
                _ => continue,
            };
            let fact = Fact {
                content,
                mode: known.mode(),
                owner: (known.uid(), known.gid()),
                modified: (known.mtime(), known.mtime_nsec()),
                attributes: attributes(&path),
            };
            self.0.insert(below.clone(), fact);
            if known.is_dir() {
                self.add(at, &below);
            }
        }
    }

    /// Without what is at and below a path.
    pub(crate) fn without(mut self, path: &str) -> Self {
        self.0.retain(|at, _| !at.starts_with(path));
        self
    }

    /// Names and content alone, as far as every file system has them.
    pub(crate) fn of_any_file_system(mut self) -> Self {
        for fact in self.0.values_mut() {
            (fact.mode, fact.owner, fact.modified) = (0, (0, 0), (0, 0));
        }
        self
    }

    /// Holds each path against another's.
    pub(crate) fn assert_same(&self, copy: &Self, what: &str) {
        let names = |facts: &Self| facts.0.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(self), names(copy), "{what}");
        for (path, fact) in &self.0 {
            assert_eq!(fact, &copy.0[path], "{what}: {}", path.display());
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

/// A command over a store's volume `root`, with a scratch folder of its own.
pub(crate) fn command(store: &Store, scratch: &Path, arguments: &[&str]) -> Command {
    std::fs::create_dir_all(scratch).expect("made");
    let mut command = program();
    command.args(["files", "paris/main/root", "--at", "latest"]).args(arguments);
    command.env("CDP_TARGET_DATA", store.data()).env("TMPDIR", scratch);
    command
}

/// Nothing that was started or mounted for a command with that scratch folder is left.
pub(crate) fn assert_clean(scratch: &Path) {
    let start = Instant::now();
    loop {
        let loops = tool("losetup", &["--all"]);
        let programs = std::fs::read_dir("/proc").expect("listed").flatten().filter(|process| {
            let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            (line.contains("nbdfuse") || line.contains("ntfs-3g")) && line.contains(text(scratch))
        });
        let programs = programs.count();
        if programs == 0 && !loops.contains(text(scratch)) {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(120), "left: {programs} programs, {loops}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("there");
    assert!(!mounts.contains(text(scratch)), "{mounts}");
}
