//! Where a volume's bytes are: a window of a node, and what one read of it has to ask for.
//!
//! Owns the arithmetic between blocks of a volume and bytes of its node: alignment, the last block that is not whole, short
//! reads. Sizes are checked when the node is opened; whether it is still the same node later is the tracker's business.

use super::READ_BLOCKS_MAX;
use super::aligned::AlignedBuffer;
use cdp_protocol::units::{BLOCK_BYTES, Extent, SECTOR_BYTES, blocks_in};
use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// A volume as it is to be read: for a partition, a window of its whole disk's node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadTarget {
    /// The device node or the image file.
    pub node: PathBuf,
    /// Where the volume starts in it, a multiple of 512.
    pub offset_bytes: u64,
    /// The volume's size.
    pub size_bytes: u64,
}

/// Why a volume cannot be opened for reading.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A system call failed.
    #[error("{step} {}", node.display())]
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        node: PathBuf,
        /// What came back.
        #[source]
        source: io::Error,
    },
    /// Neither a block device nor a regular file.
    #[error("{} is neither a block device nor a regular file", .0.display())]
    Kind(PathBuf),
    /// The window does not start at a sector.
    #[error("{}: offset_bytes={offset_bytes} is not a multiple of 512", node.display())]
    Offset {
        /// The node.
        node: PathBuf,
        /// Where the window starts.
        offset_bytes: u64,
    },
    /// The node ends before the window does.
    #[error("{}: {len_bytes} bytes, {needed_bytes} needed", node.display())]
    Size {
        /// The node.
        node: PathBuf,
        /// Bytes it has.
        len_bytes: u64,
        /// Bytes the window needs.
        needed_bytes: u64,
    },
    /// It cannot be read with `O_DIRECT`.
    #[error("{} cannot be read with O_DIRECT", .0.display())]
    Direct(PathBuf),
    /// The kernel has no `io_uring` to give.
    #[error("set up io_uring")]
    Uring(#[source] io::Error),
}

/// Whether reads may go through the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caching {
    /// Never.
    Direct,
    /// For regular files whose file system has no `O_DIRECT`.
    FilesIfNeedBe,
}

/// An opened target.
#[derive(Debug)]
pub(super) struct TargetFile {
    pub(super) file: OwnedFd,
    pub(super) window: Window,
    pub(super) is_direct: bool,
}

/// The window of a volume in its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::struct_field_names, reason = "the unit is part of a name")]
pub(super) struct Window {
    pub(super) offset_bytes: u64,
    pub(super) size_bytes: u64,
    /// What lengths and positions are multiples of: 512 on a device, 4096 in a file read directly, 1 in a cached one.
    pub(super) granule_bytes: u64,
}

/// One read as the node sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// Position in the node.
    pub(super) offset: u64,
    /// Bytes of the volume: fewer than `whole` only where the volume ends within its last block.
    pub(super) wanted: usize,
    /// Bytes to ask for: `wanted`, rounded up to the granule.
    pub(super) asked: usize,
    /// Bytes of the extent.
    pub(super) whole: usize,
}

/// What follows a read that returned some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// All there.
    Complete,
    /// Read on from here.
    From(usize),
}

impl TargetFile {
    pub(super) fn open(target: &ReadTarget, caching: Caching) -> Result<Self, OpenError> {
        let node = &target.node;
        if !target.offset_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(OpenError::Offset { node: node.clone(), offset_bytes: target.offset_bytes });
        }
        let plain = open_node(node, OFlags::empty()).map_err(|errno| failed("open", node, errno))?;
        let stat = rustix::fs::fstat(&plain).map_err(|errno| failed("look at", node, errno))?;
        let is_file = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => true,
            FileType::BlockDevice => false,
            _ => return Err(OpenError::Kind(node.clone())),
        };
        let len_bytes = rustix::fs::seek(&plain, SeekFrom::End(0)).map_err(|errno| failed("measure", node, errno))?;
        let needed_bytes = target.offset_bytes.saturating_add(target.size_bytes);
        if len_bytes < needed_bytes {
            return Err(OpenError::Size { node: node.clone(), len_bytes, needed_bytes });
        }
        let granule_bytes = if is_file { BLOCK_BYTES as u64 } else { SECTOR_BYTES };
        let window = Window { offset_bytes: target.offset_bytes, size_bytes: target.size_bytes, granule_bytes };
        match open_direct(node, window)? {
            Some(file) => Ok(Self { file, window, is_direct: true }),
            None if is_file && caching == Caching::FilesIfNeedBe => {
                Ok(Self { file: plain, window: Window { granule_bytes: 1, ..window }, is_direct: false })
            }
            None => Err(OpenError::Direct(node.clone())),
        }
    }
}

