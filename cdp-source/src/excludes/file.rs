//! A file that is to be left out: whether it may be, and which bytes of which device hold it.
//!
//! Only a regular file with one name, on a file system that tells where on its own device content lies, may. It is opened for each look
//! and not kept open: a file that was removed has to go.

use super::fiemap::{self, Pieces};
use super::place::Window;
use crate::tracker::device::{DeviceNumber, is_stacked};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, fstatfs, open, readlink, statx};
use rustix::io::Errno;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

const MAGIC_EXT: u64 = 0xef53;
const MAGIC_XFS: u64 = 0x5846_5342;

/// Why a file, or some of it, is captured all the same.
#[derive(Debug, thiserror::Error)]
pub(super) enum Reason {
    #[error("it does not exist")]
    Missing,
    #[error("it is a symbolic link; name the file itself")]
    Link,
    #[error("it is not a regular file")]
    NotAFile,
    #[error("it has other names too (hard links)")]
    OtherNames,
    #[error("it lies in the state folder, whose files are part of the points")]
    State,
    #[error("only files on ext2, ext3, ext4 and XFS can be left out")]
    FileSystem,
    #[error("it lies on the realtime device of its file system")]
    Realtime,
    #[error("it lies elsewhere: on {0}, which is no part of this group's volumes")]
    Elsewhere(DeviceNumber),
    #[error("it lies elsewhere: on {0} (device-mapper or md); protect that device instead of what it is made of")]
    Stacked(DeviceNumber),
    #[error("its file system is being synced; until then it is captured")]
    Unsettled,
    #[error("what it shares with other files (reflinks) is captured")]
    Shared,
    #[error("it is in more than 65536 pieces; those behind are captured")]
    CutShort,
    #[error("look at it: {0}")]
    Io(#[from] io::Error),
}

impl From<Errno> for Reason {
    fn from(error: Errno) -> Self {
        match error {
            Errno::NOENT | Errno::NOTDIR => Self::Missing,
            error => Self::Io(error.into()),
        }
    }
}

/// Which file it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) device: DeviceNumber,
    inode: u64,
    /// When it was made: an inode's number is given again.
    born: (i64, u32),
}

/// A file that may be left out.
pub(super) struct File {
    pub(super) descriptor: OwnedFd,
    pub(super) identity: Identity,
    is_xfs: bool,
}

impl File {
    /// Looks at `path`. Nothing is opened that could notice.
    pub(super) fn open(path: &Path) -> Result<Self, Reason> {
        let place = open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let found: Statx = statx(&place, "", AtFlags::EMPTY_PATH, wanted)?;
        match FileType::from_raw_mode(found.stx_mode.into()) {
            FileType::RegularFile if found.stx_nlink == 1 => {}
            FileType::RegularFile => return Err(Reason::OtherNames),
            FileType::Symlink => return Err(Reason::Link),
            _ => return Err(Reason::NotAFile),
        }
        let descriptor = open(name_of(&place), OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
        let magic = fstatfs(&descriptor)?.f_type as u64;
        if ![MAGIC_EXT, MAGIC_XFS].contains(&magic) {
            return Err(Reason::FileSystem);
        }
        let device = DeviceNumber { major: found.stx_dev_major, minor: found.stx_dev_minor };
        let born = (found.stx_btime.tv_sec, found.stx_btime.tv_nsec);
        let identity = Identity { device, inode: found.stx_ino, born };
        Ok(Self { descriptor, identity, is_xfs: magic == MAGIC_XFS })
    }

    /// Its path with every link followed.
    pub(super) fn real_path(&self) -> Result<PathBuf, Reason> {
        let path = readlink(name_of(&self.descriptor), Vec::new())?;
        Ok(OsString::from_vec(path.into_bytes()).into())
    }

    /// Where its file system lies, if any of that is part of `volumes`.
    pub(super) fn window(&self, volumes: &[Option<Window>]) -> Result<Window, Reason> {
        let number = self.identity.device;
        let window = Window::of_number(number)?;
        if volumes.iter().flatten().any(|volume| window.overlaps(volume)) {
            Ok(window)
        } else if is_stacked(number) {
            Err(Reason::Stacked(number))
        } else {
            Err(Reason::Elsewhere(number))
        }
    }

    /// What of its device holds its content.
    pub(super) fn pieces(&self) -> Result<Pieces, Reason> {
        if self.is_xfs && fiemap::is_realtime(self.descriptor.as_fd())? {
            return Err(Reason::Realtime);
        }
        Ok(fiemap::pieces(self.descriptor.as_fd())?)
    }
}

/// The name by which this process finds a file that it has open.
fn name_of(file: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files are made on a real file system")]
mod tests {
    use super::*;

    #[test]
    fn only_a_file_with_one_name_may_be_left_out() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let reason = |name: &str| File::open(&path(name)).err().map(|reason| reason.to_string());
        assert_eq!(reason("none").as_deref(), Some("it does not exist"));
        std::fs::write(path("file"), [1; 5000]).expect("written");
        assert_eq!(reason("file/below").as_deref(), Some("it does not exist"));
        std::os::unix::fs::symlink(path("file"), path("link")).expect("a link");
        assert_eq!(reason("link").as_deref(), Some("it is a symbolic link; name the file itself"));
        assert_eq!(reason("").as_deref(), Some("it is not a regular file"));
        let only = "only files on ext2, ext3, ext4 and XFS can be left out";
        assert!(reason("file").is_none_or(|reason| reason == only));
        if let Ok(file) = File::open(&path("file")) {
            assert_eq!(file.real_path().expect("a path"), path("file").canonicalize().expect("a path"));
            assert!(file.window(&[]).is_err_and(|reason| reason.to_string().starts_with("it lies elsewhere")));
            assert_eq!(file.identity, File::open(&path("file")).expect("again").identity);
        }
        std::fs::hard_link(path("file"), path("other")).expect("another name");
        assert_eq!(reason("file").as_deref(), Some("it has other names too (hard links)"));
        assert_eq!(File::open(Path::new("/dev/null")).err().map(|reason| reason.to_string()), reason(""));
    }
}
