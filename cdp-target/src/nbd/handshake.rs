//! The handshake: from the server's greeting to a client that has its export, or has gone.
//!
//! Invariant: it ends within `TIME_MAX` and `OPTIONS_MAX` options, whatever the client does, and within `STRANGER_TIME_MAX` where it is not
//! admitted: where the connection has to be encrypted by its certificate, elsewhere by having reached the socket. Where the connection has to be encrypted
//! nothing is told before it is, and what was agreed before counts for nothing after. A client that is not to be served hears why, as an
//! answer to whatever it asks.

use super::channel::{Channel, Reader};
use super::disk::Disk;
use super::option::{self, Asked, HEADER_BYTES, OPTION_BYTES_MAX, Wants};
use super::reply;
use super::server::Shared;
use super::wire::{
    ALLOCATION, ALLOCATION_ID, FIXED_NEWSTYLE, GREETING, NO_ZEROES, OPTION, REQUEST_BYTES_MAX, answer, info,
};
use crate::restore::image::one_line;
use cdp_protocol::units::BLOCK_BYTES;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Time for all of it.
const TIME_MAX: Duration = Duration::from_secs(30);
/// Time until a client is admitted.
const STRANGER_TIME_MAX: Duration = Duration::from_secs(10);
/// Time for a client whose certificate was refused to ask for what it wants, and to hear why it does not get it.
const REFUSED_TIME_MAX: Duration = Duration::from_secs(2);
/// Options that a client may ask.
const OPTIONS_MAX: usize = 256;
/// Bytes of an option that are passed over: as many as a client may think it can send. More end the connection.
const PASSED_OVER_BYTES_MAX: u32 = REQUEST_BYTES_MAX;

/// What a client has agreed upon.
pub(super) struct Served {
    pub(super) reader: Reader,
    pub(super) disk: Arc<Disk>,
    pub(super) structured: bool,
    pub(super) allocation: bool,
}

/// A handshake under way.
pub(super) struct Handshake<'a> {
    shared: &'a Shared,
    channel: Arc<Channel>,
    reader: Reader,
    /// The client's number among those that are there.
    number: u64,
    begun: Duration,
    is_admitted: bool,
    /// Why this client gets nothing, where it does not.
    refusal: Option<&'static str>,
    no_zeroes: bool,
    structured: bool,
    /// The export for which `base:allocation` was chosen.
    allocation: Option<String>,
}

/// What comes after an option.
enum Next {
    Option,
    Serve(Disk),
    End,
}

impl<'a> Handshake<'a> {
    pub(super) fn new(shared: &'a Shared, channel: Arc<Channel>, number: u64) -> Self {
        let (reader, begun) = (Reader::new(Arc::clone(&channel)), shared.clock.monotonic());
        Self {
            shared,
            channel,
            reader,
            number,
            begun,
            is_admitted: false,
            refusal: None,
            no_zeroes: false,
            structured: false,
            allocation: None,
        }
    }

    /// Does it; `None` where the client ended it.
    pub(super) fn run(mut self) -> io::Result<Option<Served>> {
        self.set_deadline(self.begun + STRANGER_TIME_MAX);
        self.channel.set_write_timeout(STRANGER_TIME_MAX)?;
        let Some(disk) = self.agree()? else { return Ok(None) };
        self.reader.set_deadline(None);
        self.channel.set_patient()?;
        let allocation = self.allocation.is_some();
        Ok(Some(Served { reader: self.reader, disk: Arc::new(disk), structured: self.structured, allocation }))
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.reader.set_deadline(Some((Arc::clone(&self.shared.clock), deadline)));
    }

    /// Whether the client has a place among those that are served; takes one where there is.
    fn has_place(&mut self) -> io::Result<bool> {
        if !self.is_admitted && self.shared.admit(self.number) {
            self.is_admitted = true;
            self.set_deadline(self.begun + TIME_MAX);
            self.channel.set_write_timeout(TIME_MAX)?;
        }
        Ok(self.is_admitted)
    }

