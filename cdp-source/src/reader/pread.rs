//! Reads through pread: one at a time, for image files on file systems without `O_DIRECT` and kernels without `io_uring`.
//!
//! `O_DIRECT` is tried first and always used for block devices; a cached read of an image file sees what its writers wrote
//! through the same page cache. EINTR and short reads go on at the rest.

use super::aligned::AlignedBuffer;
use super::target::{Caching, OpenError, Progress, ReadTarget, Span, TargetFile, Window};
use super::{BlockReader, READ_BLOCKS_MAX, ReadDone, ReadRequest};
use cdp_protocol::units::BLOCK_BYTES;
use cdp_seams::pulse;
use std::io;
use std::os::fd::OwnedFd;

/// Reads one request after the other.
pub struct PreadReader {
    volumes: Vec<PreadVolume>,
    buffer: AlignedBuffer,
}

struct PreadVolume {
    source: Box<dyn PositionedRead>,
    window: Window,
    is_direct: bool,
}

/// One `pread`: may be short, may be interrupted.
pub(super) trait PositionedRead: Send {
    fn pread(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
}

impl PositionedRead for OwnedFd {
    fn pread(&mut self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        Ok(rustix::io::pread(self, buffer, offset)?)
    }
}

impl PreadReader {
    /// Opens the volumes; their order is that of the requests' `volume`.
    ///
    /// # Errors
    /// Where a node cannot be opened, is too small, or is a device that cannot be read with `O_DIRECT`.
    pub fn open(targets: &[ReadTarget]) -> Result<Self, OpenError> {
        let open = |target| {
            let TargetFile { file, window, is_direct } = TargetFile::open(target, Caching::FilesIfNeedBe)?;
            Ok(PreadVolume { source: Box::new(file), window, is_direct })
        };
        Ok(Self::over(targets.iter().map(open).collect::<Result<_, OpenError>>()?))
    }

    /// Whether every volume is read with `O_DIRECT`.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.volumes.iter().all(|volume| volume.is_direct)
    }

    fn over(volumes: Vec<PreadVolume>) -> Self {
        Self { volumes, buffer: AlignedBuffer::new(READ_BLOCKS_MAX as usize * BLOCK_BYTES) }
    }

    #[cfg(test)]
    pub(super) fn over_source(source: Box<dyn PositionedRead>, window: Window) -> Self {
        Self::over(vec![PreadVolume { source, window, is_direct: false }])
    }
}

impl BlockReader for PreadReader {
    fn read(&mut self, requests: &[ReadRequest], done: &mut ReadDone<'_>) -> io::Result<()> {
        for (index, request) in requests.iter().enumerate() {
            let volume = &mut self.volumes[request.volume];
            let result = volume.window.span(request.extent).and_then(|span| volume.fill(span, &mut self.buffer));
            pulse::beat();
            done(index, result.map(|whole| &self.buffer[..whole]));
        }
        Ok(())
    }
}

impl PreadVolume {
    /// Reads all of `span` into the start of `buffer`; gives the bytes of its extent.
    fn fill(&mut self, span: Span, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        loop {
            let got = match self.source.pread(&mut buffer[done..span.asked], span.offset + done as u64) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            match self.window.progress(span, done, got)? {
                Progress::From(from) => done = from,
                Progress::Complete => break,
            }
        }
        buffer[span.wanted..span.whole].fill(0);
        Ok(span.whole)
    }
}
