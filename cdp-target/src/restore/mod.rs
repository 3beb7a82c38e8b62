//! Getting a recovery point back.

pub mod frames;
pub mod image;
pub mod keyring;
pub mod output;
pub mod point;
