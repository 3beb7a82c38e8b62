//! What works on this machine, what does not, and what to do about it.
//!
//! Looks at each thing on its own and never changes anything. Owns the grades and the choice of a volume's tracker;
//! `machine` looks at the kernel, the rights and the memory, `volumes` at what is protected and what could be.

mod machine;
mod volumes;

use crate::config::TrackerChoice;
use crate::probe::Probe;
use crate::state::StateFolder;
use crate::tracker::device::Device;
use cdp_seams::storage::Storage;
use serde::Serialize;

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
    let mut findings = machine::ebpf_findings(storage);
    findings.push(machine::io_uring_finding(storage));
    match state.config() {
        Ok(config) => {
            findings.push(machine::memory_finding(storage, volumes::tracking_memory_bytes(storage, &config)));
            findings.extend(volumes::protected(state, &config));
            findings.extend(volumes::restoring(state, &config));
            findings.extend(volumes::unprotected(storage, &config));
        }
        Err(error) => {
            findings.push(machine::memory_finding(storage, 0));
            let found = format!("{:#}", anyhow::Error::new(error));
            findings.push(Finding::fail("configuration", found, "correct source.toml in the state folder"));
        }
    }
    findings
}

/// Why eBPF cannot track this volume here, in a line; `None` where nothing stands in its way.
#[must_use]
pub fn ebpf_obstacle(storage: &dyn Storage, probe: &Probe) -> Option<String> {
    if !probe.is_block() {
        return Some(format!("{} is an image file", probe.device.display()));
    }
    let of_machine = machine::ebpf_findings(storage).into_iter().find(|finding| finding.grade != Grade::Ok);
    if let Some(finding) = of_machine {
        return Some(format!("{}: {}", finding.subject, finding.found));
    }
    Device::inspect(&probe.device).err().map(|error| format!("{:#}", anyhow::Error::new(error)))
}

/// Name of the tracker that will serve a volume which `obstacle` keeps from eBPF.
///
/// # Errors
/// Says why eBPF was asked for and cannot be had.
pub fn tracker_for(choice: TrackerChoice, obstacle: Option<&str>) -> Result<&'static str, String> {
    match (choice, obstacle) {
        (TrackerChoice::Scan, _) | (TrackerChoice::Auto, Some(_)) => Ok("scan"),
        (TrackerChoice::Auto | TrackerChoice::Ebpf, None) => Ok("ebpf"),
        (TrackerChoice::Ebpf, Some(obstacle)) => Err(format!("tracker = \"ebpf\" cannot work here: {obstacle}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tracker_follows_the_choice_and_what_stands_in_its_way() {
        assert_eq!(tracker_for(TrackerChoice::Auto, None), Ok("ebpf"));
        assert_eq!(tracker_for(TrackerChoice::Ebpf, None), Ok("ebpf"));
        assert_eq!(tracker_for(TrackerChoice::Auto, Some("btf: none")), Ok("scan"));
        assert_eq!(tracker_for(TrackerChoice::Scan, None), Ok("scan"));
        assert!(tracker_for(TrackerChoice::Ebpf, Some("btf: none")).expect_err("no btf").contains("btf: none"));
    }
}
