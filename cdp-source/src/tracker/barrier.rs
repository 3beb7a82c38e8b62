//! The straggler barrier: whether every run that may still mark a parity has left it.
//!
//! A run counts itself into `entries` of the active parity of its CPU, looks again which parity is active, marks, and counts
//! itself into `exits` (`enter` and `leave` in bpf/tracker.bpf.c). Whoever has flipped `active` may take the old parity's marks
//! once exits and entries agree, if all exits were read before all entries: a run that leaves in between cannot make up for one
//! that came in. Owns that order, for the mapped gates and for the model that is checked below. Does not wait.

/// The gates, as a flip looks at them.
pub(super) trait Gates {
    /// CPUs that may ever run a program.
    fn cpus(&self) -> usize;
    /// Runs that have left `parity` on `cpu`.
    fn exits(&self, cpu: usize, parity: usize) -> u64;
    /// Runs that have come into `parity` on `cpu`.
    fn entries(&self, cpu: usize, parity: usize) -> u64;
    /// What is read after it was not read before it, nor before what was stored before it was seen by all.
    fn full_barrier(&self);
}

/// Whether every run that was counted into `parity` has left it. To be asked after `active` was stored.
pub(super) fn is_passed(gates: &impl Gates, parity: usize) -> bool {
    let exits: Vec<u64> = (0..gates.cpus()).map(|cpu| gates.exits(cpu, parity)).collect();
    gates.full_barrier();
    (0..gates.cpus()).zip(exits).all(|(cpu, exits)| gates.entries(cpu, parity) == exits)
}

