//! A point that a source asks back on its connection: the thread that reads it, and its questions.
//!
//! One point a connection, held against pruning until that ends. Bounded at both ends: questions that wait, by their number, or the
//! connection is ended; answers, since the thread waits until the line takes them, behind everything else that is to be said. Does not know
//! what a point is made of.

use std::sync::{Arc, OnceLock};

use cdp_protocol::message::TargetMessage;
use cdp_protocol::recall::{Answer, Asked, QUESTIONS_MAX, Question, reason};
use cdp_protocol::units::{GroupId, Timestamp};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use super::Receiver;
use super::group::{Outbox, text};
use super::store_api::PointReader;

/// Messages that wait for the line: of 64 KiB each at most.
const ANSWERS_MAX: usize = 8;

/// A connection's open point.
pub(super) struct Recall {
    answers: mpsc::Sender<TargetMessage>,
    questions: OnceLock<mpsc::Sender<Asked>>,
}

impl Recall {
    /// Nothing is open yet; what is to be written comes out of the other end.
    pub(super) fn new() -> (Self, mpsc::Receiver<TargetMessage>) {
        let (answers, written) = mpsc::channel(ANSWERS_MAX);
        (Self { answers, questions: OnceLock::new() }, written)
    }

    /// Opens a point of a group of the office, and answers with how that went.
    pub(super) async fn open(
        &self,
        receiver: &Arc<Receiver>,
        office: &str,
        group: GroupId,
        at: String,
        outbox: &Outbox,
    ) {
        let (store, name) = (Arc::clone(&receiver.store), office.to_owned());
        let is_known = tokio::task::spawn_blocking(move || store.has(&name, group)).await;
        if !is_known.unwrap_or(false) {
            return outbox.send(refused(&format!("the target has no group {group} of this office")));
        }
        let (give, given) = oneshot::channel();
        let work = move |writer: Result<&mut dyn super::GroupWriter, super::StoreError>| {
            let reader = writer.map_err(|error| text(&error)).map(|writer| writer.reader());
            // Whoever asked may be gone.
            let _ = give.send(reader);
        };
        receiver.with_group(office, group, work).await;
        let reader = match given.await {
            Ok(Ok(Some(reader))) => reader,
            Ok(Ok(None)) | Err(_) => return outbox.send(refused("this target reads no points")),
            Ok(Err(why)) => return outbox.send(refused(&why)),
        };
        let (ask, asked) = mpsc::channel(QUESTIONS_MAX);
        // The session lets one point a connection through.
        let _ = self.questions.set(ask);
        let reading = Reading { reader, office: office.to_owned(), group, answers: self.answers.clone() };
        let now = Timestamp(receiver.clock.wall_ms());
        let started = std::thread::Builder::new().name("recall".to_owned()).spawn(move || reading.run(&at, now, asked));
        if let Err(error) = started {
            outbox.send(refused(&format!("no thread to read it: {error}")));
        }
    }

    /// Passes a question on; a source that asks more than it may is not listened to any more.
    pub(super) fn ask(&self, asked: Asked, outbox: &Outbox) {
        match self.questions.get().map(|questions| questions.try_send(asked)) {
            Some(Err(mpsc::error::TrySendError::Full(_))) => outbox.end("more questions about a point than may wait"),
            // A point that was refused is not asked about by a source that listens.
            Some(Ok(()) | Err(mpsc::error::TrySendError::Closed(_))) | None => {}
        }
    }
}

fn refused(why: &str) -> TargetMessage {
    TargetMessage::PointRefused { reason: reason(why) }
}

/// The thread's state. It ends with the connection: nobody asks, and nobody takes what it says.
struct Reading {
    reader: Box<dyn PointReader>,
    office: String,
    group: GroupId,
    answers: mpsc::Sender<TargetMessage>,
}

impl Reading {
    fn run(mut self, at: &str, now: Timestamp, mut questions: mpsc::Receiver<Asked>) {
        let (office, group) = (&self.office, self.group);
        match self.reader.open(at, now) {
            Ok(point) => {
                info!(office, %group, point = %point.head.epoch, "a point is read by its source");
                if self.answers.blocking_send(TargetMessage::PointOpened(point)).is_err() {
                    return;
                }
            }
            Err(why) => return drop(self.answers.blocking_send(refused(&why))),
        }
        while let Some(Asked { request, volume, question }) = questions.blocking_recv() {
            if question == Question::Key {
                info!(office, %group, "the office asks for the group's key");
            }
            let answers = &self.answers;
            let mut tell = |answer: Answer| answers.blocking_send(TargetMessage::Answer { request, answer }).is_ok();
            let end = match self.reader.answer(volume, &question, &mut tell) {
                Ok(()) => Answer::Done,
                Err(why) => {
                    warn!(office = self.office, %group, why, "a question about a point is not answered");
                    Answer::Failed { reason: reason(&why) }
                }
            };
            if !tell(end) {
                return;
            }
        }
    }
}
