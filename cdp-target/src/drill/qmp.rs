//! Two words with QEMU, by its machine protocol (QMP, docs/interop/qmp-spec.rst of QEMU): a picture of the screen, and the end.
//!
//! Invariant: an answer takes bounded time and memory, whatever is at the other end.

use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of an answer at most.
const ANSWER_BYTES_MAX: u64 = 64 << 10;
/// Events that may come before an answer.
const EVENTS_MAX: usize = 64;

/// Has QEMU write a picture of the machine's screen to `file`, by its own working folder, and end.
///
/// # Errors
/// Where it does not answer, or cannot do it.
pub(super) fn screenshot_and_quit(folder: &Path, socket: &str, file: &str) -> io::Result<()> {
    // By the folder's descriptor: a socket's path may have a hundred characters, a folder's any number.
    let folder =
        rustix::fs::open(folder, rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
    let stream = UnixStream::connect(format!("/proc/self/fd/{}/{socket}", folder.as_raw_fd()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = Qmp { answers: BufReader::new(stream.try_clone()?), stream };
    line.next()?;
    line.ask(&json!({ "execute": "qmp_capabilities" }))?;
    let taken = line.ask(&json!({ "execute": "screendump", "arguments": { "filename": file, "format": "png" } }));
    line.ask(&json!({ "execute": "quit" }))?;
    taken
}

struct Qmp {
    stream: UnixStream,
    answers: BufReader<UnixStream>,
}

impl Qmp {
    fn ask(&mut self, command: &Value) -> io::Result<()> {
        self.stream.write_all(format!("{command}\n").as_bytes())?;
        for _ in 0..EVENTS_MAX {
            let answer = self.next()?;
            if answer.get("return").is_some() {
                return Ok(());
            }
            if let Some(error) = answer.get("error") {
                return Err(io::Error::other(error.to_string()));
            }
        }
        Err(io::Error::other("no answer among its events"))
    }

    fn next(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if (&mut self.answers).take(ANSWER_BYTES_MAX).read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_str(&line).map_err(io::Error::other)
    }
}
