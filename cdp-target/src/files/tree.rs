//! What every file system gives, and how a path is followed in it.
//!
//! Names and targets of links are bytes as they stand on the disk: whoever prints them or makes files of them judges them first.

use std::io;

/// Folders that lie in one another, at most.
pub(crate) const DEPTH_MAX: usize = 256;
/// Entries of a folder, at most: more are a damaged file system.
pub(crate) const ENTRIES_MAX: usize = 8 << 20;
/// Symbolic links on the way of a path, at most.
const LINKS_MAX: usize = 40;
/// Bytes of a symbolic link's target, at most.
pub(crate) const LINK_BYTES_MAX: u64 = 4096;

/// Why something of a file system cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TreeError {
    /// Nothing has that name.
    #[error("there is no such file or folder")]
    NotFound,
    /// The way leads through a file.
    #[error("it is no folder")]
    NotAFolder,
    /// A folder has no content.
    #[error("it is a folder")]
    IsAFolder,
    /// Neither a file nor a folder.
    #[error("it is {0}, which has no content")]
    Special(&'static str),
    /// Nobody has its key here.
    #[error("it is encrypted by its file system, whose keys are not part of a point")]
    Encrypted,
    /// The reader does not know it.
    #[error("{0}")]
    Unsupported(String),
    /// The file system is not what it should be.
    #[error("the file system is damaged: {0}")]
    Damaged(String),
    /// The point does not have it.
    #[error("byte {offset} of the volume cannot be read: {reason}")]
    Lost {
        /// Where in the volume.
        offset: u64,
        /// Why.
        reason: String,
    },
    /// Links that lead nowhere.
    #[error("there are too many symbolic links on its way")]
    Links,
    /// The operator ended it.
    #[error("interrupted")]
    Interrupted,
    /// The machine's fault.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// Names a node within its file system.
pub(crate) type Id = u64;

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A device, a socket, and the like.
    Special(&'static str),
}

/// A moment: seconds and nanoseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Moment {
    /// Seconds, which may lie before 1970.
    pub(crate) seconds: i64,
    /// Nanoseconds of the second.
    pub(crate) nanoseconds: u32,
}

/// A file, a folder, a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Node {
    /// What it is.
    pub(crate) kind: Kind,
    /// Bytes of its content.
    pub(crate) size_bytes: u64,
    /// Permissions, where the file system has them.
    pub(crate) mode: Option<u32>,
    /// User and group, where the file system has them.
    pub(crate) owner: Option<(u32, u32)>,
    /// When its content was changed.
    pub(crate) modified: Option<Moment>,
    /// When its content was read.
    pub(crate) accessed: Option<Moment>,
    /// What a reader has to know of it.
    pub(crate) note: Option<&'static str>,
}

/// An entry of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its name.
    pub(crate) name: Vec<u8>,
    /// Its other name: the short one of FAT and NTFS.
    pub(crate) short: Option<Vec<u8>>,
    /// What it names.
    pub(crate) id: Id,
}

/// A piece of a file's content, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece {
    /// So many bytes of the buffer.
    Bytes(usize),
    /// So many zeros, which take no room.
    Hole(u64),
    /// There is no more.
    End,
}

/// A file's content, from its beginning.
pub(crate) trait Content {
    /// The next piece: at most `buffer.len()` bytes, or a hole of any length.
    ///
    /// # Errors
    /// Where it cannot be read.
    fn next(&mut self, buffer: &mut [u8]) -> Result<Piece, TreeError>;
}

/// An extended attribute: its name as the kernel says it, and its value.
pub(crate) type Attribute = (Vec<u8>, Vec<u8>);

/// A file system that is only read.
pub(crate) trait Tree {
    /// Its topmost folder.
    fn root(&self) -> Id;

    /// What a node is.
    ///
    /// # Errors
    /// Where it cannot be read.
    fn node(&self, id: Id) -> Result<Node, TreeError>;

    /// A folder's entries, without `.` and `..`.
    ///
    /// # Errors
    /// Where it is none, or cannot be read.
    fn list(&self, id: Id) -> Result<Vec<Entry>, TreeError>;

    /// What a symbolic link says.
    ///
    /// # Errors
    /// Where it cannot be read.
    fn link(&self, id: Id) -> Result<Vec<u8>, TreeError>;

