//! What a client asks of its export: a request's bytes, and whether it may ask that.
//!
//! Invariant: a request that passes `check` lies within the export, has no flag that its kind does not know, and asks for or brings
//! no more than `REQUEST_BYTES_MAX` of content.

use super::wire::{Errno, REQUEST, REQUEST_BYTES_MAX, command};

/// Bytes of a request without its content.
pub const REQUEST_BYTES: usize = 28;

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// How.
    pub flags: u16,
    /// What.
    pub kind: Kind,
    /// The client's name for it.
    pub cookie: u64,
    /// From which byte of the export.
    pub offset: u64,
    /// How many bytes.
    pub len: u32,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The content.
    Read,
    /// To keep the content that follows.
    Write,
    /// To end.
    Disconnect,
    /// That what was written survives a power cut.
    Flush,
    /// The content is of no use any more.
    Trim,
    /// It will be read soon.
    Cache,
    /// Zeros.
    WriteZeroes,
    /// What is zeros.
    BlockStatus,
    /// Something that this server does not know.
    Unknown(u16),
}

/// What was agreed upon in the handshake, as far as it decides what may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Bytes of the export.
    pub size_bytes: u64,
    /// Whether it takes writes.
    pub writable: bool,
    /// Whether replies are structured.
    pub structured: bool,
    /// Whether `base:allocation` was chosen.
    pub allocation: bool,
}

/// Reads a request; `None` where it is none: what follows cannot be told either.
#[must_use]
pub fn parse(bytes: &[u8; REQUEST_BYTES]) -> Option<Request> {
    let u16_at = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let u64_at = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let kind = match u16_at(6) {
        0 => Kind::Read,
        1 => Kind::Write,
        2 => Kind::Disconnect,
        3 => Kind::Flush,
        4 => Kind::Trim,
        5 => Kind::Cache,
        6 => Kind::WriteZeroes,
        7 => Kind::BlockStatus,
        other => Kind::Unknown(other),
    };
    let request = Request { flags: u16_at(4), kind, cookie: u64_at(8), offset: u64_at(16), len: u32_at(24) };
    (u32_at(0) == REQUEST).then_some(request)
}

impl Request {
    /// Bytes of content that follow it.
    #[must_use]
    pub const fn payload_bytes(&self) -> u32 {
        if matches!(self.kind, Kind::Write) { self.len } else { 0 }
    }

    /// Whether a flag is set.
    pub(super) const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Whether it changes the export.
    const fn is_write(&self) -> bool {
        matches!(self.kind, Kind::Write | Kind::Trim | Kind::WriteZeroes)
    }

    /// Whether it may be asked.
    ///
    /// # Errors
    /// What the client is told where not.
    pub fn check(&self, agreed: &Agreed) -> Result<(), Errno> {
        // `FUA` may come with every command; where nothing can be written it means nothing.
        let known = match self.kind {
            Kind::Read if agreed.structured => command::DF,
            Kind::WriteZeroes => command::NO_HOLE | command::FAST_ZERO,
            Kind::BlockStatus => command::REQ_ONE,
            Kind::Unknown(_) => return Err(Errno::Invalid),
            _ => 0,
        } | command::FUA;
        if self.flags & !known != 0 || (self.kind == Kind::BlockStatus && !agreed.allocation) {
            return Err(Errno::Invalid);
        }
        if self.is_write() && !agreed.writable {
            return Err(Errno::NotPermitted);
        }
        if matches!(self.kind, Kind::Flush | Kind::Disconnect) {
            return Ok(());
        }
        let ends_within = self.offset.checked_add(u64::from(self.len)).is_some_and(|end| end <= agreed.size_bytes);
        match self.kind {
            Kind::Write | Kind::WriteZeroes if !ends_within => Err(Errno::NoSpace),
            _ if !ends_within => Err(Errno::Invalid),
            Kind::Read if self.len > REQUEST_BYTES_MAX => Err(Errno::Overflow),
            Kind::Write if self.len > REQUEST_BYTES_MAX => Err(Errno::Invalid),
            Kind::BlockStatus if self.len == 0 => Err(Errno::Invalid),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGREED: Agreed = Agreed { size_bytes: 1 << 40, writable: true, structured: true, allocation: true };

    fn request(kind: Kind, offset: u64, len: u32) -> Request {
        Request { flags: 0, kind, cookie: 7, offset, len }
    }

    #[test]
    fn a_request_is_read_where_its_magic_is_right() {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&REQUEST.to_be_bytes());
        bytes[5..8].copy_from_slice(&[1, 0, 6]);
        bytes[15] = 7;
        bytes[23] = 9;
        bytes[27] = 5;
        let expected = Request { flags: 1, ..request(Kind::WriteZeroes, 9, 5) };
        assert_eq!(parse(&bytes), Some(expected));
        bytes[0] ^= 1;
        assert_eq!(parse(&bytes), None);
    }

    #[test]
    fn what_lies_outside_is_refused_however_large_its_numbers() {
        let end = AGREED.size_bytes;
        for (kind, offset, len, expected) in [
            (Kind::Read, end - 1, 1, Ok(())),
            (Kind::Read, end, 0, Ok(())),
            (Kind::Read, end - 1, 2, Err(Errno::Invalid)),
            (Kind::Read, u64::MAX, u32::MAX, Err(Errno::Invalid)),
            (Kind::Read, 0, REQUEST_BYTES_MAX + 1, Err(Errno::Overflow)),
            (Kind::Write, end, 1, Err(Errno::NoSpace)),
            (Kind::Write, 0, u32::MAX, Err(Errno::Invalid)),
            (Kind::WriteZeroes, u64::MAX, 1, Err(Errno::NoSpace)),
            (Kind::WriteZeroes, 0, u32::MAX, Ok(())),
            (Kind::Trim, end, 1, Err(Errno::Invalid)),
            (Kind::Flush, u64::MAX, u32::MAX, Ok(())),
            (Kind::BlockStatus, 0, 0, Err(Errno::Invalid)),
            (Kind::Unknown(8), 0, 0, Err(Errno::Invalid)),
        ] {
            assert_eq!(request(kind, offset, len).check(&AGREED), expected, "{kind:?} {offset} {len}");
        }
    }

    #[test]
    fn a_flag_is_taken_only_where_its_command_knows_it() {
        let with = |kind, flags| Request { flags, ..request(kind, 0, 4096) };
        assert_eq!(with(Kind::Read, command::DF).check(&AGREED), Ok(()));
        assert_eq!(with(Kind::Read, command::DF).check(&Agreed { structured: false, ..AGREED }), Err(Errno::Invalid));
        assert_eq!(with(Kind::Write, command::FUA).check(&AGREED), Ok(()));
        assert_eq!(with(Kind::Write, command::REQ_ONE).check(&AGREED), Err(Errno::Invalid));
        assert_eq!(with(Kind::Trim, 1 << 15).check(&AGREED), Err(Errno::Invalid));
        let read_only = Agreed { writable: false, allocation: false, ..AGREED };
        assert_eq!(with(Kind::Trim, 0).check(&read_only), Err(Errno::NotPermitted));
        assert_eq!(with(Kind::Flush, command::FUA).check(&read_only), Ok(()));
        assert_eq!(with(Kind::BlockStatus, 0).check(&read_only), Err(Errno::Invalid));
    }
}
