//! Where a file's content lies on its file system's device, as the file system tells by `FS_IOC_FIEMAP`
//! (include/uapi/linux/fiemap.h), without a sync.
//!
//! Gives only what holds content of this file alone, in place: an extent with any flag that is not known to leave that so
//! (delayed, encoded, inline, a tail, shared with another file) is left out.

#![allow(unsafe_code, reason = "an ioctl has no safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct fiemap` and `struct fiemap_extent`: their sizes, and where the fields stand that are used here.
const HEADER_BYTES: usize = 32;
const LENGTH: usize = 8;
const MAPPED: usize = 20;
const COUNT: usize = 24;
const EXTENT_BYTES: usize = 56;
const EXTENT_PHYSICAL: usize = 8;
const EXTENT_LENGTH: usize = 16;
const EXTENT_FLAGS: usize = 40;
const FLAG_LAST: u32 = 0x1;
const FLAG_SHARED: u32 = 0x2000;
/// Of an extent that is the file's own, in place: `LAST`, `UNWRITTEN`, `MERGED`.
const FLAGS_IN_PLACE: u32 = FLAG_LAST | 0x800 | 0x1000;
/// `_IOWR('f', 11, struct fiemap)`.
const FS_IOC_FIEMAP: u64 = 0xc000_660b | (HEADER_BYTES as u64) << 16;
/// `_IOR('X', 31, struct fsxattr)`; its first field are the flags.
const FS_IOC_FSGETXATTR: u64 = 0x801c_581f;
const FSXATTR_BYTES: usize = 28;
const XFLAG_REALTIME: u32 = 0x1;
/// Extents asked for at a time: 28 KiB of them.
const EXTENTS_AT_A_TIME: usize = 512;
/// Extents of a file beyond which it is not looked at any further.
const EXTENTS_MAX: usize = 1 << 16;

/// A piece of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where in the file it begins.
    pub(super) logical: u64,
    /// Where on the device.
    pub(super) physical: u64,
    /// Its bytes.
    pub(super) length: u64,
}

/// A file's pieces.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Pieces {
    pub(super) all: Vec<Piece>,
    /// Some of it is shared with another file.
    pub(super) is_shared: bool,
    /// There are more than are looked at.
    pub(super) is_cut_short: bool,
}

/// The pieces of a regular file.
pub(super) fn pieces(file: BorrowedFd<'_>) -> io::Result<Pieces> {
    let mut found = Pieces::default();
    let mut from = 0;
    loop {
        let mut answer = request(from);
        // SAFETY: the buffer has room for as many extents as its own `fm_extent_count` says, and the kernel writes within it.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as libc::Ioctl, answer.as_mut_ptr()) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        match read_answer(&answer, &mut found) {
            Some(next) if found.all.len() < EXTENTS_MAX && next > from => from = next,
            more => {
                found.is_cut_short = more.is_some();
                return Ok(found);
            }
        }
    }
}

/// Whether an XFS file lies on the file system's realtime device, not on the one that it is mounted from.
pub(super) fn is_realtime(file: BorrowedFd<'_>) -> io::Result<bool> {
    let mut answer = [0_u8; FSXATTR_BYTES];
    // SAFETY: the buffer is as long as the structure that the request's own number names.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FSGETXATTR as libc::Ioctl, answer.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(number32(&answer, 0) & XFLAG_REALTIME != 0)
}

fn request(from: u64) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES + EXTENTS_AT_A_TIME * EXTENT_BYTES];
    bytes[..LENGTH].copy_from_slice(&from.to_ne_bytes());
    bytes[LENGTH..LENGTH + 8].copy_from_slice(&(u64::MAX - from).to_ne_bytes());
    bytes[COUNT..COUNT + 4].copy_from_slice(&(EXTENTS_AT_A_TIME as u32).to_ne_bytes());
    bytes
}

/// Adds what an answer tells; gives where to ask on, `None` where that was all.
fn read_answer(answer: &[u8], found: &mut Pieces) -> Option<u64> {
    let mapped = (number32(answer, MAPPED) as usize).min(EXTENTS_AT_A_TIME);
    let (extents, _) = answer[HEADER_BYTES..].as_chunks::<EXTENT_BYTES>();
    let mut next = None;
    for extent in &extents[..mapped] {
        let (logical, flags) = (number64(extent, 0), number32(extent, EXTENT_FLAGS));
        let (physical, length) = (number64(extent, EXTENT_PHYSICAL), number64(extent, EXTENT_LENGTH));
        if flags & !FLAGS_IN_PLACE == 0 {
            found.all.push(Piece { logical, physical, length });
        }
        found.is_shared |= flags & FLAG_SHARED != 0;
        next = logical.checked_add(length).filter(|_| flags & FLAG_LAST == 0);
    }
    next
}

fn number64(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(*bytes[at..].first_chunk().expect("a field lies within its structure"))
}

fn number32(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(*bytes[at..].first_chunk().expect("a field lies within its structure"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::os::fd::AsFd as _;

    fn answer(extents: &[(u64, u64, u64, u32)]) -> Vec<u8> {
        let mut bytes = request(0);
        bytes[MAPPED..MAPPED + 4].copy_from_slice(&(extents.len() as u32).to_ne_bytes());
        for (at, (logical, physical, length, flags)) in extents.iter().enumerate() {
            let extent = &mut bytes[HEADER_BYTES + at * EXTENT_BYTES..];
            extent[..8].copy_from_slice(&logical.to_ne_bytes());
            extent[EXTENT_PHYSICAL..EXTENT_PHYSICAL + 8].copy_from_slice(&physical.to_ne_bytes());
            extent[EXTENT_LENGTH..EXTENT_LENGTH + 8].copy_from_slice(&length.to_ne_bytes());
            extent[EXTENT_FLAGS..EXTENT_FLAGS + 4].copy_from_slice(&flags.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn only_what_is_the_files_own_and_in_place_counts() {
        let mut found = Pieces::default();
        let flags = [0, 0x800, 0x1000, 0x2, 0x4, 0x8, 0x80, 0x100, 0x200, 0x400, 0x2000, 0x4000_0000];
        let extents: Vec<_> =
            flags.iter().zip(0..).map(|(flags, at)| (at * 4096, (100 + at) * 4096, 4096, *flags)).collect();
        assert_eq!(read_answer(&answer(&extents), &mut found), Some(12 * 4096));
        assert_eq!(found.all.iter().map(|piece| piece.physical / 4096).collect::<Vec<_>>(), [100, 101, 102]);
        assert!(found.is_shared);
        assert_eq!(read_answer(&answer(&[(0, 0, 4096, FLAG_LAST)]), &mut found), None);
        assert_eq!(read_answer(&answer(&[]), &mut found), None);
        assert_eq!(read_answer(&answer(&[(u64::MAX, 0, 1, 0)]), &mut found), None);
        assert_eq!(found.all.len(), 5);
    }

    #[test]
    fn a_files_pieces_are_as_long_as_the_file() {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&[7; 100_000]).and_then(|()| file.sync_all()).expect("written");
        // Not every file system that tests run on tells.
        if let Ok(found) = pieces(file.as_fd())
            && !found.all.is_empty()
        {
            assert!(found.all.iter().map(|piece| piece.length).sum::<u64>() >= 100_000);
            assert!(found.all.is_sorted_by_key(|piece| piece.logical) && !found.is_cut_short);
        }
    }
}
