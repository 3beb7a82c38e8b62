//! The machine the figures come from.

use anyhow::Result;
use std::fs::read_to_string;
use std::path::Path;

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

/// A folder in memory for the files behind devices whose own speed is not what is measured: nothing of theirs goes to
/// a disk, whose writes the tracker's programs would see as well. A common folder where there is none in memory.
pub(crate) fn memory_folder() -> Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    Ok(if memory.is_dir() { tempfile::tempdir_in(memory)? } else { tempfile::tempdir()? })
}
