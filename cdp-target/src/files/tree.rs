//! A mounted file system, without a way out of it.
//!
//! Invariant: every path is resolved by the kernel as if the mount's top were the root of all (`openat2` with `RESOLVE_IN_ROOT`): no link, no
//! `..` and no mount leads out. An entry of a folder is opened by its one name, and no link is followed for it.

use super::error::TreeError;
use rustix::fd::OwnedFd;
use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, SeekFrom, Stat, Timespec};
use rustix::io::Errno;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;

/// Folders that lie in one another, at most: each is kept open.
pub(crate) const DEPTH_MAX: usize = 200;
/// How often an opening is tried that something else came in between.
const OPEN_TRIES: usize = 1000;
/// Entries of a folder, at most: more are a damaged file system.
const ENTRIES_MAX: usize = 8 << 20;
/// Bytes of all names of a node's attributes, or of one value, at most: the kernel's own bound.
const ATTRIBUTE_BYTES_MAX: usize = 64 << 10;

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A device, a socket, and the like.
    Special(&'static str),
}

/// What is known of a file, a folder, a link.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Node {
    /// What it is.
    pub(crate) kind: Kind,
    /// Bytes of its content.
    pub(crate) size_bytes: u64,
    /// Permissions.
    pub(crate) mode: u32,
    /// User and group.
    pub(crate) owner: (u32, u32),
    /// When its content was changed.
    pub(crate) modified: Timespec,
    /// When its content was read.
    pub(crate) accessed: Timespec,
}

/// A mounted file system.
pub(crate) struct Tree(Rc<OwnedFd>);

impl Tree {
    /// The file system that is mounted at a folder.
    pub(super) fn open(at: &Path) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(at, flags, Mode::empty()).map(|root| Self(Rc::new(root)))
    }

    /// What a path names, from the top; links are followed.
    ///
    /// # Errors
    /// Where there is none, or a folder on the way cannot be read.
    pub(crate) fn find(&self, path: &[u8]) -> Result<Item, TreeError> {
        self.item(path, true)
    }

    /// The same; but a link that leads nowhere is itself.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn find_or_link(&self, path: &[u8]) -> Result<Item, TreeError> {
        match self.item(path, true) {
            Err(TreeError::NotFound | TreeError::Links) => self.item(path, false),
            found => found,
        }
    }

    fn item(&self, path: &[u8], follows: bool) -> Result<Item, TreeError> {
        let path = if path.is_empty() { b"." } else { path };
        let item = Item { above: Rc::clone(&self.0), path: path.to_vec(), follows };
        item.node().map(|_| item)
    }
}

/// Something of a mounted file system: how it is found from an open folder.
pub(crate) struct Item {
    above: Rc<OwnedFd>,
    path: Vec<u8>,
    follows: bool,
}

/// An extended attribute: its name as the kernel says it, and its value.
pub(crate) type Attribute = (Vec<u8>, Vec<u8>);

impl Item {
    fn open(&self, flags: OFlags) -> Result<OwnedFd, TreeError> {
        let follow = if self.follows { OFlags::empty() } else { OFlags::NOFOLLOW };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        let flags = flags | follow | OFlags::CLOEXEC;
        // Where anything of this machine is renamed or mounted meanwhile, the kernel cannot vouch for a `..` and wants to be asked again.
        let mut opened = Err(Errno::AGAIN);
        for _ in 0..OPEN_TRIES {
            opened = rustix::fs::openat2(&*self.above, &self.path, flags, Mode::empty(), resolve);
            if !matches!(opened, Err(Errno::AGAIN)) {
                break;
            }
        }
        opened.map_err(TreeError::of("it cannot be opened"))
    }

