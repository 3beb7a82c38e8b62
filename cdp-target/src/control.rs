//! Part of the target: control.
