//! Any recovery point as a disk, to any NBD client.
//!
//! * `server`: who is let in. `handshake`, `option`: how a client gets an export. `connection`, `request`, `reply`: what it asks of it.
//!   `wire`: the protocol's numbers.
//! * `exports`, `points`: which disks there are, and which points are open. `disk`: bytes out of blocks. `ahead`: reading ahead.
//! * `overlay`: what clients write.
//! * `socket`, `channel`, `tls`: the line.
//!
//! Blocking threads, and none of them a tokio worker. Nothing here writes to the store.

mod ahead;
mod channel;
mod connection;
pub(crate) mod disk;
pub mod exports;
mod handshake;
pub mod option;
pub mod overlay;
pub mod points;
mod reply;
pub mod request;
pub mod server;
pub mod socket;
pub mod tls;
pub mod wire;

pub use disk::Disk;
