//! An errand: something that another thread is to do once, while its caller waits for the answer.
//!
//! Invariant: an errand that its caller has given up never runs, and the caller of one that runs waits for its answer, however
//! long that takes. So what was refused for want of time is not done later, behind the back of whoever went on without it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

const WAITING: u8 = 0;
const RUNNING: u8 = 1;
const GIVEN_UP: u8 = 2;

/// The caller's end of an errand.
pub(crate) struct Errand<T> {
    state: Arc<AtomicU8>,
    answer: mpsc::Receiver<T>,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoAnswer {
    /// The thread did not get to it in time; it will not be done.
    #[error("the group's thread is busy: nothing was done")]
    GivenUp,
    /// The thread dropped it, or ended in it.
    #[error("the group's thread ended")]
    Ended,
}

/// The end of the thread that does it.
pub(crate) struct Task<T> {
    state: Arc<AtomicU8>,
    answered: mpsc::SyncSender<T>,
}

/// The two ends of an errand.
pub(crate) fn errand<T>() -> (Task<T>, Errand<T>) {
    let state = Arc::new(AtomicU8::new(WAITING));
    let (answered, answer) = mpsc::sync_channel(1);
    (Task { state: Arc::clone(&state), answered }, Errand { state, answer })
}

impl<T> Task<T> {
    /// Does the work, unless it was given up.
    pub(crate) fn run(self, work: impl FnOnce() -> T) {
        if step(&self.state, RUNNING) {
            // The caller may have ended in a panic.
            let _ = self.answered.send(work());
        }
    }
}

/// Leaves the state of waiting; `false` where that was left before.
fn step(state: &AtomicU8, next: u8) -> bool {
    state.compare_exchange(WAITING, next, Ordering::AcqRel, Ordering::Acquire).is_ok()
}

impl<T> Errand<T> {
    /// Waits for the answer: as long as `patience` for the work to begin, then until it ends.
    ///
    /// # Errors
    /// Where it did not begin, and now never does, or the thread ended.
    pub(crate) fn wait(self, patience: Duration) -> Result<T, NoAnswer> {
        match self.answer.recv_timeout(patience) {
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Timeout) if step(&self.state, GIVEN_UP) => Err(NoAnswer::GivenUp),
            Err(RecvTimeoutError::Timeout) => self.answer.recv().map_err(|_| NoAnswer::Ended),
            Err(RecvTimeoutError::Disconnected) => Err(NoAnswer::Ended),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn what_was_given_up_never_runs() {
        let (task, errand) = errand();
        assert_eq!(errand.wait(Duration::ZERO), Err(NoAnswer::GivenUp));
        let mut runs = 0;
        task.run(|| runs += 1);
        assert_eq!(runs, 0, "its caller went on without it");
    }

    #[test]
    fn what_has_begun_is_waited_for() {
        let (begun, has_begun) = mpsc::channel();
        let (go_on, goes_on) = mpsc::channel();
        let (task, errand) = errand();
        let work = move || {
            begun.send(()).expect("somebody waits");
            goes_on.recv().expect("somebody lets it go on");
            8
        };
        std::thread::scope(|threads| {
            threads.spawn(|| task.run(work));
            has_begun.recv_timeout(LONG).expect("it begins");
            assert!(!step(&errand.state, GIVEN_UP), "it cannot be given up any more");
            let answer = threads.spawn(|| errand.wait(Duration::ZERO));
            go_on.send(()).expect("it waits");
            assert_eq!(answer.join().expect("no panic"), Ok(8));
        });
    }

    #[test]
    fn an_answer_in_time_is_given_and_a_thread_that_ended_is_told_apart() {
        let (task, asked) = errand();
        task.run(|| 8);
        assert_eq!(asked.wait(LONG), Ok(8));
        let (task, asked) = errand::<u8>();
        drop(task);
        assert_eq!(asked.wait(LONG), Err(NoAnswer::Ended));
    }
}
