//! The machine's file systems, by plain system calls.

#![expect(clippy::disallowed_methods, reason = "this is the seam")]

use super::{Storage, StorageFile, write_zeros};
use crate::pulse;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The machine's file systems.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemStorage;

struct SystemFile(File);

/// Opens what is a file: to open a pipe would wait for somebody at its other end.
fn opened(options: &mut OpenOptions, path: &Path) -> io::Result<Box<dyn StorageFile>> {
    let file = options.custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed()).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if kind.is_fifo() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a pipe stands where a file is expected"));
    }
    Ok(boxed(file))
}

fn boxed(file: File) -> Box<dyn StorageFile> {
    Box::new(SystemFile(file))
}

impl Storage for SystemStorage {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path).map(boxed)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        opened(OpenOptions::new().read(true), path)
    }

    fn open_write(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        opened(OpenOptions::new().read(true).write(true), path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        self.create_dir_all(parent)?;
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
            other => other?,
        }
        self.sync_dir(parent)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        let entries: io::Result<Vec<PathBuf>> =
            std::fs::read_dir(path)?.map(|entry| Ok(PathBuf::from(entry?.file_name()))).collect();
        let mut names = entries?;
        names.sort();
        Ok(names)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

impl StorageFile for SystemFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut read = 0;
        while read < buffer.len() {
            let result = self.0.read_at(&mut buffer[read..], offset + read as u64);
            pulse::beat();
            match result {
                Ok(0) => break,
                Ok(more) => read += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(read)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let written = self.0.write_all_at(bytes, offset);
        pulse::beat();
        written
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        // Where there is no room for all of it, some of it may do.
        rustix::fs::fallocate(&self.0, rustix::fs::FallocateFlags::empty(), 0, len).or_else(|_| self.0.set_len(len))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        use rustix::fs::FallocateFlags;
        match rustix::fs::fallocate(&self.0, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len) {
            Err(rustix::io::Errno::OPNOTSUPP) => write_zeros(self, offset, len),
            other => Ok(other?),
        }
    }

    fn sync(&self) -> io::Result<()> {
        let synced = self.0.sync_data();
        pulse::beat();
        synced
    }

    fn forget(&self) -> io::Result<()> {
        Ok(rustix::fs::fadvise(&self.0, 0, None, rustix::fs::Advice::DontNeed)?)
    }

    fn try_lock(&self) -> io::Result<bool> {
        match rustix::fs::flock(&self.0, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{read_all, replace};

    #[test]
    fn a_file_is_replaced_even_over_the_leftover_of_a_crash() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("manifest");
        std::fs::write(folder.path().join("manifest.new"), b"half").expect("leftover");
        for content in [b"one".as_slice(), b"two, longer"] {
            replace(&SystemStorage, &path, content).expect("replaced");
            assert_eq!(read_all(&SystemStorage, &path, 100).expect("read"), content);
        }
        assert_eq!(SystemStorage.list(folder.path()).expect("listed"), [PathBuf::from("manifest")]);
        assert!(read_all(&SystemStorage, &path, 5).is_err());
    }

    #[test]
    fn what_is_no_file_is_refused_without_waiting() {
        let folder = tempfile::tempdir().expect("a folder");
        let pipe = folder.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).expect("made");
        for (path, kind) in
            [(pipe.as_path(), io::ErrorKind::InvalidInput), (folder.path(), io::ErrorKind::IsADirectory)]
        {
            assert_eq!(SystemStorage.open(path).err().map(|error| error.kind()), Some(kind));
            assert_eq!(SystemStorage.open_write(path).err().map(|error| error.kind()), Some(kind));
        }
    }

    #[test]
    fn the_second_locker_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("lock");
        let first = SystemStorage.create_new(&path).expect("made");
        assert!(first.try_lock().expect("locked"));
        assert!(!SystemStorage.open_write(&path).expect("opened").try_lock().expect("asked"));
    }
}
