//! Part of the target: metrics.
