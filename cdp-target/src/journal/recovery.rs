//! Part of the target: journal/recovery.
