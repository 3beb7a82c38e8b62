//! What a target may have removed, and what it may not: the points' arrivals, what holds them, what the ladder lets go.
//!
//! A prune that is cut off has removed all that the ladder let go, or none of it; which, its first whole view tells. What was
//! seen to be gone never comes back.

use std::collections::{HashMap, HashSet};

use cdp_protocol::units::{FrameHash, Head};
use cdp_target::journal::Point;
use cdp_target::retention::Ladder;

use super::ladder::{Times, stays};
use super::model::Model;

/// Whether something an operator said holds.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Said {
    #[default]
    No,
    /// It failed, and may yet have come to be.
    Maybe,
    Yes,
}

/// What an operator said of a point.
#[derive(Clone, Copy, Default)]
pub(crate) struct Marks {
    pub(crate) pinned: Said,
    pub(crate) labelled: Said,
}

impl Marks {
    const fn is_surely_held(self) -> bool {
        matches!(self.pinned, Said::Yes) || matches!(self.labelled, Said::Yes)
    }

    const fn may_be_held(self) -> bool {
        !matches!((self.pinned, self.labelled), (Said::No, Said::No))
    }
}

/// What becomes of points as they age.
#[derive(Default)]
pub(crate) struct Kept {
    /// When each commit came to the target, by its clock.
    arrivals: HashMap<FrameHash, Vec<i64>>,
    /// Which of these the target goes by.
    received: HashMap<FrameHash, i64>,
    marks: HashMap<FrameHash, Marks>,
    may_go: HashSet<FrameHash>,
    gone: HashSet<FrameHash>,
}

impl Kept {
    /// A commit comes to the target.
    pub(crate) fn arrived(&mut self, hash: FrameHash, now: i64) {
        self.arrivals.entry(hash).or_default().push(now);
    }

    /// Whether the point was removed, or may have been.
    pub(crate) fn may_be_gone(&self, head: &Head) -> bool {
        self.may_go.contains(&head.hash) || self.gone.contains(&head.hash)
    }

    /// Points that were seen to be gone.
    pub(crate) fn gone(&self) -> usize {
        self.gone.len()
    }

    /// What an operator said of a point.
    pub(crate) fn marks(&mut self, hash: FrameHash) -> &mut Marks {
        self.marks.entry(hash).or_default()
    }

    /// A listed point: is what it was. `is_whole`: what the view shows is durable, and nothing else may yet be.
    pub(crate) fn listed(&mut self, point: &Point, is_whole: bool) -> Result<(), String> {
        let epoch = point.epoch;
        if self.gone.contains(&point.hash) {
            return Err(format!("{epoch} was removed and is back"));
        }
        if !self.arrivals.get(&point.hash).is_some_and(|arrivals| arrivals.contains(&point.received.0)) {
            return Err(format!("{epoch} never arrived at {}", point.received.0));
        }
        // What is listed is proven to be durable, also where the manifest is not.
        if *self.received.entry(point.hash).or_insert(point.received.0) != point.received.0 {
            return Err(format!("{epoch} has another time of arrival than before"));
        }
        let marks = self.marks.entry(point.hash).or_default();
        for (said, shown) in [(&mut marks.pinned, point.pinned), (&mut marks.labelled, point.label.is_some())] {
            let found = if shown { Said::Yes } else { Said::No };
            if *said != Said::Maybe && *said != found && is_whole {
                return Err(format!("{epoch} is not held as an operator said"));
            }
            if is_whole {
                *said = found;
            }
        }
        Ok(())
    }

    /// A prune was refused before it did anything.
    pub(crate) fn refused(&mut self, due: &Due) {
        self.may_go.retain(|hash| !due.anew.contains(hash));
    }

    /// A whole view was seen: what may have gone is gone, or stands.
    pub(crate) fn seen(&mut self, listed: &[Point]) {
        let listed: HashSet<FrameHash> = listed.iter().map(|point| point.hash).collect();
        self.gone.extend(self.may_go.drain().filter(|hash| !listed.contains(hash)));
    }
}

/// What a prune is to do.
pub(crate) struct Due {
    /// Points that go.
    pub(crate) go: Vec<Head>,
    /// Those among them that may be held.
    pub(crate) unsure: Vec<Head>,
    /// Those that no prune before was to remove.
    anew: Vec<FrameHash>,
    /// Whether a rung keeps any that nothing else does.
    pub(crate) keeps_some: bool,
}

impl Model {
    /// A prune of what is `listed`, up to `newest`, as of `now` begins: gives what goes of it.
    pub(crate) fn prune(&mut self, ladder: &Ladder, listed: &[Point], newest: Head, now: i64) -> Result<Due, String> {
        listed.iter().try_for_each(|point| self.kept.listed(point, false))?;
        let mut chain = vec![newest];
        while let Some(before) = self.point(chain.last().expect("one")).and_then(|point| point.predecessor) {
            chain.push(before);
        }
        chain.reverse();
        let times = |head: &Head| {
            let received = self.kept.received.get(&head.hash).copied();
            let received = received.ok_or_else(|| format!("{} is in the chain and was never listed", head.epoch))?;
            Ok(Times { cut: self.point(head).expect("in the chain").cut_time, received })
        };
        let times: Vec<Times> = chain.iter().map(times).collect::<Result<_, String>>()?;
        let mut due = Due { go: Vec::new(), unsure: Vec::new(), anew: Vec::new(), keeps_some: false };
        for (head, stays) in chain.iter().zip(stays(ladder, &times, now)) {
            let marks = *self.kept.marks(head.hash);
            let is_listed = listed.iter().any(|point| point.hash == head.hash);
            if !is_listed && !self.kept.may_be_gone(head) {
                return Err(format!("{} is in the chain and not listed", head.epoch));
            }
            if *head == newest || marks.is_surely_held() || !is_listed {
                continue;
            }
            due.keeps_some |= stays && !marks.may_be_held();
            if !stays {
                due.go.push(*head);
                due.unsure.extend(Some(*head).filter(|_| marks.may_be_held()));
            }
        }
        let hashes = due.go.iter().map(|head| head.hash);
        due.anew = hashes.filter(|hash| self.kept.may_go.insert(*hash)).collect();
        Ok(due)
    }
}
