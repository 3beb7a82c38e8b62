//! Getting a recovery point back.

pub mod image;
pub mod output;
pub mod point;
