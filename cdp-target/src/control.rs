//! The control socket: how commands reach a running server.
//!
//! One connection, one request, one reply, each a line of JSON. The socket is mode 0600 in a folder of mode 0700: who
//! reaches it may do what the commands do. The server's side answers through a `Handler`; it knows no command itself.

use crate::journal::change::Change;
use serde::{Deserialize, Serialize};
use std::future::Future;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};

/// A change of a store that was prepared elsewhere is the longest.
const REQUEST_BYTES_MAX: u64 = 4 << 20;
const REPLY_BYTES_MAX: u64 = 256 << 20;
const CONNECTIONS_MAX: usize = 16;
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a command waits for the server's answer.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// What a command asks of the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Request {
    /// All offices and groups, with what only the server knows.
    Status,
    /// Gives a point a label.
    Label {
        /// The office's name.
        office: String,
        /// The group's name.
        group: String,
        /// The point's number.
        epoch: u64,
        /// The label.
        label: String,
    },
    /// Keeps a point from pruning, or no longer.
    Pin {
        /// The office's name.
        office: String,
        /// The group's name.
        group: String,
        /// The point's number.
        epoch: u64,
        /// Whether it is kept.
        pinned: bool,
    },
    /// Ends a fork.
    Resolve {
        /// The office's name.
        office: String,
        /// The group's name.
        group: String,
        /// Where the history ends that goes on.
        continue_from: String,
    },
    /// Gives a change that a command prepared its place in the manifest.
    Adopt {
        /// The office's name.
        office: String,
        /// The group's name.
        group: String,
        /// The change.
        change: Change,
    },
    /// Whether a view in the server still goes by an older manifest.
    Leased {
        /// The office's name.
        office: String,
        /// The group's name.
        group: String,
    },
    /// Makes a bundle for an office.
    Enroll {
        /// The office's name.
        office: String,
        /// How long the bundle may be used.
        valid_for_ms: u64,
        /// Whether a known office gets new hardware.
        replace: bool,
    },
}

/// The server's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done, with what was asked for.
    Done(serde_json::Value),
    /// Not done.
    Failed {
        /// What failed, in one line.
        error: String,
        /// The next step.
        hint: Option<String>,
        /// Whether it is the user's mistake.
        user: bool,
    },
}

/// Why the server did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket failed.
    #[error("talk to the running server: socket={}", .path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The answer is none.
    #[error("understand the running server: socket={}", .path.display())]
    Reply {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// Asks the server that listens on `path`; `None` where none does.
///
/// # Errors
/// Where there is a server and it does not answer.
pub fn ask(path: &Path, request: &Request) -> Result<Option<Reply>, ControlError> {
    let stream = match UnixStream::connect(path) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        other => other,
    };
    let line = stream
        .and_then(|stream| exchange(&stream, request))
        .map_err(|source| ControlError::Socket { path: path.to_owned(), source })?;
    let reply = serde_json::from_str(&line).map_err(|source| ControlError::Reply { path: path.to_owned(), source })?;
    Ok(Some(reply))
}

fn exchange(mut stream: &UnixStream, request: &Request) -> io::Result<String> {
    stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut reply = String::new();
    BufReader::new(stream).take(REPLY_BYTES_MAX).read_line(&mut reply)?;
    Ok(reply)
}

/// A reply that is on its way.
pub type ReplyFuture = Pin<Box<dyn Future<Output = Reply> + Send>>;

/// Does what commands ask.
pub trait Handler: Send + Sync + 'static {
    /// Does one request.
    fn handle(self: Arc<Self>, request: Request) -> ReplyFuture;
}

/// The socket of a server, bound; its file goes with it.
pub struct ControlSocket {
    listener: tokio::net::UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    /// Binds `path` over what a dead server left there. The caller holds the store's lock, and runs in a tokio runtime.
    ///
    /// # Errors
    /// As the system says.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match rustix::fs::unlink(path) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let listener = tokio::net::UnixListener::bind(path)?;
        rustix::fs::chmod(path, rustix::fs::Mode::from_raw_mode(0o600))?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Answers until it is dropped.
    pub async fn serve(&self, handler: Arc<dyn Handler>) {
        let permits = Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX));
        loop {
            let permit = Arc::clone(&permits).acquire_owned().await.expect("never closed");
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let handler = Arc::clone(&handler);
                    tokio::spawn(async move {
                        if let Err(error) = answer(stream, handler).await {
                            tracing::debug!(%error, "a command went away");
                        }
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "control socket does not accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if let Err(error) = rustix::fs::unlink(&self.path) {
            tracing::debug!(%error, "control socket's file is left behind");
        }
    }
}

async fn answer(stream: tokio::net::UnixStream, handler: Arc<dyn Handler>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut read = tokio::io::BufReader::new(read.take(REQUEST_BYTES_MAX));
    tokio::time::timeout(READ_TIMEOUT, read.read_line(&mut line)).await??;
    let reply = match serde_json::from_str(&line) {
        Ok(request) => handler.handle(request).await,
        Err(error) => Reply::Failed {
            error: format!("the server does not understand the request: {error}"),
            hint: Some("the running server may be of another version: restart it".to_owned()),
            user: false,
        },
    };
    let mut bytes = serde_json::to_vec(&reply)?;
    bytes.push(b'\n');
    write.write_all(&bytes).await
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl Handler for Echo {
        fn handle(self: Arc<Self>, request: Request) -> ReplyFuture {
            Box::pin(async move { Reply::Done(serde_json::to_value(request).expect("json")) })
        }
    }

    #[tokio::test]
    async fn a_request_is_answered_and_garbage_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("serve.sock");
        assert!(ask(&path, &Request::Status).expect("no server").is_none());
        let socket = ControlSocket::bind(&path).expect("bound");
        assert_eq!(rustix::fs::stat(&path).expect("there").st_mode & 0o777, 0o600);
        let serving = tokio::spawn(async move { socket.serve(Arc::new(Echo)).await });
        let request =
            Request::Label { office: "a".into(), group: "b".into(), epoch: u64::MAX, label: "two\nlines".into() };
        let (asked, sent, at) = (request.clone(), request.clone(), path.clone());
        let reply = tokio::task::spawn_blocking(move || ask(&at, &sent)).await.expect("asked").expect("answered");
        assert_eq!(reply, Some(Reply::Done(serde_json::to_value(asked).expect("json"))));

        let at = path.clone();
        let garbage = tokio::task::spawn_blocking(move || {
            let mut stream = UnixStream::connect(&at)?;
            stream.write_all(b"{\"command\":\"format\"}\n")?;
            let mut reply = String::new();
            stream.read_to_string(&mut reply).map(|_| reply)
        });
        let reply: Reply = serde_json::from_str(&garbage.await.expect("asked").expect("answered")).expect("json");
        assert!(matches!(reply, Reply::Failed { user: false, .. }));
        serving.abort();
        let _ = serving.await;
        assert!(ask(&path, &request).expect("gone").is_none(), "the socket went with the server");
    }
}
