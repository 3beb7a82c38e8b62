//! The identity of a tracking.
