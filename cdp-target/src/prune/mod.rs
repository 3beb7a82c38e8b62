//! Pruning: which points go, what becomes of the bytes they stood on, and what comes back.
//!
//! In this order, each step durable before the next, so that it may be cut off anywhere and begun again:
//!
//! 1. The ladder decides (`retention`); a line for every point that goes is in the audit log, then the manifest forgets it.
//! 2. Where older points went, a checkpoint becomes the base of the oldest point that stays: nothing below it is read again.
//! 3. Segments that hold what nobody needs any more are rewritten (`rewrite`).
//! 4. Files that neither the manifest nor a reader needs are removed (`sweep`).
//!
//! Changes nothing itself but new files: the manifest is changed by the group's own writer, through `adopt`.

mod audit;
pub mod measure;
mod plan;
mod rewrite;
pub mod sweep;
mod unlisted;

pub use plan::{Plan, Removed};

use crate::checkpoint::builder::{Builder, Progress, Step};
use crate::checkpoint::index::{self, SliceContent};
use crate::journal::change::Change;
use crate::journal::manifest::Checkpoint;
use crate::journal::walk::Blind;
use crate::journal::{GroupJournal, GroupView, JournalError};
use crate::restore::image::one_line;
use crate::restore::keyring::Keyring;
use crate::retention::Ladder;
use cdp_protocol::units::{Epoch, Timestamp};
use cdp_seams::random::Random;
use std::sync::Arc;

/// The base of the oldest point is made anew where more than this share of the image was written over since.
const BASE_WASTE_MAX: f64 = 0.10;

/// Bytes of segments that give way at once, where nobody says otherwise.
pub const CHUNK_BYTES_MAX: u64 = 1 << 30;

/// What a prune works on and with.
pub struct Prune<'a> {
    /// The ladder.
    pub ladder: &'a Ladder,
    /// The clock of retention.
    pub now: Timestamp,
    /// The machine's, for the audit log.
    pub wall: Timestamp,
    /// The group's keys, where they can be had.
    pub keys: Option<&'a Keyring>,
    /// For attempts.
    pub random: &'a dyn Random,
    /// Size that a rewritten segment is filled to.
    pub segment_bytes_max: u64,
    /// Bytes of segments that give way at once: until then both the old and the new are on the disk.
    pub chunk_bytes_max: u64,
    /// A checkpoint between two others goes where the journal between these is less than this share of the image.
    pub checkpoint_share: f64,
    /// Whether nothing but the newest and what is held may be left.
    pub keep_only_newest: bool,
}

/// Why nothing was pruned.
#[derive(Debug, thiserror::Error)]
pub enum PruneError {
    /// The settings would leave next to nothing.
    #[error(
        "the ladder as configured would remove all {0} points but the newest and those that are pinned or labelled"
    )]
    OnlyNewest(u64),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Pruned {
    /// Points removed.
    pub points: u64,
    /// Points that stay.
    pub kept: u64,
    /// The checkpoint made as base of the oldest of them.
    pub base: Option<Epoch>,
    /// Segments rewritten.
    pub rewritten_segments: u64,
    /// Bytes of the group's files before.
    pub bytes_before: u64,
    /// And after.
    pub bytes_after: u64,
    /// Bytes that are not given back yet, because somebody reads them.
    pub leased: bool,
}

/// Who changes the manifest: the group's own writer, wherever it runs.
pub trait Owner {
    /// Gives a change its place; gives a view that shows it.
    ///
    /// # Errors
    /// Where it does not fit, or the manifest cannot be replaced.
    fn adopt(&mut self, change: &Change) -> Result<Arc<GroupView>, JournalError>;

    /// Whether a view in the server still goes by an older manifest.
    ///
    /// # Errors
    /// Where it does not answer.
    fn is_leased(&mut self) -> Result<bool, JournalError>;
}

impl Owner for GroupJournal {
    fn adopt(&mut self, change: &Change) -> Result<Arc<GroupView>, JournalError> {
        Self::adopt(self, change)?;
        Ok(self.view())
    }

    fn is_leased(&mut self) -> Result<bool, JournalError> {
        Ok(self.oldest_lease().is_some())
    }
}

