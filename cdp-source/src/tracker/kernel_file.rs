//! Small files of sysfs and procfs, kept open: what is asked for at every flip is one call, not a walk to a name.
//!
//! Such a file is made anew whenever it is read from its start, and all of it is given at once. One whose object is gone
//! answers with an error for ever, even if another object has taken its name: nothing is mistaken for what it was.

use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

/// What such files have at most; `fdinfo` of a program is the longest.
const BYTES_MAX: usize = 4096;

/// A small file of the kernel's, open.
#[derive(Debug)]
pub(super) struct KernelFile(OwnedFd);

impl KernelFile {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// Gives what it says now to `look`.
    pub(super) fn read<T>(&self, look: impl FnOnce(&str) -> Option<T>) -> io::Result<T> {
        let mut buffer = [0; BYTES_MAX];
        let read = rustix::io::pread(&self.0, &mut buffer, 0)?;
        let text = std::str::from_utf8(&buffer[..read]).ok().filter(|_| read < BYTES_MAX);
        text.and_then(|text| look(text.trim_end())).ok_or_else(strange)
    }

    /// The number it says.
    pub(super) fn number(&self) -> io::Result<u64> {
        self.read(|text| text.parse().ok())
    }
}

pub(super) fn strange() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel says something unexpected")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_the_kernel_is_made_anew_whenever_it_is_read() {
        let uptime = KernelFile::open(Path::new("/proc/self/stat")).expect("open");
        let faults = || uptime.read(|text| text.split(' ').nth(9)?.parse::<u64>().ok()).expect("read");
        let before = faults();
        let mut touched = vec![1_u8; 64 << 20];
        touched.iter_mut().step_by(4096).for_each(|byte| *byte += 1);
        assert!(faults() > before, "{} pages were touched", touched.len() / 4096);
    }

    #[test]
    fn what_is_no_number_or_too_long_is_an_error() {
        let read = |path: &str| KernelFile::open(Path::new(path)).expect("open").number();
        assert_eq!(read("/proc/sys/kernel/pid_max").expect("a number") % 1024, 0);
        assert_eq!(read("/proc/self/status").expect_err("text").kind(), io::ErrorKind::InvalidData);
        assert_eq!(read("/proc/kallsyms").expect_err("long").kind(), io::ErrorKind::InvalidData);
    }
}
