//! Where an image goes: a file, a device, a stream.
//!
//! Invariant: a file appears under its final name whole and synced, or not at all; nothing that exists is overwritten
//! unless that was asked for, and a device in use never. A crash leaves at most a hidden `.partial` file beside the
//! final name. What the image consists of is `image`'s business.

use cdp_protocol::units::BLOCK_BYTES;
use cdp_seams::storage::{Storage, StorageFile};
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, RenameFlags};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Zeros are written in pieces of this many bytes where nothing better works.
const ZERO_BYTES: usize = 256 * 1024;
static ZEROS: [u8; ZERO_BYTES] = [0; ZERO_BYTES];
/// Bytes at either end of a device that have to be zero for it to count as blank.
const BLANK_PROBE_BYTES: u64 = 1 << 20;

/// Takes an image, in rising offsets and without gaps.
pub trait Output {
    /// Puts content at `offset`.
    ///
    /// # Errors
    /// As the system says; the output is then worth nothing.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes `len` bytes from `offset` read as zeros.
    ///
    /// # Errors
    /// As the system says; the output is then worth nothing.
    fn zero(&mut self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes everything durable.
    ///
    /// # Errors
    /// As the system says; not to be repeated.
    fn sync(&mut self) -> io::Result<()>;
    /// Gives it its final name, where it has one. Dropped before this, a file vanishes.
    ///
    /// # Errors
    /// As the system says, or because something took the name meanwhile.
    fn publish(self: Box<Self>) -> io::Result<()>;
}

/// Why an output is refused before anything was written to it.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// A file of that name exists.
    #[error("{} exists", .0.display())]
    Exists(PathBuf),
    /// A folder where a file or device is needed.
    #[error("{} is a folder", .0.display())]
    IsFolder(PathBuf),
    /// Neither file, device nor pipe.
    #[error("{} is neither a file nor a block device", .0.display())]
    Kind(PathBuf),
    /// A device that something uses.
    #[error("{} is in use{}", .device.display(), .mounted_at.as_ref().map_or_else(String::new, |at| format!(": mounted at {at}")))]
    InUse {
        /// The device.
        device: PathBuf,
        /// Where it is mounted, if that is what uses it.
        mounted_at: Option<String>,
    },
    /// A device with something on it.
    #[error("{} is not blank", .0.display())]
    NotBlank(PathBuf),
    /// Less room than the image takes.
    #[error("{} has room for {room} bytes, the image takes {needed}", .path.display())]
    TooSmall {
        /// The device, or the file's folder.
        path: PathBuf,
        /// Bytes there are.
        room: u64,
        /// Bytes there should be.
        needed: u64,
    },
    /// The system refused.
    #[error("{verb} {}", .path.display())]
    System {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl OutputError {
    fn system<E: Into<io::Error>>(verb: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        move |error| Self::System { verb, path: path.to_owned(), source: error.into() }
    }
}

/// What an image needs of its output.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// Length of the image in bytes.
    pub size_bytes: u64,
    /// Bytes of it that may be other than zeros.
    pub content_bytes_max: u64,
}

/// Opens what stands at `path`, or prepares a new file; `force` allows to replace a file and to overwrite a device that
/// is not blank.
///
/// # Errors
/// Where the output is refused; nothing was changed then.
pub fn open(
    storage: &Arc<dyn Storage>,
    path: &Path,
    needs: Needs,
    force: bool,
) -> Result<Box<dyn Output>, OutputError> {
    let found = match rustix::fs::stat(path) {
        Ok(stat) => Some((FileType::from_raw_mode(stat.st_mode), stat.st_rdev)),
        Err(rustix::io::Errno::NOENT) => None,
        Err(error) => return Err(OutputError::system("look at", path)(error)),
    };
    match found {
        Some((FileType::BlockDevice, number)) => open_device(path, number, needs.size_bytes, force),
        Some((FileType::CharacterDevice | FileType::Fifo, _)) => {
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(OutputError::system("open", path))?;
            Ok(Box::new(StreamOutput(File::from(fd))))
        }
        Some((FileType::Directory, _)) => Err(OutputError::IsFolder(path.to_owned())),
        Some((FileType::RegularFile, _)) if !force => Err(OutputError::Exists(path.to_owned())),
        Some((FileType::RegularFile, _)) | None => open_file(storage, path, needs, force),
        Some(_) => Err(OutputError::Kind(path.to_owned())),
    }
}

/// An image on standard output.
#[must_use]
pub fn stdout() -> Box<dyn Output> {
    Box::new(StreamOutput(io::stdout().lock()))
}

/// Takes an image nowhere: to see what is in it.
#[derive(Clone, Copy, Debug)]
pub struct Count;

impl Output for Count {
    fn write(&mut self, _offset: u64, _bytes: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn zero(&mut self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn publish(self: Box<Self>) -> io::Result<()> {
        Ok(())
    }
}

/// The folder a file is in.
#[must_use]
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn open_file(
    storage: &Arc<dyn Storage>,
    path: &Path,
    needs: Needs,
    force: bool,
) -> Result<Box<dyn Output>, OutputError> {
    let folder = folder_of(path);
    let room = storage.free_bytes(folder).map_err(OutputError::system("look at", folder))?;
    if room < needs.content_bytes_max {
        return Err(OutputError::TooSmall { path: folder.to_owned(), room, needed: needs.content_bytes_max });
    }
    let name = path.file_name().ok_or_else(|| OutputError::Kind(path.to_owned()))?;
    let mut partial_name = std::ffi::OsString::from(".");
    partial_name.push(name);
    partial_name.push(format!(".{}.partial", std::process::id()));
    let partial = folder.join(partial_name);
    let file = storage.create_new(&partial).map_err(OutputError::system("make", &partial))?;
    let output =
        FileOutput { storage: Arc::clone(storage), file, partial: Some(partial), path: path.to_owned(), force };
    output.file.set_len(needs.size_bytes).map_err(OutputError::system("make room in", path))?;
    Ok(Box::new(output))
}

/// A new file: holes are where nothing is written.
struct FileOutput {
    storage: Arc<dyn Storage>,
    file: Box<dyn StorageFile>,
    partial: Option<PathBuf>,
    path: PathBuf,
    force: bool,
}

impl Output for FileOutput {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_at(bytes, offset)
    }

    fn zero(&mut self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync()
    }

    fn publish(mut self: Box<Self>) -> io::Result<()> {
        let partial = self.partial.as_ref().expect("published once");
        if self.force {
            self.storage.rename(partial, &self.path)?;
        } else {
            rename_new(self.storage.as_ref(), partial, &self.path)?;
        }
        self.partial = None;
        self.storage.sync_dir(folder_of(&self.path))
    }
}

impl Drop for FileOutput {
    fn drop(&mut self) {
        if let Some(partial) = &self.partial
            && let Err(error) = self.storage.remove(partial)
        {
            tracing::warn!(path = %partial.display(), %error, "an unfinished image is left behind");
        }
    }
}

/// Renames without replacing; where the file system cannot, what was checked at the start has to do.
fn rename_new(storage: &dyn Storage, from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, RenameFlags::NOREPLACE) {
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => storage.rename(from, to),
        other => Ok(other?),
    }
}

fn open_device(path: &Path, number: u64, needed: u64, force: bool) -> Result<Box<dyn Output>, OutputError> {
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
    if !force && !is_blank(&device, room).map_err(OutputError::system("read", path))? {
        return Err(OutputError::NotBlank(path.to_owned()));
    }
    Ok(Box::new(DeviceOutput { device, zero_range: true }))
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

/// A block device, opened exclusively: its old content has to go where the image has holes.
struct DeviceOutput {
    device: File,
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

    fn sync(&mut self) -> io::Result<()> {
        self.device.sync_all()
    }

    fn publish(self: Box<Self>) -> io::Result<()> {
        Ok(())
    }
}

/// A pipe, a terminal, standard output: everything in order, zeros too.
struct StreamOutput<W>(W);

impl<W: Write> Output for StreamOutput<W> {
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

fn for_each_zeros(len: u64, mut write: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(ZERO_BYTES as u64);
        write(done, &ZEROS[..piece as usize])?;
        done += piece;
    }
    Ok(())
}
