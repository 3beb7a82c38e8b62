//! How a command fails: one line that says what was tried on what, a hint, an exit status.
//!
//! Owns which errors are the user's (exit 1) and which ours (exit 2), and the next step for each. Where an error comes
//! from decides, not its text.

use crate::authority::AuthorityError;
use crate::catalog::CatalogError;
use crate::config::ConfigError;
use crate::control::ControlError;
use crate::drill::DrillError;
use crate::enroll::EnrollError;
use crate::files::copy::CopyError;
use crate::files::error::{KernelError, TreeError};
use crate::journal::JournalError;
use crate::maintenance::ClockError;
use crate::nbd::overlay::OverlayError;
use crate::nbd::overlay::format::HeaderError;
use crate::nbd::socket::ListenError;
use crate::nbd::tls::CredentialsError;
use crate::points::{NoSuchPoint, PointNameError};
use crate::prune::PruneError;
use crate::restore::image::{ExportError, one_line};
use crate::restore::output::OutputError;
use crate::store::StoreError;
use cdp_protocol::label::LabelError;
use std::io::{self, Write};
use std::process::ExitCode;

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The reader of our output went away: nothing to say.
    Quiet,
    /// A mistake of the user, or a negative answer.
    User,
    /// Ours, or the machine's.
    Ours,
}

/// A command that failed.
#[derive(Debug)]
pub(super) struct Failure {
    fault: Fault,
    error: anyhow::Error,
    hint: Option<String>,
}

impl Failure {
    /// The user's mistake, or a negative answer.
    pub(super) fn user(error: impl Into<anyhow::Error>) -> Self {
        Self { fault: Fault::User, error: error.into(), hint: None }
    }

    /// The user's mistake, said in a line.
    pub(super) fn mistake(line: impl Into<String>) -> Self {
        Self::user(anyhow::Error::msg(line.into()))
    }

    /// With the next step.
    #[must_use]
    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// With what was tried, in front of the error.
    #[must_use]
    pub(super) fn context(mut self, what: impl std::fmt::Display + Send + Sync + 'static) -> Self {
        self.error = self.error.context(what.to_string());
        self
    }

    /// Whose fault it is.
    #[must_use]
    pub(super) const fn fault(&self) -> Fault {
        self.fault
    }

    /// The error with its causes, in one line.
    #[must_use]
    pub(super) fn line(&self) -> String {
        one_line(self.error.as_ref())
    }

