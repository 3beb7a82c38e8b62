//! The words both sides share: units and ids, the frame, the records, the control messages, the session state machines.
//!
//! No sockets, no files, no clock: time and random bytes come in as arguments. Where to look:
//! * `units`, `limits`, `label`: newtypes, bounds, and what may name a point.
//! * `frame`, `record`, `codec`, `packer`, `seal`, `escrow`: the bytes of a group's history and the keys over them.
//! * `layout`: how a disk is laid out.
//! * `message`: the control messages; `holding`: what a target says it holds; `recall`: what is asked of a point; `bundle`, `join`: how an office comes to its certificate.
//! * `session`: who may say what when, and what is sent again after a broken line.

pub mod bundle;
pub mod codec;
pub mod escrow;
pub mod frame;
pub mod hex;
pub mod holding;
pub mod join;
pub mod label;
pub mod layout;
pub mod limits;
pub mod message;
pub mod packer;
pub mod recall;
pub mod record;
pub mod seal;
pub mod session;
pub mod units;
