//! What an agent takes of the machine's memory for a volume of 1 TiB: its own, and the kernel's for the tracking.
//!
//! The maps of the tracking are the kernel's; an agent has them mapped, so that the kernel counts their pages twice. They are left out of its own.
//! The volume is a sparse file. `CDP_MEMORY_GIB` of it are data, half of which does not compress; by default 1, all near the beginning, and
//! the first copy is looked at until they are acked. Where the variable is set they are spread over all of it, and it is looked at to
//! its end, which means reading 1 TiB. Needs root, kernel BTF and loop devices; says so and passes over where they are missing.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, ensure};
use cdp_tests::files::content;
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::{peak_memory, tool, wait_for};
use cdp_tests::site::{PATIENCE, Site};
use serde_json::Value;
use std::fs::{File, read_to_string};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const VOLUME_BYTES: u64 = 1 << 40;
const AGENT_BYTES_MAX: u64 = 128 * MIB;
const KERNEL_BYTES_MAX: u64 = 160 * MIB;
/// Of the volume's first part: so far apart lie pieces of a MiB where nothing else is said.
const NEAR: u64 = 4 * MIB;
/// How long a whole first copy may take.
const WHOLE: Duration = Duration::from_secs(4 * 3600);

/// Bytes of kernel memory in the maps that are pinned below a folder, by the kernel's own account.
fn map_bytes(pins: &Path) -> Result<u64> {
    let mut bytes = 0;
    for path in tool("find", &[&pins.display().to_string(), "-type", "f"])?.lines() {
        // Programs and links are pinned there too.
        let Ok(shown) = tool("bpftool", &["--json", "map", "show", "pinned", path]) else { continue };
        let map: Value = serde_json::from_str(&shown)?;
        bytes += map["bytes_memlock"].as_u64().with_context(|| format!("bytes_memlock in {map}"))?;
    }
    Ok(bytes)
}

/// Bytes of the maps that a process has mapped and touched: the kernel counts them as the process's too.
fn mapped_bytes(pid: u32) -> Result<u64> {
    let (mut is_map, mut kib) = (false, 0);
    for line in read_to_string(format!("/proc/{pid}/smaps"))?.lines() {
        if let Some(rss) = line.strip_prefix("Rss:") {
            kib += if is_map { rss.trim().trim_end_matches(" kB").parse::<u64>()? } else { 0 };
        } else if line.starts_with(|first: char| first.is_ascii_hexdigit() && !first.is_ascii_uppercase()) {
            is_map = line.ends_with("bpf-map");
        }
    }
    Ok(kib * 1024)
}

fn status(site: &Site) -> Result<Value> {
    Ok(serde_json::from_str(&site.source(&["status", "--json"])?)?)
}

#[test]
fn a_volume_of_a_tebibyte_takes_128_mib_and_160_of_the_kernel() -> Result<()> {
    const TEST: &str = "a_volume_of_a_tebibyte_takes_128_mib_and_160_of_the_kernel";
    if !cdp_tests::privileged(TEST) || !cdp_tests::has(TEST, "/usr/sbin/bpftool") {
        return Ok(());
    }
    let gib: Option<u64> = std::env::var("CDP_MEMORY_GIB").ok().map(|number| number.parse()).transpose()?;
    let pieces = gib.unwrap_or(1) * 1024;
    let apart = if gib.is_some() { VOLUME_BYTES / pieces } else { NEAR };
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("disk.img");
    let file = File::create_new(&image)?;
    file.set_len(VOLUME_BYTES)?;
    for piece in 0..pieces {
        file.write_all_at(&content(piece, MIB as usize), piece * apart)?;
    }
    file.sync_all()?;
    let device = LoopDevice::attach(&image)?;
    let mut site = Site::new(folder.path())?;
    site.source(&["protect", &format!("data={}", device.node().display())])?;
    site.start_source()?;
    let pid = wait_for("the agent to answer", PATIENCE, || {
        let pid = status(&site).ok().and_then(|status| status["pid"].as_u64());
        Ok(pid.map(|pid| pid as u32))
    })?;
    let patience = if gib.is_some() { WHOLE } else { 2 * PATIENCE };
    let acked = wait_for("the first copy", patience, || {
        let group = status(&site)?["groups"][0].clone();
        let acked = group["acked_bytes"].as_u64().context("acked_bytes")?;
        // Half of the data cannot be packed any tighter.
        let is_done = if gib.is_some() { group["acked_epoch"].is_u64() } else { acked >= pieces * MIB / 2 };
        std::thread::park_timeout(Duration::from_millis(500));
        Ok(is_done.then_some(acked))
    })?;
    let kernel_bytes = map_bytes(&site.pins().context("the tracking is pinned")?)?;
    let agent_bytes = peak_memory(pid)? - mapped_bytes(pid)?;
    eprintln!(
        "{} MiB of data, {} MiB acked: {} MiB at the agent's peak beside the maps, {} MiB of maps; the server {} MiB",
        pieces,
        acked / MIB,
        agent_bytes / MIB,
        kernel_bytes / MIB,
        site.target_daemon().peak_memory()? / MIB
    );
    ensure!(agent_bytes <= AGENT_BYTES_MAX, "the agent took {agent_bytes} bytes, {AGENT_BYTES_MAX} allowed");
    ensure!(kernel_bytes >= VOLUME_BYTES / 4096 / 8 * 4, "{kernel_bytes} bytes are not all of the maps");
    ensure!(kernel_bytes <= KERNEL_BYTES_MAX, "the maps take {kernel_bytes} bytes, {KERNEL_BYTES_MAX} allowed");
    site.kill_source()
}
