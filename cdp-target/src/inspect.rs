//! Part of the target: inspect.
