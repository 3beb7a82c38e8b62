//! What a client may ask before it has an export: the options of the handshake, read from bytes that nobody has checked.
//!
//! Invariant: nothing is believed of a length that the bytes there do not bear out, and nothing is taken that has more or fewer
//! bytes than it says. Decides nothing: `handshake` answers.

use super::wire::{OPTION, STRING_BYTES_MAX, info, option};

/// Bytes of an option's header.
pub const HEADER_BYTES: usize = 16;
/// Bytes of an option's data that are looked at: a name, and more queries than anybody has.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;

/// The header of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which option.
    pub number: u32,
    /// Bytes of data that follow.
    pub len: u32,
}

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked<'a> {
    /// This export, in the way that cannot be refused with words.
    ExportName(&'a str),
    /// To end.
    Abort,
    /// Which exports there are.
    List,
    /// To go on encrypted.
    StartTls,
    /// What an export is like; `go`: and then to have it.
    Info {
        /// The export.
        name: &'a str,
        /// Whether it is to be had.
        go: bool,
        /// What is to be told.
        wants: Wants,
    },
    /// Replies that say what they are.
    StructuredReply,
    /// Which metadata contexts match the queries.
    ListMeta {
        /// Of which export.
        name: &'a str,
        /// Without any, all.
        queries: Vec<&'a str>,
    },
    /// The same, to be used from here on.
    SetMeta {
        /// Of which export.
        name: &'a str,
        /// Without any, none.
        queries: Vec<&'a str>,
    },
    /// Something that this server does not know.
    Unknown,
}

/// What a client asks to be told of an export, beside what has to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// Its own name for it.
    pub name: bool,
    /// A line for people.
    pub description: bool,
    /// The sizes of requests.
    pub block_size: bool,
}

/// Why data is none of the option it came with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A length says more than there is, or there is more than is said.
    #[error("the lengths in the option do not fit its own")]
    Length,
    /// Data where there is none to be.
    #[error("the option takes no data")]
    Data,
    /// A string that is not UTF-8, has a NUL, or is too long.
    #[error("a string has to be UTF-8 without NUL, of at most {STRING_BYTES_MAX} bytes")]
    Text,
}

/// Reads an option's header; `None` where it is none.
#[must_use]
pub fn parse_header(bytes: &[u8; HEADER_BYTES]) -> Option<Header> {
    let mut fields = Fields(bytes);
    let magic = fields.u64().ok()?;
    let header = Header { number: fields.u32().ok()?, len: fields.u32().ok()? };
    (magic == OPTION).then_some(header)
}

/// Reads an option's data.
///
/// # Errors
/// Where it is not what the option takes.
pub fn parse(number: u32, data: &[u8]) -> Result<Asked<'_>, Malformed> {
    let mut fields = Fields(data);
    let asked = match number {
        option::EXPORT_NAME => return Ok(Asked::ExportName(text(data)?)),
        // What comes with it is ignored, as the protocol has it.
        option::ABORT => return Ok(Asked::Abort),
        option::LIST | option::STARTTLS | option::STRUCTURED_REPLY if !data.is_empty() => return Err(Malformed::Data),
        option::LIST => Asked::List,
        option::STARTTLS => Asked::StartTls,
        option::STRUCTURED_REPLY => Asked::StructuredReply,
        option::INFO | option::GO => {
            Asked::Info { name: fields.text()?, go: number == option::GO, wants: fields.wants()? }
        }
        option::LIST_META_CONTEXT => Asked::ListMeta { name: fields.text()?, queries: fields.queries()? },
        option::SET_META_CONTEXT => Asked::SetMeta { name: fields.text()?, queries: fields.queries()? },
        _ => return Ok(Asked::Unknown),
    };
    if fields.0.is_empty() { Ok(asked) } else { Err(Malformed::Length) }
}

fn text(bytes: &[u8]) -> Result<&str, Malformed> {
    let fits = bytes.len() <= STRING_BYTES_MAX && !bytes.contains(&0);
    std::str::from_utf8(bytes).ok().filter(|_| fits).ok_or(Malformed::Text)
}

/// Bytes that are taken from the front.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Malformed::Length)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        Ok(self.take(N)?.try_into().expect("as many as were asked for"))
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    fn text(&mut self) -> Result<&'a str, Malformed> {
        let len = self.u32()? as usize;
        text(self.take(len)?)
    }

    fn wants(&mut self) -> Result<Wants, Malformed> {
        let mut wants = Wants::default();
        for _ in 0..self.u16()? {
            match self.u16()? {
                info::NAME => wants.name = true,
                info::DESCRIPTION => wants.description = true,
                info::BLOCK_SIZE => wants.block_size = true,
                _ => {}
            }
        }
        Ok(wants)
    }

    fn queries(&mut self) -> Result<Vec<&'a str>, Malformed> {
        let count = self.u32()? as usize;
        // Each has a length at least.
        if count > self.0.len() / 4 {
            return Err(Malformed::Length);
        }
        (0..count).map(|_| self.text()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str, wants: &[u16]) -> Vec<u8> {
        let mut data = (name.len() as u32).to_be_bytes().to_vec();
        data.extend(name.as_bytes());
        data.extend((wants.len() as u16).to_be_bytes());
        data.extend(wants.iter().flat_map(|want| want.to_be_bytes()));
        data
    }

    #[test]
    fn options_are_read() {
        let data = info("root@2h", &[3, 1, 900]);
        let wants = Wants { name: true, description: false, block_size: true };
        assert_eq!(parse(option::GO, &data), Ok(Asked::Info { name: "root@2h", go: true, wants }));
        assert_eq!(parse(option::EXPORT_NAME, b""), Ok(Asked::ExportName("")));
        assert_eq!(parse(option::ABORT, b"whatever"), Ok(Asked::Abort));
        assert_eq!(parse(77, b"whatever"), Ok(Asked::Unknown));
        let mut data = info("root", &[])[..8].to_vec();
        data.extend([0, 0, 0, 1, 0, 0, 0, 5]);
        data.extend(b"base:");
        assert_eq!(parse(option::SET_META_CONTEXT, &data), Ok(Asked::SetMeta { name: "root", queries: vec!["base:"] }));
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        let mut longer = info("root", &[3]);
        longer.push(0);
        assert_eq!(parse(option::GO, &longer), Err(Malformed::Length));
        let whole = info("root", &[3]);
        for len in 0..whole.len() {
            assert_eq!(parse(option::GO, &whole[..len]), Err(Malformed::Length), "{len} bytes");
        }
        let many = [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];
        assert_eq!(parse(option::LIST_META_CONTEXT, &many), Err(Malformed::Length));
        assert_eq!(parse(option::LIST, b"x"), Err(Malformed::Data));
        assert_eq!(parse(option::EXPORT_NAME, b"ro\0ot"), Err(Malformed::Text));
        assert_eq!(parse(option::EXPORT_NAME, b"\xff"), Err(Malformed::Text));
        assert_eq!(parse(option::EXPORT_NAME, &[b'a'; STRING_BYTES_MAX + 1]), Err(Malformed::Text));
    }
}
