//! What becomes of what the line does not take: it waits in the spool, is merged where it is too much, and goes on with a successor.
//!
//! Invariant: ledger, digests and spool know the same attempts in the same order; a block of one that is given up is carried again. While a
//! volume is restored all that is not acked is in the file, or whoever restores is told that it is not.

use super::{Group, Open, PART_BLOCKS};
use crate::agent::ledger::{Captured, to_bytes};
use crate::control::Reply;
use crate::digests::Replacement;
use crate::spool::{Keys, Merged, Reseal};
use cdp_protocol::record::PartChain;
use cdp_protocol::units::{AttemptId, Epoch, Head, Timestamp};
use std::sync::Arc;

impl Group {
    /// Hands over what the session has room for, oldest first.
    pub(super) fn feed(&mut self) {
        while self.is_taken_up {
            let setup = &mut self.setup;
            let keys = Keys { group: setup.facts.group, slots: &self.slots, data_key: &setup.data_key };
            match setup.spool.hand_over(keys) {
                Ok(Some((outgoing, contents))) => {
                    if let Some(contents) = contents {
                        setup.digests.encoded(outgoing.attempt, contents.digests);
                    }
                    self.link.submit(outgoing);
                }
                Ok(None) => return,
                Err(error) => return self.give_up_waiting(&error.to_string()),
            }
        }
    }

    /// Whether some of what does not fit into a cut may be captured, while writes go on. Where the line takes none of it, only for a
    /// point that the spool has room for, twice over: what is written meanwhile is captured once more.
    pub(super) fn may_take_part(&self) -> bool {
        let has_point = self.open.is_some_and(|open| open.has_point) && self.rescan.is_none();
        let room = self.setup.spool.free_bytes();
        self.fits_in_memory() && self.setup.spool.waiting().bytes == 0
            || has_point && to_bytes(self.ledger.carried() + self.part_blocks()).saturating_mul(2) <= room
    }

    /// Blocks of a part at most.
    pub(super) fn part_blocks(&self) -> u64 {
        PART_BLOCKS.min(self.setup.limits.blocks_max)
    }

    /// Keeps the spool within its bounds: a step of it, so that cuts are made between.
    pub(super) fn tend_spool(&mut self) {
        let spool = &mut self.setup.spool;
        let spilled = if self.restoring.is_some() { spool.spill_all(&self.memo) } else { spool.spill(&self.memo) };
        if let Ok(spooled) = spilled {
            for attempt in spooled {
                self.setup.digests.spooled(attempt);
            }
        }
        if self.is_merge_due() {
            self.merge();
        }
        let failure = self.setup.spool.failure();
        if failure != self.spool_failure.as_deref() {
            let group = &self.setup.facts.name;
            tracing::warn!(group, error = failure, "nothing is written to the spool until this agent's next start");
            self.spool_failure = failure.map(str::to_owned);
        }
    }

    /// Tells who restores a volume that no points are made: once all that was captured is acked or outlives this agent, since what it
    /// holds is about to be overwritten; or that this cannot be.
    pub(super) fn tell_held(&mut self) {
        if self.told_held.is_empty() {
            return;
        }
        let word = match &self.restoring {
            None => None,
            Some(restoring) if self.is_all_kept() => Some(restoring.clone()),
            Some(_) => match self.unkept_because() {
                Some(reason) => Some(reason),
                // It is being encoded.
                None => return,
            },
        };
        for reply in self.told_held.drain(..) {
            // Whoever asked may be gone: what is so is so.
            let _ = reply.send(word.clone());
        }
    }

    /// Whether all that was captured is in the spool's file, or acked.
    fn is_all_kept(&self) -> bool {
        let in_file = self.setup.spool.spilled().filter(|attempt| self.ledger.blocks_of(*attempt).is_some()).count();
        in_file == self.ledger.attempts() && !self.is_newest_gone()
    }

    /// Whether the newest point is neither acked nor to be sent: what was under way was voided, or given up.
    fn is_newest_gone(&self) -> bool {
        let acked = self.memo.head().map(|head| head.epoch);
        self.captured_epoch > acked && self.captured_epoch > self.ledger.newest().map(|captured| captured.epoch)
    }

    /// Why what was captured does not outlive this agent.
    fn unkept_because(&self) -> Option<String> {
        let spool = &self.setup.spool;
        if self.is_newest_gone() {
            return Some("the newest point was given up before it was sent".to_owned());
        }
        match spool.failure() {
            Some(failure) => Some(format!("the spool cannot be written: {failure}")),
            None if !spool.is_on() => Some("there is no spool, and the target does not have it yet".to_owned()),
            None if spool.is_full() => Some("the spool is full, and the target does not have it yet".to_owned()),
            None => None,
        }
    }

    pub(super) fn is_merge_due(&self) -> bool {
        self.setup.spool.is_merge_due(self.ledger.unacked_epochs())
    }

    fn merge(&mut self) {
        let now = Timestamp(self.setup.clock.wall_ms());
        let unacked = self.ledger.unacked_epochs();
        let awaited = &self.awaited;
        let is_awaited = |epoch| awaited.iter().any(|(point, reply)| point.epoch == epoch && !reply.is_closed());
        let setup = &mut self.setup;
        let reseal = Reseal {
            keys: Keys { group: setup.facts.group, slots: &self.slots, data_key: &setup.data_key },
            begin: &setup.begin,
            encoder: &setup.encoder,
            random: &*setup.random,
        };
        match setup.spool.merge((unacked, now), is_awaited, &reseal, &self.memo) {
            Ok(Some(merged)) => self.merged(merged),
            Ok(None) => {}
            Err(error) => self.give_up_waiting(&error.to_string()),
        }
    }

