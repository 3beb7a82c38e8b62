//! One group on the line: drives its session, and is the way between it and the thread that captures.
//!
//! One task owns the session. It never waits for the capture thread: events that do not fit wait here, and while any do,
//! nothing more is taken from the line, which closes it in the end. Attempts are taken while the session has room.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::mpsc as std_mpsc;
use std::time::Duration;

use bytes::Bytes;
use cdp_protocol::message::{RefusalReason, SourceMessage, TargetMessage};
use cdp_protocol::session::source::{Next, Outgoing, SourceEvent, SourceSession};
use cdp_protocol::units::{Epoch, Extent, GroupId, Head, Timestamp, VolumeSlot};
use cdp_seams::line::{BoxFuture, FrameStream};
use tokio::io::AsyncWriteExt;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tracing::error;

use super::{LinkStatus, Up};

/// Attempts in the session; what they hold in bytes is the submitter's to bound, who keeps their blocks anyway.
const ATTEMPTS_MAX: usize = 32;
/// Attempts on their way to the session.
const SUBMISSIONS_MAX: usize = 4;
/// Words of the capture thread on their way: one `proceed`, and what nothing was written.
const WORDS_MAX: usize = 64;
/// Events not read yet: three for each attempt, and those of a few connections.
const EVENTS_MAX: usize = 256;
/// How often events that did not fit are tried again.
const EVENTS_RETRY: Duration = Duration::from_millis(50);
/// Until a refused group asks again: an operator has to act.
const REFUSED_RETRY: Duration = Duration::from_secs(60);

/// The sender's tasks have ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the sender has ended")]
pub struct SenderGone;

/// Why an attempt was not taken; it comes back.
pub enum TrySubmitError {
    /// Too many are under way: try again when one is acked.
    Full(Box<Outgoing>),
    /// The sender has ended.
    Gone(Box<Outgoing>),
}

/// A group's end at the capture thread. None of it may be called on a thread of the runtime.
pub struct GroupHandle {
    submissions: mpsc::Sender<Outgoing>,
    words: mpsc::Sender<Word>,
    /// What becomes of the group.
    pub events: std_mpsc::Receiver<SourceEvent>,
    /// The connection.
    pub link: Arc<LinkStatus>,
}

enum Word {
    Proceed(Head),
    Unchanged(Epoch, Timestamp),
    ListChanges(Head),
    ListDigests(Head, VolumeSlot, Extent),
}

impl GroupHandle {
    /// Submits an attempt; waits while too many are under way.
    ///
    /// # Errors
    /// Where the sender has ended.
    pub fn submit(&self, outgoing: Outgoing) -> Result<(), SenderGone> {
        self.submissions.blocking_send(outgoing).map_err(|_| SenderGone)
    }

    /// Submits an attempt if there is room.
    ///
    /// # Errors
    /// Where there is none, or the sender has ended.
    pub fn try_submit(&self, outgoing: Outgoing) -> Result<(), TrySubmitError> {
        self.submissions.try_send(outgoing).map_err(|error| match error {
            mpsc::error::TrySendError::Full(outgoing) => TrySubmitError::Full(Box::new(outgoing)),
            mpsc::error::TrySendError::Closed(outgoing) => TrySubmitError::Gone(Box::new(outgoing)),
        })
    }

    /// Says that the commit is stored as under way.
    ///
    /// # Errors
    /// Where the sender has ended.
    pub fn proceed(&self, head: Head) -> Result<(), SenderGone> {
        self.words.blocking_send(Word::Proceed(head)).map_err(|_| SenderGone)
    }

    /// Asks which blocks the target was sent after a point. Forgotten where it cannot be asked now, or the line breaks: who wants to
    /// know asks again.
    pub fn list_changes(&self, since: Head) {
        let _ = self.words.try_send(Word::ListChanges(since));
    }

    /// Asks what the target holds of some blocks at its newest point, if that is this one. Forgotten like the question before.
    pub fn list_digests(&self, head: Head, volume: VolumeSlot, blocks: Extent) {
        let _ = self.words.try_send(Word::ListDigests(head, volume, blocks));
    }

    /// Says that nothing was written since a point. Forgotten where it cannot be said now: the next one says more.
    pub fn unchanged(&self, epoch: Epoch, as_of: Timestamp) {
        let _ = self.words.try_send(Word::Unchanged(epoch, as_of));
    }
}

