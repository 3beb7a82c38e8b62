//! The mapped change record.
