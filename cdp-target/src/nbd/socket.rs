//! Where the server listens, and the sockets of its clients: unix or TCP.
//!
//! Invariant: a unix socket's file is made for its owner alone, what a dead server left in its place is replaced, what is
//! anything else is not; and the file goes with the server.

use std::fmt::{self, Write as _};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// A peer that does not answer the kernel for so long is gone: its disk would be held for nobody.
const KEEPALIVE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_COUNT: u32 = 6;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            let is_path = !path.is_empty() && !path.contains('\0');
            return if is_path {
                Ok(Self::Unix(PathBuf::from(path)))
            } else {
                Err("`unix:` is followed by a path".into())
            };
        }
        text.parse().map(Self::Tcp).map_err(|_| "it is written unix:PATH or ADDR:PORT, as in 127.0.0.1:10809".into())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// Why a server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another server does.
    #[error("{0} is in use by another server")]
    InUse(Address),
    /// Something else has the name.
    #[error("{} exists and is no socket", .0.display())]
    NotASocket(PathBuf),
    /// The kernel has room for so many bytes only.
    #[error("the path of a socket is at most 107 bytes long, {} is longer", .0.display())]
    TooLong(PathBuf),
    /// The system refused.
    #[error("listen on {address}")]
    System {
        /// Where.
        address: Address,
        /// What the system said.
        source: io::Error,
    },
}

/// A socket that clients connect to. A unix socket's file goes with it.
#[derive(Debug)]
pub struct Listener {
    kind: Kind,
    address: Address,
}

#[derive(Debug)]
enum Kind {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    /// Listens.
    ///
    /// # Errors
    /// Where somebody else does, or the system refuses.
    pub fn bind(address: &Address) -> Result<Self, ListenError> {
        let system = |source| ListenError::System { address: address.clone(), source };
        match address {
            Address::Unix(path) => {
                let listener = bind_unix(path)?;
                // From here on the file goes again, whatever comes.
                let listener = Self { kind: Kind::Unix(listener), address: address.clone() };
                listener.set_nonblocking().map_err(system)?;
                Ok(listener)
            }
            Address::Tcp(wanted) => {
                let listener = TcpListener::bind(wanted).map_err(|source| match source.kind() {
                    io::ErrorKind::AddrInUse => ListenError::InUse(address.clone()),
                    _ => system(source),
                })?;
                let bound = listener.local_addr().map_err(system)?;
                let listener = Self { kind: Kind::Tcp(listener), address: Address::Tcp(bound) };
                listener.set_nonblocking().map_err(system)?;
                Ok(listener)
            }
        }
    }

    /// Where it listens, with the port that the system chose.
    #[must_use]
    pub const fn address(&self) -> &Address {
        &self.address
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        match &self.kind {
            Kind::Unix(listener) => listener.set_nonblocking(true),
            Kind::Tcp(listener) => listener.set_nonblocking(true),
        }
    }

    /// The next client; none where it went away again.
    pub(super) fn accept(&self) -> io::Result<Socket> {
        match &self.kind {
            Kind::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok(Socket::Unix(stream))
            }
            Kind::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                keep_alive(&stream)?;
                Ok(Socket::Tcp(stream))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.kind {
            Kind::Unix(listener) => listener.as_fd(),
            Kind::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address
            && let Err(error) = rustix::fs::unlink(path)
        {
            tracing::debug!(path = %path.display(), %error, "the socket's file is left behind: the next server replaces it");
        }
    }
}

fn bind_unix(path: &Path) -> Result<UnixListener, ListenError> {
    let system = |source| ListenError::System { address: Address::Unix(path.to_owned()), source };
    if path.as_os_str().len() > 107 {
        return Err(ListenError::TooLong(path.to_owned()));
    }
    remove_stale(path)?;
    // A mask instead of a `chmod` afterwards: between the two anybody could connect.
    let mask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(path);
    rustix::process::umask(mask);
    bound.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse(Address::Unix(path.to_owned())),
        _ => system(source),
    })
}

/// Removes what a server that is gone left behind.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let is_socket = match path.symlink_metadata() {
        Err(_) => return Ok(()),
        Ok(metadata) => metadata.file_type().is_socket(),
    };
    if !is_socket {
        return Err(ListenError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            // Where this fails, `bind` does, and says why.
            let _ = rustix::fs::unlink(path);
            Ok(())
        }
        _ => Err(ListenError::InUse(Address::Unix(path.to_owned()))),
    }
}

fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    Ok(sockopt::set_tcp_keepcnt(stream, KEEPALIVE_COUNT)?)
}

/// A client's socket. Handles to it are made by `another`.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    pub(super) fn another(&self) -> io::Result<Self> {
        match self {
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
        }
    }

    /// Bounds a read, for all handles; `None`: not.
    pub(super) fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(timeout),
            Self::Tcp(stream) => stream.set_read_timeout(timeout),
        }
    }

    /// Bounds a write, for all handles; `None`: not.
    pub(super) fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_write_timeout(timeout),
            Self::Tcp(stream) => stream.set_write_timeout(timeout),
        }
    }

    /// Ends reading or all of it, for all handles. One that has ended already is no error.
    pub(super) fn shut(&self, how: Shutdown) {
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }

    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match self {
                Self::Unix(stream) => Read::read(&mut &*stream, buffer),
                Self::Tcp(stream) => Read::read(&mut &*stream, buffer),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    pub(super) fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Unix(stream) => Write::write_all(&mut &*stream, bytes),
            Self::Tcp(stream) => Write::write_all(&mut &*stream, bytes),
        }
    }
}

/// A path as a part of a URI.
pub(crate) fn escaped(path: &Path) -> String {
    let mut text = String::new();
    for byte in path.as_os_str().as_encoded_bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-~".contains(byte) {
            text.push(char::from(*byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_path_or_a_port() {
        assert_eq!("unix:/run/x".parse(), Ok(Address::Unix(PathBuf::from("/run/x"))));
        assert_eq!("[::1]:7".parse(), Ok(Address::Tcp(SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], 7)))));
        for wrong in ["", "unix:", "/run/x", "localhost:7", "127.0.0.1"] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test of real sockets")]
    fn a_socket_is_for_its_owner_and_replaces_only_what_is_dead() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("nbd.sock");
        let address = Address::Unix(path.clone());
        let first = Listener::bind(&address).expect("bound");
        assert_eq!(path.metadata().expect("there").permissions().mode() & 0o777, 0o600);
        assert!(matches!(Listener::bind(&address), Err(ListenError::InUse(_))));
        drop(first);
        assert!(!path.exists(), "it goes with the listener");
        drop(UnixListener::bind(&path).expect("a dead server's"));
        drop(Listener::bind(&address).expect("replaced"));
        std::fs::write(&path, b"precious").expect("written");
        assert!(matches!(Listener::bind(&address), Err(ListenError::NotASocket(_))));
        let long = Address::Unix(folder.path().join("x".repeat(100)));
        assert!(matches!(Listener::bind(&long), Err(ListenError::TooLong(_))));
    }
}
