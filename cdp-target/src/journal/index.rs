//! Part of the target: journal/index.
