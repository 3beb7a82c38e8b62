//! How a command fails: one line that says what was tried on what, a hint where there is one, and whose mistake it was.

use crate::config::ConfigError;
use crate::control::ControlError;
use crate::local_image::ImageError;
use crate::probe::ProbeError;
use crate::restore::disk::DiskError;
use crate::restore::line::LineError;
use crate::state::StateError;
use std::fmt;
use std::process::ExitCode;

/// The user's mistake, or a negative answer: exit status 1.
#[derive(Debug)]
pub struct UserError {
    message: String,
    hint: Option<String>,
}

impl UserError {
    /// A mistake without a hint.
    #[must_use]
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None }
    }

    /// With the next step.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for UserError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for UserError {}

/// Prints the error and its hint on stderr; 1 for the user's mistake, 2 for ours.
#[must_use]
pub fn report(error: &anyhow::Error) -> ExitCode {
    let (is_users, hint) = judge(error);
    let line = format!("{error:#}").replace('\n', " ");
    eprintln!("error: {line}");
    if let Some(hint) = hint {
        eprintln!("hint: {hint}");
    }
    ExitCode::from(if is_users { 1 } else { 2 })
}

/// The first error of the chain that knows whose mistake it is, and what to do.
fn judge(error: &anyhow::Error) -> (bool, Option<String>) {
    for cause in error.chain() {
        if let Some(error) = cause.downcast_ref::<UserError>() {
            return (true, error.hint.clone());
        }
        if let Some(error) = cause.downcast_ref::<ProbeError>() {
            return (true, error.hint().map(str::to_owned));
        }
        if let Some(error) = cause.downcast_ref::<ConfigError>() {
            return (true, error.hint());
        }
        if let Some(error) = cause.downcast_ref::<StateError>() {
            return (error.is_users(), error.hint());
        }
        if let Some(error) = cause.downcast_ref::<DiskError>() {
            return (error.is_users(), error.hint().map(str::to_owned));
        }
        if let Some(error) = cause.downcast_ref::<LineError>() {
            return judge_line(error);
        }
        if let Some(error) = cause.downcast_ref::<ImageError>() {
            return (error.is_users(), error.hint());
        }
        if let Some(error) = cause.downcast_ref::<ControlError>() {
            return match error {
                ControlError::NotRunning(_) => (true, Some("start it: cdp-source run".into())),
                _ => (false, None),
            };
        }
    }
    (false, None)
}

/// No such point is a negative answer; no line is nobody's fault here, and neither is what the target says.
fn judge_line(error: &LineError) -> (bool, Option<String>) {
    match error {
        LineError::Refused(_) => (true, Some("cdp-source points lists them".into())),
        LineError::Connect(error) => (false, error.hint().map(str::to_owned)),
        LineError::Lost(_) => (false, Some("see that the target runs, and give the same command again".into())),
        LineError::Failed(_) => (false, Some("the target's log says more".into())),
        LineError::Answer(_) => (false, Some("see that both sides are of the same version".into())),
        LineError::Runtime(_) => (false, None),
        LineError::Image(error) => (error.is_users(), error.hint()),
    }
}
