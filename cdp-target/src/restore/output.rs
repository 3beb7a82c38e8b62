//! Where an image goes: a file, a device, a stream.
//!
//! Invariant: a file appears under its final name whole and synced, or not at all; nothing that exists is overwritten
//! unless that was asked for, and a device in use never. A crash leaves at most a hidden `.partial` file beside the
//! final name. What the image consists of is `image`'s business.

mod device;
mod file;
mod stream;

use super::qcow2::packer::Cluster;
use cdp_seams::storage::Storage;
use rustix::fs::{FileType, Mode, OFlags};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Zeros are written in pieces of this many bytes where nothing better works.
const ZERO_BYTES: usize = 256 * 1024;
static ZEROS: [u8; ZERO_BYTES] = [0; ZERO_BYTES];

/// Takes an image, in rising offsets; without gaps, but for what stands there already from an export that was broken off.
pub trait Output: Sync {
    /// Forgets what stands at `offset` and behind it, where zeros are what nothing was written to: what was broken off may hold anything there.
    ///
    /// # Errors
    /// As the system says; the output is then worth nothing.
    fn cut(&mut self, _offset: u64) -> io::Result<()> {
        Ok(())
    }
    /// Writes what stands before all else; called once, first.
    ///
    /// # Errors
    /// As the system says; the output is then worth nothing.
    fn begin(&mut self) -> io::Result<()> {
        Ok(())
    }
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
    /// Whether it takes compressed clusters, and nothing else.
    fn is_packed(&self) -> bool {
        false
    }
    /// Takes the next cluster of the image.
    ///
    /// # Errors
    /// As the system says; the output is then worth nothing.
    fn cluster(&mut self, _cluster: &Cluster) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "not compressed"))
    }
    /// Reads the image's bytes from `offset` on.
    ///
    /// # Errors
    /// As the system says; `Unsupported` where it cannot be read.
    fn read_at(&self, _offset: u64, _buffer: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Reads what the image is written as, where that is another thing than the image.
    ///
    /// # Errors
    /// As the system says; `Unsupported` where it cannot be read.
    fn read_file_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_at(offset, buffer)
    }
    /// Length of what the image is written as; 0 where it cannot be read again.
    fn file_bytes(&self) -> u64 {
        0
    }
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
    /// Leaves what was written when it is dropped, to be gone on with.
    fn keep(&mut self) {}
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
    /// Another export writes it.
    #[error("another export writes {}", .0.display())]
    Busy(PathBuf),
    /// What was broken off is of another image.
    #[error("what was broken off of {} is of {left}", .path.display())]
    OtherImage {
        /// The output.
        path: PathBuf,
        /// What is there.
        left: String,
    },
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
    /// What became of a call that was to do `verb` with `path`.
    pub(crate) fn system<E: Into<io::Error>>(verb: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
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

/// What may become of what stands at an output.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allowed {
    /// To replace a file and to overwrite a device that is not blank.
    pub force: bool,
    /// To go on with what was broken off.
    pub going_on: bool,
}

/// What an output is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file, there or to be.
    File,
    /// A block device of that number.
    Device(u64),
    /// A pipe, or a device of characters.
    Stream,
}

/// What stands at `path`, or would.
///
/// # Errors
/// Where it is a folder or the like.
pub fn kind_of(path: &Path) -> Result<Kind, OutputError> {
    let stat = match rustix::fs::stat(path) {
        Ok(stat) => stat,
        Err(rustix::io::Errno::NOENT) => return Ok(Kind::File),
        Err(error) => return Err(OutputError::system("look at", path)(error)),
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::BlockDevice => Ok(Kind::Device(stat.st_rdev)),
        FileType::CharacterDevice | FileType::Fifo => Ok(Kind::Stream),
        FileType::Directory => Err(OutputError::IsFolder(path.to_owned())),
        FileType::RegularFile => Ok(Kind::File),
        _ => Err(OutputError::Kind(path.to_owned())),
    }
}

/// Opens what stands at `path`, or prepares a new file.
///
/// # Errors
/// Where the output is refused; nothing was changed then.
pub fn open(
    storage: &Arc<dyn Storage>,
    path: &Path,
    needs: Needs,
    allowed: Allowed,
) -> Result<Box<dyn Output>, OutputError> {
    match kind_of(path)? {
        Kind::Device(number) => device::open(path, number, needs.size_bytes, allowed.force || allowed.going_on),
        Kind::Stream => {
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(OutputError::system("open", path))?;
            Ok(Box::new(stream::StreamOutput(File::from(fd))))
        }
        Kind::File if !allowed.force && rustix::fs::stat(path).is_ok() => Err(OutputError::Exists(path.to_owned())),
        Kind::File => file::open(storage, path, needs, allowed.force, allowed.going_on),
    }
}

/// An image on standard output.
///
/// # Errors
/// Where there is none.
pub fn stdout() -> Result<Box<dyn Output>, OutputError> {
    let fd = rustix::io::dup(rustix::stdio::stdout()).map_err(OutputError::system("open", Path::new("-")))?;
    Ok(Box::new(stream::StreamOutput(File::from(fd))))
}

/// The hidden name that a file has until it is whole.
///
/// # Errors
/// Where `path` ends in no name.
pub fn partial_of(path: &Path) -> Result<PathBuf, OutputError> {
    file::partial_of(path)
}

/// Bytes on the disk of what was broken off of the file at `path`.
#[must_use]
pub fn left_bytes(path: &Path) -> u64 {
    partial_of(path).map_or(0, |partial| file::left_bytes(&partial))
}

/// The folder a file is in.
#[must_use]
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
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
