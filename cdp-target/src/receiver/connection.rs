//! One connection: the hello, its control messages, its streams of frames.
//!
//! Holds the connection's groups and the numbers of their sessions. Reads no more of a stream than its group has room for. What is read
//! of a point for its source is `recall`'s, and waits for everything else that is to be said.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::BufMut;
use cdp_protocol::frame::{self, FrameError};
use cdp_protocol::limits::MESSAGE_BYTES_MAX;
use cdp_protocol::message::{self, SourceMessage, TargetMessage};
use cdp_protocol::session::target::{GROUPS_MAX, TargetAction, TargetRefusal, TargetSession};
use cdp_protocol::units::{GroupId, Timestamp};
use cdp_seams::line::{Control, Line, ReceiveStream, SendStream, read_packet, write_packet};
use tokio::io::AsyncReadExt;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::warn;

use super::group::{Command, Outbox, Session};
use super::recall::Recall;
use super::{FRAME_CHARGE_MIN, GroupHandle, Receiver};
use crate::points::CLOCKS_APART_MS;

/// From the connection to its hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Without a message: a source asks for a sign of life every 15 s.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(60);
/// For a refused source to read why.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(3);
/// Answers that wait for the line: at most 8 acks a group and a few more.
const OUTBOX_MESSAGES: usize = 1024;
/// Streams of frames at once: one a group, and old ones that have not ended yet.
const STREAMS_MAX: usize = 2 * GROUPS_MAX;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The line broke, or the source went away.
    #[error("the line is gone")]
    Line(#[from] io::Error),
    /// No sign of life.
    #[error("nothing was heard in {0:?}")]
    Silent(Duration),
    /// A message that no sound source of this version sends.
    #[error(transparent)]
    Refused(#[from] TargetRefusal),
    /// Bytes that are no frame of the group.
    #[error("group {group}: {error}")]
    Frame {
        /// The group.
        group: GroupId,
        /// What is wrong.
        error: FrameError,
    },
    /// A stream of a group that is not open here.
    #[error("frames of group {0}, which is not open on this connection")]
    Stream(GroupId),
    /// Too many streams.
    #[error("more than {STREAMS_MAX} streams of frames")]
    TooManyStreams,
    /// A group's thread ended it.
    #[error("{0}")]
    Ended(String),
}

/// What the tasks of a connection share.
struct Connection {
    receiver: Arc<Receiver>,
    office: String,
    number: u64,
    outbox: Outbox,
    open: Mutex<HashMap<GroupId, Held>>,
    recall: Recall,
}

#[derive(Clone)]
struct Held {
    session: u64,
    handle: GroupHandle,
}

pub(super) async fn serve(receiver: Arc<Receiver>, line: Arc<dyn Line>, office: String) -> Result<(), ConnectionError> {
    let mut session = TargetSession::new(receiver.software.clone());
    let Control { mut send, mut receive } = match timeout(HELLO_TIMEOUT, line.accept_control()).await {
        Ok(control) => control?,
        Err(_) => return Err(silent(&*line, HELLO_TIMEOUT)),
    };
    let Ok(bytes) = timeout(HELLO_TIMEOUT, read_packet(&mut *receive, MESSAGE_BYTES_MAX)).await else {
        return Err(silent(&*line, HELLO_TIMEOUT));
    };
    let (bytes, now) = (bytes?, Timestamp(receiver.clock.wall_ms()));
    let reply = match session.receive(&bytes, now) {
        Ok(TargetAction::Reply(reply)) => reply,
        Ok(_) => unreachable!("a hello is replied to"),
        Err(refusal) => return Err(refuse(&*line, send, refusal).await),
    };
    write_packet(&mut *send, &message::encode(&reply)).await?;
    if let Some(warning) = clock_warning(&bytes, now) {
        warn!(office, "{warning}");
    }

    let (messages, answers) = mpsc::channel(OUTBOX_MESSAGES);
    let (recall, recalled) = Recall::new();
    let outbox = Outbox { messages, ending: watch::Sender::new(None) };
    let mut ending = outbox.ending.subscribe();
    let number = receiver.number();
    let connection = Arc::new(Connection { receiver, office, number, outbox, open: Mutex::default(), recall });
    let writing = write_messages(send, (answers, recalled), connection.outbox.ending.subscribe(), &*line);
    tokio::pin!(writing);
    let error = tokio::select! {
        error = connection.read_messages(session, receive) => error,
        error = &mut writing => error,
        error = connection.accept_streams(&*line) => error,
        reason = wait_for_end(&mut ending) => {
            // What it was told before is to arrive; a peer that does not read it does not keep the connection.
            let _ = timeout(REFUSAL_TIMEOUT, &mut writing).await;
            ConnectionError::Ended(reason)
        }
        () = line.closed() => ConnectionError::Line(io::ErrorKind::ConnectionReset.into()),
    };
    // A group's thread ends it and the peer goes, as it was told to: the reason is the thread's, whichever is seen first.
    let told = connection.outbox.ending.borrow().clone();
    let error = told.map_or(error, ConnectionError::Ended);
    line.close(&error.to_string());
    connection.release().await;
    Err(error)
}

/// A warning where a hello's clock and ours are far apart: everything works, but the times of points mislead.
fn clock_warning(hello: &[u8], now: Timestamp) -> Option<String> {
    let Ok(SourceMessage::Hello { time, .. }) = message::decode(hello) else { return None };
    let ahead_ms = time.0.saturating_sub(now.0);
    let side = if ahead_ms > 0 { "ahead of" } else { "behind" };
    let minutes = ahead_ms.unsigned_abs() / 60_000;
    (ahead_ms.unsigned_abs() > CLOCKS_APART_MS)
        .then(|| format!("the office's clock is {minutes} minutes {side} ours: the times of its points mislead"))
}

fn silent(line: &dyn Line, within: Duration) -> ConnectionError {
    let error = ConnectionError::Silent(within);
    line.close(&error.to_string());
    error
}

/// Tells why, and waits a little for it to be read.
async fn refuse(line: &dyn Line, mut send: SendStream, refusal: TargetRefusal) -> ConnectionError {
    let bytes = message::encode(&refusal.message());
    let told = async {
        write_packet(&mut *send, &bytes).await?;
        drop(send);
        line.closed().await;
        Ok::<_, io::Error>(())
    };
    // However that goes, the refusal is what ended the connection.
    let _ = timeout(REFUSAL_TIMEOUT, told).await;
    line.close(&refusal.to_string());
    refusal.into()
}

/// Waits until somebody ends the connection; gives the reason.
async fn wait_for_end(ending: &mut watch::Receiver<Option<String>>) -> String {
    ending.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone()).unwrap_or_default()
}

