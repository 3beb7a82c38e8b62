//! Whose a copy is, who may have it, its times, and its extended attributes.
//!
//! Without root a copy is whoever's makes it: then it gets no rights that count for somebody else (set-user-id and the like).

use super::CopyError;
use crate::files::tree::{Id, Moment, Node, Tree};
use rustix::fd::OwnedFd;
use rustix::fs::{Gid, Mode, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};

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

    /// The mode that it is made with: nobody else's, until it has its own. Where its file system has none, what is usual here.
    pub(super) fn making(self) -> Mode {
        match (self.node.mode, self.node.kind) {
            (Some(_), crate::files::tree::Kind::Folder) => Mode::RWXU,
            (Some(_), _) => Mode::RUSR | Mode::WUSR,
            (None, crate::files::tree::Kind::Folder) => Mode::RWXU | Mode::RWXG | Mode::RWXO,
            (None, _) => Mode::from_raw_mode(0o666),
        }
    }

    /// The mode that it gets.
    pub(super) fn mode(self) -> Option<Mode> {
        let allowed = if self.is_root { 0o7777 } else { 0o1777 };
        self.node.mode.map(|mode| Mode::from_raw_mode(mode & allowed))
    }

    /// The owner that it gets.
    pub(super) fn owner(self) -> Option<(Uid, Gid)> {
        let (user, group) = self.node.owner.filter(|_| self.is_root)?;
        // The highest number means nobody to the kernel.
        (user != u32::MAX && group != u32::MAX).then(|| (Uid::from_raw(user), Gid::from_raw(group)))
    }
}

/// The times of a node; what it does not have stays as it is.
pub(super) fn times(node: &Node) -> Timestamps {
    let time = |moment: Option<Moment>| match moment {
        Some(Moment { seconds, nanoseconds }) => Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() },
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
    };
    Timestamps { last_access: time(node.accessed), last_modification: time(node.modified) }
}

/// Gives a file the extended attributes of a node; tells whether it has them all.
///
/// # Errors
/// Where they cannot be read.
pub(super) fn attributes(tree: &dyn Tree, id: Id, file: &OwnedFd) -> Result<bool, CopyError> {
    let (attributes, mut has_all) = tree.attributes(id)?;
    for (name, value) in attributes {
        // Some belong to root, and some file systems have none.
        has_all &= rustix::fs::fsetxattr(file, name.as_slice(), &value, XattrFlags::empty()).is_ok();
    }
    Ok(has_all)
}
