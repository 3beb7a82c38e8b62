//! Part of the target: journal/segment.
