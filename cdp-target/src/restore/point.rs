//! Part of the target: restore/point.
