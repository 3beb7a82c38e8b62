//! A drill's boot: the disk of a machine is started in QEMU, and looked at.
//!
//! Invariant: the machine writes to a throw-away layer over the images, has no network, and is gone soon after its time. That it came up
//! is told only where a text that was waited for stood on its serial console; without one a person has to look at the picture.

use super::program::{Ended, Run, Runner};
use super::qmp;
use super::report::{BootReport, Outcome};
use cdp_seams::clock::Clock;
use cdp_seams::storage::{Storage, read_all};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{ScopedJoinHandle, park_timeout};
use std::time::Duration;

const QEMU: &str = "qemu-system-x86_64";
/// What it says where this machine's KVM gave up, in virtual machines above all: the point's machine has done nothing wrong.
const KVM_FAILED: &str = "KVM internal error";
/// What starts a disk that has no boot code for a BIOS (Debian's package `ovmf`).
const FIRMWARE: &str = "/usr/share/ovmf/OVMF.fd";
/// Disks that a machine of this kind takes.
pub(super) const DISKS_MAX: usize = 4;
const MEMORY_MIB: u32 = 1024;
/// How often the console is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// What QEMU has beyond the machine's time, to end.
const MARGIN: Duration = Duration::from_secs(30);
/// Bytes of the console that are looked at, its last ones.
const CONSOLE_BYTES_MAX: u64 = 64 << 10;
/// Bytes of the console that a report keeps.
const CONSOLE_KEPT: usize = 4 << 10;
const SCREENSHOT_BYTES_MAX: u64 = 16 << 20;

/// How a point's disk is started.
#[derive(Clone, Debug)]
pub struct Boot {
    /// How long the machine has to come up.
    pub deadline: Duration,
    /// What stands on its serial console then, where that is known.
    pub expected: Option<String>,
}

/// A machine that was started, and why that failed or says nothing.
pub(super) struct Booted {
    pub(super) report: BootReport,
    pub(super) reason: Option<String>,
    /// PNG.
    pub(super) screenshot: Option<Vec<u8>>,
}

/// What starts a machine.
pub(super) struct Starter<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) clock: &'a dyn Clock,
    pub(super) stop: &'a AtomicBool,
    /// The drill's own folder, where the images are.
    pub(super) folder: &'a Path,
}

