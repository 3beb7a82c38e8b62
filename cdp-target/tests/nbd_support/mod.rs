//! An NBD server of a store, clients that nobody here wrote, and one that says whatever a test wants it to.

#![allow(dead_code, reason = "each test uses a part")]
#![allow(clippy::disallowed_methods, reason = "a test of the whole program looks at real files")]

use crate::cli_support::{Store, program};
use serde_json::Value;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Whatever a test waits for has to happen by then.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Whether a client is installed; says on stderr that a test is skipped where it is not.
pub(crate) fn has(test: &str, client: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there = std::env::split_paths(&path).any(|folder| folder.join(client).exists());
    assert!(there || std::env::var_os("CDP_ALL_MUST_RUN").is_none(), "{test} cannot run: no {client}");
    if !there {
        eprintln!("skipped: {test}: no {client} (`./scripts/test` installs it)");
    }
    there
}

/// Runs a client that has to succeed; gives its stdout.
pub(crate) fn client(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(name).args(arguments).stdin(Stdio::null()).output().expect("the client starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{name} {arguments:?}: {stdout}{stderr}");
    stdout.into_owned()
}

/// Runs a client that has to fail; gives what it says.
pub(crate) fn client_fails(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(name).args(arguments).stdin(Stdio::null()).output().expect("the client starts");
    assert!(!output.status.success(), "{name} {arguments:?}");
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// A server that runs, until dropped.
pub(crate) struct NbdServer {
    child: Child,
    pub(crate) document: Value,
    log: Arc<Mutex<Vec<String>>>,
    pub(crate) socket: PathBuf,
}

impl NbdServer {
    /// Serves `paris/main` on a unix socket beside the store.
    pub(crate) fn start(store: &Store, at: &str, more: &[&str]) -> Self {
        let socket = store.path("nbd.sock");
        let listen = format!("unix:{}", socket.display());
        Self::start_at(store, at, &[&["--listen", &listen], more].concat(), socket)
    }

    /// The same with the address among the arguments.
    pub(crate) fn start_at(store: &Store, at: &str, more: &[&str], socket: PathBuf) -> Self {
        let mut child = program()
            .args(["nbd", "paris/main", "--at", at, "--json"])
            .args(more)
            .env("CDP_TARGET_DATA", store.data())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        let log = Arc::new(Mutex::new(Vec::new()));
        let (lines, sink) = (BufReader::new(child.stderr.take().expect("piped")).lines(), Arc::clone(&log));
        std::thread::spawn(move || {
            lines.map_while(Result::ok).for_each(|line| sink.lock().expect("no panic").push(line));
        });
        // The document ends where the server serves.
        let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
        let mut text = String::new();
        while !text.ends_with("\n}\n") {
            let read = stdout.read_line(&mut text).expect("text");
            assert!(read > 0, "it serves, or says why not: {:?}", log.lock().expect("no panic"));
        }
        Self { child, document: serde_json::from_str(&text).expect("a document"), log, socket }
    }

    /// The URI of an export, which may have a point.
    pub(crate) fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    pub(crate) fn log(&self) -> String {
        self.log.lock().expect("no panic").join("\n")
    }

    /// Waits for words in the log.
    pub(crate) fn says(&self, words: &str) -> String {
        let start = std::time::Instant::now();
        loop {
            let log = self.log();
            if let Some(line) = log.lines().find(|line| line.contains(words)) {
                return line.to_owned();
            }
            assert!(start.elapsed() < DEADLINE, "{words:?} is not in the log:\n{log}");
            std::thread::yield_now();
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it ends");
    }

    /// Ends it as an operator does.
    pub(crate) fn end(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
        assert!(self.child.wait().expect("it ends").success(), "SIGTERM is a clean end: {}", self.log());
        assert!(!self.socket.exists(), "its socket goes with it");
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        // Both fail where it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client that says what it is told to.
pub(crate) struct Raw(pub(crate) UnixStream);

pub(crate) const GO: u32 = 7;
pub(crate) const LIST: u32 = 3;
pub(crate) const STRUCTURED: u32 = 8;
pub(crate) const SET_META: u32 = 10;

impl Raw {
    /// Connects and takes the greeting.
    pub(crate) fn greeted(socket: &Path) -> Self {
        let mut raw = Self::connected(socket);
        let mut greeting = [0; 18];
        raw.0.read_exact(&mut greeting).expect("a greeting");
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        assert_eq!(greeting[16..], [0, 3]);
        raw
    }

    pub(crate) fn connected(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).expect("a server listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("set");
        Self(stream)
    }

    /// Has gone through the handshake, with simple replies or structured ones.
    pub(crate) fn with_export(socket: &Path, name: &str, structured: bool) -> Self {
        let mut raw = Self::greeted(socket);
        raw.say(&[0, 0, 0, 3]);
        if structured {
            assert_eq!(raw.ask(STRUCTURED, &[]), [(1, vec![])]);
            let meta = [string(name), vec![0, 0, 0, 1], string("base:allocation")].concat();
            assert_eq!(raw.ask(SET_META, &meta).last().map(|(kind, _)| *kind), Some(1));
        }
        let answers = raw.ask(GO, &[string(name), vec![0, 0]].concat());
        assert_eq!(answers.last().map(|(kind, _)| *kind), Some(1), "{answers:?}");
        raw
    }

    pub(crate) fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("the server reads");
    }

    pub(crate) fn say_option(&mut self, number: u32, data: &[u8]) {
        self.say(&[b"IHAVEOPT".as_slice(), &number.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat());
    }

    /// Asks an option; gives the answers up to the last.
    pub(crate) fn ask(&mut self, number: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.say_option(number, data);
        self.answers(number)
    }

    pub(crate) fn answers(&mut self, number: u32) -> Vec<(u32, Vec<u8>)> {
        let mut answers = Vec::new();
        loop {
            let header = self.take(20);
            assert_eq!(header[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
            assert_eq!(header[8..12], number.to_be_bytes(), "an answer to what was asked");
            let (kind, len) = (u32_at(&header, 12), u32_at(&header, 16));
            let data = self.take(len as usize);
            answers.push((kind, data));
            if kind == 1 || kind >> 31 == 1 {
                return answers;
            }
        }
    }

    pub(crate) fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact(&mut bytes).expect("the server answers");
        bytes
    }

    pub(crate) fn request(&mut self, kind: u16, flags: u16, offset: u64, len: u32) {
        self.say(&request(kind, flags, offset, len));
    }

    /// The error of a simple reply.
    pub(crate) fn simple(&mut self) -> u32 {
        let reply = self.take(16);
        assert_eq!((u32_at(&reply, 0), &reply[8..]), (0x6744_6698, COOKIE.as_slice()));
        u32_at(&reply, 4)
    }

    /// The chunks of a structured reply: kinds and content.
    pub(crate) fn structured(&mut self) -> Vec<(u16, Vec<u8>)> {
        let mut chunks = Vec::new();
        loop {
            let header = self.take(20);
            assert!(u32_at(&header, 0) != 0x6744_6698, "a simple reply with error {}", u32_at(&header, 4));
            assert_eq!((u32_at(&header, 0), &header[8..16]), (0x668e_33ef, COOKIE.as_slice()));
            let content = self.take(u32_at(&header, 16) as usize);
            chunks.push((u16::from_be_bytes([header[6], header[7]]), content));
            if header[5] == 1 {
                return chunks;
            }
        }
    }

    /// Whether the server has ended the connection, once all that it had to say was heard.
    pub(crate) fn is_ended(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

pub(crate) const COOKIE: [u8; 8] = *b"cookie!!";

pub(crate) fn request(kind: u16, flags: u16, offset: u64, len: u32) -> Vec<u8> {
    let numbers = [flags.to_be_bytes(), kind.to_be_bytes()].concat();
    [&0x2560_9513_u32.to_be_bytes(), numbers.as_slice(), &COOKIE, &offset.to_be_bytes(), &len.to_be_bytes()].concat()
}

pub(crate) fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}