/// Writes answers until the connection is ended; then those that were given before, and waits for the peer to go.
async fn write_messages(
    mut send: SendStream,
    (mut answers, mut recalled): (mpsc::Receiver<TargetMessage>, mpsc::Receiver<TargetMessage>),
    mut ending: watch::Receiver<Option<String>>,
    line: &dyn Line,
) -> ConnectionError {
    let reason = loop {
        let answer = tokio::select! {
            biased;
            answer = answers.recv() => answer,
            Some(answer) = recalled.recv() => Some(answer),
            reason = wait_for_end(&mut ending) => break reason,
        };
        let Some(answer) = answer else { break String::new() };
        if let Err(error) = write_packet(&mut *send, &message::encode(&answer)).await {
            return error.into();
        }
    };
    drop(send);
    line.closed().await;
    ConnectionError::Ended(reason)
}

impl Connection {
    async fn read_messages(&self, mut session: TargetSession, mut receive: ReceiveStream) -> ConnectionError {
        loop {
            let bytes = match timeout(SILENCE_TIMEOUT, read_packet(&mut *receive, MESSAGE_BYTES_MAX)).await {
                Ok(Ok(bytes)) => bytes,
                Ok(Err(error)) => return error.into(),
                Err(_) => return ConnectionError::Silent(SILENCE_TIMEOUT),
            };
            match session.receive(&bytes, Timestamp(self.receiver.clock.wall_ms())) {
                Ok(action) => self.act(action).await,
                Err(refusal) => return refusal.into(),
            }
        }
    }

    async fn act(&self, action: TargetAction) {
        let (group, command) = match action {
            TargetAction::Reply(reply) => return self.outbox.send(reply),
            TargetAction::OpenPoint { group, at } => {
                return self.recall.open(&self.receiver, &self.office, group, at, &self.outbox).await;
            }
            TargetAction::AskPoint(asked) => return self.recall.ask(asked, &self.outbox),
            TargetAction::Open(request) => {
                let group = request.group;
                let held = Held { session: self.receiver.number(), handle: self.receiver.group(&self.office, group) };
                let number = held.session;
                self.open().insert(group, held);
                let outbox = self.outbox.clone();
                let session = Session { number, connection: self.number, outbox };
                (group, Command::Open { session, request })
            }
            TargetAction::Unchanged { group, epoch, as_of } => {
                let session = self.held(group).map_or(0, |held| held.session);
                (group, Command::Unchanged { session, epoch, as_of })
            }
            TargetAction::ListPoints { request, group, after } => {
                (group, Command::Points { request, after, outbox: self.outbox.clone() })
            }
            TargetAction::ListChanges { group, since } => {
                let session = self.held(group).map_or(0, |held| held.session);
                (group, Command::Changes { session, since })
            }
            TargetAction::ListDigests { group, head, volume, blocks } => {
                let session = self.held(group).map_or(0, |held| held.session);
                (group, Command::Digests { session, head, volume, blocks })
            }
        };
        if let Some(held) = self.held(group)
            && held.handle.commands.send(command).await.is_err()
        {
            self.outbox.end(format!("the thread of group {group} is gone"));
        }
    }