pub(super) fn start(
    runtime: &Handle,
    session: SourceSession,
    line: watch::Receiver<Option<Up>>,
    messages: mpsc::Receiver<(u64, TargetMessage)>,
    status: Arc<LinkStatus>,
) -> GroupHandle {
    let (submissions, submitted) = mpsc::channel(SUBMISSIONS_MAX);
    let (words, said) = mpsc::channel(WORDS_MAX);
    let (events_out, events) = std_mpsc::sync_channel(EVENTS_MAX);
    let task = GroupTask {
        session,
        link: status.clone(),
        events: events_out,
        outbox: VecDeque::new(),
        up: None,
        stream: Stream::None,
        frame: Bytes::new(),
        metered: 0,
        retry: None,
        superseded: false,
    };
    runtime.spawn(task.run(Inputs { submitted, said, messages, line }));
    GroupHandle { submissions, words, events, link: status }
}

struct Inputs {
    submitted: mpsc::Receiver<Outgoing>,
    said: mpsc::Receiver<Word>,
    messages: mpsc::Receiver<(u64, TargetMessage)>,
    line: watch::Receiver<Option<Up>>,
}

/// The group's stream of frames on the current line.
enum Stream {
    None,
    Opening(BoxFuture<'static, io::Result<FrameStream>>),
    Open(FrameStream),
}

struct GroupTask {
    session: SourceSession,
    link: Arc<LinkStatus>,
    events: std_mpsc::SyncSender<SourceEvent>,
    outbox: VecDeque<SourceEvent>,
    up: Option<Up>,
    stream: Stream,
    /// What is left of the frame that is being written.
    frame: Bytes,
    /// Bytes that the meter takes to be on the line.
    metered: u64,
    retry: Option<BoxFuture<'static, ()>>,
    /// Another process took the group over: nothing is asked or sent any more.
    superseded: bool,
}

enum Action {
    Submitted(Option<Outgoing>),
    Said(Option<Word>),
    Message(u64, TargetMessage),
    Line(Option<Up>),
    Opened(io::Result<FrameStream>),
    Wrote(io::Result<usize>),
    Retry,
    Events,
    Ended,
}

impl GroupTask {
    async fn run(mut self, mut inputs: Inputs) {
        let first = inputs.line.borrow_and_update().clone();
        let mut action = Action::Line(first);
        loop {
            match action {
                Action::Ended | Action::Submitted(None) | Action::Said(None) => break,
                action => self.apply(action).await,
            }
            if self.deliver().is_err() {
                break;
            }
            action = self.next(&mut inputs).await;
        }
    }

    /// Waits for the next thing to do. Everything in here may be dropped and asked again.
    async fn next(&mut self, inputs: &mut Inputs) -> Action {
        let (room, told) = (self.session.queued() < ATTEMPTS_MAX, self.outbox.is_empty());
        tokio::select! {
            changed = inputs.line.changed() => match changed {
                Ok(()) => Action::Line(inputs.line.borrow_and_update().clone()),
                Err(_) => Action::Ended,
            },
            message = inputs.messages.recv(), if told => {
                message.map_or(Action::Ended, |(number, message)| Action::Message(number, message))
            }
            word = inputs.said.recv() => Action::Said(word),
            outgoing = inputs.submitted.recv(), if room => Action::Submitted(outgoing),
            () = async { self.retry.as_mut().expect("asked for").await }, if self.retry.is_some() => Action::Retry,
            progressed = progress(&mut self.stream, &mut self.frame) => progressed,
            () = sleep(EVENTS_RETRY), if !told => Action::Events,
        }
    }

    async fn apply(&mut self, action: Action) {
        let is_ack =
            matches!(&action, Action::Message(_, TargetMessage::Acked { .. } | TargetMessage::PartAcked { .. }));
        match action {
            Action::Submitted(Some(outgoing)) => self.session.submit(outgoing),
            Action::Said(Some(Word::Proceed(head))) => self.session.proceed(head),
            Action::Said(Some(Word::Unchanged(epoch, as_of))) => self.unchanged(epoch, as_of),
            Action::Said(Some(Word::ListChanges(since))) => self.list_changes(since),
            Action::Said(Some(Word::ListDigests(head, volume, blocks))) => self.list_digests(head, volume, blocks),
            Action::Message(number, message) => self.message(number, &message),
            Action::Line(up) => {
                self.session.line_down();
                self.hang_up();
                self.up = up;
                self.open_group().await;
            }
            Action::Opened(Ok(stream)) => self.stream = Stream::Open(stream),
            Action::Wrote(Ok(written)) if written > 0 => self.link.sent(written),
            Action::Opened(Err(_)) | Action::Wrote(_) => self.broken("a stream of frames failed"),
            Action::Retry => {
                self.retry = None;
                self.open_group().await;
            }
            Action::Events | Action::Ended | Action::Submitted(None) | Action::Said(None) => {}
        }
        self.fill();
        self.measure(is_ack);
    }

