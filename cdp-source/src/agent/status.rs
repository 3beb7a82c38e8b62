//! What the agent tells of itself: to `status`, and to the metrics.

use crate::hooks::HookRun;
use crate::local_image::status::LocalImageStatus;
use crate::tracker::{TrackerReport, TrustReport};
use crate::unprotected::Unprotected;
use cdp_protocol::record::volume_meters::VolumeMeters;
use cdp_protocol::units::{Epoch, Timestamp, VolumeSlot};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The agent as a whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Its process.
    pub pid: u32,
    /// Where the target is reached.
    pub target: String,
    /// Since when there is a line; `None` while there is none.
    pub connected_since: Option<Timestamp>,
    /// Why the last line ended, or was not made.
    pub last_error: Option<String>,
    /// The line's round trip in microseconds.
    pub round_trip_us: Option<u64>,
    /// Bytes of frames put on the line since it was first tried.
    pub sent_bytes: u64,
    /// Mounted file systems that are in no group, but for those that are to be left.
    #[serde(default)]
    pub unprotected: Vec<Unprotected>,
    /// The groups, by name.
    pub groups: Vec<GroupStatus>,
}

/// In what state a group is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupPhase {
    /// No connection yet, or no longer.
    #[default]
    Disconnected,
    /// The first copy is under way.
    Seeding,
    /// Points are made and acked as they should be.
    Continuous,
    /// The line or the target does not keep up.
    Backlog,
    /// No points are made: a person has to act, or a cut has not validated for long.
    Stalled,
    /// Everything is compared with what the target holds, because tracking or history was interrupted.
    Rescan,
}

impl GroupPhase {
    /// As it is printed.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Disconnected => "disconnected",
            Self::Seeding => "seeding",
            Self::Continuous => "continuous",
            Self::Backlog => "backlog",
            Self::Stalled => "stalled",
            Self::Rescan => "rescan",
        }
    }
}

/// One group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Its name.
    pub group: String,
    /// Its state.
    pub state: GroupPhase,
    /// Why it is in that state, where that needs saying.
    pub reason: Option<String>,
    /// Which volume is being restored, or was begun to be: no points are made until that is over.
    #[serde(default)]
    pub restoring: Option<String>,
    /// Its volumes.
    pub volumes: Vec<VolumeStatus>,
    /// Newest epoch captured.
    pub captured_epoch: Option<Epoch>,
    /// Newest epoch whose commit was sent.
    pub sent_epoch: Option<Epoch>,
    /// Newest epoch acked.
    pub acked_epoch: Option<Epoch>,
    /// Cut time of the newest epoch acked by this agent.
    pub acked_time: Option<Timestamp>,
    /// The volumes were validated to be unchanged since the newest acked epoch, at this time.
    pub unchanged_as_of: Option<Timestamp>,
    /// How long ago the state was that the target holds, in milliseconds.
    pub lag_ms: Option<u64>,
    /// When everything now dirty will have been sent at the present speed, in seconds.
    pub estimate_s: Option<u64>,
    /// Bytes known to be dirty and not captured yet.
    pub dirty_bytes: u64,
    /// Epochs captured and not acked.
    pub unacked_epochs: u64,
    /// Bytes of frames captured and not acked.
    pub unacked_bytes: u64,
    /// What waits for the line.
    #[serde(default)]
    pub spool: SpoolStatus,
    /// Bytes acked since the agent's start.
    pub acked_bytes: u64,
    /// Bytes of blocks since the agent's start that were marked and not sent, because the target held just that already.
    pub unchanged_bytes: u64,
    /// Bytes that stand as holes in the points because they are excluded.
    #[serde(default)]
    pub skipped_bytes: u64,
    /// What is excluded, or should be and is not.
    #[serde(default)]
    pub excludes: Vec<ExcludeStatus>,
    /// What the audit has found.
    pub audit: AuditStatus,
    /// How much of what has to be compared again was, in percent; `None` where nothing has to.
    pub rescan_percent: Option<u8>,
    /// The last cut that validated.
    pub last_cut: Option<CutStatus>,
    /// Cuts that did not validate since the last one that did.
    pub failed_cuts: u64,
    /// Cuts since the agent's start; those that were found to be too large, and so became parts, are none.
    pub cuts_tried: u64,
    /// Those of them that validated, whether anything had changed or not.
    pub cuts_validated: u64,
    /// Those of them that found nothing changed.
    pub cuts_unchanged: u64,
    /// How often file systems were frozen for a cut since the agent's start.
    pub freezes: u64,
    /// Why file systems could not be frozen, or not for long enough, when that was tried last.
    pub freeze_failure: Option<String>,
    /// How the hooks went; `None` where none are configured.
    pub hooks: Option<HooksStatus>,
    /// How its local images stand; `None` where none are configured.
    #[serde(default)]
    pub local_image: Option<LocalImageStatus>,
    /// What the tracker says of itself.
    pub tracker: TrackerStatus,
}

