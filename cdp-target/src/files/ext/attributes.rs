//! Extended attributes, and what stands in them of content that lies within its inode.

use super::Ext;
use super::inode::Inode;
use crate::files::tree::{Attribute, TreeError};
use crate::files::volume::le;

const MAGIC: u64 = 0xea02_0000;
/// Attributes of an inode, at most.
const ATTRIBUTES_MAX: usize = 4096;
/// Of the system's own: the rest of what lies within the inode.
const SYSTEM: u64 = 7;

/// A raw attribute: the number that stands for the beginning of its name, the rest of the name, the value.
type Raw = (u64, Vec<u8>, Vec<u8>);

/// An inode's attributes by their names, and whether these are all.
///
/// # Errors
/// Where they cannot be read.
pub(super) fn attributes(ext: &Ext, inode: &Inode) -> Result<(Vec<Attribute>, bool), TreeError> {
    let Found { raw, has_others } = found(ext, inode)?;
    let mut attributes = Vec::new();
    for (prefix, rest, value) in raw {
        let prefix: &[u8] = match prefix {
            1 => b"user.",
            2 => b"system.posix_acl_access",
            3 => b"system.posix_acl_default",
            4 => b"trusted.",
            6 => b"security.",
            _ => continue,
        };
        let value = if prefix.starts_with(b"system.") {
            access_list(&value).ok_or_else(|| damaged(inode, "a list of access rights makes no sense"))?
        } else {
            value
        };
        attributes.push(([prefix, &rest].concat(), value));
    }
    Ok((attributes, !has_others))
}

/// A list of access rights as the kernel takes it, of what stands on the disk: there, numbers that mean nothing are left out.
fn access_list(raw: &[u8]) -> Option<Vec<u8>> {
    const USER: u64 = 2;
    const GROUP: u64 = 8;
    let mut list = 2_u32.to_le_bytes().to_vec();
    let mut rest = raw.get(4..).filter(|_| le::<4>(raw, 0) == 1)?;
    while !rest.is_empty() {
        let len = if matches!(le::<2>(rest, 0), USER | GROUP) { 8 } else { 4 };
        let entry = rest.get(..len)?;
        list.extend_from_slice(&entry[..4]);
        list.extend_from_slice(entry.get(4..8).unwrap_or(&[0xff; 4]));
        rest = &rest[len..];
    }
    Some(list)
}

/// What of an inode's content lies behind its fields.
///
/// # Errors
/// Where it cannot be read.
pub(super) fn inline_rest(ext: &Ext, inode: &Inode) -> Result<Vec<u8>, TreeError> {
    let mut all = found(ext, inode)?.raw.into_iter();
    let found = all.find(|(prefix, rest, _)| *prefix == SYSTEM && rest == b"data");
    Ok(found.map(|(_, _, value)| value).unwrap_or_default())
}

/// What was found of an inode's attributes.
#[derive(Default)]
struct Found {
    raw: Vec<Raw>,
    /// Whether there are some whose values are inodes of their own.
    has_others: bool,
}

fn found(ext: &Ext, inode: &Inode) -> Result<Found, TreeError> {
    let mut found = Found::default();
    if le::<4>(&inode.behind, 0) == MAGIC {
        collect(inode, &inode.behind[4..], 0, &mut found)?;
    }
    if inode.attributes_block != 0 {
        let block = ext.metadata_block(inode.attributes_block)?;
        if le::<4>(&block, 0) != MAGIC {
            return Err(damaged(inode, "its block of attributes is none"));
        }
        collect(inode, &block, 32, &mut found)?;
    }
    Ok(found)
}

fn damaged(inode: &Inode, what: &str) -> TreeError {
    TreeError::Damaged(format!("inode {}: {what}", inode.number))
}

/// Adds the attributes whose entries begin at `at`; values are counted from the area's beginning.
fn collect(inode: &Inode, area: &[u8], mut at: usize, found: &mut Found) -> Result<(), TreeError> {
    while le::<4>(area, at) != 0 && at + 16 <= area.len() {
        let (len, prefix) = (le::<1>(area, at) as usize, le::<1>(area, at + 1));
        let (start, elsewhere, size) = (le::<2>(area, at + 2), le::<4>(area, at + 4), le::<4>(area, at + 8));
        let name = area.get(at + 16..at + 16 + len).ok_or_else(|| damaged(inode, "an attribute's name is too long"))?;
        found.has_others |= elsewhere != 0;
        if elsewhere == 0 {
            let value = area.get(start as usize..).and_then(|rest| rest.get(..size as usize));
            let value = value.ok_or_else(|| damaged(inode, "an attribute's value lies outside of its place"))?;
            found.raw.push((prefix, name.to_vec(), value.to_vec()));
        }
        if found.raw.len() > ATTRIBUTES_MAX {
            return Err(damaged(inode, "it has too many attributes"));
        }
        at += (16 + len).next_multiple_of(4);
    }
    Ok(())
}
