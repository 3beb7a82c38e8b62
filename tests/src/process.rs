//! Commands and long-running children.

use anyhow::{Context, Result, bail, ensure};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Path of one of the project's programs, as built beside this test or benchmark.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a running program has a path");
    let folder = own.parent().expect("a program lies in a folder");
    let profile = if folder.ends_with("deps") { folder.parent().expect("`deps` lies in a profile") } else { folder };
    let program = profile.join(name);
    assert!(program.exists(), "{} is missing: `cargo build --workspace` makes it", program.display());
    program
}

/// Runs a command to its end; gives its stdout, or an error with its stderr.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {command:?}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {stderr}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a program of Debian's by name and arguments.
pub fn tool(name: &str, arguments: &[&str]) -> Result<String> {
    run(Command::new(name).args(arguments))
}

/// A program as another user, in the root folder.
#[must_use]
pub fn as_user(user: &str, program: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    let (user, group) = (format!("--reuid={user}"), format!("--regid={user}"));
    command.current_dir("/").args([&user, &group, "--init-groups", "--"]).arg(program).args(arguments);
    command
}

/// Calls `ready` until it gives something, or fails after `deadline`.
pub fn wait_for<T>(what: &str, deadline: Duration, mut ready: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = ready()? {
            return Ok(value);
        }
        if start.elapsed() > deadline {
            bail!("waited {deadline:?} for {what}");
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// The unit of times in `/proc`: fixed for programs on every architecture we build for, whatever the kernel's own is.
const TICKS_A_SECOND: u64 = 100;

/// Time of processors that all threads of a process have used (`proc_pid_stat(5)`: fields 14 and 15).
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is a name in brackets, which may hold anything.
    let (_, fields) = stat.rsplit_once(") ").context("a name in brackets")?;
    let ticks = fields.split(' ').skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    Ok(Duration::from_millis(ticks * 1000 / TICKS_A_SECOND))
}

/// The most memory that a process had at once, in bytes.
pub fn peak_memory(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().context("VmHWM")?;
    Ok(kib * 1024)
}

/// A child that runs until it is told to end, and whose stderr is kept. Killed when dropped.
pub struct Daemon {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
}

impl Daemon {
    /// Starts `command`.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let log = Arc::new(Mutex::new(Vec::new()));
        let stderr = BufReader::new(child.stderr.take().expect("stderr is piped"));
        let sink = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                sink.lock().expect("no holder panics").push(line);
            }
        });
        Ok(Self { child, log })
    }

    /// Waits until a line of stderr contains `text`, and gives the line.
    pub fn wait_for_line(&mut self, text: &str, deadline: Duration) -> Result<String> {
        wait_for(&format!("the line {text:?}"), deadline, || {
            let line = self.log.lock().expect("no holder panics").iter().find(|line| line.contains(text)).cloned();
            if line.is_none()
                && let Some(status) = self.child.try_wait()?
            {
                bail!("ended with {status}:\n{}", self.log());
            }
            Ok(line)
        })
        .with_context(|| format!("stderr so far:\n{}", self.log()))
    }

    /// Everything said on stderr so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.lock().expect("no holder panics").join("\n")
    }

    /// Time of processors that the child has used, in itself and in the kernel on its behalf.
    pub fn cpu_time(&self) -> Result<Duration> {
        cpu_time(self.child.id())
    }

    /// The most memory that the child had at once, in bytes.
    pub fn peak_memory(&self) -> Result<u64> {
        peak_memory(self.child.id())
    }

    /// The child's process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether the child still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// `kill -9`, and waits for the end.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, and waits for a clean end.
    pub fn stop(mut self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let status = wait_for("the end after SIGTERM", Duration::from_secs(20), || Ok(self.child.try_wait()?))
            .with_context(|| self.log())?;
        ensure!(status.success(), "ended with {status} after SIGTERM:\n{}", self.log());
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- stderr of the child\n{}\n---", self.log());
        }
    }
}
