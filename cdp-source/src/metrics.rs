//! Names of the metrics, and the exporter that serves them where `metrics_listen` asks for it.
//!
//! Base units, `_total` on counters; labels: the group, where it is a group's, and the volume where it is a volume's.

use crate::agent::status::{GroupPhase, GroupStatus, VolumeStatus};
use anyhow::{Context, Result};
use metrics::{counter, gauge};
use std::net::SocketAddr;

/// Seconds between now and the state that the target holds.
pub const LAG_SECONDS: &str = "cdp_source_lag_seconds";
/// Number of the newest epoch captured.
pub const CAPTURED_EPOCH: &str = "cdp_source_captured_epoch";
/// Number of the newest epoch acked.
pub const ACKED_EPOCH: &str = "cdp_source_acked_epoch";
/// Bytes known to be dirty and not captured.
pub const DIRTY_BYTES: &str = "cdp_source_dirty_bytes";
/// Bytes of frames captured and not acked.
pub const UNACKED_BYTES: &str = "cdp_source_unacked_bytes";
/// Points captured and not handed over to be sent.
pub const SPOOL_POINTS: &str = "cdp_source_spool_points";
/// Bytes of frames captured and not handed over to be sent.
pub const SPOOL_BYTES: &str = "cdp_source_spool_bytes";
/// Seconds since the oldest of these points was cut; 0 where none waits.
pub const SPOOL_OLDEST_SECONDS: &str = "cdp_source_spool_oldest_seconds";
/// Points since the agent's start that were merged into later ones.
pub const SPOOL_MERGES_TOTAL: &str = "cdp_source_spool_merges_total";
/// Bytes of frames acked since the agent's start.
pub const ACKED_BYTES_TOTAL: &str = "cdp_source_acked_bytes_total";
/// Bytes of blocks since the agent's start that were marked and held what the target had already.
pub const UNCHANGED_BYTES_TOTAL: &str = "cdp_source_unchanged_bytes_total";
/// Blocks that nobody wrote to and that were found to hold what the target does, since the agent's start.
pub const PROVED_BLOCKS_TOTAL: &str = "cdp_source_proved_blocks_total";
/// Blocks that nobody was known to have written to and that held something else: above zero, writes were missed.
pub const DIFFERING_BLOCKS_TOTAL: &str = "cdp_source_differing_blocks_total";
/// Blocks of which the target has told, by their digests, that it holds what it was sent, since the agent's start.
pub const TARGET_PROVED_BLOCKS_TOTAL: &str = "cdp_source_target_proved_blocks_total";
/// Blocks of which it holds something else: above zero, its store is to be looked at.
pub const TARGET_DIFFERING_BLOCKS_TOTAL: &str = "cdp_source_target_differing_blocks_total";
/// Bytes of digests that the target has told for it.
pub const TARGET_AUDIT_BYTES_TOTAL: &str = "cdp_source_target_audit_bytes_total";
/// Duration of the last cut.
pub const CUT_SECONDS: &str = "cdp_source_cut_seconds";
/// Rounds of the last cut.
pub const CUT_ROUNDS: &str = "cdp_source_cut_rounds";
/// Cuts in a row that did not validate.
pub const FAILED_CUTS: &str = "cdp_source_failed_cuts";
/// Cuts since the agent's start.
pub const CUTS_TRIED_TOTAL: &str = "cdp_source_cuts_tried_total";
/// Cuts since the agent's start that validated.
pub const CUTS_VALIDATED_TOTAL: &str = "cdp_source_cuts_validated_total";
/// Cuts since the agent's start that found nothing changed.
pub const CUTS_UNCHANGED_TOTAL: &str = "cdp_source_cuts_unchanged_total";
/// How often file systems were frozen for a cut, since the agent's start.
pub const FREEZES_TOTAL: &str = "cdp_source_freezes_total";
/// Runs of hooks since the agent's start that failed or were killed at their deadline.
pub const HOOK_FAILURES_TOTAL: &str = "cdp_source_hook_failures_total";
/// When the point of the newest local image was cut, in seconds since 1970; not told where there is none.
pub const LOCAL_IMAGE_TIMESTAMP_SECONDS: &str = "cdp_source_local_image_timestamp_seconds";
/// Bytes of the newest local image.
pub const LOCAL_IMAGE_BYTES: &str = "cdp_source_local_image_bytes";
/// 1 where a local image should have been there by now.
pub const LOCAL_IMAGE_OVERDUE: &str = "cdp_source_local_image_overdue";
/// 1 where the last try to make a local image failed.
pub const LOCAL_IMAGE_FAILED: &str = "cdp_source_local_image_failed";
/// 1 where points are made and acked as they should be.
pub const CONTINUOUS: &str = "cdp_source_continuous";
/// Writes that the tracker counted.
pub const WRITES_TOTAL: &str = "cdp_source_tracked_writes_total";
/// Runs of the tracker that the kernel passed over.
pub const TRACKER_MISSES_TOTAL: &str = "cdp_source_tracker_misses_total";

