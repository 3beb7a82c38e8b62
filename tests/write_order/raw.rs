//! The calls that have no safe wrapper: discards, a ring of writes, a mapping of a device.
//!
//! Invariant: a buffer that the kernel reads from belongs to its slot until the write's completion; a ring is drained before
//! its buffers go. Does not know what is written.

#![allow(unsafe_code, reason = "ioctl, io_uring and mmap of a device")]
#![allow(clippy::disallowed_methods, reason = "tests use real devices")]

use anyhow::{Context, Result, ensure};
use cdp_source::reader::aligned::AlignedBuffer;
use io_uring::{IoUring, opcode, types};
use memmap2::MmapMut;
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::ioctl::{Setter, ioctl, opcode as ioctl_opcode};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

const BLKDISCARD: u32 = ioctl_opcode::none(0x12, 119);
const BLKZEROOUT: u32 = ioctl_opcode::none(0x12, 127);

/// A device opened past the page cache.
pub(crate) struct RawDisk(OwnedFd);

impl RawDisk {
    pub(crate) fn open(node: &Path) -> Result<Self> {
        let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(node, flags, Mode::empty()).with_context(|| format!("open {}", node.display()))?))
    }

    /// Returns when the device has said that it is done.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let written = rustix::io::pwrite(&self.0, bytes, offset).with_context(|| format!("write at {offset}"))?;
        ensure!(written == bytes.len(), "{written} of {} bytes written at {offset}", bytes.len());
        Ok(())
    }

    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let read = rustix::io::pread(&self.0, &mut *bytes, offset).with_context(|| format!("read at {offset}"))?;
        ensure!(read == bytes.len(), "{read} of {} bytes read at {offset}", bytes.len());
        Ok(())
    }

    /// `BLKDISCARD`; zeros written where the device has none.
    pub(crate) fn discard(&self, offset: u64, len: u64) -> Result<()> {
        // SAFETY: the call takes a pointer to two numbers of 64 bits, and only reads them.
        let call = unsafe { Setter::<BLKDISCARD, [u64; 2]>::new([offset, len]) };
        // SAFETY: as above; the descriptor is open.
        match unsafe { ioctl(&self.0, call) } {
            Err(rustix::io::Errno::OPNOTSUPP) => self.zero_out(offset, len),
            other => other.with_context(|| format!("discard {len} bytes at {offset}")),
        }
    }

    /// `BLKZEROOUT`.
    pub(crate) fn zero_out(&self, offset: u64, len: u64) -> Result<()> {
        // SAFETY: the call takes a pointer to two numbers of 64 bits, and only reads them.
        let call = unsafe { Setter::<BLKZEROOUT, [u64; 2]>::new([offset, len]) };
        // SAFETY: as above; the descriptor is open.
        unsafe { ioctl(&self.0, call) }.with_context(|| format!("zero {len} bytes at {offset}"))
    }

    /// `fallocate` that punches a hole; zeros written as ever where the device has no command for it (one that has failed
    /// once is not tried again).
    pub(crate) fn punch_hole(&self, offset: u64, len: u64) -> Result<()> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.0, mode, offset, len) {
            Err(rustix::io::Errno::OPNOTSUPP) => self.zero_out(offset, len),
            other => other.with_context(|| format!("punch {len} bytes at {offset}")),
        }
    }
}

/// Writes in flight, one a slot. The ring is declared, and so dropped, before the buffers.
pub(crate) struct WriteRing {
    ring: IoUring,
    slots: Vec<Slot>,
    disk: RawDisk,
}

struct Slot {
    buffer: AlignedBuffer,
    /// Bytes in flight.
    len: Option<usize>,
}

impl WriteRing {
    /// `slots` writes of at most `bytes_max` each.
    pub(crate) fn new(disk: RawDisk, slots: usize, bytes_max: usize) -> Result<Self> {
        let ring = IoUring::new(slots as u32).context("set up io_uring")?;
        let slots = (0..slots).map(|_| Slot { buffer: AlignedBuffer::new(bytes_max), len: None }).collect();
        Ok(Self { ring, slots, disk })
    }

    /// Starts a write of `len` bytes, which `fill` puts into an idle slot's buffer.
    pub(crate) fn start(&mut self, index: usize, offset: u64, len: usize, fill: impl FnOnce(&mut [u8])) -> Result<()> {
        let slot = &mut self.slots[index];
        assert!(slot.len.is_none(), "the slot is idle");
        fill(&mut slot.buffer[..len]);
        let address = slot.buffer.as_mut_ptr().cast_const();
        let write = opcode::Write::new(types::Fd(self.disk.0.as_raw_fd()), address, len as u32).offset(offset);
        slot.len = Some(len);
        // SAFETY: descriptor and buffer live until the completion, which the drop waits for; nobody touches the buffer
        // while `len` is set.
        let pushed = unsafe { self.ring.submission().push(&write.build().user_data(index as u64)) };
        pushed.context("the ring has an entry for every slot")
    }

    /// Whether anything is in flight.
    pub(crate) fn is_busy(&self) -> bool {
        self.slots.iter().any(|slot| slot.len.is_some())
    }

    /// Waits for one write at least and gives the slots that are idle again.
    pub(crate) fn wait(&mut self) -> Result<Vec<usize>> {
        match self.ring.submit_and_wait(1) {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => return Err(error.into()),
            _ => {}
        }
        let mut idle = Vec::new();
        let mut failure = None;
        for entry in self.ring.completion() {
            let index = entry.user_data() as usize;
            let len = self.slots[index].len.take().expect("a slot completes once for each start");
            if usize::try_from(entry.result()).ok() == Some(len) {
                idle.push(index);
            } else {
                failure = Some(entry.result());
            }
        }
        ensure!(failure.is_none(), "a write of the ring gave {failure:?}");
        Ok(idle)
    }
}

impl Drop for WriteRing {
    fn drop(&mut self) {
        while self.is_busy() {
            if self.ring.submit_and_wait(1).is_err() {
                // The kernel may still read from the buffers: they are never given back.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            for entry in self.ring.completion() {
                self.slots[entry.user_data() as usize].len = None;
            }
        }
    }
}

/// Maps `range` (bytes, whole pages) of a device for writing.
pub(crate) fn map(node: &Path, range: Range<u64>) -> Result<MmapMut> {
    let file = std::fs::File::options().read(true).write(true).open(node)?;
    let mut options = memmap2::MmapOptions::new();
    options.offset(range.start).len((range.end - range.start) as usize);
    // SAFETY: nobody else writes to these pages, and the device keeps its size while the test runs.
    unsafe { options.map_mut(&file) }.with_context(|| format!("map {}", node.display()))
}
