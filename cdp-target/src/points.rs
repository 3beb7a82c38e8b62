//! Part of the target: points.
