//! Helpers of the end-to-end benchmarks.