    /// The next step.
    #[must_use]
    pub(super) fn next_step(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// A failure that another process reports.
    #[must_use]
    pub(super) fn reported(user: bool, line: String, hint: Option<String>) -> Self {
        let fault = if user { Fault::User } else { Fault::Ours };
        Self { fault, error: anyhow::Error::msg(line), hint }
    }

    /// The error itself, for whoever reports it as theirs.
    #[must_use]
    pub(super) fn into_error(self) -> anyhow::Error {
        self.error
    }

    /// Prints it on stderr; gives the exit status.
    #[must_use]
    pub(super) fn report(&self) -> ExitCode {
        let code = match self.fault {
            Fault::Quiet => return ExitCode::SUCCESS,
            Fault::User => 1,
            Fault::Ours => 2,
        };
        let hint = self.hint.as_ref().map_or_else(String::new, |hint| format!("\nhint: {hint}"));
        // Nobody is left to tell where stderr is closed.
        let _ = writeln!(io::stderr(), "error: {}{hint}", self.line());
        ExitCode::from(code)
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        let error = error.into();
        let (fault, hint) = classify(&error);
        let hint = hint.or_else(|| is_read_only(&error).then_some(READ_ONLY_HINT));
        Self { fault, error, hint: hint.map(str::to_owned) }
    }
}

/// What a file system that may no longer be written to asks of an operator.
const READ_ONLY_HINT: &str = "its file system is read-only: see why (`dmesg`), repair it and mount it for writing; points can be listed and exported meanwhile";

fn is_read_only(error: &anyhow::Error) -> bool {
    let mut causes = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    causes.any(|cause| cause.kind() == io::ErrorKind::ReadOnlyFilesystem)
}

/// Whose fault, and the next step where there is one.
fn classify(error: &anyhow::Error) -> (Fault, Option<&'static str>) {
    if let Some(error) = error.downcast_ref::<StoreError>() {
        return store(error);
    }
    if let Some(error) = error.downcast_ref::<EnrollError>() {
        let ours = matches!(error, EnrollError::Authority(_));
        return (if ours { Fault::Ours } else { Fault::User }, error.hint());
    }
    if let Some(error) = error.downcast_ref::<OutputError>() {
        return output(error);
    }
    if let Some(error) = error.downcast_ref::<ExportError>() {
        return export(error);
    }
    if let Some(error) = error.downcast_ref::<CatalogError>() {
        return catalog(error);
    }
    if let Some(error) = error.downcast_ref::<OverlayError>() {
        return overlay(error);
    }
    if let Some(error) = error.downcast_ref::<ListenError>() {
        return listen(error);
    }
    if let Some(CredentialsError::NotEmpty(_)) = error.downcast_ref::<CredentialsError>() {
        return (Fault::User, Some("give a folder that does not exist yet, or one that this command made"));
    }
    if let Some(error) = error.downcast_ref::<AuthorityError>() {
        let name = matches!(error, AuthorityError::Name(_));
        return (if name { Fault::User } else { Fault::Ours }, None);
    }
    match error.downcast_ref::<DrillError>() {
        Some(DrillError::Output(error)) => return output(error),
        Some(DrillError::Export(error)) => return export(error),
        Some(DrillError::Journal(_)) => return (Fault::Ours, None),
        None => {}
    }
    if let Some(error) = error.downcast_ref::<TreeError>() {
        return tree(error);
    }
    if let Some(error) = error.downcast_ref::<CopyError>() {
        return copy(error);
    }
    if let Some(error) = error.downcast_ref::<KernelError>() {
        return kernel(error);
    }
    match error.downcast_ref::<JournalError>() {
        Some(JournalError::NotForked) => {
            return (Fault::User, Some("`cdp-target status` shows how the groups stand"));
        }
        Some(JournalError::NoHistory { is_ambiguous, .. }) => {
            let more = "give the whole name: GENERATION/EPOCH:HASH";
            let other = "`cdp-target status` names where the histories end, and whose they are";
            return (Fault::User, Some(if *is_ambiguous { more } else { other }));
        }
        Some(JournalError::Interrupted) => {
            return (Fault::User, Some("what was done is kept, and gone on with by the next try"));
        }
        Some(JournalError::Stale(_)) => return (Fault::User, Some("try again")),
        _ => {}
    }
    if let Some(PruneError::OnlyNewest(_)) = error.downcast_ref::<PruneError>() {
        return (Fault::User, Some("correct `retention` in target.toml, or say --keep-only-newest"));
    }
    if let Some(PruneError::Journal(JournalError::Interrupted)) = error.downcast_ref::<PruneError>() {
        return (Fault::User, Some("what was done is kept, and gone on with by the next try"));
    }
    if let Some(ClockError::Jump(_)) = error.downcast_ref::<ClockError>() {
        return (Fault::User, Some("check `date` and the time server; say --accept-clock once it is right"));
    }
    if error.is::<NoSuchPoint>() {
        return (Fault::User, Some("`cdp-target points OFFICE/GROUP` lists the points there are"));
    }
    if error.is::<PointNameError>() {
        let hint =
            "name a point by number, `latest`, a label, an RFC 3339 time with its zone, or an age (30s, 10m, 2h, 3d)";
        return (Fault::User, Some(hint));
    }
    if error.is::<LabelError>() {
        return (Fault::User, Some("choose a name such as before-upgrade"));
    }
    if error.is::<ConfigError>() {
        return (Fault::User, None);
    }
    if error.is::<ControlError>() {
        return (Fault::Ours, Some("look at the log of `cdp-target serve`, restart it if it hangs"));
    }
    let broken_pipe = error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe);
    (if broken_pipe { Fault::Quiet } else { Fault::Ours }, None)
}

