//! Has the kernel read a disk's partition table again: `BLKRRPART` (linux/fs.h).

#![allow(unsafe_code, reason = "the call has no safe wrapper")]

use rustix::io::Errno;
use rustix::ioctl::{NoArg, ioctl, opcode};
use std::os::fd::AsFd;

const BLKRRPART: u32 = opcode::none(0x12, 95);

/// Reads it again.
pub(super) fn read_again(disk: &impl AsFd) -> Result<(), Errno> {
    // SAFETY: the call takes no argument (block/ioctl.c, `blkdev_common_ioctl`).
    let call = unsafe { NoArg::<BLKRRPART>::new() };
    // SAFETY: it reads and writes no memory of this process.
    unsafe { ioctl(disk, call) }
}