    fn agree(&mut self) -> io::Result<Option<Disk>> {
        let mut greeting = GREETING.to_be_bytes().to_vec();
        greeting.extend(OPTION.to_be_bytes());
        greeting.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        self.channel.send(&greeting)?;
        let mut flags = [0; 4];
        self.reader.read_exact(&mut flags)?;
        let flags = u32::from_be_bytes(flags);
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(violation("flags that nobody offered"));
        }
        self.no_zeroes = flags & u32::from(NO_ZEROES) != 0;
        for _ in 0..OPTIONS_MAX {
            match self.option()? {
                Next::Option => {}
                Next::Serve(disk) => return Ok(Some(disk)),
                Next::End => return Ok(None),
            }
        }
        Err(violation("too many options"))
    }

    /// Takes an option and answers it.
    fn option(&mut self) -> io::Result<Next> {
        let mut header = [0; HEADER_BYTES];
        self.reader.read_exact(&mut header)?;
        let header = option::parse_header(&header).ok_or_else(|| violation("no option where one has to be"))?;
        if header.len > OPTION_BYTES_MAX {
            self.pass_over(header.len)?;
            return self.answer(header.number, answer::TOO_BIG, b"the option has too much data");
        }
        let mut data = vec![0; header.len as usize];
        self.reader.read_exact(&mut data)?;
        let asked = match option::parse(header.number, &data) {
            Ok(asked) => asked,
            Err(_) if header.number == super::wire::option::EXPORT_NAME => return Err(violation("no export's name")),
            Err(error) => return self.answer(header.number, answer::INVALID, error.to_string().as_bytes()),
        };
        self.take(header.number, &asked)
    }

    fn pass_over(&mut self, len: u32) -> io::Result<()> {
        if len > PASSED_OVER_BYTES_MAX {
            return Err(violation("an option that is far too long"));
        }
        let mut part = vec![0; OPTION_BYTES_MAX as usize];
        let mut left = len as usize;
        while left > 0 {
            let len = left.min(part.len());
            self.reader.read_exact(&mut part[..len])?;
            left -= len;
        }
        Ok(())
    }

    fn take(&mut self, number: u32, asked: &Asked<'_>) -> io::Result<Next> {
        match asked {
            Asked::Abort => {
                // It may have gone without waiting for this.
                let _ = self.answer(number, answer::ACK, b"");
                return Ok(Next::End);
            }
            Asked::StartTls => return self.start_tls(number),
            _ => {}
        }
        let needs_tls = self.shared.tls.is_some() && !self.channel.is_encrypted();
        let refusal = match (needs_tls, self.refusal, self.shared.is_ending()) {
            (true, ..) => Some((answer::TLS_REQUIRED, "this server speaks TLS only")),
            (_, Some(reason), _) => Some((answer::POLICY, reason)),
            (.., true) => Some((answer::SHUTDOWN, "the server ends")),
            _ if self.has_place()? => None,
            _ => Some((answer::POLICY, "there are as many connections as this server takes")),
        };
        match (refusal, asked) {
            (Some((_, reason)), Asked::ExportName(_)) => Err(violation(reason)),
            (Some((answer, reason)), Asked::List | Asked::Info { .. }) if self.refusal.is_some() => {
                // It has heard why.
                self.answer(number, answer, reason.as_bytes()).map(|_| Next::End)
            }
            (Some((answer, reason)), _) => self.answer(number, answer, reason.as_bytes()),
            (None, Asked::ExportName(name)) => self.export_name(name),
            (None, Asked::List) => self.list(number),
            (None, Asked::Info { name, go, wants }) => self.info(number, name, *go, *wants),
            (None, Asked::StructuredReply) => {
                self.structured = true;
                self.answer(number, answer::ACK, b"")
            }
            (None, Asked::ListMeta { name, queries }) => {
                let matches = |query: &&str| [ALLOCATION, "base:"].contains(query);
                self.meta(number, name, queries.is_empty() || queries.iter().any(matches), 0)
            }
            (None, Asked::SetMeta { name, queries }) => self.set_meta(number, name, queries),
            (None, Asked::Unknown | Asked::Abort | Asked::StartTls) => {
                self.answer(number, answer::UNSUPPORTED, b"this server does not know the option")
            }
        }
    }

    fn answer(&self, number: u32, answer: u32, data: &[u8]) -> io::Result<Next> {
        self.channel.send(&reply::to_option(number, answer, data))?;
        Ok(Next::Option)
    }

    fn start_tls(&mut self, number: u32) -> io::Result<Next> {
        let Some(tls) = &self.shared.tls else {
            return self.answer(number, answer::POLICY, b"this socket is not encrypted: who reaches it may read");
        };
        if self.channel.is_encrypted() {
            return self.answer(number, answer::INVALID, b"the connection is encrypted already");
        }
        let connection = tls.connection().map_err(io::Error::other)?;
        self.channel.send(&reply::to_option(number, answer::ACK, b""))?;
        self.reader.start_tls(connection)?;
        (self.structured, self.allocation) = (false, None);
        if let Err(reason) = tls.judge(self.channel.peer().as_ref()) {
            tracing::warn!(reason, "a client is not admitted");
            self.refusal = Some(reason);
            self.set_deadline(self.shared.clock.monotonic() + REFUSED_TIME_MAX);
        }
        Ok(Next::Option)
    }

    fn list(&self, number: u32) -> io::Result<Next> {
        let exports = &self.shared.exports;
        let description = exports.description();
        for name in exports.names() {
            let mut data = (name.len() as u32).to_be_bytes().to_vec();
            data.extend(name.as_bytes());
            data.extend(description.as_bytes());
            self.answer(number, answer::SERVER, &data)?;
        }
        self.answer(number, answer::ACK, b"")
    }

    /// Gives the export, or answers why not.
    fn find(&self, number: u32, name: &str) -> io::Result<Option<Disk>> {
        match self.shared.exports.find(name) {
            Ok(disk) => Ok(Some(disk)),
            Err(error) => {
                let kind = if error.is_unknown() { answer::UNKNOWN } else { answer::POLICY };
                let reason = one_line(&error);
                if !error.is_unknown() {
                    tracing::error!(export = name, error = reason, "an export cannot be opened");
                }
                self.answer(number, kind, reason.as_bytes()).map(|_| None)
            }
        }
    }

    fn export_name(&mut self, name: &str) -> io::Result<Next> {
        // There is no way to say why not.
        let disk = self.shared.exports.find(name).map_err(io::Error::other)?;
        let mut bytes = disk.size_bytes().to_be_bytes().to_vec();
        bytes.extend(disk.transmission_flags(self.structured).to_be_bytes());
        if !self.no_zeroes {
            bytes.extend([0; 124]);
        }
        self.channel.send(&bytes)?;
        Ok(self.serve(name, disk))
    }

    fn info(&mut self, number: u32, name: &str, go: bool, wants: Wants) -> io::Result<Next> {
        let Some(disk) = self.find(number, name)? else { return Ok(Next::Option) };
        let mut export = disk.size_bytes().to_be_bytes().to_vec();
        export.extend(disk.transmission_flags(self.structured).to_be_bytes());
        let sizes = [1, BLOCK_BYTES as u32, REQUEST_BYTES_MAX].map(u32::to_be_bytes).concat();
        let told = [
            (true, info::EXPORT, export.as_slice()),
            (wants.name, info::NAME, disk.name().as_bytes()),
            (wants.description, info::DESCRIPTION, disk.description().as_bytes()),
            (wants.block_size, info::BLOCK_SIZE, sizes.as_slice()),
        ];
        for (_, kind, content) in told.into_iter().filter(|(is_wanted, ..)| *is_wanted) {
            let data = [&kind.to_be_bytes(), content].concat();
            self.answer(number, answer::INFO, &data)?;
        }
        self.answer(number, answer::ACK, b"")?;
        Ok(if go { self.serve(name, disk) } else { Next::Option })
    }

    fn serve(&mut self, name: &str, disk: Disk) -> Next {
        // It may have been chosen for another one.
        self.allocation.take_if(|chosen| chosen != name);
        Next::Serve(disk)
    }

    fn set_meta(&mut self, number: u32, name: &str, queries: &[&str]) -> io::Result<Next> {
        self.allocation = None;
        if !self.structured {
            return self.answer(number, answer::INVALID, b"structured replies have to be agreed upon first");
        }
        let is_chosen = queries.contains(&ALLOCATION);
        let next = self.meta(number, name, is_chosen, ALLOCATION_ID)?;
        self.allocation = is_chosen.then(|| name.to_owned());
        Ok(next)
    }

    fn meta(&self, number: u32, name: &str, is_there: bool, id: u32) -> io::Result<Next> {
        if self.find(number, name)?.is_none() {
            return Ok(Next::Option);
        }
        if is_there {
            let data = [&id.to_be_bytes(), ALLOCATION.as_bytes()].concat();
            self.answer(number, answer::META_CONTEXT, &data)?;
        }
        self.answer(number, answer::ACK, b"")
    }
}

/// A client that does what the protocol forbids.
fn violation(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
