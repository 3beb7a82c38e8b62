//! Part of the target: verify.
