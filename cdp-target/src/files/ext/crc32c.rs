//! The checksum of ext4 and its journal: CRC-32C, as they use it, without the final inversion.

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut crc, mut bit) = (byte as u32, 0);
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

/// What a checksum begins with.
pub(super) const SEED: u32 = !0;

/// A checksum gone on with.
pub(super) fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(seed, |crc, byte| (crc >> 8) ^ TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_known_one() {
        assert_eq!(!crc32c(SEED, b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(crc32c(SEED, b"1234"), b"56789"), crc32c(SEED, b"123456789"));
    }
}
