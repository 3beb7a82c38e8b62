//! Part of the target: config.
