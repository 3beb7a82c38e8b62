//! Part of the target: listener.
