//! Part of the target: receiver.
