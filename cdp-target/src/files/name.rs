//! Names of files, judged before they are shown to a person or used on this machine.
//!
//! Names and targets of links are bytes, as they stand on the disk.

/// The parts of a path; `.` and empty ones left out.
pub(crate) fn parts(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/').filter(|part| !matches!(part, [] | [b'.'])).map(<[u8]>::to_vec).collect()
}

/// A name as a person may be shown it: what would move a terminal's cursor, or is no text, is written `\xNN`.
pub(crate) fn shown(name: &[u8]) -> String {
    let mut text = String::with_capacity(name.len());
    for chunk in name.utf8_chunks() {
        for letter in chunk.valid().chars() {
            if letter.is_control() || letter == '\\' || is_direction(letter) {
                let mut bytes = [0; 4];
                letter.encode_utf8(&mut bytes).bytes().for_each(|byte| push_byte(&mut text, byte));
            } else {
                text.push(letter);
            }
        }
        chunk.invalid().iter().for_each(|byte| push_byte(&mut text, *byte));
    }
    text
}

fn push_byte(text: &mut String, byte: u8) {
    use std::fmt::Write as _;
    match byte {
        b'\\' => text.push_str("\\\\"),
        other => write!(text, "\\x{other:02x}").expect("text takes anything"),
    }
}

/// Letters that turn the direction of what is behind them.
const fn is_direction(letter: char) -> bool {
    matches!(letter, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Whether a file of this machine may have that name: it is one part of a path, and not a way out of its folder.
pub(crate) fn is_safe_name(name: &[u8]) -> bool {
    !matches!(name, [] | [b'.'] | [b'.', b'.'])
        && name.len() <= 255
        && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_judged_before_it_is_shown_or_used() {
        for (name, text) in [
            (&b"plain name.txt"[..], "plain name.txt"),
            ("Übergröße".as_bytes(), "Übergröße"),
            (b"\x1b[2Jgone", "\\x1b[2Jgone"),
            (b"a\nb", "a\\x0ab"),
            (b"back\\slash", "back\\\\slash"),
            (b"\xff\xfe", "\\xff\\xfe"),
            ("\u{202e}txt.exe".as_bytes(), "\\xe2\\x80\\xaetxt.exe"),
        ] {
            assert_eq!(shown(name), text);
        }
        for bad in [&b""[..], b".", b"..", b"a/b", b"../x", b"a\0b", &[b'x'; 256]] {
            assert!(!is_safe_name(bad), "{bad:?}");
        }
        for good in [&b"..."[..], b".hidden", b"\xff", b"a\\b", &[b'x'; 255]] {
            assert!(is_safe_name(good), "{good:?}");
        }
    }
}
