//! Storage: a folder of files that may lose what was not synced.
//!
//! Blocking calls; they run on threads that may block, never on a tokio worker. The contract is what a POSIX file system
//! gives, no more: content is durable after `sync`, a name after `sync_dir` of its folder. After a failed write or sync the
//! file is not to be trusted and the call not to be repeated (the page cache may have dropped the data; a second sync
//! would say it is well).

#[cfg(feature = "sim")]
pub mod sim;
mod system;

use std::io;
use std::path::{Path, PathBuf};

pub use system::SystemStorage;

/// Zeros that are written at once where a file system does not know how to discard, in bytes.
const ZEROS_BYTES_MAX: u64 = 1 << 20;

/// A file system, or what plays one.
pub trait Storage: Send + Sync {
    /// Makes a new file, mode 0600, and opens it to read and write. Fails where the name exists. Not durable before `sync_dir`.
    ///
    /// # Errors
    /// As the file system says.
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>>;
    /// Opens a file to read.
    ///
    /// # Errors
    /// As the file system says.
    fn open(&self, path: &Path) -> io::Result<Box<dyn StorageFile>>;
    /// Opens a file to read and write.
    ///
    /// # Errors
    /// As the file system says.
    fn open_write(&self, path: &Path) -> io::Result<Box<dyn StorageFile>>;
    /// Gives a file another name, replacing what had it. Not durable before `sync_dir`.
    ///
    /// # Errors
    /// As the file system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file. Not durable before `sync_dir`.
    ///
    /// # Errors
    /// As the file system says.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes a folder, mode 0700, and those above it that are missing, each durable in the one above.
    ///
    /// # Errors
    /// As the file system says.
    fn create_dir_all(&self, path: &Path) -> io::Result<()>;
    /// The names in a folder, sorted.
    ///
    /// # Errors
    /// As the file system says.
    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>>;
    /// Makes the names in a folder durable.
    ///
    /// # Errors
    /// As the file system says.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Bytes that can still be written below `path`.
    ///
    /// # Errors
    /// As the file system says.
    fn free_bytes(&self, path: &Path) -> io::Result<u64>;
}

/// An open file.
pub trait StorageFile: Send + Sync {
    /// Reads at `offset` until `buffer` is full or the file ends; gives the bytes read.
    ///
    /// # Errors
    /// As the file system says.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `bytes` at `offset`. After an error any part may have been written.
    ///
    /// # Errors
    /// As the file system says.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Length in bytes.
    ///
    /// # Errors
    /// As the file system says.
    fn len(&self) -> io::Result<u64>;
    /// Cuts or extends (with zeros).
    ///
    /// # Errors
    /// As the file system says.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Extends to `len` (with zeros), with room on the disk for all of it where the file system can.
    ///
    /// # Errors
    /// As the file system says.
    fn allocate(&self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }
    /// Makes `len` bytes from `offset` on zeros, and gives back the room that they take where the file system can. The length stays.
    ///
    /// # Errors
    /// As the file system says. After an error any part may have been done.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        write_zeros(self, offset, len)
    }
    /// Makes content and length durable. An error is final for this file.
    ///
    /// # Errors
    /// As the file system says.
    fn sync(&self) -> io::Result<()>;
    /// Lets go of what is cached of the file and durable, where the system does that: what is read next comes from the disk.
    ///
    /// # Errors
    /// As the file system says.
    fn forget(&self) -> io::Result<()> {
        Ok(())
    }
    /// Takes the file's exclusive lock for as long as it is open; `false` where another holder has it.
    ///
    /// # Errors
    /// As the file system says.
    fn try_lock(&self) -> io::Result<bool>;
    /// Whether the file is empty.
    ///
    /// # Errors
    /// As the file system says.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

/// Writes zeros, a part at a time.
fn write_zeros<F: StorageFile + ?Sized>(file: &F, offset: u64, len: u64) -> io::Result<()> {
    let zeros = vec![0; len.min(ZEROS_BYTES_MAX) as usize];
    let mut done = 0;
    while done < len {
        let part = &zeros[..(len - done).min(ZEROS_BYTES_MAX) as usize];
        file.write_at(part, offset + done)?;
        done += part.len() as u64;
    }
    Ok(())
}

/// Reads a whole file that must not be longer than `bytes_max`.
///
/// # Errors
/// As the file system says; `FileTooLarge` above the bound.
pub fn read_all(storage: &dyn Storage, path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let file = storage.open(path)?;
    let len = file.len()?;
    if len > bytes_max {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut bytes = vec![0; len as usize];
    let read = file.read_at(&mut bytes, 0)?;
    bytes.truncate(read);
    Ok(bytes)
}

/// Puts a file with `bytes` in the place of `path`, all or nothing: write beside it, sync, rename, sync the folder.
///
/// A crash before the rename leaves the old file and a `.new` beside it, which the next call replaces; after the rename and
/// before the folder's sync, the old or the new file; never a mixture.
///
/// # Errors
/// As the file system says; the old file is then still in place, or the new one already.
pub fn replace(storage: &dyn Storage, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().expect("a file has a name").to_owned();
    name.push(".new");
    let beside = path.with_file_name(name);
    match storage.remove(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = storage.create_new(&beside)?;
    file.write_at(bytes, 0)?;
    file.sync()?;
    drop(file);
    storage.rename(&beside, path)?;
    storage.sync_dir(path.parent().expect("a file has a folder"))
}
