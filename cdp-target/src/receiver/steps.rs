//! A group of the receiver in single steps, for simulations: what its thread does, without the thread.
//!
//! Decides nothing. Whoever steps it takes the place of the connections and of the thread's queue, and says when a sync is due.

use super::group::{Command, GroupThread, Outbox, Session};
use super::live::LiveGroup;
use super::store_api::{GroupStore, GroupWriter, StoreError};
use cdp_protocol::message::{OpenGroup, TargetMessage};
use cdp_protocol::units::{Epoch, Extent, GroupId, Head, Timestamp, VolumeSlot};
use cdp_seams::clock::Clock;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, watch};

/// Answers that wait for a connection.
const ANSWERS_MAX: usize = 1024;

/// A group without its thread.
pub struct GroupSteps(GroupThread);

/// A connection's place at the target: where its answers come out.
pub struct Answers {
    number: u64,
    outbox: Outbox,
    messages: mpsc::Receiver<TargetMessage>,
    ending: watch::Receiver<Option<String>>,
}

impl Answers {
    /// Those of connection `number`.
    #[must_use]
    pub fn new(number: u64) -> Self {
        let (sender, messages) = mpsc::channel(ANSWERS_MAX);
        let outbox = Outbox { messages: sender, ending: watch::Sender::new(None) };
        let ending = outbox.ending.subscribe();
        Self { number, outbox, messages, ending }
    }

    /// The next answer to be sent.
    pub fn next_answer(&mut self) -> Option<TargetMessage> {
        self.messages.try_recv().ok()
    }

    /// Why the connection is to be ended, if it is.
    #[must_use]
    pub fn ending(&self) -> Option<String> {
        self.ending.borrow().clone()
    }
}

impl GroupSteps {
    /// A group of `office` that nobody has opened yet.
    #[must_use]
    pub fn new(office: &str, group: GroupId, store: Arc<dyn GroupStore>, clock: Arc<dyn Clock>) -> Self {
        let live = Arc::new(Mutex::new(LiveGroup::default()));
        Self(GroupThread::new(office, group, store, clock, live))
    }

    /// A source opens the group as session `session`.
    pub fn open(&mut self, session: u64, answers: &Answers, request: OpenGroup) {
        let session = Session { number: session, connection: answers.number, outbox: answers.outbox.clone() };
        self.0.apply(Command::Open { session, request: Box::new(request) });
    }

    /// A frame of a session.
    pub fn frame(&mut self, session: u64, bytes: Vec<u8>) {
        self.0.apply(Command::Frame { session, bytes, room: None });
    }

    /// A session's word that nothing was written.
    pub fn unchanged(&mut self, session: u64, epoch: Epoch, as_of: Timestamp) {
        self.0.apply(Command::Unchanged { session, epoch, as_of });
    }

    /// A session asks which blocks were sent after a point.
    pub fn changes(&mut self, session: u64, since: Head) {
        self.0.apply(Command::Changes { session, since });
    }

    /// A session asks what is held of some blocks at a point.
    pub fn digests(&mut self, session: u64, head: Head, volume: VolumeSlot, blocks: Extent) {
        self.0.apply(Command::Digests { session, head, volume, blocks });
    }

    /// The session's line is gone.
    pub fn closed(&mut self, session: u64) {
        self.0.apply(Command::Closed { session });
    }

    /// Asks whoever has the group open for blocks that are damaged here.
    pub fn send_again(&mut self, volume: VolumeSlot, extents: Vec<Extent>) {
        self.0.apply(Command::SendAgain { volume, extents });
    }

    /// Works with the group's writer, as a command of an operator does.
    pub fn with_writer(&mut self, work: impl FnOnce(Result<&mut dyn GroupWriter, StoreError>) + Send + 'static) {
        self.0.apply(Command::Run(Box::new(work)));
    }

    /// What is known of the group.
    #[must_use]
    pub fn live(&self) -> LiveGroup {
        self.0.live.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether something waits for a sync to be acked.
    #[must_use]
    pub fn is_sync_due(&self) -> bool {
        !self.0.pending.is_empty()
    }

    /// Makes durable what was appended, and acks it.
    pub fn sync(&mut self) {
        self.0.sync();
    }
}
