//! Part of the target: serve.
