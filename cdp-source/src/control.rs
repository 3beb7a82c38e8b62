//! The agent's control socket: one request a connection, one line of JSON each way.
//!
//! Who may connect is who may enter the state folder (mode 0700). Requests are bounded in length and time, and so is
//! their number. What a request does is the agent's business.

use crate::agent::status::AgentStatus;
use crate::state::StateFolder;
use cdp_protocol::message::PointSummary;
use cdp_protocol::units::{Class, Epoch, Timestamp};
use serde::{Deserialize, Serialize};
use std::future::Future;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

const REQUEST_BYTES_MAX: u64 = 16 * 1024;
const REPLY_BYTES_MAX: u64 = 64 << 20;
const REQUESTS_MAX: usize = 16;
const REQUEST_WAIT: Duration = Duration::from_secs(10);

/// What is asked of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case")]
pub enum Request {
    /// How it stands.
    Status,
    /// Take up the changed configuration.
    Reload,
    /// A recovery point now.
    Point {
        /// Of which group.
        group: String,
        /// Its name.
        label: Option<String>,
        /// Whether to answer only when the target has acked it.
        wait: bool,
        /// How long to wait for the answer at most, in milliseconds; `None` for as long as it takes.
        timeout_ms: Option<u64>,
    },
    /// The recovery points at the target.
    Points {
        /// Of which group.
        group: String,
    },
    /// Whether a volume is being restored has changed: look, and answer once no cut goes by what was so before.
    Restoring {
        /// Of which group.
        group: String,
    },
    /// A local image now; answered once that is known, not made.
    Image {
        /// Of which group.
        group: String,
    },
}

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// To `Status`.
    Status(Box<AgentStatus>),
    /// To `Reload`.
    Reloaded,
    /// To `Point`.
    Point(PointReply),
    /// To `Points`, oldest first.
    Points {
        /// The points.
        points: Vec<PointSummary>,
    },
    /// To `Restoring`: what the group goes by now.
    Restoring {
        /// Why no points are made, while a volume is restored.
        held: Option<String>,
    },
    /// To `Image`.
    Image,
    /// To anything.
    Failed {
        /// Why, in a line.
        message: String,
        /// The next step.
        hint: Option<String>,
    },
}

/// A point that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointReply {
    /// Its number.
    pub epoch: Epoch,
    /// The instant of its cut.
    pub time: Timestamp,
    /// Its name.
    pub label: Option<String>,
    /// Whether the target has acked it.
    pub acked: bool,
    /// What it is worth to an application.
    pub class: Class,
    /// Why it is not worth more, where hooks were to see to it.
    pub warning: Option<String>,
}

/// Why the agent could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens.
    #[error("no agent is running on state folder {}", .0.display())]
    NotRunning(PathBuf),
    /// The connection failed.
    #[error("ask the agent over {}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What came back.
        #[source]
        source: io::Error,
    },
    /// The answer is none.
    #[error("the agent's answer does not parse: is it of another version?")]
    Answer(#[source] serde_json::Error),
}

/// Asks the running agent, waiting for as long as the answer takes.
///
/// # Errors
/// Where none is running, or the answer does not come or parse.
pub fn ask(state: &StateFolder, request: &Request) -> Result<Reply, ControlError> {
    let path = state.socket();
    let stream = match UnixStream::connect(&path) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Err(ControlError::NotRunning(state.root().to_owned()));
        }
        other => other.map_err(|source| ControlError::Io { path: path.clone(), source })?,
    };
    let exchange = || -> io::Result<String> {
        let mut line = serde_json::to_string(request).expect("requests are plain JSON");
        line.push('\n');
        (&stream).write_all(line.as_bytes())?;
        let mut answer = String::new();
        BufReader::new(&stream).take(REPLY_BYTES_MAX).read_line(&mut answer)?;
        Ok(answer)
    };
    let answer = exchange().map_err(|source| ControlError::Io { path, source })?;
    if answer.is_empty() {
        return Err(ControlError::NotRunning(state.root().to_owned()));
    }
    serde_json::from_str(&answer).map_err(ControlError::Answer)
}

/// A reply that is on its way.
pub type ReplyFuture = Pin<Box<dyn Future<Output = Reply> + Send>>;
/// Answers requests.
pub type Handler = Arc<dyn Fn(Request) -> ReplyFuture + Send + Sync>;

/// Listens on the state folder's socket, in the place of what a killed agent left. The caller holds the agent's lock.
///
/// # Errors
/// Where the socket cannot be made.
pub fn listen(state: &StateFolder) -> Result<UnixListener, ControlError> {
    let path = state.socket();
    let failed = |source| ControlError::Io { path: path.clone(), source };
    match state.storage().remove(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    UnixListener::bind(&path).map_err(failed)
}

/// Serves requests until it is dropped.
pub async fn serve(listener: UnixListener, handler: Handler) {
    let slots = Arc::new(Semaphore::new(REQUESTS_MAX));
    loop {
        let slot = Arc::clone(&slots).acquire_owned().await.expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                let handler = Arc::clone(&handler);
                tokio::spawn(async move {
                    if let Err(error) = answer(stream, &handler).await {
                        tracing::debug!(%error, "control request");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept a control connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer(mut stream: tokio::net::UnixStream, handler: &Handler) -> io::Result<()> {
    let (read, mut write) = stream.split();
    let mut line = String::new();
    let mut bounded = tokio::io::BufReader::new(read).take(REQUEST_BYTES_MAX);
    tokio::time::timeout(REQUEST_WAIT, bounded.read_line(&mut line)).await??;
    let reply = match serde_json::from_str(&line) {
        Ok(request) => handler(request).await,
        Err(error) => Reply::Failed { message: format!("the request does not parse: {error}"), hint: None },
    };
    let mut text = serde_json::to_string(&reply).expect("replies are plain JSON");
    text.push('\n');
    write.write_all(text.as_bytes()).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_seams::storage::SystemStorage;

    fn state() -> (tempfile::TempDir, StateFolder) {
        let folder = tempfile::tempdir().expect("a folder");
        let state = StateFolder::new(Arc::new(SystemStorage), folder.path());
        (folder, state)
    }

    #[test]
    fn without_an_agent_the_error_says_so() {
        let (_folder, state) = state();
        assert!(matches!(ask(&state, &Request::Status), Err(ControlError::NotRunning(_))));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_request_is_answered_and_garbage_is_refused() {
        let (_folder, state) = state();
        let handler: Handler = Arc::new(|request| {
            Box::pin(async move {
                match request {
                    Request::Reload => Reply::Reloaded,
                    _ => Reply::Failed { message: "not now".into(), hint: None },
                }
            })
        });
        for _ in 0..2 {
            let listener = listen(&state).expect("also over a leftover");
            let server = tokio::spawn(serve(listener, Arc::clone(&handler)));
            let asked = state.clone();
            let reply = tokio::task::spawn_blocking(move || ask(&asked, &Request::Reload)).await.expect("asked");
            assert_eq!(reply.expect("answered"), Reply::Reloaded);
            server.abort();
        }
        let listener = listen(&state).expect("listening");
        tokio::spawn(serve(listener, handler));
        let mut stream = tokio::net::UnixStream::connect(state.socket()).await.expect("connected");
        stream.write_all(b"{\"verb\":\"erase\"}\n").await.expect("written");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("read");
        assert!(answer.contains("does not parse"), "{answer}");
    }
}
