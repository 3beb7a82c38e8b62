//! What the target's answers mean: for the memo, the ledger, the tracker, and whoever waits for a point.
//!
//! Invariant: the memo names a commit before the commit leaves, and a new generation only once all it voids is in
//! `unacked`.

use super::{DiskLayouts, Group, Open, RETAIN_EVERY};
use crate::agent::status::rfc3339;
use crate::control::{PointReply, Reply};
use cdp_protocol::message::{RefusalReason, Verdict};
use cdp_protocol::record::PartChain;
use cdp_protocol::session::source::SourceEvent;
use cdp_protocol::units::{Epoch, Extent, Generation, Head, VolumeSlot};
use std::time::Duration;
use tokio::sync::oneshot;

impl Group {
    pub(super) fn event(&mut self, event: SourceEvent) {
        match event {
            SourceEvent::Opened { verdict, generation, is_new, head, parts } => {
                self.opened(verdict, generation, is_new, head, parts);
            }
            SourceEvent::Committing(head) => {
                self.memo.committing(head);
                if self.keep_memo() {
                    self.link.proceed(head);
                }
            }
            SourceEvent::Acked(head) => self.acked(head),
            SourceEvent::PartAcked { epoch, attempt, parts } => {
                self.put_off = None;
                self.memo.part_acked(epoch, parts);
                // Before its blocks are forgotten: a target that loses the part is noticed by it.
                if self.keep_memo()
                    && let Some(part) = self.ledger.part_acked(attempt)
                {
                    self.setup.digests.part_acked(attempt);
                    self.acked_bytes += part.bytes;
                    self.retain_soon();
                }
                self.setup.spool.part_acked(attempt, epoch, parts);
                self.feed();
            }
            SourceEvent::Busy { reason, retry_after_ms } => {
                let text = format!("the target takes nothing for now: {reason}");
                if self.put_off.as_ref() != Some(&text) {
                    tracing::warn!(group = self.setup.facts.name, retry_after_ms, reason = text, "pushed back");
                }
                self.refused = Some(text.clone());
                self.put_off = Some(text);
                self.is_put_off = true;
            }
            SourceEvent::Refused(reason) => {
                let text = refusal(&reason);
                if self.refused.as_ref() != Some(&text) {
                    tracing::error!(group = self.setup.facts.name, reason = text, "the target refuses the group");
                }
                self.refuse_wanted(&text);
                (self.refused, self.is_put_off) = (Some(text), false);
            }
            SourceEvent::SendAgain { volume, extents } => self.send_again(volume, &extents),
            SourceEvent::Changes { since, volume, extents, page, more } => {
                let head = self.memo.head();
                self.setup.digests.changed(since, volume, &extents, page, !more, head);
            }
            SourceEvent::Digests { head, volume, start, holdings } => self.told(head, volume, start, &holdings),
            SourceEvent::ChangesUnknown(since) => self.setup.digests.changed_unknown(since, self.memo.head()),
            SourceEvent::Voided => {
                tracing::info!(group = self.setup.facts.name, "what was under way is void and captured again");
                self.ledger.void();
                self.setup.digests.void();
                self.setup.spool.void(&self.memo);
                self.refuse_awaited("the point was voided by a new generation; ask again");
            }
        }
    }

    pub(super) fn opened(
        &mut self,
        verdict: Verdict,
        generation: Generation,
        is_new: bool,
        head: Option<Head>,
        parts: Option<(Epoch, PartChain)>,
    ) {
        (self.refused, self.is_put_off) = (None, false);
        if !is_new && self.is_taken_up {
            return;
        }
        if !is_new {
            self.check_taken_up(head, parts);
        }
        let newest = self.memo.head().map(|head| head.epoch).max(head.map(|head| head.epoch));
        let after = Epoch(newest.unwrap_or_default().0 + 1);
        if is_new {
            tracing::info!(group = self.setup.facts.name, %generation, ?verdict, "a new generation: everything is compared");
            self.ledger.carry_everything();
            self.setup.digests.void();
            self.setup.spool.void(&self.memo);
            self.setup.layouts.iter_mut().for_each(DiskLayouts::tell_again);
            self.rescan = match verdict {
                Verdict::New => None,
                Verdict::Continue => Some("a new generation".into()),
                Verdict::Rollback { .. } => Some("this source went on from an older point".into()),
                Verdict::TargetBehind => Some("the target lost points it had acked".into()),
            };
            self.retain();
        }
        self.setup.digests.opened(head, parts.is_some());
        self.ask_at = Duration::ZERO;
        self.memo.opened(generation, head, parts);
        self.keep_memo();
        if is_new {
            self.setup.kept_memo.keep(&self.memo);
        }
        let before = self.open.and_then(|open| open.after_rollback_to);
        let after_rollback_to = match verdict {
            // A kept memo is older than the group's points after every power cut: that is no rollback.
            Verdict::Rollback { to: Some(epoch) } if is_new && !self.memo_is_kept => Some(epoch),
            _ => before,
        };
        self.memo_is_kept = false;
        // What an agent before left in the spool, and what was captured behind that, goes first.
        let next_epoch = match self.ledger.newest() {
            Some(captured) if captured.is_part => captured.epoch,
            Some(captured) => after.max(Epoch(captured.epoch.0 + 1)),
            None => parts.map_or(after, |(epoch, _)| epoch),
        };
        self.open = Some(Open { generation, next_epoch, after_rollback_to, has_point: head.is_some() && !is_new });
        self.next_cut = self.setup.clock.monotonic();
        self.is_taken_up = true;
        if let Some((epoch, parts)) = parts {
            self.setup.spool.parts_held(epoch, parts);
        }
        self.feed();
    }

