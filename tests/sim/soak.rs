//! Simulates until it is stopped, or as long as it is told: `scripts/soak`.
//!
//! Prints crashes simulated and losses found, at the end, at Ctrl-C and now and then; a loss with the command that repeats it.

mod check;
mod kept;
mod ladder;
mod line;
mod model;
mod run;
mod sabotage;
mod source;
mod tally;
mod target;
mod trace;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use cdp_seams::clock::{Clock, SystemClock};
use run::{Manner, found, replay, rot_under_a_living_source};
use sabotage::Sabotage;
use tally::Tally;

/// How often a line is printed.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// When to stop.
#[derive(Clone, Copy, Debug)]
struct Until {
    time: Duration,
    crashes: u64,
    threads: usize,
    first_seed: u64,
    /// To see that it is found.
    sabotage: Sabotage,
}

/// What all threads share.
struct Soak {
    until: Until,
    clock: SystemClock,
    next_seed: AtomicU64,
    stop: AtomicBool,
    sum: Mutex<(Tally, Vec<(u64, String)>)>,
}

fn main() -> ExitCode {
    let until = match arguments(std::env::args().skip(1)) {
        Ok(until) => until,
        Err(wrong) => {
            eprintln!(
                "error: {wrong}\nhint: soak [--seconds N] [--crashes N] [--threads N] [--seed N] [--sabotage NAME]"
            );
            return ExitCode::FAILURE;
        }
    };
    let soak = Soak {
        until,
        clock: SystemClock::new(),
        next_seed: until.first_seed.into(),
        stop: AtomicBool::new(false),
        sum: Mutex::default(),
    };
    // A panic of the product is a loss, told as such.
    std::panic::set_hook(Box::new(|_| {}));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..until.threads).map(|_| scope.spawn(|| soak.work())).collect();
        soak.watch(&workers);
    });
    soak.tell();
    let (_, losses) = &*soak.lock();
    for (seed, why) in losses {
        println!("seed {seed}: {why}; {}", replay(*seed));
    }
    if losses.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn arguments(mut given: impl Iterator<Item = String>) -> Result<Until, String> {
    let mut until =
        Until { time: Duration::MAX, crashes: u64::MAX, threads: 1, first_seed: 1, sabotage: Sabotage::None };
    while let Some(name) = given.next() {
        let value = given.next().ok_or_else(|| format!("{name} wants a value"))?;
        if name == "--sabotage" {
            let known = Sabotage::ALL.iter().find(|sabotage| format!("{sabotage:?}") == value);
            until.sabotage = *known.ok_or_else(|| format!("{value}: none of {:?}", Sabotage::ALL))?;
            continue;
        }
        let number: u64 = value.parse().map_err(|_| format!("{name} {value}: not a number"))?;
        match name.as_str() {
            "--seconds" => until.time = Duration::from_secs(number),
            "--crashes" => until.crashes = number,
            "--threads" => until.threads = number.clamp(1, 1024) as usize,
            "--seed" => until.first_seed = number,
            _ => return Err(format!("unknown argument {name}")),
        }
    }
    Ok(until)
}

impl Soak {
    fn lock(&self) -> std::sync::MutexGuard<'_, (Tally, Vec<(u64, String)>)> {
        self.sum.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes seed after seed.
    fn work(&self) {
        while !self.is_over() {
            let seed = self.next_seed.fetch_add(1, Ordering::Relaxed);
            let found =
                found(seed, self.until.sabotage, Manner::of(seed)).and_then(|tally| match self.until.sabotage {
                    Sabotage::None => rot_under_a_living_source(seed).map(|_| tally),
                    _ => Ok(tally),
                });
            let mut sum = self.lock();
            match found {
                Ok(tally) => sum.0 += tally,
                Err(why) => {
                    eprintln!("seed {seed}: {why}");
                    sum.1.push((seed, why));
                }
            }
        }
    }

    fn is_over(&self) -> bool {
        let is_done = self.clock.monotonic() >= self.until.time || self.lock().0.crashes() >= self.until.crashes;
        is_done || self.stop.load(Ordering::Relaxed)
    }

    /// Prints a line now and then, until all work is done; Ctrl-C ends it.
    fn watch(&self, workers: &[std::thread::ScopedJoinHandle<'_, ()>]) {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("the system has a runtime");
        runtime.block_on(async {
            let mut ticks = tokio::time::interval(Duration::from_secs(1));
            let mut told = Duration::ZERO;
            loop {
                tokio::select! {
                    _ = tokio::signal::ctrl_c() => self.stop.store(true, Ordering::Relaxed),
                    _ = ticks.tick() => {}
                }
                if workers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                    return;
                }
                if self.clock.monotonic() >= told + TELL_EVERY {
                    told = self.clock.monotonic();
                    self.tell();
                }
            }
        });
    }

    fn tell(&self) {
        let seconds = self.clock.monotonic().as_secs_f64().max(0.001);
        let (tally, losses) = &*self.lock();
        println!(
            "{} crashes simulated, {} losses found; {:.0} a second for {seconds:.0} s; seeds {} to {}; {tally:?}",
            tally.crashes(),
            losses.len(),
            tally.crashes() as f64 / seconds,
            self.until.first_seed,
            self.next_seed.load(Ordering::Relaxed) - 1,
        );
    }
}
