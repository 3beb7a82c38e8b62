//! The scan tracker.