    /// What it is.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub(crate) fn node(&self) -> Result<Node, TreeError> {
        let opened = self.open(OFlags::PATH)?;
        let stat = rustix::fs::fstat(&opened).map_err(TreeError::of("it cannot be looked at"))?;
        Ok(Node {
            kind: kind(&stat),
            size_bytes: stat.st_size as u64,
            mode: stat.st_mode & 0o7777,
            owner: (stat.st_uid, stat.st_gid),
            modified: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
            accessed: Timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec as _ },
        })
    }

    /// A folder's entries with their names, in the order of these, without `.` and `..`.
    ///
    /// # Errors
    /// Where it is none, or cannot be read.
    pub(crate) fn list(&self) -> Result<Vec<Entry>, TreeError> {
        let folder = Rc::new(self.open(OFlags::RDONLY | OFlags::DIRECTORY)?);
        let cannot = || TreeError::of("it cannot be listed");
        let mut names = Vec::new();
        for entry in Dir::read_from(&*folder).map_err(cannot())? {
            let entry = entry.map_err(cannot())?;
            let name = entry.file_name().to_bytes();
            if !matches!(name, b"." | b"..") {
                names.push(name.to_vec());
            }
            if names.len() > ENTRIES_MAX {
                return Err(TreeError::Damaged("there are too many files in a folder".into()));
            }
        }
        names.sort_unstable();
        let entry = |name: Vec<u8>| {
            let item = Self { above: Rc::clone(&folder), path: name.clone(), follows: false };
            Entry { name, item }
        };
        Ok(names.into_iter().map(entry).collect())
    }

    /// What a symbolic link says.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub(crate) fn link(&self) -> Result<Vec<u8>, TreeError> {
        let link = self.open(OFlags::PATH)?;
        let target = rustix::fs::readlinkat(&link, "", Vec::new());
        Ok(target.map_err(TreeError::of("it cannot be read"))?.into_bytes())
    }

    /// A file's content.
    ///
    /// # Errors
    /// Where it is no file, or cannot be read.
    pub(crate) fn content(&self) -> Result<Content, TreeError> {
        let node = self.node()?;
        match node.kind {
            Kind::File => {
                let file = self.open(OFlags::RDONLY)?.into();
                Ok(Content { file, size_bytes: node.size_bytes, at: 0, data_end: 0 })
            }
            Kind::Folder => Err(TreeError::IsAFolder),
            Kind::Link => Err(TreeError::Special("a symbolic link")),
            Kind::Special(what) => Err(TreeError::Special(what)),
        }
    }

    /// The extended attributes of a file or folder.
    ///
    /// # Errors
    /// Where they cannot be read.
    pub(crate) fn attributes(&self) -> Result<Vec<Attribute>, TreeError> {
        let file = self.open(OFlags::RDONLY | OFlags::NONBLOCK)?;
        let mut names = vec![0; ATTRIBUTE_BYTES_MAX];
        let len = match rustix::fs::flistxattr(&file, &mut names) {
            Err(Errno::NOTSUP) => 0,
            listed => listed.map_err(TreeError::of("its attributes cannot be listed"))?,
        };
        let mut attributes = Vec::new();
        for name in names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let mut value = vec![0; ATTRIBUTE_BYTES_MAX];
            let len = rustix::fs::fgetxattr(&file, name, &mut value);
            value.truncate(len.map_err(TreeError::of("an attribute cannot be read"))?);
            attributes.push((name.to_vec(), value));
        }
        Ok(attributes)
    }
}

/// An entry of a folder.
pub(crate) struct Entry {
    /// Its name.
    pub(crate) name: Vec<u8>,
    /// What it names.
    pub(crate) item: Item,
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

/// A piece of a file's content, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// So many bytes of the buffer.
    Bytes(usize),
    /// So many zeros, which take no room.
    Hole(u64),
    /// There is no more.
    End,
}

/// A file's content, from its beginning.
pub(crate) struct Content {
    file: File,
    size_bytes: u64,
    at: u64,
    /// Up to where there is no hole.
    data_end: u64,
}

impl Content {
    /// The next piece: at most `buffer.len()` bytes, or a hole of any length.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub(crate) fn next(&mut self, buffer: &mut [u8]) -> Result<Piece, TreeError> {
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
        let len = (self.data_end.min(self.size_bytes) - self.at).min(buffer.len() as u64);
        match self.file.read_at(&mut buffer[..len as usize], self.at) {
            Ok(0) => Err(TreeError::Damaged("it is shorter than it says".into())),
            Ok(read) => {
                self.at += read as u64;
                Ok(Piece::Bytes(read))
            }
            Err(error) => {
                let errno = error.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error);
                Err(TreeError::of(format!("byte {} of it cannot be read", self.at))(errno))
            }
        }
    }

    /// Bytes of the hole that begins here.
    fn hole(&mut self) -> Result<u64, TreeError> {
        let cannot = || TreeError::of("its holes cannot be told");
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(self.at)) {
            Err(Errno::NXIO) => return Ok(self.size_bytes - self.at),
            found => found.map_err(cannot())?,
        };
        if data >= self.size_bytes {
            return Ok(self.size_bytes - self.at);
        }
        let end = rustix::fs::seek(&self.file, SeekFrom::Hole(data)).map_err(cannot())?;
        self.data_end = end.max(data + 1);
        Ok(data - self.at)
    }
}
