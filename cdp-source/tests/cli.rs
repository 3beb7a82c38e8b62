//! Bad input on the command line of the real program: exit status, one line of error, a hint, and nothing changed.

#![expect(clippy::disallowed_methods, reason = "a test prepares real files")]

use std::path::Path;
use std::process::{Command, Output};

struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder") }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().expect("plain").to_owned()
    }

    fn file(&self, name: &str, content: &[u8]) -> String {
        let path = self.path(name);
        std::fs::create_dir_all(Path::new(&path).parent().expect("a folder")).expect("made");
        std::fs::write(&path, content).expect("written");
        path
    }

    fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_cdp-source"))
            .env("CDP_SOURCE_STATE", self.path("state"))
            .env("CDP_LOG", "warn")
            .args(arguments)
            .output()
            .expect("the program runs")
    }

    /// Runs, and expects the user's mistake: `error: …<part>…` and a hint.
    fn refused(&self, arguments: &[&str], part: &str, hint: &str) {
        let output = self.run(arguments);
        let error = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {error}");
        let mut lines = error.lines();
        let first = lines.next().unwrap_or_default();
        assert!(first.starts_with("error: ") && first.contains(part), "{arguments:?}: {error}");
        let second = lines.next().unwrap_or_default();
        assert!(second.starts_with("hint: ") && second.contains(hint), "{arguments:?}: {error}");
        assert_eq!(lines.next(), None, "{arguments:?}: {error}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
}

#[test]
fn what_cannot_be_said_is_refused_with_a_hint() {
    let bench = Bench::new();
    bench.refused(&["pause"], "unrecognized subcommand 'pause'", "");
    bench.refused(&["statsu"], "unrecognized subcommand 'statsu'", "status");
    bench.refused(&["protect"], "NAME=DEVICE", "--help");
    bench.refused(&["status", "--jsno"], "unexpected argument '--jsno'", "--json");
    bench.refused(&["unprotect", "--group"], "--group", "--help");
}

#[test]
fn help_and_version_go_to_stdout() {
    let bench = Bench::new();
    for argument in ["--help", "--version"] {
        let output = bench.run(&[argument]);
        assert_eq!(output.status.code(), Some(0));
        assert!(String::from_utf8(output.stdout).expect("text").contains("cdp-source"));
    }
}

#[test]
fn devices_that_cannot_be_volumes_are_refused() {
    let bench = Bench::new();
    let empty = bench.file("empty.img", b"");
    let image = bench.file("disk.img", &[7; 8192]);
    let link = bench.path("link.img");
    std::os::unix::fs::symlink(&image, &link).expect("linked");
    bench.refused(&["protect", "data=/nonexistent"], "/nonexistent does not exist", "lsblk");
    bench.refused(&["protect", "data=/dev/null"], "character device", "image file");
    bench.refused(&["protect", &format!("data={}", bench.folder.path().display())], "a folder", "image file");
    bench.refused(&["protect", &format!("data={empty}")], "0 bytes", "");
    bench.refused(&["protect", "data"], "\"data\" is not NAME=DEVICE", "data=/dev/vdb");
    bench.refused(&["protect", &format!("-={image}")], "unexpected argument", "");
    bench.refused(&["protect", &format!("a b={image}")], "\"a b\" cannot name a volume", "a-z");
    bench.refused(&["protect", "--group", "../x", &format!("a={image}")], "cannot name a group", "a-z");
    bench.refused(&["protect", &format!("a={image}"), &format!("b={link}")], "is already protected as a", "once");
    bench.refused(&["protect", &format!("a={image}"), &format!("a={image}")], "already has a volume named \"a\"", "");
    bench.refused(&["protect", "--tracker", "ebpf", &format!("a={image}")], "image file", "scan");
    assert!(!Path::new(&bench.path("state/source.toml")).exists(), "nothing was configured");
}

#[test]
fn without_joining_there_is_nothing_to_protect_or_run_for() {
    let bench = Bench::new();
    let image = bench.file("disk.img", &[7; 8192]);
    bench.refused(&["protect", &format!("a={image}")], "did not join", "cdp-source join");
    bench.refused(&["run"], "did not join", "cdp-source join");
    bench.refused(&["join", "/nonexistent.bundle"], "read bundle /nonexistent.bundle", "enroll");
    let torn = bench.file("torn.bundle", b"not a bundle");
    bench.refused(&["join", &torn], "", "enroll");
}

#[test]
fn without_an_agent_what_needs_one_says_so() {
    let bench = Bench::new();
    bench.refused(&["point"], "no agent is running", "cdp-source run");
    bench.refused(&["point", "--wait", "--label", "before"], "no agent is running", "cdp-source run");
    bench.refused(&["points"], "no group named \"main\" is protected", "cdp-source protect");
    bench.refused(&["point", "--label", "latest"], "latest", "word");
    bench.refused(&["point", "--label", "10m"], "age", "word");
    bench.refused(&["point", "--label", "2026-11-22T10:00:00Z"], "time", "word");
    bench.refused(&["unprotect", "data"], "no volume named \"data\"", "");
}

#[test]
fn a_wrong_configuration_is_refused_and_the_closest_key_named() {
    let bench = Bench::new();
    bench.file("state/source.toml", b"[groups.main]\nintervall_ms = 500\n");
    bench.refused(&["status"], "unknown key `intervall_ms` in [groups.main]", "`interval_ms`");
    let output = bench.run(&["doctor", "--json"]);
    assert_eq!(output.status.code(), Some(1), "doctor fails where something does not work");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one document");
    let findings = report["findings"].as_array().expect("a list");
    let of = |subject: &str| findings.iter().find(|finding| finding["subject"] == subject).expect("looked at");
    assert_eq!(of("configuration")["grade"], "fail");
    assert_eq!(of("target")["grade"], "warn");
    assert!(findings.iter().any(|finding| finding["subject"] == "kernel"));
}

#[test]
fn status_without_an_agent_shows_what_is_configured() {
    let bench = Bench::new();
    let volume = b"[[groups.main.volumes]]\nname = 'data'\nslot = 0\ndevice = '/dev/gone'\n";
    bench.file("state/source.toml", volume);
    let output = bench.run(&["status", "--json"]);
    assert_eq!(output.status.code(), Some(0));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one document");
    assert_eq!(report["running"], false);
    assert_eq!(report["configured"][0]["device"], "/dev/gone");
    let output = bench.run(&["doctor"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stdout)
            .expect("text")
            .contains("fail  volume main/data: device /dev/gone does not exist")
    );
}