    fn merged(&mut self, Merged { gone, into, attempts, pieces }: Merged) {
        tracing::debug!(group = self.setup.facts.name, %gone, %into, "two points that wait became one");
        let captured = pieces.iter().map(|piece| Captured {
            epoch: into,
            attempt: piece.attempt,
            is_part: true,
            cut_time: Timestamp(0),
            blocks: Arc::clone(&piece.blocks),
            bytes: piece.bytes,
        });
        self.ledger.replace(&attempts, captured.collect());
        let replacements = pieces.into_iter().map(|piece| Replacement {
            epoch: into,
            attempt: piece.attempt,
            blocks: piece.blocks,
            unreadable: piece.unreadable,
            digests: piece.digests,
        });
        self.setup.digests.replaced(&attempts, replacements.collect());
        self.refuse_points("too many points wait for the line: it was merged into a later one", |epoch| epoch == gone);
    }

    /// What waits cannot be had any more: its blocks are captured again. Whatever was captured behind it goes as well.
    fn give_up_waiting(&mut self, reason: &str) {
        let group = &self.setup.facts.name;
        let waiting = self.setup.spool.waiting();
        tracing::error!(
            group,
            reason,
            points = waiting.points,
            "points that wait are lost: their blocks are captured again"
        );
        let mut gone = self.setup.spool.abandon(&self.memo);
        let newest = self.setup.spool.newest();
        let kept: Vec<AttemptId> = self.setup.spool.attempts().collect();
        gone.extend(self.ledger.void_all_but(|attempt| kept.contains(&attempt)));
        self.setup.digests.abandoned(&gone);
        if !self.is_taken_up {
            // Which of the points that an agent before may have sent stand at the target is not known: none is made under their numbers.
            self.open = None;
        } else if let (Some(epoch), Some(open)) = (self.setup.spool.open_epoch(), &mut self.open) {
            open.next_epoch = epoch;
        }
        self.refuse_points("the point was lost before it could be sent; ask again", |epoch| Some(epoch) > newest);
    }

    fn refuse_points(&mut self, reason: &str, is_gone: impl Fn(Epoch) -> bool) {
        let (gone, waiting): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.awaited).into_iter().partition(|(point, _)| is_gone(point.epoch));
        self.awaited = waiting;
        for (_, reply) in gone {
            let _ = reply.send(Reply::Failed { message: reason.to_owned(), hint: None });
        }
    }

    /// Goes on with what an agent before left in the spool, where the tracking goes on as well. Points are made from here on, though the
    /// target was not reached yet.
    pub(super) fn take_up_spool(&mut self) {
        let setup = &mut self.setup;
        let group = &setup.facts.name;
        if self.memo_is_kept {
            // The tracking starts over: everything is compared, and that says more.
            return;
        }
        let keys = Keys { group: setup.facts.group, slots: &self.slots, data_key: &setup.data_key };
        let taken_up = match setup.spool.take_up(keys, &setup.begin, &self.memo) {
            Ok(taken_up) => taken_up,
            Err(reason) => {
                tracing::warn!(
                    group,
                    reason,
                    "what an agent before left in the spool is thrown away: its blocks are captured again"
                );
                return;
            }
        };
        let (Some(newest), Some(generation)) = (taken_up.last(), self.memo.generation) else { return };
        let points = taken_up.iter().filter(|attempt| attempt.cut_time.is_some()).count();
        tracing::info!(group, points, "going on with the points that an agent before left in the spool");
        // A commit that an agent before sent may stand at the target, also where the file does not have it: no other is made under its number.
        let sent = self.memo.sent.iter().map(|head| head.epoch).max().unwrap_or_default();
        let next_epoch = Epoch(newest.epoch.max(sent).0 + 1);
        self.captured_epoch = Some(newest.epoch);
        self.open =
            Some(Open { generation, next_epoch, after_rollback_to: None, has_point: self.memo.head().is_some() });
        for attempt in taken_up {
            let (epoch, id) = (attempt.epoch, attempt.attempt);
            setup.digests.captured(epoch, id, Arc::clone(&attempt.blocks), attempt.unreadable.clone());
            let captured = Captured {
                epoch,
                attempt: id,
                is_part: attempt.cut_time.is_none(),
                cut_time: attempt.cut_time.unwrap_or(Timestamp(0)),
                blocks: attempt.blocks,
                bytes: attempt.bytes,
            };
            self.ledger.capture(captured, &attempt.unreadable);
        }
    }

    /// The target took the group up, at this point and with these parts: what was taken up goes on from there, or is given up.
    pub(super) fn check_taken_up(&mut self, head: Option<Head>, parts: Option<(Epoch, PartChain)>) {
        if self.setup.spool.newest().is_none() {
            return;
        }
        // A commit that left may have been acked unheard; no part follows it that this source has heard of.
        let is_sent = head.is_some_and(|head| self.memo.sent.contains(&head)) && parts.is_none();
        if is_sent || head == self.memo.head() && parts == self.memo.parts {
            let epoch = head.map_or(Epoch(0), |head| head.epoch);
            self.setup.spool.acked(epoch);
            self.ledger.acked(epoch);
        } else {
            self.give_up_waiting("the target stands elsewhere");
        }
    }
}
