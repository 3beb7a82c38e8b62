//! A target's end of a group's session.
