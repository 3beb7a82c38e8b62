//! A connection of its own, on which one point is open to be read; for whoever waits for each answer.
//!
//! Questions are answered in the order in which they were asked, several may be under way. Signs of life go on by themselves, however long
//! nothing is asked. Does not come back by itself: whoever uses it opens another one.

use crate::connect::{ConnectError, Identity, QuicConnector};
use cdp_protocol::limits::MESSAGE_BYTES_MAX;
use cdp_protocol::message::{self, PROTOCOL_VERSION, SourceMessage, TargetMessage};
use cdp_protocol::recall::{Answer, Asked, OpenedPoint, Question};
use cdp_protocol::seal::DataKey;
use cdp_protocol::units::{GroupId, Timestamp, VolumeSlot};
use cdp_seams::clock::{Clock, SystemClock};
use cdp_seams::line::{Control, Line, ReceiveStream, SendStream, read_packet, write_packet};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Between two asks for a sign of life.
const PING_INTERVAL: Duration = Duration::from_secs(15);
/// Without a message, three of those.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(45);
/// Answers that wait to be taken: of 64 KiB each at most.
const ANSWERS_MAX: usize = 32;
/// Questions under way at once: enough for a long round trip, below what the target lets wait.
pub const QUESTIONS_AHEAD: usize = 8;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The runtime of the connection cannot be had.
    #[error("start the runtime of the line")]
    Runtime(#[source] io::Error),
    /// The target does not open the point.
    #[error("the target does not open that point: {0}")]
    Refused(String),
    /// The line broke, or went silent.
    #[error("the line to the target is lost: {0}")]
    Lost(String),
    /// The target says that it cannot answer.
    #[error("the target cannot answer: {0}")]
    Failed(String),
    /// The target says what no target of this version does.
    #[error("the target's answer cannot be read: {0}")]
    Answer(&'static str),
}

impl LineError {
    /// Whether the same may go well on another line.
    #[must_use]
    pub const fn is_lost(&self) -> bool {
        matches!(self, Self::Lost(_) | Self::Connect(_))
    }
}

/// A line with a point open on it.
pub struct PointLine {
    line: Arc<dyn Line>,
    exchange: Exchange,
    waiting: VecDeque<u64>,
    next_request: u64,
    point: OpenedPoint,
    runtime: Runtime,
}

/// What is said and heard on the control stream.
struct Exchange {
    questions: mpsc::Sender<SourceMessage>,
    answers: mpsc::Receiver<Result<(TargetMessage, usize), String>>,
    received_bytes: u64,
}

impl PointLine {
    /// Connects and opens the point of the group that `at` names.
    ///
    /// # Errors
    /// Where there is no connection, or no such point: then the reason names the nearest.
    pub fn open(identity: Identity, group: GroupId, at: &str) -> Result<Self, LineError> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(2).enable_all().build().map_err(LineError::Runtime)?;
        let clock = Arc::new(SystemClock::new());
        let line: Arc<dyn Line> = runtime.block_on(QuicConnector::new(identity, clock.clone())?.line())?.into();
        let control = runtime.block_on(async { timeout(SILENCE_TIMEOUT, line.open_control()).await });
        let control = control.map_err(|_| LineError::Lost("no answer".into()))?;
        let Control { send, receive } = control.map_err(|error| LineError::Lost(error.to_string()))?;
        let (questions, asked) = mpsc::channel(QUESTIONS_AHEAD);
        let (tell, answers) = mpsc::channel(ANSWERS_MAX);
        runtime.spawn(write_messages(send, asked));
        runtime.spawn(read_messages(receive, tell));
        let mut exchange = Exchange { questions, answers, received_bytes: 0 };
        let point = exchange.greet(&*clock, group, at)?;
        Ok(Self { line, exchange, waiting: VecDeque::new(), next_request: 1, point, runtime })
    }

    /// The point that is open.
    #[must_use]
    pub const fn point(&self) -> &OpenedPoint {
        &self.point
    }

    /// Bytes of messages that came.
    #[must_use]
    pub const fn received_bytes(&self) -> u64 {
        self.exchange.received_bytes
    }

    /// Whether another question may be asked before the next answer is taken.
    #[must_use]
    pub fn may_ask(&self) -> bool {
        self.waiting.len() < QUESTIONS_AHEAD
    }

    /// Asks; the answer comes behind those to the questions before.
    ///
    /// # Errors
    /// Where the line is gone.
    pub fn ask(&mut self, volume: VolumeSlot, question: Question) -> Result<(), LineError> {
        let request = self.next_request;
        self.next_request += 1;
        self.exchange.say(SourceMessage::AskPoint(Asked { request, volume, question }))?;
        self.waiting.push_back(request);
        Ok(())
    }

    /// The group's key, of a target that has it: content is told under it.
    ///
    /// # Errors
    /// Where the line is gone, or the target cannot answer.
    pub fn key(&mut self) -> Result<Option<DataKey>, LineError> {
        self.ask(VolumeSlot(0), Question::Key)?;
        let mut told = None;
        while let Some(piece) = self.next_piece()? {
            let Answer::Key { key } = piece else { return Err(LineError::Answer("it is of something else")) };
            told = Some(key.to_key());
        }
        Ok(told)
    }

    /// The next piece of the answer to the oldest question; `None` at its end.
    ///
    /// # Errors
    /// Where the line is gone, or the target cannot answer.
    pub fn next_piece(&mut self) -> Result<Option<Answer>, LineError> {
        match self.exchange.hear()? {
            TargetMessage::Answer { request, answer } if self.waiting.front() == Some(&request) => match answer {
                Answer::Done => {
                    self.waiting.pop_front();
                    Ok(None)
                }
                Answer::Failed { reason } => Err(LineError::Failed(reason)),
                answer => Ok(Some(answer)),
            },
            TargetMessage::Refused { reason, .. } => Err(LineError::Lost(reason)),
            _ => Err(LineError::Answer("it was not asked for")),
        }
    }
}

