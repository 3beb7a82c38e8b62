//! What a fuzzer's input says: which specimen, what is done to it, and whether its checksums are put in order afterwards.
//!
//! | byte | what |
//! |---|---|
//! | 0 | 0: the rest are the bytes as they are. Otherwise bits 0 to 6 choose the specimen; bit 7: checksums are mended |
//! | 1 | how many edits; as many as there are, and 12 at most |
//! | 2 and on | edits of four bytes: what to do, where (16 bits, as a share of the length), with which value |

/// One more than the edits of one input.
const EDITS_END: u8 = 13;
/// Bytes of one edit.
const EDIT_BYTES: usize = 4;
const MENDED: u8 = 0x80;
/// Where bounds are, and just beyond.
const INTERESTING: [u64; 16] = [
    0,
    1,
    2,
    16,
    0x7f,
    0xff,
    0x100,
    4095,
    4096,
    0x7fff,
    0xffff,
    1 << 20,
    i32::MAX as u64,
    u32::MAX as u64,
    u32::MAX as u64 - 3,
    u64::MAX,
];

/// An input, as read.
pub(crate) struct Input<'a> {
    specimen: Option<&'a [u8]>,
    rest: &'a [u8],
    edits: u8,
    is_mended: bool,
}

/// The input that stands for `bytes` as they are.
pub(crate) fn as_they_are(bytes: &[u8]) -> Vec<u8> {
    [&[0], bytes].concat()
}

impl<'a> Input<'a> {
    /// Reads an input; `None` where there is nothing in it.
    pub(crate) fn read(input: &'a [u8], specimens: &'a [Vec<u8>]) -> Option<Self> {
        let (first, rest) = input.split_first()?;
        if *first == 0 {
            return Some(Self { specimen: None, rest, edits: 0, is_mended: false });
        }
        let specimen = &specimens[usize::from((first & !MENDED).wrapping_sub(1)) % specimens.len()];
        let (edits, rest) = rest.split_first().unwrap_or((&0, &[]));
        Some(Self { specimen: Some(specimen), rest, edits: edits % EDITS_END, is_mended: first & MENDED != 0 })
    }

    /// The specimen that was changed.
    pub(crate) const fn specimen(&self) -> Option<&'a [u8]> {
        self.specimen
    }

    /// Whether checksums are put in order.
    pub(crate) const fn is_mended(&self) -> bool {
        self.is_mended
    }

    /// Whether what was changed lies within four bytes.
    pub(crate) fn is_within_four_bytes(&self) -> bool {
        self.edits().count() <= 1 && self.edits().all(|edit| edit[0] % 8 < 3)
    }

    fn edits(&self) -> impl Iterator<Item = &'a [u8; EDIT_BYTES]> {
        self.rest.as_chunks().0.iter().take(usize::from(self.edits))
    }

    /// The bytes that are tried.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let Some(specimen) = self.specimen else { return self.rest.to_vec() };
        let mut bytes = specimen.to_vec();
        self.edits().for_each(|edit| apply(*edit, &mut bytes));
        bytes
    }
}

fn apply([what, high, low, value]: [u8; EDIT_BYTES], bytes: &mut Vec<u8>) {
    let at = (bytes.len() * usize::from(u16::from_be_bytes([high, low]))) >> 16;
    let word = INTERESTING[usize::from(value) % INTERESTING.len()].to_le_bytes();
    let there = bytes.get(at).copied().unwrap_or_default();
    match what % 8 {
        0 => put(bytes, at, &[there ^ value]),
        1 => put(bytes, at, &[value]),
        2 => put(bytes, at, &word[..4]),
        3 => put(bytes, at, &word),
        4 => bytes.truncate(at),
        5 => bytes.resize(bytes.len() + usize::from(value), what),
        6 => drop(bytes.drain(at..bytes.len().min(at + usize::from(value % 40)))),
        _ => {
            // A piece from elsewhere: things that are valid, and not here.
            let from = (bytes.len() * usize::from(value)) >> 8;
            let piece = bytes[from..bytes.len().min(from + 40)].to_vec();
            put(bytes, at, &piece);
        }
    }
}

/// Writes over what is there, as far as it reaches.
fn put(bytes: &mut [u8], at: usize, piece: &[u8]) {
    let len = piece.len().min(bytes.len().saturating_sub(at));
    bytes[at..at + len].copy_from_slice(&piece[..len]);
}
