//! Drives the sessions of all groups over the line, and reconnects.
