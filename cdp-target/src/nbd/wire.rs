//! The numbers of the NBD protocol, as its document (`doc/proto.md` of NetworkBlockDevice/nbd) writes them. All are sent big-endian.
//!
//! Only what this server sends or understands. No extension that is called experimental there.

/// Bytes of content that one request may ask for or bring: what a client may count on where nothing was agreed.
pub const REQUEST_BYTES_MAX: u32 = 32 << 20;
/// Bytes of a string at most: names, queries, messages for people.
pub const STRING_BYTES_MAX: usize = 4096;

/// `NBDMAGIC` and `IHAVEOPT`: how the server begins, and every option of the client.
pub(super) const GREETING: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY: u32 = 0x6744_6698;
pub(super) const STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// Flags of the handshake, the server's and the client's alike.
pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 2;

/// Options of the client.
pub(super) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
}

/// What the server answers to an option.
pub(super) mod answer {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const UNSUPPORTED: u32 = (1 << 31) + 1;
    pub(crate) const POLICY: u32 = (1 << 31) + 2;
    pub(crate) const INVALID: u32 = (1 << 31) + 3;
    pub(crate) const TLS_REQUIRED: u32 = (1 << 31) + 5;
    pub(crate) const UNKNOWN: u32 = (1 << 31) + 6;
    pub(crate) const SHUTDOWN: u32 = (1 << 31) + 7;
    pub(crate) const TOO_BIG: u32 = (1 << 31) + 9;
}

/// What is told of an export.
pub(super) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
pub(super) mod transmission {
    pub(crate) const HAS_FLAGS: u16 = 1;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(crate) const SEND_CACHE: u16 = 1 << 10;
    pub(crate) const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Flags of a request.
pub(super) mod command {
    pub(crate) const FUA: u16 = 1;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    pub(crate) const FAST_ZERO: u16 = 1 << 4;
}

/// Kinds of a structured reply's chunks.
pub(super) mod chunk {
    pub(crate) const DONE: u16 = 1;
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const OFFSET_HOLE: u16 = 2;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const ERROR: u16 = (1 << 15) + 1;
    pub(crate) const ERROR_OFFSET: u16 = (1 << 15) + 2;
}

/// What `base:allocation` says of blocks that read as zeros.
pub(super) const STATE_HOLE_AND_ZERO: u32 = 3;
/// The one metadata context there is, and the number it has on the line.
pub(super) const ALLOCATION: &str = "base:allocation";
pub(super) const ALLOCATION_ID: u32 = 1;

/// Why a request failed, as the protocol numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// A write to what is read-only.
    NotPermitted = 1,
    /// The content cannot be had, or cannot be kept.
    Io = 5,
    /// A request that makes no sense.
    Invalid = 22,
    /// No room, or a write behind the end.
    NoSpace = 28,
    /// More than can be done at once.
    Overflow = 75,
    /// What was to be fast would not be.
    NotSupported = 95,
}
