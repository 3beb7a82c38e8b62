//! Getting a recovery point back.

pub mod frames;
pub mod image;
pub mod keyring;
pub mod output;
pub mod point;
pub mod progress;
pub(crate) mod proof;
pub(crate) mod qcow2;
pub mod recalled;
mod tree_hash;
