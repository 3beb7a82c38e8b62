//! Names in UTF-16, as FAT and NTFS have them.

/// As bytes; halves of letters that stand alone as the replacement letter.
pub(super) fn utf8(units: &[u16]) -> Vec<u8> {
    String::from_utf16_lossy(units).into_bytes()
}

/// The same of little-endian bytes.
pub(super) fn utf8_of(raw: &[u8]) -> Vec<u8> {
    let units: Vec<u16> = raw.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect();
    utf8(&units)
}