/// Opens with `O_DIRECT` and tries one read, since some file systems refuse only then.
fn open_direct(node: &Path, window: Window) -> Result<Option<OwnedFd>, OpenError> {
    let file = match open_node(node, OFlags::DIRECT) {
        Ok(file) => file,
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(None),
        Err(errno) => return Err(failed("open", node, errno)),
    };
    let mut buffer = AlignedBuffer::new(BLOCK_BYTES);
    let len = BLOCK_BYTES.min(window.size_bytes.next_multiple_of(window.granule_bytes) as usize);
    match rustix::io::pread(&file, &mut buffer[..len], window.offset_bytes) {
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(None),
        // Any other error is one of this block; reading it for good will tell.
        _ => Ok(Some(file)),
    }
}

fn open_node(node: &Path, extra: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(node, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | extra, Mode::empty())
}

fn failed(step: &'static str, node: &Path, errno: Errno) -> OpenError {
    OpenError::Io { step, node: node.to_owned(), source: errno.into() }
}

impl Window {
    /// What a read of `extent` has to ask for.
    pub(super) fn span(&self, extent: Extent) -> io::Result<Span> {
        let is_within = extent.end() <= blocks_in(self.size_bytes);
        if !is_within || extent.count > READ_BLOCKS_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let wanted = extent.to_bytes().min(self.size_bytes - extent.start.to_bytes());
        Ok(Span {
            offset: self.offset_bytes + extent.start.to_bytes(),
            wanted: wanted as usize,
            asked: wanted.next_multiple_of(self.granule_bytes) as usize,
            whole: extent.to_bytes() as usize,
        })
    }

    /// What follows when `got` bytes came back for a read that had `done` before.
    pub(super) fn progress(&self, span: Span, done: usize, got: usize) -> io::Result<Progress> {
        let reached = done + got;
        if reached >= span.wanted {
            return Ok(Progress::Complete);
        }
        let from = reached - reached % self.granule_bytes as usize;
        if from > done { Ok(Progress::From(from)) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_protocol::units::Block;

    #[test]
    fn the_last_block_is_read_as_far_as_it_exists() {
        let window = Window { offset_bytes: 63 * 512, size_bytes: 2 * 4096 + 1024, granule_bytes: 512 };
        let span = window.span(Extent { start: Block(1), count: 2 }).expect("within");
        assert_eq!(span, Span { offset: 63 * 512 + 4096, wanted: 5120, asked: 5120, whole: 8192 });
        assert!(window.span(Extent { start: Block(2), count: 2 }).is_err());
        let odd = Window { size_bytes: 1000, granule_bytes: 4096, offset_bytes: 0 };
        let span = odd.span(Extent { start: Block(0), count: 1 }).expect("within");
        assert_eq!((span.wanted, span.asked), (1000, 4096));
    }

    #[test]
    fn a_short_read_goes_on_at_its_last_whole_granule() {
        let window = Window { offset_bytes: 0, size_bytes: 8192, granule_bytes: 512 };
        let span = window.span(Extent { start: Block(0), count: 2 }).expect("within");
        assert_eq!(window.progress(span, 0, 1300).expect("progress"), Progress::From(1024));
        assert_eq!(window.progress(span, 1024, 7168).expect("progress"), Progress::Complete);
        assert!(window.progress(span, 1024, 100).is_err());
        assert!(window.progress(span, 0, 0).is_err());
    }
}
