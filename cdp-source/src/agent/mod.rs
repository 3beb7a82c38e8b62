//! The agent: watches the groups, cuts, and sends.

pub mod status;
