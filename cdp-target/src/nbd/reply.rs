//! The bytes of replies: to options, and to requests, simple and structured.
//!
//! Owns how content and holes become the chunks of a structured reply. A chunk is whole before any of it is sent.

use super::wire::{
    ALLOCATION_ID, Errno, OPTION_REPLY, SIMPLE_REPLY, STATE_HOLE_AND_ZERO, STRING_BYTES_MAX, STRUCTURED_REPLY, chunk,
};

/// Zeros between content that are worth a chunk of their own, in bytes: fewer go along as content.
const HOLE_BYTES_MIN: u64 = 16 << 10;
/// Bytes of a chunk's header.
const CHUNK_HEADER_BYTES: usize = 20;

/// The reply to an option.
pub(super) fn to_option(option: u32, answer: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_REPLY.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(answer.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// A simple reply without content, or the part before it.
pub(super) fn simple(cookie: u64, result: Result<(), Errno>) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY.to_be_bytes());
    bytes[4..8].copy_from_slice(&result.map_or_else(|errno| errno as u32, |()| 0).to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// The chunks of a structured reply, put together in `bytes`.
pub(super) struct Chunks<'a> {
    bytes: &'a mut Vec<u8>,
    cookie: u64,
    /// Where the last chunk begins.
    last: Option<usize>,
    /// Whether the last chunk is content that ends at `offset`.
    is_open: bool,
    /// The next byte of the export.
    offset: u64,
    /// Zeros before it that are in no chunk yet.
    zeros: u64,
}

impl<'a> Chunks<'a> {
    /// Chunks from `offset` on; what was in `bytes` is gone.
    pub(super) fn new(bytes: &'a mut Vec<u8>, cookie: u64, offset: u64) -> Self {
        bytes.clear();
        Self { bytes, cookie, last: None, is_open: false, offset, zeros: 0 }
    }

    /// Content.
    pub(super) fn content(&mut self, content: &[u8]) {
        self.put_zeros(false);
        self.open();
        self.bytes.extend_from_slice(content);
        self.offset += content.len() as u64;
    }

    /// Zeros.
    pub(super) fn zeros(&mut self, len: u64) {
        self.zeros += len;
    }

    /// Zeros that have to be there as content.
    pub(super) fn zeros_as_content(&mut self, len: u64) {
        self.zeros += len;
        self.fill();
    }

    /// The chunks, the last of them marked as the reply's end where it is.
    pub(super) fn finish(mut self, is_end: bool) {
        self.put_zeros(true);
        self.close();
        match self.last {
            Some(last) if is_end => self.bytes[last + 4..last + 6].copy_from_slice(&chunk::DONE.to_be_bytes()),
            None if is_end => self.header(chunk::DONE, chunk::NONE, 0),
            Some(_) | None => {}
        }
    }

    fn put_zeros(&mut self, is_end: bool) {
        if self.zeros == 0 {
            return;
        }
        let is_alone = is_end && !self.is_open;
        if self.zeros < HOLE_BYTES_MIN && !is_alone {
            return self.fill();
        }
        self.close();
        self.header(0, chunk::OFFSET_HOLE, 12);
        self.bytes.extend(self.offset.to_be_bytes());
        self.bytes.extend((self.zeros as u32).to_be_bytes());
        self.offset += std::mem::take(&mut self.zeros);
    }

    fn fill(&mut self) {
        self.open();
        self.bytes.resize(self.bytes.len() + self.zeros as usize, 0);
        self.offset += std::mem::take(&mut self.zeros);
    }

    fn open(&mut self) {
        if !self.is_open {
            self.header(0, chunk::OFFSET_DATA, 0);
            self.bytes.extend(self.offset.to_be_bytes());
            self.is_open = true;
        }
    }

    fn close(&mut self) {
        if let Some(last) = self.last.filter(|_| self.is_open) {
            let len = (self.bytes.len() - last - CHUNK_HEADER_BYTES) as u32;
            self.bytes[last + 16..last + 20].copy_from_slice(&len.to_be_bytes());
            self.is_open = false;
        }
    }

    fn header(&mut self, flags: u16, kind: u16, len: u32) {
        self.last = Some(self.bytes.len());
        put_header(self.bytes, self.cookie, flags, kind, len);
    }
}

fn put_header(bytes: &mut Vec<u8>, cookie: u64, flags: u16, kind: u16, len: u32) {
    bytes.extend(STRUCTURED_REPLY.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(len.to_be_bytes());
}

/// A structured reply that says why a request failed, and where, as its last chunk.
pub(super) fn failed(bytes: &mut Vec<u8>, cookie: u64, errno: Errno, reason: &str, offset: Option<u64>) {
    bytes.clear();
    let reason = &reason.as_bytes()[..reason.len().min(STRING_BYTES_MAX)];
    // Cut within a character it would be no text.
    let reason = std::str::from_utf8(reason).map_or_else(|error| &reason[..error.valid_up_to()], str::as_bytes);
    let kind = if offset.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR };
    let len = 6 + reason.len() + if offset.is_some() { 8 } else { 0 };
    put_header(bytes, cookie, chunk::DONE, kind, len as u32);
    bytes.extend((errno as u32).to_be_bytes());
    bytes.extend((reason.len() as u16).to_be_bytes());
    bytes.extend(reason);
    bytes.extend(offset.into_iter().flat_map(u64::to_be_bytes));
}

/// A structured reply that says which of the next bytes are zeros: lengths, and whether they are.
pub(super) fn status(bytes: &mut Vec<u8>, cookie: u64, runs: &[(u32, bool)]) {
    bytes.clear();
    put_header(bytes, cookie, chunk::DONE, chunk::BLOCK_STATUS, 4 + 8 * runs.len() as u32);
    bytes.extend(ALLOCATION_ID.to_be_bytes());
    for (len, is_zero) in runs {
        bytes.extend(len.to_be_bytes());
        bytes.extend((if *is_zero { STATE_HOLE_AND_ZERO } else { 0 }).to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kind, flags, offset and length of each chunk's content.
    fn chunks(bytes: &[u8]) -> Vec<(u16, u16, u64, u64)> {
        let (mut at, mut chunks) = (0, Vec::new());
        while at < bytes.len() {
            let number = |from: usize, len: usize| {
                bytes[at + from..at + from + len].iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
            };
            assert_eq!((number(0, 4), number(8, 8)), (u64::from(STRUCTURED_REPLY), 5));
            let (kind, len) = (number(6, 2) as u16, number(16, 4));
            let covered = match kind {
                chunk::OFFSET_DATA => len - 8,
                chunk::OFFSET_HOLE => number(28, 4),
                _ => 0,
            };
            let offset = if len >= 8 { number(20, 8) } else { 0 };
            chunks.push((kind, number(4, 2) as u16, offset, covered));
            at += CHUNK_HEADER_BYTES + len as usize;
        }
        chunks
    }

    #[test]
    fn small_zeros_go_along_and_large_ones_are_holes() {
        let mut bytes = Vec::new();
        let mut reply = Chunks::new(&mut bytes, 5, 1000);
        reply.zeros(4096);
        reply.content(&[1; 4096]);
        reply.zeros(4096);
        reply.content(&[2; 4096]);
        reply.zeros(10_000);
        reply.zeros(10_000);
        reply.content(&[3; 512]);
        reply.zeros(512);
        reply.finish(true);
        let hole = (chunk::OFFSET_HOLE, 0, 1000 + 16_384, 20_000);
        let rest = (chunk::OFFSET_DATA, chunk::DONE, 1000 + 36_384, 1024);
        assert_eq!(chunks(&bytes), [(chunk::OFFSET_DATA, 0, 1000, 16_384), hole, rest]);
    }

    #[test]
    fn zeros_alone_are_a_hole_and_nothing_is_an_end() {
        let mut bytes = Vec::new();
        let mut reply = Chunks::new(&mut bytes, 5, 0);
        reply.zeros(512);
        reply.finish(true);
        assert_eq!(chunks(&bytes), [(chunk::OFFSET_HOLE, chunk::DONE, 0, 512)]);
        Chunks::new(&mut bytes, 5, 0).finish(true);
        assert_eq!(chunks(&bytes), [(chunk::NONE, chunk::DONE, 0, 0)]);
        let mut reply = Chunks::new(&mut bytes, 5, 0);
        reply.zeros_as_content(100_000);
        reply.finish(false);
        assert_eq!(chunks(&bytes), [(chunk::OFFSET_DATA, 0, 0, 100_000)]);
    }

    #[test]
    fn a_reason_is_cut_where_a_character_ends() {
        let mut bytes = Vec::new();
        let reason = "ä".repeat(STRING_BYTES_MAX);
        failed(&mut bytes, 5, Errno::Io, &format!("x{reason}"), Some(9));
        assert_eq!(chunks(&bytes).len(), 1);
        let words = &bytes[CHUNK_HEADER_BYTES + 6..bytes.len() - 8];
        assert!(std::str::from_utf8(words).is_ok() && words.len() == STRING_BYTES_MAX - 1);
        assert_eq!(bytes[bytes.len() - 8..], 9_u64.to_be_bytes());
    }
}