/// Flips at which the kernel had counted completions that the tracker had not.
pub const COMPLETIONS_LOST_TOTAL: &str = "cdp_source_tracker_completions_lost_total";
/// Passthrough writes, whose range is not known.
pub const BLIND_WRITES_TOTAL: &str = "cdp_source_blind_writes_total";
/// How often everything was made dirty because marks could not be relied upon.
pub const RESCANS_TOTAL: &str = "cdp_source_rescans_total";
/// 1 while no cut is made because the tracking is in doubt.
pub const IN_DOUBT: &str = "cdp_source_tracker_in_doubt";
/// Mounted file systems that no group holds and that are not to be left: above zero, there is data that nobody copies.
pub const UNPROTECTED_FILE_SYSTEMS: &str = "cdp_source_unprotected_file_systems";

/// Bytes that were issued to the volume's disk to be written, discarded or zeroed, since the agent's start; 0 where the tracker does not count.
pub const VOLUME_WRITTEN_BYTES_TOTAL: &str = "cdp_source_volume_written_bytes_total";
/// Blocks of the volume found dirty since the agent's start, each as often as it was.
pub const VOLUME_DIRTY_BLOCKS_TOTAL: &str = "cdp_source_volume_dirty_blocks_total";
/// Those of them that the target held already.
pub const VOLUME_UNCHANGED_BLOCKS_TOTAL: &str = "cdp_source_volume_unchanged_blocks_total";
/// Those of them that were captured with content.
pub const VOLUME_CONTENT_BLOCKS_TOTAL: &str = "cdp_source_volume_content_blocks_total";
/// Those of them that were captured as holes.
pub const VOLUME_HOLE_BLOCKS_TOTAL: &str = "cdp_source_volume_hole_blocks_total";
/// Those of them that the device could not read.
pub const VOLUME_UNREADABLE_BLOCKS_TOTAL: &str = "cdp_source_volume_unreadable_blocks_total";
/// Those of them that the cut before had found dirty too.
pub const VOLUME_REWRITTEN_BLOCKS_TOTAL: &str = "cdp_source_volume_rewritten_blocks_total";
/// Blocks with content that packing did not make shorter.
pub const VOLUME_INCOMPRESSIBLE_BLOCKS_TOTAL: &str = "cdp_source_volume_incompressible_blocks_total";
/// Bytes of the volume's frames, as they are sent and stored.
pub const VOLUME_FRAME_BYTES_TOTAL: &str = "cdp_source_volume_frame_bytes_total";

/// Serves the metrics at `listen`. Needs a tokio runtime around it.
///
/// # Errors
/// Where the address cannot be listened on.
pub fn serve(listen: SocketAddr) -> Result<()> {
    metrics_exporter_prometheus::PrometheusBuilder::new()
        .with_http_listener(listen)
        .install()
        .with_context(|| format!("serve metrics: metrics_listen={listen}"))
}

/// Records how many file systems are in no group.
pub fn record_unprotected(count: usize) {
    gauge!(UNPROTECTED_FILE_SYSTEMS).set(count as f64);
}

