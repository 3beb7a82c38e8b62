//! Ids and units: the newtypes that keep bytes, sectors and blocks apart.
//!
//! Owns every conversion between them; conversions are named and never implicit. Nothing here allocates.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes in a sector, the unit of the kernel's block layer.
pub const SECTOR_BYTES: u64 = 512;
/// Bytes in a block, the tracking unit.
pub const BLOCK_BYTES: usize = 4096;
/// Sectors in a block.
pub const BLOCK_SECTORS: u64 = BLOCK_BYTES as u64 / SECTOR_BYTES;
/// The largest volume in bytes (16 TiB): the index of a block fits in 32 bits.
pub const VOLUME_BYTES_MAX: u64 = (1 << 32) * BLOCK_BYTES as u64;

macro_rules! number {
    ($(#[$meta:meta])* $name:ident($inner:ty)) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(/// A number of 512-byte sectors, or the index of one on a device.
    Sectors(u64));
number!(/// The index of a 4 KiB block within its volume.
    Block(u32));
number!(/// The number of a recovery point of a group; rises by at least one per point. Not a time.
    Epoch(u64));
number!(/// The position of a frame within its attempt, from 0.
    Sequence(u64));
number!(/// The incarnation of a source's state, granted by the target; a higher one fences a lower one.
    Generation(u64));
number!(/// The place of a volume in its group; never reused for another volume.
    VolumeSlot(u16));
number!(/// Milliseconds since the Unix epoch. A label for people: epochs order, time does not.
    Timestamp(i64));

impl Sectors {
    /// The same length in bytes.
    #[must_use]
    pub const fn to_bytes(self) -> u64 {
        self.0 * SECTOR_BYTES
    }
}

impl Block {
    /// Offset of the block's first byte within its volume.
    #[must_use]
    pub const fn to_bytes(self) -> u64 {
        self.0 as u64 * BLOCK_BYTES as u64
    }
}

/// Blocks needed to hold `bytes`, the last one possibly in part.
#[must_use]
pub const fn blocks_in(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES as u64)
}

/// A run of blocks of one volume: the unit of reading and sending. Never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// First block.
    pub start: Block,
    /// Number of blocks, at least 1; `start + count` does not pass 2^32.
    pub count: u32,
}

impl Extent {
    /// An extent, or `None` where it would be empty or pass the last block.
    #[must_use]
    pub fn new(start: Block, count: u32) -> Option<Self> {
        let fits = u64::from(start.0) + u64::from(count) <= 1 << 32;
        (count > 0 && fits).then_some(Self { start, count })
    }

    /// Index of the block after the last one (up to 2^32).
    #[must_use]
    pub const fn end(self) -> u64 {
        self.start.0 as u64 + self.count as u64
    }

    /// Length in bytes.
    #[must_use]
    pub const fn to_bytes(self) -> u64 {
        self.count as u64 * BLOCK_BYTES as u64
    }

    /// The blocks of the extent, in order.
    pub fn blocks(self) -> impl Iterator<Item = Block> {
        (u64::from(self.start.0)..self.end()).map(|block| Block(block as u32))
    }
}

macro_rules! identifier {
    ($(#[$meta:meta])* $name:ident[$len:literal]) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(into = "String", try_from = "String")]
        pub struct $name(pub [u8; $len]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseIdError;
            fn try_from(text: String) -> Result<Self, ParseIdError> {
                text.parse()
            }
        }

        impl std::str::FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let mut id = [0; $len];
                parse_hex(text, &mut id)?;
                Ok(Self(id))
            }
        }
    };
}

identifier!(/// An office, a tenant of the target; random, made at `enroll`.
    OfficeId[16]);
identifier!(/// A consistency group; random, made at `protect`.
    GroupId[16]);
identifier!(/// One sealing run; random, salts its key. Frames of different attempts never mix in a point.
    AttemptId[16]);
identifier!(/// Name of a group's data key.
    KeyId[8]);
identifier!(/// BLAKE3 of a whole frame, as it is on the wire and on disk.
    FrameHash[32]);

/// The text of an id was not the right number of lower-case hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an id is {expected} lower-case hexadecimal digits")]
pub struct ParseIdError {
    /// Digits the id has.
    pub expected: usize,
}

fn parse_hex(text: &str, id: &mut [u8]) -> Result<(), ParseIdError> {
    let error = ParseIdError { expected: id.len() * 2 };
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Ok(byte - b'0'),
        b'a'..=b'f' => Ok(byte - b'a' + 10),
        _ => Err(error),
    };
    if text.len() != id.len() * 2 {
        return Err(error);
    }
    for (byte, pair) in id.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Ok(())
}

/// A place in a group's chain of recovery points: the number of an epoch and the hash of its commit frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Number of the epoch.
    pub epoch: Epoch,
    /// Hash of its commit frame.
    pub hash: FrameHash,
}

/// How much an application may rely on a recovery point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// What a power cut leaves.
    Crash,
    /// Cut while the file systems were frozen.
    Filesystem,
    /// Cut while the applications held still.
    Application,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_may_end_at_the_last_block_but_not_pass_it() {
        assert!(Extent::new(Block(u32::MAX), 1).is_some());
        assert!(Extent::new(Block(u32::MAX), 2).is_none());
        assert!(Extent::new(Block(7), 0).is_none());
        assert_eq!(Extent::new(Block(u32::MAX), 1).map(Extent::end), Some(1 << 32));
    }

    #[test]
    fn ids_are_printed_and_parsed_alike() {
        let id = KeyId([0x01, 0xab, 0, 0, 0, 0, 0, 0xff]);
        assert_eq!(id.to_string(), "01ab0000000000ff");
        assert_eq!("01ab0000000000ff".parse(), Ok(id));
        assert!("01AB0000000000ff".parse::<KeyId>().is_err());
        assert!("01ab".parse::<KeyId>().is_err());
    }
}
