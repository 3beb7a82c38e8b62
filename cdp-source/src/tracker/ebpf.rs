//! The eBPF tracker.
