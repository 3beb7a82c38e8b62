//! What can be broken on purpose, to show that the oracle sees it.

use cdp_source::tracker::TrackerError;
use cdp_source::tracker::ebpf::{EbpfOptions, EbpfTracker};

/// One defect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sabotage {
    /// The product as it is.
    None,
    /// What was read is believed, whatever was issued meanwhile.
    NoValidation,
}

impl Sabotage {
    /// A tracker with this defect.
    pub(crate) fn open(self, options: &EbpfOptions) -> Result<EbpfTracker, TrackerError> {
        EbpfTracker::open(options)
    }

    /// Whether a cut asks which blocks are conflicted.
    pub(crate) fn validates(self) -> bool {
        self != Self::NoValidation
    }
}
