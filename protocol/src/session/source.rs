//! A source's end of a group's session.
