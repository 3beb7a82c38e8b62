//! Why a file system cannot be mounted, and why something of it cannot be had.

use crate::nbd::overlay::OverlayError;
use crate::nbd::socket::ListenError;
use rustix::io::Errno;
use std::io;

/// Why something of a file system cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TreeError {
    /// Nothing has that name.
    #[error("there is no such file or folder")]
    NotFound,
    /// The way leads through a file.
    #[error("it is no folder")]
    NotAFolder,
    /// A folder has no content.
    #[error("it is a folder")]
    IsAFolder,
    /// Neither a file nor a folder.
    #[error("it is {0}, which has no content")]
    Special(&'static str),
    /// Nobody has its key here.
    #[error("it is encrypted by its file system, whose keys are not part of a point")]
    Encrypted,
    /// Folders in folders, without an end.
    #[error("more than {0} folders lie in one another")]
    TooDeep(usize),
    /// The file system is not what it should be.
    #[error("the file system is damaged: {0}")]
    Damaged(String),
    /// The device does not give it: the point does not have it, or the file system asks for what is behind its end.
    #[error("{0}: input/output error")]
    Unreadable(String),
    /// The point does not have it.
    #[error("byte {offset} of the volume cannot be read: {reason}")]
    Lost {
        /// Where in the volume.
        offset: u64,
        /// Why.
        reason: String,
    },
    /// Links that lead nowhere.
    #[error("there are too many symbolic links on its way")]
    Links,
    /// The operator ended it.
    #[error("interrupted")]
    Interrupted,
    /// The machine's fault.
    #[error("{what}")]
    System {
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

impl TreeError {
    /// What the kernel says of something that is asked of a mounted file system.
    pub(super) fn of(what: impl Into<String>) -> impl FnOnce(Errno) -> Self {
        move |errno| match errno {
            Errno::NOENT => Self::NotFound,
            Errno::NOTDIR => Self::NotAFolder,
            Errno::LOOP => Self::Links,
            Errno::NOKEY => Self::Encrypted,
            Errno::IO => Self::Unreadable(what.into()),
            Errno::NODATA | Errno::UCLEAN | Errno::BADMSG => Self::Damaged(format!("{}: {errno}", what.into())),
            other => Self::System { what: what.into(), source: other.into() },
        }
    }
}

/// Why a file system of a point cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KernelError {
    /// Mounting is root's.
    #[error("its file system has to be mounted, which only root may do")]
    NotRoot,
    /// A program is missing.
    #[error("`{program}` is not there")]
    NoProgram {
        /// Which.
        program: &'static str,
    },
    /// The kernel was built without it.
    #[error("the kernel of this machine has no {driver}")]
    NoDriver {
        /// The file system, as the kernel calls it.
        driver: &'static str,
    },
    /// The kernel does not take the file system.
    #[error("the kernel does not mount it: {0}")]
    Mount(String),
    /// A program failed.
    #[error("{program} failed: {said}")]
    Program {
        /// Which.
        program: &'static str,
        /// What it said.
        said: String,
    },
    /// The server cannot listen.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Nothing can be written to the scratch folder.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The machine does not do its part.
    #[error("{what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl KernelError {
    /// What the system says when it does not do something.
    pub(super) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::System { what, source: error.into() }
    }
}