/// What was captured and was not handed over to be sent, since so much of what was is not acked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpoolStatus {
    /// Points that wait.
    pub waiting_points: u64,
    /// Bytes of frames that wait.
    pub waiting_bytes: u64,
    /// Bytes of them that are on the disk.
    pub spooled_bytes: u64,
    /// When the oldest point that waits was cut.
    pub oldest_waiting: Option<Timestamp>,
    /// How long ago that is, in milliseconds.
    pub oldest_waiting_ms: Option<u64>,
    /// Points since the agent's start that were merged into later ones, because there were too many or too little room.
    pub merged_points: u64,
    /// Why nothing is written to the disk until the agent's next start.
    pub failure: Option<String>,
}

/// How the hooks went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HooksStatus {
    /// The last run of the pre-cut hook.
    pub pre_cut: Option<HookRun>,
    /// The last run of the post-cut hook.
    pub post_cut: Option<HookRun>,
    /// Runs since the agent's start that failed.
    pub failures: u64,
}

/// A file, or a swap device, that is left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExcludeStatus {
    /// Its path.
    pub path: PathBuf,
    /// Why it is one to be left out.
    pub kind: ExcludeKind,
    /// Bytes of it that are left out where they are written.
    pub bytes: u64,
    /// Why it, or some of it, is captured all the same.
    pub reason: Option<String>,
}

/// Why something is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExcludeKind {
    /// The configuration names it.
    Configured,
    /// The kernel swaps to it.
    Swap,
    /// The agent's own digests, and its spool.
    Own,
}

/// What reading blocks that nobody writes to has come to since the agent's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditStatus {
    /// Blocks that hold what the target does.
    pub proved_blocks: u64,
    /// Blocks of which was not known what the target holds: just that.
    pub learnt_blocks: u64,
    /// Blocks that held something else: writes were missed. They are sent again.
    pub differing_blocks: u64,
    /// Bytes of volumes that were taken up from a saved change record, and are to be gone through within a day: what is left of them.
    #[serde(default)]
    pub hurried_bytes: u64,
    /// Since when every region of 64 MiB has been gone through; `None` while one never was.
    pub oldest_proof: Option<Timestamp>,
    /// Blocks of which the target has told, by their digests, that it holds what it was sent.
    #[serde(default)]
    pub target_proved_blocks: u64,
    /// Blocks of which it holds something else. They are sent again.
    #[serde(default)]
    pub target_differing_blocks: u64,
    /// Where the last of them were.
    #[serde(default)]
    pub target_difference: Option<TargetDifference>,
    /// Bytes of digests that it has told.
    #[serde(default)]
    pub target_bytes: u64,
    /// Since when every region was gone through at the target; `None` while one never was.
    #[serde(default)]
    pub oldest_target_proof: Option<Timestamp>,
}

/// Blocks of which the target was found to hold something else than it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetDifference {
    /// When.
    pub time: Timestamp,
    /// The volume.
    pub slot: VolumeSlot,
    /// The first of the blocks.
    pub first_block: u32,
    /// How many they are.
    pub blocks: u64,
}

/// A volume of a group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// Its place in the group.
    pub slot: VolumeSlot,
    /// The device.
    pub device: PathBuf,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What became of it since the agent's start.
    #[serde(default)]
    pub meters: VolumeMeters,
}

/// A cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutStatus {
    /// When.
    pub time: Timestamp,
    /// Rounds it needed.
    pub rounds: u32,
    /// Its duration in microseconds.
    pub cut_us: u64,
    /// Blocks it captured.
    pub blocks: u64,
}

/// What a tracker says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackerStatus {
    /// `ebpf` or `scan`.
    pub kind: String,
    /// Why everything was dirty when it was opened.
    pub started_over: Option<String>,
    /// Which volumes joined, and are captured for the first time.
    #[serde(default)]
    pub first_copy: Option<String>,
    /// Which volumes go on from the saved change record of a clean stop in another boot, and of when it is.
    #[serde(default)]
    pub taken_up: Option<String>,
    /// Writes issued.
    pub issued: u64,
    /// Writes completed.
    pub completed: u64,
    /// Runs the kernel passed over.
    pub misses: u64,
    /// How far it is to be trusted.
    #[serde(default)]
    pub trust: TrustReport,
}

impl From<TrackerReport> for TrackerStatus {
    fn from(report: TrackerReport) -> Self {
        Self {
            kind: report.kind.to_owned(),
            started_over: report.started_over,
            first_copy: report.first_copy,
            taken_up: report.taken_up,
            issued: report.issued,
            completed: report.completed,
            misses: report.misses,
            trust: report.trust,
        }
    }
}

/// A time as it is printed: RFC 3339, UTC, to the millisecond.
#[must_use]
pub fn rfc3339(time: Timestamp) -> String {
    jiff::Timestamp::from_millisecond(time.0).map_or_else(|_| "beyond the calendar".into(), |time| format!("{time:.3}"))
}