    /// Tells the meter what went to the line, and what is not there any more because of an ack or for another reason.
    fn measure(&mut self, is_ack: bool) {
        let queued = if matches!(self.stream, Stream::Open(_)) { self.session.queued_bytes() } else { 0 };
        let before = std::mem::replace(&mut self.metered, queued);
        match queued.checked_sub(before) {
            Some(0) => {}
            Some(more) => self.link.meter(|meter, now| meter.submitted(now, more)),
            None if is_ack => self.link.meter(|meter, now| meter.acked(now, before - queued)),
            None => self.link.meter(|meter, now| meter.withdrawn(now, before - queued)),
        }
    }

    /// Takes the next frame from the session where the line can have one.
    fn fill(&mut self) {
        while self.frame.is_empty() && matches!(self.stream, Stream::Open(_)) {
            match self.session.next_frame() {
                Next::Frame(frame) => self.frame = frame,
                Next::Committing(head) => self.outbox.push_back(SourceEvent::Committing(head)),
                Next::Nothing => break,
            }
        }
    }

    fn message(&mut self, number: u64, message: &TargetMessage) {
        let Some(up) = self.up.as_ref().filter(|up| up.number == number) else { return };
        match self.session.message(message) {
            Ok(events) => self.outbox.extend(events),
            Err(contradiction) => {
                error!(group = %self.session.group(), %contradiction, "the line is closed, a new generation is asked for");
                return self.broken("the target contradicts what it was sent");
            }
        }
        match message {
            TargetMessage::GroupOpened(_) => {
                self.frame = Bytes::new();
                self.stream = Stream::Opening(Box::pin(open_stream(up.clone(), self.session.group())));
            }
            TargetMessage::Busy { retry_after_ms, .. } => self.later(Duration::from_millis((*retry_after_ms).into())),
            TargetMessage::GroupRefused { reason: RefusalReason::Superseded { .. }, .. } => {
                // Asking again would be a fork, or take the group back: that is for a person to say, by a new start.
                self.superseded = true;
                self.hang_up();
            }
            TargetMessage::GroupRefused { .. } => self.later(REFUSED_RETRY),
            _ => {}
        }
    }

    async fn open_group(&mut self) {
        if let Some(up) = self.up.as_ref().filter(|_| !self.superseded) {
            let request = SourceMessage::OpenGroup(self.session.open_group());
            // Where that fails the line is gone, and the next one is a new chance.
            let _ = timeout(REFUSED_RETRY, up.control.send(request)).await;
        }
    }

    fn unchanged(&self, epoch: Epoch, as_of: Timestamp) {
        if let Some(up) = self.up.as_ref().filter(|_| !self.superseded) {
            let _ = up.control.try_send(SourceMessage::Unchanged { group: self.session.group(), epoch, as_of });
        }
    }

    fn list_changes(&self, since: Head) {
        if let Some(up) = self.up.as_ref().filter(|_| !self.superseded) {
            let _ = up.control.try_send(SourceMessage::ListChanges { group: self.session.group(), since });
        }
    }

    fn list_digests(&self, head: Head, volume: VolumeSlot, blocks: Extent) {
        if let Some(up) = self.up.as_ref().filter(|_| !self.superseded) {
            let (group, start, count) = (self.session.group(), blocks.start, blocks.count);
            let _ = up.control.try_send(SourceMessage::ListDigests { group, head, volume, start, count });
        }
    }

    fn later(&mut self, after: Duration) {
        self.hang_up();
        self.retry = Some(Box::pin(sleep(after)));
    }

    fn hang_up(&mut self) {
        self.stream = Stream::None;
        self.frame = Bytes::new();
        self.retry = None;
    }

    fn broken(&mut self, reason: &str) {
        self.session.line_down();
        self.hang_up();
        if let Some(up) = self.up.take() {
            up.line.close(reason);
        }
    }

    /// Hands events over as far as they fit.
    fn deliver(&mut self) -> Result<(), SenderGone> {
        while let Some(event) = self.outbox.pop_front() {
            match self.events.try_send(event) {
                Ok(()) => {}
                Err(std_mpsc::TrySendError::Full(event)) => {
                    self.outbox.push_front(event);
                    break;
                }
                Err(std_mpsc::TrySendError::Disconnected(_)) => return Err(SenderGone),
            }
        }
        Ok(())
    }
}

/// Opens the stream, or writes some of the frame to it; without either waits for ever.
async fn progress(stream: &mut Stream, frame: &mut Bytes) -> Action {
    match stream {
        Stream::Opening(opening) => Action::Opened(opening.await),
        Stream::Open(stream) if !frame.is_empty() => Action::Wrote(stream.hand_over(frame).await),
        Stream::None | Stream::Open(_) => std::future::pending().await,
    }
}

async fn open_stream(up: Up, group: GroupId) -> io::Result<FrameStream> {
    let mut stream = up.line.open_frames().await?;
    stream.write_all(&group.0).await?;
    Ok(stream)
}
