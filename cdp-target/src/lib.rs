//! The offsite end: receives, journals, and gives any recovery point back.

pub mod authority;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod control;
pub mod enroll;
pub mod groups;
pub mod heal;
pub mod inspect;
pub mod journal;
pub mod kept;
pub mod listener;
pub mod metrics;
pub mod points;
pub mod receiver;
pub mod restore;
pub mod scrub;
pub mod serve;
pub mod status;
pub mod store;
pub mod verify;
