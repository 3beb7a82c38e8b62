//! Hooks: the operator's programs that make an application hold still before a cut, and let it go after it.
//!
//! Owns running them. Each runs in a process group of its own, which is killed whole at the deadline; of what it prints the
//! last 4 KiB are kept, however much it is. Invariant: where a pre-cut hook was started, its post-cut hook runs, whatever
//! became of the first, and whatever becomes of the group; only an agent that dies in between cannot see to it, so what a
//! pre-cut hook does has to end by itself. Does not decide what a point is worth (`agent/group/hooking`).

use crate::config::HooksConfig;
use cdp_protocol::units::{Epoch, Timestamp};
use cdp_seams::clock::Clock;
use cdp_seams::pulse;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde::{Deserialize, Serialize};
use std::io::{self, PipeReader, Read as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// Bytes that are kept of what a hook prints: the last ones.
pub const OUTPUT_BYTES_MAX: usize = 4096;
const READ_BYTES: usize = 64 << 10;
/// Reads of what lies in the pipe when the hook has ended: more than a pipe holds. Others may go on writing to it.
const LAST_READS: usize = 16;
/// How long a process may take to be gone after it was killed. One that waits for a disk may take for ever.
const KILL_WAIT: Duration = Duration::from_secs(1);

/// How a hook's run went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookRun {
    /// When it was started.
    pub time: Timestamp,
    /// How long it took, in milliseconds.
    pub duration_ms: u64,
    /// Its exit status, where it ended by itself.
    pub exit_status: Option<i32>,
    /// Why it did not do its work; `None` where it ended with 0.
    pub failure: Option<String>,
    /// The last of what it printed.
    pub output: String,
}

/// Something that happened to the hooks of a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HookEvent {
    /// The pre-cut hook has ended: it is time to cut.
    PreCut(HookRun),
    /// The post-cut hook has ended, where there is one: all is over.
    Over(Option<HookRun>),
}

/// The hooks around one point, on a thread of their own: points go on being made while they run. When it is dropped, the
/// post-cut hook runs if it has not, and is waited for.
pub struct HookSession {
    release: Option<Sender<Epoch>>,
    thread: Option<JoinHandle<()>>,
}

impl HookSession {
    /// Starts the pre-cut hook; `tell` is called on the session's thread.
    ///
    /// # Errors
    /// Where the system has no thread to give.
    pub fn start(
        config: HooksConfig,
        group: &str,
        label: Option<&str>,
        clock: Arc<dyn Clock>,
        tell: impl Fn(HookEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let (release, released) = channel::<Epoch>();
        let deadline = Duration::from_millis(config.deadline_ms);
        let mut variables = vec![
            ("CDP_GROUP", group.to_owned()),
            ("CDP_LABEL", label.unwrap_or_default().to_owned()),
            ("CDP_DEADLINE_MS", config.deadline_ms.to_string()),
        ];
        let body = move || {
            tell(HookEvent::PreCut(run(&config.pre_cut, "pre-cut", &variables, deadline, &*clock)));
            // Without an answer the group has ended or given the point up: the application is let go all the same.
            if let Ok(epoch) = released.recv() {
                variables.push(("CDP_EPOCH", epoch.to_string()));
            }
            let post =
                (!config.post_cut.is_empty()).then(|| run(&config.post_cut, "post-cut", &variables, deadline, &*clock));
            tell(HookEvent::Over(post));
        };
        let thread = std::thread::Builder::new().name("hooks".into()).spawn(body)?;
        Ok(Self { release: Some(release), thread: Some(thread) })
    }

    /// Lets the application go: the point was cut, or is given up.
    pub fn release(&mut self, epoch: Option<Epoch>) {
        if let (Some(release), Some(epoch)) = (self.release.take(), epoch) {
            // The thread waits until it is told.
            let _ = release.send(epoch);
        }
    }

    /// Whether the application was not let go yet.
    #[must_use]
    pub const fn is_held(&self) -> bool {
        self.release.is_some()
    }
}

impl Drop for HookSession {
    fn drop(&mut self) {
        self.release = None;
        // The hooks have their own deadline.
        pulse::rest();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a hook's thread has died");
        }
        pulse::beat();
    }
}

