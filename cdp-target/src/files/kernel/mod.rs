//! Every file system that the kernel knows, through the NBD server and a read-only mount.
//!
//! * `attach`: the server, `nbdfuse`, a loop device and the mount, in a mount namespace of our own, and their end.
//! * `tree`: the mounted file system as any other.

mod attach;
mod tree;

pub(crate) use attach::{Attached, KernelError, Source, remove_leftovers};
pub(crate) use tree::KernelTree;
