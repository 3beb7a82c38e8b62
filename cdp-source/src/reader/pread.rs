//! Reads through pread.
