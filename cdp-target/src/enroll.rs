//! Part of the target: enroll.
