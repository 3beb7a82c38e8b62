//! Reads through io_uring.
