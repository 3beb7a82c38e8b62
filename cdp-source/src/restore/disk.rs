//! The device that is written to: opened so that nobody else has it, and past the page cache.
//!
//! Invariant: what is open here was neither mounted nor otherwise in use when it was opened, and cannot be mounted while it is (`O_EXCL`); of
//! an image file, that no loop device stands on it. What was written is read back before it counts. Owns the writes; the tracker sees them
//! as it sees anybody's.

use super::partitions;
use crate::probe::{self, Kind, Probe};
use crate::reader::aligned::AlignedBuffer;
use crate::reader::{self, BlockReader, READ_BLOCKS_MAX, ReadRequest, ReadTarget};
use crate::tracker::device;
use cdp_protocol::units::{BLOCK_BYTES, Block, Extent, blocks_in};
use cdp_seams::storage::{Storage, read_all};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

const SYSFS_BYTES_MAX: u64 = 64 * 1024;
/// Bytes that one call makes zeros.
const ZERO_BYTES_MAX: u64 = 64 << 20;

/// Why a device cannot be restored to, or could not be written.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Somebody has it.
    #[error("{} is in use: {by}", device.display())]
    InUse {
        /// The device.
        device: PathBuf,
        /// By whom, as far as is known.
        by: String,
    },
    /// It has less room than the volume.
    #[error("{} has {size_bytes} bytes, {needed_bytes} are needed", device.display())]
    TooSmall {
        /// The device.
        device: PathBuf,
        /// Its size.
        size_bytes: u64,
        /// The volume's.
        needed_bytes: u64,
    },
    /// A call failed.
    #[error("{step} {}", device.display())]
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        device: PathBuf,
        /// What came back.
        #[source]
        source: io::Error,
    },
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] reader::OpenError),
    /// It gave back something else than was written.
    #[error("{}: block {block} does not hold what was just written to it", device.display())]
    ReadBack {
        /// The device.
        device: PathBuf,
        /// The block.
        block: Block,
    },
}

impl DiskError {
    /// The next step, where there is one.
    #[must_use]
    pub const fn hint(&self) -> Option<&'static str> {
        match self {
            Self::InUse { .. } => Some("stop what uses it and unmount it; --to DEVICE restores to another one"),
            Self::TooSmall { .. } => Some("take a device of at least the volume's size"),
            Self::ReadBack { .. } => Some("the device is not to be trusted: restore to another one with --to"),
            Self::Io { .. } | Self::Read(_) => None,
        }
    }

    /// Whether an operator can do something about it.
    #[must_use]
    pub const fn is_users(&self) -> bool {
        matches!(self, Self::InUse { .. } | Self::TooSmall { .. })
    }
}

/// The device, open for this process alone.
pub struct Disk {
    file: OwnedFd,
    device: PathBuf,
    size_bytes: u64,
    is_block: bool,
    buffer: AlignedBuffer,
    reader: Box<dyn BlockReader>,
}

