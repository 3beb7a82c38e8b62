//! Runs a checker, or the operator's script: with a deadline, and of what it prints only the beginning and the end.
//!
//! Invariant: whatever it does, it is over soon after its deadline or an interruption, with every process of its group, and has cost no more
//! memory than `OUTPUT_BYTES_MAX` of what it printed.

use cdp_seams::clock::Clock;
use rustix::process::{Pid, Signal, kill_process_group};
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Bytes of what a program printed that are kept.
const OUTPUT_BYTES_MAX: usize = 16 * 1024;
/// Those of them that it printed first; the rest are its last ones.
const HEAD_BYTES_MAX: usize = 4 * 1024;
/// How often it is looked whether the operator ends it.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// What a program has for itself between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(5);

/// How a program ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// By itself, with that status.
    Exit(i32),
    /// By that signal, which was not ours.
    Killed(i32),
    /// It was not over in time.
    Late,
    /// The operator ended the drill.
    Interrupted,
    /// It is not there.
    Missing,
    /// It could not be started or waited for.
    Failed(String),
}

/// A program that has run.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) ended: Ended,
    pub(crate) output: String,
}

/// What programs run with.
pub(crate) struct Runner<'a> {
    pub(crate) clock: &'a dyn Clock,
    pub(crate) stop: &'a AtomicBool,
}

impl Runner<'_> {
    /// Runs `command` until it ends or `deadline` has gone by.
    pub(crate) fn run(&self, mut command: Command, deadline: Duration) -> Run {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                let missing = error.kind() == std::io::ErrorKind::NotFound;
                let ended = if missing { Ended::Missing } else { Ended::Failed(error.to_string()) };
                return Run { ended, output: String::new() };
            }
        };
        let tail = Tail::of(&mut child);
        let ended = self.wait(&mut child, &tail, deadline);
        Run { ended, output: tail.text() }
    }

    fn wait(&self, child: &mut Child, tail: &Tail, deadline: Duration) -> Ended {
        let start = self.clock.monotonic();
        let ended = loop {
            match child.try_wait() {
                Ok(Some(status)) => {
                    break status.code().map_or_else(|| Ended::Killed(status.signal().unwrap_or(0)), Ended::Exit);
                }
                Ok(None) => {}
                Err(error) => break Ended::Failed(error.to_string()),
            }
            let is_late = self.clock.monotonic().saturating_sub(start) >= deadline;
            if is_late || self.stop.load(Ordering::Relaxed) {
                self.end(child);
                break if is_late { Ended::Late } else { Ended::Interrupted };
            }
            tail.wait(LOOK_EVERY);
        };
        // What it started and left running goes with it, and holds its output open no longer.
        signal(child, Signal::KILL);
        let _ = child.wait();
        let _ = tail.closed.recv_timeout(GRACE);
        ended
    }

    /// Asks it to end, and waits for that a while.
    fn end(&self, child: &mut Child) {
        signal(child, Signal::TERM);
        let start = self.clock.monotonic();
        while matches!(child.try_wait(), Ok(None)) && self.clock.monotonic().saturating_sub(start) < GRACE {
            std::thread::park_timeout(LOOK_EVERY);
        }
    }
}

/// To the program and whatever it started.
fn signal(child: &Child, signal: Signal) {
    // Gone already, where this fails.
    let _ = kill_process_group(Pid::from_child(child), signal);
}

/// The beginning and the end of what a program prints, on both of its outputs.
struct Tail {
    kept: Arc<Mutex<Kept>>,
    closed: Receiver<()>,
}

#[derive(Default)]
struct Kept {
    head: Vec<u8>,
    tail: Vec<u8>,
    /// Bytes between the two.
    passed: u64,
}

impl Kept {
    fn push(&mut self, bytes: &[u8]) {
        let (first, rest) = bytes.split_at(bytes.len().min(HEAD_BYTES_MAX - self.head.len()));
        self.head.extend_from_slice(first);
        self.tail.extend_from_slice(rest);
        let surplus = self.tail.len().saturating_sub(OUTPUT_BYTES_MAX - HEAD_BYTES_MAX);
        self.tail.drain(..surplus);
        self.passed += surplus as u64;
    }
}

