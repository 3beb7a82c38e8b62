//! Whether the threads that do the work go on: what the watchdog of the service manager is told by.
//!
//! A thread that enters owes a beat now and then: one comes with every call of the storage seam and every block that is read, so
//! that long work shows as going on and a disk that does not answer does not. While it waits for something to do it rests, and owes none.
//! Owns the list of this process's threads. Ends none: who does not see a beat decides that.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

static THREADS: Mutex<Threads> = Mutex::new(Threads { next: 0, entered: BTreeMap::new() });

thread_local! {
    static OWN: RefCell<Option<Arc<Thread>>> = const { RefCell::new(None) };
}

struct Threads {
    next: u64,
    entered: BTreeMap<u64, Arc<Thread>>,
}

struct Thread {
    name: String,
    beats: AtomicU64,
    rests: AtomicBool,
}

/// Ends what the thread owes when it is dropped, on that thread.
pub struct Entered(u64);

fn threads() -> MutexGuard<'static, Threads> {
    THREADS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From here on this thread owes beats, under this name.
#[must_use]
pub fn enter(name: &str) -> Entered {
    let thread = Arc::new(Thread { name: name.to_owned(), beats: AtomicU64::new(0), rests: AtomicBool::new(false) });
    OWN.set(Some(Arc::clone(&thread)));
    let mut threads = threads();
    let id = threads.next;
    threads.next += 1;
    threads.entered.insert(id, thread);
    Entered(id)
}

impl Drop for Entered {
    fn drop(&mut self) {
        OWN.set(None);
        threads().entered.remove(&self.0);
    }
}

/// This thread goes on. Nothing for one that has not entered.
pub fn beat() {
    OWN.with_borrow(|own| {
        if let Some(thread) = own {
            thread.rests.store(false, Ordering::Relaxed);
            thread.beats.fetch_add(1, Ordering::Relaxed);
        }
    });
}

/// This thread waits for something to do, and owes nothing until its next beat.
pub fn rest() {
    OWN.with_borrow(|own| {
        if let Some(thread) = own {
            thread.rests.store(true, Ordering::Relaxed);
        }
    });
}

/// Looks at the threads from time to time.
pub struct Watch {
    limit: Duration,
    /// Beats of each thread, and since when there were so many.
    seen: BTreeMap<u64, (u64, Duration)>,
}

impl Watch {
    /// Takes a thread for stuck that has not had a beat for `limit`.
    #[must_use]
    pub const fn new(limit: Duration) -> Self {
        Self { limit, seen: BTreeMap::new() }
    }

    /// The name of a thread that is stuck at this time; `None` where all go on or rest.
    pub fn stuck(&mut self, now: Duration) -> Option<String> {
        let entered = threads().entered.clone();
        self.seen.retain(|id, _| entered.contains_key(id));
        let mut stuck = None;
        for (id, thread) in &entered {
            let beats = thread.beats.load(Ordering::Relaxed);
            let seen = self.seen.entry(*id).or_insert((beats, now));
            if seen.0 != beats || thread.rests.load(Ordering::Relaxed) {
                *seen = (beats, now);
            }
            if now.saturating_sub(seen.1) >= self.limit {
                stuck = Some(thread.name.clone());
            }
        }
        stuck
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_thread_is_stuck_that_neither_beats_nor_rests_nor_has_ended() {
        let (orders, taken) = channel::<fn()>();
        let (done, is_done) = channel();
        let worker = std::thread::spawn(move || {
            let _entered = enter("worker of the pulse's test");
            done.send(()).expect("somebody waits");
            for order in taken {
                order();
                done.send(()).expect("somebody waits");
            }
        });
        let order = |order: fn()| {
            orders.send(order).expect("it runs");
            is_done.recv().expect("it does it");
        };
        is_done.recv().expect("it begins");
        let mut watch = Watch::new(Duration::from_secs(10));
        let mut stuck =
            |at: u64| watch.stuck(Duration::from_secs(at)).is_some_and(|name| name.contains("pulse's test"));
        assert!(!stuck(0) && !stuck(9) && stuck(10), "no beat for ten seconds");
        order(beat);
        assert!(!stuck(11) && !stuck(20) && stuck(21));
        order(rest);
        assert!(!stuck(22) && !stuck(1000), "it has nothing to do");
        order(beat);
        assert!(!stuck(1001) && stuck(1011), "it has, and does not get on");
        drop(orders);
        worker.join().expect("no panic");
        assert!(!stuck(2000), "it has ended");
    }
}