impl Disk {
    /// Opens the first `size_bytes` of what was looked at.
    ///
    /// # Errors
    /// Where it is in use, too small, or cannot be opened.
    pub fn open(storage: &dyn Storage, probe: &Probe, size_bytes: u64) -> Result<Self, DiskError> {
        let device = probe.device.clone();
        refuse_small(probe, size_bytes)?;
        if let Some(by) = user_of(storage, probe) {
            return Err(DiskError::InUse { device, by });
        }
        let extra = if probe.is_block() { OFlags::EXCL | OFlags::DIRECT } else { OFlags::empty() };
        let flags = OFlags::RDWR | OFlags::CLOEXEC | extra;
        let file = rustix::fs::open(&device, flags, Mode::empty()).map_err(|errno| match errno {
            Errno::BUSY => DiskError::InUse { device: device.clone(), by: "the kernel says that it is busy".into() },
            errno => failed("open", &device)(errno),
        })?;
        let reader = reader::open(&[whole(&device, size_bytes)])?;
        let buffer = AlignedBuffer::new(READ_BLOCKS_MAX as usize * BLOCK_BYTES);
        Ok(Self { file, device, size_bytes, is_block: probe.is_block(), buffer, reader })
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Bytes of it that are open.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Reads it.
    pub fn reader(&mut self) -> &mut dyn BlockReader {
        &mut *self.reader
    }

    /// Writes the content of an extent, 4 KiB a block, and reads it back. The last block of a volume may be there in part only.
    ///
    /// # Errors
    /// Where that fails, or the device gives back something else.
    pub fn write(&mut self, extent: Extent, content: &[u8]) -> Result<(), DiskError> {
        assert_eq!(content.len() as u64, extent.to_bytes(), "whole blocks");
        let mut offset = extent.start.to_bytes();
        for piece in content.chunks(READ_BLOCKS_MAX as usize * BLOCK_BYTES) {
            let len = (piece.len() as u64).min(self.size_bytes.saturating_sub(offset)) as usize;
            self.buffer[..len].copy_from_slice(&piece[..len]);
            self.write_buffer(len, offset)?;
            offset += piece.len() as u64;
        }
        self.read_back(extent, Some(content))
    }

    /// Makes an extent zeros, by giving its room back where the device can, and reads it back.
    ///
    /// # Errors
    /// Where that fails, or the device gives back something else.
    pub fn zero(&mut self, extent: Extent) -> Result<(), DiskError> {
        let end = extent.end().saturating_mul(BLOCK_BYTES as u64).min(self.size_bytes);
        let mut offset = extent.start.to_bytes();
        while offset < end {
            let len = (end - offset).min(ZERO_BYTES_MAX);
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(&self.file, flags, offset, len) {
                Ok(()) => {}
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL) => self.write_zeros(offset, len)?,
                Err(errno) => return Err(failed("make zeros on", &self.device)(errno)),
            }
            offset += len;
        }
        self.read_back(extent, None)
    }

    fn write_zeros(&mut self, mut offset: u64, len: u64) -> Result<(), DiskError> {
        let end = offset + len;
        self.buffer.fill(0);
        while offset < end {
            let len = (end - offset).min(self.buffer.len() as u64) as usize;
            self.write_buffer(len, offset)?;
            offset += len as u64;
        }
        Ok(())
    }

