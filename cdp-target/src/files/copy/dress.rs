//! Whose a copy is, who may have it, its times, and its extended attributes.
//!
//! Without root a copy is whoever's makes it: then it gets no rights that count for somebody else (set-user-id and the like).

use super::CopyError;
use crate::files::tree::{Item, Kind, Node};
use rustix::fd::OwnedFd;
use rustix::fs::{Gid, Mode, Timestamps, Uid, XattrFlags};

/// What a copy wears.
#[derive(Clone, Copy)]
pub(super) struct Dress<'a> {
    node: &'a Node,
    is_root: bool,
}

impl<'a> Dress<'a> {
    pub(super) const fn of(node: &'a Node, is_root: bool) -> Self {
        Self { node, is_root }
    }

    /// The mode that it is made with: nobody else's, until it has its own.
    pub(super) fn making(self) -> Mode {
        if self.node.kind == Kind::Folder { Mode::RWXU } else { Mode::RUSR | Mode::WUSR }
    }

    /// The mode that it gets.
    pub(super) fn mode(self) -> Mode {
        let allowed = if self.is_root { 0o7777 } else { 0o1777 };
        Mode::from_raw_mode(self.node.mode & allowed)
    }

    /// The owner that it gets.
    pub(super) fn owner(self) -> Option<(Uid, Gid)> {
        let (user, group) = self.node.owner;
        // The highest number means nobody to the kernel.
        (self.is_root && user != u32::MAX && group != u32::MAX).then(|| (Uid::from_raw(user), Gid::from_raw(group)))
    }
}

/// The times of a node.
pub(super) const fn times(node: &Node) -> Timestamps {
    Timestamps { last_access: node.accessed, last_modification: node.modified }
}

/// Gives a file the extended attributes of an item; tells whether it has them all.
///
/// # Errors
/// Where they cannot be read.
pub(super) fn attributes(item: &Item, file: &OwnedFd) -> Result<bool, CopyError> {
    let mut has_all = true;
    for (name, value) in item.attributes()? {
        // Some belong to root, and some file systems have none.
        has_all &= rustix::fs::fsetxattr(file, name.as_slice(), &value, XattrFlags::empty()).is_ok();
    }
    Ok(has_all)
}
