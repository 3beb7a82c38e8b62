//! Files of a point, copied to a folder of this machine.
//!
//! Invariant: nothing is written outside of the destination, whatever names and links a file system has: each folder is made or opened by its
//! one name within the one above, without following links, and each file is written under a name of ours and gets its own once it is whole.
//! Nothing that is there is overwritten without being told to. Given up half-way, the unfinished file vanishes; what is whole stays.

mod dress;
mod place;

use super::error::TreeError;
use super::name::{is_safe_name, shown};
use super::tree::{DEPTH_MAX, Entry, Item, Kind, Node, Piece};
use dress::{Dress, attributes, times};
use place::Partial;
pub(crate) use place::Place;
use rustix::fd::OwnedFd;
use rustix::fs::AtFlags;
use rustix::io::Errno;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes that are read at once.
const BUFFER_BYTES: usize = 1 << 20;
/// Zeros of that many bytes, where they begin at a multiple of it, are left out of a file.
const HOLE_BYTES: usize = 4096;

/// Why something could not be copied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    /// It cannot be read.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// Something has its name.
    #[error("`{}` exists", shown(.0))]
    Exists(Vec<u8>),
    /// No file here may have such a name.
    #[error("`{}` is no name that a file may have here", shown(.0))]
    Name(Vec<u8>),
    /// A folder was named, without saying that all in it is meant.
    #[error("it is a folder")]
    Folder,
    /// It cannot be written.
    #[error("write `{}`", shown(.name))]
    Write {
        /// Its name.
        name: Vec<u8>,
        /// What the system said.
        source: io::Error,
    },
}

impl CopyError {
    /// Whether there is no use in going on with others.
    fn is_final(&self) -> bool {
        match self {
            Self::Tree(TreeError::Interrupted) => true,
            Self::Write { source, .. } => {
                use io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
                matches!(source.kind(), StorageFull | QuotaExceeded | ReadOnlyFilesystem)
            }
            _ => false,
        }
    }

    fn write(name: &[u8]) -> impl FnOnce(Errno) -> Self {
        let name = name.to_vec();
        move |errno| match errno {
            Errno::EXIST => Self::Exists(name),
            other => Self::Write { name, source: other.into() },
        }
    }
}

/// What was copied, and what was not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Copied {
    /// Files.
    pub(crate) files: u64,
    /// Folders.
    pub(crate) folders: u64,
    /// Symbolic links.
    pub(crate) links: u64,
    /// Bytes of the files.
    pub(crate) bytes: u64,
    /// Files, folders and links that could not be copied, each of which was told.
    pub(crate) failed: u64,
    /// Devices, sockets and pipes, which are left out.
    pub(crate) special: u64,
    /// Files and folders of which extended attributes or access lists were left out.
    pub(crate) without_attributes: u64,
    /// Files and folders that belong to another here than there.
    pub(crate) without_owner: u64,
}

/// A copy under way.
pub(crate) struct Copying<'a> {
    /// Whether what is there may be replaced.
    pub(crate) force: bool,
    /// Whether folders are copied with what is in them.
    pub(crate) recursive: bool,
    /// Whether files can be given to others.
    pub(crate) is_root: bool,
    /// Ends it where it turns true.
    pub(crate) stop: &'a AtomicBool,
    /// Told of bytes.
    pub(crate) progress: &'a dyn Fn(u64),
    /// Told of what could not be copied.
    pub(crate) failed: &'a dyn Fn(&[u8], &CopyError),
    /// What was done.
    pub(crate) copied: Copied,
    /// How many folders it is in.
    pub(crate) depth: usize,
}

