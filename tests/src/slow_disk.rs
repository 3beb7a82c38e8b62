//! A disk that takes its time for writes, and none for reads: a loop device over a file that is answered late.
//!
//! Owns a FUSE file system of one file, kept in memory. A write (and a hole punched) is answered a fixed time after it came in;
//! a read is answered at once from what has landed. Where writes land when they are answered, what was issued last is read
//! as it was before, for milliseconds; where they land when they come in, it is read long before it completes. What a busy disk
//! does rarely, this one does with every write.

use crate::loop_device::LoopDevice;
use anyhow::{Context, Result};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, WriteFlags,
};
use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, RwLock};
use std::thread::{JoinHandle, park_timeout};
use std::time::{Duration, Instant, UNIX_EPOCH};

const FILE: INodeNo = INodeNo(2);
const FILE_NAME: &str = "disk.img";
/// Nobody changes attributes.
const TTL: Duration = Duration::from_secs(3600);
/// Requests that the kernel keeps waiting for at most; it counts writes and reads together.
const BACKGROUND_MAX: u16 = 512;
/// Threads that take requests.
const THREADS: usize = 2;

/// When a write lands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landing {
    /// When it is answered: reads overtake it.
    WithAnswer,
    /// When it comes in: it is read before it has completed.
    AtOnce,
}

/// The loop device, the file system below it, and the line that delays writes.
pub struct SlowDisk {
    device: Option<LoopDevice>,
    session: Option<BackgroundSession>,
    line: Option<JoinHandle<()>>,
}

impl SlowDisk {
    /// A disk of `size_bytes` zeros whose writes take `latency` and land when `landing` says, below `folder`.
    pub fn new(folder: &Path, size_bytes: u64, latency: Duration, landing: Landing) -> Result<Self> {
        let content = Arc::new(RwLock::new(vec![0; size_bytes as usize]));
        let (sender, receiver) = channel();
        let landed = Arc::clone(&content);
        let line = std::thread::spawn(move || land(&receiver, &landed, latency));
        let file = SlowFile { content, size_bytes, landing, line: sender };
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("cdp-slow-disk".to_owned())];
        config.n_threads = Some(THREADS);
        let mounted = folder.join("slow");
        std::fs::create_dir_all(&mounted)?;
        let session = fuser::spawn_mount(file, &mounted, &config).context("mount the slow file system")?;
        let mut disk = Self { device: None, session: Some(session), line: Some(line) };
        disk.device = Some(LoopDevice::attach(&mounted.join(FILE_NAME))?);
        Ok(disk)
    }

    /// The loop device's node.
    #[must_use]
    pub fn node(&self) -> &Path {
        self.device.as_ref().expect("it goes when the disk goes").node()
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        if let Some(device) = self.device.take() {
            // The file system cannot be unmounted while the kernel holds the file.
            let _ = device.detach();
        }
        if let Some(session) = self.session.take() {
            let _ = session.umount_and_join();
        }
        if let Some(line) = self.line.take() {
            let _ = line.join();
        }
    }
}

/// A change on its way.
struct Late {
    since: Instant,
    change: Change,
    answer: Answer,
}

struct Change {
    offset: usize,
    len: usize,
    /// Zeros where there are none.
    bytes: Option<Vec<u8>>,
    has_landed: bool,
}

enum Answer {
    Written(u32, ReplyWrite),
    Done(ReplyEmpty),
}

impl Change {
    fn land(&mut self, content: &RwLock<Vec<u8>>) {
        if std::mem::replace(&mut self.has_landed, true) {
            return;
        }
        let mut content = content.write().expect("no holder panics");
        let end = content.len().min(self.offset + self.len);
        let Some(place) = content.get_mut(self.offset..end) else { return };
        match &self.bytes {
            Some(bytes) => place.copy_from_slice(&bytes[..place.len()]),
            None => place.fill(0),
        }
    }
}

/// Lets changes land that have not, and answers them, in the order they came, each when its time is over.
fn land(line: &Receiver<Late>, content: &RwLock<Vec<u8>>, latency: Duration) {
    for mut late in line {
        let due = late.since + latency;
        while let Some(left) = due.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            park_timeout(left);
        }
        late.change.land(content);
        match late.answer {
            Answer::Written(len, reply) => reply.written(len),
            Answer::Done(reply) => reply.ok(),
        }
    }
}

struct SlowFile {
    content: Arc<RwLock<Vec<u8>>>,
    size_bytes: u64,
    landing: Landing,
    line: Sender<Late>,
}

impl SlowFile {
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

    fn later(&self, mut change: Change, answer: Answer) {
        if self.landing == Landing::AtOnce {
            change.land(&self.content);
        }
        // The line ends after the file system that feeds it.
        let _ = self.line.send(Late { since: Instant::now(), change, answer });
    }
}

impl Filesystem for SlowFile {
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
        let content = self.content.read().expect("no holder panics");
        let start = content.len().min(offset as usize);
        let end = content.len().min(start + size as usize);
        reply.data(&content[start..end]);
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
        let change = Change { offset, len, bytes: Some(data.to_vec()), has_landed: false };
        self.later(change, Answer::Written(len as u32, reply));
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
        let change = Change { offset: offset as usize, len: length as usize, bytes: None, has_landed: false };
        self.later(change, Answer::Done(reply));
    }

    fn fsync(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn flush(&self, _request: &Request, _inode: INodeNo, _handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}
