//! A mounted file system as any other, without a way out of it.
//!
//! Invariant: no path is resolved through a symbolic link, and none leaves the mount: links are followed by whoever follows them in any
//! other file system, from the mount's own top.

use crate::files::tree::{Attribute, Content, ENTRIES_MAX, Entry, Id, Kind, Moment, Node, Piece, Tree, TreeError};
use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, SeekFrom, Stat};
use rustix::io::Errno;
use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

/// Bytes of all names of a node's attributes, or of one value, at most: the kernel's own bound.
const ATTRIBUTE_BYTES_MAX: usize = 64 << 10;
/// Bytes that are given at once, at most.
const PIECE_BYTES_MAX: usize = 1 << 20;

/// A mounted file system.
pub(crate) struct KernelTree {
    root: OwnedFd,
    /// What each node is called, and in which folder.
    names: RefCell<Vec<(Id, Vec<u8>)>>,
}

impl KernelTree {
    /// The file system whose topmost folder is `root`.
    pub(crate) fn new(root: OwnedFd) -> Self {
        Self { root, names: RefCell::new(vec![(0, b".".to_vec())]) }
    }

    fn path(&self, id: Id) -> Vec<u8> {
        let names = self.names.borrow();
        let (mut parts, mut at) = (Vec::new(), id);
        while at != 0 {
            let (above, name) = &names[at as usize];
            parts.push(name.as_slice());
            at = *above;
        }
        parts.push(b".");
        parts.reverse();
        parts.join(&b'/')
    }

    fn open_at(&self, id: Id, flags: OFlags) -> Result<OwnedFd, TreeError> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let opened = rustix::fs::openat2(&self.root, self.path(id), flags | OFlags::CLOEXEC, Mode::empty(), resolve);
        opened.map_err(|errno| match errno {
            Errno::NOENT => TreeError::NotFound,
            Errno::NOTDIR => TreeError::NotAFolder,
            Errno::LOOP => TreeError::Links,
            Errno::NOKEY => TreeError::Encrypted,
            other => cannot("it cannot be opened", other),
        })
    }

    fn stat(&self, id: Id) -> Result<Stat, TreeError> {
        let opened = self.open_at(id, OFlags::PATH | OFlags::NOFOLLOW)?;
        rustix::fs::fstat(&opened).map_err(|errno| cannot("it cannot be looked at", errno))
    }

    fn kind(&self, id: Id) -> Result<Kind, TreeError> {
        Ok(kind(&self.stat(id)?))
    }
}

/// What the kernel says when a block is missing, or makes no sense.
fn cannot(what: &str, errno: Errno) -> TreeError {
    match errno {
        Errno::IO | Errno::NODATA | Errno::UCLEAN | Errno::BADMSG => TreeError::Damaged(format!("{what}: {errno}")),
        other => TreeError::System(other.into()),
    }
}

fn kind(stat: &Stat) -> Kind {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Folder,
        FileType::Symlink => Kind::Link,
        FileType::BlockDevice => Kind::Special("a block device"),
        FileType::CharacterDevice => Kind::Special("a character device"),
        FileType::Fifo => Kind::Special("a named pipe"),
        _ => Kind::Special("a socket"),
    }
}

impl Tree for KernelTree {
    fn root(&self) -> Id {
        0
    }

    fn node(&self, id: Id) -> Result<Node, TreeError> {
        let stat = self.stat(id)?;
        let moment = |seconds, nanoseconds| Some(Moment { seconds, nanoseconds });
        Ok(Node {
            kind: kind(&stat),
            size_bytes: stat.st_size as u64,
            mode: Some(stat.st_mode & 0o7777),
            owner: Some((stat.st_uid, stat.st_gid)),
            modified: moment(stat.st_mtime, stat.st_mtime_nsec as u32),
            accessed: moment(stat.st_atime, stat.st_atime_nsec as u32),
            note: None,
        })
    }

