//! The branch office's end: tracks, cuts, reads, encodes and sends.

pub mod agent;
pub mod audit;
pub mod capture;
pub mod cli;
pub mod config;
pub mod connect;
pub mod control;
pub mod cut;
pub mod digests;
pub mod doctor;
pub mod encoder;
pub mod excludes;
pub mod exclusion;
pub mod freeze;
pub mod hooks;
pub mod join;
pub mod layout;
pub mod metrics;
pub mod mounts;
pub mod packing;
pub mod probe;
pub mod reader;
pub mod restore;
pub mod saved;
pub mod sender;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod spool;
pub mod stack;
pub mod state;
pub mod tracker;
pub mod unprotected;
