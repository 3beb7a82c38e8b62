//! The names of all metrics, and the exporter.
//!
//! Base units; `_total` on counters. The live RPO is computed here at the target, from what it has committed.

use crate::journal::PointVolume;
use crate::status::{GroupState, StatusReport};
use metrics::{counter, gauge};
use metrics_exporter_prometheus::{BuildError, PrometheusBuilder};
use std::net::SocketAddr;

/// Seconds of data that would be lost now, a group.
pub const LIVE_RPO_SECONDS: &str = "cdp_target_live_rpo_seconds";
/// Seconds from the newest point's cut to its arrival, a group.
pub const LAG_SECONDS: &str = "cdp_target_lag_seconds";
/// Number of the newest point, a group.
pub const NEWEST_EPOCH: &str = "cdp_target_newest_epoch";
/// Recovery points, a group.
pub const POINTS: &str = "cdp_target_points";
/// Bytes of a group's files.
pub const USED_BYTES: &str = "cdp_target_used_bytes";
/// Whether a group's source is connected: 0 or 1.
pub const CONNECTED: &str = "cdp_target_connected";
/// Whether a group needs a person: 0 or 1.
pub const ALARM: &str = "cdp_target_alarm";
/// Seconds since the last drill of a group was over.
pub const DRILL_AGE_SECONDS: &str = "cdp_target_drill_age_seconds";
/// Whether it passed: 0 or 1.
pub const DRILL_PASSED: &str = "cdp_target_drill_passed";
/// Whether another should have been over long since: 0 or 1.
pub const DRILL_OVERDUE: &str = "cdp_target_drill_overdue";
/// Bytes that can still be written to the store.
pub const FREE_BYTES: &str = "cdp_target_free_bytes";
/// Connections of offices.
pub const CONNECTIONS: &str = "cdp_target_connections";
/// Bytes that the scrub has read again since the server's start.
pub const SCRUBBED_BYTES: &str = "cdp_target_scrubbed_bytes_total";
/// Damages that it met, known ones each time.
pub const SCRUB_DAMAGES: &str = "cdp_target_scrub_damages_total";
/// Damaged frames that were healed since the server's start.
pub const HEALED_FRAMES: &str = "cdp_target_healed_frames_total";
/// Checkpoints that the server has made by itself since its start, those that a prune made among them.
pub const CHECKPOINTS: &str = "cdp_target_checkpoints_total";
/// Checkpoints that were due and could not be made.
pub const CHECKPOINT_FAILURES: &str = "cdp_target_checkpoint_failures_total";
/// Points that the server has removed by itself since its start.
pub const PRUNED_POINTS: &str = "cdp_target_pruned_points_total";
/// Bytes that this gave back.
pub const PRUNED_BYTES: &str = "cdp_target_pruned_bytes_total";
/// Prunes that failed.
pub const PRUNE_FAILURES: &str = "cdp_target_prune_failures_total";

/// Bytes that were issued to a volume's disk to be written, discarded or zeroed, by the commits that came since the server's start.
pub const VOLUME_WRITTEN_BYTES: &str = "cdp_target_volume_written_bytes_total";
/// Blocks of a volume found dirty, by those commits.
pub const VOLUME_DIRTY_BLOCKS: &str = "cdp_target_volume_dirty_blocks_total";
/// Those of them that stood here already.
pub const VOLUME_UNCHANGED_BLOCKS: &str = "cdp_target_volume_unchanged_blocks_total";
/// Those of them that came with content.
pub const VOLUME_CONTENT_BLOCKS: &str = "cdp_target_volume_content_blocks_total";
/// Those of them that came as holes.
pub const VOLUME_HOLE_BLOCKS: &str = "cdp_target_volume_hole_blocks_total";
/// Those of them that the device could not read.
pub const VOLUME_UNREADABLE_BLOCKS: &str = "cdp_target_volume_unreadable_blocks_total";
/// Those of them that the cut before had found dirty too.
pub const VOLUME_REWRITTEN_BLOCKS: &str = "cdp_target_volume_rewritten_blocks_total";
/// Blocks with content that packing did not make shorter.
pub const VOLUME_INCOMPRESSIBLE_BLOCKS: &str = "cdp_target_volume_incompressible_blocks_total";
/// Bytes of a volume's frames.
pub const VOLUME_FRAME_BYTES: &str = "cdp_target_volume_frame_bytes_total";

