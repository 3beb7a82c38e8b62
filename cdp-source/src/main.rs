//! `cdp-source`: the branch office's program.

fn main() {}