    pub(super) fn acked(&mut self, head: Head) {
        self.put_off = None;
        self.memo.acked(head);
        self.keep_memo();
        self.setup.digests.acked(head);
        self.setup.spool.acked(head.epoch);
        if let Some(point) = self.ledger.acked(head.epoch) {
            self.acked_time = Some(point.cut_time);
            self.acked_bytes += point.bytes;
            self.rescan = None;
        }
        if let Some(open) = &mut self.open {
            open.after_rollback_to = None;
            open.has_point = true;
        }
        if self.ledger.is_acked() {
            self.retain();
        } else {
            self.retain_soon();
        }
        let (done, waiting) =
            std::mem::take(&mut self.awaited).into_iter().partition(|(point, _)| point.epoch <= head.epoch);
        self.awaited = waiting;
        let done: Vec<(PointReply, oneshot::Sender<Reply>)> = done;
        for (point, reply) in done {
            let _ = reply.send(Reply::Point(PointReply { acked: true, ..point }));
        }
        self.feed();
    }

    /// The target has lost what it held of these blocks: the next capture has them, whatever is known of them. Not kept for a
    /// next start: the target asks again whenever the group is opened.
    fn send_again(&mut self, slot: VolumeSlot, extents: &[Extent]) {
        let group = &self.setup.facts.name;
        let blocks: u64 = extents.iter().map(|extent| u64::from(extent.count)).sum();
        let Some(volume) = self.setup.facts.volumes.iter().position(|volume| volume.slot == slot) else {
            tracing::warn!(group, %slot, blocks, "the target asks for blocks of a volume that is not in the group any more");
            return;
        };
        self.setup.digests.forget(slot, extents);
        let beyond = self.ledger.carry_again(volume, extents);
        tracing::info!(group, %slot, blocks, "the target asks for blocks that are damaged there: the next point has them again");
        if beyond > 0 {
            tracing::warn!(group, %slot, beyond, "the target asks for blocks beyond the volume's end, which are passed over");
        }
    }

    /// Stores the memo; `false` where it could not be.
    pub(super) fn keep_memo(&mut self) -> bool {
        let Some(devices) = &mut self.devices else { return false };
        match devices.tracker.set_memo(&self.memo.encode()) {
            Ok(()) => {
                self.setup.spool.remember(&self.memo);
                true
            }
            Err(error) => {
                self.fail(format!("{:#}", anyhow::Error::new(error)));
                false
            }
        }
    }

    pub(super) fn retain_soon(&mut self) {
        self.retain_at.get_or_insert(self.setup.clock.monotonic() + RETAIN_EVERY);
    }

    /// Lets the tracker forget what is acked.
    pub(super) fn retain(&mut self) {
        self.retain_at = None;
        let Some(devices) = &mut self.devices else { return };
        if let Err(error) = devices.tracker.retain_unacked(&self.ledger.unacked()) {
            self.fail(format!("{:#}", anyhow::Error::new(error)));
        }
    }

    pub(super) fn refuse_awaited(&mut self, reason: &str) {
        for (_, reply) in self.awaited.drain(..) {
            let _ = reply.send(Reply::Failed { message: reason.to_owned(), hint: None });
        }
    }
}

fn refusal(reason: &RefusalReason) -> String {
    match reason {
        RefusalReason::Fork => {
            "this source's history is a fork of the target's: frozen until `cdp-target resolve`".into()
        }
        RefusalReason::Left => {
            "an operator resolved a fork, and another history than this source's goes on; protect this machine anew if it is to be kept"
                .into()
        }
        RefusalReason::Superseded { by, at } => format!(
            "another process on {by} took the group over at {}; stop whichever of the two is not wanted, and restart this agent if it is to go on",
            rfc3339(*at)
        ),
        RefusalReason::NameTaken => "the office has another group of this name".into(),
        RefusalReason::Failed(reason) => format!("the target cannot serve the group: {reason}"),
    }
}
