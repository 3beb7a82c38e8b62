//! Where something goes: a name within a folder that is open.
//!
//! Invariant: a name is one part of a path, and no link is followed. A file stands under a name of ours until it is published, and vanishes with
//! `Partial` where it is not.

use super::CopyError;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::sync::atomic::{AtomicU64, Ordering};

/// Names that are tried for an unfinished file.
const TRIES_MAX: u32 = 1000;

/// A name in a folder.
pub(crate) struct Place<'a> {
    /// The folder.
    pub(crate) folder: &'a OwnedFd,
    /// The name.
    pub(crate) name: &'a [u8],
}

impl Place<'_> {
    /// Whether something has the name.
    pub(crate) fn is_taken(&self) -> bool {
        rustix::fs::statat(self.folder, self.name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Makes a folder; with `force` one that is there will do.
    pub(super) fn make_folder(&self, force: bool, mode: Mode) -> Result<OwnedFd, CopyError> {
        match rustix::fs::mkdirat(self.folder, self.name, mode) {
            Err(Errno::EXIST) if force => {}
            other => other.map_err(CopyError::write(self.name))?,
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(self.folder, self.name, flags, Mode::empty()).map_err(|errno| match errno {
            // A file, or a link, which may lead anywhere.
            Errno::NOTDIR | Errno::LOOP => CopyError::Exists(self.name.to_vec()),
            other => CopyError::write(self.name)(other),
        })
    }
}

/// An unfinished file or link.
pub(super) struct Partial<'a> {
    place: &'a Place<'a>,
    name: String,
    file: Option<OwnedFd>,
    is_published: bool,
}

impl<'a> Partial<'a> {
    /// Makes an unfinished file.
    pub(super) fn make(place: &'a Place<'a>, mode: Mode) -> Result<Self, CopyError> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let (name, file) = named(place, |name| rustix::fs::openat(place.folder, name, flags, mode))?;
        Ok(Self { place, name, file: Some(file), is_published: false })
    }

    /// Makes a symbolic link.
    pub(super) fn make_link(place: &'a Place<'a>, target: &[u8]) -> Result<Self, CopyError> {
        let (name, ()) = named(place, |name| rustix::fs::symlinkat(target, place.folder, name))?;
        Ok(Self { place, name, file: None, is_published: false })
    }

    /// The file.
    pub(super) fn file(&self) -> &OwnedFd {
        self.file.as_ref().expect("asked of files only")
    }

    /// Its name for the time being.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Gives it its name.
    pub(super) fn publish(mut self, force: bool) -> Result<(), CopyError> {
        let (folder, name) = (self.place.folder, self.place.name);
        let flags = if force { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        let renamed = match rustix::fs::renameat_with(folder, &self.name, folder, name, flags) {
            // Where the file system cannot: what is seen now has to do.
            Err(Errno::INVAL | Errno::NOSYS) if !self.place.is_taken() => {
                rustix::fs::renameat(folder, &self.name, folder, name)
            }
            Err(Errno::INVAL | Errno::NOSYS | Errno::ISDIR | Errno::NOTDIR) => Err(Errno::EXIST),
            other => other,
        };
        renamed.map_err(CopyError::write(name))?;
        self.is_published = true;
        Ok(())
    }
}

impl Drop for Partial<'_> {
    fn drop(&mut self) {
        if !self.is_published
            && let Err(error) = rustix::fs::unlinkat(self.place.folder, &self.name, AtFlags::empty())
        {
            tracing::warn!(name = self.name, %error, "an unfinished file is left behind");
        }
    }
}

/// Makes something under a name that nothing has.
fn named<T>(place: &Place<'_>, make: impl Fn(&str) -> Result<T, Errno>) -> Result<(String, T), CopyError> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    for _ in 0..TRIES_MAX {
        let name = format!(".cdp-files.{}.{}.partial", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        match make(&name) {
            Err(Errno::EXIST) => {}
            other => return Ok((name, other.map_err(CopyError::write(place.name))?)),
        }
    }
    Err(CopyError::write(place.name)(Errno::EXIST))
}
