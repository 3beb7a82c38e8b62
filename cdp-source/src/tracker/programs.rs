//! The tracker's compiled programs, and, for tests, the ways of being wrong on purpose.
//!
//! Owns which object is loaded. Without the feature `sabotage` there is one object and nothing to choose: a build that
//! protects anything cannot be wrong this way. Does not load it.

static PLAIN: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tracker.bpf.o"));

/// Which programs run, and what user space leaves out.
#[derive(Clone, Copy)]
pub(super) struct Programs {
    pub(super) object: &'static [u8],
    /// A flip does not wait for runs of the old parity, nor look for what they left there.
    pub(super) skips_barrier: bool,
    /// No block is ever conflicted.
    pub(super) skips_validation: bool,
    /// What the counts say is not listened to.
    pub(super) skips_sums: bool,
}

impl Programs {
    /// As they are meant to be.
    pub(super) const PLAIN: Self =
        Self { object: PLAIN, skips_barrier: false, skips_validation: false, skips_sums: false };

    /// The object's hash, as it stands in an identity.
    pub(super) fn hash(&self) -> String {
        blake3::hash(self.object).to_hex().to_string()
    }
}

/// A tracker that is wrong in one way, so that a test can show that it would notice.
#[cfg(feature = "sabotage")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// Completions mark nothing.
    IssueOnly,
    /// Issues mark nothing; completions mark `dirty`, and are what conflicts.
    CompletionOnly,
    /// One run in 64 is held up for half a millisecond before its marks. Not wrong: the barrier waits for it.
    HoldRuns,
    /// Runs are held up, and a flip does not wait for them.
    NoBarrier,
    /// No block is ever conflicted.
    NoValidation,
    /// One completion in a thousand is not seen.
    DropCompletions,
    /// The same, and what the counts say of it is not listened to.
    IgnoreSums,
    /// The kernel refuses the last program, after the others were attached.
    RefusedProgram,
}

#[cfg(feature = "sabotage")]
impl Sabotage {
    pub(super) fn programs(self) -> Programs {
        static ISSUE_ONLY: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tracker_issue_only.bpf.o"));
        static COMPLETION_ONLY: &[u8] =
            aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tracker_completion_only.bpf.o"));
        static DROP: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tracker_drop.bpf.o"));
        static HOLD: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tracker_hold.bpf.o"));
        static REFUSED: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tracker_refused.bpf.o"));
        let plain = Programs::PLAIN;
        match self {
            Self::IssueOnly => Programs { object: ISSUE_ONLY, ..plain },
            Self::CompletionOnly => Programs { object: COMPLETION_ONLY, ..plain },
            Self::HoldRuns => Programs { object: HOLD, ..plain },
            Self::NoBarrier => Programs { object: HOLD, skips_barrier: true, ..plain },
            Self::NoValidation => Programs { skips_validation: true, ..plain },
            Self::DropCompletions => Programs { object: DROP, ..plain },
            Self::IgnoreSums => Programs { object: DROP, skips_sums: true, ..plain },
            Self::RefusedProgram => Programs { object: REFUSED, ..plain },
        }
    }
}
