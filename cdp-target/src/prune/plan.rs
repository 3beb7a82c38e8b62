//! Which points go and which stay: the ladder's word about every point there is, as the prune needs it.
//!
//! Invariant: one that cannot be read, listed or proved stays, and takes nobody's place; the newest stays.

use super::{Prune, unlisted};
use crate::journal::listing::KnownPoint;
use crate::journal::{GroupView, JournalError, Point};
use crate::points::{Instant, point_time};
use crate::retention::{Candidate, Decision, Held, Reason, Removal, Tally, Verdict, decide};
use cdp_protocol::units::{Epoch, Timestamp};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

/// A point that goes, and why.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Removed {
    /// Its number.
    pub epoch: Epoch,
    /// Its time.
    pub time: Instant,
    /// When it was received.
    pub received: Instant,
    /// Why.
    pub reason: Removal,
}

/// What the ladder says.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The points that go, oldest first.
    pub removed: Vec<Removed>,
    /// The same as ranges of epochs, joined over points that went before.
    pub ranges: Vec<(Epoch, Epoch)>,
    /// The points that stay, oldest first.
    pub stays: Vec<Epoch>,
    /// How many stay, and for what; but for those that are damaged.
    pub tally: Tally,
    /// How many stay because they are damaged, and may be healed.
    pub damaged: u64,
}

impl Plan {
    /// Points from `first` to `last` stay.
    fn keep(&mut self, first: Epoch, last: Epoch) {
        self.stays.push(first);
        // Up to them, so that numbers that were never points do not part ranges; and none goes over them.
        if let (Some((from, to)), Some(below)) = (self.ranges.last_mut(), first.0.checked_sub(1))
            && *from <= *to
        {
            *to = Epoch(below);
        }
        self.ranges.extend(last.0.checked_add(1).map(|above| (Epoch(above), last)));
    }

    /// Takes in the next point; one that is damaged was not decided on.
    fn take(&mut self, point: &Judged, decision: Option<&Decision>) {
        let epoch = point.epoch;
        if point.went_before {
            return extend(&mut self.ranges, epoch);
        }
        if let Some(decision) = decision {
            self.tally.add(decision);
        }
        self.damaged += u64::from(point.is_damaged);
        if point.is_unlisted {
            // Kept with all that its segment had.
            if self.stays.last() != Some(&epoch) {
                self.stays.push(epoch);
            }
            return;
        }
        match decision.map_or(Verdict::Kept(Reason::Newest), |decision| decision.verdict) {
            Verdict::Kept(_) => self.keep(epoch, epoch),
            Verdict::Removed(reason) => {
                extend(&mut self.ranges, epoch);
                let (time, received) = (Instant(point.time), Instant(point.received));
                self.removed.push(Removed { epoch, time, received, reason });
            }
        }
    }

    /// The oldest point that stays.
    pub(super) fn oldest_kept(&self) -> Option<Epoch> {
        self.stays.first().copied()
    }

    /// The newest of the points that go, or went before.
    pub(super) fn newest_removed(&self) -> Option<Epoch> {
        self.ranges.last().map(|(_, last)| *last)
    }

    /// How many points stay.
    #[must_use]
    pub const fn kept(&self) -> u64 {
        self.tally.on_a_rung + self.tally.held + self.tally.newest + self.damaged
    }
}

/// A point as the ladder sees it.
#[derive(Clone, Copy)]
struct Judged {
    epoch: Epoch,
    time: Timestamp,
    received: Timestamp,
    held: Option<Held>,
    went_before: bool,
    is_damaged: bool,
    /// It is in a segment whose points cannot all be listed.
    is_unlisted: bool,
}

impl Judged {
    fn of(known: &KnownPoint, time: Timestamp, is_unlisted: bool) -> Self {
        let (epoch, received, point) = (known.epoch, known.times.received, known.point.as_ref());
        let is_damaged = point.is_some_and(|point| point.damaged.is_some() || is_unlisted);
        let (held, went_before) = (point.and_then(held), point.is_none());
        Self { epoch, time, received, held, went_before, is_damaged, is_unlisted }
    }