impl Exchange {
    fn greet(&mut self, clock: &dyn Clock, group: GroupId, at: &str) -> Result<OpenedPoint, LineError> {
        let software = concat!("cdp-source ", env!("CARGO_PKG_VERSION")).to_owned();
        self.say(SourceMessage::Hello { version: PROTOCOL_VERSION, software, time: Timestamp(clock.wall_ms()) })?;
        match self.hear()? {
            TargetMessage::Welcome { .. } => {}
            TargetMessage::Refused { reason, .. } => return Err(LineError::Refused(reason)),
            _ => return Err(LineError::Answer("it is no welcome")),
        }
        self.say(SourceMessage::OpenPoint { group, at: at.to_owned() })?;
        match self.hear()? {
            TargetMessage::PointOpened(point) if point.is_bounded() => Ok(point),
            TargetMessage::PointRefused { reason } => Err(LineError::Refused(reason)),
            _ => Err(LineError::Answer("it is of no point")),
        }
    }

    fn say(&self, message: SourceMessage) -> Result<(), LineError> {
        self.questions.blocking_send(message).map_err(|_| LineError::Lost("nothing can be written to it".into()))
    }

    /// The next message that is no sign of life.
    fn hear(&mut self) -> Result<TargetMessage, LineError> {
        loop {
            let heard = self.answers.blocking_recv().unwrap_or_else(|| Err("it is closed".into()));
            let (message, bytes) = heard.map_err(LineError::Lost)?;
            self.received_bytes += bytes as u64;
            if message != TargetMessage::Pong {
                return Ok(message);
            }
        }
    }
}

impl Drop for PointLine {
    fn drop(&mut self) {
        // The target is told: else it would hold the point until it has heard nothing for long enough.
        self.runtime.block_on(async {
            let _ = timeout(crate::sender::FAREWELL_TIMEOUT, self.line.end("the point is read")).await;
        });
    }
}

async fn write_messages(mut send: SendStream, mut asked: mpsc::Receiver<SourceMessage>) {
    loop {
        let message = match timeout(PING_INTERVAL, asked.recv()).await {
            Ok(Some(message)) => message,
            Ok(None) => return,
            Err(_) => SourceMessage::Ping,
        };
        // Who waits for the answer hears of it.
        if write_packet(&mut *send, &message::encode(&message)).await.is_err() {
            return;
        }
    }
}

async fn read_messages(mut receive: ReceiveStream, tell: mpsc::Sender<Result<(TargetMessage, usize), String>>) {
    loop {
        let heard = match timeout(SILENCE_TIMEOUT, read_packet(&mut *receive, MESSAGE_BYTES_MAX)).await {
            Ok(Ok(bytes)) => message::decode(&bytes).map(|said| (said, bytes.len())).map_err(|error| error.to_string()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("nothing was heard for {} s", SILENCE_TIMEOUT.as_secs())),
        };
        let is_end = heard.is_err();
        if tell.send(heard).await.is_err() || is_end {
            return;
        }
    }
}