    /// A file's content.
    ///
    /// # Errors
    /// Where it is no file, or cannot be read.
    fn open(&self, id: Id) -> Result<Box<dyn Content + '_>, TreeError>;

    /// Its extended attributes that the reader gives, and whether there are no others.
    ///
    /// # Errors
    /// Where they cannot be read.
    fn attributes(&self, id: Id) -> Result<(Vec<Attribute>, bool), TreeError>;

    /// Whether a name that was asked for means the one on the disk.
    fn is_named(&self, asked: &[u8], name: &[u8]) -> bool {
        asked == name
    }

    /// What has to be said of the file system as a whole.
    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }
}

/// The parts of a path; `.` and empty ones left out.
pub(crate) fn parts(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/').filter(|part| !matches!(part, [] | [b'.'])).map(<[u8]>::to_vec).collect()
}

/// The node that a path names, from the root. Links on the way are followed, the last part is only with `follow`.
///
/// # Errors
/// Where there is none, or a folder on the way cannot be read.
pub(crate) fn find(tree: &dyn Tree, path: &[u8], follow: bool) -> Result<Id, TreeError> {
    let mut rest: Vec<Vec<u8>> = parts(path);
    rest.reverse();
    let (mut way, mut links) = (vec![tree.root()], 0);
    while let Some(part) = rest.pop() {
        if part == b".." {
            way.truncate(way.len().saturating_sub(1).max(1));
            continue;
        }
        let here = *way.last().expect("the root stays");
        let id = child(tree, here, &part)?;
        let is_followed = (follow || !rest.is_empty()) && tree.node(id)?.kind == Kind::Link;
        if !is_followed {
            way.push(id);
            continue;
        }
        links += 1;
        if links > LINKS_MAX {
            return Err(TreeError::Links);
        }
        let target = tree.link(id)?;
        if target.first() == Some(&b'/') {
            way.truncate(1);
        }
        rest.extend(parts(&target).into_iter().rev());
    }
    Ok(*way.last().expect("the root stays"))
}

/// The entry of a folder that has a name: exactly that one first.
fn child(tree: &dyn Tree, folder: Id, name: &[u8]) -> Result<Id, TreeError> {
    let entries = tree.list(folder)?;
    let exact = entries.iter().find(|entry| entry.name == name);
    let alike = || entries.iter().find(|entry| tree.is_named(name, &entry.name));
    let short = || entries.iter().find(|entry| entry.short.as_ref().is_some_and(|short| tree.is_named(name, short)));
    exact.or_else(alike).or_else(short).map(|entry| entry.id).ok_or(TreeError::NotFound)
}

/// The folders that one is in, while it goes through a tree.
#[derive(Debug, Default)]
pub(crate) struct Way(Vec<Id>);

impl Way {
    /// Goes into a folder.
    ///
    /// # Errors
    /// Where it lies within itself, or too deep.
    pub(crate) fn enter(&mut self, id: Id) -> Result<(), TreeError> {
        if self.0.contains(&id) {
            return Err(TreeError::Damaged("the folder lies within itself".into()));
        }
        if self.0.len() >= DEPTH_MAX {
            return Err(TreeError::Unsupported(format!("more than {DEPTH_MAX} folders lie in one another")));
        }
        self.0.push(id);
        Ok(())
    }

    /// Goes out of the last folder.
    pub(crate) fn leave(&mut self) {
        self.0.pop();
    }
}

/// Whether two names differ in upper and lower case only, as far as they are text.
pub(crate) fn is_same_but_case(asked: &[u8], name: &[u8]) -> bool {
    match (std::str::from_utf8(asked), std::str::from_utf8(name)) {
        (Ok(asked), Ok(name)) => {
            asked.chars().flat_map(char::to_uppercase).eq(name.chars().flat_map(char::to_uppercase))
        }
        _ => asked == name,
    }
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

    #[test]
    fn names_are_compared_without_case_where_they_are_text() {
        assert!(is_same_but_case("größe.TXT".as_bytes(), "GRÖSSE.txt".as_bytes()));
        assert!(is_same_but_case(b"a", b"A") && !is_same_but_case(b"a", b"B"));
        assert!(is_same_but_case(b"\xff", b"\xff") && !is_same_but_case(b"\xffa", b"\xffA"));
    }
}