impl Tail {
    /// Threads that read until the outputs are closed; what is left running by a program that is gone may hold them, and they it.
    fn of(child: &mut Child) -> Self {
        let kept = Arc::<Mutex<Kept>>::default();
        let (over, closed) = channel::<()>();
        let outputs: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|output| Box::new(output) as Box<dyn Read + Send>),
            child.stderr.take().map(|output| Box::new(output) as Box<dyn Read + Send>),
        ];
        for mut output in outputs.into_iter().flatten() {
            let (kept, over) = (Arc::clone(&kept), over.clone());
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(read @ 1..) = output.read(&mut buffer) {
                    kept.lock().unwrap_or_else(PoisonError::into_inner).push(&buffer[..read]);
                }
                drop(over);
            });
        }
        Self { kept, closed }
    }

    /// Waits until the output is closed, which mostly is when the program ends; for so long at most.
    fn wait(&self, timeout: Duration) {
        if self.closed.recv_timeout(timeout) == Err(RecvTimeoutError::Disconnected) {
            std::thread::park_timeout(timeout);
        }
    }

    fn text(&self) -> String {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let left_out = match kept.passed {
            0 => String::new(),
            passed => format!("\n({passed} bytes are left out here)\n"),
        };
        let bytes = [kept.head.as_slice(), left_out.as_bytes(), &kept.tail].concat();
        let text = String::from_utf8_lossy(&bytes);
        text.chars().filter(|letter| !letter.is_control() || matches!(letter, '\n' | '\t')).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{Ended, OUTPUT_BYTES_MAX, Runner};
    use cdp_seams::clock::{Clock, SystemClock};
    use std::process::Command;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    fn run(script: &str, deadline: Duration, stop: bool) -> (Ended, String, Duration) {
        let (clock, stop) = (SystemClock::new(), AtomicBool::new(stop));
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let run = Runner { clock: &clock, stop: &stop }.run(command, deadline);
        (run.ended, run.output, clock.monotonic())
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn a_program_ends_by_itself_or_is_ended() {
        let (ended, output, _) = run("echo out; echo err >&2; exit 3", LONG, false);
        assert_eq!(ended, Ended::Exit(3));
        assert!(output.contains("out\n") && output.contains("err\n"), "{output}");
        assert_eq!(run("kill -9 $$", LONG, false).0, Ended::Killed(9));
        let (ended, output, took) = run("echo begun; sleep 1000 & sleep 1000", Duration::from_millis(300), false);
        assert_eq!((ended, output.as_str()), (Ended::Late, "begun\n"));
        assert!(took < GRACE_ENDED, "{took:?}");
        assert_eq!(run("sleep 1000", LONG, true).0, Ended::Interrupted);
        let (ended, _, took) = run("exec >&- 2>&-; sleep 1000", Duration::from_millis(300), false);
        assert!(ended == Ended::Late && took < GRACE_ENDED, "{took:?}");
    }

    const GRACE_ENDED: Duration = Duration::from_secs(20);

    #[test]
    fn what_a_program_leaves_running_is_ended_with_it() {
        let (ended, _, took) = run("sleep 1000 & exit 0", LONG, false);
        assert!(ended == Ended::Exit(0) && took < GRACE_ENDED, "{took:?}");
    }

    #[test]
    fn of_megabytes_the_beginning_and_the_end_are_kept() {
        let (ended, output, _) = run("echo first; yes | head -c 5000000; echo last", LONG, false);
        assert_eq!(ended, Ended::Exit(0));
        assert!(output.ends_with("last\n") && output.len() < OUTPUT_BYTES_MAX + 100, "{} bytes", output.len());
        assert!(output.starts_with("first\n") && output.contains("\n(49"), "{output}");
    }

    #[test]
    fn a_program_that_is_not_there_is_told_apart() {
        let (clock, stop) = (SystemClock::new(), AtomicBool::new(false));
        let run = Runner { clock: &clock, stop: &stop }.run(Command::new("no-such-checker"), LONG);
        assert_eq!(run.ended, Ended::Missing);
    }
}