/// Records how a group stands.
pub fn record(status: &GroupStatus) {
    let group = || status.group.clone();
    let set = |name: &'static str, value: f64| gauge!(name, "group" => group()).set(value);
    if let Some(ms) = status.lag_ms {
        set(LAG_SECONDS, ms as f64 / 1000.0);
    }
    if let Some(epoch) = status.captured_epoch {
        set(CAPTURED_EPOCH, epoch.0 as f64);
    }
    if let Some(epoch) = status.acked_epoch {
        set(ACKED_EPOCH, epoch.0 as f64);
    }
    if let Some(cut) = status.last_cut {
        set(CUT_SECONDS, cut.cut_us as f64 / 1e6);
        set(CUT_ROUNDS, f64::from(cut.rounds));
    }
    set(DIRTY_BYTES, status.dirty_bytes as f64);
    set(UNACKED_BYTES, status.unacked_bytes as f64);
    set(SPOOL_POINTS, status.spool.waiting_points as f64);
    set(SPOOL_BYTES, status.spool.waiting_bytes as f64);
    set(SPOOL_OLDEST_SECONDS, status.spool.oldest_waiting_ms.unwrap_or(0) as f64 / 1000.0);
    set(FAILED_CUTS, status.failed_cuts as f64);
    set(CONTINUOUS, f64::from(u8::from(status.state == GroupPhase::Continuous)));
    let count = |name: &'static str, total: u64| counter!(name, "group" => group()).absolute(total);
    count(SPOOL_MERGES_TOTAL, status.spool.merged_points);
    count(ACKED_BYTES_TOTAL, status.acked_bytes);
    count(UNCHANGED_BYTES_TOTAL, status.unchanged_bytes);
    count(PROVED_BLOCKS_TOTAL, status.audit.proved_blocks);
    count(DIFFERING_BLOCKS_TOTAL, status.audit.differing_blocks);
    count(TARGET_PROVED_BLOCKS_TOTAL, status.audit.target_proved_blocks);
    count(TARGET_DIFFERING_BLOCKS_TOTAL, status.audit.target_differing_blocks);
    count(TARGET_AUDIT_BYTES_TOTAL, status.audit.target_bytes);
    count(CUTS_TRIED_TOTAL, status.cuts_tried);
    count(CUTS_VALIDATED_TOTAL, status.cuts_validated);
    count(CUTS_UNCHANGED_TOTAL, status.cuts_unchanged);
    count(FREEZES_TOTAL, status.freezes);
    count(HOOK_FAILURES_TOTAL, status.hooks.as_ref().map_or(0, |hooks| hooks.failures));
    count(WRITES_TOTAL, status.tracker.issued);
    count(TRACKER_MISSES_TOTAL, status.tracker.misses);
    let trust = &status.tracker.trust;
    set(IN_DOUBT, f64::from(u8::from(trust.doubt.is_some())));
    count(COMPLETIONS_LOST_TOTAL, trust.completions_lost);
    count(BLIND_WRITES_TOTAL, trust.blind_writes);
    count(RESCANS_TOTAL, trust.rescans);
    if let Some(images) = &status.local_image {
        if let Some(last) = &images.last {
            set(LOCAL_IMAGE_TIMESTAMP_SECONDS, last.time.0 as f64 / 1000.0);
            set(LOCAL_IMAGE_BYTES, last.bytes as f64);
        }
        set(LOCAL_IMAGE_OVERDUE, f64::from(u8::from(images.overdue)));
        set(LOCAL_IMAGE_FAILED, f64::from(u8::from(images.failure.is_some())));
    }
    status.volumes.iter().for_each(|volume| record_volume(&status.group, volume));
}

/// Records what became of a volume.
fn record_volume(group: &str, volume: &VolumeStatus) {
    let labels = [("group", group.to_owned()), ("volume", volume.name.clone())];
    let count = |name: &'static str, total: u64| counter!(name, &labels).absolute(total);
    let meters = &volume.meters;
    count(VOLUME_WRITTEN_BYTES_TOTAL, meters.written_bytes.unwrap_or_default());
    count(VOLUME_DIRTY_BLOCKS_TOTAL, meters.dirty_blocks);
    count(VOLUME_UNCHANGED_BLOCKS_TOTAL, meters.unchanged_blocks);
    count(VOLUME_CONTENT_BLOCKS_TOTAL, meters.content_blocks);
    count(VOLUME_HOLE_BLOCKS_TOTAL, meters.hole_blocks);
    count(VOLUME_UNREADABLE_BLOCKS_TOTAL, meters.unreadable_blocks);
    count(VOLUME_REWRITTEN_BLOCKS_TOTAL, meters.rewritten_blocks);
    count(VOLUME_INCOMPRESSIBLE_BLOCKS_TOTAL, meters.incompressible_blocks);
    count(VOLUME_FRAME_BYTES_TOTAL, meters.frame_bytes);
}