    /// One that is damaged takes nobody's place, and waits for what may heal it.
    fn candidate(&self) -> Option<Candidate> {
        let Self { epoch, time, received, held, .. } = *self;
        (!self.is_damaged).then_some(Candidate { epoch, time, received, held })
    }
}

impl Prune<'_> {
    /// What the ladder says about the points of `view`.
    ///
    /// # Errors
    /// Where a segment cannot be read: then nobody knows what stands on it.
    pub fn plan(&self, view: &GroupView) -> Result<Plan, JournalError> {
        let unlisted = unlisted::unlisted(view);
        let is_unlisted = |epoch: Epoch| unlisted.iter().any(|unlisted| unlisted.has(epoch));
        let mut stay = unlisted.iter().flat_map(|unlisted| &unlisted.points).peekable();
        // The newest there is to see, and the newest that is whole: one that went is the last of all that the ladder sees where what came
        // behind it cannot be read now, or is damaged.
        let newest = |wanted: &dyn Fn(&Point) -> bool| view.points().rev().filter_map(Result::ok).find(wanted);
        let is_whole = |point: &Point| point.damaged.is_none() && !is_unlisted(point.epoch);
        let newest = [newest(&|_| true), newest(&is_whole)].map(|point| point.map(|point| point.epoch));
        let mut take = |plan: &mut Plan, point: &Judged, decision: Option<&Decision>| {
            while let Some((first, last)) = stay.next_if(|(first, _)| *first <= point.epoch) {
                plan.keep(*first, *last);
            }
            let is_newest = newest.contains(&Some(point.epoch));
            let spared = decision.filter(|decision| is_newest && matches!(decision.verdict, Verdict::Removed(_)));
            let spared = spared.map(|decision| Decision { verdict: Verdict::Kept(Reason::Newest), ..*decision });
            plan.take(point, spared.as_ref().or(decision));
        };
        // Between what is read and what is decided only the next point: a history has half a million.
        let (waiting, failed) = (RefCell::new(VecDeque::new()), Cell::new(None));
        let mut before = None;
        let candidates = view.all_points().map_while(|known| match known {
            Ok(known) => {
                let time = point_time(known.times, before);
                before = Some(time);
                let point = Judged::of(&known, time, is_unlisted(known.epoch));
                waiting.borrow_mut().push_back(point);
                Some(point.candidate())
            }
            Err(error) => {
                failed.set(Some(error));
                None
            }
        });
        let mut plan = Plan::default();
        for decision in decide(self.ladder, candidates.flatten(), self.now) {
            while let Some(point) = waiting.borrow_mut().pop_front() {
                if !point.is_damaged {
                    take(&mut plan, &point, Some(&decision));
                    break;
                }
                take(&mut plan, &point, None);
            }
        }
        waiting.take().iter().for_each(|point| take(&mut plan, point, None));
        if let Some(error) = failed.take() {
            return Err(error);
        }
        plan.ranges.retain(|(first, last)| first <= last);
        let oldest = plan.oldest_kept();
        if let Some(first) = plan.ranges.first_mut().filter(|(first, _)| oldest.is_none_or(|oldest| *first < oldest)) {
            // Numbers below the first point there was are gone with it.
            first.0 = Epoch(0);
        }
        Ok(plan)
    }
}

fn held(point: &Point) -> Option<Held> {
    if point.pinned { Some(Held::Pinned) } else { point.label.as_ref().map(|_| Held::Labelled) }
}

/// Takes a point into the last range, from where that ends.
fn extend(ranges: &mut Vec<(Epoch, Epoch)>, epoch: Epoch) {
    match ranges.last_mut() {
        Some((_, last)) => *last = epoch,
        None => ranges.push((epoch, epoch)),
    }
}
