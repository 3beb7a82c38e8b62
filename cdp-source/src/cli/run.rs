//! Commands that reach the target: `join`, `run`, and what `doctor` says of the line.

use super::JoinArgs;
use super::failure::UserError;
use super::show::print;
use crate::agent;
use crate::connect::{ConnectError, Identity, IdentityError, JoinedTarget, QuicConnector};
use crate::doctor::Finding;
use crate::freeze;
use crate::join::{self, JoinError};
use crate::sender::FAREWELL_TIMEOUT;
use crate::state::StateFolder;
use anyhow::{Context, Result};
use cdp_protocol::bundle::BUNDLE_BYTES_MAX;
use cdp_seams::clock::SystemClock;
use cdp_seams::storage;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// The target this office joined.
pub(super) fn identity(state: &StateFolder) -> Result<JoinedTarget> {
    Ok(load(state)?.target)
}

pub(super) fn load(state: &StateFolder) -> Result<Identity> {
    match Identity::load(&**state.storage(), state.root()) {
        Err(error @ IdentityError::NotJoined(_)) => Err(UserError::new(error.to_string())
            .hint("get a bundle with `cdp-target enroll OFFICE`, then: cdp-source join BUNDLE")
            .into()),
        other => other.context("load the identity of this office"),
    }
}

pub(super) fn join(state: &StateFolder, args: &JoinArgs) -> Result<ExitCode> {
    let bundle = read_bundle(state, args)?;
    state.make(state.root())?;
    let lock = state.lock_changes()?;
    let clock = Arc::new(SystemClock::new());
    let joining = join::join(&bundle, args.target.as_deref(), Arc::clone(state.storage()), state.root(), clock);
    let joined = runtime()?.block_on(joining).map_err(judged)?;
    drop(lock);
    let JoinedTarget { office_name, targets, groups, .. } = &joined.target;
    print(&format!("joined as {office_name}, target {}", targets.join(", ")))?;
    if let Some(warning) = joined.clock_warning() {
        eprintln!("warning: {warning}");
    }
    eprintln!("hint: next: cdp-source protect NAME=DEVICE");
    if !groups.is_empty() {
        eprintln!("hint: to put a lost machine's disk back here: cdp-source restore --disk DEVICE --at POINT");
    }
    Ok(ExitCode::SUCCESS)
}

fn read_bundle(state: &StateFolder, args: &JoinArgs) -> Result<Vec<u8>> {
    storage::read_all(&**state.storage(), &args.bundle, BUNDLE_BYTES_MAX as u64).map_err(|error| {
        let text = format!("read bundle {}: {error}", args.bundle.display());
        UserError::new(text).hint("`cdp-target enroll OFFICE --output FILE` makes one").into()
    })
}

/// Files that cannot be written are not the user's mistake; everything else about a bundle is.
fn judged(error: JoinError) -> anyhow::Error {
    if matches!(error, JoinError::Storage { .. } | JoinError::Request(_)) {
        return error.into();
    }
    let hint = error.hint().map(str::to_owned);
    let error = UserError::new(format!("{:#}", anyhow::Error::new(error)));
    match hint {
        Some(hint) => error.hint(hint).into(),
        None => error.into(),
    }
}

pub(super) fn run(state: &StateFolder) -> Result<ExitCode> {
    let lock = state.lock_agent()?;
    let identity = load(state)?;
    runtime()?.block_on(agent::run(state.clone(), identity))?;
    drop(lock);
    Ok(ExitCode::SUCCESS)
}

/// Whoever stops the agent by a signal to all of its processes does not stop this one: it ends when the agent has.
pub(super) fn thaw_watchdog(deadline: Duration) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let entered = runtime.enter();
    let _passed_over = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
    freeze::watch(io::stdin(), io::stdout(), deadline, &SystemClock::new()).context("wait for the agent")?;
    drop(entered);
    Ok(ExitCode::SUCCESS)
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).enable_all().build().context("start the runtime")
}

/// Whether the target can be reached and admits this office.
pub(super) fn line_findings(state: &StateFolder) -> Vec<Finding> {
    const JOIN: &str = "get a bundle with `cdp-target enroll OFFICE`, then: cdp-source join BUNDLE";
    let identity = match Identity::load(&**state.storage(), state.root()) {
        Ok(identity) => identity,
        Err(error @ IdentityError::NotJoined(_)) => return vec![Finding::warn("target", error.to_string(), JOIN)],
        Err(error) => {
            let text = format!("{:#}", anyhow::Error::new(error));
            return vec![Finding::fail("target", text, "join again into another --state folder")];
        }
    };
    let targets = identity.target.targets.join(", ");
    match runtime().and_then(|runtime| Ok(runtime.block_on(reach(identity))?)) {
        Ok(Reached { round_trip, clock_ahead_ms }) => {
            let found = round_trip.map_or_else(|| targets.clone(), |rtt| format!("{targets}, round trip {rtt:.1?}"));
            vec![Finding::ok("target", found), clock_finding(clock_ahead_ms)]
        }
        Err(error) => {
            let hint = error.downcast_ref::<ConnectError>().and_then(ConnectError::hint);
            vec![Finding::fail("target", format!("{error:#}"), hint.unwrap_or("see that the target runs"))]
        }
    }
}

/// What one visit to the target told.
struct Reached {
    round_trip: Option<Duration>,
    clock_ahead_ms: Option<i64>,
}

async fn reach(identity: Identity) -> Result<Reached, ConnectError> {
    let clock = Arc::new(SystemClock::new());
    let line = QuicConnector::new(identity, clock.clone())?.line().await?;
    let round_trip = line.round_trip();
    let clock_ahead_ms = agent::visit::target_clock_ahead_ms(&*line, &*clock).await.ok();
    let _ = tokio::time::timeout(FAREWELL_TIMEOUT, line.end("doctor is done")).await;
    Ok(Reached { round_trip, clock_ahead_ms })
}

fn clock_finding(ahead_ms: Option<i64>) -> Finding {
    const APART_MS: u64 = 5 * 60 * 1000;
    match ahead_ms {
        None => {
            Finding::warn("clock", "the target did not tell its time", "see that both sides are of the same version")
        }
        Some(ms) if ms.unsigned_abs() <= APART_MS => Finding::ok("clock", format!("{ms} ms ahead of the target's")),
        Some(ms) => Finding::warn(
            "clock",
            format!("{} s ahead of the target's", ms / 1000),
            "set the clock (NTP); everything works, but the times of points mislead",
        ),
    }
}
