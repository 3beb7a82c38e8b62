//! Reading single files ends without leaving anything mounted or running: at the end, on a signal, after an error; and who may not is told so.

#![expect(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

mod cli_support;
mod files_support;

use cli_support::{Store, program};
use files_support::{Image, assert_clean, can_mount, command, has, pattern, text, tool};
use rustix::process::{Pid, Signal, kill_process};
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// An XFS with one file, made without mounting it.
fn xfs(store: &Store) -> Vec<u8> {
    let (image, content) = (Image::new(&store.path("image"), 300), store.path("content"));
    std::fs::write(&content, pattern(3_000_000, 2)).expect("written");
    std::fs::write(store.path("proto"), format!("/\n0 0\nd--755 0 0\nlarge ---644 0 0 {}\n$\n", text(&content)))
        .expect("written");
    image.mkfs(&["mkfs.xfs", "-q", "-f", "-p", text(&store.path("proto"))]);
    image.bytes()
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
fn nothing_stays_mounted_at_the_end_on_a_signal_or_after_an_error() {
    if !(can_mount() && has("mkfs.xfs")) {
        return;
    }
    let store = Store::new();
    let point = xfs(&store);
    store.fill_with_volumes(&[vec![("root", &point)]]);
    for signal in [Signal::INT, Signal::TERM] {
        let scratch = store.path(&format!("scratch{}", signal.as_raw()));
        let mut child = blocked(&store, &scratch);
        kill_process(Pid::from_child(&child), signal).expect("it runs");
        let ended = child.wait().expect("it ends");
        assert_clean(&scratch);
        assert_eq!(ended.code(), Some(1));
        assert_eq!(std::fs::read_dir(&scratch).expect("listed").count(), 0);
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
    if !(can_mount() && has("setpriv")) {
        return;
    }
    let store = Store::new();
    let mut xfs = vec![0; 1 << 20];
    xfs[..4].copy_from_slice(b"XFSB");
    store.fill_with_volumes(&[vec![("root", &xfs)]]);
    tool("chown", &["-R", "65534:65534", text(store.folder.path())]);
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
