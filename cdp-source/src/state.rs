//! The state folder of an office.
