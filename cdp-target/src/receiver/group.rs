//! The thread that owns a group's writer: opens sessions, appends, syncs, acks.
//!
//! Everything that concerns a group goes through its queue, in order, so nothing here is shared. An ack leaves only after
//! the sync that covers it; one sync covers all that was queued. One session holds the group: frames of any other are
//! passed over. Nothing here waits for a line: a session that does not take its messages is ended.

mod opening;

use std::sync::{Arc, Mutex, PoisonError};

use cdp_protocol::frame;
use cdp_protocol::message::{Instance, OpenGroup, RefusalReason, TargetMessage};
use cdp_protocol::session::chain::Step;
use cdp_protocol::units::{Epoch, Extent, GroupId, Head, Timestamp, VolumeSlot};
use cdp_seams::clock::Clock;
use cdp_seams::pulse;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tracing::{error, info, warn};

use super::live::{LiveGroup, Unchanged};
use super::store_api::{GroupStore, GroupWriter, StoreError};

/// Bytes appended before a sync is made even though more are waiting: bounds what a crash makes a source send again.
const SYNC_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Points on one page: 256 of at most 200 bytes fit a message of 64 KiB.
const PAGE_POINTS: usize = 256;
/// What a source is told where there is no room.
const FULL: &str = "its disk is full";
/// How long a source waits where the target has no room.
const FULL_RETRY_MS: u32 = 5_000;
/// How long a source waits where the writer was opened anew.
const REOPENED_RETRY_MS: u32 = 500;

/// What runs on a group's thread, with its writer or why there is none.
pub(super) type Work = Box<dyn FnOnce(Result<&mut dyn GroupWriter, StoreError>) + Send>;

/// What a group's thread is told.
pub(super) enum Command {
    /// A source opens the group.
    Open { session: Session, request: Box<OpenGroup> },
    /// A frame of a session, whose header is verified; the permit is its place in memory, where that is bounded.
    Frame { session: u64, bytes: Vec<u8>, room: Option<OwnedSemaphorePermit> },
    /// Nothing was written at the source.
    Unchanged { session: u64, epoch: Epoch, as_of: Timestamp },
    /// A page of points.
    Points { request: u64, after: Option<Epoch>, outbox: Outbox },
    /// Which blocks were sent after a point.
    Changes { session: u64, since: Head },
    /// What is held of some blocks at a point.
    Digests { session: u64, head: Head, volume: VolumeSlot, blocks: Extent },
    /// Blocks that are damaged here: whoever has the group open is asked for them.
    SendAgain { volume: VolumeSlot, extents: Vec<Extent> },
    /// The session's line is gone.
    Closed { session: u64 },
    /// Something else that needs the writer.
    Run(Work),
}

/// A source's hold on a group.
pub(super) struct Session {
    /// Of all sessions of this server, this one.
    pub(super) number: u64,
    /// Of all its connections, this one.
    pub(super) connection: u64,
    pub(super) outbox: Outbox,
}

/// The way back to a connection. Never blocks.
#[derive(Clone)]
pub(super) struct Outbox {
    pub(super) messages: mpsc::Sender<TargetMessage>,
    pub(super) ending: watch::Sender<Option<String>>,
}

impl Outbox {
    pub(super) fn send(&self, message: TargetMessage) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.messages.try_send(message) {
            self.end("the source does not take its answers");
        }
    }

    /// Ends the connection; the first reason stays.
    pub(super) fn end(&self, reason: impl Into<String>) {
        self.ending.send_if_modified(|ending| {
            let first = ending.is_none();
            if first {
                *ending = Some(reason.into());
            }
            first
        });
    }
}

/// A group and the thread's state.
pub(super) struct GroupThread {
    office: String,
    group: GroupId,
    store: Arc<dyn GroupStore>,
    clock: Arc<dyn Clock>,
    pub(super) live: Arc<Mutex<LiveGroup>>,
    writer: Option<Box<dyn GroupWriter>>,
    session: Option<Session>,
    /// The process that had the group open last, whether or not its line still stands.
    holder: Option<Instance>,
    /// Processes that others took the group over from, newest last, and what they are told.
    superseded: Vec<([u8; 16], RefusalReason)>,
    /// Acks that wait for a sync.
    pub(super) pending: Vec<TargetMessage>,
    unsynced_bytes: u64,
    /// The writer was opened anew and has not synced since.
    reopened: bool,
    /// There was no room, and nothing was acked since.
    full: bool,
    /// The store refused to make the group: once the source is gone, the thread has nothing to own.
    unmade: bool,
}