    fn write_buffer(&self, len: usize, offset: u64) -> Result<(), DiskError> {
        let mut done = 0;
        while done < len {
            match rustix::io::pwrite(&self.file, &self.buffer[done..len], offset + done as u64) {
                Ok(0) => return Err(failed("write to", &self.device)(Errno::NOSPC)),
                Ok(written) => done += written,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed("write to", &self.device)(errno)),
            }
        }
        Ok(())
    }

    /// Holds what the device gives against what it was to take; zeros where there is no content.
    fn read_back(&mut self, extent: Extent, content: Option<&[u8]>) -> Result<(), DiskError> {
        let requests: Vec<ReadRequest> = reader::runs(extent.blocks().map(|block| block.0), READ_BLOCKS_MAX)
            .into_iter()
            .map(|extent| ReadRequest { volume: 0, extent })
            .collect();
        let mut wrong = None;
        let size_bytes = self.size_bytes;
        let read = reader::read_blocks(&mut *self.reader, &requests, &mut |_, block, bytes| {
            let Ok(bytes) = bytes else { return wrong = Some(block) };
            let at = (block.0 - extent.start.0) as usize * BLOCK_BYTES;
            let len = (BLOCK_BYTES as u64).min(size_bytes - block.to_bytes()) as usize;
            let is_same = match content {
                Some(content) => bytes[..len] == content[at..at + len],
                None => cdp_protocol::codec::is_zero(&bytes[..len]),
            };
            if !is_same {
                wrong = Some(block);
            }
        });
        read.map_err(|source| DiskError::Io { step: "read back", device: self.device.clone(), source })?;
        wrong.map_or(Ok(()), |block| Err(DiskError::ReadBack { device: self.device.clone(), block }))
    }

    /// Reads bytes from anywhere on it.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        reader::read_at(&mut *self.reader, 0, offset, buffer)
    }

    /// Writes bytes anywhere on it, within whole blocks, and reads them back.
    ///
    /// # Errors
    /// Where that fails, or the device gives back something else.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let (start, end) = (offset / BLOCK_BYTES as u64, blocks_in(offset + bytes.len() as u64));
        let extent = Extent { start: Block(start as u32), count: (end - start) as u32 };
        let mut content = vec![0; extent.to_bytes() as usize];
        let device = self.device.clone();
        let known = (self.size_bytes - start * BLOCK_BYTES as u64).min(content.len() as u64) as usize;
        let read = self.read_at(start * BLOCK_BYTES as u64, &mut content[..known]);
        read.map_err(|source| DiskError::Io { step: "read", device, source })?;
        let at = (offset - start * BLOCK_BYTES as u64) as usize;
        content[at..at + bytes.len()].copy_from_slice(bytes);
        self.write(extent, &content)
    }

    /// Has the kernel read its partition table again. Where it does not, a restart of the machine does.
    ///
    /// # Errors
    /// Where somebody uses a partition, or the device has none.
    pub fn read_partitions(&self) -> Result<(), DiskError> {
        partitions::read_again(&self.file).map_err(failed("read the partition table of", &self.device))
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// Where the device says that it is not.
    pub fn sync(&self) -> Result<(), DiskError> {
        rustix::fs::fsync(&self.file).map_err(failed("sync", &self.device))
    }

    /// Blocks of the volume.
    #[must_use]
    pub const fn blocks(&self) -> u64 {
        blocks_in(self.size_bytes)
    }

    /// Whether it is a block device.
    #[must_use]
    pub const fn is_block(&self) -> bool {
        self.is_block
    }
}

/// Refuses what has less room than is needed.
///
/// # Errors
/// `TooSmall`.
pub fn refuse_small(probe: &Probe, needed_bytes: u64) -> Result<(), DiskError> {
    if probe.size_bytes >= needed_bytes {
        return Ok(());
    }
    Err(DiskError::TooSmall { device: probe.device.clone(), size_bytes: probe.size_bytes, needed_bytes })
}

/// The first bytes of a node, to be read through the node itself: nobody has it mounted.
#[must_use]
pub fn whole(device: &Path, size_bytes: u64) -> ReadTarget {
    ReadTarget { node: device.to_owned(), offset_bytes: 0, size_bytes }
}

fn failed(step: &'static str, device: &Path) -> impl Fn(Errno) -> DiskError {
    let device = device.to_owned();
    move |errno| DiskError::Io { step, device: device.clone(), source: errno.into() }
}

/// Who is known to use it.
fn user_of(storage: &dyn Storage, probe: &Probe) -> Option<String> {
    if !probe.mounted_on.is_empty() {
        return Some(format!("it is mounted on {}", probe.mounted_on.join(", ")));
    }
    if !probe.holders.is_empty() {
        return Some(format!("{} is built upon it", probe.holders.join(", ")));
    }
    if let Some(partition) = partitions_of(storage, probe)
        .iter()
        .find_map(|partition| user_of(storage, partition).map(|by| format!("{}: {by}", partition.device.display())))
    {
        return Some(partition);
    }
    let by_loop = if probe.is_block() { None } else { loop_on(storage, &probe.device) };
    by_loop.map(|name| format!("/dev/{name} stands on it"))
}

/// The partitions of a whole disk that the kernel knows.
fn partitions_of(storage: &dyn Storage, probe: &Probe) -> Vec<Probe> {
    let Kind::Block { number, partition: None, .. } = &probe.kind else { return Vec::new() };
    let numbers = device::partitions_of_number(number).unwrap_or_default();
    let nodes = numbers.iter().filter_map(|number| device::node_of(&number.to_string()).ok());
    nodes.filter_map(|node| probe::probe(storage, &node).ok()).collect()
}