    async fn accept_streams(self: &Arc<Self>, line: &dyn Line) -> ConnectionError {
        let mut streams = JoinSet::new();
        loop {
            tokio::select! {
                accepted = line.accept_frames() => match accepted {
                    Ok(_) if streams.len() >= STREAMS_MAX => return ConnectionError::TooManyStreams,
                    Ok(stream) => drop(streams.spawn(self.clone().read_frames(stream))),
                    Err(error) => return error.into(),
                },
                Some(ended) = streams.join_next() => match ended {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => return error,
                    Err(panic) => return ConnectionError::Ended(format!("a stream's task failed: {panic}")),
                },
            }
        }
    }

    /// Brings the frames of one stream to their group until the stream ends.
    async fn read_frames(self: Arc<Self>, mut stream: ReceiveStream) -> Result<(), ConnectionError> {
        let mut group = GroupId::default();
        if ended(stream.read_exact(&mut group.0).await)? {
            return Ok(());
        }
        let held = self.held(group).ok_or(ConnectionError::Stream(group))?;
        let mut header = Vec::new();
        loop {
            header.clear();
            let frame_len = loop {
                let needed = match frame::decode_header(&group, &header) {
                    Ok(parsed) => break parsed.frame_len(),
                    Err(FrameError::Short { needed }) => needed,
                    Err(error) => return Err(ConnectionError::Frame { group, error }),
                };
                // A stream that ends within a frame leaves an attempt unfinished, as a broken line does.
                if !fill(&mut stream, &mut header, needed).await? {
                    return Ok(());
                }
            };
            let charge = frame_len.max(FRAME_CHARGE_MIN) as u32;
            let Ok(room) = held.handle.room.clone().acquire_many_owned(charge).await else { return Ok(()) };
            let mut bytes = Vec::with_capacity(frame_len);
            bytes.extend_from_slice(&header);
            if !fill(&mut stream, &mut bytes, frame_len).await? {
                return Ok(());
            }
            let command = Command::Frame { session: held.session, bytes, room: Some(room) };
            if held.handle.commands.send(command).await.is_err() {
                return Err(ConnectionError::Ended(format!("the thread of group {group} is gone")));
            }
        }
    }

    /// Tells the groups that this connection is gone.
    async fn release(&self) {
        let held: Vec<Held> = self.open().drain().map(|(_, held)| held).collect();
        for Held { session, handle } in held {
            // A thread that is gone holds no session.
            let _ = handle.commands.send(Command::Closed { session }).await;
        }
    }

    fn held(&self, group: GroupId) -> Option<Held> {
        self.open().get(&group).cloned()
    }

    fn open(&self) -> std::sync::MutexGuard<'_, HashMap<GroupId, Held>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads until `bytes` has `len` bytes, each copied once, from the transport's packets; `false` where the stream ends before.
async fn fill(stream: &mut ReceiveStream, bytes: &mut Vec<u8>, len: usize) -> io::Result<bool> {
    bytes.reserve_exact(len.saturating_sub(bytes.len()));
    while bytes.len() < len {
        let left = len - bytes.len();
        if stream.read_buf(&mut (&mut *bytes).limit(left)).await? == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a stream came to its end where bytes were to be read.
fn ended(read: io::Result<usize>) -> io::Result<bool> {
    match read {
        Ok(_) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(true),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_protocol::message::PROTOCOL_VERSION;

    #[test]
    fn clocks_hours_apart_are_worth_a_warning() {
        let now = Timestamp(1_794_268_800_000);
        let warning = |apart_ms: i64| {
            let time = Timestamp(now.0.saturating_add(apart_ms));
            let hello = SourceMessage::Hello { version: PROTOCOL_VERSION, software: "x".into(), time };
            clock_warning(&message::encode(&hello), now)
        };
        assert_eq!(warning(0), None);
        assert_eq!(warning(-299_000), None);
        assert!(warning(9 * 3_600_000).is_some_and(|text| text.contains("540 minutes ahead of")));
        assert!(warning(-9 * 3_600_000).is_some_and(|text| text.contains("540 minutes behind")));
        assert!(warning(i64::MAX).is_some());
    }
}
