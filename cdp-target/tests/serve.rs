//! The server as a program: what it exports, and commands that come while it starts.

#![expect(clippy::disallowed_methods, reason = "a test that reads files and waits as a user would")]

use cdp_seams::storage::SystemStorage;
use cdp_target::store::Store;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Whatever a test waits for has to happen by then.
const DEADLINE: Duration = Duration::from_secs(30);

/// A store whose server and commands a test runs.
struct Site {
    folder: TempDir,
}

/// A program that is ended with its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail where it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Site {
    fn new(listen: &str) -> Self {
        let site = Self { folder: tempfile::tempdir().expect("a folder") };
        let made = site.program(&["init", "--listen", listen, "--name", "backup.example"]).status();
        assert!(made.expect("it starts").success());
        site
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    fn program(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cdp-target"));
        command.args(arguments).env("CDP_TARGET_DATA", self.data()).env_remove("CDP_LOG").stdin(Stdio::null());
        command
    }

    /// Starts the server, and waits until it listens.
    fn serve(&self) -> Running {
        let mut child = self.program(&["serve"]).stderr(Stdio::piped()).spawn().expect("it starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let listens = |line: std::io::Result<String>| line.expect("text").starts_with("listening on ");
        assert!(lines.any(listens), "it says where it listens before it ends");
        std::thread::spawn(move || lines.for_each(drop));
        Running(child)
    }
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < DEADLINE, "not in time: {what}");
        std::thread::yield_now();
    }
}

fn fetch_metrics(address: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

#[test]
fn metrics_are_exported_under_their_names() {
    let site = Site::new("127.0.0.1:0");
    // Free now, and not given out again so soon.
    let address = TcpListener::bind("127.0.0.1:0").and_then(|port| port.local_addr()).expect("a free port").to_string();
    let config = site.data().join("target.toml");
    let text = std::fs::read_to_string(&config).expect("configured");
    std::fs::write(&config, format!("{text}\nmetrics_listen = \"{address}\"\n")).expect("written");
    let _server = site.serve();
    let text = eventually("the gauges are set", || {
        fetch_metrics(&address).filter(|text| text.contains("cdp_target_free_bytes"))
    });
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    assert!(text.lines().any(|line| line.starts_with("cdp_target_connections 0")), "{text}");
}

#[test]
fn a_command_waits_for_a_server_that_is_starting() {
    let site = Site::new("127.0.0.1:7443");
    let bundle = site.folder.path().join("paris.bundle");
    let output = bundle.to_str().expect("text");
    // As a server is a moment after its start: the lock is taken, the socket not there yet.
    let lock = Store::open(Arc::new(SystemStorage), &site.data()).expect("a store").lock().expect("free");
    let child = site.program(&["enroll", "paris", "--output", output]).stdout(Stdio::null()).spawn();
    let mut enrolling = Running(child.expect("it starts"));
    eventually("the command is at work", || bundle.exists().then_some(()));
    assert!(enrolling.0.try_wait().expect("a child").is_none(), "it waits");
    drop(lock);
    assert!(enrolling.0.wait().expect("it ends").success());
    assert!(std::fs::read_to_string(&bundle).expect("written").len() > 100);

    // And where nobody lets go, it says so in the end.
    let _lock = Store::open(Arc::new(SystemStorage), &site.data()).expect("a store").lock().expect("free");
    let other = site.folder.path().join("lyon.bundle");
    let refused = site.program(&["enroll", "lyon", "--output", other.to_str().expect("text")]).output();
    let said = String::from_utf8(refused.expect("it starts").stderr).expect("text");
    assert!(said.contains("is in use by another server") && said.contains("hint: "), "{said}");
    assert!(!other.exists());
}

#[test]
fn a_command_right_after_the_start_reaches_the_server() {
    let site = Site::new("127.0.0.1:0");
    let server = Running(site.program(&["serve"]).stderr(Stdio::null()).spawn().expect("it starts"));
    let pid = server.0.id().to_string();
    eventually("the server has the lock", || {
        let holder = std::fs::read_to_string(site.data().join("lock")).ok()?;
        (holder == pid).then_some(())
    });
    let bundle = site.folder.path().join("paris.bundle");
    let enrolled = site.program(&["enroll", "paris", "--output", bundle.to_str().expect("text")]).output();
    let enrolled = enrolled.expect("it starts");
    assert!(enrolled.status.success(), "{}", String::from_utf8_lossy(&enrolled.stderr));
}
