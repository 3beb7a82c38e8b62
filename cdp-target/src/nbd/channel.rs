//! A connection's two directions, plain or through TLS: one reads at a time, one sends at a time, and the two do not wait for each
//! other.
//!
//! Invariant: what one call sends stands on the line in one piece. The state of TLS is locked to turn bytes into others, never to
//! wait for the peer; whoever sends holds the lock of sending first.

use super::socket::Socket;
use cdp_seams::clock::Clock;
use rustls::ServerConnection;
use rustls::pki_types::CertificateDer;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

/// Bytes that are read of the socket at once. A read of at least half as many goes past this buffer.
const BUFFER_BYTES: usize = 64 << 10;
/// Bytes that are turned into TLS records at once.
const RECORDS_BYTES: usize = 64 << 10;

/// A connection, shared by whoever reads and whoever sends.
pub(super) struct Channel {
    socket: Socket,
    tls: OnceLock<Mutex<ServerConnection>>,
    sending: Mutex<()>,
}

/// The right to send, until dropped.
pub(super) struct Sender<'a> {
    channel: &'a Channel,
    _sending: MutexGuard<'a, ()>,
}

/// The reading end.
pub(super) struct Reader {
    channel: Arc<Channel>,
    /// What was read of the socket, and from where to where it was not taken.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// When whoever does not say what is expected is given up.
    deadline: Option<(Arc<dyn Clock>, Duration)>,
}

impl Channel {
    pub(super) fn new(socket: Socket) -> Self {
        Self { socket, tls: OnceLock::new(), sending: Mutex::new(()) }
    }

    /// The right to send.
    pub(super) fn sender(&self) -> Sender<'_> {
        Sender { channel: self, _sending: self.sending.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    /// Sends bytes in one piece.
    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.sender().send(bytes)
    }

    /// The peer's certificate, verified, where it has shown one.
    pub(super) fn peer(&self) -> Option<CertificateDer<'static>> {
        let tls = self.tls.get()?.lock().unwrap_or_else(PoisonError::into_inner);
        tls.peer_certificates()?.first().map(|certificate| certificate.clone().into_owned())
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.tls.get().is_some()
    }

    /// The bounds of the handshake are gone: a disk may be idle, and its reader slow.
    pub(super) fn set_patient(&self) -> io::Result<()> {
        self.socket.set_read_timeout(None)?;
        self.socket.set_write_timeout(None)
    }

    pub(super) fn set_write_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.socket.set_write_timeout(Some(timeout))
    }

    /// Ends it, saying so where it is encrypted.
    pub(super) fn close(&self) {
        if let Some(tls) = self.tls.get() {
            tls.lock().unwrap_or_else(PoisonError::into_inner).send_close_notify();
            // The peer may be gone.
            let _ = self.send_records();
        }
        self.socket.shut(Shutdown::Both);
    }

    /// Ends it at once, whatever is under way.
    pub(super) fn abort(&self) {
        self.socket.shut(Shutdown::Both);
    }

    /// Sends what TLS has to say by itself.
    fn send_records(&self) -> io::Result<()> {
        let _sending = self.sender();
        let mut records = Vec::new();
        if let Some(tls) = self.tls.get() {
            drain(&mut tls.lock().unwrap_or_else(PoisonError::into_inner), &mut records)?;
        }
        self.socket.write_all(&records)
    }
}

fn drain(tls: &mut ServerConnection, records: &mut Vec<u8>) -> io::Result<()> {
    while tls.wants_write() {
        tls.write_tls(records)?;
    }
    Ok(())
}

impl Sender<'_> {
    /// Sends bytes behind what was sent before.
    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let Some(tls) = self.channel.tls.get() else { return self.channel.socket.write_all(bytes) };
        let mut records = Vec::new();
        for part in bytes.chunks(RECORDS_BYTES) {
            records.clear();
            {
                let mut tls = tls.lock().unwrap_or_else(PoisonError::into_inner);
                tls.writer().write_all(part)?;
                drain(&mut tls, &mut records)?;
            }
            self.channel.socket.write_all(&records)?;
        }
        Ok(())
    }
}

impl Reader {
    pub(super) fn new(channel: Arc<Channel>) -> Self {
        Self { channel, buffer: vec![0; BUFFER_BYTES], start: 0, end: 0, deadline: None }
    }

    /// From here on all has to have come by `deadline`; `None`: whenever it likes.
    pub(super) fn set_deadline(&mut self, deadline: Option<(Arc<dyn Clock>, Duration)>) {
        self.deadline = deadline;
    }

    /// Goes on encrypted: the next that is read is the peer's first record. Gives once the handshake is done.
    pub(super) fn start_tls(&mut self, mut tls: ServerConnection) -> io::Result<()> {
        if self.start < self.end {
            // Said before we agreed: anybody on the way may have put it there.
            return Err(io::Error::new(io::ErrorKind::InvalidData, "something was sent before encryption began"));
        }
        // What is sent at once is bounded by `RECORDS_BYTES`.
        tls.set_buffer_limit(None);
        let fresh = self.channel.tls.set(Mutex::new(tls)).is_ok();
        assert!(fresh, "encryption is begun once");
        loop {
            let tls = self.channel.tls.get().expect("just set");
            if !tls.lock().unwrap_or_else(PoisonError::into_inner).is_handshaking() {
                return Ok(());
            }
            self.take_records()?;
        }
    }

    /// Fills `bytes`.
    ///
    /// An end of the stream is `UnexpectedEof`.
    pub(super) fn read_exact(&mut self, mut bytes: &mut [u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let read = self.read(bytes)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            bytes = &mut bytes[read..];
        }
        Ok(())
    }

    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let channel = Arc::clone(&self.channel);
        let Some(tls) = channel.tls.get() else { return self.read_plain(bytes) };
        loop {
            match tls.lock().unwrap_or_else(PoisonError::into_inner).reader().read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            self.take_records()?;
        }
    }

    fn read_plain(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.start == self.end {
            if bytes.len() >= BUFFER_BYTES / 2 {
                return self.receive(bytes);
            }
            self.fill()?;
        }
        let taken = bytes.len().min(self.end - self.start);
        bytes[..taken].copy_from_slice(&self.buffer[self.start..self.start + taken]);
        self.start += taken;
        Ok(taken)
    }

    /// Gives TLS what has come, and more where nothing has.
    fn take_records(&mut self) -> io::Result<()> {
        if self.start == self.end {
            self.fill()?;
        }
        let answers = {
            let tls = self.channel.tls.get().expect("only where it is encrypted");
            let mut tls = tls.lock().unwrap_or_else(PoisonError::into_inner);
            let mut records = &self.buffer[self.start..self.end];
            let taken = tls.read_tls(&mut records)?;
            self.start += taken;
            let processed = tls.process_new_packets();
            (tls.wants_write(), processed.map(|_| ()), taken)
        };
        let (wants_write, processed, taken) = answers;
        if wants_write {
            // An alert among others.
            self.channel.send_records()?;
        }
        processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        if taken == 0 && self.start == self.end {
            // The socket has ended; TLS has been told.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let received = self.receive(&mut buffer);
        self.buffer = buffer;
        (self.start, self.end) = (0, received?);
        Ok(())
    }

    fn receive(&self, bytes: &mut [u8]) -> io::Result<usize> {
        if let Some((clock, deadline)) = &self.deadline {
            let left = deadline.saturating_sub(clock.monotonic());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.channel.socket.set_read_timeout(Some(left))?;
        }
        self.channel.socket.read(bytes)
    }
}
