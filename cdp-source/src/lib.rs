//! The branch office's end: tracks, cuts, reads, encodes and sends.

pub mod cut;
pub mod encoder;
pub mod reader;
pub mod tracker;
