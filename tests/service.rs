//! What the programs tell a service manager: that they are ready, that they go on, that they end.
//!
//! The manager is this test: a datagram socket, as systemd has one.

#![allow(clippy::disallowed_methods, reason = "tests use the real file system")]

use anyhow::{Context, Result, bail, ensure};
use cdp_tests::files::content;
use cdp_tests::fuse_file::{Answer, Backing, Change, FuseFile};
use cdp_tests::loop_device::LoopDevice;
use cdp_tests::process::{Daemon, program, tool};
use cdp_tests::site::{PATIENCE, Site};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

const DISK_BYTES: usize = 4 << 20;
/// After which the manager would act.
const WATCHDOG: Duration = Duration::from_secs(6);

/// The manager's end.
struct Manager(UnixDatagram);

impl Manager {
    /// Starts a program that is told where it is.
    fn start(folder: &Path, command: &mut Command) -> Result<(Self, Daemon)> {
        let socket = folder.join("notify");
        let _ = std::fs::remove_file(&socket);
        let manager = Self(UnixDatagram::bind(&socket)?);
        command.env("NOTIFY_SOCKET", &socket).env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string());
        Ok((manager, Daemon::start(command)?))
    }

    /// The next word within `patience`; `None` where there is none.
    fn hear(&self, patience: Duration) -> Result<Option<String>> {
        self.0.set_read_timeout(Some(patience.max(Duration::from_millis(1))))?;
        let mut buffer = [0; 100];
        match self.0.recv(&mut buffer) {
            Ok(len) => Ok(Some(String::from_utf8_lossy(&buffer[..len]).into_owned())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for a word, whatever is said before.
    fn wait_for(&self, word: &str, patience: Duration) -> Result<()> {
        let start = Instant::now();
        while let Some(left) = patience.checked_sub(start.elapsed()) {
            if self.hear(left)?.is_some_and(|heard| heard == word) {
                return Ok(());
            }
        }
        bail!("{word} was not said within {patience:?}")
    }
}

/// A disk that can stop to answer reads.
#[derive(Clone)]
struct Stopping(Arc<Disk>);

struct Disk {
    content: Vec<u8>,
    stops: Mutex<bool>,
    changed: Condvar,
}

impl Stopping {
    fn new() -> Self {
        let content = content(1, DISK_BYTES);
        Self(Arc::new(Disk { content, stops: Mutex::new(false), changed: Condvar::new() }))
    }

    fn set(&self, stops: bool) {
        *self.0.stops.lock().expect("no holder panics") = stops;
        self.0.changed.notify_all();
    }
}

impl Backing for Stopping {
    fn read(&self, offset: usize, len: usize, out: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        let stops = self.0.stops.lock().expect("no holder panics");
        drop(self.0.changed.wait_while(stops, |stops| *stops).expect("no holder panics"));
        out(&self.0.content[offset..offset + len]);
        Ok(())
    }

    fn change(&self, _: Change, answer: Answer) {
        answer.failed();
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_group_whose_disk_does_not_answer_lets_the_watchdog_bite_and_one_that_goes_on_does_not() -> Result<()> {
    if !cdp_tests::privileged("a_group_whose_disk_does_not_answer_lets_the_watchdog_bite_and_one_that_goes_on_does_not")
    {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let disk = Stopping::new();
    let file = FuseFile::mount(&folder.path().join("disk"), DISK_BYTES as u64, disk.clone())?;
    let site = Site::new(folder.path())?;
    site.source(&["protect", &format!("data={}", file.path().display())])?;
    let mut command = Command::new(program("cdp-source"));
    let (manager, mut agent) = Manager::start(folder.path(), command.arg("run").env("CDP_SOURCE_STATE", &site.state))?;
    manager.wait_for("READY=1", PATIENCE)?;
    site.wait_for_points(1, PATIENCE)?;
    for _ in 0..5 {
        manager.wait_for("WATCHDOG=1", WATCHDOG)?;
    }
    disk.set(true);
    // It is still told for a while: a read may take its time.
    let stopped = Instant::now();
    while manager.hear(WATCHDOG)?.is_some() {
        ensure!(stopped.elapsed() < 3 * WATCHDOG, "told that all is well, and nothing moves");
    }
    let log = agent.log();
    ensure!(log.contains("does not go on") && log.contains("group main"), "{log}");
    ensure!(agent.is_running()?, "it is for the manager to act");
    disk.set(false);
    manager.wait_for("WATCHDOG=1", PATIENCE)?;
    agent.stop()?;
    manager.wait_for("STOPPING=1", WATCHDOG)
}

#[test]
fn the_server_says_that_it_is_ready_goes_on_and_ends() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut site = Site::new(folder.path())?;
    site.stop_target()?;
    let mut command = Command::new(program("cdp-target"));
    let (manager, server) = Manager::start(folder.path(), command.arg("serve").env("CDP_TARGET_DATA", &site.data))?;
    ensure!(manager.hear(PATIENCE)?.context("it says something")? == "READY=1", "first of all");
    for _ in 0..4 {
        manager.wait_for("WATCHDOG=1", WATCHDOG)?;
    }
    server.stop()?;
    manager.wait_for("STOPPING=1", WATCHDOG)
}

fn units() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/systemd")
}

/// The units are what systemd takes, and expose no more than they are said to.
#[test]
fn the_units_are_valid_and_sandboxed() -> Result<()> {
    if tool("systemd-analyze", &["--version"]).is_err() {
        ensure!(std::env::var_os("CDP_ALL_MUST_RUN").is_none(), "systemd-analyze is missing");
        eprintln!("skipped: systemd-analyze is missing");
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    for (name, exposure_max) in [("cdp-source", 3.6), ("cdp-target", 1.4)] {
        let text = std::fs::read_to_string(units().join(format!("{name}.service")))?;
        let unit = folder.path().join(format!("{name}.service"));
        std::fs::write(&unit, text.replace(&format!("/usr/bin/{name}"), &program(name).display().to_string()))?;
        let unit = unit.to_str().context("a path of text")?;
        let verified = Command::new("systemd-analyze").args(["verify", "--recursive-errors=no", unit]).output()?;
        let said = String::from_utf8_lossy(&verified.stderr);
        ensure!(verified.status.success() && said.is_empty(), "{name}: {}: {said}", verified.status);
        let rated = tool("systemd-analyze", &["security", "--offline=yes", "--no-pager", unit])?;
        let rated = rated.lines().find_map(|line| line.split_once("exposure level")).context("a rating")?.1;
        let exposure: f64 = rated.split_whitespace().find_map(|word| word.parse().ok()).context("a number")?;
        eprintln!("{name}:{rated}");
        ensure!(exposure <= exposure_max, "{name}: {exposure}");
    }
    Ok(())
}

/// The agent tracks with no more of root's powers than its unit leaves it.
#[test]
fn the_agent_tracks_with_the_capabilities_that_its_unit_names() -> Result<()> {
    if !cdp_tests::privileged("the_agent_tracks_with_the_capabilities_that_its_unit_names") {
        return Ok(());
    }
    let text = std::fs::read_to_string(units().join("cdp-source.service"))?;
    let named = text.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).context("capabilities")?;
    let numbers = named.split(' ').map(|name| match name {
        "CAP_DAC_READ_SEARCH" => Ok("+cap_2"),
        "CAP_SYS_ADMIN" => Ok("+cap_21"),
        "CAP_PERFMON" => Ok("+cap_38"),
        "CAP_BPF" => Ok("+cap_39"),
        name => bail!("{name} is new here"),
    });
    let bounding = ["-all"].into_iter().map(Ok).chain(numbers).collect::<Result<Vec<_>>>()?.join(",");
    let folder = tempfile::tempdir()?;
    let device = LoopDevice::new(&folder.path().join("disk.img"), 32 << 20)?;
    let site = Site::new(folder.path())?;
    site.source(&["protect", &format!("data={}", device.node().display())])?;
    let mut command = Command::new("setpriv");
    command.args(["--no-new-privs", "--bounding-set", &bounding]).arg(program("cdp-source")).arg("run");
    let mut agent = Daemon::start(command.env("CDP_SOURCE_STATE", &site.state))?;
    site.wait_for_points(1, PATIENCE).with_context(|| agent.log())?;
    let status = site.source_status()?;
    ensure!(status["tracker"]["kind"] == "ebpf", "{status}\n{}", agent.log());
    ensure!(agent.is_running()?, "{}", agent.log());
    agent.stop()?;
    ensure!(site.state.join("groups/main/tracking/saved").exists(), "what is dirty was saved");
    Ok(())
}
