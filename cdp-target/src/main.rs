//! `cdp-target`: the offsite store's program.

fn main() {}
