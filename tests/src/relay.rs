//! A line between an office and its target: passes UDP datagrams on, as thin as is said, and counts them.
//!
//! For one office at a time: what the target says goes to whoever was heard last. A datagram that would wait for longer than
//! `QUEUE` is dropped, as at a router. Loses and reorders nothing else.

use anyhow::{Context, Result};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, park_timeout};
use std::time::{Duration, Instant};

/// How long a datagram waits at most.
const QUEUE: Duration = Duration::from_millis(200);
/// How often a thread that hears nothing looks whether it is to end.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Bytes of the headers of IPv4 and UDP, which a line carries too.
const HEADER_BYTES: u64 = 28;
const DATAGRAM_BYTES_MAX: usize = 65_536;

/// What went which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Bytes to the target, headers of IP and UDP among them.
    pub up: u64,
    /// Bytes to the office.
    pub down: u64,
}

impl Carried {
    /// Both ways.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.up + self.down
    }

    /// What was carried since `before`.
    #[must_use]
    pub const fn since(self, before: Self) -> Self {
        Self { up: self.up - before.up, down: self.down - before.down }
    }
}

#[derive(Default)]
struct Line {
    up: AtomicU64,
    down: AtomicU64,
    /// Bits a second each way; 0 for as many as there are.
    bits_per_s: AtomicU64,
    /// Who was heard last.
    office: Mutex<Option<SocketAddr>>,
    stop: AtomicBool,
}

/// The line; it is cut when this is dropped.
pub struct Relay {
    address: String,
    line: Arc<Line>,
    threads: Vec<JoinHandle<()>>,
}

/// A datagram and when it may leave.
type Waiting = (Instant, Vec<u8>);

impl Relay {
    /// A line to `target` that is as wide as the machine.
    pub fn new(target: &str) -> Result<Self> {
        let target: SocketAddr = target.parse().with_context(|| format!("an address: {target}"))?;
        let (near, far) = (socket()?, socket()?);
        far.connect(target)?;
        let address = near.local_addr()?.to_string();
        let line = Arc::<Line>::default();
        let mut relay = Self { address, line, threads: Vec::new() };
        let (up, from_office) = channel();
        let (down, from_target) = channel();
        let ends = (near.try_clone()?, far.try_clone()?);
        relay.spawn(move |line| {
            hear(line, &up, |buffer| {
                let (len, office) = near.recv_from(buffer)?;
                *line.office.lock().expect("no holder panics") = Some(office);
                Ok(len)
            });
        });
        relay.spawn(move |line| hear(line, &down, |buffer| far.recv(buffer)));
        relay.spawn(move |line| pass_on(&from_office, &line.up, |datagram| ends.1.send(datagram)));
        relay.spawn(move |line| {
            pass_on(&from_target, &line.down, |datagram| {
                let office = *line.office.lock().expect("no holder panics");
                office.map_or(Ok(0), |office| ends.0.send_to(datagram, office))
            });
        });
        Ok(relay)
    }

    /// Where the office finds it.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// From now on it carries so many bits a second each way, or as many as it can.
    pub fn set_rate(&self, bits_per_s: Option<u64>) {
        self.line.bits_per_s.store(bits_per_s.unwrap_or(0), Ordering::Relaxed);
    }

    /// What it has carried so far.
    #[must_use]
    pub fn carried(&self) -> Carried {
        Carried { up: self.line.up.load(Ordering::Relaxed), down: self.line.down.load(Ordering::Relaxed) }
    }

    fn spawn(&mut self, run: impl FnOnce(&Line) + Send + 'static) {
        let line = Arc::clone(&self.line);
        self.threads.push(std::thread::spawn(move || run(&line)));
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.line.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn socket() -> Result<UdpSocket> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.set_read_timeout(Some(LOOK_EVERY))?;
    Ok(socket)
}

/// Takes datagrams and says when each may leave, until the line is cut. The thread that passes them on ends with this one.
fn hear(line: &Line, passed: &Sender<Waiting>, receive: impl Fn(&mut [u8]) -> io::Result<usize>) {
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    let mut is_free = Instant::now();
    while !line.stop.load(Ordering::Relaxed) {
        // Silence; or a target that is not there for now.
        let Ok(len) = receive(&mut buffer) else { continue };
        let now = Instant::now();
        let rate = line.bits_per_s.load(Ordering::Relaxed);
        let takes = match rate {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64(8.0 * (len as u64 + HEADER_BYTES) as f64 / rate as f64),
        };
        let leaves = if rate == 0 { now } else { is_free.max(now) + takes };
        if leaves.saturating_duration_since(now) > QUEUE + takes {
            continue;
        }
        is_free = leaves;
        if passed.send((leaves, buffer[..len].to_vec())).is_err() {
            return;
        }
    }
}

fn pass_on(waiting: &Receiver<Waiting>, count: &AtomicU64, send: impl Fn(&[u8]) -> io::Result<usize>) {
    for (leaves, datagram) in waiting {
        while let Some(left) = leaves.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            park_timeout(left);
        }
        count.fetch_add(datagram.len() as u64 + HEADER_BYTES, Ordering::Relaxed);
        // Nobody there: as on any line, it is lost.
        let _ = send(&datagram);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two ends of a relay, of which the first has said a byte.
    fn ends() -> Result<(Relay, UdpSocket, UdpSocket, SocketAddr)> {
        let (office, target) = (socket()?, socket()?);
        let relay = Relay::new(&target.local_addr()?.to_string())?;
        office.connect(relay.address())?;
        office.send(&[7])?;
        target.set_read_timeout(Some(Duration::from_secs(10)))?;
        let (_, from) = target.recv_from(&mut [0; 8])?;
        Ok((relay, office, target, from))
    }

    #[test]
    fn datagrams_go_both_ways_and_are_counted() -> Result<()> {
        let (relay, office, target, from) = ends()?;
        office.set_read_timeout(Some(Duration::from_secs(10)))?;
        target.send_to(&[1, 2, 3], from)?;
        let mut heard = [0; 8];
        assert_eq!(office.recv(&mut heard)?, 3);
        assert_eq!(heard[..3], [1, 2, 3]);
        assert_eq!(relay.carried(), Carried { up: 1 + HEADER_BYTES, down: 3 + HEADER_BYTES });
        Ok(())
    }

    #[test]
    fn a_thin_line_takes_its_time_and_drops_what_would_wait_too_long() -> Result<()> {
        let (relay, office, target, _) = ends()?;
        // 1,000 bytes with their headers take 10 ms: 20 of them fill the queue.
        relay.set_rate(Some(800_000));
        let start = Instant::now();
        for _ in 0..100 {
            office.send(&[0; 972])?;
        }
        let mut arrived = 0;
        target.set_read_timeout(Some(3 * QUEUE))?;
        let mut last = start;
        while target.recv(&mut [0; 1024]).is_ok() {
            (arrived, last) = (arrived + 1, Instant::now());
        }
        assert!((20..60).contains(&arrived), "{arrived} of 100 arrived");
        let paced = Duration::from_millis(10 * arrived - 10);
        assert!(last - start >= paced, "{arrived} arrived within {:?}", last - start);
        Ok(())
    }
}