impl Copying<'_> {
    /// Copies an item to a place. What of a folder cannot be copied is told, and the rest is.
    ///
    /// # Errors
    /// Where it cannot be copied, or nothing more can.
    pub(crate) fn copy(&mut self, item: &Item, path: &[u8], place: &Place<'_>) -> Result<(), CopyError> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(TreeError::Interrupted.into());
        }
        let node = item.node()?;
        match node.kind {
            Kind::File => self.file(item, &node, place),
            Kind::Folder if !self.recursive => Err(CopyError::Folder),
            Kind::Folder => self.folder(item, path, &node, place),
            Kind::Link => self.link(item, &node, place),
            Kind::Special(_) => {
                self.copied.special += 1;
                Ok(())
            }
        }
    }

    fn folder(&mut self, item: &Item, path: &[u8], node: &Node, place: &Place<'_>) -> Result<(), CopyError> {
        if self.depth >= DEPTH_MAX {
            return Err(TreeError::TooDeep(DEPTH_MAX).into());
        }
        self.depth += 1;
        let copied = self.folder_within(item, path, node, place);
        self.depth -= 1;
        copied
    }

    fn folder_within(&mut self, item: &Item, path: &[u8], node: &Node, place: &Place<'_>) -> Result<(), CopyError> {
        let entries = item.list()?;
        let folder = place.make_folder(self.force, Dress::of(node, self.is_root).making())?;
        for Entry { name, item } in entries {
            let below = [path, b"/", &name].concat();
            let copied = if is_safe_name(&name) {
                self.copy(&item, &below, &Place { folder: &folder, name: &name })
            } else {
                Err(CopyError::Name(name))
            };
            match copied {
                Err(error) if error.is_final() => return Err(error),
                Err(error) => {
                    self.copied.failed += 1;
                    (self.failed)(&below, &error);
                }
                Ok(()) => {}
            }
        }
        self.dress(item, node, &folder, place.name)?;
        self.copied.folders += 1;
        Ok(())
    }

    fn file(&mut self, item: &Item, node: &Node, place: &Place<'_>) -> Result<(), CopyError> {
        let mut content = item.content()?;
        let partial = Partial::make(place, Dress::of(node, self.is_root).making())?;
        let (mut buffer, mut at) = (vec![0; BUFFER_BYTES], 0);
        let failed = || CopyError::write(place.name);
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(TreeError::Interrupted.into());
            }
            let len = match content.next(&mut buffer)? {
                Piece::End => break,
                Piece::Hole(len) => len,
                Piece::Bytes(len) => {
                    write_sparse(partial.file(), at, &buffer[..len]).map_err(failed())?;
                    (self.progress)(len as u64);
                    len as u64
                }
            };
            at += len;
        }
        rustix::fs::ftruncate(partial.file(), at).map_err(failed())?;
        self.dress(item, node, partial.file(), place.name)?;
        partial.publish(self.force)?;
        self.copied.files += 1;
        self.copied.bytes += at;
        Ok(())
    }

    fn link(&mut self, item: &Item, node: &Node, place: &Place<'_>) -> Result<(), CopyError> {
        let target = item.link()?;
        if target.is_empty() || target.contains(&0) {
            return Err(TreeError::Damaged("the link leads to no name".into()).into());
        }
        let partial = Partial::make_link(place, &target)?;
        let dress = Dress::of(node, self.is_root);
        if let Some((user, group)) = dress.owner() {
            let given =
                rustix::fs::chownat(place.folder, partial.name(), Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW);
            given.map_err(CopyError::write(place.name))?;
        }
        // A file system without times of links is none to give up for.
        let _ = rustix::fs::utimensat(place.folder, partial.name(), &times(node), AtFlags::SYMLINK_NOFOLLOW);
        partial.publish(self.force)?;
        self.copied.links += 1;
        Ok(())
    }

    /// Gives a file or folder its owner, its mode, its attributes and its times.
    fn dress(&mut self, item: &Item, node: &Node, file: &OwnedFd, name: &[u8]) -> Result<(), CopyError> {
        let dress = Dress::of(node, self.is_root);
        if let Some((user, group)) = dress.owner() {
            rustix::fs::fchown(file, Some(user), Some(group)).map_err(CopyError::write(name))?;
        } else {
            self.copied.without_owner += 1;
        }
        rustix::fs::fchmod(file, dress.mode()).map_err(CopyError::write(name))?;
        if !attributes(item, file)? {
            self.copied.without_attributes += 1;
        }
        rustix::fs::futimens(file, &times(node)).map_err(CopyError::write(name))
    }
}

/// Writes bytes at an offset, and leaves out whole blocks of zeros.
fn write_sparse(file: &OwnedFd, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
    let (mut at, mut from) = (0, None);
    while at < bytes.len() {
        let len = (HOLE_BYTES - (offset as usize + at) % HOLE_BYTES).min(bytes.len() - at);
        let is_hole = len == HOLE_BYTES && bytes[at..at + len].iter().all(|byte| *byte == 0);
        if let Some(start) = from.filter(|_| is_hole) {
            write_all(file, offset + start as u64, &bytes[start..at])?;
            from = None;
        } else if !is_hole {
            from = from.or(Some(at));
        }
        at += len;
    }
    from.map_or(Ok(()), |start| write_all(file, offset + start as u64, &bytes[start..]))
}

fn write_all(file: &OwnedFd, mut offset: u64, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, offset) {
            Ok(0) => return Err(Errno::IO),
            Ok(len) => (offset, bytes) = (offset + len as u64, &bytes[len..]),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
