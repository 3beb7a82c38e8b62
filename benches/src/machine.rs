//! The machine the figures come from.

use anyhow::Result;
use std::fs::read_to_string;

/// Processor, memory, kernel and day in a line.
pub(crate) fn describe() -> Result<String> {
    let field = |file: &str, name: &str| -> Result<String> {
        let text = read_to_string(file)?;
        let line = text.lines().find(|line| line.starts_with(name)).and_then(|line| line.split_once(':'));
        Ok(line.map_or_else(|| "unknown".into(), |(_, value)| value.trim().to_owned()))
    };
    let cores = std::thread::available_parallelism()?;
    let kernel = read_to_string("/proc/sys/kernel/osrelease")?;
    let processor = field("/proc/cpuinfo", "model name")?;
    let memory = field("/proc/meminfo", "MemTotal")?;
    Ok(format!("Machine: {cores} cores of {processor}, {memory} of memory, Linux {}.", kernel.trim()))
}