impl Prune<'_> {
    /// Prunes; `progress` is that of the checkpoint, where one is made.
    ///
    /// # Errors
    /// Where the settings would leave next to nothing and that was not asked for, the storage fails or `step` ends it.
    pub fn run(
        &self,
        mut view: Arc<GroupView>,
        owner: &mut dyn Owner,
        step: &mut Step<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<Pruned, PruneError> {
        let bytes_before = sweep::held_bytes(&view)?;
        let mut plan = self.plan(&view)?;
        for unlisted::Unlisted { segment, points } in unlisted::unlisted(&view) {
            let points: Vec<String> = points.iter().map(|(first, last)| format!("{first} to {last}")).collect();
            let points = points.join(", ");
            tracing::error!(segment, points, "a segment's points cannot be listed: they stay, and all that is older");
        }
        self.check(&plan)?;
        // What was cut off before, or was still read then, is to be gone before new files want room.
        sweep::sweep(&view, owner.is_leased()?)?;
        // They may be half a million, and all that follows goes by the ranges.
        let removed = std::mem::take(&mut plan.removed);
        let points = removed.len() as u64;
        if !removed.is_empty() {
            let (storage, folder) = view.place();
            // A crash before the manifest is changed leaves lines of points that stand yet: the next prune says them again.
            audit::append(storage.as_ref(), folder, self.wall, &removed)?;
            view = owner.adopt(&Change::Remove { removed: plan.ranges.clone() })?;
        }
        drop(removed);
        let base = self.base(&mut view, &plan, owner, step, progress)?;
        let rewritten = rewrite::rewrite(self, &mut view, &plan, owner, step)?;
        // What the journal is shorter by may make another short cut needless.
        let checkpoints = self.surplus(&view, None);
        if !checkpoints.is_empty() {
            view = owner.adopt(&Change::Release { checkpoints, floor: None })?;
        }
        let leased = !sweep::sweep(&view, owner.is_leased()?)?;
        let bytes_after = sweep::held_bytes(&view)?;
        Ok(Pruned { points, kept: plan.kept(), base, rewritten_segments: rewritten, bytes_before, bytes_after, leased })
    }

    /// Bytes that a prune would give back, about, once a checkpoint is the base of the oldest point that stays.
    ///
    /// # Errors
    /// Where a segment cannot be read.
    pub fn estimate(&self, view: &Arc<GroupView>, plan: &Plan) -> Result<u64, JournalError> {
        let went = first_epoch(view)? < plan.oldest_kept().unwrap_or_default();
        let after = view.as_if(|manifest| {
            plan.ranges.iter().for_each(|(first, last)| manifest.removed.insert(*first, *last));
            manifest.floor = manifest.floor.max(plan.oldest_kept().filter(|_| went));
        });
        rewrite::estimate(self, &Arc::new(after), plan)
    }

    /// Refuses what would leave next to nothing.
    ///
    /// # Errors
    /// Where it would, and that was not asked for.
    pub fn check(&self, plan: &Plan) -> Result<(), PruneError> {
        if plan.tally.keeps_only_newest() && !self.keep_only_newest {
            return Err(PruneError::OnlyNewest(plan.removed.len() as u64 + 1));
        }
        Ok(())
    }

    /// Makes a checkpoint the base of the oldest point that stays, and gives up those that nobody needs; the one it made.
    fn base(
        &self,
        view: &mut Arc<GroupView>,
        plan: &Plan,
        owner: &mut dyn Owner,
        step: &mut Step<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<Option<Epoch>, JournalError> {
        let Some(oldest) = plan.oldest_kept() else { return Ok(None) };
        let went = first_epoch(view)? < oldest;
        let mut made = None;
        // Of one that cannot be listed no image can be made.
        if went && view.listed(oldest)?.is_some() && Self::is_wasteful(view, oldest) {
            match self.make(view, oldest, owner, step, progress) {
                Ok(()) => made = Some(oldest),
                Err(error) => pass_over(error, oldest)?,
            }
        }
        let floor = if went { sound_base(view, oldest, step)? } else { None };
        let checkpoints = self.surplus(view, floor);
        if floor > view.manifest().floor || !checkpoints.is_empty() {
            *view = owner.adopt(&Change::Release { checkpoints, floor })?;
        }
        Ok(made)
    }

    /// Makes a checkpoint at the oldest point that stays.
    fn make(
        &self,
        view: &mut Arc<GroupView>,
        oldest: Epoch,
        owner: &mut dyn Owner,
        step: &mut Step<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<(), JournalError> {
        let builder = Builder { view, keys: self.keys, random: self.random, now: self.wall };
        let checkpoint = builder.build(oldest, step, progress)?;
        *view = owner.adopt(&Change::Checkpoint(checkpoint))?;
        let (storage, folder) = view.place();
        crate::checkpoint::builder::end(storage.as_ref(), folder)
    }

    /// Whether the oldest point that stays has no checkpoint to stand on, or one that was mostly written over since.
    fn is_wasteful(view: &GroupView, oldest: Epoch) -> bool {
        let Some(base) = view.manifest().checkpoint_before(oldest) else { return true };
        base.epoch < oldest
            && journal_bytes(view, base.epoch, oldest) as f64 > base.needed_bytes as f64 * BASE_WASTE_MAX
    }

    /// Checkpoints that can go: those below the floor, and those between two others that the journal is short between.
    fn surplus(&self, view: &GroupView, floor: Option<Epoch>) -> Vec<Epoch> {
        let checkpoints: &[Checkpoint] = &view.manifest().checkpoints;
        let floor = floor.max(view.manifest().floor);
        // Where anything is damaged the one above it may be all that the points behind it stand on.
        let is_whole = view.damages().is_empty() && unlisted::unlisted(view).is_empty();
        let mut surplus = Vec::new();
        let mut before: Option<Epoch> = None;
        for (at, checkpoint) in checkpoints.iter().enumerate() {
            let is_below = floor.is_some_and(|floor| checkpoint.epoch < floor);
            let is_base = floor == Some(checkpoint.epoch);
            let next = checkpoints.get(at + 1).filter(|_| is_whole);
            let is_short = next.is_some_and(|next| {
                let from = before.unwrap_or(Epoch(0));
                (journal_bytes(view, from, next.epoch) as f64) < checkpoint.needed_bytes as f64 * self.checkpoint_share
            });
            if is_below || (!is_base && is_short) {
                surplus.push(checkpoint.epoch);
            } else {
                before = Some(checkpoint.epoch);
            }
        }
        surplus
    }
}

/// Says why a checkpoint is not the base, and goes on: what else can be given back does not wait for it. Any other error ends the prune.
fn pass_over(error: JournalError, base: Epoch) -> Result<(), JournalError> {
    match error {
        JournalError::Damaged(_) | JournalError::NotRead(_) | JournalError::Full { .. } | JournalError::Io { .. } => {
            let why = one_line(&error);
            tracing::error!(%base, error = why, "a checkpoint does not become the base: what is below stays");
            Ok(())
        }
        error => Err(error),
    }
}

/// The newest checkpoint at or below the oldest point that stays that can be believed, the present floor at last.
fn sound_base(view: &GroupView, oldest: Epoch, step: &mut Step<'_>) -> Result<Option<Epoch>, JournalError> {
    let present = view.manifest().floor;
    // One that lacks blocks does not stand for what may yet heal them.
    let is_whole = |base: &&Checkpoint| base.epoch <= oldest && base.lost_blocks == 0;
    for base in view.manifest().checkpoints.iter().rev().filter(is_whole).map(|base| base.epoch) {
        if Some(base) <= present {
            break;
        }
        match prove(view, base, step) {
            Ok(()) => return Ok(Some(base)),
            Err(error) => pass_over(error, base)?,
        }
    }
    Ok(present)
}

/// Reads a checkpoint again, whole: what it stands for is given up on its word.
fn prove(view: &GroupView, base: Epoch, step: &mut Step<'_>) -> Result<(), JournalError> {
    let (storage, folder) = view.place();
    let checkpoint = view.manifest().checkpoints.iter().find(|checkpoint| checkpoint.epoch == base);
    let checkpoint = *checkpoint.ok_or(JournalError::NoPoint(base))?;
    let damaged =
        |what: String| JournalError::Damaged(format!("checkpoint {base}: {what}; nothing below it is given up"));
    if index::copies(storage.as_ref(), folder, &checkpoint)? < 2 {
        return Err(damaged("its image index is not what was written".to_owned()));
    }
    let image = view.image_index(&checkpoint)?.ok_or_else(|| damaged("its image index is gone".to_owned()))?;
    for record in image.records() {
        let (_, _, record) = record.map_err(JournalError::io("read", &checkpoint.path(folder)))?;
        let record = record.ok_or_else(|| damaged("a record of its image index is damaged".to_owned()))?;
        let SliceContent::Pack { sealed, .. } = record.content else { continue };
        let walked = view.walk_file(&sealed, &mut Blind)?;
        if let Some(damage) = walked.damages.first() {
            return Err(damaged(format!("{} at offset {}: {}", sealed.id, damage.offset, damage.what)));
        }
        if !step(walked.bytes) {
            return Err(JournalError::Interrupted);
        }
    }
    Ok(())
}

/// Bytes of the sealed segments that hold what was written above `from` and up to `to`.
pub(crate) fn journal_bytes(view: &GroupView, from: Epoch, to: Epoch) -> u64 {
    let sealed = view.manifest().sealed.iter();
    let between =
        sealed.filter(|sealed| sealed.newest_run > from && sealed.points.is_none_or(|points| points.first <= to));
    between.map(|sealed| sealed.len).sum()
}

/// The first point there ever was.
fn first_epoch(view: &GroupView) -> Result<Epoch, JournalError> {
    Ok(view.all_points().next().transpose()?.map_or(Epoch(1), |known| known.epoch))
}
