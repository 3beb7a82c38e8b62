//! Little-endian fields of the journal's files, read with every length checked, and the few composites they share.
//!
//! Does not know which file the bytes are of; whoever reads has verified a checksum before.

use cdp_protocol::limits::{NAME_BYTES_MAX, VOLUMES_MAX};
use cdp_protocol::record::Volume;
use cdp_protocol::units::VolumeSlot;

/// The bytes are shorter or other than their checksum made believe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("field {0} is not valid")]
pub struct FieldError(pub &'static str);

/// Reads fields from the start of `bytes`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Input<'a> {
    bytes: &'a [u8],
}

impl<'a> Input<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn finish(self) -> Result<(), FieldError> {
        if self.bytes.is_empty() { Ok(()) } else { Err(FieldError("length")) }
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], FieldError> {
        let (taken, rest) = self.bytes.split_at_checked(len).ok_or(FieldError("length"))?;
        self.bytes = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], FieldError> {
        Ok(self.take(N)?.try_into().expect("N bytes were taken"))
    }

    pub(crate) fn u8(&mut self) -> Result<u8, FieldError> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, FieldError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FieldError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FieldError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn i64(&mut self) -> Result<i64, FieldError> {
        self.array().map(i64::from_le_bytes)
    }

    pub(crate) fn flag(&mut self) -> Result<bool, FieldError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(FieldError("flag")),
        }
    }

    /// Bytes with a 32-bit length before them.
    pub(crate) fn long(&mut self) -> Result<&'a [u8], FieldError> {
        let len = self.u32()? as usize;
        self.take(len)
    }

    /// UTF-8 with a 32-bit length before it.
    pub(crate) fn text(&mut self) -> Result<String, FieldError> {
        String::from_utf8(self.long()?.to_vec()).map_err(|_| FieldError("text"))
    }

    pub(crate) fn volumes(&mut self) -> Result<Vec<Volume>, FieldError> {
        let count = usize::from(self.u16()?);
        if count > VOLUMES_MAX {
            return Err(FieldError("volume count"));
        }
        let mut volumes = Vec::with_capacity(count);
        for _ in 0..count {
            let (slot, size_bytes) = (VolumeSlot(self.u16()?), self.u64()?);
            let name = self.text()?;
            if name.len() > NAME_BYTES_MAX {
                return Err(FieldError("volume name"));
            }
            volumes.push(Volume { slot, size_bytes, name });
        }
        Ok(volumes)
    }
}

/// Appends bytes with their 32-bit length before them.
pub(crate) fn put_long(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
}

pub(crate) fn put_volumes(out: &mut Vec<u8>, volumes: &[Volume]) {
    out.extend_from_slice(&(volumes.len() as u16).to_le_bytes());
    for volume in volumes {
        out.extend_from_slice(&volume.slot.0.to_le_bytes());
        out.extend_from_slice(&volume.size_bytes.to_le_bytes());
        put_long(out, volume.name.as_bytes());
    }
}