/// Counts what a commit says of its volumes.
pub(crate) fn committed(office: &str, group: &str, volumes: &[PointVolume]) {
    for PointVolume { name, meters } in volumes {
        let labels = [("office", office.to_owned()), ("group", group.to_owned()), ("volume", name.clone())];
        let count = |name: &'static str, more: u64| counter!(name, &labels).increment(more);
        count(VOLUME_WRITTEN_BYTES, meters.written_bytes.unwrap_or_default());
        count(VOLUME_DIRTY_BLOCKS, meters.dirty_blocks);
        count(VOLUME_UNCHANGED_BLOCKS, meters.unchanged_blocks);
        count(VOLUME_CONTENT_BLOCKS, meters.content_blocks);
        count(VOLUME_HOLE_BLOCKS, meters.hole_blocks);
        count(VOLUME_UNREADABLE_BLOCKS, meters.unreadable_blocks);
        count(VOLUME_REWRITTEN_BLOCKS, meters.rewritten_blocks);
        count(VOLUME_INCOMPRESSIBLE_BLOCKS, meters.incompressible_blocks);
        count(VOLUME_FRAME_BYTES, meters.frame_bytes);
    }
}

/// Counts checkpoints that were made, and those that could not be.
pub(crate) fn checkpoints(made: u64, failed: u64) {
    counter!(CHECKPOINTS).increment(made);
    counter!(CHECKPOINT_FAILURES).increment(failed);
}

/// Counts what a prune removed, and what that gave back.
pub(crate) fn pruned(points: u64, bytes: u64) {
    counter!(PRUNED_POINTS).increment(points);
    counter!(PRUNED_BYTES).increment(bytes);
}

/// Counts prunes that failed.
pub(crate) fn prunes_failed(count: u64) {
    counter!(PRUNE_FAILURES).increment(count);
}

/// Counts a segment that was read again.
pub fn scrubbed(bytes: u64, damages: usize) {
    counter!(SCRUBBED_BYTES).increment(bytes);
    counter!(SCRUB_DAMAGES).increment(damages as u64);
}

/// Counts damaged frames that a repair stands for.
pub fn healed(frames: u64) {
    counter!(HEALED_FRAMES).increment(frames);
}

/// Starts the exporter on the current runtime.
///
/// # Errors
/// Where the address is taken.
pub fn start(listen: SocketAddr) -> Result<(), BuildError> {
    PrometheusBuilder::new().with_http_listener(listen).install()?;
    // So that they are there before anything is counted.
    scrubbed(0, 0);
    healed(0);
    checkpoints(0, 0);
    pruned(0, 0);
    prunes_failed(0);
    Ok(())
}

/// Sets all gauges from a report.
pub fn record(report: &StatusReport, connections: usize) {
    gauge!(FREE_BYTES).set(report.free_bytes as f64);
    gauge!(CONNECTIONS).set(connections as f64);
    for office in &report.offices {
        for group in &office.groups {
            let labels = [("office", office.name.clone()), ("group", group.name.clone())];
            let flag = |state: bool| if state { 1.0 } else { 0.0 };
            let seconds = |ms: i64| ms as f64 / 1000.0;
            gauge!(POINTS, &labels).set(group.points as f64);
            gauge!(USED_BYTES, &labels).set(group.used_bytes as f64);
            gauge!(CONNECTED, &labels).set(flag(group.state == GroupState::Connected));
            let is_bad = matches!(group.state, GroupState::Frozen | GroupState::Refused | GroupState::Failed);
            let has_failed = group.last_drill.as_ref().is_some_and(|drill| !drill.passed);
            gauge!(ALARM, &labels).set(flag(is_bad || has_failed || group.drill_overdue));
            gauge!(DRILL_OVERDUE, &labels).set(flag(group.drill_overdue));
            if let Some(drill) = &group.last_drill {
                gauge!(DRILL_AGE_SECONDS, &labels).set(seconds(drill.age_ms));
                gauge!(DRILL_PASSED, &labels).set(flag(drill.passed));
            }
            if let Some(ms) = group.live_rpo_ms {
                gauge!(LIVE_RPO_SECONDS, &labels).set(seconds(ms));
            }
            if let Some(ms) = group.lag_ms {
                gauge!(LAG_SECONDS, &labels).set(seconds(ms));
            }
            if let Some(newest) = &group.newest {
                gauge!(NEWEST_EPOCH, &labels).set(newest.epoch.0 as f64);
            }
        }
    }
}
