//! The machine: kernel, type information, lockdown, bpffs, rights, `io_uring`, memory.
//!
//! Owns the answer to "can eBPF tracking work on this machine". Does not look at devices.

use super::{Finding, SCAN_WORKS};
use cdp_seams::storage::Storage;
use std::path::Path;

/// The oldest kernel that eBPF tracking works on.
const KERNEL_MIN: (u32, u32) = (5, 17);
/// What the agent itself may take.
const AGENT_BYTES: u64 = 128 << 20;
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// What eBPF tracking stands on. Anything but `Ok` is in its way.
pub(super) fn ebpf_findings(storage: &dyn Storage) -> Vec<Finding> {
    let lockdown = read_text(storage, "/sys/kernel/security/lockdown");
    let capabilities = field(storage, "/proc/self/status", "CapEff:");
    vec![
        kernel_finding(&release()),
        btf_finding(),
        lockdown_finding(lockdown.as_deref()),
        bpffs_finding(),
        rights_finding(capabilities.as_deref()),
    ]
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn kernel_finding(release: &str) -> Finding {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= KERNEL_MIN {
        return Finding::ok("kernel", release);
    }
    let found = format!("{release}, eBPF tracking needs {}.{} or newer", KERNEL_MIN.0, KERNEL_MIN.1);
    Finding::warn("kernel", found, SCAN_WORKS)
}

fn btf_finding() -> Finding {
    if Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Finding::ok("btf", "/sys/kernel/btf/vmlinux");
    }
    Finding::warn("btf", "this kernel has no type information (CONFIG_DEBUG_INFO_BTF)", SCAN_WORKS)
}

/// `lockdown` is the file's text, where there is one: the level in force is in brackets. From `confidentiality` on
/// no program may read the kernel's memory (`LOCKDOWN_BPF_READ_KERNEL`, security/security.c).
fn lockdown_finding(lockdown: Option<&str>) -> Finding {
    let level = lockdown.and_then(|text| text.split_once('[')?.1.split_once(']')).map(|(level, _)| level);
    match level {
        None => Finding::ok("lockdown", "not in this kernel"),
        Some("confidentiality") => {
            let advice = format!("boot without lockdown=confidentiality; {SCAN_WORKS}");
            Finding::warn("lockdown", "confidentiality: eBPF programs may not read what is written where", &advice)
        }
        Some(level) => Finding::ok("lockdown", level),
    }
}

fn bpffs_finding() -> Finding {
    const ADVICE: &str = "mount -t bpf bpf /sys/fs/bpf; without it only tracker = \"scan\" works";
    match rustix::fs::statfs("/sys/fs/bpf") {
        Ok(stat) if stat.f_type as u64 == BPF_FS_MAGIC => Finding::ok("bpffs", "/sys/fs/bpf"),
        Ok(_) => Finding::ok("bpffs", "not mounted on /sys/fs/bpf: the agent mounts it"),
        Err(error) => Finding::warn("bpffs", format!("/sys/fs/bpf: {error}"), ADVICE),
    }
}

/// `effective` is the mask of capabilities, in hexadecimal.
fn rights_finding(effective: Option<&str>) -> Finding {
    const ADVICE: &str =
        "run as root; without CAP_BPF and CAP_PERFMON tracker = \"scan\" works on whatever you may read";
    let capabilities = effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0);
    let has = |capability: u32| capabilities >> capability & 1 == 1;
    if has(CAP_SYS_ADMIN) || (has(CAP_BPF) && has(CAP_PERFMON)) {
        return Finding::ok("rights", "may load eBPF programs");
    }
    Finding::warn("rights", "CAP_BPF and CAP_PERFMON are missing", ADVICE)
}

