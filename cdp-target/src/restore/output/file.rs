//! A new file as an output: holes are where nothing is written.
//!
//! Invariant: it stands under a hidden name until it is whole and synced, locked by whoever writes it. Given up, it vanishes, unless
//! it is kept to be gone on with.

use super::{Needs, Output, OutputError, folder_of};
use cdp_seams::storage::{Storage, StorageFile};
use rustix::fs::RenameFlags;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The hidden name of what becomes the file at `path`.
pub(super) fn partial_of(path: &Path) -> Result<PathBuf, OutputError> {
    let name = path.file_name().ok_or_else(|| OutputError::Kind(path.to_owned()))?;
    let mut partial = OsString::from(".");
    partial.push(name);
    partial.push(".partial");
    Ok(folder_of(path).join(partial))
}

/// Bytes on the disk of what was broken off before.
pub(super) fn left_bytes(partial: &Path) -> u64 {
    rustix::fs::stat(partial).map_or(0, |stat| stat.st_blocks as u64 * 512)
}

/// Makes a new file that `path` will name, in the place of what was broken off before; or goes on with that, where it is there.
///
/// # Errors
/// Where there is no room, or another export writes it.
pub(super) fn open(
    storage: &Arc<dyn Storage>,
    path: &Path,
    needs: Needs,
    force: bool,
    goes_on: bool,
) -> Result<Box<dyn Output>, OutputError> {
    let (folder, partial) = (folder_of(path), partial_of(path)?);
    let room = storage.free_bytes(folder).map_err(OutputError::system("look at", folder))?;
    let room = room.saturating_add(left_bytes(&partial));
    if room < needs.content_bytes_max {
        return Err(OutputError::TooSmall { path: folder.to_owned(), room, needed: needs.content_bytes_max });
    }
    let left = match storage.open_write(&partial) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        opened => Some(locked(opened.map_err(OutputError::system("open", &partial))?, path)?),
    };
    let file = match left {
        Some(file) if goes_on => file,
        left => {
            if left.is_some() {
                storage.remove(&partial).map_err(OutputError::system("remove", &partial))?;
            }
            locked(storage.create_new(&partial).map_err(OutputError::system("make", &partial))?, path)?
        }
    };
    let file_bytes = needs.size_bytes;
    let output = FileOutput {
        storage: Arc::clone(storage),
        file,
        file_bytes,
        partial: Some(partial),
        path: path.to_owned(),
        force,
    };
    output.file.set_len(file_bytes).map_err(OutputError::system("make room in", path))?;
    Ok(Box::new(output))
}

fn locked(file: Box<dyn StorageFile>, path: &Path) -> Result<Box<dyn StorageFile>, OutputError> {
    match file.try_lock() {
        Ok(true) => Ok(file),
        Ok(false) => Err(OutputError::Busy(path.to_owned())),
        Err(error) => Err(OutputError::system("lock", path)(error)),
    }
}

struct FileOutput {
    storage: Arc<dyn Storage>,
    file: Box<dyn StorageFile>,
    file_bytes: u64,
    /// Removed with this; `None` where it is not to be.
    partial: Option<PathBuf>,
    path: PathBuf,
    force: bool,
}

impl Output for FileOutput {
    fn cut(&mut self, offset: u64) -> io::Result<()> {
        // A crash between the two leaves a file that is too short: what is missing does not prove itself.
        self.file.set_len(offset)?;
        self.file.set_len(self.file_bytes)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_at(bytes, offset)
    }

    fn zero(&mut self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let read = self.file.read_at(buffer, offset)?;
        if read == buffer.len() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn file_bytes(&self) -> u64 {
        self.file_bytes
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

    fn keep(&mut self) {
        self.partial = None;
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
