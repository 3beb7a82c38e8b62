//! Single files out of a point, without restoring the volume.
//!
//! * `volume`: the bytes of a partition, cached and read ahead. `partition`: which file systems a volume has.
//! * `tree`: what every file system gives, and how a path is followed in it.
//! * `ext`, `ntfs`, `fat`: readers of file systems that need no rights. `kernel`: every other, by the kernel's own, through the NBD server.
//! * `copy`: what goes to a folder of this machine.
//!
//! Invariant: nothing is written to the store; and whatever a damaged or hostile file system says, nothing is written outside of the
//! destination, memory stays bounded, and what cannot be read is an error that says where, never zeros.

pub(crate) mod copy;
pub(crate) mod ext;
pub(crate) mod fat;
#[cfg(test)]
mod hostile;
pub(crate) mod kernel;
pub(crate) mod ntfs;
pub(crate) mod partition;
mod text;
pub(crate) mod tree;
pub(crate) mod volume;
