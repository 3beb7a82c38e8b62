//! Part of the target: authority.
