//! A file whose reads, changes and syncs are answered by this program: what a disk does wrong, done on purpose.
//!
//! Owns a FUSE file system of one file, opened for direct I/O, so that a loop device over it sends every request here and its
//! flushes as syncs. What the file holds and when it answers is the `Backing`'s. The kernel holds the file while a loop
//! device stands on it: detach that first, then drop this.

use anyhow::{Context, Result};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

const FILE: INodeNo = INodeNo(2);
const FILE_NAME: &str = "disk.img";
/// Nobody changes attributes.
const TTL: Duration = Duration::from_secs(3600);
/// Requests that the kernel keeps waiting for at most; it counts writes and reads together.
const BACKGROUND_MAX: u16 = 512;
/// Threads that take requests.
const THREADS: usize = 2;

/// What the file is made of. Called by several threads at once.
pub trait Backing: Send + Sync + 'static {
    /// Gives `out` the bytes at `offset`, which lie within the file.
    fn read(&self, offset: usize, len: usize, out: &mut dyn FnMut(&[u8])) -> io::Result<()>;

    /// Takes a change, within the file, and answers it when it likes.
    fn change(&self, change: Change, answer: Answer);

    /// Makes durable what was answered before.
    fn sync(&self) -> io::Result<()>;
}

/// Bytes to be written, or a hole to be punched.
pub struct Change {
    /// Where.
    pub offset: usize,
    /// How many.
    pub len: usize,
    /// The bytes; zeros where there are none.
    pub bytes: Option<Vec<u8>>,
}

/// The answer that the kernel waits for.
pub enum Answer {
    /// To a write.
    Written(u32, ReplyWrite),
    /// To a hole that was punched.
    Done(ReplyEmpty),
}

impl Answer {
    /// It was done.
    pub fn done(self) {
        match self {
            Self::Written(len, reply) => reply.written(len),
            Self::Done(reply) => reply.ok(),
        }
    }

    /// It was not.
    pub fn failed(self) {
        match self {
            Self::Written(_, reply) => reply.error(Errno::EIO),
            Self::Done(reply) => reply.error(Errno::EIO),
        }
    }
}

/// The file system; unmounted when it is dropped.
pub struct FuseFile {
    session: Option<BackgroundSession>,
    path: PathBuf,
}

impl FuseFile {
    /// Mounts a file of `size_bytes` on `folder`, which is made.
    pub fn mount(folder: &Path, size_bytes: u64, backing: impl Backing) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("cdp-test-disk".to_owned())];
        config.n_threads = Some(THREADS);
        let served = Served { backing, size_bytes };
        let session = fuser::spawn_mount(served, folder, &config).context("mount the file system of one file")?;
        Ok(Self { session: Some(session), path: folder.join(FILE_NAME) })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for FuseFile {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            let _ = session.umount_and_join();
        }
    }
}

struct Served<B> {
    backing: B,
    size_bytes: u64,
}

impl<B: Backing> Served<B> {
    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, size, perm) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0, 0o700),
            FILE => (FileType::RegularFile, self.size_bytes, 0o600),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl<B: Backing> Filesystem for Served<B> {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without it the kernel waits for each direct request before it sends the next.
        let lacking = |_| io::Error::other("the kernel has no asynchronous direct I/O for FUSE");
        config.add_capabilities(InitFlags::FUSE_ASYNC_DIO).map_err(lacking)?;
        config.set_max_background(BACKGROUND_MAX).map_err(|_| io::Error::other("background requests"))?;
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(FILE).filter(|_| parent == INodeNo::ROOT && name == FILE_NAME) {
            Some(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&TTL, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _request: &Request, _inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
    }

    fn read(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let start = self.size_bytes.min(offset);
        let len = (self.size_bytes - start).min(u64::from(size));
        let mut reply = Some(reply);
        let read = self.backing.read(start as usize, len as usize, &mut |bytes| {
            if let Some(reply) = reply.take() {
                reply.data(bytes);
            }
        });
        if let (Err(_), Some(reply)) = (read, reply) {
            reply.error(Errno::EIO);
        }
    }

    fn write(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if offset + data.len() as u64 > self.size_bytes {
            return reply.error(Errno::ENOSPC);
        }
        let (offset, len) = (offset as usize, data.len());
        self.backing.change(Change { offset, len, bytes: Some(data.to_vec()) }, Answer::Written(len as u32, reply));
    }

    fn fallocate(
        &self,
        _request: &Request,
        _inode: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let zeroing = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::ZERO_RANGE;
        if mode.cast_unsigned() & zeroing.bits() == 0 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let start = self.size_bytes.min(offset);
        let len = (self.size_bytes - start).min(length) as usize;
        self.backing.change(Change { offset: start as usize, len, bytes: None }, Answer::Done(reply));
    }

    fn fsync(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        match self.backing.sync() {
            Ok(()) => reply.ok(),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn flush(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}
