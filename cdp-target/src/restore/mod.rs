//! Getting a recovery point back.

pub mod image;
pub mod keyring;
pub mod output;
pub mod point;
pub mod recalled;