/// The loop device that an image file is attached to.
fn loop_on(storage: &dyn Storage, file: &Path) -> Option<String> {
    let names = storage.list(Path::new("/sys/block")).unwrap_or_default();
    let names = names.iter().map(|name| name.to_string_lossy().into_owned()).filter(|name| name.starts_with("loop"));
    names.into_iter().find(|name| {
        let path = Path::new("/sys/block").join(name).join("loop/backing_file");
        let bytes = read_all(storage, &path, SYSFS_BYTES_MAX).unwrap_or_default();
        Path::new(String::from_utf8_lossy(&bytes).trim_end()) == file
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_seams::storage::SystemStorage;

    /// An image whose last block is there in part.
    const SIZE_BYTES: u64 = 70 * 4096 + 512;

    fn image(folder: &Path) -> PathBuf {
        let path = folder.join("disk.img");
        let file = SystemStorage.create_new(&path).expect("made");
        file.write_at(&vec![9; SIZE_BYTES as usize + 4096], 0).expect("written");
        path
    }

    fn bytes(path: &Path) -> Vec<u8> {
        read_all(&SystemStorage, path, 1 << 20).expect("read")
    }

    #[test]
    fn what_is_written_is_there_and_nothing_beside_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = image(folder.path());
        let probe = probe::probe(&SystemStorage, &path).expect("an image");
        let mut disk = Disk::open(&SystemStorage, &probe, SIZE_BYTES).expect("opened");
        assert_eq!((disk.blocks(), disk.is_block()), (71, false));
        let mut expected = bytes(&path);
        let content = vec![5; 40 * BLOCK_BYTES];
        disk.write(Extent { start: Block(3), count: 40 }, &content).expect("written");
        expected[3 * BLOCK_BYTES..43 * BLOCK_BYTES].copy_from_slice(&content);
        disk.write(Extent { start: Block(69), count: 2 }, &content[..2 * BLOCK_BYTES]).expect("written");
        expected[69 * BLOCK_BYTES..SIZE_BYTES as usize].fill(5);
        disk.zero(Extent { start: Block(50), count: 7 }).expect("zeros");
        expected[50 * BLOCK_BYTES..57 * BLOCK_BYTES].fill(0);
        disk.sync().expect("synced");
        assert_eq!(bytes(&path), expected);
        disk.write_at(5 * BLOCK_BYTES as u64 - 100, &[6; 600]).expect("written");
        expected[5 * BLOCK_BYTES - 100..5 * BLOCK_BYTES + 500].fill(6);
        disk.write_at(SIZE_BYTES - 512, &[8; 512]).expect("written");
        expected[SIZE_BYTES as usize - 512..SIZE_BYTES as usize].fill(8);
        assert_eq!(bytes(&path), expected);
        let mut read = [0; 700];
        disk.read_at(5 * BLOCK_BYTES as u64 - 150, &mut read).expect("read");
        assert_eq!(read, expected[5 * BLOCK_BYTES - 150..5 * BLOCK_BYTES + 550]);
        // Of the last block as much as is there; the byte behind the volume is nobody's.
        disk.zero(Extent { start: Block(70), count: 1 }).expect("zeros");
        expected[70 * BLOCK_BYTES..SIZE_BYTES as usize].fill(0);
        disk.write_zeros(0, 2 * BLOCK_BYTES as u64).expect("zeros, where no room can be given back");
        expected[..2 * BLOCK_BYTES].fill(0);
        assert_eq!(bytes(&path), expected);
    }

    #[test]
    fn a_device_with_too_little_room_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let probe = probe::probe(&SystemStorage, &image(folder.path())).expect("an image");
        let refused = Disk::open(&SystemStorage, &probe, SIZE_BYTES + 4097).err().expect("refused");
        assert!(matches!(refused, DiskError::TooSmall { .. }) && refused.is_users() && refused.hint().is_some());
    }
}
