//! What happens in a simulation, line by line, for whoever replays a seed with `CDP_SIM_TRACE=1`.

use std::sync::OnceLock;

/// Prints a line, if lines are wanted.
pub(crate) fn trace(line: impl FnOnce() -> String) {
    static WANTED: OnceLock<bool> = OnceLock::new();
    if *WANTED.get_or_init(|| std::env::var_os("CDP_SIM_TRACE").is_some()) {
        eprintln!("{}", line());
    }
}
