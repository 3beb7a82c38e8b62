//! Single files out of a point, without restoring the volume.
//!
//! * `partition`: which file systems a volume has.
//! * `attach`: the point as a device: our NBD server, `nbdfuse`, a loop device, in a mount namespace of our own. `mount`: the file system
//!   on it, read by the kernel. `program`: the programs that both need.
//! * `tree`: what is mounted, without a way out of it. `name`: names before they are shown or used. `error`: why something cannot be had.
//! * `copy`: what goes to a folder of this machine.
//!
//! Invariant: nothing is written to the store; and whatever a damaged or hostile file system says, nothing is read outside of what is
//! mounted, nothing is written outside of the destination, and what cannot be read is an error that says where, never zeros.

pub(crate) mod attach;
pub(crate) mod copy;
pub(crate) mod error;
mod mount;
pub(crate) mod name;
pub(crate) mod partition;
mod program;
pub(crate) mod tree;
