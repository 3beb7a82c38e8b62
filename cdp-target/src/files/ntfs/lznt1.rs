//! The compression of NTFS: chunks of 4 KiB, each of letters and of references to what came before in the same chunk.

use super::damaged;
use crate::files::tree::TreeError;
use crate::files::volume::le;

const CHUNK_BYTES: usize = 4096;

/// Unpacks a unit to `len` bytes; what is missing at its end is zeros.
///
/// # Errors
/// Where it makes no sense.
pub(super) fn unpack(packed: &[u8], len: usize) -> Result<Vec<u8>, TreeError> {
    let wrong = || damaged("its compressed content makes no sense");
    let (mut unpacked, mut at) = (Vec::with_capacity(len), 0);
    while at + 2 <= packed.len() && unpacked.len() < len {
        let header = le::<2>(packed, at) as usize;
        if header == 0 {
            break;
        }
        let chunk = packed.get(at + 2..at + 3 + (header & 0xfff)).ok_or_else(wrong)?;
        at += 2 + chunk.len();
        let start = unpacked.len();
        if header & 0x8000 == 0 {
            unpacked.extend_from_slice(chunk);
        } else {
            unpack_chunk(chunk, &mut unpacked).ok_or_else(wrong)?;
        }
        // The next one begins where this would end if it were full.
        unpacked.resize(start + CHUNK_BYTES, 0);
    }
    unpacked.resize(len, 0);
    Ok(unpacked)
}

/// Unpacks one chunk; `None` where it makes no sense.
fn unpack_chunk(chunk: &[u8], unpacked: &mut Vec<u8>) -> Option<()> {
    let start = unpacked.len();
    let mut rest = chunk;
    while let Some((flags, behind)) = rest.split_first() {
        rest = behind;
        for bit in 0..8 {
            if rest.is_empty() {
                return Some(());
            }
            if flags >> bit & 1 == 0 {
                unpacked.push(rest[0]);
                rest = &rest[1..];
            } else {
                let phrase = usize::from(u16::from_le_bytes(*rest.first_chunk()?));
                rest = &rest[2..];
                let position = unpacked.len() - start;
                let bits = distance_bits(position.checked_sub(1)?);
                let (distance, len) = ((phrase >> (16 - bits)) + 1, (phrase & (0xffff >> bits)) + 3);
                let from = unpacked.len().checked_sub(distance).filter(|from| *from >= start)?;
                for at in from..from + len {
                    unpacked.push(unpacked[at]);
                }
            }
            if unpacked.len() - start > CHUNK_BYTES {
                return None;
            }
        }
    }
    Some(())
}

/// Bits of a reference that say how far back it reaches: as many as are needed there.
const fn distance_bits(mut last: usize) -> u32 {
    let mut bits = 4;
    while last >= 16 {
        last >>= 1;
        bits += 1;
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_and_references_are_unpacked() {
        // One letter, then it again 4095 times.
        let packed = [0x03, 0xb0, 0x02, b'a', 0xfc, 0x0f];
        let unpacked = unpack(&packed, 8192).expect("well");
        assert_eq!((&unpacked[..4096], &unpacked[4096..]), (&[b'a'; 4096][..], &[0; 4096][..]));
        // As it is, and behind it what is missing.
        assert_eq!(unpack(&[0x01, 0x30, b'x', b'y'], 4).expect("well"), *b"xy\0\0");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bad in [&[0xff, 0xbf, 0x01][..], &[2, 0xb0, 0x01, 0, 0], &[3, 0xb0, 0x02, b'a', 0xff, 0xff]] {
            assert!(unpack(bad, 65_536).is_err(), "{bad:?}");
        }
        assert_eq!(unpack(&[], 5).expect("nothing is zeros"), [0; 5]);
    }
}