fn store(error: &StoreError) -> (Fault, Option<&'static str>) {
    match error {
        StoreError::NotEmpty(_) => (Fault::User, Some("give a folder that is empty or does not exist yet")),
        StoreError::NotAStore(_) => {
            (Fault::User, Some("`cdp-target init --data DIR` makes one; --data or CDP_TARGET_DATA names another"))
        }
        StoreError::Newer { .. } => (Fault::User, Some("use the version of cdp-target that wrote it, or a newer one")),
        StoreError::Marker(..) => (Fault::Ours, Some("restore store.json from a copy of the store's folder")),
        StoreError::Config(..) => (Fault::User, Some("correct the line; what is left out takes its default")),
        StoreError::InUse { .. } => (Fault::User, Some("one server serves a store at a time; end the other one first")),
        StoreError::System { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
            (Fault::User, Some("run it as the user that owns the store"))
        }
        StoreError::System { .. } => (Fault::Ours, None),
    }
}

fn output(error: &OutputError) -> (Fault, Option<&'static str>) {
    match error {
        OutputError::Exists(_) => (Fault::User, Some("give another name, or --force to replace it")),
        OutputError::IsFolder(_) => {
            (Fault::User, Some("give a file's name; a whole group (OFFICE/GROUP) goes into a folder"))
        }
        OutputError::Kind(_) => (Fault::User, Some("give a file, a block device or - for stdout")),
        OutputError::Busy(_) => (Fault::User, Some("wait for it, or give another name")),
        OutputError::OtherImage { .. } => {
            (Fault::User, Some("name that point by its number to go on, or leave out --resume to begin anew"))
        }
        OutputError::InUse { .. } => {
            (Fault::User, Some("unmount it and end whatever uses it; --force does not help here"))
        }
        OutputError::NotBlank(_) => (Fault::User, Some("--force overwrites what is on it; look first with `blkid`")),
        OutputError::TooSmall { .. } => (Fault::User, Some("give an output with more room")),
        OutputError::System { source, .. } => match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                (Fault::User, Some("give a path in a folder that exists"))
            }
            io::ErrorKind::PermissionDenied => (Fault::User, Some("run it as a user that may write there")),
            io::ErrorKind::AlreadyExists => (Fault::User, Some("something took the name meanwhile: give another")),
            io::ErrorKind::StorageFull => (Fault::User, Some("give an output with more room")),
            _ => (Fault::Ours, None),
        },
    }
}

fn export(error: &ExportError) -> (Fault, Option<&'static str>) {
    match error {
        ExportError::Write { source, .. } if source.kind() == io::ErrorKind::BrokenPipe => (Fault::Quiet, None),
        ExportError::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
            (Fault::User, Some("give an output with more room; nothing was left behind"))
        }
        ExportError::Damaged { .. } => {
            let hint =
                "`cdp-target verify` names the damaged points; take another one, or --allow-damaged to get the rest";
            (Fault::User, Some(hint))
        }
        ExportError::Interrupted => (Fault::User, None),
        ExportError::Write { .. } | ExportError::Sync(_) | ExportError::ReadAgain(_) | ExportError::Packer(_) => {
            (Fault::Ours, None)
        }
    }
}

fn catalog(error: &CatalogError) -> (Fault, Option<&'static str>) {
    match error {
        CatalogError::NoOffice { .. } | CatalogError::NoGroup { .. } => {
            (Fault::User, Some("`cdp-target status` lists offices and groups"))
        }
        CatalogError::NoVolume { .. } => (Fault::User, Some("name one of those, or none for the whole group")),
        CatalogError::Store(error) => store(error),
        CatalogError::Authority(_) | CatalogError::Journal { .. } | CatalogError::Key { .. } => (Fault::Ours, None),
    }
}

fn overlay(error: &OverlayError) -> (Fault, Option<&'static str>) {
    let other = "give another file for this point: what was written over one point makes no sense over another";
    match error {
        OverlayError::Other { .. } => (Fault::User, Some(other)),
        OverlayError::InUse(_) => (Fault::User, Some("end the other server first, or give another file")),
        OverlayError::Header { source: HeaderError::Newer(_), .. } => {
            (Fault::User, Some("use the version of cdp-target that wrote it, or a newer one"))
        }
        OverlayError::Header { source: HeaderError::NotAnOverlay, .. } => {
            (Fault::User, Some("give a file that does not exist yet, or one that this command made"))
        }
        OverlayError::System { source, .. } => match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::IsADirectory | io::ErrorKind::NotADirectory => {
                (Fault::User, Some("give a file's name in a folder that exists"))
            }
            io::ErrorKind::PermissionDenied => (Fault::User, Some("run it as a user that may write there")),
            io::ErrorKind::StorageFull => (Fault::User, Some("give a file where there is more room")),
            io::ErrorKind::FileTooLarge => {
                (Fault::User, Some("the file is as long as the volumes are, sparse: give one on XFS or btrfs"))
            }
            _ => (Fault::Ours, None),
        },
        OverlayError::Header { .. } | OverlayError::Map { .. } | OverlayError::Failed(_) => {
            (Fault::Ours, Some("what was written cannot be told any more: begin with another file"))
        }
    }
}