/// Runs a program with its arguments, no shell, until it ends or the deadline passes. Its background processes may live on
/// where it ends by itself; at the deadline they are killed with it.
#[must_use]
pub fn run(
    command: &[String],
    moment: &str,
    variables: &[(&str, String)],
    deadline: Duration,
    clock: &dyn Clock,
) -> HookRun {
    let started = clock.monotonic();
    let mut hook = HookRun { time: Timestamp(clock.wall_ms()), ..HookRun::default() };
    let mut output = Tail::default();
    match run_until(command, moment, variables, started + deadline, clock, &mut output) {
        Ok(Some(status)) => {
            hook.exit_status = status.code();
            hook.failure = failure_of(status);
        }
        Ok(None) => hook.failure = Some(format!("did not end within {} ms, and was killed", deadline.as_millis())),
        Err(error) => hook.failure = Some(format!("run {}: {error}", command.first().map_or("", String::as_str))),
    }
    hook.duration_ms = clock.monotonic().saturating_sub(started).as_millis() as u64;
    hook.output = output.text();
    hook
}

fn failure_of(status: ExitStatus) -> Option<String> {
    match (status.code(), status.signal()) {
        (Some(0), _) => None,
        (Some(code), _) => Some(format!("ended with status {code}")),
        (None, signal) => Some(format!("was killed by signal {}", signal.unwrap_or_default())),
    }
}

/// `None` where it had to be killed.
fn run_until(
    command: &[String],
    moment: &str,
    variables: &[(&str, String)],
    deadline: Duration,
    clock: &dyn Clock,
    output: &mut Tail,
) -> io::Result<Option<ExitStatus>> {
    let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let (pipe, writer) = io::pipe()?;
    let mut child = Command::new(program)
        .args(arguments)
        .env("CDP_HOOK", moment)
        .envs(variables.iter().map(|(name, value)| (*name, value.as_str())))
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .process_group(0)
        .spawn()?;
    let ended = watch(&child, pipe, deadline, clock, output);
    if let Ok(true) = ended {
        return child.wait().map(Some);
    }
    let killed = kill_process_group(Pid::from_child(&child), Signal::KILL);
    reap(child, clock);
    killed?;
    ended.map(|_| None)
}

