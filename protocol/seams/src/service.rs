//! The service manager (systemd): what it is told, by the protocol of `sd_notify(3)`, and its watchdog.
//!
//! Without a manager nobody is told anything. A ping of the watchdog means that every thread that entered (`pulse`) goes on, and that
//! whoever calls `look` does: there is none from a timer alone.

use crate::pulse::Watch;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The program does its work from now on.
pub const READY: &str = "READY=1";
/// It is about to end.
pub const STOPPING: &str = "STOPPING=1";
const PING: &str = "WATCHDOG=1";

/// Tells the service manager, if there is one.
///
/// # Errors
/// Where it cannot be reached.
pub fn tell(state: &str) -> io::Result<()> {
    match std::env::var_os("NOTIFY_SOCKET") {
        Some(socket) => tell_at(&socket, state),
        None => Ok(()),
    }
}

/// A socket in the file system, or with a leading `@` one in the abstract namespace (`unix(7)`).
fn tell_at(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
    };
    UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
}

/// The manager's watchdog: it ends this process if it hears nothing for some time.
pub struct Watchdog {
    every: Duration,
    watch: Watch,
    told: Option<Duration>,
}

impl Watchdog {
    /// The one that this process was started with; `None` where there is none.
    #[must_use]
    pub fn of_environment() -> Option<Self> {
        let text = |name| std::env::var(name).ok();
        Self::of(text("WATCHDOG_USEC").as_deref(), text("WATCHDOG_PID").as_deref(), std::process::id())
    }

    fn of(usec: Option<&str>, pid: Option<&str>, own_pid: u32) -> Option<Self> {
        let bites_after = Duration::from_micros(usec?.parse().ok().filter(|usec| *usec > 0)?);
        // One that was meant for another process is inherited.
        let is_ours = pid.is_none_or(|pid| pid.parse() == Ok(own_pid));
        is_ours.then(|| Self { every: bites_after / 4, watch: Watch::new(bites_after / 2), told: None })
    }

    /// Pings it if that is due and every thread goes on; gives the name of one that does not.
    ///
    /// # Errors
    /// Where the manager cannot be reached.
    pub fn look(&mut self, now: Duration) -> io::Result<Option<String>> {
        let stuck = self.watch.stuck(now);
        if stuck.is_none() && self.told.is_none_or(|told| now.saturating_sub(told) >= self.every) {
            self.told = Some(now);
            tell(PING)?;
        }
        Ok(stuck)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manager_hears_it_by_a_path_and_by_an_abstract_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("notify");
        let name = format!("cdp-test-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name).expect("a name");
        let listeners = [
            (path.clone().into_os_string(), UnixDatagram::bind(&path).expect("bound")),
            (format!("@{name}").into(), UnixDatagram::bind_addr(&abstract_address).expect("bound")),
        ];
        for (socket, listener) in listeners {
            tell_at(&socket, READY).expect("told");
            let mut buffer = [0; 64];
            let len = listener.recv(&mut buffer).expect("heard");
            assert_eq!(&buffer[..len], b"READY=1");
        }
        assert!(tell_at(folder.path().join("nobody").as_os_str(), READY).is_err());
        assert!(tell_at(OsStr::new(&"/x".repeat(100)), READY).is_err(), "too long for an address");
    }

    #[test]
    fn a_watchdog_is_ours_if_it_has_a_time_and_our_process() {
        let every = |usec, pid| Watchdog::of(usec, pid, 77).map(|watchdog| watchdog.every);
        assert_eq!(every(Some("4000000"), None), Some(Duration::from_secs(1)));
        assert_eq!(every(Some("4000000"), Some("77")), Some(Duration::from_secs(1)));
        assert_eq!(every(Some("4000000"), Some("78")), None);
        assert_eq!(every(Some("0"), None), None);
        assert_eq!(every(Some("soon"), None), None);
        assert_eq!(every(None, Some("77")), None);
    }
}
