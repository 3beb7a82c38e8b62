//! A client with its export: requests in, replies out.
//!
//! Some threads share a connection. One at a time reads a request; it lets the next one read before it works on it, so that as many
//! requests are under way as there are threads, and a thread is started only where all are busy. A client that does not read its
//! replies keeps its own threads waiting, and nobody else's. Content is worked on in parts of `PART_BYTES`, so what a connection takes
//! of memory does not follow from what its client asks for.

use super::ahead::Sequence;
use super::channel::{Channel, Reader, Sender};
use super::disk::{Disk, DiskError, Run};
use super::handshake::Served;
use super::reply::{self, Chunks};
use super::request::{self, Agreed, Kind, REQUEST_BYTES, Request};
use super::server::Shared;
use super::wire::{Errno, REQUEST_BYTES_MAX, command};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Scope;

/// Threads of a connection, at most.
const THREADS_MAX: usize = 8;
/// Bytes of content that a thread works on at once: two frames.
const PART_BYTES: u64 = 256 << 10;
/// Bytes of content that are put together before any of it is sent, where that has to be.
const WHOLE_BYTES_MAX: u64 = 1 << 20;

/// A connection whose client has its export.
pub(super) struct Connection<'a> {
    shared: &'a Shared,
    channel: &'a Channel,
    reader: Mutex<Reader>,
    disk: Arc<Disk>,
    agreed: Agreed,
    sequence: Mutex<Sequence>,
    threads: AtomicUsize,
    /// Threads that wait to read.
    waiting: AtomicUsize,
    has_ended: AtomicBool,
}

/// What a thread puts replies together in.
type Buffer = Vec<u8>;

impl<'a> Connection<'a> {
    pub(super) fn new(shared: &'a Shared, channel: &'a Channel, served: Served) -> Self {
        let Served { reader, disk, structured, allocation } = served;
        let agreed = Agreed { size_bytes: disk.size_bytes(), writable: disk.is_writable(), structured, allocation };
        Self {
            shared,
            channel,
            reader: Mutex::new(reader),
            disk,
            agreed,
            sequence: Mutex::default(),
            threads: AtomicUsize::new(1),
            waiting: AtomicUsize::new(0),
            has_ended: AtomicBool::new(false),
        }
    }

    /// Answers requests until the client ends, or breaks the rules; all that were taken are answered then.
    pub(super) fn run(&self) {
        std::thread::scope(|threads| self.work(threads));
    }

