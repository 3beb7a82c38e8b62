//! The line: one connection between a source and a target, as messages and frames see it.
