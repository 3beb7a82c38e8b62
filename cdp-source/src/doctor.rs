//! What works on this machine, what does not, and what to do about it.
//!
//! Looks at each thing on its own and never changes anything. Owns the answer to "can eBPF tracking work here": the
//! kernel's version, its type information, bpffs and the rights of this process.

use crate::config::{Config, TrackerChoice};
use crate::probe;
use crate::state::StateFolder;
use cdp_seams::storage::Storage;
use serde::Serialize;
use std::path::Path;

/// The oldest kernel that eBPF tracking works on.
const KERNEL_MIN: (u32, u32) = (5, 17);
/// Free memory in KiB below which the agent may be killed under load.
const MEMORY_KIB_MIN: u64 = 256 * 1024;
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// How a thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Grade {
    /// Works.
    Ok,
    /// Works, but.
    Warn,
    /// Does not work.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub subject: String,
    /// How it stands.
    pub grade: Grade,
    /// What was found.
    pub found: String,
    /// What to do.
    pub advice: Option<String>,
}

impl Finding {
    /// All is well.
    #[must_use]
    pub fn ok(subject: &str, found: impl Into<String>) -> Self {
        Self { subject: subject.to_owned(), grade: Grade::Ok, found: found.into(), advice: None }
    }

    /// Works, but.
    #[must_use]
    pub fn warn(subject: &str, found: impl Into<String>, advice: &str) -> Self {
        Self { subject: subject.to_owned(), grade: Grade::Warn, found: found.into(), advice: Some(advice.to_owned()) }
    }

    /// Does not work.
    #[must_use]
    pub fn fail(subject: &str, found: impl Into<String>, advice: &str) -> Self {
        Self { grade: Grade::Fail, ..Self::warn(subject, found, advice) }
    }
}

const SCAN_WORKS: &str = "tracker = \"scan\" works here: it compares the whole volume at each cut";

/// Everything but the line to the target.
#[must_use]
pub fn examine(state: &StateFolder) -> Vec<Finding> {
    let storage = &**state.storage();
    let mut findings = ebpf_findings(storage);
    findings.push(io_uring_finding(storage));
    findings.push(memory_finding(storage));
    match state.config() {
        Ok(config) => findings.extend(volume_findings(state, &config)),
        Err(error) => findings.push(Finding::fail(
            "configuration",
            format!("{:#}", anyhow::Error::new(error)),
            "correct source.toml in the state folder",
        )),
    }
    findings
}

/// Why eBPF tracking cannot work here; `None` where nothing stands in its way.
#[must_use]
pub fn ebpf_obstacle(storage: &dyn Storage) -> Option<Finding> {
    ebpf_findings(storage).into_iter().find(|finding| finding.grade != Grade::Ok)
}