    fn list(&self, id: Id) -> Result<Vec<Entry>, TreeError> {
        let folder = self.open_at(id, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut entries = Vec::new();
        for entry in Dir::new(folder).map_err(|errno| cannot("it cannot be listed", errno))? {
            let entry = entry.map_err(|errno| cannot("it cannot be listed", errno))?;
            let name = entry.file_name().to_bytes().to_vec();
            if matches!(name.as_slice(), b"." | b"..") {
                continue;
            }
            let mut names = self.names.borrow_mut();
            if names.len() >= 4 * ENTRIES_MAX {
                return Err(TreeError::Damaged("there are too many files".into()));
            }
            entries.push(Entry { name: name.clone(), short: None, id: names.len() as Id });
            names.push((id, name));
        }
        Ok(entries)
    }

    fn link(&self, id: Id) -> Result<Vec<u8>, TreeError> {
        let link = self.open_at(id, OFlags::PATH | OFlags::NOFOLLOW)?;
        let target = rustix::fs::readlinkat(&link, "", Vec::new());
        Ok(target.map_err(|errno| cannot("it cannot be read", errno))?.into_bytes())
    }

    fn open(&self, id: Id) -> Result<Box<dyn Content + '_>, TreeError> {
        match self.kind(id)? {
            Kind::File => {
                let file = self.open_at(id, OFlags::RDONLY | OFlags::NOFOLLOW)?;
                Ok(Box::new(Mounted {
                    size_bytes: self.stat(id)?.st_size as u64,
                    file: file.into(),
                    at: 0,
                    data_end: 0,
                }))
            }
            Kind::Folder => Err(TreeError::IsAFolder),
            Kind::Link => Err(TreeError::Special("a symbolic link")),
            Kind::Special(what) => Err(TreeError::Special(what)),
        }
    }

    fn attributes(&self, id: Id) -> Result<(Vec<Attribute>, bool), TreeError> {
        if !matches!(self.kind(id)?, Kind::File | Kind::Folder) {
            return Ok((Vec::new(), true));
        }
        let file = self.open_at(id, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK)?;
        let mut names = vec![0; ATTRIBUTE_BYTES_MAX];
        let len = match rustix::fs::flistxattr(&file, &mut names) {
            Err(Errno::NOTSUP) => 0,
            listed => listed.map_err(|errno| cannot("its attributes cannot be listed", errno))?,
        };
        let mut attributes = Vec::new();
        for name in names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let mut value = vec![0; ATTRIBUTE_BYTES_MAX];
            let len = rustix::fs::fgetxattr(&file, name, &mut value);
            value.truncate(len.map_err(|errno| cannot("an attribute cannot be read", errno))?);
            attributes.push((name.to_vec(), value));
        }
        Ok((attributes, true))
    }
}

/// A file's content.
struct Mounted {
    file: File,
    size_bytes: u64,
    at: u64,
    /// Up to where there is no hole.
    data_end: u64,
}

impl Mounted {
    /// Bytes of the hole that begins here.
    fn hole(&mut self) -> Result<u64, TreeError> {
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(self.at)) {
            Err(Errno::NXIO) => return Ok(self.size_bytes - self.at),
            found => found.map_err(|errno| cannot("its holes cannot be told", errno))?,
        };
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(data));
        self.data_end = end.map_err(|errno| cannot("its holes cannot be told", errno))?.max(data + 1);
        Ok(data.min(self.size_bytes) - self.at)
    }
}

impl Content for Mounted {
    fn next(&mut self, buffer: &mut [u8]) -> Result<Piece, TreeError> {
        if self.at >= self.size_bytes || buffer.is_empty() {
            return Ok(Piece::End);
        }
        if self.at >= self.data_end {
            let hole = self.hole()?;
            if hole > 0 {
                self.at += hole;
                return Ok(Piece::Hole(hole));
            }
        }
        let len = (self.data_end.min(self.size_bytes) - self.at).min(buffer.len().min(PIECE_BYTES_MAX) as u64);
        match self.file.read_at(&mut buffer[..len as usize], self.at) {
            Ok(0) => Err(TreeError::Damaged("it is shorter than it says".into())),
            Ok(read) => {
                self.at += read as u64;
                Ok(Piece::Bytes(read))
            }
            Err(error) => Err(unreadable(self.at, &error)),
        }
    }
}

fn unreadable(at: u64, error: &io::Error) -> TreeError {
    TreeError::Damaged(format!("byte {at} of it cannot be read: {error}"))
}
