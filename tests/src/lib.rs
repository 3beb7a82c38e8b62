//! What the whole-system tests stand on: loop devices, file systems, an office and a target as real processes.
//!
//! The tests run the programs as a user would, by their commands. Everything cleans up behind itself, also after a panic.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system and the real clock")]
#![allow(clippy::missing_errors_doc, reason = "every helper fails with what went wrong")]

pub mod acked;
pub mod file_system;
pub mod files;
pub mod fuse_file;
pub mod image;
pub mod loop_device;
pub mod metrics;
pub mod mortal_disk;
pub mod postgres;
pub mod power_disk;
pub mod process;
pub mod relay;
pub mod site;
pub mod slow_disk;
pub mod sqlite;
pub mod zram_device;

/// Whether the privileged tests can run here; says on stderr why not.
#[must_use]
pub fn privileged(test: &str) -> bool {
    let lacking = if !rustix::process::geteuid().is_root() {
        "not root"
    } else if !std::path::Path::new("/sys/kernel/btf/vmlinux").exists() {
        "no kernel BTF"
    } else if !std::path::Path::new("/dev/loop-control").exists() {
        "no loop devices"
    } else {
        return true;
    };
    assert!(std::env::var_os("CDP_ALL_MUST_RUN").is_none(), "{test} cannot run: {lacking}");
    eprintln!("skipped: {test}: {lacking} (`./scripts/test` as root runs it)");
    false
}

/// Whether a program is installed; says on stderr that a test is skipped where it is not.
#[must_use]
pub fn has(test: &str, program: &str) -> bool {
    let there = std::path::Path::new(program).exists();
    assert!(there || std::env::var_os("CDP_ALL_MUST_RUN").is_none(), "{test} cannot run: no {program}");
    if !there {
        eprintln!("skipped: {test}: no {program} (`./scripts/test` installs it)");
    }
    there
}