fn ebpf_findings(storage: &dyn Storage) -> Vec<Finding> {
    vec![kernel_finding(&release()), btf_finding(), bpffs_finding(), rights_finding(storage)]
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

fn bpffs_finding() -> Finding {
    const ADVICE: &str = "mount -t bpf bpf /sys/fs/bpf; without it only tracker = \"scan\" works";
    match rustix::fs::statfs("/sys/fs/bpf") {
        Ok(stat) if stat.f_type as u64 == BPF_FS_MAGIC => Finding::ok("bpffs", "/sys/fs/bpf"),
        Ok(_) => Finding::warn("bpffs", "nothing is mounted on /sys/fs/bpf", ADVICE),
        Err(error) => Finding::warn("bpffs", format!("/sys/fs/bpf: {error}"), ADVICE),
    }
}

fn rights_finding(storage: &dyn Storage) -> Finding {
    const ADVICE: &str =
        "run as root; without CAP_BPF and CAP_PERFMON tracker = \"scan\" works on whatever you may read";
    let capabilities = field(storage, "/proc/self/status", "CapEff:")
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .unwrap_or(0);
    let has = |capability: u32| capabilities >> capability & 1 == 1;
    if has(CAP_SYS_ADMIN) || (has(CAP_BPF) && has(CAP_PERFMON)) {
        return Finding::ok("rights", "may load eBPF programs");
    }
    Finding::warn("rights", "CAP_BPF and CAP_PERFMON are missing", ADVICE)
}

fn io_uring_finding(storage: &dyn Storage) -> Finding {
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

fn memory_finding(storage: &dyn Storage) -> Finding {
    let available = field(storage, "/proc/meminfo", "MemAvailable:")
        .and_then(|text| text.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    match available {
        Some(kib) if kib >= MEMORY_KIB_MIN => Finding::ok("memory", format!("{} bytes free", kib * 1024)),
        Some(kib) => Finding::warn(
            "memory",
            format!("{} bytes free", kib * 1024),
            "the agent needs up to 128 MiB, and 160 MiB of kernel memory for each TiB tracked",
        ),
        None => Finding::warn("memory", "unknown", "/proc/meminfo cannot be read"),
    }
}

fn volume_findings(state: &StateFolder, config: &Config) -> Vec<Finding> {
    let storage = &**state.storage();
    let obstacle = ebpf_obstacle(storage);
    let volumes = config.groups.iter().flat_map(|(group, config)| config.volumes.iter().map(move |v| (group, v)));
    let mut findings: Vec<Finding> = volumes
        .map(|(group, volume)| {
            let subject = format!("volume {group}/{}", volume.name);
            let probe = match probe::probe(storage, &volume.device) {
                Ok(probe) => probe,
                Err(error) => {
                    let advice = error.hint().unwrap_or("bring the device back, or unprotect the volume");
                    return Finding::fail(&subject, format!("{:#}", anyhow::Error::new(error)), advice);
                }
            };
            let tracker = tracker_for(volume.tracker, &probe, obstacle.as_ref());
            match tracker {
                Err(reason) => Finding::fail(&subject, reason, SCAN_WORKS),
                Ok(tracker) if probe.holds(storage, state.root()) => Finding::warn(
                    &subject,
                    format!(
                        "{}: {}, tracker {tracker}; the state folder lies on it",
                        volume.device.display(),
                        probe.describe()
                    ),
                    "every log line written there is part of the next point; better keep the state folder elsewhere",
                ),
                Ok(tracker) => Finding::ok(
                    &subject,
                    format!("{}: {}, tracker {tracker}", volume.device.display(), probe.describe()),
                ),
            }
        })
        .collect();
    if findings.is_empty() {
        findings.push(Finding::warn("volumes", "none is protected", "cdp-source protect NAME=DEVICE"));
    }
    findings
}

/// Name of the tracker that will serve a volume.
///
/// # Errors
/// Says why eBPF was asked for and cannot be had.
pub fn tracker_for(
    choice: TrackerChoice,
    probe: &probe::Probe,
    obstacle: Option<&Finding>,
) -> Result<&'static str, String> {
    match (choice, probe.is_block(), obstacle) {
        (TrackerChoice::Scan, _, _) | (TrackerChoice::Auto, false, _) | (TrackerChoice::Auto, _, Some(_)) => Ok("scan"),
        (TrackerChoice::Auto | TrackerChoice::Ebpf, true, None) => Ok("ebpf"),
        (TrackerChoice::Ebpf, false, _) => Err("tracker = \"ebpf\" is asked for an image file".into()),
        (TrackerChoice::Ebpf, true, Some(obstacle)) => {
            Err(format!("tracker = \"ebpf\" cannot work here: {}: {}", obstacle.subject, obstacle.found))
        }
    }
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
    use crate::probe::{Kind, Probe};

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
    fn the_tracker_follows_the_choice_the_device_and_the_kernel() {
        let probe = |kind| Probe {
            device: "/dev/x".into(),
            kind,
            size_bytes: 1,
            content: None,
            mounted_on: Vec::new(),
            holders: Vec::new(),
        };
        let block = probe(Kind::Block { number: "8:0".into(), disk: "sda".into(), partition: None });
        let file = probe(Kind::File { file_system: 1, inode: 1 });
        let obstacle = Finding::warn("btf", "none", "");
        assert_eq!(tracker_for(TrackerChoice::Auto, &block, None), Ok("ebpf"));
        assert_eq!(tracker_for(TrackerChoice::Auto, &block, Some(&obstacle)), Ok("scan"));
        assert_eq!(tracker_for(TrackerChoice::Auto, &file, None), Ok("scan"));
        assert_eq!(tracker_for(TrackerChoice::Scan, &block, None), Ok("scan"));
        assert!(tracker_for(TrackerChoice::Ebpf, &file, None).is_err());
        assert!(tracker_for(TrackerChoice::Ebpf, &block, Some(&obstacle)).expect_err("no btf").contains("btf"));
    }
}
