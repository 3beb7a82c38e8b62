//! The agent: one capture thread a group, one runtime for the line.