impl GroupThread {
    /// A group that nobody has opened yet.
    pub(super) fn new(
        office: &str,
        group: GroupId,
        store: Arc<dyn GroupStore>,
        clock: Arc<dyn Clock>,
        live: Arc<Mutex<LiveGroup>>,
    ) -> Self {
        Self {
            office: office.to_owned(),
            group,
            store,
            clock,
            live,
            writer: None,
            session: None,
            holder: None,
            superseded: Vec::new(),
            pending: Vec::new(),
            unsynced_bytes: 0,
            reopened: false,
            full: false,
            unmade: false,
        }
    }

    /// Works until nobody is left who could say anything; then makes durable what is there.
    pub(super) fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            let command = if self.pending.is_empty() {
                pulse::rest();
                let Some(command) = commands.blocking_recv() else { break };
                Some(command)
            } else {
                commands.try_recv().ok()
            };
            pulse::beat();
            match command {
                Some(command) => {
                    let closed = matches!(command, Command::Closed { .. });
                    self.apply(command);
                    if closed && self.unmade {
                        return;
                    }
                }
                None => self.sync(),
            }
            if self.unsynced_bytes >= SYNC_BYTES_MAX {
                self.sync();
            }
        }
        self.sync();
    }

    pub(super) fn apply(&mut self, command: Command) {
        match command {
            Command::Open { session, request } => self.open(session, &request),
            Command::Frame { session, bytes, room } => {
                if self.holds(session) {
                    self.frame(&bytes);
                }
                drop(room);
            }
            Command::Unchanged { session, epoch, as_of } => {
                let known = self.writer.as_ref().and_then(|writer| writer.chain().head());
                if self.holds(session) && known.is_some_and(|(head, _)| head.epoch == epoch) {
                    let received_at = self.now();
                    self.live(|live| live.unchanged = Some(Unchanged { epoch, as_of, received_at }));
                }
            }
            Command::Points { request, after, outbox } => self.points(request, after, &outbox),
            Command::Changes { session, since } if self.holds(session) => self.changes(since),
            Command::Digests { session, head, volume, blocks } if self.holds(session) => {
                self.digests(head, volume, blocks);
            }
            Command::Changes { .. } | Command::Digests { .. } => {}
            Command::SendAgain { volume, extents } => {
                if let Some(session) = &self.session {
                    let extents = extents.iter().map(|extent| (extent.start, extent.count)).collect();
                    session.outbox.send(TargetMessage::SendAgain { group: self.group, volume, extents });
                }
            }
            Command::Closed { session } => {
                if self.holds(session) {
                    self.session = None;
                    self.live(|live| live.connected_since = None);
                    self.sync();
                }
            }
            Command::Run(work) => {
                self.sync();
                let opened = self.ensure(None);
                work(match opened {
                    Ok(()) => Ok(self.writer.as_deref_mut().expect("just opened")),
                    Err(error) => Err(error),
                });
            }
        }
    }

    fn frame(&mut self, bytes: &[u8]) {
        let Some(writer) = self.writer.as_deref_mut() else { return };
        let received = Timestamp(self.clock.wall_ms());
        let decoded = frame::decode(&self.group, bytes).map_err(|error| error.to_string());
        let appended = decoded.map(|frame| {
            let place = (frame.header.epoch, frame.header.sequence);
            writer.append(&frame, received).map(|step| (place, step))
        });
        match appended {
            Err(reason) => self.end_connection(&reason),
            Ok(Ok((place, step))) => {
                self.unsynced_bytes += bytes.len() as u64;
                self.taken(place, &step, received, bytes.len() as u64);
            }
            Ok(Err(StoreError::Chain(error))) => self.end_connection(&text(&StoreError::Chain(error))),
            Ok(Err(error)) => self.failed(&error),
        }
    }

    fn taken(&mut self, place: (Epoch, cdp_protocol::units::Sequence), step: &Step, now: Timestamp, bytes: u64) {
        let group = self.group;
        let journaled = matches!(step, Step::Committed(..));
        match step {
            Step::Committed(head, _) => self.pending.push(TargetMessage::Acked { group, head: *head }),
            Step::PartEnded(attempt, parts) => {
                self.pending.push(TargetMessage::PartAcked { group, attempt: *attempt, parts: *parts });
            }
            Step::Taken | Step::Duplicate | Step::Synced => {}
        }
        self.live(|live| {
            live.received = Some(place);
            live.received_at = Some(now);
            live.received_bytes += bytes;
            if journaled {
                live.journaled = Some(place.0);
            }
        });
    }

    /// Makes durable what was appended, then acks it.
    pub(super) fn sync(&mut self) {
        if let Err(error) = self.try_sync() {
            self.failed(&error);
        }
    }

    fn try_sync(&mut self) -> Result<(), StoreError> {
        let Some(writer) = self.writer.as_deref_mut().filter(|_| self.unsynced_bytes > 0) else { return Ok(()) };
        let result = writer.sync();
        self.unsynced_bytes = 0;
        let acks = std::mem::take(&mut self.pending);
        result?;
        self.reopened = false;
        if !acks.is_empty() && std::mem::take(&mut self.full) {
            info!(office = self.office, group = %self.group, "there is room again");
            self.live(|live| live.trouble = None);
        }
        self.send_acks(acks);
        Ok(())
    }

    fn send_acks(&self, acks: Vec<TargetMessage>) {
        let now = self.now();
        for ack in acks {
            if let TargetMessage::Acked { head, .. } = &ack {
                self.live(|live| (live.acked, live.acked_at) = (Some(head.epoch), Some(now)));
            }
            if let Some(session) = &self.session {
                session.outbox.send(ack);
            }
        }
    }

    /// The writer cannot be trusted: nothing that waits for a sync is acked. Opened anew once; the source comes back and
    /// sends what is missing. Where that does not help, the group stops until a source opens it again.
    fn failed(&mut self, error: &StoreError) {
        if let StoreError::Full(reason) = error {
            return self.no_room(reason);
        }
        error!(office = self.office, group = %self.group, reason = text(error), "the group's journal failed");
        self.writer = None;
        self.pending.clear();
        self.unsynced_bytes = 0;
        let again = if self.reopened { None } else { Some(self.ensure(None)) };
        self.reopened = true;
        match again {
            Some(Ok(())) => self.put_off("the journal was opened anew after a failure".to_owned(), REOPENED_RETRY_MS),
            Some(Err(StoreError::Full(reason))) => self.no_room(&reason),
            Some(Err(reopening)) => self.refuse(&text(&reopening)),
            None => self.refuse(&text(error)),
        }
    }

    /// There is no room: the source is told to come again. The writer is opened anew then, whatever it still holds.
    fn no_room(&mut self, reason: &str) {
        // What was appended before may yet become durable, and is acked then; else the source sends it again.
        let _ = self.try_sync();
        self.writer = None;
        self.note_full(reason);
        self.put_off(FULL.to_owned(), FULL_RETRY_MS);
    }

    /// Says so once, however often the source tries.
    fn note_full(&mut self, reason: &str) {
        if !std::mem::replace(&mut self.full, true) {
            error!(office = self.office, group = %self.group, reason, "the disk is full: the group takes nothing");
        }
    }

    fn put_off(&mut self, reason: String, retry_after_ms: u32) {
        self.detach(TargetMessage::Busy { group: self.group, reason, retry_after_ms });
    }

    fn refuse(&mut self, reason: &str) {
        let reason = RefusalReason::Failed(reason.to_owned());
        self.detach(TargetMessage::GroupRefused { group: self.group, reason });
    }

    /// Takes the group from its session, which is told why; its frames are passed over from here on.
    fn detach(&mut self, message: TargetMessage) {
        self.trouble(&message);
        self.live(|live| live.connected_since = None);
        if let Some(session) = self.session.take() {
            session.outbox.send(message);
        }
    }

    /// A frame that no sound source sends: its connection ends, what was taken stays.
    fn end_connection(&mut self, reason: &str) {
        warn!(office = self.office, group = %self.group, reason, "a frame is refused, its connection is closed");
        self.live(|live| {
            live.connected_since = None;
            live.trouble = Some(reason.to_owned());
        });
        if let Some(session) = self.session.take() {
            session.outbox.end(format!("group {}: {reason}", self.group));
        }
    }

    fn points(&mut self, request: u64, after: Option<Epoch>, outbox: &Outbox) {
        let listed = self.writer.as_ref().map(|writer| writer.points(after, PAGE_POINTS + 1));
        let mut points = match listed {
            Some(Ok(points)) => points,
            Some(Err(error)) => return outbox.end(format!("points cannot be listed: {}", text(&error))),
            None => Vec::new(),
        };
        let more = points.len() > PAGE_POINTS;
        points.truncate(PAGE_POINTS);
        outbox.send(TargetMessage::Points { request, points, more });
    }

    /// Tells the session what it was not acked, or does not know to have sent, since the point. What is appended and not durable yet counts
    /// as well.
    fn changes(&self, since: Head) {
        let (Some(writer), Some(session)) = (&self.writer, &self.session) else { return };
        let group = self.group;
        let changes = writer.changes_since(since).unwrap_or_else(|error| {
            warn!(office = self.office, %group, error = text(&error), "what was sent after a point cannot be told");
            None
        });
        let Some(mut changes) = changes else {
            return session.outbox.send(TargetMessage::ChangesUnknown { group, since });
        };
        if changes.is_empty() {
            changes.push((VolumeSlot(0), Vec::new()));
        }
        let last = changes.len() - 1;
        for (page, (volume, extents)) in changes.into_iter().enumerate() {
            let (page, more) = (page as u32, page < last);
            session.outbox.send(TargetMessage::Changes { group, since, volume, extents, page, more });
        }
    }

    /// Tells the session what is held of some blocks, if the point is the newest.
    fn digests(&self, head: Head, volume: VolumeSlot, blocks: Extent) {
        let (Some(writer), Some(session)) = (&self.writer, &self.session) else { return };
        let group = self.group;
        let holdings = writer.holdings(head, volume, blocks).unwrap_or_else(|error| {
            warn!(office = self.office, %group, error = text(&error), "what is held of some blocks cannot be told");
            None
        });
        let (start, holdings) = (blocks.start, holdings.unwrap_or_default());
        session.outbox.send(TargetMessage::Digests { group, head, volume, start, holdings });
    }

    fn ensure(&mut self, request: Option<&OpenGroup>) -> Result<(), StoreError> {
        if self.writer.is_none() {
            self.writer = Some(match request {
                Some(request) => self.store.open_or_create(&self.office, request)?,
                None => self.store.open(&self.office, self.group)?,
            });
        }
        Ok(())
    }

    fn holds(&self, session: u64) -> bool {
        self.session.as_ref().is_some_and(|held| held.number == session)
    }

    fn trouble(&self, message: &TargetMessage) {
        let trouble = match message {
            TargetMessage::Busy { reason, .. } => reason.clone(),
            // Not the source that holds the group; and a fork is the manifest's to tell.
            TargetMessage::GroupRefused {
                reason: RefusalReason::Superseded { .. } | RefusalReason::Left | RefusalReason::Fork,
                ..
            } => return,
            TargetMessage::GroupRefused { reason, .. } => format!("refused: {reason}"),
            _ => return,
        };
        self.live(|live| live.trouble = Some(trouble));
    }

    fn live(&self, change: impl FnOnce(&mut LiveGroup)) {
        change(&mut self.live.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn now(&self) -> Timestamp {
        Timestamp(self.clock.wall_ms())
    }
}

/// An error with its causes, in a line.
pub(super) fn text(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        line = format!("{line}: {source}");
        cause = source.source();
    }
    line
}
