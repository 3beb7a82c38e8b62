//! What the listener refused and why, logged at a bounded rate; and the gate that bounds handshakes.

use cdp_seams::clock::Clock;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A cause logs one line in so much time.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Why a connection was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No client certificate, or one that is not our authority's, expired, or for another use.
    Certificate,
    /// A certificate of ours that is not in the registry.
    Unknown,
    /// A revoked certificate.
    Revoked,
    /// A protocol that is not ours, or bytes that do not follow it.
    Protocol,
    /// A handshake or join that failed or was broken off.
    Handshake,
    /// A handshake or join that took too long.
    Timeout,
    /// A join that was answered with no.
    Join,
    /// As many as there may be at a time.
    Busy,
    /// We failed.
    Failed,
}

impl Refusal {
    /// All of them, as they are counted.
    pub const ALL: [Self; 9] = [
        Self::Certificate,
        Self::Unknown,
        Self::Revoked,
        Self::Protocol,
        Self::Handshake,
        Self::Timeout,
        Self::Join,
        Self::Busy,
        Self::Failed,
    ];

    /// The cause as a metric's label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Certificate => "certificate",
            Self::Unknown => "unknown",
            Self::Revoked => "revoked",
            Self::Protocol => "protocol",
            Self::Handshake => "handshake",
            Self::Timeout => "timeout",
            Self::Join => "join",
            Self::Busy => "busy",
            Self::Failed => "failed",
        }
    }
}

#[derive(Default)]
struct Counter {
    count: AtomicU64,
    /// When the cause was last logged, and how often it was counted by then.
    logged: Mutex<Option<(Duration, u64)>>,
}

/// Refusals by cause.
pub(super) struct Counters {
    clock: Arc<dyn Clock>,
    causes: [Counter; Refusal::ALL.len()],
}

impl Counters {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, causes: Default::default() }
    }

    pub(super) fn refused(&self, cause: Refusal) -> u64 {
        self.causes[cause as usize].count.load(Ordering::Relaxed)
    }

    /// Counts a refusal, and logs it unless one of its cause was logged a moment ago.
    pub(super) fn count(&self, cause: Refusal, peer: SocketAddr, detail: &str) {
        let counter = &self.causes[cause as usize];
        let count = counter.count.fetch_add(1, Ordering::Relaxed) + 1;
        let now = self.clock.monotonic();
        let mut logged = counter.logged.lock().unwrap_or_else(PoisonError::into_inner);
        let unlogged = match *logged {
            Some((at, _)) if now.saturating_sub(at) < LOG_INTERVAL => return,
            Some((_, before)) => count.saturating_sub(before + 1),
            None => 0,
        };
        *logged = Some((now, count));
        drop(logged);
        tracing::warn!(%peer, cause = cause.label(), detail, unlogged, "connection refused");
    }

    pub(super) fn panicked(&self) {
        self.causes[Refusal::Failed as usize].count.fetch_add(1, Ordering::Relaxed);
        tracing::error!("the task of a connection panicked; the connection is closed, others go on");
    }
}

/// Bounds how many are inside, in all and from one address.
pub(super) struct Gate {
    inside_max: usize,
    per_address_max: usize,
    inside: AtomicUsize,
    addresses: Mutex<HashMap<IpAddr, usize>>,
}

/// A place inside, given back when it is dropped.
pub(super) struct Place {
    gate: Arc<Gate>,
    address: IpAddr,
}

impl Gate {
    pub(super) fn new(inside_max: usize, per_address_max: usize) -> Arc<Self> {
        Arc::new(Self { inside_max, per_address_max, inside: AtomicUsize::new(0), addresses: Mutex::default() })
    }

    pub(super) fn inside(&self) -> usize {
        self.inside.load(Ordering::Relaxed)
    }

    pub(super) fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        let from_address = addresses.get(&address).copied().unwrap_or(0);
        if self.inside() >= self.inside_max || from_address >= self.per_address_max {
            return None;
        }
        addresses.insert(address, from_address + 1);
        self.inside.fetch_add(1, Ordering::Relaxed);
        Some(Place { gate: Arc::clone(self), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut addresses = self.gate.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        self.gate.inside.fetch_sub(1, Ordering::Relaxed);
        match addresses.get_mut(&self.address) {
            Some(more) if *more > 1 => *more -= 1,
            _ => {
                addresses.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_seams::clock::SimClock;

    #[test]
    fn the_gate_bounds_all_and_each_address_and_forgets_who_left() {
        let gate = Gate::new(3, 2);
        let [one, other] = [IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2])];
        let first = gate.enter(one);
        let second = gate.enter(one);
        assert!(first.is_some() && second.is_some());
        assert!(gate.enter(one).is_none(), "two from one address");
        let third = gate.enter(other);
        assert!(third.is_some());
        assert!(gate.enter(other).is_none(), "three in all");
        drop((first, second, third));
        assert_eq!(gate.inside(), 0);
        assert!(gate.addresses.lock().unwrap().is_empty());
    }

    #[test]
    fn every_cause_has_its_own_counter() {
        let counters = Counters::new(Arc::new(SimClock::new(0)));
        let peer = SocketAddr::from(([192, 0, 2, 1], 7));
        for (times, cause) in Refusal::ALL.into_iter().enumerate() {
            (0..times).for_each(|_| counters.count(cause, peer, "test"));
        }
        for (times, cause) in Refusal::ALL.into_iter().enumerate() {
            assert_eq!(counters.refused(cause), times as u64, "{}", cause.label());
        }
    }
}