/// The protocol in loom, which tries every interleaving and every value that C11 lets a load return. (shuttle would run more
/// threads, but only in sequentially consistent orders: here the weak ones are the point.) loom takes atomics that are
/// sequentially consistent for acquire-release ones, and knows full barriers only as fences; so the program's fetching atomics,
/// full barriers in the kernel, are a fence, the atomic and a fence. The marks themselves are relaxed.
#[cfg(test)]
mod tests {
    use super::{Gates, is_passed};
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicU64, Ordering, fence};

    /// What breaks the protocol on purpose.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Defect {
        None,
        /// All entries are read before all exits.
        EntriesFirst,
        /// A run does not look again whether its parity is still the active one.
        NoSecondLook,
        /// A run counts itself out before it marks.
        LeavesFirst,
        /// The parity is drained without waiting for anybody.
        NoBarrier,
        /// A run's counts are no barriers.
        RelaxedCounts,
    }

    struct Gate {
        entries: [AtomicU64; 2],
        exits: [AtomicU64; 2],
    }

    /// One word of marks a parity, a gate a CPU.
    struct Model {
        active: AtomicU64,
        gates: Vec<Gate>,
        dirty: [AtomicU64; 2],
        defect: Defect,
    }

    impl Gates for Model {
        fn cpus(&self) -> usize {
            self.gates.len()
        }

        fn exits(&self, cpu: usize, parity: usize) -> u64 {
            let gate = &self.gates[cpu];
            let counter = if self.defect == Defect::EntriesFirst { &gate.entries } else { &gate.exits };
            counter[parity].load(Ordering::Acquire)
        }

        fn entries(&self, cpu: usize, parity: usize) -> u64 {
            let gate = &self.gates[cpu];
            let counter = if self.defect == Defect::EntriesFirst { &gate.exits } else { &gate.entries };
            counter[parity].load(Ordering::Acquire)
        }

        fn full_barrier(&self) {
            fence(Ordering::SeqCst);
        }
    }

    impl Model {
        fn new(cpus: usize, defect: Defect) -> Arc<Self> {
            let pair = || [AtomicU64::new(0), AtomicU64::new(0)];
            let gates = (0..cpus).map(|_| Gate { entries: pair(), exits: pair() }).collect();
            Arc::new(Self { active: AtomicU64::new(0), gates, dirty: pair(), defect })
        }

        fn count(&self, counter: &AtomicU64) {
            if self.defect == Defect::RelaxedCounts {
                counter.fetch_add(1, Ordering::Relaxed);
                return;
            }
            fence(Ordering::SeqCst);
            counter.fetch_add(1, Ordering::AcqRel);
            fence(Ordering::SeqCst);
        }

        /// A run of a program on `cpu`: `enter`, `mark_range` and `leave` of bpf/tracker.bpf.c, with two attempts.
        fn run(&self, cpu: usize, mark: u64) {
            let gate = &self.gates[cpu];
            let parities = self.enter(gate);
            if self.defect == Defect::LeavesFirst {
                self.leave(gate, &parities);
            }
            for parity in &parities {
                self.dirty[*parity].fetch_or(mark, Ordering::Relaxed);
            }
            if self.defect != Defect::LeavesFirst {
                self.leave(gate, &parities);
            }
        }

        fn leave(&self, gate: &Gate, parities: &[usize]) {
            for parity in parities {
                self.count(&gate.exits[*parity]);
            }
        }

        fn enter(&self, gate: &Gate) -> Vec<usize> {
            let active = || self.active.load(Ordering::Relaxed) as usize;
            for _ in 0..2 {
                let parity = active();
                self.count(&gate.entries[parity]);
                if self.defect == Defect::NoSecondLook || active() == parity {
                    return vec![parity];
                }
                self.count(&gate.exits[parity]);
            }
            self.count(&gate.entries[0]);
            self.count(&gate.entries[1]);
            vec![0, 1]
        }

        /// `set_active`, as `flip` in ebpf.rs calls it, and one look whether the barrier is passed; drains only then.
        fn flip(&self) -> Option<u64> {
            self.active.store(1, Ordering::SeqCst);
            if self.defect == Defect::NoBarrier || is_passed(self, 0) {
                // Each word is taken with an atomic swap.
                return Some(self.dirty[0].swap(0, Ordering::AcqRel));
            }
            None
        }
    }

    /// Runs on each of `cpus` while one flip drains the old parity. Nothing may be marked in it afterwards: such a mark would
    /// wait for the flip after the next, while its write is already on the disk.
    fn check(cpus: usize, runs_each: u64, defect: Defect) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(move || {
            let model = Model::new(cpus, defect);
            let threads: Vec<_> = (0..cpus)
                .map(|cpu| {
                    let model = Arc::clone(&model);
                    let run = move |number| model.run(cpu, 1_u64 << (cpu as u64 * runs_each + number));
                    loom::thread::spawn(move || (0..runs_each).for_each(run))
                })
                .collect();
            let drained = model.flip();
            for thread in threads {
                thread.join().expect("a run does not panic");
            }
            let (old, new) = (model.dirty[0].load(Ordering::Acquire), model.dirty[1].load(Ordering::Acquire));
            if let Some(drained) = drained {
                assert_eq!(old, 0, "marked in the old parity after it was drained");
                assert_eq!(drained | new, (1 << (cpus as u64 * runs_each)) - 1, "a mark is gone");
            }
        });
    }

    fn is_caught(cpus: usize, runs_each: u64, defect: Defect) {
        let outcome = std::panic::catch_unwind(|| check(cpus, runs_each, defect));
        let panic = outcome.expect_err("the defect passes the model");
        let text = panic.downcast_ref::<String>().expect("an assertion with a text");
        assert!(text.contains("was drained") || text.contains("a mark is gone"), "{defect:?}: {text}");
    }

    #[test]
    fn nothing_is_marked_in_a_parity_that_was_drained() {
        check(1, 2, Defect::None);
        check(2, 1, Defect::None);
    }

    #[test]
    fn loads_in_the_wrong_order_are_caught() {
        is_caught(1, 2, Defect::EntriesFirst);
    }

    #[test]
    fn every_other_step_is_needed() {
        for defect in [Defect::NoSecondLook, Defect::LeavesFirst, Defect::NoBarrier, Defect::RelaxedCounts] {
            is_caught(1, 2, defect);
        }
    }
}