    fn work<'s>(&'s self, threads: &'s Scope<'s, '_>) {
        let mut buffer = Buffer::new();
        while !self.has_ended.load(Ordering::Acquire) {
            if let Err(error) = self.one(threads, &mut buffer) {
                self.has_ended.store(true, Ordering::Release);
                if error.kind() != io::ErrorKind::UnexpectedEof {
                    tracing::debug!(%error, export = self.disk.name(), "a connection ends");
                    // Whoever waits for its next request waits in vain.
                    self.channel.abort();
                }
            }
        }
    }

    /// Takes a request and answers it. An error ends the connection.
    fn one<'s>(&'s self, threads: &'s Scope<'s, '_>, buffer: &mut Buffer) -> io::Result<()> {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let reader = self.reader.lock();
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        let mut reader = reader.unwrap_or_else(PoisonError::into_inner);
        if self.has_ended.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut bytes = [0; REQUEST_BYTES];
        reader.read_exact(&mut bytes)?;
        let request = request::parse(&bytes).ok_or_else(|| io::Error::other("no request where one has to be"))?;
        let mut payload = Payload::None;
        if request.kind == Kind::Disconnect {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if request.kind == Kind::Write {
            payload = self.payload(&mut reader, &request)?;
        }
        drop(reader);
        self.start_another(threads);
        self.answer(&request, payload, buffer)
    }

    /// Starts a thread where none is left to read, and there may be one more.
    fn start_another<'s>(&'s self, threads: &'s Scope<'s, '_>) {
        if self.waiting.load(Ordering::Acquire) > 0 || self.threads.load(Ordering::Acquire) >= THREADS_MAX {
            return;
        }
        self.threads.fetch_add(1, Ordering::AcqRel);
        let started = std::thread::Builder::new().name("nbd".into()).spawn_scoped(threads, move || self.work(threads));
        if started.is_err() {
            // Those that there are do it.
            self.threads.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Takes what a write brings. Much of it is written as it comes, while nobody else reads; little is kept until the next one does.
    fn payload(&self, reader: &mut Reader, request: &Request) -> io::Result<Payload> {
        if request.payload_bytes() > REQUEST_BYTES_MAX {
            return Err(io::Error::other("a write of more than a request may have"));
        }
        let mut result = request.check(&self.agreed).map_err(|errno| refused(request, errno));
        let len = u64::from(request.len);
        let (mut done, mut content) = (0, Vec::new());
        while done < len {
            content.resize((len - done).min(WHOLE_BYTES_MAX) as usize, 0);
            reader.read_exact(&mut content)?;
            if len <= WHOLE_BYTES_MAX && result.is_ok() {
                return Ok(Payload::Content(content));
            }
            result = result.and_then(|()| self.disk.write(request.offset + done, &content));
            done += content.len() as u64;
        }
        Ok(Payload::Done(result))
    }

    fn answer(&self, request: &Request, payload: Payload, buffer: &mut Buffer) -> io::Result<()> {
        if let Err(errno) = request.check(&self.agreed) {
            return self.failed(request, &refused(request, errno), buffer);
        }
        let (offset, len) = (request.offset, u64::from(request.len));
        let disk = &self.disk;
        let done = match request.kind {
            Kind::Read => return self.read(request, buffer),
            Kind::BlockStatus => return self.status(request, buffer),
            Kind::Write => match payload {
                Payload::Content(content) => disk.write(offset, &content),
                Payload::Done(result) => result,
                Payload::None => Ok(()),
            },
            Kind::Trim => disk.trim(offset, len),
            Kind::WriteZeroes => self.write_zeroes(request),
            Kind::Cache => {
                self.shared.ahead.read(disk, offset, len.min(u64::from(REQUEST_BYTES_MAX)));
                Ok(())
            }
            Kind::Flush => disk.flush(),
            Kind::Disconnect | Kind::Unknown(_) => Ok(()),
        };
        let done = done.and_then(|()| if request.has(command::FUA) { disk.flush() } else { Ok(()) });
        match done {
            Ok(()) => self.channel.send(&reply::simple(request.cookie, Ok(()))),
            Err(error) => self.failed(request, &error, buffer),
        }
    }

    fn write_zeroes(&self, request: &Request) -> Result<(), DiskError> {
        let provision = request.has(command::NO_HOLE);
        if provision && request.has(command::FAST_ZERO) {
            return Err(refused(request, Errno::NotSupported));
        }
        self.disk.zero(request.offset, u64::from(request.len), provision)
    }

    fn failed(&self, request: &Request, error: &DiskError, buffer: &mut Buffer) -> io::Result<()> {
        if !self.agreed.structured {
            return self.channel.send(&reply::simple(request.cookie, Err(error.errno)));
        }
        // Content is missing from somewhere on; whatever else failed did so as a whole.
        let within = request.offset..request.offset.saturating_add(u64::from(request.len));
        let offset = Some(error.offset)
            .filter(|offset| error.errno == Errno::Io && request.kind == Kind::Read && within.contains(offset));
        reply::failed(buffer, request.cookie, error.errno, &error.reason, offset);
        self.channel.send(buffer)
    }

    fn status(&self, request: &Request, buffer: &mut Buffer) -> io::Result<()> {
        match self.disk.status(request.offset, u64::from(request.len)) {
            Ok(mut runs) => {
                if request.has(command::REQ_ONE) {
                    runs.truncate(1);
                }
                reply::status(buffer, request.cookie, &runs);
                self.channel.send(buffer)
            }
            Err(error) => self.failed(request, &error, buffer),
        }
    }

    fn read(&self, request: &Request, buffer: &mut Buffer) -> io::Result<()> {
        let (offset, len) = (request.offset, u64::from(request.len));
        let ahead = self.sequence.lock().unwrap_or_else(PoisonError::into_inner).read(offset, len);
        if let Some((from, len)) = ahead {
            self.shared.ahead.read(&self.disk, from, len);
        }
        match (self.agreed.structured, request.has(command::DF)) {
            (true, true) if len > WHOLE_BYTES_MAX => self.failed(request, &refused(request, Errno::Overflow), buffer),
            (true, true) => self.read_part(request, offset, len, Zeros::AsContent, buffer),
            (true, false) => self.read_structured(request, buffer),
            (false, _) => self.read_simple(request, buffer),
        }
    }

    fn read_structured(&self, request: &Request, buffer: &mut Buffer) -> io::Result<()> {
        let end = request.offset + u64::from(request.len);
        let mut at = request.offset;
        loop {
            let len = (end - at).min(PART_BYTES);
            self.read_part(request, at, len, Zeros::AsHoles, buffer)?;
            at += len;
            // A reply that has failed says so in its last chunk.
            if at >= end || buffer.is_empty() {
                return Ok(());
            }
        }
    }

    /// Sends the chunks of a part; leaves `buffer` empty where it failed.
    fn read_part(&self, request: &Request, offset: u64, len: u64, zeros: Zeros, buffer: &mut Buffer) -> io::Result<()> {
        let is_end = offset + len == request.offset + u64::from(request.len);
        let mut chunks = Chunks::new(buffer, request.cookie, offset);
        let read = self.disk.read(offset, len, &mut |run| match (run, zeros) {
            (Run::Bytes(bytes), _) => chunks.content(bytes),
            (Run::Zeros(len), Zeros::AsHoles) => chunks.zeros(len),
            (Run::Zeros(len), Zeros::AsContent) => chunks.zeros_as_content(len),
        });
        match read {
            Ok(()) => {
                chunks.finish(is_end);
                self.channel.send(buffer)
            }
            Err(error) => {
                self.failed(request, &error, buffer)?;
                buffer.clear();
                Ok(())
            }
        }
    }

    /// A simple reply says first that all is well, and cannot take that back: what is too much to be put together is read twice.
    fn read_simple(&self, request: &Request, buffer: &mut Buffer) -> io::Result<()> {
        let (offset, len) = (request.offset, u64::from(request.len));
        let header = reply::simple(request.cookie, Ok(()));
        if len <= WHOLE_BYTES_MAX {
            buffer.clear();
            buffer.extend(header);
            return match self.gather(offset, len, buffer) {
                Ok(()) => self.channel.send(buffer),
                Err(error) => self.failed(request, &error, buffer),
            };
        }
        for (at, len) in parts(offset, len) {
            if let Err(error) = self.disk.read(at, len, &mut |_| {}) {
                return self.failed(request, &error, buffer);
            }
        }
        let sender = self.channel.sender();
        sender.send(&header)?;
        parts(offset, len).try_for_each(|(at, len)| self.send_part(&sender, at, len, buffer))
    }

    fn send_part(&self, sender: &Sender<'_>, offset: u64, len: u64, buffer: &mut Buffer) -> io::Result<()> {
        buffer.clear();
        self.gather(offset, len, buffer).map_err(|error| io::Error::other(error.reason))?;
        sender.send(buffer)
    }

    fn gather(&self, offset: u64, len: u64, buffer: &mut Buffer) -> Result<(), DiskError> {
        self.disk.read(offset, len, &mut |run| match run {
            Run::Bytes(bytes) => buffer.extend_from_slice(bytes),
            Run::Zeros(len) => buffer.resize(buffer.len() + len as usize, 0),
        })
    }
}

/// How zeros are sent.
#[derive(Clone, Copy)]
enum Zeros {
    AsHoles,
    AsContent,
}

/// What a write has brought.
enum Payload {
    /// It is no write.
    None,
    /// Its content, which may be written.
    Content(Vec<u8>),
    /// Its content was read, and this came of it.
    Done(Result<(), DiskError>),
}

/// Bytes in parts of `PART_BYTES`.
fn parts(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + len;
    (offset..end).step_by(PART_BYTES as usize).map(move |at| (at, PART_BYTES.min(end - at)))
}

/// What a client is told that may not ask what it asks.
fn refused(request: &Request, errno: Errno) -> DiskError {
    let reason = match errno {
        Errno::NotPermitted => "the export is read-only",
        Errno::NoSpace => "the request goes beyond the end of the export",
        Errno::Overflow => "the request is for more than is given at once",
        Errno::NotSupported => "zeros that have room on the disk are not made fast",
        Errno::Io | Errno::Invalid => "the request goes beyond the end, or its command or a flag is not known here",
    };
    DiskError { errno, offset: request.offset, reason: reason.to_owned() }
}
