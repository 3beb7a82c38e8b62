//! `cdp-target`: the offsite store's program.

use std::process::ExitCode;

fn main() -> ExitCode {
    cdp_target::cli::main()
}
