//! The names of FAT: eleven letters of an old code page, and long ones in entries in front of them.

use crate::files::text::utf8;
use crate::files::volume::le;

/// What bytes above 127 mean in code page 437.
const UPPER: &str = "ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒáíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■\u{a0}";

/// The short name of an entry.
pub(super) fn short(entry: &[u8]) -> String {
    let case = le::<1>(entry, 12);
    let part = |bytes: &[u8], is_lower: bool| {
        let text: String = bytes.iter().map(|byte| letter(*byte)).collect();
        let text = text.trim_end_matches(' ').to_owned();
        if is_lower { text.to_lowercase() } else { text }
    };
    let mut base = entry[..8].to_vec();
    if base[0] == 5 {
        base[0] = 0xe5;
    }
    let (base, more) = (part(&base, case & 8 != 0), part(&entry[8..11], case & 16 != 0));
    if more.is_empty() { base } else { format!("{base}.{more}") }
}

fn letter(byte: u8) -> char {
    if byte.is_ascii() { char::from(byte) } else { UPPER.chars().nth(usize::from(byte) - 128).unwrap_or('\u{fffd}') }
}

/// Parts of a long name, the last one first.
#[derive(Debug, Default)]
pub(super) struct LongName {
    units: Vec<u16>,
    sum: u8,
    /// The part that has to come next; `None` where what came makes no name.
    next: Option<u8>,
}

impl LongName {
    /// Takes the next part.
    pub(super) fn push(&mut self, entry: &[u8]) {
        let (number, sum) = (entry[0], entry[13]);
        if number & 0x40 != 0 {
            *self = Self { units: Vec::new(), sum, next: Some(number & 0x1f) };
        }
        let is_next = self.next == Some(number & 0x1f) && self.sum == sum && (1..=20).contains(&(number & 0x1f));
        if !is_next {
            *self = Self::default();
            return;
        }
        let unit = |at: usize| le::<2>(entry, at) as u16;
        let places = (1..11).step_by(2).chain((14..26).step_by(2)).chain((28..32).step_by(2));
        let part: Vec<u16> = places.map(unit).collect();
        self.units.splice(0..0, part);
        self.next = Some((number & 0x1f) - 1);
    }

    /// The whole name, where it is that of the short entry behind it.
    pub(super) fn finish(self, entry: &[u8]) -> Option<Vec<u8>> {
        let sum = entry[..11].iter().fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
        if self.next != Some(0) || sum != self.sum {
            return None;
        }
        let len = self.units.iter().position(|unit| *unit == 0).unwrap_or(self.units.len());
        Some(utf8(&self.units[..len]))
    }
}
