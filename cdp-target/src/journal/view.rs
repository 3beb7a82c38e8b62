//! Part of the target: journal/view.
