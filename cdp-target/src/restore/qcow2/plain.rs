//! A qcow2 image of clusters as they are, written in the order of the file.
//!
//! Invariant: rising offsets of the disk are rising offsets of the file, without gaps: it may go into a pipe. What the plan has no
//! cluster for is zeros, and nothing is written for it.

use super::CLUSTER_BYTES;
use super::plan::Plan;
use crate::restore::output::Output;
use std::io;

/// An image over the file, the device or the pipe that it goes to.
pub(crate) struct PlainQcow2 {
    inner: Box<dyn Output>,
    plan: Plan,
}

impl PlainQcow2 {
    /// An image of that layout.
    pub(crate) const fn new(inner: Box<dyn Output>, plan: Plan) -> Self {
        Self { inner, plan }
    }

    /// Where the disk's bytes from `offset` on are in the file, as far as their cluster goes, of `len` bytes; and how many that are.
    fn part(&self, offset: u64, len: u64) -> (Option<u64>, u64) {
        let within = offset % CLUSTER_BYTES;
        let at = self.plan.offset_of(offset / CLUSTER_BYTES).map(|at| at + within);
        (at, len.min(CLUSTER_BYTES - within))
    }
}

impl Output for PlainQcow2 {
    fn cut(&mut self, offset: u64) -> io::Result<()> {
        self.inner.cut(self.plan.offset_behind(offset))
    }

    fn begin(&mut self) -> io::Result<()> {
        let Self { inner, plan } = self;
        plan.front(&mut |offset, bytes| inner.write(offset, bytes))
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let (at, len) = self.part(offset + done as u64, (bytes.len() - done) as u64);
            let at = at.ok_or_else(|| io::Error::other("content where the point's index has none"))?;
            self.inner.write(at, &bytes[done..done + len as usize])?;
            done += len as usize;
        }
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let (at, len) = self.part(offset + done, len - done);
            if let Some(at) = at {
                self.inner.zero(at, len)?;
            }
            done += len;
        }
        Ok(())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let (at, len) = self.part(offset + done as u64, (buffer.len() - done) as u64);
            let part = &mut buffer[done..done + len as usize];
            match at {
                Some(at) => self.inner.read_at(at, part)?,
                None => part.fill(0),
            }
            done += len as usize;
        }
        Ok(())
    }

    fn read_file_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(offset, buffer)
    }

    fn file_bytes(&self) -> u64 {
        self.plan.file_bytes()
    }

    fn sync(&mut self) -> io::Result<()> {
        // The last cluster may go beyond the disk's end.
        let size = self.plan.size_bytes();
        self.zero(size, size.next_multiple_of(CLUSTER_BYTES) - size)?;
        self.inner.sync()
    }

    fn publish(self: Box<Self>) -> io::Result<()> {
        self.inner.publish()
    }

    fn keep(&mut self) {
        self.inner.keep();
    }
}
