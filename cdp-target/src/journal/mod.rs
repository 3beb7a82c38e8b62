//! One group's history in one folder.

pub mod index;
pub mod manifest;
pub mod recovery;
pub mod segment;
pub mod view;
pub mod writer;
