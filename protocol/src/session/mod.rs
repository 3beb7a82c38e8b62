//! The two ends of a group's session, as state machines without I/O.
//!
//! * `chain`: what frames may follow which; the target's receiver and the journal's recovery both walk it.
//! * `source`: what a source sends, and again after a broken line.
//! * `target`: what a target grants and answers.

pub mod chain;
pub mod source;
pub mod target;
