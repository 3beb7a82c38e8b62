//! File systems that the kernel reads for us: what it gives, and that nothing of it stays, however it ends.

#![expect(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

mod cli_support;
mod files_support;

use cli_support::{Store, program};
use files_support::{Image, Mounted, assert_same, can_mount, has, pattern, text};
use rustix::process::{Pid, Signal, kill_process};
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn can_run() -> bool {
    has("nbdfuse") && has("mkfs.xfs") && has("losetup") && can_mount()
}

/// A file system in use, copied as a point of it would be.
fn in_use(store: &Store, kind: &str, mkfs: &[&str], mib: u64) -> Vec<u8> {
    let (image, at) = (Image::new(&store.path("image"), mib), store.path("mnt"));
    image.mkfs(mkfs);
    let _mounted = Mounted::new(&image.path, &at, kind, "rw");
    std::fs::create_dir_all(at.join("etc/deep")).expect("made");
    for number in 0..50 {
        std::fs::write(at.join(format!("etc/deep/{number}")), pattern(number * 700, 1)).expect("written");
    }
    std::fs::write(at.join("large"), pattern(3_000_000, 2)).expect("written");
    std::os::unix::fs::symlink("/etc/deep/7", at.join("link")).expect("made");
    std::fs::File::open(&at).expect("a folder").sync_all().expect("synced");
    rustix::fs::syncfs(std::fs::File::open(&at).expect("a folder")).expect("synced");
    // What only the log has.
    std::fs::create_dir(at.join("made-late")).expect("made");
    std::fs::write(at.join("made-late/file"), b"late").expect("written");
    std::fs::File::open(at.join("made-late/file")).expect("there").sync_all().expect("synced");
    image.bytes()
}

/// Nothing that was started or mounted for a command with that scratch folder is left.
fn assert_clean(scratch: &Path) {
    let start = Instant::now();
    loop {
        let loops = String::from_utf8_lossy(&Command::new("losetup").arg("--all").output().expect("losetup").stdout)
            .into_owned();
        let programs = std::fs::read_dir("/proc").expect("listed").flatten().filter(|process| {
            let line = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).into_owned();
            line.contains("nbdfuse") && line.contains(text(scratch))
        });
        let programs = programs.count();
        if programs == 0 && !loops.contains(text(scratch)) {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(60), "left: {programs} programs, {loops}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("there");
    assert!(!mounts.contains(text(scratch)), "{mounts}");
}

fn command(store: &Store, scratch: &Path, arguments: &[&str]) -> Command {
    std::fs::create_dir_all(scratch).expect("made");
    let mut command = program();
    command.args(["files", "paris/main/root", "--at", "latest"]).args(arguments);
    command.env("CDP_TARGET_DATA", store.data()).env("TMPDIR", scratch);
    command
}

#[test]
fn file_systems_without_a_reader_are_read_by_the_kernel_with_their_logs_replayed() {
    if !can_run() || !has("mkfs.btrfs") {
        return;
    }
    for (kind, mkfs, mib) in [
        ("xfs", &["mkfs.xfs", "-q", "-f"][..], 300),
        ("btrfs", &["mkfs.btrfs", "-q", "-f"], 120),
        ("ext4", &["mkfs.ext4", "-q", "-F"], 48),
    ] {
        let store = Store::new();
        let point = in_use(&store, kind, mkfs, mib);
        store.fill_with_volumes(&[vec![("root", &point)]]);
        let (copied, scratch) = (store.path("copied"), store.path("scratch"));
        let more: &[&str] = if kind == "ext4" { &["--kernel"] } else { &[] };
        let output =
            command(&store, &scratch, &[more, &["cp", "-r", "/", text(&copied)]].concat()).output().expect("started");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{kind}: {said}");
        assert!(kind == "btrfs" || said.contains("the kernel replayed its log, into a scratch file"), "{kind}: {said}");
        assert_eq!(std::fs::read_dir(&scratch).expect("listed").count(), 0, "{kind}");
        assert_clean(&scratch);
        // The same on a copy.
        let (image, at) = (store.path("image"), store.path("mnt"));
        std::fs::write(&image, &point).expect("written");
        let _mounted = Mounted::new(&image, &at, kind, "rw");
        assert_same(&at, &copied, kind);
        let cat = command(&store, &scratch, &["cat", "/link", "made-late/file"]).output().expect("started");
        let expected = [pattern(7 * 700, 1), b"late".to_vec()].concat();
        assert_eq!(cat.stdout, expected, "{kind}: links lead within: {}", String::from_utf8_lossy(&cat.stderr));
    }
}

/// Started, and blocked while it prints: nobody reads it on.
fn blocked(store: &Store, scratch: &Path) -> Child {
    let mut child = command(store, scratch, &["cat", "/large"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("started");
    let mut first = [0];
    child.stdout.as_mut().expect("piped").read_exact(&mut first).expect("it prints");
    child
}

#[test]
fn nothing_stays_mounted_however_it_ends() {
    if !can_run() {
        return;
    }
    let store = Store::new();
    let point = in_use(&store, "xfs", &["mkfs.xfs", "-q", "-f"], 300);
    store.fill_with_volumes(&[vec![("root", &point)]]);
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        let scratch = store.path(&format!("scratch{}", signal.as_raw()));
        let mut child = blocked(&store, &scratch);
        kill_process(Pid::from_child(&child), signal).expect("it runs");
        let ended = child.wait().expect("it ends");
        assert_clean(&scratch);
        if signal != Signal::KILL {
            assert_eq!(ended.code(), Some(1));
            assert_eq!(std::fs::read_dir(&scratch).expect("listed").count(), 0);
        }
    }
    // A reader that has enough is no error.
    let scratch = store.path("scratch");
    let mut child = blocked(&store, &scratch);
    drop(child.stdout.take());
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    assert_clean(&scratch);
    // A file system that the kernel does not take.
    let mut broken = point;
    broken[4..8].fill(0xff);
    let store = Store::new();
    store.fill_with_volumes(&[vec![("root", &broken)]]);
    let output = command(&store, &scratch, &["ls"]).output().expect("started");
    cli_support::refused(&output, &["ls"], &["the kernel does not mount it", "drill"]);
    assert_clean(&scratch);
    assert_eq!(std::fs::read_dir(&scratch).expect("listed").count(), 0);
}

#[test]
fn whoever_may_not_mount_is_told_so() {
    if !can_run() || !has("setpriv") {
        return;
    }
    let store = Store::new();
    let mut xfs = vec![0; 1 << 20];
    xfs[..4].copy_from_slice(b"XFSB");
    store.fill_with_volumes(&[vec![("root", &xfs)]]);
    files_support::tool("chown", &["-R", "65534:65534", text(store.folder.path())]);
    let program = program();
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(program.get_program())
        .args(["files", "paris/main/root", "--at", "latest", "ls"])
        .env("CDP_TARGET_DATA", store.data())
        .output()
        .expect("started");
    cli_support::refused(&output, &["ls"], &["only root may do", "run it as root"]);
}