/// Whether reads can go through `io_uring`.
pub(super) fn io_uring_finding(storage: &dyn Storage) -> Finding {
    const ADVICE: &str = "sysctl kernel.io_uring_disabled=0; until then plain reads serve, slower";
    let disabled = read_text(storage, "/proc/sys/kernel/io_uring_disabled").map(|text| text.trim().to_owned());
    match (io_uring::IoUring::new(4), disabled) {
        (Ok(_), _) => Finding::ok("io_uring", "available"),
        (Err(error), Some(level)) if level != "0" => {
            Finding::warn("io_uring", format!("disabled (kernel.io_uring_disabled={level}): {error}"), ADVICE)
        }
        (Err(error), _) => Finding::warn("io_uring", error.to_string(), ADVICE),
    }
}

/// Whether there is room for the agent, and for `tracking_bytes` of maps in the kernel. Maps that are there already are
/// counted once more: the answer errs to the safe side.
pub(super) fn memory_finding(storage: &dyn Storage, tracking_bytes: u64) -> Finding {
    let available = field(storage, "/proc/meminfo", "MemAvailable:")
        .and_then(|text| text.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    let Some(kib) = available else {
        return Finding::warn("memory", "unknown", "/proc/meminfo cannot be read");
    };
    let (free, needed) = (kib * 1024, AGENT_BYTES + tracking_bytes);
    let found = format!(
        "{free} bytes free; needed at most {AGENT_BYTES} for the agent and {tracking_bytes} for what eBPF tracks"
    );
    if free >= needed {
        return Finding::ok("memory", found);
    }
    Finding::warn("memory", found, "add memory or protect less; tracker = \"scan\" takes none in the kernel")
}

/// A file of `/proc`, whose length reads as 0.
fn read_text(storage: &dyn Storage, path: &str) -> Option<String> {
    let mut bytes = vec![0; 64 * 1024];
    let read = storage.open(Path::new(path)).and_then(|file| file.read_at(&mut bytes, 0)).ok()?;
    bytes.truncate(read);
    String::from_utf8(bytes).ok()
}

fn field(storage: &dyn Storage, path: &str, name: &str) -> Option<String> {
    let text = read_text(storage, path)?;
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Grade;
    use cdp_seams::storage::SystemStorage;

    #[test]
    fn kernels_are_told_apart_by_number() {
        assert_eq!(kernel_finding("6.1.0-56-amd64").grade, Grade::Ok);
        assert_eq!(kernel_finding("5.17.0").grade, Grade::Ok);
        let old = kernel_finding("5.10.0-30-amd64");
        assert_eq!(old.grade, Grade::Warn);
        assert!(old.advice.expect("advice").contains("scan"));
        assert_eq!(kernel_finding("strange").grade, Grade::Warn);
    }

    #[test]
    fn lockdown_stands_in_the_way_from_confidentiality_on() {
        assert_eq!(lockdown_finding(None).found, "not in this kernel");
        assert_eq!(lockdown_finding(Some("[none] integrity confidentiality\n")).found, "none");
        assert_eq!(lockdown_finding(Some("none [integrity] confidentiality\n")).grade, Grade::Ok);
        assert_eq!(lockdown_finding(Some("none integrity [confidentiality]\n")).grade, Grade::Warn);
    }

    #[test]
    fn two_capabilities_do_or_the_one_that_holds_all() {
        assert_eq!(rights_finding(Some("\t000001ffffffffff")).grade, Grade::Ok);
        assert_eq!(rights_finding(Some("\t000000c000000000")).grade, Grade::Ok);
        assert_eq!(rights_finding(Some("\t0000008000000000")).grade, Grade::Warn);
        assert_eq!(rights_finding(None).grade, Grade::Warn);
    }

    #[test]
    fn memory_is_asked_for_before_it_is_taken() {
        assert_eq!(memory_finding(&SystemStorage, 0).grade, Grade::Ok);
        let short = memory_finding(&SystemStorage, 1 << 50);
        assert_eq!(short.grade, Grade::Warn);
        assert!(short.found.contains(&(1u64 << 50).to_string()), "{}", short.found);
    }
}
