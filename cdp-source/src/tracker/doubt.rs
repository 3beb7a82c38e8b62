//! Doubt: counts differ in a way that a lost completion cannot explain.
//!
//! Owns how doubt begins and ends. While it lasts no flip is good for a cut. It ends when nothing is in flight once (and
//! what was marked since it began is captured again, with what was suspect before), or after 30 s with everything dirty. A
//! cause that persists, such as a kernel that does not count, keeps it: everything is dirty then too, and no cut is made until the cause is
//! gone. Invariant: marks that may be missing altogether end in everything dirty, whichever way it ends.

use std::time::Duration;

/// How long a quiet moment is waited for.
const QUIET_WITHIN: Duration = Duration::from_secs(30);

/// Why there is doubt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cause {
    /// In a line.
    pub(super) reason: String,
    /// Marks may be missing altogether.
    pub(super) is_unmarked: bool,
    /// It is there now, whatever was in flight.
    pub(super) persists: bool,
}

/// What becomes of a flip.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It stands.
    Trusted,
    /// It is good for no cut; what it drained is kept.
    Void(String),
    /// It stands, and what was suspect before joins it.
    Recapture(String),
    /// It stands, and everything joins it.
    Rescan(String),
    /// Everything joins it, and it is good for no cut.
    RescanVoid(String),
}

/// Whether there is doubt.
#[derive(Default)]
pub(super) struct Doubt {
    current: Option<Current>,
}

struct Current {
    cause: Cause,
    since: Duration,
    rescanned: bool,
}

impl Doubt {
    /// Why there is doubt now.
    pub(super) fn reason(&self) -> Option<&str> {
        self.current.as_ref().map(|current| current.cause.reason.as_str())
    }

    /// Takes in what a flip's counts say.
    pub(super) fn flipped(&mut self, cause: Option<Cause>, quiet: bool, now: Duration) -> Outcome {
        let persists = cause.as_ref().is_some_and(|cause| cause.persists);
        if let Some(cause) = cause {
            let current = self.current.get_or_insert(Current { cause: cause.clone(), since: now, rescanned: false });
            let is_unmarked = current.cause.is_unmarked || cause.is_unmarked;
            current.cause = Cause { is_unmarked, ..cause };
        }
        let Some(current) = &mut self.current else { return Outcome::Trusted };
        let reason = current.cause.reason.clone();
        if quiet && !persists {
            // A cause that lasted took the counts with it: what was written meanwhile is not known to be marked.
            let all = current.cause.is_unmarked || current.cause.persists;
            self.current = None;
            return if all { Outcome::Rescan(reason) } else { Outcome::Recapture(reason) };
        }
        if now.saturating_sub(current.since) < QUIET_WITHIN || current.rescanned && persists {
            return Outcome::Void(reason);
        }
        if persists {
            current.rescanned = true;
            return Outcome::RescanVoid(reason);
        }
        self.current = None;
        Outcome::Rescan(reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Duration = Duration::from_secs(100);

    fn cause(is_unmarked: bool, persists: bool) -> Cause {
        Cause { reason: "because".to_owned(), is_unmarked, persists }
    }

    fn why() -> String {
        "because".to_owned()
    }

    #[test]
    fn doubt_voids_flips_until_nothing_is_in_flight_once() {
        let mut doubt = Doubt::default();
        assert_eq!(doubt.flipped(None, false, AT), Outcome::Trusted);
        assert_eq!(doubt.flipped(Some(cause(false, false)), false, AT), Outcome::Void(why()));
        assert_eq!(doubt.reason(), Some("because"));
        assert_eq!(doubt.flipped(None, false, AT + QUIET_WITHIN / 2), Outcome::Void(why()));
        assert_eq!(doubt.flipped(None, true, AT + QUIET_WITHIN / 2), Outcome::Recapture(why()));
        assert_eq!(doubt.reason(), None);
        assert_eq!(doubt.flipped(None, false, AT), Outcome::Trusted);
    }

    #[test]
    fn a_device_that_is_never_quiet_is_rescanned_after_30_seconds() {
        let mut doubt = Doubt::default();
        doubt.flipped(Some(cause(false, false)), false, AT);
        assert_eq!(doubt.flipped(Some(cause(false, false)), false, AT + QUIET_WITHIN), Outcome::Rescan(why()));
        assert_eq!(doubt.flipped(None, false, AT + QUIET_WITHIN), Outcome::Trusted);
    }

    #[test]
    fn marks_that_may_be_missing_end_in_a_rescan_also_when_it_is_quiet() {
        let mut doubt = Doubt::default();
        doubt.flipped(Some(cause(true, false)), false, AT);
        doubt.flipped(Some(cause(false, false)), false, AT);
        assert_eq!(doubt.flipped(None, true, AT), Outcome::Rescan(why()));
    }

    #[test]
    fn a_cause_that_persists_keeps_flips_void_and_ends_in_a_rescan() {
        let mut doubt = Doubt::default();
        let at = |seconds| AT + Duration::from_secs(seconds);
        assert_eq!(doubt.flipped(Some(cause(false, true)), true, at(0)), Outcome::Void(why()));
        assert_eq!(doubt.flipped(Some(cause(false, true)), true, at(30)), Outcome::RescanVoid(why()));
        assert_eq!(doubt.flipped(Some(cause(false, true)), true, at(31)), Outcome::Void(why()));
        assert_eq!(doubt.flipped(None, false, at(32)), Outcome::Rescan(why()));
        assert_eq!(doubt.flipped(None, false, at(33)), Outcome::Trusted);
    }
}
