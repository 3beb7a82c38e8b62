//! Making a large history, its checkpoints, and pruning it by the ladder. Each figure is a child's.

use super::store::{DAYS, History, Plan, key};
use super::{peak_bytes, written_bytes};
use anyhow::Result;
use cdp_protocol::units::Epoch;
use cdp_seams::random::SystemRandom;
use cdp_seams::storage::SystemStorage;
use cdp_target::checkpoint::builder::{Builder, end};
use cdp_target::config::{Config, LISTEN_DEFAULT};
use cdp_target::journal::change::Change;
use cdp_target::prune::{CHUNK_BYTES_MAX, Prune};
use cdp_target::restore::keyring::Keyring;
use cdp_target::retention::Ladder;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Instant;

/// Makes the history.
pub(super) fn make(folder: &Path, plan: Plan) -> Result<Value> {
    let mut history = History::create(folder, plan)?;
    history.first_copy()?;
    history.points_up_to(plan.points)?;
    Ok(json!({ "segments": history.journal.view().manifest().sealed.len() }))
}

/// Makes the checkpoint of point `epoch`.
pub(super) fn checkpoint(folder: &Path, plan: Plan, epoch: u64) -> Result<Value> {
    let mut history = History::open(folder, plan)?;
    let (view, keys) = (history.journal.view(), Keyring::from(&key()));
    let (start, written) = (Instant::now(), written_bytes()?);
    let builder = Builder { view: &view, keys: Some(&keys), random: &SystemRandom, now: plan.received(epoch) };
    let made = builder.build(Epoch(epoch), &mut |_| true, &mut |_, _| {})?;
    let needed_bytes = made.needed_bytes;
    history.journal.adopt(&Change::Checkpoint(made))?;
    end(&SystemStorage, folder)?;
    Ok(json!({
        "seconds": start.elapsed().as_secs_f64(), "written_bytes": written_bytes()? - written,
        "needed_bytes": needed_bytes, "peak_bytes": peak_bytes()?,
    }))
}

/// Adds the points that `days` more days have.
pub(super) fn go_on(folder: &Path, plan: Plan, days: u64) -> Result<Value> {
    let mut history = History::open(folder, plan)?;
    let newest = history.newest() + plan.points_a_day() * days;
    history.points_up_to(newest)?;
    Ok(json!({ "newest": newest }))
}

/// Prunes as of the newest point by the default settings.
pub(super) fn prune(folder: &Path, plan: Plan) -> Result<Value> {
    let mut history = History::open(folder, plan)?;
    let now = plan.received(history.newest());
    let (keys, config) = (Keyring::from(&key()), Config::new(LISTEN_DEFAULT, vec![]));
    let prune = Prune {
        ladder: &Ladder::DEFAULT,
        now,
        wall: now,
        keys: Some(&keys),
        random: &SystemRandom,
        segment_bytes_max: config.segment_bytes_max,
        chunk_bytes_max: CHUNK_BYTES_MAX,
        checkpoint_share: config.checkpoint_share,
        keep_only_newest: false,
    };
    let (start, written) = (Instant::now(), written_bytes()?);
    let view = history.journal.view();
    let pruned = prune.run(view, &mut history.journal, &mut |_| true, &mut |_, _| {})?;
    Ok(json!({
        "points": pruned.points, "kept": pruned.kept, "segments": pruned.rewritten_segments,
        "bytes_before": pruned.bytes_before, "bytes_after": pruned.bytes_after,
        "seconds": start.elapsed().as_secs_f64(), "written_bytes": written_bytes()? - written, "peak_bytes": peak_bytes()?,
    }))
}

/// The points that get a checkpoint in the course of the days, one every so many days.
pub(super) fn checkpointed(plan: Plan, every_days: u64) -> Vec<u64> {
    (1..=DAYS / every_days).map(|at| plan.points * at * every_days / DAYS).collect()
}
