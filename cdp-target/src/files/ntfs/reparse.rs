//! Files that are something else: symbolic links of Windows, of its Linux, and of Unix services; and what only Windows can read.

use super::record::{Attribute, Body, kind};
use crate::files::text::utf8_of;
use crate::files::volume::le;

const SYMLINK: u64 = 0xa000_000c;
const MOUNT_POINT: u64 = 0xa000_0003;
const LINUX_SYMLINK: u64 = 0xa000_001d;
/// What a link of Unix services begins with.
const UNIX_LINK: &[u8] = b"IntxLNK\x01";

/// What a reparse point is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reparse {
    /// A link, and where it leads.
    Link(Vec<u8>),
    /// Of that tag.
    Other(u64),
}

/// What a file is besides a file.
pub(super) fn reparse(attributes: &[Attribute]) -> Option<Reparse> {
    let attribute = attributes.iter().find(|attribute| attribute.kind == kind::REPARSE)?;
    let Body::Here(value) = &attribute.body else { return Some(Reparse::Other(0)) };
    let tag = le::<4>(value, 0);
    let target = match tag {
        SYMLINK => windows_target(value, 20),
        MOUNT_POINT => windows_target(value, 16),
        LINUX_SYMLINK => value.get(12..).map(<[u8]>::to_vec),
        _ => None,
    };
    Some(target.filter(|target| !target.is_empty()).map_or(Reparse::Other(tag), Reparse::Link))
}

/// Where a link leads, as it would be shown, with `/` between its parts.
fn windows_target(value: &[u8], names: usize) -> Option<Vec<u8>> {
    let name = |at: usize| {
        let (offset, len) = (le::<2>(value, at) as usize, le::<2>(value, at + 2) as usize);
        let raw = value.get(names..)?.get(offset..)?.get(..len)?;
        Some(String::from_utf8_lossy(&utf8_of(raw)).replace('\\', "/").into_bytes())
    };
    name(12).filter(|shown| !shown.is_empty()).or_else(|| name(8))
}

/// Where a link of Unix services leads, by its content.
pub(super) fn unix_link(content: &[u8]) -> Option<Vec<u8>> {
    let raw = content.strip_prefix(UNIX_LINK)?;
    Some(utf8_of(raw)).filter(|target| !target.is_empty())
}