/// Takes what the child prints until it has ended (`true`) or the deadline has passed. The pipe may outlive the child: what it left
/// in the background holds it too.
fn watch(
    child: &Child,
    pipe: PipeReader,
    deadline: Duration,
    clock: &dyn Clock,
    output: &mut Tail,
) -> io::Result<bool> {
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let mut pipe = Some(pipe);
    loop {
        let left = deadline.saturating_sub(clock.monotonic());
        if left.is_zero() {
            return Ok(false);
        }
        let mut fds = vec![PollFd::new(&process, PollFlags::IN)];
        fds.extend(pipe.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        wait(&mut fds, left)?;
        let has_ended = !fds[0].revents().is_empty();
        let has_output = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        if has_output && !pipe.as_mut().is_some_and(|pipe| output.take(pipe)) {
            pipe = None;
        }
        if has_ended {
            for _ in 0..LAST_READS {
                let Some(pipe) = &mut pipe else { break };
                let mut fds = [PollFd::new(pipe, PollFlags::IN)];
                wait(&mut fds, Duration::ZERO)?;
                if fds[0].revents().is_empty() || !output.take(pipe) {
                    break;
                }
            }
            return Ok(true);
        }
    }
}

/// Waits for an event; a signal is as good as none.
fn wait(fds: &mut [PollFd<'_>], limit: Duration) -> io::Result<()> {
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    match poll(fds, Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Waits for a killed process to be gone, for as long as that may take, but not here.
fn reap(mut child: Child, clock: &dyn Clock) {
    let until = clock.monotonic() + KILL_WAIT;
    if let Ok(process) = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
        let mut fds = [PollFd::new(&process, PollFlags::IN)];
        // Where this fails, or takes too long, somebody else waits.
        let _ = wait(&mut fds, until.saturating_sub(clock.monotonic()));
    }
    if !matches!(child.try_wait(), Ok(Some(_))) {
        std::thread::spawn(move || child.wait());
    }
}

/// The last bytes of what was printed.
#[derive(Default)]
struct Tail(Vec<u8>);

impl Tail {
    /// Takes what lies in the pipe; `false` at its end.
    fn take(&mut self, pipe: &mut PipeReader) -> bool {
        let mut bytes = vec![0; READ_BYTES];
        let Ok(read @ 1..) = pipe.read(&mut bytes) else { return false };
        self.0.extend_from_slice(&bytes[..read]);
        let surplus = self.0.len().saturating_sub(OUTPUT_BYTES_MAX);
        self.0.drain(..surplus);
        true
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0).trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cdp_seams::clock::SystemClock;

    fn shell(script: &str, deadline_ms: u64) -> HookRun {
        let command = ["/bin/sh", "-c", script].map(str::to_owned);
        let variables = [("CDP_GROUP", "main".to_owned())];
        run(&command, "pre-cut", &variables, Duration::from_millis(deadline_ms), &SystemClock::new())
    }

    #[test]
    fn status_and_output_are_told_and_the_environment_is_there() {
        let hook = shell("echo $CDP_HOOK of $CDP_GROUP; echo trouble >&2", 60_000);
        assert_eq!((hook.exit_status, hook.failure.as_deref()), (Some(0), None));
        assert_eq!(hook.output, "pre-cut of main\ntrouble");
        let hook = shell("exit 3", 60_000);
        assert_eq!((hook.exit_status, hook.failure.as_deref()), (Some(3), Some("ended with status 3")));
        let hook = shell("kill -9 $$", 60_000);
        assert_eq!((hook.exit_status, hook.failure.as_deref()), (None, Some("was killed by signal 9")));
    }

    #[test]
    fn what_cannot_be_started_is_a_failure() {
        let hook = run(&["/nowhere/hook".to_owned()], "pre-cut", &[], Duration::from_secs(60), &SystemClock::new());
        let failure = hook.failure.expect("it failed");
        assert!(failure.starts_with("run /nowhere/hook: No such file"), "{failure}");
        assert!(run(&[], "pre-cut", &[], Duration::from_secs(60), &SystemClock::new()).failure.is_some());
    }

    #[test]
    fn of_megabytes_the_end_is_kept() {
        let hook = shell("yes noise | head -c 5000000; echo; echo the end", 60_000);
        assert_eq!(hook.failure, None);
        assert!(hook.output.len() <= OUTPUT_BYTES_MAX && hook.output.ends_with("the end"), "{}", hook.output.len());
    }

    /// The hook and its background processes are gone, so that nobody holds the pipe's other end any more.
    #[test]
    fn what_hangs_is_killed_with_all_it_has_started() {
        for script in ["sleep 1000 & sleep 1000", "yes", "exec >/dev/null 2>&1; trap '' TERM; sleep 1000"] {
            let (mut alive, writer) = io::pipe().expect("a pipe");
            let hook = shell(&format!("exec 9>{}; {script}", path_of(&writer)), 300);
            assert_eq!(hook.failure.as_deref(), Some("did not end within 300 ms, and was killed"));
            assert!(hook.exit_status.is_none() && hook.duration_ms < 20_000, "{hook:?}");
            drop(writer);
            assert_eq!(alive.read(&mut [0; 8]).expect("read"), 0, "everybody is gone");
        }
    }

    /// By which a hook can open it too.
    fn path_of(pipe: &io::PipeWriter) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(pipe))
    }

    #[test]
    fn what_is_left_in_the_background_does_not_hold_the_cut_up() {
        let (mut alive, writer) = io::pipe().expect("a pipe");
        let hook = shell(&format!("exec 9>{}; (sleep 1; echo lived >&9) & echo locked", path_of(&writer)), 60_000);
        assert_eq!((hook.failure.as_deref(), hook.output.as_str()), (None, "locked"));
        assert!(hook.duration_ms < 900, "{} ms", hook.duration_ms);
        drop(writer);
        let mut told = String::new();
        alive.read_to_string(&mut told).expect("text");
        assert_eq!(told, "lived\n");
    }

    fn session(pre: &str, post: &str) -> (HookSession, std::sync::mpsc::Receiver<HookEvent>) {
        let shell = |script: &str| ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        let config = HooksConfig { pre_cut: shell(pre), post_cut: shell(post), deadline_ms: 300, every_s: 0 };
        let (sender, events) = channel();
        let tell = move |event| sender.send(event).expect("somebody listens");
        let session = HookSession::start(config, "main", Some("x"), Arc::new(SystemClock::new()), tell);
        (session.expect("started"), events)
    }

    #[test]
    fn post_cut_runs_whatever_became_of_pre_cut_and_of_the_group() {
        for (pre, failure) in [("true", None), ("exit 7", Some("ended with status 7")), ("sleep 1000", Some("did not"))]
        {
            for epoch in [Some(Epoch(5)), None] {
                let (mut session, events) = session(pre, "echo $CDP_LABEL $CDP_EPOCH");
                let HookEvent::PreCut(run) = events.recv().expect("told") else { panic!("pre-cut comes first") };
                assert_eq!(run.failure.is_some(), failure.is_some(), "{run:?}");
                assert!(run.failure.unwrap_or_default().starts_with(failure.unwrap_or_default()));
                assert!(session.is_held());
                session.release(epoch);
                drop(session);
                let HookEvent::Over(Some(run)) = events.recv().expect("told") else { panic!("then post-cut") };
                assert_eq!(run.output, if epoch.is_some() { "x 5" } else { "x" });
            }
        }
    }
}
