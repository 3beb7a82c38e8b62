//! The agent: watches the groups, cuts, and sends.

mod encoding;
pub mod group;
pub mod ledger;
pub mod status;
