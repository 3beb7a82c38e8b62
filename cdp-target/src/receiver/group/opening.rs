//! A source opens the group: whether it may, and what becomes of whoever had it before.
//!
//! Invariant: what is named as standing here is durable; one session holds the group; of histories that part none is dropped, and nothing
//! goes on before an operator has said which.

use super::{FULL, FULL_RETRY_MS, GroupThread, Session, text};
use crate::journal::{Fork, short_claim};
use crate::receiver::store_api::{GroupWriter, StoreError};
use cdp_protocol::message::{GroupOpened, Instance, OpenGroup, RefusalReason, Resume, TargetMessage, Verdict};
use cdp_protocol::session::target::{Claim, Judgement, Standing, judge};
use cdp_protocol::units::Generation;
use tracing::{error, info, warn};

/// Processes remembered that lost the group to others.
const SUPERSEDED_MAX: usize = 16;

impl GroupThread {
    pub(super) fn open(&mut self, session: Session, request: &OpenGroup) {
        // The head that `GroupOpened` names counts as acked: it has to be durable before it is named.
        self.sync();
        let outbox = session.outbox.clone();
        let group = self.group;
        let refusal = match self.judge(session, request) {
            Ok(None) => return,
            Ok(Some(reason)) => TargetMessage::GroupRefused { group, reason },
            Err(StoreError::NameTaken) => {
                self.unmade = self.writer.is_none();
                TargetMessage::GroupRefused { group, reason: RefusalReason::NameTaken }
            }
            Err(StoreError::TooMany(groups)) => {
                self.unmade = true;
                warn!(office = self.office, %group, groups, "the office wants more groups than it may have");
                let reason = RefusalReason::Failed(text(&StoreError::TooMany(groups)));
                TargetMessage::GroupRefused { group, reason }
            }
            Err(StoreError::Full(reason)) => {
                self.writer = None;
                self.note_full(&reason);
                TargetMessage::Busy { group, reason: FULL.to_owned(), retry_after_ms: FULL_RETRY_MS }
            }
            Err(error) => {
                self.writer = None;
                let reason = text(&error);
                error!(office = self.office, %group, reason, "the group cannot be opened");
                TargetMessage::GroupRefused { group, reason: RefusalReason::Failed(reason) }
            }
        };
        self.trouble(&refusal);
        outbox.send(refusal);
    }

    /// Opens the group for a session, or says why it is refused.
    fn judge(&mut self, session: Session, request: &OpenGroup) -> Result<Option<RefusalReason>, StoreError> {
        self.ensure(Some(request))?;
        if let Some(told) = self.superseded.iter().find(|(process, _)| *process == request.instance.process) {
            // It may not have heard it: its line was down. Only a new start of it is judged again.
            return Ok(Some(told.1.clone()));
        }
        let same_process = self.holder.as_ref().is_some_and(|held| held.process == request.instance.process);
        let writer = self.writer.as_deref_mut().expect("just opened");
        if let Some(reason) = writer.frozen() {
            warn!(office = self.office, group = %self.group, reason, "the group is frozen, its source is refused");
            return self.fork(request).map(Some);
        }
        let chain = writer.chain();
        let standing = Standing {
            head: chain.head().map(|(head, _)| head),
            parts: chain.parts(),
            generation: chain.generation(),
            same_process,
            lineage: writer.lineage(),
            ruling: writer.ruling(),
        };
        let (verdict, generation, begins, lost) = match judge(&standing, request, &mut |point| writer.made_in(point))? {
            Judgement::Open { verdict, generation, begins, lost } => (verdict, generation, begins, lost),
            Judgement::Refuse(RefusalReason::Fork) => return self.fork(request).map(Some),
            Judgement::Refuse(reason) => return Ok(Some(reason)),
        };
        if !lost.is_empty() {
            let epochs: Vec<u64> = lost.iter().map(|epoch| epoch.0).collect();
            error!(office = self.office, group = %self.group, ?epochs, "points that were acked are not here any more");
        }
        writer.identify(request)?;
        if let Some(line) = begins {
            writer.begin(line)?;
        }
        let host = &request.instance.host;
        info!(office = self.office, group = %self.group, host, ?verdict, %generation, "group opened");
        if !same_process {
            self.supersede(&request.instance);
        }
        self.hand_over(session, verdict, generation);
        Ok(None)
    }

    /// A source whose history is not of the one that goes on: whoever holds the group is stopped too, and both are kept.
    fn fork(&mut self, request: &OpenGroup) -> Result<RefusalReason, StoreError> {
        let at = self.now();
        let writer = self.writer.as_deref_mut().expect("opened by the caller");
        let host = request.instance.host.clone();
        let fork = Claim::of(request).map(|claim| Fork { claim, host: host.clone(), at });
        let claims = fork.as_ref().map_or_else(|| "no point".to_owned(), |fork| short_claim(fork.claim));
        let line = format!("a source on {host} stands at {claims}, which is not of the history that goes on here");
        let is_first = writer.frozen().is_none();
        let ours = !is_first && is_ours(request, &*writer);
        writer.freeze(&line, fork.filter(|_| !ours))?;
        if is_first {
            error!(office = self.office, group = %self.group, line, "fork: the group is frozen until `cdp-target resolve`");
        }
        if self.session.is_some() {
            self.detach(TargetMessage::GroupRefused { group: self.group, reason: RefusalReason::Fork });
        }
        Ok(RefusalReason::Fork)
    }

    /// Another process takes the group: the one before is told now, if its line stands, and again whenever it asks.
    fn supersede(&mut self, by: &Instance) {
        let Some(before) = self.holder.replace(by.clone()) else { return };
        let reason = RefusalReason::Superseded { by: by.host.clone(), at: self.now() };
        warn!(office = self.office, group = %self.group, before = before.host, by = by.host, "another process took the group over");
        if self.superseded.len() == SUPERSEDED_MAX {
            self.superseded.remove(0);
        }
        self.superseded.push((before.process, reason.clone()));
        if let Some(session) = self.session.take() {
            session.outbox.send(TargetMessage::GroupRefused { group: self.group, reason });
        }
    }

    /// The newest session holds the group; an older line of the same process is closed.
    fn hand_over(&mut self, session: Session, verdict: Verdict, generation: Generation) {
        if let Some(before) = self.session.take().filter(|before| before.connection != session.connection) {
            before.outbox.end("a newer connection of the same source took over");
        }
        let chain = self.writer.as_ref().expect("open").chain();
        let (head, parts) = (chain.head(), chain.parts());
        let resume = chain.open().map(|open| Resume { epoch: open.epoch, attempt: open.attempt, next: open.next });
        self.unmade = false;
        let opened = GroupOpened { group: self.group, generation, verdict, head, parts, resume };
        session.outbox.send(TargetMessage::GroupOpened(opened));
        self.session = Some(session);
        let now = self.now();
        self.live(|live| {
            live.connected_since = Some(now);
            live.generation = generation;
            live.acked = head.map(|(head, _)| head.epoch);
            live.journaled = live.acked;
        });
        if !self.full {
            self.live(|live| live.trouble = None);
        }
    }
}

/// Whether a source of a frozen group is of the history that was to go on here: no further fork, then.
fn is_ours(request: &OpenGroup, writer: &dyn GroupWriter) -> bool {
    let newest = writer.chain().head().map(|(head, _)| head);
    let mut claimed = request.sent.iter().chain(&request.acked).copied();
    let same_generation = request.generation == Some(writer.chain().generation());
    Claim::of(request).is_none() || same_generation && claimed.any(|head| Some(head) == newest)
}
