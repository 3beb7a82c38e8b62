//! `cdp-source`: the branch office's program.

fn main() -> std::process::ExitCode {
    cdp_source::cli::main()
}
