//! Part of the target: restore/image.
