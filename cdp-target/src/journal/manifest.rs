//! Part of the target: journal/manifest.