fn listen(error: &ListenError) -> (Fault, Option<&'static str>) {
    let another = "give another address with --listen, or end the other server";
    match error {
        ListenError::InUse(_) => (Fault::User, Some(another)),
        ListenError::NotASocket(_) => (Fault::User, Some("give another path with --listen")),
        ListenError::TooLong(_) => (Fault::User, Some("give a shorter one, as in --listen unix:/run/nbd.sock")),
        ListenError::System { source, .. } => match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::AddrNotAvailable | io::ErrorKind::PermissionDenied => {
                (Fault::User, Some("give an address of this machine, or a path in a folder that exists and is yours"))
            }
            _ => (Fault::Ours, None),
        },
    }
}

fn tree(error: &TreeError) -> (Fault, Option<&'static str>) {
    match error {
        TreeError::NotFound | TreeError::NotAFolder | TreeError::Links => {
            (Fault::User, Some("`ls` lists what is there; the folder above is a good one to begin with"))
        }
        TreeError::IsAFolder => (Fault::User, Some("`ls` lists it, `cp -r` copies it")),
        TreeError::Special(_) | TreeError::Encrypted | TreeError::Interrupted => (Fault::User, None),
        TreeError::TooDeep(_) => (Fault::User, Some("name a folder further down")),
        TreeError::Damaged(_) => {
            (Fault::User, Some("`cdp-target drill` has the file system checked; take an older point"))
        }
        TreeError::Lost { .. } | TreeError::Unreadable(_) => {
            (Fault::User, Some("`cdp-target verify` names the damaged points; take another one"))
        }
        TreeError::System { .. } => (Fault::Ours, None),
    }
}

fn copy(error: &CopyError) -> (Fault, Option<&'static str>) {
    match error {
        CopyError::Tree(error) => tree(error),
        CopyError::Exists(_) => (Fault::User, Some("give another name, or --force to replace files that are there")),
        CopyError::Name(_) => (Fault::User, Some("give it another name with DESTINATION")),
        CopyError::Folder => (Fault::User, Some("-r copies it with all that is in it")),
        CopyError::Write { source, .. } => match source.kind() {
            io::ErrorKind::PermissionDenied => (Fault::User, Some("run it as a user that may write there")),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                (Fault::User, Some("give a destination with more room"))
            }
            _ => (Fault::Ours, None),
        },
    }
}

fn kernel(error: &KernelError) -> (Fault, Option<&'static str>) {
    match error {
        KernelError::NotRoot => {
            (Fault::User, Some("run it as root; or serve the point as a disk: `cdp-target nbd --help`"))
        }
        KernelError::NoProgram { program: "nbdfuse" } => {
            (Fault::User, Some("install it: `apt install libnbd-bin`, or `nbdfuse` where that is a package of its own"))
        }
        KernelError::NoProgram { program: "ntfs-3g" } => {
            (Fault::User, Some("install it, or take a kernel with ntfs3: `apt install ntfs-3g`"))
        }
        KernelError::NoProgram { .. } => (Fault::User, Some("install it: `apt install util-linux mount`")),
        KernelError::NoDriver { .. } => {
            (Fault::User, Some("serve the point as a disk to a machine whose kernel has it: `cdp-target nbd --help`"))
        }
        KernelError::Mount(_) => {
            (Fault::User, Some("`cdp-target drill` has the file system checked; take an older point"))
        }
        KernelError::Program { .. } => (
            Fault::Ours,
            Some("mounting takes FUSE and loop devices: see that /dev/fuse and /dev/loop-control are there"),
        ),
        KernelError::Listen(error) => listen(error),
        KernelError::Overlay(error) => overlay(error),
        KernelError::System { .. } => (Fault::Ours, None),
    }
}
