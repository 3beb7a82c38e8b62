//! Part of the target: store.
