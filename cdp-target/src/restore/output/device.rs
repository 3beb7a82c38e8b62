//! A block device as an output: opened exclusively, its old content replaced where the image has holes.

use super::{Output, OutputError, for_each_zeros};
use cdp_protocol::units::BLOCK_BYTES;
use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes at either end of a device that have to be zero for it to count as blank.
const BLANK_PROBE_BYTES: u64 = 1 << 20;

/// Opens the device of that number; `overwrite` one that is not blank, too.
///
/// # Errors
/// Where it is in use, too small or not blank.
pub(super) fn open(path: &Path, number: u64, needed: u64, overwrite: bool) -> Result<Box<dyn Output>, OutputError> {
    let mounted_at = mount_of(number);
    if mounted_at.is_some() {
        return Err(OutputError::InUse { device: path.to_owned(), mounted_at });
    }
    // Exclusive: the kernel refuses it while a file system, a swap area or another device holds it or a partition of it.
    let fd = match rustix::fs::open(path, OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => fd,
        Err(rustix::io::Errno::BUSY) => return Err(OutputError::InUse { device: path.to_owned(), mounted_at: None }),
        Err(error) => return Err(OutputError::system("open", path)(error)),
    };
    let room = rustix::fs::seek(&fd, rustix::fs::SeekFrom::End(0)).map_err(OutputError::system("measure", path))?;
    if room < needed {
        return Err(OutputError::TooSmall { path: path.to_owned(), room, needed });
    }
    let device = File::from(fd);
    if !overwrite && !is_blank(&device, room).map_err(OutputError::system("read", path))? {
        return Err(OutputError::NotBlank(path.to_owned()));
    }
    Ok(Box::new(DeviceOutput { device, file_bytes: needed, zero_range: true }))
}

/// Whether both ends of a device, where all signatures are, are zeros.
fn is_blank(device: &File, size_bytes: u64) -> io::Result<bool> {
    let len = BLANK_PROBE_BYTES.min(size_bytes);
    let mut probe = vec![0; len as usize];
    for offset in [0, size_bytes - len] {
        device.read_exact_at(&mut probe, offset)?;
        if probe.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Where the device of that number is mounted, as far as this process sees.
fn mount_of(number: u64) -> Option<String> {
    let wanted = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    let table = File::from(rustix::fs::open("/proc/self/mountinfo", OFlags::RDONLY, Mode::empty()).ok()?);
    let table = io::read_to_string(table).ok()?;
    table.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(2);
        let found = fields.next()? == wanted;
        found.then(|| fields.nth(1).map(str::to_owned))?
    })
}

/// A block device.
struct DeviceOutput {
    device: File,
    file_bytes: u64,
    zero_range: bool,
}

impl Output for DeviceOutput {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.device.write_all_at(bytes, offset)
    }

    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        if self.zero_range {
            // The kernel zeroes the range by the device's own command, or writes zeros itself.
            let mode = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
            if rustix::fs::fallocate(&self.device, mode, offset, len).is_ok() {
                return Ok(());
            }
            // Refused before anything was changed, or failed half-way: plain zeros put either right.
            self.zero_range = !len.is_multiple_of(BLOCK_BYTES as u64);
        }
        for_each_zeros(len, |done, zeros| self.device.write_all_at(zeros, offset + done))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.device.read_exact_at(buffer, offset)
    }

    fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    fn sync(&mut self) -> io::Result<()> {
        self.device.sync_all()
    }

    fn publish(self: Box<Self>) -> io::Result<()> {
        Ok(())
    }
}
