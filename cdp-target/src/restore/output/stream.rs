//! A pipe, a terminal, standard output: everything in order, zeros too.

use super::{Output, for_each_zeros};
use std::fs::File;
use std::io::{self, Write};

/// A stream.
pub(super) struct StreamOutput(pub(super) File);

impl Output for StreamOutput {
    fn write(&mut self, _offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn zero(&mut self, _offset: u64, len: u64) -> io::Result<()> {
        for_each_zeros(len, |_, zeros| self.0.write_all(zeros))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.flush()
    }

    fn publish(self: Box<Self>) -> io::Result<()> {
        Ok(())
    }
}
