//! The death of a simulated agent: at one of its calls into the world it unwinds, as a killed process stops.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU64, Ordering};

/// What an agent unwinds with that was to die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Died;

/// Counts an agent's calls into its world, and ends it at one of them.
#[derive(Debug)]
pub struct Mortality {
    calls_left: AtomicU64,
}

impl Default for Mortality {
    fn default() -> Self {
        Self { calls_left: u64::MAX.into() }
    }
}

impl Mortality {
    /// Lets the agent die at its call number `calls` from now (the next one is 0).
    pub fn die_in(&self, calls: u64) {
        self.calls_left.store(calls, Ordering::SeqCst);
    }

    /// Lets it live.
    pub fn spare(&self) {
        self.calls_left.store(u64::MAX, Ordering::SeqCst);
    }

    /// A call of the agent. Does not return where it is the one to die at.
    pub fn call(&self) {
        let left = self.calls_left.load(Ordering::SeqCst);
        if left == 0 {
            // Without the panic hook: nobody has to be told.
            resume_unwind(Box::new(Died));
        }
        if left != u64::MAX {
            self.calls_left.store(left - 1, Ordering::SeqCst);
        }
    }
}
