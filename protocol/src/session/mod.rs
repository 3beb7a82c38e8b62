//! The two ends of a group's session, as state machines without I/O.
//!
//! * `chain`: what frames may follow which; the target's receiver and the journal's recovery both walk it.
//! * `lineage`: which points a source may stand at and still be of the history that goes on.
//! * `memo`: what a source has to remember beyond its own death.
//! * `source`: what a source sends, and again after a broken line.
//! * `target`: what a target grants and answers.

pub mod chain;
pub mod lineage;
pub mod memo;
pub mod source;
pub mod target;

/// Acked points a source names when it opens a group.
pub const ACKED_MAX: usize = 16;
/// Commits a source has under way at once, sent and not acked.
pub const SENT_MAX: usize = 8;
/// Ends of parts a source names that it sent and heard no ack for: more than it has under way at once.
pub const PARTS_SENT_MAX: usize = 64;