impl Starter<'_> {
    /// Starts a machine of these images, the first of which it boots from, and watches it.
    pub(super) fn boot(&self, boot: &Boot, images: &[String], has_boot_code: bool) -> Booted {
        let begun = self.clock.monotonic();
        let firmware = Path::new(FIRMWARE);
        if !has_boot_code && self.storage.open(firmware).is_err() {
            return Booted::not_done(format!("its disk is started by UEFI, and {FIRMWARE} is not there"));
        }
        let command = self.command(images, (!has_boot_code).then_some(firmware));
        let runner = Runner { clock: self.clock, stop: self.stop };
        let (run, is_up, screenshot) = std::thread::scope(|threads| {
            let machine = threads.spawn(|| runner.run(command, boot.deadline + MARGIN));
            let is_up = self.watch(boot, begun, &machine);
            let screenshot = self.look_and_end().and_then(|()| self.screenshot());
            let run = machine.join().expect("a runner does not panic");
            (run, is_up, screenshot)
        });
        let ms = self.clock.monotonic().saturating_sub(begun).as_millis() as u64;
        let (result, reason) = judged(boot, is_up, &run);
        let console = self.console();
        let kept = console.len() - console.len().min(CONSOLE_KEPT);
        let console = String::from_utf8_lossy(&console[kept..]).into_owned();
        let report = BootReport {
            result,
            expected: boot.expected.clone(),
            ms,
            console,
            output: run.output,
            screenshot: screenshot.is_some(),
        };
        Booted { report, reason, screenshot }
    }

    fn command(&self, images: &[String], firmware: Option<&Path>) -> Command {
        let mut command = Command::new(QEMU);
        command.current_dir(self.folder).env("TMPDIR", self.folder);
        command.args(["-nodefaults", "-no-user-config", "-machine", "pc,accel=kvm:tcg", "-m", &MEMORY_MIB.to_string()]);
        command.args(["-display", "none", "-vga", "std", "-no-reboot", "-serial", "file:console"]);
        command.args(["-qmp", "unix:qmp,server=on,wait=off"]);
        command.args(["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
        for (index, image) in images.iter().take(DISKS_MAX).enumerate() {
            // IDE: there is no system that has no driver for it.
            command.args(["-drive", &format!("file=./{image},format=raw,if=ide,index={index},snapshot=on")]);
        }
        if let Some(firmware) = firmware {
            command.arg("-bios").arg(firmware);
        }
        command
    }

    /// Waits for what is expected, for the machine's end or for its time to be over; gives whether what is expected stood there.
    fn watch(&self, boot: &Boot, begun: Duration, machine: &ScopedJoinHandle<'_, Run>) -> bool {
        loop {
            let expected = boot.expected.as_deref().filter(|text| !text.is_empty()).map(str::as_bytes);
            if expected.is_some_and(|text| self.console().windows(text.len()).any(|window| window == text)) {
                return true;
            }
            let is_over = self.clock.monotonic().saturating_sub(begun) >= boot.deadline;
            if is_over || machine.is_finished() || self.stop.load(Ordering::Relaxed) {
                return false;
            }
            park_timeout(LOOK_EVERY);
        }
    }

    /// The end of what it said on its serial console.
    fn console(&self) -> Vec<u8> {
        let read = || {
            let file = self.storage.open(&self.folder.join("console"))?;
            let len = file.len()?;
            let mut bytes = vec![0; len.min(CONSOLE_BYTES_MAX) as usize];
            let from = len - bytes.len() as u64;
            let read = file.read_at(&mut bytes, from)?;
            bytes.truncate(read);
            Ok::<_, std::io::Error>(bytes)
        };
        read().unwrap_or_default()
    }

    /// Has a picture taken of its screen, and ends it. A machine that does not answer is ended by its deadline.
    fn look_and_end(&self) -> Option<()> {
        let done = qmp::screenshot_and_quit(self.folder, "qmp", "screen.png");
        done.inspect_err(|error| tracing::debug!(%error, "no picture of the machine")).ok()
    }

    fn screenshot(&self) -> Option<Vec<u8>> {
        read_all(self.storage, &self.folder.join("screen.png"), SCREENSHOT_BYTES_MAX).ok()
    }
}

impl Booted {
    /// One that was not started.
    pub(super) fn not_done(reason: String) -> Self {
        let report = BootReport {
            result: Outcome::NotChecked,
            expected: None,
            ms: 0,
            console: String::new(),
            output: String::new(),
            screenshot: false,
        };
        Self { report, reason: Some(reason), screenshot: None }
    }
}

/// How it came out, and why.
fn judged(boot: &Boot, is_up: bool, run: &Run) -> (Outcome, Option<String>) {
    let seconds = boot.deadline.as_secs();
    match (&run.ended, &boot.expected) {
        (Ended::Missing, _) => (Outcome::NotChecked, Some(format!("{QEMU} is not installed"))),
        (Ended::Failed(error), _) => (Outcome::NotChecked, Some(format!("{QEMU}: {error}"))),
        (Ended::Interrupted, _) => (Outcome::NotChecked, Some("interrupted".to_owned())),
        _ if is_up => (Outcome::Passed, None),
        (Ended::Exit(status @ 1..), _) => {
            let said = run.output.lines().next().unwrap_or("it said nothing");
            (Outcome::NotChecked, Some(format!("{QEMU} ended with {status}: {said}")))
        }
        (Ended::Killed(signal), _) => (Outcome::NotChecked, Some(format!("{QEMU} was killed by signal {signal}"))),
        _ if run.output.contains(KVM_FAILED) => (
            Outcome::NotChecked,
            Some(format!("{KVM_FAILED} on this machine: drill it where KVM works, or is not there")),
        ),
        (_, Some(expected)) => {
            let reason = format!("{expected:?} did not stand on its serial console within {seconds} s");
            (Outcome::Failed, Some(reason))
        }
        (_, None) => {
            let reason = format!("nothing was expected of it: it ran for {seconds} s at most, look at the screenshot");
            (Outcome::NotChecked, Some(reason))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_come_up_only_where_what_is_expected_was_seen() {
        let run = |ended| Run { ended, output: "no such machine\n".to_owned() };
        let expecting = Boot { deadline: Duration::from_secs(9), expected: Some("login:".to_owned()) };
        let looking = Boot { expected: None, ..expecting.clone() };
        for (boot, is_up, ended, outcome, word) in [
            (&expecting, true, Ended::Exit(0), Outcome::Passed, ""),
            (&expecting, false, Ended::Exit(0), Outcome::Failed, "\"login:\" did not stand"),
            (&expecting, false, Ended::Late, Outcome::Failed, "within 9 s"),
            (&expecting, false, Ended::Exit(1), Outcome::NotChecked, "no such machine"),
            (&expecting, false, Ended::Missing, Outcome::NotChecked, "not installed"),
            (&expecting, true, Ended::Interrupted, Outcome::NotChecked, "interrupted"),
            (&looking, false, Ended::Exit(0), Outcome::NotChecked, "look at the screenshot"),
        ] {
            let (found, reason) = judged(boot, is_up, &run(ended.clone()));
            let reason = reason.unwrap_or_default();
            assert!(found == outcome && reason.contains(word), "{ended:?}: {found:?}, {reason}");
        }
        let failed = Run { ended: Ended::Exit(0), output: format!("{KVM_FAILED}. Suberror: 1") };
        assert_eq!(judged(&expecting, false, &failed).0, Outcome::NotChecked, "it is this machine's fault");
    }
}
